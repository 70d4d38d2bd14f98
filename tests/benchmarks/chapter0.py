"""Chapter 0's training, run again: seeds, dtypes, and the settings that were tried.

    python tests/benchmarks/chapter0.py --seed 1 --seed 2              # judged on validation
    python tests/benchmarks/chapter0.py --dtype bfloat16 --test        # and on the test set
    python tests/benchmarks/chapter0.py --batch 8 --rate 3e-3 --beta2 0.999

One line of CSV for each run, on the standard output. Where the processor has no unit for
bfloat16, its products are computed in float32 and rounded (`ProductsInFloat32`), and the
line says so. Settings are chosen on the validation
split: 150 of the training rows, which no run learns. The test set is for what was chosen.
`helpers/yoda/runs.csv` holds the runs that Chapter 0 shows.
"""

import argparse
import contextlib
import csv
import datetime
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from cpu_training import make
from torch.utils._python_dispatch import TorchDispatchMode

from helpers import data, evaluation, runtime

SCORES = ("exact_match", "valid_order", "chrf")
aten = torch.ops.aten
PRODUCTS = (aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default)


class ProductsInFloat32(TorchDispatchMode):
    """Matrix products of bfloat16 as units for it compute them: summed in float32, rounded once.

    PyTorch's own loops for processors without such a unit take 15 to 60 times as long.
    """

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function not in PRODUCTS or args[0].dtype is not torch.bfloat16:
            return function(*args, **(kwargs or {}))
        return function(*(matrix.float() for matrix in args), **(kwargs or {})).bfloat16()


def learn(here, choices, seed, dtype):
    """Train once; what was chosen, how long it took and how it was judged, {column: value}."""
    slow = dtype is torch.bfloat16 and processor().split()[-1] not in ("avx512_bf16", "amx_bf16")
    with ProductsInFloat32() if slow else contextlib.nullcontext():
        found = learn_as_asked(here, choices, seed, dtype)
    if slow:
        found["dtype"] += " (products in float32)"
    return found


def learn_as_asked(here, choices, seed, dtype):
    """`learn`, with the products of this processor."""
    rows = data.load_yoda("train").shuffle(seed=42)
    with tempfile.TemporaryDirectory() as folder:
        trainer, _, _ = make(
            "lean",
            here,
            folder,
            rows.select(range(choices.rows)),
            base=choices.base,
            dtype=dtype,
            rank=choices.rank,
            per_device_train_batch_size=choices.batch,
            learning_rate=choices.rate,
            num_train_epochs=choices.epochs,
            adam_beta2=choices.beta2,
            lr_scheduler_type=choices.schedule,
            max_length=256,
            seed=seed,
        )
        result = trainer.train()
    settings = {key: value for key, value in vars(choices).items() if key in SETTINGS}
    found = {
        "day": datetime.date.today().isoformat(),
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "dtype": str(dtype).removeprefix("torch."),
        "seed": seed,
        **settings,
        "steps": result.global_step,
        "seconds": round(result.metrics["train_runtime"]),
    }
    splits = {"validation": rows.select(range(len(rows) - choices.held, len(rows)))}
    if choices.test:
        splits["test"] = data.load_yoda("test")
    for split, held in splits.items():
        report = evaluation.evaluate(trainer.model, trainer.processing_class, held)
        found |= {f"{split} {score}": round(getattr(report, score), 1) for score in SCORES}
    return found


SETTINGS = {
    "base": "nf4",
    "rows": 1200,
    "batch": 4,
    "rate": 2e-3,
    "epochs": 1.0,
    "rank": 16,
    "beta2": 0.99,
    "schedule": "cosine",
}


def processor():
    """The processor's name, and the widest numbers that it multiplies."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    said = {key.strip(): value for key, _, value in (line.partition(": ") for line in lines)}
    known = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
    widest = [flag for flag in known if flag in said.get("flags", "").split()]
    return " ".join([said.get("model name", "unknown"), *widest[-1:]])


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default in SETTINGS.items():
        parser.add_argument(f"--{name}", type=type(default), default=default)
    parser.add_argument("--held", type=int, default=150, help="rows of the validation split")
    parser.add_argument("--seed", type=int, action="append", help="again for more runs")
    parser.add_argument("--dtype", action="append", help="again for more runs")
    parser.add_argument("--test", action="store_true", help="judge on the test set as well")
    choices = parser.parse_args()
    here = runtime.detect()
    writer = None
    for dtype in choices.dtype or [str(here.compute_dtype).removeprefix("torch.")]:
        for seed in choices.seed or [42]:
            found = learn(here, choices, seed, getattr(torch, dtype))
            if writer is None:
                writer = csv.DictWriter(sys.stdout, found, lineterminator="\n")
                writer.writeheader()
            writer.writerow(found)
            sys.stdout.flush()


if __name__ == "__main__":
    main()
