"""One look for what the course shows: text in a terminal, HTML in a notebook."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

__all__ = ["Finding", "Shown", "card", "counted", "escape", "shorten", "table"]

_COLORS = {"good": "#009E73", "bad": "#D55E00", "note": "#0072B2"}
_MARKS = {"good": "✓", "bad": "✗", "note": "•"}


@dataclass(frozen=True)
class Finding:
    """One thing that a check found: a code to test for and a sentence to read."""

    code: str
    message: str

    def __str__(self) -> str:
        return f"{self.code}: {self.message}"


class Shown:
    """Prints as its `__str__`, in a REPL too; `_repr_html_` is the same thing in a notebook."""

    def __repr__(self) -> str:
        return str(self)

    def _repr_html_(self) -> str:
        return card(str(self))


def card(text: str, kind: str = "note", *, html: str | None = None) -> str:
    """A framed block of HTML, said by a screen reader as one region.

    text: what it says; shown line for line unless `html` is given, then it is the
    region's label. kind: 'good', 'bad' or 'note', told by a mark as well as by a colour.
    """
    style = f"border-left:4px solid {_COLORS[kind]};padding-left:8px;overflow-x:auto"
    if html is None:
        html = f"<pre style='white-space:pre-wrap;margin:0'>{escape(text)}</pre>"
    label = escape(f"{_MARKS[kind]} {text.splitlines()[0] if text else ''}", quote=True)
    return f"<div role='group' aria-label='{label}' style='{style}'>{html}</div>"


def table(
    rows: Iterable[Sequence[object]],
    head: Sequence[object] = (),
    *,
    caption: str = "",
    row_heads: bool = False,
) -> str:
    """An HTML table whose cells are escaped; a cell with `__html__` is taken as it is.

    row_heads: the first cell of each row is its heading (a table of names and values).
    """
    style = "text-align:left;vertical-align:top"
    parts = [f"<caption style='{style}'>{_cell(caption)}</caption>"] if caption else []
    if head:
        cells = "".join(f"<th scope='col' style='{style}'>{_cell(name)}</th>" for name in head)
        parts.append(f"<thead><tr>{cells}</tr></thead>")
    for row in rows:
        cells = ""
        for column, value in enumerate(row):
            tag = "th scope='row'" if row_heads and column == 0 else "td"
            cells += f"<{tag} style='{style}'>{_cell(value)}</{tag[:2]}>"
        parts.append(f"<tr>{cells}</tr>")
    return f"<table>{''.join(parts)}</table>"


class Markup(str):
    """HTML that `table` does not escape."""

    __slots__ = ()

    def __html__(self) -> str:
        return self


def _cell(value: object) -> str:
    return value.__html__() if hasattr(value, "__html__") else escape(str(value))


def counted(number: int, noun: str) -> str:
    """'1 row', '2,000 rows'."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def shorten(value: object, width: int = 90) -> str:
    """The value on one line, cut with an ellipsis at `width` characters."""
    text = " ".join(str(value).split())
    return text if len(text) <= width else f"{text[: width - 1]}…"
