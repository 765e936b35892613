"""The plots of a board. Each function takes a data frame and returns a matplotlib figure.

Call them within the context `kdbench.report.figures.style.drawing`.
"""

import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.transforms import offset_copy

from kdbench.report.figures.style import (
    INK,
    MARKERS,
    PALETTE,
    QUIET,
    PointStyle,
    point_styles,
    visible,
)

WIDTH = 10.0
"""Width of a figure in inches."""
MAX_NAME_LENGTH = 32
"""Length in characters to which names are shortened."""
MAX_JOINED_SEEDS = 5
"""Number of seeds up to which lines join the points of each seed."""


def cost(points: pd.DataFrame, label: str) -> Figure:
    """Plot accuracy against cost, with the Pareto front.

    Args:
        points: columns name, cost, student_top1 and student_top1_sd (missing for one seed).
        label: label of the cost axis.
    """
    points = points.sort_values(["student_top1", "name"], ascending=[False, True])
    look = point_styles(sorted(points.name))
    figure = Figure(figsize=(WIDTH, max(4.2, 0.21 * len(points) + 1.2)))
    axes = figure.add_subplot()
    front = pareto(points)
    axes.step(front.cost, front.student_top1, where="post", color=QUIET, linewidth=1.2, zorder=1)
    moved = horizontal_offsets(points.cost, points.student_top1)
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
    for side in (-1, 1):  # matplotlib ignores offset artists when it computes axis limits
        reach = points.student_top1 + side * points.student_top1_sd.fillna(0)
        axes.update_datalim(np.column_stack([points.cost, reach]))
    axes.margins(x=0.06, y=0.08)
    if points.cost.min() > 0 and points.cost.max() / points.cost.min() > 20:
        axes.set_xscale("log")
    axes.set_xlabel(label)
    axes.set_ylabel("student top-1 %")
    _name_points(axes, points, look)
    return figure


def horizontal_offsets(costs: pd.Series, heights: pd.Series) -> pd.Series:
    """Return horizontal offsets in typographic points that separate overlapping markers.

    Markers overlap if their costs are within 2 % of the next and their heights within an eighth
    of the whole range.
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
    """Return the points on the Pareto front, in order of cost; ties are all included.

    A point is on the front if no other is at least as accurate and at most as costly, and better
    in one of both.
    """
    ordered = points.sort_values(["cost", "student_top1"], ascending=[True, False])
    first = ordered.student_top1 > ordered.student_top1.cummax().shift(fill_value=-np.inf)
    return ordered[first.groupby([ordered.cost, ordered.student_top1]).transform("any")]


def _name_points(axes: Axes, points: pd.DataFrame, look: Mapping[str, PointStyle]) -> None:
    """Write the names in a column at the right, each as close to its point as possible."""
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
    """Return descending heights between 1 and 0, moved apart by at least `gap`."""
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
    """Plot the student's accuracy by epoch, one panel per method, with the reference's mean.

    Args:
        epochs: columns method, seed, finished, epoch and top1.
        reference: method whose mean is shown in every panel.
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
    """Plot loss terms by epoch, one panel per method.

    Args:
        terms: columns method, epoch, kind and loss.
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
    """Return a figure with one axes per method, at most `most` in a row."""
    columns = min(most, len(methods))
    rows = math.ceil(len(methods) / columns)
    width = WIDTH * max(columns / most, 0.45)
    figure = Figure(figsize=(width, height * rows + 0.4))
    axes = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flat
    panels = dict(zip(methods, axes, strict=False))
    for rest in list(axes)[len(methods) :]:
        rest.set_axis_off()
    for method, panel in panels.items():
        panel.set_title(short(method, 20 if most > 2 else MAX_NAME_LENGTH))
        panel.xaxis.get_major_locator().set_params(integer=True)
    return figure, panels


def seeds(runs: pd.DataFrame) -> Figure:
    """Plot the student of each seed as a dot and the mean as a bar; lines join few seeds.

    Args:
        runs: columns method, seed and top1 of the student.
    """
    figure, axes, heights = _strip(list(runs.method.unique()))
    if 1 < runs.seed.nunique() <= MAX_JOINED_SEEDS:
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
    """Plot the mean accuracy over seeds of each role in each method.

    Args:
        tops: columns method, seed, role and top1.
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
    """Return an axes with one line per method, the first at the top."""
    figure = Figure(figsize=(WIDTH / 2, 0.3 * len(methods) + 1.1))
    axes = figure.add_subplot()
    axes.set_yticks(range(len(methods)), [short(method, 24) for method in methods])
    axes.set_ylim(len(methods) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("top-1 %")
    return figure, axes, {method: height for height, method in enumerate(methods)}


def short(name: str, longest: int = MAX_NAME_LENGTH) -> str:
    """Return a name shortened to fit into a figure."""
    name = visible(name)
    return name if len(name) <= longest else name[: longest - 1] + "…"
