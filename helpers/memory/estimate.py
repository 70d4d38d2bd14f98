"""Will it fit? Predict a run's peak GPU memory, without a GPU and without weights (Chapter 5).

`estimate_training` traces one real training step of the real model on tensors that have shapes
but no data.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from helpers._checks import one_of, whole_number
from helpers.memory._configs import CannotPredictError, language_model, positions, told
from helpers.memory.cards import AMPERE, Card, find_card, half_dtype, parse_size
from helpers.memory.report import GIB, PHASES, MemoryEstimate

if TYPE_CHECKING:
    from helpers.memory._model import Choices, Same
    from helpers.memory._trace import Trace

DTYPES = ("bfloat16", "float16", "float32")
ATTENTIONS = ("eager", "sdpa", "flash_attention_2")


def estimate_training(
    model: Any,
    *,
    quantization: str | None = None,
    dtype: Any = None,
    lora: Any = None,
    optimizer: str = "adamw_torch_fused",
    batch_size: int = 1,
    sequence_length: int = 512,
    gradient_checkpointing: bool | str = True,
    attention: str = "sdpa",
    mixed_precision: str | None = None,
    gradient_accumulation: bool = False,
    packing: bool = False,
    padded: bool = False,
    gpu: Card | str | float | None = None,
    stack: str = "current",
    double_quant: bool = True,
    loss: str | None = None,
) -> MemoryEstimate:
    """Predict what `torch.cuda.max_memory_allocated` would say of a training run (Chapter 5).

    Args:
        model: a config, a name from `catalog()`, a path, or a Hub id.
        quantization: None, 'int8', 'fp4' or 'nf4'.
        dtype: of the weights, 'bfloat16', 'float16', 'float32'; None: the card's 16-bit type.
        lora: None (full fine-tuning), a LoraConfig, or a rank, which means `LoraConfig(r=rank)`:
            PEFT's default layers, q and v for Llama and OPT. For the course's recipe say
            `LoraConfig(r=16, target_modules="all-linear")`; the result's `adapted` names them.
        optimizer: 'adamw_torch_fused', 'adamw_torch', 'sgd', 'adamw_8bit',
            'paged_adamw_8bit' or 'paged_adamw_32bit'.
        batch_size: rows.
        sequence_length: tokens in each.
        gradient_checkpointing: whether layers are run again on the way back; 'reentrant': as
            `use_reentrant=True` does it, which also frees what 8-bit layers keep of their inputs.
        attention: 'eager', 'sdpa' or 'flash_attention_2'.
        mixed_precision: None, 'bf16' or 'fp16': autocast, as SFTConfig's bf16=True or fp16=True.
        gradient_accumulation: gradients of earlier micro-batches are alive.
        packing: rows are joined into one (trl's 'bfd').
        padded: at least one row is padded, so attention gets a mask and repeats shared heads.
        gpu: a card, which decides the 16-bit type, the attention kernels and cuBLAS's
            workspace; None, or a size that names no card: Ampere.
        stack: 'current': a step in steady state, installed versions, SFTTrainer's fused head, as
            measured on an H100. 'book': the first step of trl 0.12's time in a plain loop, whose
            accumulating runs never reach the optimizer, with 8-bit layers checkpointed reentrant;
            all this was inferred from the tables it reproduces (`memory.book_cells`).
        double_quant: whether the scales of 4-bit weights are quantized too.
        loss: 'fused', trl's head, or 'logits', all of them at once as in a plain loop; None: the
            stack's.

    Returns:
        The peak and what it consists of.

    Raises:
        ValueError, TypeError: an argument outside these or that the card cannot do (bfloat16 on
            a T4); a model that cannot be traced honestly (encoder-decoders, mixtures of experts,
            recurrent layers).

    Example:
        >>> run = estimate_training("SmolLM2-135M-Instruct", quantization="nf4", lora=16)
        >>> run.peak_bytes, run.peak_instant, run.fits("T4")
        (189628416, 'backward', True)
    """
    import torch

    from helpers.memory import _model, _quantized

    if gpu is not None:
        parse_size(gpu)  # raises for what is neither a card nor a size
    card = find_card(gpu)
    capability = card.capability if card else AMPERE
    dtype = str(dtype or half_dtype(capability)).removeprefix("torch.")
    dtype = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}.get(dtype, dtype)
    one_of("quantization", quantization, (None, "int8", "fp4", "nf4"))
    one_of("attention", attention, ATTENTIONS)
    one_of("optimizer", optimizer, _quantized.OPTIMIZERS)
    one_of("stack", stack, ("current", "book"))
    one_of("gradient_checkpointing", gradient_checkpointing, (True, False, "reentrant"))
    one_of("loss", loss, (None, "logits") if stack == "book" else (None, "fused", "logits"))
    one_of("dtype", dtype, DTYPES)
    one_of("mixed_precision", mixed_precision, (None, "no", "bf16", "fp16"))
    whole_number("batch_size", batch_size)
    whole_number("sequence_length", sequence_length)
    _check_lora(lora, quantization)
    if attention == "flash_attention_2" and dtype == "float32" and mixed_precision in (None, "no"):
        raise ValueError(
            "attention='flash_attention_2' has no float32 kernels; use dtype='bfloat16' or "
            "mixed_precision='bf16'"
        )
    if padded and (packing or attention == "flash_attention_2" or stack == "book"):
        raise ValueError(
            "padded=True is known for attention='sdpa' and 'eager' with packing=False and "
            "stack='current'; packed rows have no padding"
        )
    _check_card(card, dtype=dtype, attention=attention, mixed_precision=mixed_precision)
    config, name = language_model(model, quantization)
    choices = _model.Choices(
        quantization=quantization, double_quant=double_quant, dtype=getattr(torch, dtype),
        lora=_model.Same(repr(lora.to_dict()), lora) if hasattr(lora, "to_dict") else lora,
        optimizer=optimizer, batch_size=batch_size, sequence_length=sequence_length,
        gradient_checkpointing=gradient_checkpointing, attention=attention,
        mixed_precision={"bf16": torch.bfloat16, "fp16": torch.float16}.get(mixed_precision or ""),
        gradient_accumulation=gradient_accumulation, packing=packing, padded=padded, stack=stack,
        loss=loss or ("logits" if stack == "book" else "fused"), capability=capability,
    )  # fmt: skip
    return _estimate(name, config, choices, card)


def _check_lora(lora: Any, quantization: str | None) -> None:
    if isinstance(lora, int) and not isinstance(lora, bool):
        whole_number("lora, a rank,", lora)
    elif lora is not None and not hasattr(lora, "peft_type"):
        raise TypeError(f"lora must be None, a rank or a LoraConfig, not {lora!r}")
    if quantization and lora is None:
        raise ValueError(
            f"quantization={quantization!r} needs lora: quantized weights cannot be trained; "
            "pass lora=16, or quantization=None for full fine-tuning"
        )


_BEFORE_AMPERE = {  # name: what does not run, what does
    "dtype": ("bfloat16", "float16"),
    "mixed_precision": ("bf16", "fp16"),
    "attention": ("flash_attention_2", "sdpa"),
}


def _check_card(card: Card | None, **choices: str | None) -> None:
    """Refuse what the card's generation cannot do, in the caller's words."""
    if card is None or card.capability >= AMPERE:
        return
    for name, value in choices.items():
        refused, works = _BEFORE_AMPERE[name]
        if value == refused:
            capability = ".".join(map(str, card.capability))
            raise ValueError(
                f"{name}={value!r} does not run on gpu={card.name!r}: compute capability "
                f"{capability} has neither bfloat16 nor flash attention; {name}={works!r} "
                "works there"
            )


def _estimate(name: str, config: Any, choices: Choices, card: Card | None) -> MemoryEstimate:
    from helpers.memory._model import Same

    trace, reserved = _traced(Same(config.to_json_string(use_diff=False), config), choices)
    peak, parts, instant, instants = trace.peak()
    instants = {phase: size for phase, size in instants.items() if phase in PHASES}
    about = trace, choices, config, card
    return MemoryEstimate(name, peak, parts, instant, instants, reserved, *about)


@functools.lru_cache(maxsize=64)
def _traced(config: Same, choices: Choices) -> tuple[Trace, int]:
    from helpers.memory import _step

    kind = config.value.model_type
    try:
        return _step.step_log(config.value, choices)
    except CannotPredictError:
        raise
    except Exception as error:
        said = str(error)
        if "scaled_dot_product_attention" in said or "`sdpa` attention" in said:
            raise ValueError(
                f"attention={choices.attention!r} is not offered by transformers for {kind!r}; "
                "use attention='eager'"
            ) from error
        if choices.attention.startswith("flash") and "flash" in said.lower():
            raise ValueError(
                f"attention={choices.attention!r} is not offered by transformers for {kind!r} "
                f"with such choices ({told(error)}); use attention='sdpa' or 'eager'"
            ) from error
        if "checkpointing" in said:
            raise ValueError(
                f"gradient_checkpointing=True is not offered by transformers for {kind!r}; use "
                "gradient_checkpointing=False"
            ) from error
        raise ValueError(
            f"model: {kind!r} broke while being traced, so there is no honest number to give "
            f"({told(error)})"
        ) from error


def for_card(estimate: MemoryEstimate, card: Card) -> MemoryEstimate:
    """The same run predicted for another card; bfloat16 becomes float16 where there is none.

    Example:
        >>> for_card(estimate, cards.find_card("T4")).dtype  # doctest: +SKIP
        'float16'
    """
    import torch

    choices: dict[str, Any] = {"capability": card.capability}
    _check_card(card, attention=estimate.choices.attention)
    for name in ("dtype", "mixed_precision") if card.capability < AMPERE else ():
        if getattr(estimate.choices, name) == torch.bfloat16:
            choices[name] = torch.float16
    run = replace(estimate.choices, **choices)
    return _estimate(estimate.name, estimate.config, run, card)


def find_largest(
    model: Any, gpu: Card | str | float, *, vary: str = "sequence_length", **choices: Any
) -> MemoryEstimate:
    """The longest sequence, or largest batch, that fits a card (Chapter 5).

    Sequences are multiples of 64 up to the model's positions (131,072 where it declares none),
    batches at most 1,024. One unit
    more does not fit; a longer one may by luck, where the allocator's blocks happen to close up.

    Args:
        model: as `estimate_training` takes it.
        gpu: a card, whose kernels are then assumed, or a size ('24GiB', bytes).
        vary: 'sequence_length' or 'batch_size'.
        choices: as `estimate_training`.

    Returns:
        The estimate of the largest; its `.choices` hold the length and the batch.

    Raises:
        ValueError: even the smallest does not fit, or a choice is wrong.

    Example:
        >>> qlora = {"quantization": "nf4", "lora": 16}
        >>> found = find_largest("Llama-3.1-8B", "T4", **qlora)  # doctest: +SKIP
        >>> found.choices.sequence_length  # doctest: +SKIP
        3648
    """
    one_of("vary", vary, ("sequence_length", "batch_size"))
    unit, most = 1, 1024
    if vary == "sequence_length":
        unit = 64
        most = positions(language_model(model, choices.get("quantization"))[0]) or 131_072

    def attempt(units: int) -> MemoryEstimate:
        return estimate_training(model, gpu=gpu, **choices | {vary: units * unit})

    low, best = 1, attempt(1)
    if not best.fits(gpu):
        raise ValueError(
            f"gpu={gpu!r}: not even {vary}={unit} fits ({best.peak_bytes / GIB:.2f} GiB and the "
            "margin); quantize, lower the rank, or turn gradient checkpointing on"
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
