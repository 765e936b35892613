"""The model card that accompanies an exported file."""

import statistics
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from kdbench.export.card import Card
from kdbench.export.formats import ONNX_OPSET
from kdbench.export.student import FinishedRun, format_label
from kdbench.results.files import read_result
from kdbench.results.schema import Result

TEMPLATE = Path(__file__).with_name("model_card.md.jinja")


def render_model_card(finished: FinishedRun, card: Card, file: str, format_name: str) -> str:
    """Return the model card as Markdown, for a file of the given name and format."""
    environment = Environment(
        trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined, keep_trailing_newline=True
    )
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    return template.render(
        card=card,
        run=format_label(finished.result.identity),
        cost=finished.result.cost,
        file=file,
        format_name=format_name,
        method=finished.spec.entry.method,
        opset=ONNX_OPSET,
        seeds=_summarize_seeds(finished),
        suite=finished.spec.suite,
        suite_argument=finished.spec.suite_argument,
    )


def _summarize_seeds(finished: FinishedRun) -> dict[str, Any] | None:
    """Return n, mean and sample standard deviation of the runs that differ only in their seed."""

    def seedless(result: Result) -> object:
        return result.identity.model_copy(update={"seed": 0}), result.environment.precision

    results = [read_result(file) for file in finished.results.glob("seed*.json")]
    values = [
        result.last["student"].top1
        for result in results
        if isinstance(result, Result)
        and result.status == "finished"
        and result.last is not None
        and seedless(result) == seedless(finished.result)
    ]
    if len(values) < 2:
        return None
    return {"n": len(values), "mean": statistics.mean(values), "sd": statistics.stdev(values)}
