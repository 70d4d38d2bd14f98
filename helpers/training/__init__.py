"""What SFTTrainer does not offer: lean steps, live loss, the largest batch, recipes (Chapter 5)."""

from helpers.training._running import run_recipe
from helpers.training.batch_size import find_max_batch_size, measure_step
from helpers.training.live import LiveLoss
from helpers.training.loop import simple_loop
from helpers.training.recipes import Recipe, export_recipe
from helpers.training.trainer import LeanSFTTrainer, machine_settings, match_dtypes

__all__ = [
    "LeanSFTTrainer",
    "LiveLoss",
    "Recipe",
    "export_recipe",
    "find_max_batch_size",
    "machine_settings",
    "match_dtypes",
    "measure_step",
    "run_recipe",
    "simple_loop",
]
