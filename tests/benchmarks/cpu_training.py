"""What the lean recipe buys on this machine, against SFTTrainer as it comes (Chapter 0).

    python tests/benchmarks/cpu_training.py                 # speed only, a few minutes
    python tests/benchmarks/cpu_training.py --epochs 0.25   # and held-out scores

Same 4-bit model, same adapters, same rows and same template for both. "Stock" is
SFTTrainer with its own defaults, except for the batch size and `use_cpu`; "lean" is
Chapter 0's recipe. The two take turns (A/B/A/B), so that a machine that slows down slows
down both. Tokens are counted without padding.
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from transformers import PrinterCallback, TrainerCallback
from trl import SFTConfig, SFTTrainer

from helpers import chat, data, evaluation, models, runtime, training


class Meter(TrainerCallback):
    """Seconds of every optimizer step; the first is warm-up and left out."""

    def __init__(self):
        self.seconds = []

    def on_step_begin(self, *_, **__):
        self.started = time.perf_counter()

    def on_step_end(self, *_, **__):
        self.seconds.append(time.perf_counter() - self.started)


def make(kind, here, folder, rows=None, *, base="nf4", dtype=None, rank=16, **choices):
    """A trainer of one kind, with its meter and its count of real tokens per step.

    rows: what it learns, all training rows unless given. base: 'nf4' or 'unquantized'.
    choices: go to SFTConfig.
    """
    torch.manual_seed(choices.get("seed", 42))
    tokenizer = models.load_tokenizer(models.EMBEDDED)
    tokenizer.chat_template = chat.chatml_template()
    chat.prepare_tokenizer(tokenizer)
    lean = kind == "lean"
    model = models.load_model(
        models.EMBEDDED,
        quantization=None if base == "unquantized" else base,
        dtype=dtype or here.compute_dtype,
        attention="eager" if lean else "sdpa",
        device="cpu",
    )
    model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=not lean)
    thin = {"r": rank, "lora_alpha": 2 * rank}
    lora = LoraConfig(**thin, target_modules="all-linear", task_type="CAUSAL_LM")
    model = chat.prepare_model(get_peft_model(model, lora), tokenizer)
    settings = training.machine_settings(here) if lean else {"use_cpu": True, "bf16": False}
    recipe = {
        "output_dir": folder,
        "per_device_train_batch_size": 16,
        "learning_rate": 2e-3,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 10,
        "save_strategy": "no",
        "disable_tqdm": True,
        "report_to": "none",
    }
    meter = Meter()
    trainer = (training.LeanSFTTrainer if lean else SFTTrainer)(
        model=model,
        args=SFTConfig(**recipe | settings | choices),
        train_dataset=data.load_yoda("train") if rows is None else rows,
        processing_class=tokenizer,
        callbacks=[meter],
    )
    trainer.remove_callback(PrinterCallback)
    tokens = []
    collate = trainer.data_collator

    def counting(rows):
        batch = collate(rows)
        tokens.append(int(batch["attention_mask"].sum()))
        return batch

    trainer.data_collator = counting
    return trainer, meter, tokens


def tokens_per_second(meter, tokens):
    """Real tokens over seconds, without the first step."""
    return sum(tokens[1 : len(meter.seconds)]) / sum(meter.seconds[1:])


def main():
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=6, help="steps per turn")
    parser.add_argument("--epochs", type=float, help="also train fully and judge")
    options = parser.parse_args()
    here = runtime.start()
    print(here, end="\n\n")

    speeds = {"stock": [], "lean": []}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(options.rounds):
            for kind, found in speeds.items():
                trainer, meter, tokens = make(kind, here, folder, max_steps=options.steps)
                trainer.train()
                found.append(tokens_per_second(meter, tokens))
                print(f"round {number + 1}  {kind:5}  {found[-1]:6.0f} tokens/s", flush=True)
        medians = {kind: statistics.median(found) for kind, found in speeds.items()}
        ratio = medians["lean"] / medians["stock"]
        print(f"\nmedian: stock {medians['stock']:.0f}, lean {medians['lean']:.0f} tokens/s")
        print(f"lean is {ratio:.2f} times as fast", flush=True)
        if options.epochs:
            for kind in speeds:
                trainer, _, _ = make(kind, here, folder, num_train_epochs=options.epochs)
                started = time.perf_counter()
                trainer.train()
                minutes = (time.perf_counter() - started) / 60
                report = evaluation.evaluate(
                    trainer.model, trainer.processing_class, data.load_yoda("test")
                )
                print(f"{kind:5} {minutes:5.1f} min of training; {report}", flush=True)


if __name__ == "__main__":
    main()
