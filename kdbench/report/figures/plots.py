"""The figures of a board: each takes a plain frame and gives a matplotlib figure.

Drawn within `kdbench.report.figures.style.drawing`.
"""

import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.transforms import offset_copy

from kdbench.report.figures.style import INK, MARKERS, PALETTE, QUIET, Look, looks, visible

WIDTH = 10.0
"""Inches."""
LONGEST = 32
"""Letters of a name; what is longer is cut."""
FEW_SEEDS = 5
"""That lines can still be told apart for."""


def cost(points: pd.DataFrame, label: str) -> Figure:
    """Accuracy against cost, with the Pareto front.

    Args:
        points: name, cost, student_top1, student_top1_sd (missing for one seed), all measured.
        label: of the axis of cost.
    """
    points = points.sort_values(["student_top1", "name"], ascending=[False, True])
    look = looks(sorted(points.name))
    figure = Figure(figsize=(WIDTH, max(4.2, 0.21 * len(points) + 1.2)))
    axes = figure.add_subplot()
    front = pareto(points)
    axes.step(front.cost, front.student_top1, where="post", color=QUIET, linewidth=1.2, zorder=1)
    moved = beside(points.cost, points.student_top1)
    for aside, (_, point) in zip(moved, points.iterrows(), strict=True):
        colour, marker = look[point["name"]]
        axes.errorbar(
            point.cost,
            point.student_top1,
            yerr=None if math.isnan(point.student_top1_sd) else point.student_top1_sd,
            color=colour,
            marker=marker,
            markersize=7,
            capsize=2.5,
            elinewidth=1.1,
            linestyle="none",
            transform=offset_copy(axes.transData, figure, x=aside, units="points"),
        )
    for side in (-1, 1):  # what is moved aside is not seen by the limits of the axes
        reach = points.student_top1 + side * points.student_top1_sd.fillna(0)
        axes.update_datalim(np.column_stack([points.cost, reach]))
    axes.margins(x=0.06, y=0.08)
    if points.cost.min() > 0 and points.cost.max() / points.cost.min() > 20:
        axes.set_xscale("log")
    axes.set_xlabel(label)
    axes.set_ylabel("student top-1 %")
    _name_points(axes, points, look)
    return figure


def beside(costs: pd.Series, heights: pd.Series) -> pd.Series:
    """Points of paper by which each is moved aside, so that equal costs do not hide each other.

    Costs are equal here within 2 % of the next. What is an eighth of all heights above the next
    hides nothing, and stays on the line of the front that it is on.
    """
    ordered = costs.sort_values(kind="stable")
    column = (ordered > 1.02 * ordered.shift()).cumsum()
    rising = heights.sort_values(kind="stable")
    apart = rising.groupby(column).diff() > np.ptp(heights) / 8
    group = [column, apart.groupby(column).cumsum()]
    place = costs.groupby(group).cumcount()
    middle = (costs.groupby(group).transform("size") - 1) / 2
    return (place - middle) * 8


def pareto(points: pd.DataFrame) -> pd.DataFrame:
    """The points that no other beats in cost and accuracy, from cheap to dear; ties are all on it.

    No other is at least as accurate for no more cost, and better in one of them.
    """
    ordered = points.sort_values(["cost", "student_top1"], ascending=[True, False])
    first = ordered.student_top1 > ordered.student_top1.cummax().shift(fill_value=-np.inf)
    return ordered[first.groupby([ordered.cost, ordered.student_top1]).transform("any")]


def _name_points(axes: Axes, points: pd.DataFrame, look: Mapping[str, Look]) -> None:
    """Names in a column at the right, each as near to the height of its point as there is room."""
    low, high = axes.get_ylim()
    heights = spread((points.student_top1 - low) / (high - low), 0.95 / max(len(points), 16))
    for name, top1, height in zip(points.name, points.student_top1, heights, strict=True):
        colour, marker = look[name]
        axes.plot(1.02, height, marker, color=colour, transform=axes.transAxes, clip_on=False)
        axes.text(
            1.035,
            height,
            f"{short(name)}  {top1:.2f}",
            verticalalignment="center",
            transform=axes.transAxes,
        )


def spread(heights: Iterable[float], gap: float) -> list[float]:
    """Falling heights from 1 to 0, moved apart to at least `gap`."""
    placed: list[float] = []
    ceiling = 1.0
    for height in heights:
        placed.append(min(height, ceiling))
        ceiling = placed[-1] - gap
    floor = 0.0
    for index in reversed(range(len(placed))):
        placed[index] = max(placed[index], floor)
        floor = placed[index] + gap
    return placed


def curves(epochs: pd.DataFrame, reference: str) -> Figure:
    """The student by epoch, a panel per method; the reference's mean stands in each.

    Args:
        epochs: method, seed, finished, epoch, top1.
        reference: method that others are seen against.
    """
    figure, panels = _panels(list(epochs.method.unique()), 5, 1.75)
    finished = epochs[epochs.finished]
    means = finished.groupby(["method", "epoch"]).top1.mean()
    for method, axes in panels.items():
        if reference in finished.method.values and method != reference:
            theirs = means[reference]
            axes.plot(theirs.index, theirs, color=QUIET, linewidth=1, linestyle=(0, (3, 2)))
        for _, seed in epochs[epochs.method == method].groupby("seed"):
            whole = bool(seed.finished.all())
            axes.plot(
                seed.epoch,
                seed.top1,
                color=PALETTE[0] if whole else PALETTE[1],
                linewidth=0.7,
                alpha=0.7,
                linestyle="-" if whole else ":",
                marker="" if whole else "x",
                markevery=[-1],
            )
        if method in finished.method.values:
            axes.plot(means[method].index, means[method], color=PALETTE[0], linewidth=1.8)
    figure.supxlabel("epoch", fontsize=9)
    figure.supylabel("student top-1 %", fontsize=9)
    return figure


def losses(terms: pd.DataFrame) -> Figure:
    """Loss terms by epoch, a panel per method.

    Args:
        terms: method, epoch, kind, loss.
    """
    figure, panels = _panels(list(terms.method.unique()), 2, 1.9)
    for method, axes in panels.items():
        kinds = terms[terms.method == method].groupby("kind", sort=False)
        for index, (kind, term) in enumerate(kinds):
            style = "-" if index < len(PALETTE) else "--"
            colour = PALETTE[index % len(PALETTE)]
            axes.plot(term.epoch, term.loss, color=colour, linestyle=style, label=short(str(kind)))
        axes.set_yscale("symlog", linthresh=1e-3)
        axes.yaxis.set_major_formatter("{x:g}")
        axes.legend(loc="upper left", bbox_to_anchor=(1, 1.05), borderaxespad=0.3)
    figure.supxlabel("epoch", fontsize=9)
    figure.supylabel("loss, mean over the epoch", fontsize=9)
    return figure


def _panels(methods: Sequence[str], most: int, height: float) -> tuple[Figure, dict[str, Axes]]:
    """A figure with an axes for each method, up to `most` beside each other."""
    columns = min(most, len(methods))
    rows = math.ceil(len(methods) / columns)
    width = WIDTH * max(columns / most, 0.45)
    figure = Figure(figsize=(width, height * rows + 0.4))
    axes = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flat
    panels = dict(zip(methods, axes, strict=False))
    for rest in list(axes)[len(methods) :]:
        rest.set_axis_off()
    for method, panel in panels.items():
        panel.set_title(short(method, 20 if most > 2 else LONGEST))
        panel.xaxis.get_major_locator().set_params(integer=True)
    return figure, panels


def seeds(runs: pd.DataFrame) -> Figure:
    """The student of each seed as a dot, their mean as a bar; few seeds are joined by lines.

    Args:
        runs: method, seed, top1 of the student.
    """
    figure, axes, heights = _strip(list(runs.method.unique()))
    if 1 < runs.seed.nunique() <= FEW_SEEDS:
        for _, seed in runs.groupby("seed"):
            axes.plot(seed.top1, seed.method.map(heights), color=QUIET, linewidth=0.6, alpha=0.6)
    axes.plot(runs.top1, runs.method.map(heights), "o", color=PALETTE[0], markersize=4.5)
    for method, tops in runs.groupby("method").top1:
        if len(tops) == 1:
            continue
        height, mean = heights[str(method)], tops.mean()
        axes.plot([mean, mean], [height - 0.32, height + 0.32], color=INK, linewidth=2)
    return figure


def roles(tops: pd.DataFrame) -> Figure:
    """What each role of a method reaches, as means over seeds.

    Args:
        tops: method, seed, role, top1.
    """
    figure, axes, heights = _strip(list(tops.method.unique()))
    means = tops.groupby(["method", "role"]).top1.mean().reset_index()
    for method, of_method in means.groupby("method"):
        height = heights[str(method)]
        ends = [of_method.top1.min(), of_method.top1.max()]
        axes.plot(ends, [height, height], color=QUIET, linewidth=0.8, zorder=1)
    order = sorted(means.role.unique(), key=lambda role: (role != "student", role))
    for index, role in enumerate(order):
        of_role = means[means.role == role]
        axes.plot(
            of_role.top1,
            of_role.method.map(heights),
            MARKERS[index % len(MARKERS)],
            color=PALETTE[index % len(PALETTE)],
            markersize=7 if index == 0 else 5.5,
            label=short(role),
        )
    figure.legend(loc="outside lower left", ncols=min(len(order), 5))
    return figure


def _strip(methods: Sequence[str]) -> tuple[Figure, Axes, dict[str, int]]:
    """An axes with a line for each method, the first on top."""
    figure = Figure(figsize=(WIDTH / 2, 0.3 * len(methods) + 1.1))
    axes = figure.add_subplot()
    axes.set_yticks(range(len(methods)), [short(method, 24) for method in methods])
    axes.set_ylim(len(methods) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("top-1 %")
    return figure, axes, {method: height for height, method in enumerate(methods)}


def short(name: str, longest: int = LONGEST) -> str:
    """A name that fits into a figure."""
    name = visible(name)
    return name if len(name) <= longest else name[: longest - 1] + "…"
