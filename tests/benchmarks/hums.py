"""Does it help to hum first? The same sentences learned with and without (helpers/yoda).

    python tests/benchmarks/hums.py            # a quarter of an hour on two cores

1,000 training rows, Chapter 0's recipe, judged on 200 other *training* rows: the test set
has no part in it. A hum before the translation lets its first word stay as it stands in the
sentence; without one it has to be spelled again with a capital, which is other tokens.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from trl import SFTConfig

from helpers import chat, data, evaluation, models, runtime, training


def judged(here, hums, count, held):
    """Train on `count` rows with or without hums: the report on `held` others, seconds."""
    torch.manual_seed(42)
    rows = data.load_yoda("train", interjections=hums).shuffle(seed=1)
    tokenizer = models.load_tokenizer(models.EMBEDDED)
    tokenizer.chat_template = chat.chatml_template()
    chat.prepare_tokenizer(tokenizer)
    model = models.load_model(
        models.EMBEDDED,
        quantization="nf4",
        dtype=here.compute_dtype,
        attention="eager",
        device="cpu",
    )
    model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    lora = LoraConfig(
        r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    model = chat.prepare_model(get_peft_model(model, lora), tokenizer)
    with tempfile.TemporaryDirectory() as folder:
        args = SFTConfig(
            folder,
            per_device_train_batch_size=8,
            max_length=256,
            num_train_epochs=1,
            learning_rate=3e-3,
            lr_scheduler_type="cosine",
            warmup_steps=10,
            completion_only_loss=True,
            save_strategy="no",
            **training.machine_settings(here),
        )
        trainer = training.LeanSFTTrainer(
            model=model,
            args=args,
            train_dataset=rows.select(range(held, held + count)),
            processing_class=tokenizer,
        )
        begun = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - begun
    return evaluation.evaluate(model, tokenizer, rows.select(range(held))), seconds


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1000, help="training rows")
    parser.add_argument(
        "--held", type=int, default=200, help="rows judged, and not learned"
    )
    choices = parser.parse_args()
    here = runtime.detect()
    for hums in (False, True):
        report, seconds = judged(here, hums, choices.rows, choices.held)
        print(
            f"{'a hum first' if hums else 'no hum':12} exact {report.exact_match:5.1f} %  "
            f"valid order {report.valid_order:5.1f} %  chrF {report.chrf:5.1f}  "
            f"{seconds:4.0f} s of training",
            flush=True,
        )


if __name__ == "__main__":
    main()
