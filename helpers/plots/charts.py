"""The few kinds of chart that the chapters draw (all chapters).

A chart takes besides its data `**settings`: `ax` (a panel of `figure` to draw in, else
a new figure is made), `width` and `height` in inches, `alt` (begins the text
alternative), `legend` (False, or a place), and whatever matplotlib's `Axes.set` takes (`xlabel`,
`title`, `xscale`, `xticks`, ...). Colors are names of `COLORS`, or matplotlib's own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

from helpers.plots.style import COLORS, CYCLE, figure

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def lines(
    curves: Any,
    x: Any = None,
    *,
    style: str | Sequence[str] = "-",
    colors: Sequence[str] = CYCLE,
    marks: Mapping[str, float] | None = None,
    notes: Sequence[tuple[float, float, str]] = (),
    **settings: Any,
) -> Figure:
    """Curves, or with `style="o"` points, in one panel.

    Args:
        curves: The y values of one curve, or {label: y values or (x values, y values)}.
        x: x values of all curves that do not bring their own (default 0, 1, 2, ...).
        style: matplotlib's format string ("o-"), for all or one for each.
        colors: One for each curve, then again from the first.
        marks: {text: y} of dashed horizontal lines.
        notes: (x, y, text) of small texts beside a point.
        **settings: See the module.

    Example:
        >>> fig = lines({"train": [3, 2, 1], "test": [3, 2.5, 2.4]}, xlabel="step")
    """
    ax = _panel(settings)
    for i, (label, curve) in enumerate(_named(curves)):
        points = curve if isinstance(curve, tuple) else (curve,) if x is None else (x, curve)
        form = style if isinstance(style, str) else style[i]
        ax.plot(*points, form, color=_color(colors, i), label=label)
    for where, y, text in notes:
        ax.annotate(text, (where, y), (3, 3), textcoords="offset points", fontsize=8)
    return _finish(ax, settings, marks)


def bars(
    values: Mapping[str, float] | Sequence[float] | pd.Series | pd.DataFrame,
    *,
    horizontal: bool = False,
    colors: Sequence[str] = CYCLE,
    marks: Mapping[str, float] | None = None,
    **settings: Any,
) -> Figure:
    """Bars: one for each value, or for each row of a table a group of its columns.

    Args:
        values: {name: value}, a column, numbers (then the bars are counted from 0), or a
            table.
        horizontal: Names at the left, the first at the top.
        colors: One for each column.
        marks: {text: value} of dashed lines across the bars.
        **settings: See the module.

    Example:
        >>> fig = bars({"T4": 16, "L4": 24}, horizontal=True, xlabel="memory (GB)")
    """
    import pandas as pd

    ax = _panel(settings)
    table = values if isinstance(values, pd.DataFrame) else pd.Series(values).to_frame("")
    thick = 0.8 / len(table.columns)
    for i, name in enumerate(table):
        shift = (i - (len(table.columns) - 1) / 2) * thick
        places = [row + shift for row in range(len(table))]
        draw = ax.barh if horizontal else ax.bar
        draw(places, table[name], thick, color=_color(colors, i), label=name)
    if not isinstance(table.index, pd.RangeIndex):
        (ax.set_yticks if horizontal else ax.set_xticks)(range(len(table)), table.index)
        ax.grid(visible=False, axis="y" if horizontal else "x")
    if horizontal and not ax.yaxis_inverted():
        ax.invert_yaxis()
    return _finish(ax, settings, marks, upright=horizontal)


def histogram(
    values: Any,
    bins: Any = 100,
    *,
    colors: Sequence[str] = ("sky", "orange"),
    levels: Any = (),
    rug: Any = (),
    label: str = "",
    **settings: Any,
) -> Figure:
    """How often values occur.

    Args:
        values: Numbers of any shape, or {label: numbers} to lay one over the other.
        bins: Their number, or their edges.
        colors: One for each set of numbers.
        levels: Positions of red lines over the whole height, such as a code book.
        rug: Positions of short red strokes at the bottom.
        label: The legend's words for `levels` or `rug`.
        **settings: See the module.

    Example:
        >>> fig = histogram([1, 2, 2, 3, 3, 3], bins=3, levels=[1.5, 2.5])
    """
    import numpy as np

    ax = _panel(settings)
    for i, (name, numbers) in enumerate(_named(values)):
        shade, alpha = _color(colors, i), 0.7 if i else 1
        ax.hist(np.asarray(numbers).ravel(), bins, color=shade, alpha=alpha, label=name)
    for places, top, width in ((levels, 1, 1.2), (rug, 0.08, 0.7)):
        if len(places):
            across = ax.get_xaxis_transform()
            red = ax.vlines(places, 0, top, COLORS["red"], linewidth=width, transform=across)
            red.set_label(label)
    return _finish(ax, settings)


def heatmap(
    matrix: Any,
    *,
    names: Sequence[str] | None = None,
    colors: Sequence[str] | None = None,
    limits: tuple[float, float] | None = None,
    bar: str = "",
    notes: Sequence[tuple[float, float, str]] = (),
    **settings: Any,
) -> Figure:
    """A matrix in colors: amounts, or kinds with a color each.

    Args:
        matrix: (rows, columns) of numbers; with `colors`, of indices into them.
        names: Of the rows and of the columns, where they are the same.
        colors: The color of each kind (default: amounts, dark to light).
        limits: What the darkest and the lightest color stand for (default: all of it).
        bar: Words for a bar that explains the amounts.
        notes: (column, row, text) of texts on the cells, which are paler then.
        **settings: See the module.

    Example:
        >>> fig = heatmap([[1, 0], [1, 1]], names="ab", colors=("white", "blue"))
    """
    from matplotlib.colors import ListedColormap

    ax, palette = _panel(settings), None
    if colors:
        palette = ListedColormap([_color(colors, i) for i in range(len(colors))])
        limits = (0, len(colors) - 1)
    low, high = limits or (None, None)
    look: dict[str, Any] = {"aspect": "auto", "alpha": 0.5 if notes else 1}
    picture = ax.imshow(matrix, cmap=palette, vmin=low, vmax=high, **look)
    ax.grid(visible=False)
    if names:
        ax.set_xticks(range(len(names)), names, rotation=60)
        ax.set_yticks(range(len(names)), names)
    if colors:  # lines between the cells
        ax.set_xticks([i + 0.5 for i in range(len(matrix[0]))], minor=True)
        ax.set_yticks([i + 0.5 for i in range(len(matrix))], minor=True)
        ax.grid(which="minor", color="white", linewidth=2)
        ax.tick_params(which="minor", length=0)
    for column, row, text in notes:
        ax.text(column, row, text, ha="center", va="center")
    if bar:
        ax.figure.colorbar(picture, ax=ax, label=bar)
    return _finish(ax, settings)


def diagram(
    texts: Sequence[tuple[float, float, str]],
    arrows: Iterable[tuple[int, int, str]] = (),
    *,
    colors: Sequence[str] = ("blue",),
    boxed: bool = True,
    rotation: float = 0,
    **settings: Any,
) -> Figure:
    """Words at places, joined by arrows.

    Args:
        texts: (x, y, words) each; x and y are of the middle.
        arrows: (from, to, words) each, by the texts' numbers.
        colors: One for each text, then again from the first.
        boxed: Draw a box around each text.
        rotation: Of the texts, in degrees.
        **settings: See the module.

    Example:
        >>> fig = diagram([(0, 0, "ask"), (1, 0, "act")], [(0, 1, "yes")], xlim=(-1, 2))
    """
    ax, ways, boxes = _panel(settings), list(arrows), []
    for i, (x, y, words) in enumerate(texts):
        color, look = _color(colors, i), dict[str, Any](fontsize=8.5, rotation=rotation)
        box = {"boxstyle": "round,pad=0.4", "fc": "white", "ec": color} if boxed else None
        shade = COLORS["black"] if boxed else color
        shown = ax.text(x, y, words, ha="center", va="center", color=shade, bbox=box, **look)
        boxes.append(shown.get_bbox_patch())
    for start, end, words in ways:
        (x0, y0, _), (x1, y1, _) = texts[start], texts[end]
        color = COLORS["gray"] if boxed else _color(colors, end)
        gap = 2 if boxed else 24  # points, from the edge of a box or from a text's middle
        arrow = {"arrowstyle": "->", "color": color, "shrinkA": gap, "shrinkB": gap}
        arrow |= {"patchA": boxes[start], "patchB": boxes[end]}
        ax.annotate("", (x1, y1), (x0, y0), arrowprops=arrow)
        ax.text((x0 + x1) / 2, (y0 + y1) / 2 + 0.03, words, ha="center", fontsize=8.5)
    ax.spines[:].set_visible(False)
    ax.tick_params(length=0)
    ax.grid(visible=False)
    fig = _finish(ax, {"xticks": [], "yticks": []} | settings)
    if not fig.get_label():
        said = [" ".join(text.split()) for _, _, text in texts]
        told = [f"{said[a]} → {said[b]}" + (f" ({w})" if w else "") for a, b, w in ways]
        fig.set_label(f"Arrows: {'; '.join(told)}." if told else "")
    return fig


def number_lines(*kinds: str, limit: float | None = None) -> Figure:
    """A tick for every number of each format, subnormal ones in orange (Appendix B).

    Args:
        *kinds: Formats of `floats` with at most 16 bits.
        limit: Show only what lies between -limit and limit.

    Example:
        >>> fig = number_lines("fp4_e2m1", "int8", limit=16)
    """
    from helpers import floats

    alt = f"A stroke for every number, subnormal ones apart; from the top: {', '.join(kinds)}."
    size: dict[str, Any] = {"height": 0.3 + 0.75 * len(kinds), "squeeze": False}
    fig, axes = figure(len(kinds), alt=alt, **size)
    for ax, kind in zip(axes[:, 0], kinds, strict=True):
        form, numbers = floats.FORMATS[kind], floats.values(kind)
        reach = limit or abs(numbers).max()
        numbers = numbers[abs(numbers) <= reach]
        normal = 2.0**form.smallest_power if isinstance(form, floats.FloatFormat) else 0.0
        small = abs(numbers) < normal
        for shown, color in ((numbers[~small], "blue"), (numbers[small], "orange")):
            ax.vlines(shown, 0, 1, color=COLORS[color], linewidth=1)
        ax.set(yticks=[0.5], yticklabels=[kind], ylim=(0, 1.1))
        ax.set(xlim=(-1.02 * reach, 1.02 * reach))
        ax.grid(visible=False)
    axes[-1, 0].set_xlabel("number")
    return fig


def _panel(settings: dict[str, Any]) -> Axes:
    """The axes to draw in, taken out of a chart's settings."""
    size = {key: settings.pop(key) for key in ("width", "height", "alt") if key in settings}
    ax: Axes | None = settings.pop("ax", None)
    return ax or figure(**size)[1]


def _named(values: Any) -> Iterable[tuple[str, Any]]:
    return values.items() if isinstance(values, Mapping) else [("", values)]


def _color(colors: Sequence[str], i: int) -> str:
    name = colors[i % len(colors)]
    return COLORS.get(name, name)


def _finish(
    ax: Axes,
    settings: dict[str, Any],
    marks: Mapping[str, float] | None = None,
    upright: bool = False,
) -> Figure:
    """Marks, scales, labels, ticks (on a log axis plain numbers), and the legend."""
    legend = settings.pop("legend", "best")
    ax.set(**{key: settings.pop(key) for key in ("xscale", "yscale") if key in settings})
    for text, value in (marks or {}).items():
        (ax.axvline if upright else ax.axhline)(value, color=COLORS["red"], ls="--", lw=1.5)
        at = (value, 0.0) if upright else (0.0, value)
        across = ax.get_xaxis_transform() if upright else ax.get_yaxis_transform()
        words = ax.annotate(text, at, (4, 4), across, "offset points", color=COLORS["red"])
        words.set_fontsize(9)
    for name, axis in (("x", ax.xaxis), ("y", ax.yaxis)):
        ticks = settings.get(f"{name}ticks")
        if ticks is not None and axis.get_scale() == "log":
            settings.setdefault(f"{name}ticklabels", [f"{tick:g}" for tick in ticks])
            axis.minorticks_off()
    ax.set(**settings)
    if legend and ax.get_legend_handles_labels()[1]:
        outside = {"loc": "upper left", "bbox_to_anchor": (1, 1)}
        ax.legend(**(outside if legend == "outside" else {"loc": legend}))
    return cast("Figure", ax.figure)
