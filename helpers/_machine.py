"""What a process may use, also in a container, and how one ended (all chapters)."""

from __future__ import annotations

import os
import platform
import re
import signal
from importlib.util import find_spec
from pathlib import Path

_WINDOWS = {0xC000001D: signal.SIGILL, 0xC0000005: signal.SIGSEGV}
CGROUP = Path("/sys/fs/cgroup")  # where Linux says what a container may use


def processor() -> tuple[set[str], str]:
    """(instruction sets, vendor) of the CPU as the system lists them."""
    if not (text := text_of(Path("/proc/cpuinfo"))):  # not Linux
        return set(), platform.processor()
    flags, vendor = (re.search(rf"(?m)^{key}\s*:\s*(.*)$", text) for key in ("flags", "vendor_id"))
    return set(flags[1].split() if flags else ()), vendor[1] if vendor else ""


def memory_bytes(device: str = "cpu") -> int:
    """Bytes of memory there are: of the card, or of the machine or its container.

    Args:
        device: 'cpu' or 'cuda'.
    """
    if device == "cuda":
        import torch

        return torch.cuda.get_device_properties(0).total_memory
    import psutil

    return int(min(psutil.virtual_memory().total, _container_memory()[0]))


def available_memory_bytes() -> int:
    """Bytes of memory this process may still take, in a container within its limit."""
    import psutil

    limit, used = _container_memory()
    return int(max(0, min(psutil.virtual_memory().available, limit - used)))


def _container_memory() -> tuple[float, float]:
    """(limit, in use) in bytes of the control group, version 2 or 1; no limit: infinite."""
    for limit, used, stat, cached in (
        ("memory.max", "memory.current", "memory.stat", "inactive_file"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat",
         "total_inactive_file"),
    ):  # fmt: skip
        text = text_of(CGROUP / limit)
        if text.isdigit() and int(text) < 2**60:  # version 1 says "none" by a huge number
            # Pages of files count as used and are given up on demand.
            spare = re.search(rf"(?m)^{cached} (\d+)", text_of(CGROUP / stat))
            in_use = int(text_of(CGROUP / used) or 0) - int(spare[1] if spare else 0)
            return int(text), max(0, in_use)
    return float("inf"), 0


def usable_cores() -> int:
    """Number of CPU cores this process may use, at least 1.

    A container of 8 cores on a machine of 128 shows all 128 to `os.cpu_count`.
    """
    cores = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):  # Linux
        cores = len(os.sched_getaffinity(0))
    quota, _, period = text_of(CGROUP / "cpu.max").partition(" ")
    if not period:  # version 1
        quota = text_of(CGROUP / "cpu" / "cpu.cfs_quota_us")
        period = text_of(CGROUP / "cpu" / "cpu.cfs_period_us")
    if quota.isdigit() and period.isdigit():
        cores = min(cores, int(quota) // int(period))
    return max(1, cores)


def text_of(path: Path) -> str:
    try:
        return path.read_text(errors="replace").strip()
    except OSError:  # not Linux, or the other version of control groups
        return ""


def flash_attention_problem() -> str | None:
    """None where flash attention 2 can run, else why not, as a sentence (Chapter 5).

    A flash-attn that is merely installed may fail when it is loaded.
    """
    import torch

    if not torch.cuda.is_available():
        return "flash attention 2 needs a CUDA card, and there is none here"
    if (has := torch.cuda.get_device_capability()) < (8, 0):
        needs = "flash attention 2 needs compute capability 8.0 (Ampere) or newer"
        return f"{needs}, and this card has {has[0]}.{has[1]}"
    if find_spec("flash_attn") is None:
        return "flash-attn is not installed"
    try:
        import flash_attn  # noqa: F401
    except Exception as error:
        built = f"was it built for torch {torch.__version__}?"
        return f"flash-attn is installed and cannot be loaded ({error}); {built}"
    return None


def how_it_ended(status: int) -> str:
    """A process's return code in words, the signal's name where one killed it.

    Python says -4, a shell in between 132, Windows 0xC000001D.
    """
    number = -status if status < 0 else _WINDOWS.get(status, status - 128)
    try:
        name = signal.Signals(number).name
    except ValueError:  # no signal of that number
        return f"was killed by signal {number}" if status < 0 else f"ended with status {status}"
    why = {
        "SIGILL": ": it uses an instruction that this processor or virtual machine refuses",
        "SIGKILL": ": most likely because memory ran out",
        "SIGSEGV": ": a fault in the program, or a damaged file",
    }.get(name, "")
    return f"was killed by {name}{why}"
