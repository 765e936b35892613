"""Agreement of each method with its certificate; running this file writes docs/fidelity.md."""

import inspect
from pathlib import Path

from certificates import CERTIFICATES, LOSS_BOUND, PARAMETER_BOUND, agreement, difference, formulas
from tabulate import tabulate

from kdbench.discovery import find_methods
from kdbench.method import Method

PAGE = Path(__file__).parents[1] / "docs" / "fidelity.md"
TEXT = """# Fidelity

Written by `python tests/fidelity.py`. Largest relative differences in float64: of
every loss term, and of every parameter and running statistic after three steps.
The linear variant of `kdcl` is compared by its cross-entropy: 1e-4 of the optimum.

{table}

## Deliberate deviations from paper and authors' code

{deviations}

## Left out

- **PCL** (Wu & Gong, AAAI 2021, arXiv:2006.04147): the authors' code is not public,
  and public re-implementations disagree on how the mean teachers of the other peers
  are combined (mean or sum), which decides the weight of that term.
- **MCL** with self-supervision or logit distillation, both off by default there.
"""


def deviations(method: type[Method]) -> str:
    """Return the deviations that a method's docstring lists, on one line."""
    text = inspect.getdoc(method) or ""
    return " ".join(text.partition("Deviations")[2].partition(":")[2].split())


def fidelity() -> str:
    """Return the page: certificates, agreement and deliberate deviations of each method."""
    rows = []
    for certificate in CERTIFICATES:
        losses, tensors = (f"{max(found.values()):.0e}" for found in agreement(certificate))
        trace = f"three steps of the authors' code, `{certificate.trace}.npz`"
        rows.append([certificate.name, trace, losses, tensors])
    for name, pairs in formulas().items():
        largest = max(difference(*pair) for pair in pairs)
        rows.append([name, "formulas on the logits of `terms.npz`", f"{largest:.0e}", ""])
    second = "a second implementation, `tests/test_further_methods.py`"
    below = [f"below {LOSS_BOUND:.0e}", f"below {PARAMETER_BOUND:.0e}"]
    rows += [[name, second, *below] for name in ("cl_ilr", "mcl")]
    headers = ["method", "certified by", "losses", "parameters"]
    listed = [
        f"- **{entry.name}** ({entry.method.paper}): {deviations(entry.method)}"
        for entry in find_methods(["all"])
    ]
    return TEXT.format(
        table=tabulate(rows, headers, tablefmt="github", disable_numparse=True),
        deviations="\n".join(listed),
    )


if __name__ == "__main__":
    PAGE.write_text(fidelity(), encoding="utf-8")
    print(PAGE.read_text(encoding="utf-8"))
