"""Charts show the data they are given, with its names, units and colors."""

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.colors import to_hex, to_rgba

from helpers import plots


def words(ax):
    return [text.get_text() for text in ax.get_legend().get_texts()]


def ticks(axis):
    return [label.get_text() for label in axis.get_ticklabels()]


def test_a_figure_is_closed_sized_and_described():
    import matplotlib.pyplot as plt

    before = plt.get_fignums()
    fig, (left, right) = plots.figure(1, 2, width=5, height=2, alt="two panels")
    assert plt.get_fignums() == before
    assert list(fig.get_size_inches()) == [5, 2]
    assert fig.get_label() == "two panels"
    assert plots.lines([1, 2], ax=right) is fig and not left.lines and len(right.lines) == 1
    assert plots.lines([1, 2], width=4, height=3, alt="one line").get_label() == "one line"


def test_lines_know_their_own_x_or_a_common_one():
    curves = {"a": torch.tensor([3.0, 4.0]), "b": ([7, 9], [1, 2])}
    ax = plots.lines(curves, [10, 20], style=("o-", "--"), colors=("red", "#123456")).axes[0]
    a, b = ax.lines
    assert (list(a.get_xdata()), list(a.get_ydata())) == ([10, 20], [3, 4])
    assert (list(b.get_xdata()), list(b.get_ydata())) == ([7, 9], [1, 2])
    assert (a.get_color(), b.get_color()) == (plots.COLORS["red"], "#123456")
    assert (a.get_marker(), b.get_linestyle()) == ("o", "--")
    assert words(ax) == ["a", "b"]
    assert plots.lines([5, 6]).axes[0].get_legend() is None
    assert plots.lines(curves, [1, 2], legend=False).axes[0].get_legend() is None


@pytest.mark.parametrize("order", [("xscale", "xticks"), ("xticks", "xscale")])
def test_ticks_of_a_log_axis_are_plain_numbers(order):
    settings = {"xscale": "log", "xticks": [256, 1024, 4096]}
    ax = plots.lines([1, 2, 3], [256, 1024, 4096], **{key: settings[key] for key in order}).axes[0]
    assert ax.get_xscale() == "log"
    assert ticks(ax.xaxis) == ["256", "1024", "4096"]
    assert not len(ax.xaxis.get_minorticklocs())


def test_marks_and_notes_stand_where_they_belong():
    fig = plots.lines([0, 9], marks={"limit": 5}, notes=[(1, 9, "last")])
    ax = fig.axes[0]
    assert list(ax.lines[1].get_ydata()) == [5, 5]
    assert {text.get_text(): text.xy for text in ax.texts} == {"last": (1, 9), "limit": (0, 5)}
    upright = plots.bars({"x": 3}, horizontal=True, marks={"card": 2}).axes[0]
    assert list(upright.lines[0].get_xdata()) == [2, 2]


def test_horizontal_bars_read_from_the_top():
    fig = plots.bars({"first": 3, "second": 1}, horizontal=True, xlabel="MB")
    ax = fig.axes[0]
    assert [bar.get_width() for bar in ax.patches] == [3, 1]
    assert ticks(ax.yaxis) == ["first", "second"] and ax.yaxis_inverted()
    assert ax.get_xlabel() == "MB"
    plots.bars({"first": 1, "second": 1}, horizontal=True, ax=ax)
    assert ax.yaxis_inverted(), "a second layer does not turn the axis back"


def test_a_table_is_drawn_in_groups_and_numbers_are_counted():
    table = pd.DataFrame({"base": [1, 2], "tuned": [3, 4]}, index=["chrF", "order"])
    ax = plots.bars(table, colors=("gray", "blue")).axes[0]
    assert [bar.get_height() for bar in ax.patches] == [1, 2, 3, 4]
    places = [bar.get_x() for bar in ax.patches]
    assert places[0] < places[2] < places[1] < places[3]
    assert words(ax) == ["base", "tuned"] and ticks(ax.xaxis) == ["chrF", "order"]
    assert to_hex(ax.patches[2].get_facecolor()).upper() == plots.COLORS["blue"]
    counted = plots.bars(np.array([5.0, 6.0, 7.0])).axes[0]
    assert [round(bar.get_x() + bar.get_width() / 2, 9) for bar in counted.patches] == [0, 1, 2]


def test_a_histogram_counts_everything_once():
    values = torch.tensor([[0.1, 0.1], [0.9, 0.4]])
    fig = plots.histogram({"before": values}, [0, 0.5, 1], levels=[0.2], rug=[0.9], label="levels")
    ax = fig.axes[0]
    assert [bar.get_height() for bar in ax.patches] == [3, 1]
    tall, short = ax.collections
    assert [tall.get_segments()[0][1][1], short.get_segments()[0][1][1]] == [1, 0.08]
    assert words(ax)[0] == "before" and "levels" in words(ax)


def test_kinds_in_a_heatmap_have_their_colors():
    fig = plots.heatmap([[0, 2], [1, 1]], names="ab", colors=("white", "blue", "green"))
    (picture,) = fig.axes[0].images
    shown = picture.to_rgba(np.array([0, 1, 2]))
    assert [tuple(row) for row in shown] == [
        pytest.approx(to_rgba(plots.COLORS.get(name, name))) for name in ("white", "blue", "green")
    ]
    assert ticks(fig.axes[0].xaxis) == ticks(fig.axes[0].yaxis) == ["a", "b"]


def test_amounts_in_a_heatmap_keep_their_limits_and_their_bar():
    fig = plots.heatmap(np.eye(3) / 2, limits=(0, 1), bar="weight", notes=[(1, 2, "here")])
    picture = fig.axes[0].images[0]
    assert picture.get_clim() == (0, 1)
    assert fig.axes[1].get_ylabel() == "weight"
    assert fig.axes[0].texts[0].get_position() == (1, 2)


@pytest.mark.parametrize("boxed", [True, False])
def test_a_diagram_points_from_text_to_text(boxed):
    texts, arrows = [(0, 0, "ask"), (4, 2, "act")], [(0, 1, "yes")]
    colors = ("gray", "orange")
    fig = plots.diagram(texts, arrows, colors=colors, boxed=boxed, xlim=(-1, 5))
    ax = fig.axes[0]
    arrow = next(text for text in ax.texts if text.get_text() == "")
    assert (arrow.xyann, arrow.xy) == ((0, 0), (4, 2))
    act = next(text for text in ax.texts if text.get_text() == "act")
    assert act.get_position() == (4, 2) and bool(act.get_bbox_patch()) == boxed
    assert act.get_color() == plots.COLORS["black" if boxed else "orange"]
    assert any(text.get_text() == "yes" for text in ax.texts)


# ── a figure in words ────────────────────────────────────────────────────────────────────
def test_curves_are_told_with_their_ends_and_extremes():
    fig = plots.lines(
        {"train": [3, 2, 1], "test": [3, 2.5, 2.75]}, xlabel="step", yscale="log", title="Loss"
    )
    assert str(fig) == (
        "Curves: Loss. Across: step. train: from 3 at 0 to 1 at 2. "
        "test: from 3 at 0 to 2.75 at 2, lowest 2.5 at 1."
    )


def test_bars_are_told_by_name_and_many_by_their_highest():
    assert "T4 16, L4 24" in str(plots.bars({"T4": 16, "L4": 24}, horizontal=True))
    table = pd.DataFrame({"base": [1, 2], "tuned": [30, 4]}, index=["exact", "order"])
    assert "base: exact 1, order 2. tuned: exact 30, order 4" in str(plots.bars(table))
    many = str(plots.histogram([1, 2, 2, 3, 3, 3] * 9, bins=range(30), levels=[1.5], label="cut"))
    assert "from 1.5 to 3.5, highest 27 at 3.5" in many and "cut: 1 stroke all 1.5" in many


def test_an_arrow_ends_at_the_edge_of_a_wide_box():
    fig = plots.diagram(
        [(0, 0, "ask"), (1, 0, "a box of many words\nin two lines")], [(0, 1, "")], xlim=(-0.5, 2)
    )
    fig.canvas.draw()
    (ax,) = fig.axes
    (arrow,) = [one.arrow_patch for one in ax.texts if getattr(one, "arrow_patch", None)]
    _, box = [text.get_bbox_patch().get_window_extent() for text in ax.texts[:2]]
    line, _ = arrow._get_path_in_displaycoord()
    tip = max(line[0].vertices[:, 0])
    assert box.x0 - 6 < tip <= box.x0 + 1  # it once lay hidden under the box


def test_a_matrix_is_told_by_its_largest_cells_and_a_diagram_by_its_arrows():
    told = str(plots.heatmap([[0, 0.5], [0.25, 0]], names=["I", "am"]))
    assert "2 rows by 2 columns, values from 0 to 0.5" in told
    assert "largest in each row: I at am, am at I" in told
    told = str(plots.diagram([(0, 0, "ask"), (1, 0, "act")], [(0, 1, "yes")]))
    assert told == "Arrows: ask → act (yes)."
    assert str(plots.diagram([(0, 0, "ask")])) == "Words. Written in it: ask."


def test_a_figure_s_own_words_come_first_and_travel_with_the_picture():
    fig, (left, right) = plots.figure(1, 2, alt="Two of a kind.")
    plots.lines([1, 2, 4], ax=left)
    plots.lines([4, 2, 1], ax=right)
    data, metadata = fig._repr_mimebundle_()
    told = metadata["image/png"]["alt"]
    assert told == data["text/plain"] == str(fig)
    assert told.startswith("Two of a kind. Panel 1. Curves. from 1 at 0 to 4 at 2. Panel 2.")
    assert data["image/png"].startswith("iVBOR")  # a PNG


def test_a_figure_of_which_nothing_can_be_told_is_a_figure():
    fig, ax = plots.figure()
    assert str(fig) == "A figure."
    ax.scatter([1, 2], [3, 4])
    ax.bar([], [])
    assert str(fig) == "A figure."


def test_two_points_are_a_curve_and_error_bars_break_nothing():
    fig, ax = plots.figure()
    ax.errorbar([1, 2], [3, 4], yerr=1)
    ax.axhline(9)
    assert "from 3 at 1 to 4 at 2" in str(fig) and "9" not in str(fig)


def test_texts_on_a_picture_are_told_row_by_row():
    notes = [(0, 0, "1"), (1, 0, "8"), (0, 1, "2")]
    look = {"yticks": [0, 1], "yticklabels": ["fp32", "int8"]}
    told = str(plots.heatmap([[0, 1], [1, 1]], colors=("white", "blue"), notes=notes, **look))
    assert "2 rows by 2 columns in 2 colors. Written in it: fp32 1, 8; int8 2." in told


def test_panels_that_share_an_axis_share_its_words():
    fig, axes = plots.figure(1, 2, sharey=True)
    for ax, shift in zip(axes, (0, 5), strict=True):
        plots.bars({"T4": 16 + shift, "L4": 24 + shift}, horizontal=True, ax=ax)
    assert str(fig) == "Panel 1. Bars. T4 16, L4 24. Panel 2. Bars. T4 21, L4 29."


def test_a_piece_of_a_stack_is_told_by_its_height():
    fig, ax = plots.figure()
    ax.bar([0], [2.5], label="weights")
    assert str(fig) == "Bars. weights: 2.5."
