"""Know before you rent: predict the peak memory of a run, or measure it (Chapter 5)."""

from helpers.memory import cards
from helpers.memory.configs import catalogue, load_config
from helpers.memory.estimate import (
    add_arguments,
    compare_formulas,
    estimate_training,
    find_largest,
    for_card,
    main,
)
from helpers.memory.formulas import NAPKIN_LEAVES_OUT, book_cells, napkin
from helpers.memory.measurement import Measurement, measure
from helpers.memory.report import GPUS, MemoryEstimate, parse_size

__all__ = [
    "GPUS",
    "NAPKIN_LEAVES_OUT",
    "Measurement",
    "MemoryEstimate",
    "add_arguments",
    "book_cells",
    "cards",
    "catalogue",
    "compare_formulas",
    "estimate_training",
    "find_largest",
    "for_card",
    "load_config",
    "main",
    "measure",
    "napkin",
    "parse_size",
]
