"""What others predict: the chapter's closed formulas and the calculators in common use, and
the published measurements to hold them against (Chapter 5).
"""

import csv
from importlib import resources

from helpers.memory.configs import load_config

NAPKIN_LEAVES_OUT = (
    "logits and the loss's copies of them",
    "temporary copies at the optimizer's step and in dequantization",
    "the inputs that adapters keep",
    "what the libraries' versions do differently",
    "cuBLAS's workspace and the allocator's rounding",
)


def napkin(
    model,
    *,
    quantization=None,
    dtype="bfloat16",
    lora=None,
    optimizer="adamw_torch_fused",
    batch_size=1,
    sequence_length=512,
    gradient_checkpointing=True,
    attention="sdpa",
    **ignored,
):
    """The chapter's closed formulas.

    {part: bytes} and 'total' (Chapter 5; Korthikanti et al. 2022 for activations).

    Parameters 12 L h^2 + V h; activations 34 s b h per layer, plus 5 heads s^2 b with eager
    attention; with checkpointing 2 s b h per layer and one layer in full.
    `NAPKIN_LEAVES_OUT` says what is missing.
    """
    config = load_config(model)
    layers, h, heads = (
        config.num_hidden_layers,
        config.hidden_size,
        config.num_attention_heads,
    )
    width = 4 if str(dtype).endswith(("32", "float")) else 2
    parameters = 12 * layers * h**2 + config.vocab_size * h
    stored = {None: width, "int8": 1, "fp4": 0.5, "nf4": 0.5}[quantization]
    trained = parameters if lora is None else 4 * layers * _rank(lora) * h
    tokens = batch_size * sequence_length
    layer = 34 * tokens * h + (5 * heads * sequence_length * tokens if attention == "eager" else 0)
    activations = layer + 2 * tokens * h * layers if gradient_checkpointing else layer * layers
    state = {"adamw_8bit": 2, "adamw_bnb_8bit": 2, "sgd": 0}.get(optimizer, 2 * width)
    parts = {
        "weights": int(parameters * stored),
        "adapters": 0 if lora is None else trained * width,
        "gradients": trained * width,
        "optimizer": 0 if optimizer.startswith("paged") else trained * state,
        "activations": activations * width // 2,
    }
    return parts | {"total": sum(parts.values())}


def _rank(lora):
    return lora if isinstance(lora, int) else lora.r


def rules_in_use(config, choices):
    """Three formulas in common use, in bytes.

    Each from the number of parameters, two without looking at the run.
    """
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    count = sum(p.numel() for p in model.parameters())
    h, layers = config.hidden_size, config.num_hidden_layers
    lora = choices.get("lora")
    trained = count if lora is None else 4 * layers * _rank(lora) * h
    tokens = choices.get("batch_size", 1) * choices.get("sequence_length", 512)
    score = 5 * config.num_attention_heads * choices.get("sequence_length", 512) / h
    per_token = 2 if choices.get("gradient_checkpointing", True) else 34 + score
    full = str(choices.get("dtype", "bfloat16")).endswith("32")
    return {
        # accelerate/commands/estimate.py: float32 Adam 4x the float32 model, 16-bit 2x
        "accelerate estimate-memory": 4 * count * (4 if full else 2),
        # ZeRO (Rajbhandari et al. 2020): 2 + 2 + 12 bytes per trained parameter
        "16 bytes per parameter": 2 * (count - trained) * (trained != count) + 16 * trained,
        # Transformer Math 101 (EleutherAI 2023): the same model states, and activations
        "Transformer Math 101": 2 * (count - trained) * (trained != count)
        + 16 * trained
        + tokens * h * layers * per_token,
    }


def book_cells():
    """The 48 published cells of the book's Table 5.2 as (model, choices, measured bytes),
    for `stack="book"`.

    OPT-350M, 16-bit, one sequence of 500 tokens, `max_memory_allocated` on an RTX 4090.
    Inferred settings: float16 throughout, LoRA of rank 16, the 8-bit optimizer paged, a
    plain loop that takes one step.
    """
    text = resources.files("helpers.memory").joinpath("book_table.csv").read_text("utf-8")
    cells = []
    for row in csv.DictReader(text.splitlines()):
        choices = {
            "dtype": "float16",
            "sequence_length": 500,
            "stack": "book",
            "gradient_checkpointing": row["gradient_checkpointing"] == "yes",
            "lora": 16 if row["lora"] == "yes" else None,
            "optimizer": {"adam": "adamw_torch", "adam8bit": "paged_adamw_8bit"}[row["optimizer"]],
            "gradient_accumulation": row["gradient_accumulation"] == "yes",
            "attention": row["attention"],
        }
        cells.append(("facebook/opt-350m", choices, int(row["peak_mb"]) * 10**6))
    return cells
