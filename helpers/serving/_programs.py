"""Run llama.cpp's programs and converters, and say in words how they ended (Chapter 6)."""

from __future__ import annotations

import re
import signal
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

WINDOWS = {0xC000001D: signal.SIGILL, 0xC0000005: signal.SIGSEGV}


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


def how_it_ended(status: int) -> str:
    """A process's return code in words, the signal's name where one killed it.

    Python says -4, a shell in between 132, Windows 0xC000001D.
    """
    number = -status if status < 0 else WINDOWS.get(status, status - 128)
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


def last_lines(said: str, lines: int = 8) -> str:
    """The end of what a program said, without empty lines."""
    kept = [line[:300] for line in said.splitlines() if line.strip()]
    return "\n".join(kept[-lines:]) or "(none)"
