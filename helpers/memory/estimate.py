"""Will it fit? Predict the peak GPU memory of a fine-tuning run, without a GPU and without
weights (Chapter 5).

`estimate_training` traces one real training step of the real model on tensors that have
shapes but no data; `measure` counts the bytes of a real run the same way; `napkin` is the
formula a reader derives, to see what it misses.
"""

import math
from dataclasses import fields, replace

from helpers.memory import cards
from helpers.memory.configs import catalogue, load_config
from helpers.memory.formulas import napkin, rules_in_use
from helpers.memory.report import GIB, PHASES, MemoryEstimate, parse_size

QUANTIZATIONS = (None, "int8", "fp4", "nf4")
DTYPES = ("bfloat16", "float16", "float32")
ATTENTIONS = ("eager", "sdpa", "flash_attention_2")


def estimate_training(
    model,
    *,
    quantization=None,
    dtype=None,
    lora=None,
    optimizer="adamw_torch_fused",
    batch_size=1,
    sequence_length=512,
    gradient_checkpointing=True,
    attention="sdpa",
    mixed_precision=None,
    gradient_accumulation=False,
    packing=False,
    padded=False,
    gpu=None,
    stack="current",
    double_quantization=True,
    prepare_kbit=None,
):
    """Predict what `torch.cuda.max_memory_allocated` would say of a training run (Chapter
    5).

    model: a config, a name from `catalogue()`, a path, or a Hub id. quantization: None,
    'int8', 'fp4', 'nf4'. dtype: of the weights; None: the card's 16-bit type. lora: None
    (full fine-tuning), a rank (PEFT's usual targets), or a LoraConfig. optimizer:
    'adamw_torch_fused', 'adamw_torch', 'sgd', 'adamw_8bit', 'paged_adamw_8bit',
    'paged_adamw_32bit'. attention: 'eager', 'sdpa', 'flash_attention_2'. mixed_precision:
    None, 'bf16' or 'fp16' (autocast, as accelerate; SFTConfig's bf16=True or fp16=True).
    gradient_accumulation: gradients of earlier micro-batches are alive. packing: rows
    joined into one (trl's 'bfd'). padded: at least one row of the batch is padded, so that
    attention gets a mask and shared heads are repeated; False: none is. gpu: a card by name
    or as `cards.Card`, which decides the 16-bit type, the attention kernels and cuBLAS's
    workspace; None, or a size that names no card, means Ampere. stack: 'current' is a step
    in steady state of the installed versions with SFTTrainer's fused head; 'book' the first
    step of trl 0.12's time in a plain loop, whose accumulating runs never reach the
    optimizer. prepare_kbit: whether `prepare_model_for_kbit_training` ran; None: as the
    stack's trainer does (book yes, current no).

    Returns a MemoryEstimate. Raises ValueError or TypeError for arguments outside these or
    that the card cannot do (bfloat16 on a T4), and ValueError for models that cannot be
    traced honestly (encoder-decoders, mixtures of experts, recurrent layers). No GPU, no
    weights.
    """
    import torch

    from helpers.memory import _step as memory_step

    card = _card(gpu)
    capability = card.capability if card else cards.AMPERE
    dtype = str(dtype or cards.half_dtype(capability)).removeprefix("torch.")
    dtype = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}.get(dtype, dtype)
    _check(quantization, dtype, lora, optimizer, attention, mixed_precision, stack)
    _check_batch(batch_size, sequence_length, padded, packing, attention, stack)
    _check_card(card, dtype, attention, mixed_precision)
    config = load_config(model)
    memory_step.refuse(config)
    if sequence_length > (limit := _longest(config)):
        raise ValueError(
            f"sequence_length={sequence_length} is more than this model's {limit} positions"
        )
    recipe = memory_step.Recipe(
        quantization=quantization,
        double_quantization=double_quantization,
        dtype=getattr(torch, dtype),
        lora=lora,
        optimizer=optimizer,
        batch_size=batch_size,
        sequence_length=sequence_length,
        gradient_checkpointing=gradient_checkpointing,
        attention=attention,
        mixed_precision={"bf16": torch.bfloat16, "fp16": torch.float16}.get(mixed_precision),
        gradient_accumulation=gradient_accumulation,
        packing=packing,
        padded=padded,
        capability=capability,
        stack=stack,
        prepare_kbit=stack == "book" if prepare_kbit is None else prepare_kbit,
        loss="logits" if stack == "book" else "fused",
    )
    name = (
        model
        if isinstance(model, str)
        else getattr(config, "name_or_path", "") or config.model_type
    )
    return _estimate(str(name), config, recipe, card)


def _card(gpu):
    """The Card of a `gpu` argument; None for None and for a size."""
    if gpu is not None:
        parse_size(gpu)  # raises for what is neither
    return cards.find_card(gpu)


def _check(quantization, dtype, lora, optimizer, attention, mixed_precision, stack):
    from helpers.memory import _kernels as memory_profiles

    _one_of("quantization", quantization, QUANTIZATIONS)
    _one_of("attention", attention, ATTENTIONS)
    _one_of("optimizer", optimizer, sorted(memory_profiles.OPTIMIZERS))
    _one_of("stack", stack, ("current", "book"))
    _one_of("dtype", dtype, DTYPES)
    _one_of("mixed_precision", mixed_precision, (None, "no", "bf16", "fp16"))
    if isinstance(lora, bool) or not (
        lora is None or isinstance(lora, int) or hasattr(lora, "peft_type")
    ):
        raise TypeError(f"lora must be None, a rank or a LoraConfig, not {lora!r}")
    if isinstance(lora, int) and lora < 1:
        raise ValueError(f"lora must be a rank of at least 1, not {lora}")
    if quantization and lora is None:
        raise ValueError(
            f"quantization={quantization!r} needs lora: a quantized model cannot be "
            "trained by itself; "
            "pass lora=16, or quantization=None for full fine-tuning"
        )
    if attention == "flash_attention_2" and dtype == "float32" and mixed_precision in (None, "no"):
        raise ValueError(
            "attention='flash_attention_2' has no float32 kernels; use dtype='bfloat16' or "
            "mixed_precision='bf16'"
        )


def _check_batch(batch_size, sequence_length, padded, packing, attention, stack):
    for name, value in (("batch_size", batch_size), ("sequence_length", sequence_length)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be a whole number of at least 1, not {value!r}")
    if padded and (packing or attention == "flash_attention_2" or stack == "book"):
        raise ValueError(
            "padded=True is known for attention='sdpa' and 'eager' with packing=False and "
            "stack='current'; packed rows have no padding"
        )


def _check_card(card, dtype, attention, mixed_precision):
    """Refuse what the card's generation cannot do, in the caller's words."""
    if card is None or cards.half_dtype(card.capability) == "bfloat16":
        return
    wrong = {
        ("dtype", "bfloat16", "float16"): dtype,
        ("mixed_precision", "bf16", "fp16"): mixed_precision,
        ("attention", "flash_attention_2", "sdpa"): attention,
    }
    for (name, refused, works), value in wrong.items():
        if value == refused:
            capability = ".".join(map(str, card.capability))
            raise ValueError(
                f"{name}={value!r} does not run on gpu={card.name!r}: compute capability "
                f"{capability} has neither bfloat16 nor flash attention; {name}={works!r} "
                "works there"
            )


def _one_of(name, value, choices):
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, not {value!r}")


def _longest(config):
    learned = getattr(config, "model_type", "") in ("opt", "gpt2")
    return config.max_position_embeddings if learned else math.inf


# ------------------------------------------------------------------ the estimate
_CACHE = {}


def _estimate(name, config, recipe, card):
    from helpers.memory import _step as memory_step

    lora = recipe.lora.to_dict() if hasattr(recipe.lora, "to_dict") else recipe.lora
    choices = [lora if f.name == "lora" else getattr(recipe, f.name) for f in fields(recipe)]
    key = config.to_json_string(use_diff=False) + repr(choices)
    if key not in _CACHE:
        if len(_CACHE) > 64:
            _CACHE.clear()
        short = None if _irregular(config, recipe.lora) else memory_step.SHORT
        try:
            _CACHE[key] = memory_step.step_log(config, recipe, short)
        except ValueError as error:
            if "scaled_dot_product_attention" not in str(error):
                raise
            raise ValueError(
                f"attention={recipe.attention!r} is not offered by transformers for "
                f"{config.model_type!r}; use attention='eager'"
            ) from error
        except (
            RuntimeError,
            TypeError,
            AttributeError,
            KeyError,
            NotImplementedError,
        ) as error:
            raise ValueError(
                f"model: {config.model_type!r} broke while being traced, so there is no "
                "honest number to give "
                f"({type(error).__name__}: {error})"
            ) from error
    trace, reserved = _CACHE[key]
    peak, parts, instant, instants = trace.peak()
    instants = {k: v for k, v in instants.items() if k in PHASES}
    result = name, peak, parts, instant, instants, reserved, trace, recipe, config, card
    return MemoryEstimate(*result)


def for_card(estimate, card):
    """The same run predicted for another Card (Chapter 5).

    What was bfloat16 becomes float16 on a card without it. Raises ValueError where the
    run's attention does not exist on that card.
    """
    import torch

    recipe = estimate.recipe
    _check_card(card, None, recipe.attention, None)
    if cards.half_dtype(card.capability) == "float16":
        narrow = {torch.bfloat16: torch.float16}
        dtype, mixed = recipe.dtype, recipe.mixed_precision
        recipe = replace(
            recipe, dtype=narrow.get(dtype, dtype), mixed_precision=narrow.get(mixed, mixed)
        )
    recipe = replace(recipe, capability=card.capability)
    return _estimate(estimate.name, estimate.config, recipe, card)


def _irregular(config, lora):
    """Whether layers may differ, so that only a full trace is honest."""
    for value in config.to_dict().values():
        per_layer = isinstance(value, list | tuple) and len(value) == config.num_hidden_layers
        if per_layer and len(set(map(str, value))) > 1:
            return True
    names = (
        "layers_to_transform",
        "layers_pattern",
        "rank_pattern",
        "alpha_pattern",
        "layer_replication",
    )
    return any(getattr(lora, name, None) for name in names)


def find_largest(model, gpu, *, vary="sequence_length", **choices):
    """The longest sequence (or, with `vary="batch_size"`, largest batch) that fits a card
    (Chapter 5).

    gpu: a card, whose kernels are then assumed, or a size ('24GiB', bytes). Sequences are
    multiples of 64 up to the model's positions, batches at most 1,024. One unit more does
    not fit; a longer one may by luck, where the allocator's blocks happen to close up.
    choices: as `estimate_training`. Returns a MemoryEstimate; raises ValueError when even
    the smallest does not fit.
    """
    _one_of("vary", vary, ("sequence_length", "batch_size"))
    unit, most = (64, load_config(model).max_position_embeddings) if vary[0] == "s" else (1, 1024)

    def attempt(units):
        return estimate_training(model, gpu=gpu, **choices | {vary: units * unit})

    low, best = 1, attempt(1)
    if not best.fits(gpu):
        raise ValueError(
            f"gpu={gpu!r}: not even {vary}={unit} fits ({best.peak_bytes / GIB:.2f} GiB "
            "and the margin); "
            "quantize, lower the rank, or turn gradient checkpointing on"
        )
    high = 2
    while high * unit <= most and (found := attempt(high)).fits(gpu):
        low, best, high = high, found, high * 2
    high = min(high, most // unit + 1)
    while high - low > 1:
        middle = (low + high) // 2
        if (found := attempt(middle)).fits(gpu):
            low, best = middle, found
        else:
            high = middle
    return best


# ------------------------------------------------------------------ beside others
def compare_formulas(cells):
    """Our prediction beside the napkin and three formulas in use, against measurements
    (Chapter 5).

    cells: list of (model, choices of `estimate_training`, measured bytes). Returns a table
    with one row per formula: median and worst error, and the share of cells within 10 %.
    """
    import pandas as pd

    errors = {}
    for model, choices, measured in cells:
        config = load_config(model)
        predictions = {
            "traced": estimate_training(model, **choices).peak_bytes,
            "napkin": napkin(model, **choices)["total"],
        } | rules_in_use(config, choices)
        for name, value in predictions.items():
            errors.setdefault(name, []).append(value / measured - 1)
    table = pd.DataFrame(errors).T
    return pd.DataFrame(
        {
            "median error": table.abs().median(axis=1),
            "worst error": table.abs().max(axis=1),
            "within 10 %": (table.abs() <= 0.1).mean(axis=1),
        }
    )


# ------------------------------------------------------------------ python -m helpers plan
def add_arguments(parser):
    """Declare the options of `python -m helpers plan` on an argparse parser."""
    parser.add_argument("--model", help="a catalogue name, a config file or a Hub id")
    parser.add_argument(
        "--list", action="store_true", help="list the models whose configs are built in"
    )
    parser.add_argument("--quantization", choices=["int8", "fp4", "nf4"])
    parser.add_argument("--rank", type=int, help="LoRA rank; without it every weight is trained")
    parser.add_argument(
        "--dtype", choices=DTYPES, help="of the weights; default: the card's 16-bit type"
    )
    parser.add_argument("--mixed-precision", choices=["bf16", "fp16"])
    parser.add_argument("--optimizer", default="adamw_torch_fused")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--sequence-length", type=int, default=1024)
    parser.add_argument("--attention", default="sdpa", choices=ATTENTIONS)
    parser.add_argument("--no-checkpointing", action="store_true", help="keep all activations")
    parser.add_argument("--accumulate", action="store_true", help="gradient accumulation")
    parser.add_argument("--packing", action="store_true")
    parser.add_argument("--padded", action="store_true", help="some row of the batch is padded")
    parser.add_argument("--stack", default="current", choices=["current", "book"])
    card = parser.add_mutually_exclusive_group()
    card.add_argument("--gpu", metavar="CARD", help="predict for this card: T4, L4, …")
    card.add_argument(
        "--fit", metavar="CARD", help="search for the longest that fits: T4, 16GiB, …"
    )
    parser.add_argument(
        "--vary", default="sequence_length", choices=["sequence_length", "batch_size"]
    )


def main(options):
    """Run `python -m helpers plan` with parsed options.

    Prints the answer and returns the exit status.
    """
    import sys

    if options.list:
        print(catalogue().drop(columns="source").to_string())
        return 0
    if not options.model:
        print("plan needs --model NAME (see plan --list)", file=sys.stderr)
        return 2
    choices = {
        "quantization": options.quantization,
        "lora": options.rank,
        "dtype": options.dtype,
        "mixed_precision": options.mixed_precision,
        "optimizer": options.optimizer,
        "batch_size": options.batch_size,
        "sequence_length": options.sequence_length,
        "attention": options.attention,
        "gradient_checkpointing": not options.no_checkpointing,
        "gradient_accumulation": options.accumulate,
        "packing": options.packing,
        "padded": options.padded,
        "stack": options.stack,
    }
    try:
        if options.fit:
            estimate = find_largest(options.model, options.fit, vary=options.vary, **choices)
            found = getattr(estimate.recipe, options.vary)
            print(f"{options.fit}: largest {options.vary} is {found:,}")
        else:
            estimate = estimate_training(options.model, gpu=options.gpu, **choices)
    except (ValueError, TypeError) as error:
        print(error, file=sys.stderr)
        return 1
    print(estimate)
    return 0
