"""One figure style for the whole course (all chapters).

Every function here and elsewhere in `helpers` that draws *returns* its Figure, already
closed in pyplot: make it the last expression of a cell to show it, or `.savefig` it.
"""

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

STYLE = {
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


def figure(rows=1, columns=1, *, width=8.0, height=3.2, **subplots):
    """A new figure in the course's style: `(figure, axes)`, as `plt.subplots` gives them.

    width, height: inches; further keywords go to `plt.subplots` (`sharey=True`, ...).
    The style is set once, at the first figure, and stays: matplotlib looks some of it up
    only when it draws.
    """
    import matplotlib.pyplot as plt

    use_style()
    fig, axes = plt.subplots(
        rows, columns, figsize=(width, height), layout="constrained", **subplots
    )
    plt.close(fig)
    return fig, axes


def use_style():
    """Make the course's style matplotlib's default in this process."""
    from cycler import cycler
    from matplotlib import rcParams

    order = ("blue", "orange", "green", "red", "purple", "sky", "gray", "black")
    cycle = cycler(color=[COLORS[name] for name in order])
    rcParams.update({**STYLE, "axes.prop_cycle": cycle})
