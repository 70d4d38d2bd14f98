"""Does it help to hum first? The same sentences learned with and without (helpers/yoda).

    python tests/benchmarks/hums.py            # a quarter of an hour on one core

1,000 training rows, an earlier recipe of Chapter 0 (batch 8), judged on 200 other *training*
rows: the test set has no part in it. A hum before the translation lets its first word stay as
it stands in the sentence; without one it has to be spelled again with a capital, which is
other tokens.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from cpu_training import make

from helpers import data, evaluation, runtime

RECIPE = {"per_device_train_batch_size": 8, "learning_rate": 3e-3, "num_train_epochs": 1}


def learn(here, hums, count, held):
    """Train on `count` rows with or without hums: the report on `held` others, seconds."""
    rows = data.load_yoda("train", interjections=hums).shuffle(seed=1)
    with tempfile.TemporaryDirectory() as folder:
        learned = rows.select(range(held, held + count))
        trainer, _, _ = make("lean", here, folder, learned, **RECIPE)
        begun = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - begun
    model, tokenizer = trainer.model, trainer.processing_class
    return evaluation.evaluate(model, tokenizer, rows.select(range(held))), seconds


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1000, help="training rows")
    parser.add_argument("--held", type=int, default=200, help="rows judged, and not learned")
    choices = parser.parse_args()
    here = runtime.detect()
    for hums in (False, True):
        report, seconds = learn(here, hums, choices.rows, choices.held)
        print(
            f"{'a hum first' if hums else 'no hum':12} exact {report.exact_match:5.1f} %  "
            f"valid order {report.valid_order:5.1f} %  chrF {report.chrf:5.1f}  "
            f"{seconds:4.0f} s of training",
            flush=True,
        )


if __name__ == "__main__":
    main()
