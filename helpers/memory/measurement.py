"""Measure what a block of code really took (Chapter 5)."""

import gc
from contextlib import contextmanager


class Measurement:
    """What a block of code took at its peak.

    `peak_bytes`, `before_bytes` of it that were there when the block began, and on CUDA
    `reserved_bytes` and `driver_bytes` apart.
    """

    def __init__(self, device):
        self.device, self.peak_bytes, self.before_bytes = device, 0, 0
        self.reserved_bytes = self.driver_bytes = None

    def __str__(self):
        text = f"peak {self.peak_bytes / 1e6:,.1f} MB of tensors on {self.device}"
        if self.before_bytes:
            text += f", {self.before_bytes / 1e6:,.1f} MB of them from before"
        if self.reserved_bytes is None:
            return text
        return (
            f"{text}, {self.reserved_bytes / 1e6:,.1f} MB reserved by the allocator, "
            f"{self.driver_bytes / 1e6:,.1f} MB in use according to the driver"
        )


@contextmanager
def measure(device=None):
    """Measure the peak memory of the block (Chapter 5).

    `with memory.measure() as m: ...`, then `m.peak_bytes`, and `m.before_bytes`: what of it
    was there before the block.

    On CUDA: the allocator's `max_memory_allocated` after emptying its cache, with reserved
    and driver figures apart; before_bytes is all it had handed out, other models of the
    notebook too. On the CPU: the bytes of every tensor the block makes or uses, exactly, by
    following each operator; before_bytes is what it used and had not made, so a model that
    lies about unused is in neither figure. Tensors of other devices and NumPy arrays do not
    count. device: 'cuda' or 'cpu'; None takes CUDA where there is a card.
    """
    import torch

    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    result = Measurement(device.type)
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        result.before_bytes = torch.cuda.memory_allocated(device)
        try:
            yield result
        finally:
            torch.cuda.synchronize(device)
            result.peak_bytes = torch.cuda.max_memory_allocated(device)
            result.reserved_bytes = torch.cuda.max_memory_reserved(device)
            free, total = torch.cuda.mem_get_info(device)
            result.driver_bytes = total - free
        return
    from helpers.memory._trace import Ledger

    ledger = Ledger(unit=1, inputs=True)
    try:
        with ledger:
            yield result
    finally:
        result.peak_bytes, result.before_bytes = ledger.peak, ledger.before
