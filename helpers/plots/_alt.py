"""A figure in words, read off what is drawn: the text alternative of every figure.

Numbers come from the artists themselves, so that the words cannot differ from the picture.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.figure import Figure

from helpers._report import counted, shorten

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis

_MOST = 14  # bars, names or texts that are listed one by one


class ToldFigure(Figure):
    """matplotlib's Figure, which brings its text alternative along when it is displayed."""

    def __str__(self) -> str:
        own, told = str(self.get_label() or ""), describe(self)
        return own if own and told.startswith("Words.") else f"{own} {told}".strip()

    def _repr_mimebundle_(self, **_: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        from IPython.core.pylabtools import print_figure

        alt, png = str(self), print_figure(self, fmt="png", base64=True)
        return {"image/png": png, "text/plain": alt}, {"image/png": {"alt": alt}}


def describe(fig: Figure) -> str:
    """What the panels show: kind, title, axes, and the data in a few numbers each."""
    panels = [ax for ax in fig.axes if not hasattr(ax, "_colorbar")]
    told = [text for ax in panels if (text := _panel(ax))]
    if len(told) > 1:
        told = [f"Panel {number}. {text}" for number, text in enumerate(told, 1)]
    return " ".join(told) or "A figure."


def _panel(ax: Axes) -> str:
    bars = [_bars(ax, one) for one in ax.containers if getattr(one, "patches", ())]
    curves = [_curve(line) for line in ax.lines if line.get_transform() == ax.transData]
    images = [_image(ax, image) for image in ax.images]
    strokes = [_strokes(collection) for collection in ax.collections]
    texts = [one.get_text().strip() for one in ax.texts if one.get_text().strip()]
    kinds = {"bars": bars, "curves": curves, "a picture": images, "strokes": strokes}
    shown = [name for name, found in kinds.items() if any(found)]
    title = " ".join(ax.get_title(place) for place in ("left", "center", "right")).strip()
    head = " and ".join(shown) or ("words" if texts else "")
    if not head:
        return ""
    parts = [head[0].upper() + head[1:] + (f": {title}" if title else "")]
    parts += [_axis(name, axis) for name, axis in (("Across", ax.xaxis), ("Up", ax.yaxis))]
    parts += [text for found in kinds.values() for text in found]
    if texts:
        parts.append("Written in it: " + (_by_row(ax) or _listed(texts)))
    return " ".join(f"{shorten(part, 700).rstrip('.')}." for part in parts if part)


def _axis(name: str, axis: Axis) -> str:
    label = axis.get_label().get_text()
    log = " (logarithmic)" if axis.get_scale() == "log" else ""
    return f"{name}: {label}{log}" if label else ""


def _curve(line: Any) -> str:
    """From where to where a curve goes, and how far it gets between."""
    x, y = np.asarray(line.get_xydata(), dtype=float).T
    x, y = x[np.isfinite(y)], y[np.isfinite(y)]
    if not len(y):
        return ""
    name = "" if line.get_label().startswith("_") else f"{line.get_label()}: "
    if line.get_linestyle() == "None" and (np.diff(x) <= 0).any():  # a cloud, not a series
        span = f"from {_number(x.min())} to {_number(x.max())} across"
        return f"{name}{counted(len(x), 'point')} {span}, {_span(y)} up"
    told = f"from {_number(y[0])} at {_number(x[0])} to {_number(y[-1])} at {_number(x[-1])}"
    for word, place in (("lowest", y.argmin()), ("highest", y.argmax())):
        if place not in (0, len(y) - 1) and y[place] not in (y[0], y[-1]):
            told += f", {word} {_number(y[place])} at {_number(x[place])}"
    return name + told


def _bars(ax: Axes, container: Any) -> str:
    """Each bar's name and length; where there are many, their sum of shape."""
    bars = list(container)
    upright = container.orientation != "horizontal"
    lengths = np.array([bar.get_height() if upright else bar.get_width() for bar in bars])
    middles = [bar.get_x() + bar.get_width() / 2 for bar in bars]
    if not upright:
        middles = [bar.get_y() + bar.get_height() / 2 for bar in bars]
    label = str(container.get_label())
    name = f"{label}: " if label and not label.startswith("_") else ""
    names = _tick_names(ax.xaxis if upright else ax.yaxis)
    if len(bars) <= _MOST and names:
        pairs = zip(middles, lengths, strict=True)
        return name + _listed(f"{names.get(round(m), '')} {_number(n)}" for m, n in pairs)
    if len(bars) == 1:  # one piece of a stack
        return f"{name}{_number(lengths[0])}"
    top = int(lengths.argmax())
    filled = [middle for middle, length in zip(middles, lengths, strict=True) if length]
    if not filled:
        return f"{name}all 0"
    span = f"from {_number(min(filled))} to {_number(max(filled))}"
    return f"{name}{span}, highest {_number(lengths[top])} at {_number(middles[top])}"


def _image(ax: Axes, image: Any) -> str:
    """The shape of a matrix, its range, and where each row is largest."""
    matrix: np.ndarray = np.ma.filled(np.ma.asarray(image.get_array(), dtype=float), np.nan)
    rows, columns = matrix.shape[:2]
    told = f"{counted(rows, 'row')} by {counted(columns, 'column')}"
    if image.cmap.N < 20:  # kinds, not amounts
        return f"{told} in {image.cmap.N} colors"
    if matrix.ndim > 2 or np.isnan(matrix).all():
        return told
    told += f", values {_span(matrix[np.isfinite(matrix)])}"
    across, down = _tick_names(ax.xaxis), _tick_names(ax.yaxis)
    best = [int(np.nanargmax(row)) if np.isfinite(row).any() else -1 for row in matrix]
    if rows <= _MOST and columns > 1 and across and down:
        each = (f"{down.get(i, i)} at {across.get(j, j)}" for i, j in enumerate(best) if j >= 0)
        return f"{told}; largest in each row: {_listed(each)}"
    row, column = np.unravel_index(int(np.nanargmax(matrix)), matrix.shape)
    return f"{told}; largest in row {row}, column {column}, counted from 0"


def _by_row(ax: Axes) -> str:
    """The texts on a picture whose rows have names, row by row."""
    names: dict[int, str] = _tick_names(ax.yaxis) if ax.images else {}
    rows: dict[str, list[str]] = {name: [] for name in names.values()}
    for one in ax.texts:
        if (place := round(one.get_position()[1])) in names:
            rows[names[place]].append(one.get_text())
    return "; ".join(f"{name} {', '.join(texts)}" for name, texts in rows.items() if texts)


def _strokes(collection: Any) -> str:
    """How many lines stand where, such as the levels of a code book."""
    if not hasattr(collection, "get_segments") or not (found := collection.get_segments()):
        return ""
    places = np.array([segment[0][0] for segment in found])
    label = str(collection.get_label())
    name = f"{label}: " if label and not label.startswith("_") else ""
    return f"{name}{counted(len(places), 'stroke')} {_span(places)}"


def _tick_names(axis: Axis) -> dict[int, str]:
    """{place: word} of an axis's ticks; of panels that share one, the first carries them."""
    ax = axis.axes
    if axis is ax.xaxis:
        together = [one.xaxis for one in ax.get_shared_x_axes().get_siblings(ax)]
    else:
        together = [one.yaxis for one in ax.get_shared_y_axes().get_siblings(ax)]
    return next(filter(None, map(_words, [axis, *together])), {})


def _words(axis: Axis) -> dict[int, str]:
    """{place: word} of the ticks that carry words rather than their own number."""
    names = {}
    for place, label in zip(axis.get_ticklocs(), axis.get_ticklabels(), strict=False):
        text = label.get_text()
        if text and float(place).is_integer():
            names[int(place)] = text
    return {} if all(_says(text, place) for place, text in names.items()) else names


def _says(text: str, place: int) -> bool:
    try:
        return float(text.replace("\N{MINUS SIGN}", "-")) == place
    except ValueError:
        return False


def _span(values: np.ndarray) -> str:
    low, high = values.min(), values.max()
    return f"from {_number(low)} to {_number(high)}" if low < high else f"all {_number(low)}"


def _number(value: float) -> str:
    if 1000 <= abs(value) < 1e4:
        return f"{value:.0f}"  # a year has no comma
    if float(value).is_integer() and abs(value) < 1000:
        return f"{value:.0f}"
    return f"{value:,.0f}" if 1e4 <= abs(value) < 1e7 else f"{value:.3g}"


def _listed(words: Iterable[str]) -> str:
    found: Sequence[str] = [" ".join(word.split()) for word in words]
    more = f" and {len(found) - _MOST} more" if len(found) > _MOST else ""
    return ", ".join(found[:_MOST]) + more
