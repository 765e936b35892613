"""The figures of a board with titles, captions and text alternatives."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import pandas as pd
from matplotlib.figure import Figure

from kdbench.report.analysis.boards import Board, curves, losses, roles
from kdbench.report.analysis.cost import GROUP, cost_frame
from kdbench.report.figures import plots as figures


@dataclass(frozen=True)
class CaptionedFigure:
    """A figure with its texts."""

    name: str
    title: str
    summary: str
    """Text alternative that describes the content of the figure."""
    caption: str
    """Explanation of how to read the figure."""
    figure: Figure | None
    """The figure; None if there is nothing to draw, with the reason in the caption."""


def captioned_figures(board: Board, costs: pd.DataFrame, against: str) -> Iterator[CaptionedFigure]:
    """Yield all figures of a board; `costs` is the cost frame of all results."""
    yield _cost(*cost_points(board, costs, against))
    tops = roles(board.runs)
    if not tops.empty:
        yield _seeds(tops[tops.role == "student"])
        yield _roles(tops)
    epochs = curves(board.runs)
    if not epochs.empty:
        references = board.rows.method[board.rows.reference]
        yield _curves(epochs, references.iloc[0] if len(references) == 1 else against)
    terms = losses(board.runs)
    if not terms.empty:
        yield _losses(terms)


def cost_points(board: Board, costs: pd.DataFrame, against: str) -> tuple[pd.DataFrame, str]:
    """Return the points of the cost figure, and the label of the cost axis.

    Points include methods of the same recipe with other numbers of epochs. Cost is training FLOPs
    relative to `against`, or training time if that is known for more runs and was measured in one
    way.
    """
    here = cost_frame(board.results)
    costs = costs.merge(here[GROUP].drop_duplicates())
    elsewhere = ~costs.epochs.isin(here.epochs)
    epochs = ", " + costs.epochs.astype(str) + " epochs"
    costs = costs.assign(name=costs.method + epochs.where(elsewhere, ""))
    if costs.training_flops.count() >= costs.training_seconds.count():
        own = costs[(costs.base == against) & ~elsewhere].training_flops.dropna().unique()
        if len(own) == 1:
            return costs.assign(cost=costs.training_flops / own[0]), (
                f"training FLOPs, times those of {figures.short(against)}"
            )
        return costs.assign(cost=costs.training_flops / 1e15), "training FLOPs, 10¹⁵"
    if costs.way.dropna().nunique() > 1:
        return costs.assign(cost=math.nan), "training"
    if costs.training_seconds.max() < 3600:
        return costs.assign(cost=costs.training_seconds / 60), "minutes of training"
    return costs.assign(cost=costs.training_seconds / 3600), "hours of training"


def _cost(points: pd.DataFrame, label: str) -> CaptionedFigure:
    title = "Accuracy against cost"
    measured = points.dropna(subset=["cost"])
    if measured.empty:
        missing = (
            "No finished run has training FLOPs, or a training time that compares: alone on its "
            "device, and on one like that of the others. There is no cost to show."
        )
        return CaptionedFigure("cost", title, "", missing, None)
    best = measured.iloc[measured.student_top1.argmax()]
    front = list(figures.pareto(measured).name)
    summary = (
        f"{label[0].upper()}{label[1:]} and student top-1 of {len(measured)} methods. Most "
        f"accurate: {best['name']}, {best.student_top1:.2f} % at {best.cost:.3g}. "
        f"On the Pareto front: {', '.join(front)}."
    )
    single = measured.student_top1_sd.isna()
    caption = "Bars: sample standard deviation over seeds"
    if single.all():
        caption = "No error bars: one seed each"
    elif single.any():
        caption += ", where there is more than one"
    joined = "The line joins" if front[1:] else f"{front[0]} alone is on"
    caption += f". {joined} the Pareto front. Points of equal cost stand side by side."
    if lost := sorted(set(points.name) - set(measured.name)):
        caption += f" Cost not measured: {', '.join(lost)}."
    return CaptionedFigure("cost", title, summary, caption, figures.cost(measured, label))


def _seeds(tops: pd.DataFrame) -> CaptionedFigure:
    summary = "Student top-1 by seed: " + "; ".join(
        f"{method} " + ", ".join(f"{top1:.2f}" for top1 in of_method)
        for method, of_method in tops.groupby("method", sort=False).top1
    )
    joined = 1 < tops.seed.nunique() <= figures.MAX_JOINED_SEEDS
    caption = "A dot is a seed"
    caption += ", the bar their mean" * bool(tops.method.duplicated().any())
    caption += "; lines join the dots of one seed." if joined else "."
    return CaptionedFigure("seeds", "Student by seed", summary + ".", caption, figures.seeds(tops))


def _roles(tops: pd.DataFrame) -> CaptionedFigure:
    means = tops.groupby(["method", "role"], sort=False).top1.mean().unstack("role")
    summary = "Mean top-1 by role: " + "; ".join(
        f"{method}: " + ", ".join(f"{role} {top1:.2f}" for role, top1 in row.dropna().items())
        for method, row in means.iterrows()
    )
    caption = (
        "Only the student ships. Peers: mean of the other networks. Ensemble: argmax of the mean "
        "probabilities of all networks."
    )
    return CaptionedFigure("roles", "Roles", summary + ".", caption, figures.roles(tops))


def _curves(epochs: pd.DataFrame, against: str) -> CaptionedFigure:
    last = epochs[epochs.epoch == epochs.epoch.max()].groupby("method", sort=False).top1.mean()
    summary = f"Student top-1 by epoch. In epoch {epochs.epoch.max()}: " + ", ".join(
        f"{method} {top1:.2f}" for method, top1 in last.items()
    )
    caption = "Thick: mean over seeds; thin: each seed"
    if against in epochs.method[epochs.finished].values and epochs.method.nunique() > 1:
        caption += f"; dashed: mean of {against}"
    caption += "."
    if not epochs.finished.all():
        caption += " Dotted, with a cross at its end: a run that did not finish."
    return CaptionedFigure(
        "curves", "Training curves", summary + ".", caption, figures.curves(epochs, against)
    )


def _losses(terms: pd.DataFrame) -> CaptionedFigure:
    kinds = terms.groupby("method", sort=False).kind.unique()
    summary = "Loss terms by epoch: " + "; ".join(
        f"{method}: {', '.join(names)}" for method, names in kinds.items()
    )
    caption = (
        "Each kind of term as it is minimised: weighted, summed over networks, mean over seeds. "
        "The axis is logarithmic above 0.001 and linear below."
    )
    return CaptionedFigure("losses", "Loss terms", summary + ".", caption, figures.losses(terms))
