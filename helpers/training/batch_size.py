"""The largest batch that fits, found by trying (Chapter 5).

transformers has a search of its own (`auto_find_batch_size`), which restarts the training
run at every out-of-memory error. This one looks before the run, on the longest rows, and
leaves everything as it was.
"""

import contextlib
import copy
import gc
import numbers
import random

import numpy as np
import torch

from helpers import memory, runtime


def find_max_batch_size(trainer, start=None, *, memory_budget=None):
    """The largest `per_device_train_batch_size` with which a run fits (Chapter 5).

    Each try is a real training step (`measure_step`) on the longest rows of the train set.
    trainer: an SFTTrainer. start: the size to try first (default: what its arguments say).
    memory_budget: bytes this run may take, its model included; default: on CUDA what the
    card has left for it, on a CPU what is available to this process, where sizes that would
    not fit by what smaller ones took are never tried.
    Weights, gradients, optimizer, random states, arguments and metrics stay as they were.

    Returns the size, at most the number of rows. Raises ValueError when not even one row
    fits, saying what it takes and what to change, and for bad arguments.
    """
    rows = _longest_rows(trainer)
    start = trainer.args.per_device_train_batch_size if start is None else start
    _check_size("start", start)
    if memory_budget is not None:
        number = isinstance(memory_budget, numbers.Real) and memory_budget >= 1
        if isinstance(memory_budget, bool) or not number:
            raise ValueError(f"memory_budget must be a number of bytes, not {memory_budget!r}")
    budget = memory_budget or _available(trainer.model)
    peaks = {}  # measured ones only: what was merely expected is no ground to stand on

    def fits(size):
        if size not in peaks:
            if _extrapolate(peaks, size) > budget:
                return False
            peaks[size] = _peak(trainer, rows, size)
        return peaks[size] <= budget

    with _untouched(trainer):
        if not fits(1):
            raise ValueError(
                f"not even one row of {len(rows[0]['input_ids'])} tokens fits in "
                f"{budget / 1e9:.2f} GB ({_said(peaks[1])}). Shorten max_length, switch "
                "activation_checkpointing on, quantize the model, or train fewer parameters"
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


def measure_step(trainer, batch_size=1):
    """Peak bytes of one training step on the longest rows of the train set (Chapter 5).

    What the run takes from its second step on: the model, the optimizer's states,
    activations and gradients, with the autocast, the activation checkpointing, the
    gradient scaler and the accumulation that its arguments ask for. Other models on the
    card are not counted. trainer: an SFTTrainer, left as it was. batch_size: rows.

    Returns bytes; infinity when memory ran out. Raises ValueError when batch_size is no
    whole number of at least 1 or the train set has fewer rows.
    """
    rows = _longest_rows(trainer)
    _check_size("batch_size", batch_size)
    if batch_size > len(rows):
        raise ValueError(f"batch_size={batch_size}, but trainer has {len(rows)} rows")
    with _untouched(trainer):
        return _peak(trainer, rows, batch_size)


def _check_size(name, value):
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < 1:
        raise ValueError(f"{name} must be a whole number of at least 1, not {value!r}")


def _longest_rows(trainer):
    dataset = trainer.train_dataset
    if dataset is None or len(dataset) == 0:
        raise ValueError("trainer has no train_dataset to take rows from")
    lengths = [len(ids) for ids in dataset["input_ids"]]
    order = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)
    return [dataset[index] for index in order[:4096]]


def _available(model):
    """Bytes a run of this model may take, the model itself included."""
    if model.device.type != "cuda":
        return runtime.available_memory_bytes()
    free, _ = torch.cuda.mem_get_info(model.device)
    # What our allocator holds is not free for others, and still ours to use.
    return free + torch.cuda.memory_reserved(model.device) - _foreign(model)


def _foreign(model):
    """Bytes on the model's card that this process holds for something else."""
    if model.device.type != "cuda":
        return 0  # there `memory.measure` counts what the step uses, and nothing else
    gc.collect()  # what an earlier try left behind is nobody's any more
    return max(0, torch.cuda.memory_allocated(model.device) - _own_bytes(model))


def _own_bytes(model):
    """Parameters and buffers, and the scales of 4-bit weights, which are neither."""
    states = (getattr(p, "quant_state", None) for p in model.parameters())
    tensors = (t for s in states if s is not None for t in s.as_dict().values())
    scales = sum(t.nbytes for t in tensors if isinstance(t, torch.Tensor))
    return model.get_memory_footprint() + scales


def _extrapolate(peaks, size):
    """What `size` will take, on the line through the two nearest below; 0 if unknown."""
    known = sorted((s, p) for s, p in peaks.items() if s < size and p != float("inf"))[-2:]
    if len(known) < 2:
        return 0
    (s1, p1), (s2, p2) = known
    return p2 + (p2 - p1) * (size - s2) / (s2 - s1)


def _peak(trainer, rows, size):
    """Peak bytes of one training step with `size` rows; infinite when memory ran out."""
    model = trainer.model
    trained = [p for p in model.parameters() if p.requires_grad]
    kept = [p.detach().to("cpu", copy=True) for p in trained]
    scaler = trainer.accelerator.scaler
    trainer.accelerator.scaler = own_scaler = copy.deepcopy(scaler)
    foreign = _foreign(model)
    try:
        with memory.measure(model.device) as measured:
            _step(trainer, trained, rows[:size], own_scaler)
        return measured.peak_bytes - foreign
    except (RuntimeError, MemoryError) as error:
        if not _ran_out(error):
            raise
        return float("inf")
    finally:
        trainer.accelerator.scaler = scaler
        model.zero_grad(set_to_none=True)
        with torch.no_grad():
            for parameter, value in zip(trained, kept, strict=True):
                parameter.copy_(value)
        if model.device.type == "cuda":
            torch.cuda.empty_cache()


def _step(trainer, trained, rows, scaler):
    """One step of a run that has been going for a while."""
    model, args = trainer.model, trainer.args
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


def _ran_out(error):
    from accelerate.utils.memory import should_reduce_batch_size

    known = isinstance(error, torch.OutOfMemoryError | MemoryError)
    # The driver and bitsandbytes have words of their own.
    return known or should_reduce_batch_size(error) or "out of memory" in str(error)


@contextlib.contextmanager
def _untouched(trainer):
    """Prepare the model as `train()` does, and put back whatever that and the tries change:
    modules, gradients, random states, metrics.
    """
    model = trainer.model
    modules = [(m, dict(vars(m)), m._forward_hooks.copy()) for m in model.modules()]
    prepared = list(trainer.accelerator._models)
    gradients = [(p, p.grad) for p in model.parameters() if p.grad is not None]
    model.zero_grad(set_to_none=True)
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    names = [n for n in ("_metrics", "_total_train_tokens") if hasattr(trainer, n)]
    noted = {name: copy.deepcopy(getattr(trainer, name)) for name in names}
    unpacked = getattr(trainer, "weights_in_training", contextlib.nullcontext)
    try:
        with unpacked():
            _enable_checkpointing(trainer)
            yield
    finally:
        for module, attributes, hooks in modules:
            vars(module).clear()
            vars(module).update(attributes)
            module._forward_hooks.clear()
            module._forward_hooks.update(hooks)
        trainer.accelerator._models[:] = prepared
        for parameter, gradient in gradients:
            parameter.grad = gradient
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
        if cuda:
            torch.cuda.set_rng_state_all(cuda)
        for name, value in noted.items():
            setattr(trainer, name, value)


def _enable_checkpointing(trainer):
    # As the first lines of transformers' `train()`: before them the model has none.
    if trainer.args.activation_checkpointing:
        settings = dict(trainer.args.activation_checkpointing_kwargs or {})
        trainer.model.activation_checkpointing_enable(
            every_n_layers=settings.pop("every_n_layers", 1),
            offload=settings.pop("offload", False),
            activation_checkpointing_kwargs=settings or None,
        )


def _said(peak):
    return "memory ran out" if peak == float("inf") else f"it takes {peak / 1e9:.2f} GB"
