"""Low-rank adapters: written, placed, counted, merged and checked (Chapter 3).

PEFT does the adapting; this package shows how it works and says when it does not.
"""

from helpers.lora.check import TrainingCheck, check_training
from helpers.lora.layer import LoRALinear
from helpers.lora.merge import merge_error
from helpers.lora.report import ParameterReport, count_trainable, parameter_report
from helpers.lora.targets import find_target_modules

__all__ = [
    "LoRALinear",
    "ParameterReport",
    "TrainingCheck",
    "check_training",
    "count_trainable",
    "find_target_modules",
    "merge_error",
    "parameter_report",
]
