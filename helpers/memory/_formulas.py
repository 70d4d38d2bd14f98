"""What others predict, and the published measurements to hold it against (Chapter 5).

The chapter's closed formulas, the calculators in common use, and the book's table.
"""

from __future__ import annotations

import csv
from importlib import resources
from typing import TYPE_CHECKING, Any

from helpers.memory._configs import language_model

if TYPE_CHECKING:
    import pandas as pd

NAPKIN_LEAVES_OUT = (
    "logits and the loss's copies of them",
    "temporary copies at the optimizer's step and in dequantization",
    "the inputs that adapters keep",
    "what the libraries' versions do differently",
    "cuBLAS's workspace and the allocator's rounding",
)


def napkin(model: Any, **choices: Any) -> dict[str, int]:
    """The chapter's closed formulas (Chapter 5; Korthikanti et al. 2022 for activations).

    Parameters 12 L h^2 + V h; activations 34 s b h per layer, plus 5 heads s^2 b with eager
    attention; with checkpointing 2 s b h per layer and one layer in full. `NAPKIN_LEAVES_OUT`
    says what is missing.

    Args:
        model: as `load_config` takes it.
        choices: as `estimate_training`; what the formulas do not know is ignored.

    Returns:
        {part: bytes} and their 'total'.

    Example:
        >>> napkin("Llama-2-7b-hf", quantization="nf4", lora=16)["weights"]
        3286761472
    """
    quantization, optimizer = choices.get("quantization"), choices.get("optimizer", "adamw_torch")
    config = language_model(model, quantization)[0]
    layers, h, heads = config.num_hidden_layers, config.hidden_size, config.num_attention_heads
    width = 4 if str(choices.get("dtype", "bfloat16")).endswith(("32", "float")) else 2
    parameters = 12 * layers * h**2 + config.vocab_size * h
    stored = {None: width, "int8": 1, "fp4": 0.5, "nf4": 0.5}[quantization]
    lora = choices.get("lora")
    trained = parameters if lora is None else 4 * layers * _rank(lora) * h
    length = choices.get("sequence_length", 512)
    tokens = choices.get("batch_size", 1) * length
    eager = choices.get("attention") == "eager"
    layer = 34 * tokens * h + (5 * heads * length * tokens if eager else 0)
    activations = layer * layers
    if choices.get("gradient_checkpointing", True):
        activations = layer + 2 * tokens * h * layers
    state = {"adamw_8bit": 2, "adamw_bnb_8bit": 2, "sgd": 0}.get(optimizer, 2 * width)
    parts = {
        "weights": int(parameters * stored),
        "adapters": 0 if lora is None else trained * width,
        "gradients": trained * width,
        "optimizer": 0 if optimizer.startswith("paged") else trained * state,
        "activations": activations * width // 2,
    }
    return parts | {"total": sum(parts.values())}


def _rank(lora: Any) -> int:
    return lora if isinstance(lora, int) else lora.r


def _rules_in_use(config: Any, choices: dict[str, Any]) -> dict[str, float]:
    """Three formulas in common use, in bytes; two of them do not look at the run."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    count = sum(p.numel() for p in model.parameters())
    h, layers, lora = config.hidden_size, config.num_hidden_layers, choices.get("lora")
    trained = count if lora is None else 4 * layers * _rank(lora) * h
    length = choices.get("sequence_length", 512)
    score = 5 * config.num_attention_heads * length / h
    per_token = 2 if choices.get("gradient_checkpointing", True) else 34 + score
    full = str(choices.get("dtype", "bfloat16")).endswith("32")
    # ZeRO (Rajbhandari et al. 2020): 2 + 2 + 12 bytes per trained parameter
    states = 2 * (count - trained) * (trained != count) + 16 * trained
    activations = choices.get("batch_size", 1) * length * h * layers * per_token
    return {
        # accelerate/commands/estimate.py: float32 Adam 4x the float32 model, 16-bit 2x
        "accelerate estimate-memory": 4 * count * (4 if full else 2),
        "16 bytes per parameter": states,
        "Transformer Math 101": states + activations,  # EleutherAI 2023
    }


def compare_formulas(cells: list[tuple[Any, dict[str, Any], int]]) -> pd.DataFrame:
    """Our prediction beside the napkin and three formulas in use, against measurements.

    Args:
        cells: (model, choices of `estimate_training`, measured bytes) each.

    Returns:
        One row per formula: median and worst error, and the share of cells within 10 %.

    Example:
        >>> table = compare_formulas(book_cells()[:1])
        >>> bool(table.loc["traced", "worst error"] < 0.002)
        True
    """
    import pandas as pd

    from helpers.memory.estimate import estimate_training

    rows = []
    for model, choices, measured in cells:
        predicted = {
            "traced": estimate_training(model, **choices).peak_bytes,
            "napkin": napkin(model, **choices)["total"],
        } | _rules_in_use(language_model(model, choices.get("quantization"))[0], choices)
        rows.append({name: value / measured - 1 for name, value in predicted.items()})
    errors = pd.DataFrame(rows).abs()
    return pd.DataFrame(
        {
            "median error": errors.median(),
            "worst error": errors.max(),
            "within 10 %": (errors <= 0.1).mean(),
        }
    )


def book_cells() -> list[tuple[str, dict[str, Any], int]]:
    """The 48 published cells of the book's Table 5.2: (model, choices, measured bytes) each.

    OPT-350M, 16-bit, one sequence of 500 tokens, `max_memory_allocated` on an RTX 4090. Inferred
    settings: float16 throughout, LoRA of rank 16, the 8-bit optimizer paged, a plain loop that
    takes one step.

    Example:
        >>> len(book_cells())
        48
    """
    text = resources.files("helpers.memory").joinpath("book_table.csv").read_text("utf-8")
    shared = {"dtype": "float16", "sequence_length": 500, "stack": "book"}
    optimizers = {"adam": "adamw_torch", "adam8bit": "paged_adamw_8bit"}
    cells = []
    for row in csv.DictReader(text.splitlines()):
        choices = shared | {
            "gradient_checkpointing": row["gradient_checkpointing"] == "yes",
            "lora": 16 if row["lora"] == "yes" else None,
            "optimizer": optimizers[row["optimizer"]],
            "gradient_accumulation": row["gradient_accumulation"] == "yes",
            "attention": row["attention"],
        }
        cells.append(("facebook/opt-350m", choices, int(row["peak_mb"]) * 10**6))
    return cells
