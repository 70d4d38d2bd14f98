"""Run a recipe's command, and say what became of it (Chapter 5)."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import yaml

from helpers._machine import how_it_ended

if TYPE_CHECKING:
    from helpers.training.recipes import Recipe


def run_recipe(
    recipe: Recipe, *, threads: int = 1, limit_s: float = 1800, leave_s: float = 60
) -> list[float]:
    """Run a recipe's command, wait for it, and return the losses it logged (Chapter 5).

    Args:
        recipe: what `export_recipe` returned.
        threads: CPU threads for each process.
        limit_s: after so many seconds it is stopped.
        leave_s: after training, its processes are stopped when nothing was written for so
            many seconds: PyTorch 2.13's gloo can wait for itself for good at the end.

    Raises:
        ValueError: when its files want more GPUs than there are here.
        RuntimeError: when it fails or leaves no model, with the end of its output.
        TimeoutError: at the limit.

    Example:
        >>> run_recipe(recipe, threads=2)  # doctest: +SKIP
        [3.023, 2.256, 1.61]
    """
    environment = _environment(recipe.folder) | {"OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, *recipe.command[1:]]  # this Python, whatever `python` is
    with open(recipe.folder / "log.txt", "wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env=environment)
    deadline = time.monotonic() + limit_s
    try:
        while (status := process.poll()) is None and not _is_left(recipe.folder, leave_s):
            if time.monotonic() > deadline:
                raise TimeoutError(f"stopped after limit_s={limit_s} seconds: {_end(recipe)}")
            time.sleep(0.2)
    finally:
        _stop(process)
    if status:
        raise RuntimeError(f"the run {how_it_ended(status)}: {_end(recipe)}")
    if not _has_trained(recipe.folder):
        raise RuntimeError(f"the run ended without a trained model: {_end(recipe)}")
    # `trl sft` leaves a trainer_state.json only where it saves checkpoints.
    return [float(x) for x in re.findall(r"'loss': '?([^',}]+)", _output(recipe.folder))]


def _output(folder: Path) -> str:
    return (folder / "log.txt").read_text(encoding="utf-8", errors="replace")


def _end(recipe: Recipe) -> str:
    said = _output(recipe.folder)[-1500:]
    return f"{' '.join(recipe.command)}\n{recipe.folder / 'log.txt'} ends with:\n{said}"


def _is_left(folder: Path, seconds: float) -> bool:
    """Whether training has ended and for so long nothing in the folder was written."""
    last = max(path.stat().st_mtime for path in folder.rglob("*"))
    return time.time() - last > seconds and "'train_runtime'" in _output(folder)


def _has_trained(folder: Path) -> bool:
    """Whether a run left what `trl sft` leaves: its last log entry, and weights."""
    settings = yaml.safe_load((folder / "recipe.yaml").read_text(encoding="utf-8"))
    saved = Path(settings.get("output_dir", "trainer_output")).glob("*.safetensors")
    return "'train_runtime'" in _output(folder) and any(path.stat().st_size for path in saved)


def _stop(process: subprocess.Popen) -> None:
    """End a process that may still run, and all that it started (in sessions of their own)."""
    import psutil

    if process.poll() is None:
        parent = psutil.Process(process.pid)
        for each in (parent, *parent.children(recursive=True)):
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()
        process.wait()


def _environment(folder: Path) -> dict[str, str]:
    """The variables of a run, after a look at what its files want of this machine."""
    # From the files, which a reader may have changed; each of them can say CPU.
    settings, launch = (
        yaml.safe_load((folder / name).read_text(encoding="utf-8"))
        for name in ("recipe.yaml", "accelerate.yaml")
    )
    processes, use_cpu = launch["num_processes"], settings.get("use_cpu") or launch["use_cpu"]
    cards = torch.cuda.device_count()
    check_cards(processes, use_cpu, cards)
    environment = dict(os.environ)
    if processes == 1 and cards > 1:  # or TRL refuses nn.DataParallel
        first = environment.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
        environment["CUDA_VISIBLE_DEVICES"] = first
    return environment


def check_cards(processes: int, use_cpu: bool, cards: int) -> None:
    """Refuse more processes than cards: NCCL would, in words that do not say so."""
    if processes > 1 and not use_cpu and processes > cards:
        shown = os.environ.get("CUDA_VISIBLE_DEVICES")
        why = "" if shown is None else f" (CUDA_VISIBLE_DEVICES={shown} shows no more)"
        raise ValueError(
            f"processes={processes} with use_cpu=False needs {processes} GPUs, and torch sees "
            f"{cards}{why}; use fewer, or SFTConfig(use_cpu=True), or another machine"
        )
