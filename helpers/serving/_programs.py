"""Run llama.cpp's programs and converters, and say in words how they ended (Chapter 6)."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterable
from typing import Any

PIPED: dict[str, Any] = {  # nothing asked of the user, all words on one channel
    "stdin": subprocess.DEVNULL,
    "stdout": subprocess.PIPE,
    "stderr": subprocess.STDOUT,
    "encoding": "utf-8",
    "errors": "replace",
}


def run(command: Iterable[object], **settings: Any) -> subprocess.CompletedProcess[str]:
    """Run a program to its end; `.stdout` is all that it said, on both channels."""
    return subprocess.run([str(part) for part in command], **PIPED, **settings)


def run_until(
    words: str, command: Iterable[object], **settings: Any
) -> subprocess.CompletedProcess[str]:
    """As `run`, and again where a program ended well without saying what matches `words`.

    llama.cpp logs in a thread that is cut off at the end of a program: of sixty runs three had
    lost their last lines.
    """
    for _ in range(4):
        done = run(command, **settings)
        if done.returncode or re.search(words, done.stdout):
            break
    return done


def last_lines(said: str, lines: int = 8) -> str:
    """The end of what a program said, without empty lines."""
    kept = [line[:300] for line in said.splitlines() if line.strip()]
    return "\n".join(kept[-lines:]) or "(none)"
