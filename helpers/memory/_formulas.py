"""What others predict, and the published measurements to hold it against (Chapter 5).

The chapter's closed formulas, the calculators in common use, and the book's table.
"""

from __future__ import annotations

import csv
from importlib import resources
from typing import TYPE_CHECKING, Any

from helpers._checks import one_of
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


def book_cells(table: str = "5.2") -> list[tuple[str, dict[str, Any], int]]:
    """A published memory table of the book: (model, choices, measured bytes) of each cell.

    '5.2' and '5.3': OPT-350M in 16 bits, 48 cells each, 500 and 2,000 tokens; '5.4': in 8 bits, 24;
    '5.5': Falcon-7B in 8 bits, 12 (four more ran out of memory). `max_memory_allocated` of one
    sequence on an RTX 4090, as printed (images/ch5/mem_*.png of the book's repository at a4dd512).
    What is not printed is inferred from the same tables: float16, LoRA of rank 16 on q and v, a
    plain loop that takes one step (none where it accumulates), Adam's 8-bit states paged,
    mixed precision in fp16, checkpointing reentrant for 8-bit weights only. Of the 132, six are
    not reproduced: '5.5' with checkpointing, but for row 6 (row 5 prints what row 6 does).

    Raises:
        ValueError: another table.

    Example:
        >>> [len(book_cells(table)) for table in ("5.2", "5.3", "5.4", "5.5")]
        [48, 48, 24, 12]
    """
    one_of("table", table, ("5.2", "5.3", "5.4", "5.5"))
    text = resources.files("helpers.memory").joinpath("book_table.csv").read_text("utf-8")
    words = {"yes": True, "no": False, "either": False, "": None}
    cells = []
    for row in csv.DictReader(text.splitlines()):
        name, model, peak = row.pop("table"), row.pop("model"), row.pop("peak_mb")
        if name != table or peak == "OOM":
            continue
        choices: dict[str, Any] = {k: words.get(v, v) for k, v in row.items() if k != "row"}
        choices |= {"dtype": "float16", "stack": "book"}
        choices["sequence_length"] = int(choices["sequence_length"])
        choices["lora"] = 16 if choices["lora"] else None
        paged = choices["optimizer"] == "adam8bit"
        choices["optimizer"] = "paged_adamw_8bit" if paged else "adamw_torch"
        choices["mixed_precision"] = "fp16" if choices["mixed_precision"] else None
        cells.append((model, choices, int(peak) * 10**6))
    return cells
