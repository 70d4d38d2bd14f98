"""Know before you rent: predict the peak memory of a run, or measure it (Chapter 5)."""

from helpers.memory._configs import catalog, load_config
from helpers.memory._formulas import NAPKIN_LEAVES_OUT, book_cells, compare_formulas, napkin
from helpers.memory.cards import GPUS, Card, parse_size
from helpers.memory.estimate import estimate_training, find_largest
from helpers.memory.measurement import Measurement, measure
from helpers.memory.report import MemoryEstimate

__all__ = [
    "GPUS",
    "NAPKIN_LEAVES_OUT",
    "Card",
    "Measurement",
    "MemoryEstimate",
    "book_cells",
    "catalog",
    "compare_formulas",
    "estimate_training",
    "find_largest",
    "load_config",
    "measure",
    "napkin",
    "parse_size",
]
