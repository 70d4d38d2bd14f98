"""Measure what a block of code really took (Chapter 5)."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from helpers._report import Shown


@dataclass(repr=False)
class Measurement(Shown):
    """What a block of code took at its peak; `memory.measure` makes it.

    Args:
        device: 'cuda' or 'cpu'.
        peak_bytes: at the block's peak.
        before_bytes: of them, what was there when the block began.
        reserved_bytes: on CUDA, what the allocator held; else None.
        driver_bytes: on CUDA, what the driver says is in use; else None.

    Example:
        >>> Measurement("cpu", peak_bytes=4_000_000)
        peak 4.0 MB of tensors on cpu
    """

    device: str
    peak_bytes: int = 0
    before_bytes: int = 0
    reserved_bytes: int | None = None
    driver_bytes: int | None = None

    def __str__(self) -> str:
        text = f"peak {self.peak_bytes / 1e6:,.1f} MB of tensors on {self.device}"
        if self.before_bytes:
            text += f", {self.before_bytes / 1e6:,.1f} MB of them from before"
        if self.reserved_bytes is not None and self.driver_bytes is not None:
            text += f", {self.reserved_bytes / 1e6:,.1f} MB reserved by the allocator"
            text += f", {self.driver_bytes / 1e6:,.1f} MB in use according to the driver"
        return text


@contextmanager
def measure(device: str | None = None) -> Iterator[Measurement]:
    """Measure the peak memory of the block (Chapter 5).

    On CUDA: the allocator's `max_memory_allocated` after emptying its cache, with reserved and
    driver figures apart; `before_bytes` is all it had handed out, other models of the notebook
    too. On the CPU: the bytes of every tensor the block makes or uses, exactly, by following each
    operator; `before_bytes` is what it used and had not made, so a model that lies about unused
    is in neither figure. Tensors of other devices and NumPy arrays do not count.

    Args:
        device: 'cuda' or 'cpu'; None: CUDA where there is a card.

    Returns:
        A context manager of the Measurement, which is filled in when the block ends.

    Example:
        >>> import torch
        >>> with measure("cpu") as used:
        ...     _ = torch.zeros(1000)
        >>> used.peak_bytes
        4000
    """
    import torch

    chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    result = Measurement(chosen.type)
    if chosen.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(chosen)
        result.before_bytes = torch.cuda.memory_allocated(chosen)
        try:
            yield result
        finally:
            torch.cuda.synchronize(chosen)
            result.peak_bytes = torch.cuda.max_memory_allocated(chosen)
            result.reserved_bytes = torch.cuda.max_memory_reserved(chosen)
            free, total = torch.cuda.mem_get_info(chosen)
            result.driver_bytes = total - free
        return
    from helpers.memory._trace import Ledger

    ledger = Ledger(unit=1, inputs=True)
    try:
        with ledger:
            yield result
    finally:
        result.peak_bytes, result.before_bytes = ledger.peak, ledger.before
