"""Agreement of each method with its certificate; running this file writes docs/fidelity.md."""

import inspect
from pathlib import Path

import torch
import torch.nn.functional as F
from certificates import CERTIFICATES, LOSS_BOUND, PARAMETER_BOUND, agreement, load, tensors
from kdbench.methods.kdcl import error_correlation, general_weights, minlogit_target, naive_target
from tabulate import tabulate

from kdbench.discovery import find_methods
from kdbench.losses import mutual_kl
from kdbench.method import Method

PAGE = Path(__file__).parents[1] / "docs" / "fidelity.md"


def formula_differences() -> dict[str, float]:
    """Return the largest relative differences of methods certified by formulas, in float64."""
    terms = tensors(load("terms"), "")
    logits, labels = terms["logits"], terms["labels"]
    log_p = F.log_softmax(logits[0], dim=1)
    smoothed = 0.9 * F.nll_loss(log_p, labels) - 0.1 * log_p.mean()
    pairs = {
        "label_smoothing": [
            (F.cross_entropy(logits[0], labels, label_smoothing=0.1), smoothed),
        ],
        "dml": [
            (torch.stack(mutual_kl(list(logits))), terms["dml/kl_T1"]),
            (torch.stack(mutual_kl(list(logits), 2.0)), terms["dml/kl_T2_scaled"]),
        ],
        "kdcl": [
            (naive_target(logits, labels), terms["kdcl/naive_target"]),
            (minlogit_target(logits, labels), terms["kdcl/minlogit_target"]),
            (
                general_weights(
                    error_correlation(
                        terms["kdcl/general_probabilities"], terms["kdcl/general_labels"]
                    )
                ),
                terms["kdcl/general_weights"],
            ),
        ],
    }
    return {
        method: max(float((ours - ref).abs().max() / ref.abs().max()) for ours, ref in values)
        for method, values in pairs.items()
    }


SECOND_IMPLEMENTATIONS = {
    "cl_ilr": "a second implementation, `tests/test_further_methods.py`",
    "mcl": "a second implementation, `tests/test_further_methods.py`",
}


def deviations(method: type[Method]) -> str:
    """Return the deviations that a method's docstring lists, on one line."""
    text = inspect.getdoc(method) or ""
    return " ".join(text.partition("Deviations")[2].partition(":")[2].split())


def fidelity() -> str:
    """Return the page: certificates, agreement and deliberate deviations of each method."""
    rows = []
    for certificate in CERTIFICATES:
        found = agreement(certificate)
        losses, parameters = max(found.losses.values()), max(found.parameters.values())
        trace = f"three steps of the authors' code, `{certificate.trace}.npz`"
        rows.append([certificate.name, trace, f"{losses:.0e}", f"{parameters:.0e}"])
    for name, difference in formula_differences().items():
        rows.append([name, "formulas on the logits of `terms.npz`", f"{difference:.0e}", ""])
    for name, what in SECOND_IMPLEMENTATIONS.items():
        rows.append([name, what, f"below {LOSS_BOUND:.0e}", f"below {PARAMETER_BOUND:.0e}"])
    headers = ["method", "certified by", "losses", "parameters"]
    listed = [
        f"- **{entry.name}** ({entry.method.paper}): {deviations(entry.method)}"
        for entry in find_methods(["all"])
    ]
    return "\n".join(
        [
            "# Fidelity",
            "",
            "Written by `python tests/fidelity.py`. Largest relative differences in float64: of",
            "every loss term, and of every parameter and running statistic after three steps.",
            "The linear variant of `kdcl` is compared by its cross-entropy: 1e-4 of the optimum.",
            "",
            tabulate(rows, headers, tablefmt="github", disable_numparse=True),
            "",
            "## Deliberate deviations from paper and authors' code",
            "",
            *listed,
            "",
            "## Left out",
            "",
            "- **PCL** (Wu & Gong, AAAI 2021, arXiv:2006.04147): the authors' code is not public,",
            "  and public re-implementations disagree on how the mean teachers of the other peers",
            "  are combined (mean or sum), which decides the weight of that term.",
            "- **MCL** with self-supervision or logit distillation, both off by default there.",
            "",
        ]
    )


if __name__ == "__main__":
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(fidelity(), encoding="utf-8")
    print(PAGE.read_text(encoding="utf-8"))
