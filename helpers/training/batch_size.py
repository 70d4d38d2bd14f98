"""The largest batch that fits, found by trying (Chapter 5).

transformers has a search of its own (`auto_find_batch_size`), which restarts the training
run at every out-of-memory error. This one looks before the run, on the longest rows, and
leaves everything as it was.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import math
import numbers
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from accelerate.utils.memory import should_reduce_batch_size
from transformers import PreTrainedModel
from trl import SFTTrainer

from helpers import memory, runtime
from helpers._checks import whole_number

__all__ = ["find_max_batch_size", "measure_step"]


def find_max_batch_size(
    trainer: SFTTrainer, start: int | None = None, *, memory_budget: float | None = None
) -> int:
    """The largest `per_device_train_batch_size` with which a run fits (Chapter 5).

    Each try is a real training step (`measure_step`) on the longest rows of the train set.
    The trainer stays as it was: weights, gradients, optimizer, random states, metrics.

    Args:
        trainer: the trainer of the run that is planned.
        start: the size to try first; None: what the trainer's arguments say.
        memory_budget: bytes this run may take, its model included. None: on CUDA what the
            card has left for it; on a CPU what is available to this process, where sizes
            that would not fit by what smaller ones took are never tried.

    Returns:
        The number of rows, at most as many as the train set has.

    Raises:
        ValueError: when not even one row fits, or an argument is out of range.
        TypeError: when `start` is no whole number.

    Example:
        >>> find_max_batch_size(trainer, memory_budget=12e9)  # doctest: +SKIP
        16
    """
    model: Any = trainer.model
    rows = _longest_rows(trainer)
    if start is None:
        start = trainer.args.per_device_train_batch_size
    whole_number("start", start)
    if memory_budget is None:
        memory_budget = _available(model)
    elif not isinstance(memory_budget, numbers.Real) or not memory_budget > 1:
        raise ValueError(f"memory_budget must be a number of bytes, not {memory_budget!r}")
    budget, peaks = memory_budget, dict[int, float]()  # measured ones only

    def fits(size: int) -> bool:
        if size not in peaks:
            if _extrapolate(peaks, size) > budget:
                return False
            peaks[size] = _peak(trainer, rows[:size])
        return peaks[size] <= budget

    with _untouched(trainer):
        if not fits(1):
            raise ValueError(
                f"not even one row of {len(rows[0]['input_ids'])} tokens fits in "
                f"{budget / 1e9:.2f} GB (it takes {peaks[1] / 1e9:.2f} GB; inf: memory ran "
                "out). Shorten max_length, switch activation_checkpointing on, quantize the "
                "model, or train fewer parameters"
            )
        fits(min(2, len(rows)))  # two points make a line to look ahead on
        low, high = 1, min(max(2, start), len(rows))
        while fits(high):
            low = high
            if high == len(rows):
                return high
            high = min(2 * high, len(rows))
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def measure_step(trainer: SFTTrainer, batch_size: int = 1) -> float:
    """Peak bytes of one training step on the longest rows of the train set (Chapter 5).

    What the run takes from its second step on: the model, the optimizer's states,
    activations and gradients, with the autocast, the activation checkpointing, the
    gradient scaler and the accumulation that its arguments ask for. Other models on the
    card are not counted.

    Args:
        trainer: the trainer of the run that is planned; left as it was.
        batch_size: rows.

    Returns:
        Bytes; infinity when memory ran out.

    Raises:
        ValueError: when the train set has fewer rows.
        TypeError: when `batch_size` is no whole number.

    Example:
        >>> measure_step(trainer, batch_size=1) / 1e9  # doctest: +SKIP
        0.69
    """
    rows = _longest_rows(trainer)
    whole_number("batch_size", batch_size, most=len(rows))
    with _untouched(trainer):
        return _peak(trainer, rows[:batch_size])


def _longest_rows(trainer: SFTTrainer) -> list[dict[str, Any]]:
    dataset: Any = trainer.train_dataset
    if not dataset:
        raise ValueError(
            "trainer has no train_dataset to take rows from, or TRL left out all of its rows, as "
            "it does where max_length cuts the answer off"
        )
    if not hasattr(dataset, "__len__"):
        raise ValueError("trainer.train_dataset streams: give a Dataset, whose longest rows show")
    dataset = dataset.with_format(None)  # lists, whatever was asked for
    lengths = [len(ids) for ids in dataset["input_ids"]]
    order = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)
    # Of equally long rows, as max_length and packing make them, those with most to score first.
    rows = [dataset[index] for index in order[:4096]]
    return sorted(rows, key=lambda row: (-len(row["input_ids"]), row.get("labels", []).count(-100)))


def _available(model: PreTrainedModel) -> int:
    """Bytes a run of this model may take, the model itself included."""
    if model.device.type != "cuda":
        return runtime.available_memory_bytes()
    free, _ = torch.cuda.mem_get_info(model.device)
    # What our allocator holds is not free for others, and still ours to use.
    return free + torch.cuda.memory_reserved(model.device) - _foreign(model)


def _foreign(model: PreTrainedModel) -> int:
    """Bytes on the model's card that this process holds for something else."""
    if model.device.type != "cuda":
        return 0  # there `memory.measure` counts what the step uses, and nothing else
    gc.collect()  # what an earlier try left behind is nobody's any more
    # The scales of 4-bit weights are neither parameters nor buffers.
    states = (getattr(p, "quant_state", None) for p in model.parameters())
    parts = [part for s in states if s is not None for part in s.as_dict().values()]
    scales = sum(part.nbytes for part in parts if isinstance(part, torch.Tensor))
    own = model.get_memory_footprint() + scales
    return max(0, torch.cuda.memory_allocated(model.device) - own)


def _extrapolate(peaks: dict[int, float], size: int) -> float:
    """What `size` will take, on the line through the two nearest below; 0 if unknown."""
    known = sorted((s, p) for s, p in peaks.items() if s < size and p < math.inf)[-2:]
    if len(known) < 2:
        return 0
    (s1, p1), (s2, p2) = known
    return p2 + (p2 - p1) * (size - s2) / (s2 - s1)


def _peak(trainer: SFTTrainer, rows: list[dict[str, Any]]) -> float:
    """Peak bytes of one training step with these rows; infinite when memory ran out."""
    model: Any = trainer.model
    foreign = _foreign(model)
    try:
        with memory.measure(model.device) as measured:
            _step(trainer, rows)
        return measured.peak_bytes - foreign
    except (RuntimeError, MemoryError) as error:
        known = isinstance(error, MemoryError) or should_reduce_batch_size(error)
        # The driver and bitsandbytes have words of their own.
        if known or "out of memory" in str(error):
            return math.inf
        raise
    finally:
        model.zero_grad(set_to_none=True)
        if model.device.type == "cuda":
            torch.cuda.empty_cache()


def _step(trainer: SFTTrainer, rows: list[dict[str, Any]]) -> None:
    """One step of a run that has been going for a while."""
    model: Any = trainer.model
    args, scaler = trainer.args, trainer.accelerator.scaler
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer_class, settings = trainer.get_optimizer_cls_and_kwargs(args, model)
    optimizer = optimizer_class(trained, **settings)
    # From its second step on a run carries the optimizer's states through the forward pass,
    # and while it accumulates, the gradients of the batches before.
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    if args.gradient_accumulation_steps == 1:
        optimizer.zero_grad()
    batch = iter([trainer.data_collator(rows)])
    [inputs], tokens = trainer.get_batch_samples(batch, 1, args.device)
    trainer.training_step(trainer.accelerator.prepare_model(model), inputs, tokens)
    if scaler is None:
        optimizer.step()
    else:  # takes its scale out of the gradients first
        scaler.step(optimizer)
        scaler.update()


@contextlib.contextmanager
def _untouched(trainer: SFTTrainer) -> Iterator[None]:
    """Prepare the model as `train()` does, and put back whatever that and the tries change."""
    model: Any = trainer.model
    accelerator = trainer.accelerator
    modules = [(m, dict(vars(m)), m._forward_hooks.copy()) for m in model.modules()]
    prepared, scaler = list(accelerator._models), accelerator.scaler
    accelerator.scaler = copy.deepcopy(scaler)
    trained = [p for p in model.parameters() if p.requires_grad]
    weights = [p.detach().to("cpu", copy=True) for p in trained]
    gradients = [(p, p.grad) for p in model.parameters()]
    model.zero_grad(set_to_none=True)
    counters = {"_metrics", "_total_train_tokens"} & set(vars(trainer))
    noted = copy.deepcopy({name: vars(trainer)[name] for name in counters})
    states = random.getstate(), np.random.get_state()
    unpacked = getattr(trainer, "_training_context", contextlib.nullcontext)
    try:
        with torch.random.fork_rng(range(torch.cuda.device_count())), unpacked():
            _enable_checkpointing(trainer)
            yield
    finally:
        for module, attributes, hooks in modules:
            vars(module).clear()
            vars(module).update(attributes)
            module._forward_hooks.clear()
            module._forward_hooks.update(hooks)
        accelerator._models[:], accelerator.scaler = prepared, scaler
        with torch.no_grad():
            for parameter, weight in zip(trained, weights, strict=True):
                parameter.copy_(weight)
        for parameter, gradient in gradients:
            parameter.grad = gradient
        vars(trainer).update(noted)
        random.setstate(states[0])
        np.random.set_state(states[1])


def _enable_checkpointing(trainer: SFTTrainer) -> None:
    # As the first lines of transformers' `train()`: before them the model has none.
    model: Any = trainer.model
    given: Any = trainer.args.activation_checkpointing_kwargs or {}
    settings = {"every_n_layers": 1, "offload": False} | given
    own = {name: settings.pop(name) for name in ("every_n_layers", "offload")}
    if trainer.args.activation_checkpointing:
        model.activation_checkpointing_enable(settings or None, **own)
