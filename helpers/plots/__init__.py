"""One figure style, and the few kinds of chart that the chapters draw (all chapters).

Every function here and elsewhere in `helpers` that draws *returns* its Figure, already
closed in pyplot: make it the last expression of a cell to show it, or `.savefig` it.
"""

from helpers.plots.charts import bars, diagram, heatmap, histogram, lines, number_lines
from helpers.plots.style import COLORS, figure, use_style

__all__ = [
    "COLORS",
    "bars",
    "diagram",
    "figure",
    "heatmap",
    "histogram",
    "lines",
    "number_lines",
    "use_style",
]
