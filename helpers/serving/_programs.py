"""Run llama.cpp's programs and converters, and say in words how they ended (Chapter 6)."""

from __future__ import annotations

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


def run(command: Iterable[object], **settings: Any) -> subprocess.CompletedProcess[str]:
    """Run a program to its end; `.stdout` is all that it said, on both channels."""
    return subprocess.run([str(part) for part in command], **PIPED, **settings)


def how_it_ended(status: int) -> str:
    """A process's return code in words: a negative one is the signal that killed it."""
    if status >= 0:
        return f"ended with status {status}"
    name = signal.Signals(-status).name
    why = {
        "SIGILL": ": it uses an instruction that this processor or virtual machine refuses",
        "SIGKILL": ": most likely because memory ran out",
        "SIGSEGV": ": a fault in the program, or a damaged file",
    }.get(name, "")
    return f"was killed by {name}{why}"


def last_lines(said: str, lines: int = 8) -> str:
    """The end of what a program said, without empty lines."""
    kept = [line[:300] for line in said.splitlines() if line.strip()]
    return "\n".join(kept[-lines:])
