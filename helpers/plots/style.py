"""Colors and the look of every figure (all chapters)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's palette, readable with every common kind of color blindness.
COLORS = {
    "blue": "#0072B2",
    "orange": "#E69F00",
    "green": "#009E73",
    "red": "#D55E00",
    "purple": "#CC79A7",
    "sky": "#56B4E9",
    "yellow": "#F0E442",
    "gray": "#8C8C8C",
    "black": "#222222",
}
CYCLE = ("blue", "orange", "green", "red", "purple", "sky", "gray", "black")

STYLE: dict[Any, Any] = {
    "figure.dpi": 100,
    "savefig.dpi": 100,
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#555555",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E4E4E4",
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "lines.linewidth": 2.0,
    "image.cmap": "viridis",
}


def use_style() -> None:
    """Make the course's style matplotlib's default in this process.

    Example:
        >>> use_style()
    """
    from cycler import cycler
    from matplotlib import rcParams

    cycle = cycler(color=[COLORS[name] for name in CYCLE])
    rcParams.update({**STYLE, "axes.prop_cycle": cycle})


def figure(
    rows: int = 1,
    columns: int = 1,
    *,
    width: float = 8.0,
    height: float = 3.2,
    alt: str = "",
    **subplots: Any,
) -> tuple[Figure, Any]:
    """A new figure in the course's style.

    Args:
        rows: Rows of panels.
        columns: Panels a row.
        width: Inches.
        height: Inches.
        alt: Begins the text alternative, which goes on with what is drawn (`str(fig)`).
        **subplots: For `plt.subplots` (`sharey=True`, ...).

    Returns:
        The figure and its axes, as `plt.subplots` gives them.

    Example:
        >>> fig, (left, right) = figure(1, 2, width=9, sharey=True)
    """
    import matplotlib.pyplot as plt

    from helpers.plots._alt import ToldFigure

    use_style()  # and it stays: matplotlib looks some of it up only when it draws
    size: dict[str, Any] = {"figsize": (width, height), "layout": "constrained"}
    size["FigureClass"] = ToldFigure
    fig, axes = plt.subplots(rows, columns, **size, **subplots)
    plt.close(fig)
    fig.set_label(alt)
    return fig, axes
