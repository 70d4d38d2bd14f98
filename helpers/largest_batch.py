"""The largest batch that fits, found by trying (Chapter 5).

transformers has a search of its own (`auto_find_batch_size`), which restarts the training
run at every out-of-memory error. This one looks before the run, on the longest rows, and
leaves everything as it was.
"""

import contextlib
import copy
import random

import numpy as np
import torch

from helpers import memory


def find_max_batch_size(trainer, start=None, *, memory_budget=None):
    """The largest `per_device_train_batch_size` with which a run fits (Chapter 5).

    Each try is a real forward, backward and optimizer step on the longest rows of the train
    set. trainer: an SFTTrainer. start: the size to try first (default: what its arguments
    say). memory_budget: bytes; default: the whole card on CUDA, what is available on a CPU,
    where sizes that would not fit by what smaller ones took are never tried.
    Weights, gradients, optimizer, random states, arguments and metrics stay as they were.

    Returns the size, at most the number of rows. Raises ValueError when not even one row
    fits, saying what to change, and for bad arguments.
    """
    rows = _longest_rows(trainer)
    start = trainer.args.per_device_train_batch_size if start is None else start
    for name, value in (("start", start), ("memory_budget", memory_budget)):
        whole = isinstance(value, int | float) and value == int(value) and value >= 1
        if value is not None and (isinstance(value, bool) or not whole):
            raise ValueError(f"{name} must be a whole number of at least 1, not {value!r}")
    budget = memory_budget or _available(trainer.model.device)
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


def _longest_rows(trainer):
    dataset = trainer.train_dataset
    if dataset is None or len(dataset) == 0:
        raise ValueError("trainer has no train_dataset to take rows from")
    lengths = [len(ids) for ids in dataset["input_ids"]]
    order = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)
    return [dataset[index] for index in order[:4096]]


def _available(device):
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    import psutil

    return psutil.virtual_memory().available


def _extrapolate(peaks, size):
    """What `size` will take, on the line through the two nearest below; 0 if unknown."""
    known = sorted((s, p) for s, p in peaks.items() if s < size and p != float("inf"))[-2:]
    if len(known) < 2:
        return 0
    (s1, p1), (s2, p2) = known
    return p2 + (p2 - p1) * (size - s2) / (s2 - s1)


def _peak(trainer, rows, size):
    """Peak bytes of one training step with `size` rows; infinite when memory ran out."""
    model, device = trainer.model, trainer.model.device
    trained = [p for p in model.parameters() if p.requires_grad]
    kept = [p.detach().to("cpu", copy=True) for p in trained]
    optimizer_class, settings = trainer.get_optimizer_cls_and_kwargs(trainer.args, model)
    try:
        with memory.measure(device) as measured:
            optimizer = optimizer_class(trained, **settings)
            batch = trainer._prepare_inputs(trainer.data_collator(rows[:size]))
            with trainer.compute_loss_context_manager():
                loss = trainer.compute_loss(model, batch)
            loss.backward()
            optimizer.step()
        return measured.peak_bytes
    except torch.OutOfMemoryError:
        return float("inf")
    finally:
        batch = loss = optimizer = None
        model.zero_grad(set_to_none=True)
        with torch.no_grad():
            for parameter, value in zip(trained, kept, strict=True):
                parameter.copy_(value)
        if device.type == "cuda":
            torch.cuda.empty_cache()


@contextlib.contextmanager
def _untouched(trainer):
    """Whatever the tries change is put back: modes, gradients, random states, metrics."""
    model = trainer.model
    training = model.training
    gradients = [(p, p.grad) for p in model.parameters() if p.grad is not None]
    model.zero_grad(set_to_none=True)
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    names = [n for n in ("_metrics", "_total_train_tokens") if hasattr(trainer, n)]
    noted = {name: copy.deepcopy(getattr(trainer, name)) for name in names}
    model.train()
    unpacked = getattr(trainer, "weights_in_training", contextlib.nullcontext)
    try:
        with unpacked():
            yield
    finally:
        model.train(training)
        for parameter, gradient in gradients:
            parameter.grad = gradient
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
        if cuda:
            torch.cuda.set_rng_state_all(cuda)
        for name, value in noted.items():
            setattr(trainer, name, value)


def _said(peak):
    return "memory ran out" if peak == float("inf") else f"it takes {peak / 1e9:.2f} GB"
