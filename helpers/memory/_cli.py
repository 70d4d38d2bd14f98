"""`python -m helpers plan`: the prediction on the command line."""

from __future__ import annotations

import argparse
import sys

from helpers.memory._configs import catalog
from helpers.memory.estimate import ATTENTIONS, DTYPES, estimate_training, find_largest


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `plan`; those that `estimate_training` takes have its names."""
    add = parser.add_argument
    add("--model", help="a catalog name, a config file or a Hub id")
    add("--list", action="store_true", help="list the models whose configs are built in")
    add("--quantization", choices=["int8", "fp4", "nf4"])
    add("--rank", dest="lora", type=int, help="of LoRA, on PEFT's default layers; else all trains")
    add("--all-linear", action="store_true", help="adapters on every linear layer, as the course")
    add("--dtype", choices=DTYPES, help="of the weights; default: the card's 16-bit type")
    add("--mixed-precision", choices=["bf16", "fp16"])
    add("--optimizer", default="adamw_torch_fused")
    add("--batch-size", type=int, default=1)
    add("--sequence-length", type=int, default=1024)
    add("--attention", default="sdpa", choices=ATTENTIONS)
    add("--no-checkpointing", dest="gradient_checkpointing", action="store_false")
    add("--reentrant", dest="gradient_checkpointing", action="store_const", const="reentrant")
    add("--accumulate", dest="gradient_accumulation", action="store_true")
    add("--packing", action="store_true")
    add("--padded", action="store_true", help="some row of the batch is padded")
    add("--stack", default="current", choices=["current", "book"])
    card = parser.add_mutually_exclusive_group()
    card.add_argument("--gpu", metavar="CARD", help="predict for this card: T4, L4, …")
    card.add_argument("--fit", metavar="CARD", help="search for the longest that fits: T4, 16GiB")
    add("--vary", default="sequence_length", choices=["sequence_length", "batch_size"])


def main(options: argparse.Namespace) -> int:
    """Run `plan` with parsed options: print the answer, return the exit status."""
    choices = {k: v for k, v in vars(options).items() if k not in ("command", "call")}
    model, gpu, fit, vary = (choices.pop(name) for name in ("model", "gpu", "fit", "vary"))
    everywhere = choices.pop("all_linear")
    if choices.pop("list"):
        print(catalog().drop(columns="source").to_string())
        return 0
    if not model:
        print("plan needs --model NAME (see plan --list)", file=sys.stderr)
        return 2
    if everywhere and not choices["lora"]:
        print("plan --all-linear needs --rank N: where else would adapters go", file=sys.stderr)
        return 2
    try:
        if everywhere:
            from peft import LoraConfig

            choices["lora"] = LoraConfig(r=choices["lora"], target_modules="all-linear")
        if fit:
            estimate = find_largest(model, fit, vary=vary, **choices)
            print(f"{fit}: largest {vary} is {getattr(estimate.choices, vary):,}")
        else:
            estimate = estimate_training(model, gpu=gpu, **choices)
    except (ValueError, TypeError) as error:
        print(error, file=sys.stderr)
        return 1
    print(estimate)
    return 0
