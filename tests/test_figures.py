"""Figures show what the results contain, as read from matplotlib's artists."""

import itertools
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest
from made_results import FLOPS
from made_results import drawable as made
from matplotlib.container import ErrorbarContainer

from kdbench.report.analysis.boards import boards, curves, losses, roles
from kdbench.report.analysis.cost import cost_frame
from kdbench.report.figures import plots as figures
from kdbench.report.figures.captioned import captioned_figures, cost_points
from kdbench.report.figures.style import MARKERS, PALETTE, drawing, inline_svg, point_styles


@pytest.fixture(autouse=True)
def _drawing():
    with drawing():
        yield


def board_of(results):
    (board,) = boards(results, "baseline")
    return board


def drawn(name, results):
    items = captioned_figures(board_of(results), cost_frame(results), "baseline")
    return next(item for item in items if item.name == name)


def test_cost_has_a_point_with_its_deviation_for_each_method():
    results = [made("baseline", seed, 40.0 + seed) for seed in range(3)]
    results += [made("dml", 0, 45.0, flops=3 * FLOPS)]
    item = drawn("cost", results)
    (axes,) = item.figure.axes
    bars = [c for c in axes.containers if isinstance(c, ErrorbarContainer)]
    points = {(*bar[0].get_xydata()[0],): bar for bar in bars}
    assert set(points) == {(1.0, 41.0), (3.0, 45.0)}
    ((low, high),) = (segment[:, 1] for segment in points[1.0, 41.0][2][0].get_segments())
    assert (low, high) == (40.0, 42.0)  # the sample deviation of 40, 41, 42 is 1
    assert points[3.0, 45.0][2] == ()
    assert "where there is more than one" in item.caption
    assert "The line joins the Pareto front." in item.caption
    alone = drawn("cost", results[:3])
    assert "baseline alone is on the Pareto front." in alone.caption
    below, above = axes.get_ylim()
    assert below < 40.0 and above > 45.0
    assert axes.get_xlabel() == "training FLOPs, times those of baseline"


TIMED = made("baseline", flops=None)
ELSEWHERE = TIMED.environment.model_copy(update={"device": "another"})


@pytest.mark.parametrize(
    ("results", "costs", "label"),
    [
        ([TIMED, made("ffsd", flops=None, environment=ELSEWHERE)], {}, "training"),
        ([TIMED, made("dml", flops=None, jobs=2)], {"baseline": 1.5}, "minutes of training"),
        ([made("baseline", flops=None, jobs=2)], {}, "training FLOPs, 10¹⁵"),
        ([made("dml", flops=3 * 10**15)], {"dml": 3.0}, "training FLOPs, 10¹⁵"),
    ],
    ids=["times of two devices", "time", "no time", "no reference"],
)
def test_without_relative_flops_the_cost_is_another(results, costs, label):
    points, found = cost_points(board_of(results), cost_frame(results), "baseline")
    known = points.dropna(subset="cost").set_index("name").cost
    assert (known.to_dict(), found) == (costs, label)
    item = drawn("cost", results)
    assert (item.figure is None) == ("no cost to show" in item.caption) == (not costs)
    assert ("Cost not measured: dml." in item.caption) == ("baseline" in costs)


def test_the_cost_figure_includes_the_recipe_over_other_epochs():
    results = [made("baseline"), made("dml", flops=3 * FLOPS)]
    costs = cost_frame(results)
    longer = costs[costs.method == "baseline"].assign(epochs=12, training_flops=3.0 * FLOPS)
    other = longer.assign(key="another")
    points, _ = cost_points(board_of(results), pd.concat([costs, longer, other]), "baseline")
    found = dict(zip(points.name, points.cost, strict=True))
    assert found == {"baseline": 1.0, "dml": 3.0, "baseline, 12 epochs": 3.0}


def test_the_pareto_front_has_the_undominated_methods():
    points = [("cheap", 1.0, 50.0), ("worse", 2.0, 49.0), ("dear", 3.0, 60.0)]
    points += [("as dear", 3.0, 55.0), ("dearest", 4.0, 60.0), ("the same", 1.0, 50.0)]
    points = pd.DataFrame(points, columns=["name", "cost", "student_top1"])
    assert figures.pareto(points).name.tolist() == ["cheap", "the same", "dear"]


def test_equal_costs_are_drawn_side_by_side():
    costs, heights = [3.0, 1.0, 3.01, 2.0, 3.0, 3.0], [61.0, 60.0, 60.5, 60.0, 61.0, 70.0]
    aside = figures.horizontal_offsets(pd.Series(costs), pd.Series(heights))
    assert sorted(aside[[0, 2, 4]]) == [-8, 0, 8]
    assert not aside[[1, 3, 5]].any()  # the last is far above those of its cost


@pytest.mark.parametrize("count", [1, 10, 30])
def test_labels_do_not_overlap(count):
    gap = 0.95 / max(count, 16)
    for heights in (np.full(count, 0.5), np.linspace(1, 0, count), np.zeros(count)):
        placed = figures.spread(heights, gap)
        assert all(a - b >= gap - 1e-9 for a, b in itertools.pairwise(placed))
        assert min(placed) >= 0 and max(placed) <= 1
    assert figures.spread([0.9, 0.1], 0.05) == [0.9, 0.1]


def test_curves_have_each_seed_their_mean_and_the_reference():
    results = [made(m, seed, 40.0 + seed) for m in ("baseline", "dml") for seed in range(2)]
    results.append(made("dml", 2, None))
    figure = figures.curves(curves(board_of(results).runs), "baseline")
    panels = {axes.get_title("left"): axes.get_lines() for axes in figure.axes}
    assert [len(panels["baseline"]), len(panels["dml"])] == [3, 5]
    reference, first, second, lost, mean = (line.get_ydata() for line in panels["dml"])
    assert list(first) == [37.0, 38.0, 39.0, 40.0]
    assert list(mean) == list(reference) == [37.5, 38.5, 39.5, 40.5]
    assert list(second) == [38.0, 39.0, 40.0, 41.0]
    assert "dashed: mean of baseline." in drawn("curves", results).caption
    assert len(lost) == 2 and panels["dml"][3].get_linestyle() == ":"


@pytest.mark.parametrize(
    "results",
    [
        [made("dml"), made("one")],
        [made("baseline"), made("baseline", 1)],
        [made("baseline", 0, None), made("dml")],
    ],
    ids=["no reference", "the reference alone", "a lost reference"],
)
def test_the_legend_omits_lines_that_are_not_drawn(results):
    caption = drawn("curves", results).caption
    assert caption.startswith("Thick: mean over seeds; thin: each seed.")
    assert "dashed" not in caption


def test_losses_are_summed_over_networks_by_kind():
    board = board_of([made("dml", seed) for seed in range(2)])
    (axes,) = figures.losses(losses(board.runs)).axes
    lines = {line.get_label(): line.get_ydata() for line in axes.get_lines()}
    assert lines["ce"] == pytest.approx([5.0, 2.5, 5 / 3, 1.25])
    assert lines["kl"] == pytest.approx([0.01] * 4)


def test_roles_are_means_over_seeds_and_peers_the_mean_of_the_others():
    board = board_of([made("dml", 0, 40.0), made("dml", 1, 50.0)])
    (axes,) = figures.roles(roles(board.runs)).axes
    shown = {line.get_label(): line.get_xdata()[0] for line in axes.get_lines()}
    assert (shown["student"], shown["peers"], shown["ensemble"]) == (45.0, 43.0, 47.0)
    assert "mean" not in shown


def test_each_seed_is_a_dot():
    results = [made(m, seed, 40.0 + seed) for m in ("baseline", "dml") for seed in range(3)]
    tops = roles(board_of(results).runs)
    (axes,) = figures.seeds(tops[tops.role == "student"]).axes
    *_, dots, mean, _ = axes.get_lines()
    assert sorted(dots.get_xdata()) == [40.0, 40.0, 41.0, 41.0, 42.0, 42.0]
    assert list(mean.get_xdata()) == [41.0, 41.0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["baseline", "dml"]


def test_no_two_of_thirty_methods_look_alike():
    assert len(set(point_styles([str(i) for i in range(63)]).values())) == 63
    assert len(set(PALETTE)) == len(PALETTE) and len(set(MARKERS)) == len(MARKERS)


def test_names_are_no_formulas_and_figures_share_no_id_and_follow_the_theme():
    assert figures.short("a\x00b") == "a\ufffdb"
    figure = drawn("roles", [made("baseline"), made("$x^2$ <b>&", top1=51.0)]).figure
    first, second = (inline_svg(figure, salt, "a\x01b") for salt in ("a", "b"))
    assert "$x^2$ <b>&" in [element.text for element in ElementTree.fromstring(first).iter()]
    ids = [
        {element.get("id") for element in ElementTree.fromstring(svg).iter()} - {None}
        for svg in (first, second)
    ]
    assert ids[0] and not ids[0] & ids[1]
    assert "var(--ink)" in first and "var(--series-0)" in first
    assert PALETTE[0] not in first
