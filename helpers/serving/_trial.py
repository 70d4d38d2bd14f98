"""Does this llama.cpp compute on this processor? One tiny file tells (Chapter 6).

Cloud machines were seen whose processor lists AMX and refuses it: every program of
llama.cpp that multiplies with Q8_0, Q4_0 or the K types was killed by SIGILL there, and
float16 ran. The flags of the system cannot be asked, so the program is: it reads a model
of a few megabytes with a layer of each type (zeros; tests/trial_model.py wrote the file).
"""

from __future__ import annotations

import gzip
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from helpers import _machine
from helpers.serving import _programs

MODEL = Path(__file__).with_name("trial.gguf.gz")
CONTEXT = 32  # tokens: enough for the kernels that take several rows at once
SECONDS = 120
ANSWER = "PPL = 259.0"  # all weights zero: each of the 259 tokens is as likely as any other


@dataclass(frozen=True)
class Trial:
    """What came of it: `options` a program needs, or that it is `refused`.

    As text, a sentence about what is unusual; '' where nothing is. A trial that failed for
    another reason (no memory, a busy machine) refuses nothing and says what it was.
    """

    options: list[str] = field(default_factory=list)
    refused: bool = False
    said: str = ""

    def __str__(self) -> str:
        return self.said


def run(program: Path) -> Trial:
    """Let llama-imatrix (or -perplexity) compute on the tiny file: its fastest way, then plainly.

    Where there is no such program nothing can be tried, and nothing is unusual.
    """
    if not program.is_file():
        return Trial()
    with tempfile.TemporaryDirectory(prefix="llama-trial-") as scratch:
        model, text = Path(scratch, "tiny.gguf"), Path(scratch, "text.txt")
        model.write_bytes(gzip.decompress(MODEL.read_bytes()))
        text.write_text("a" * 3 * CONTEXT, encoding="utf-8")
        command = [program, "-m", model, "-f", text, "-c", CONTEXT, "-b", CONTEXT]
        command += ["--threads", 1]
        fault = _fault(command, scratch)
        if not fault:
            return Trial()
        if not fault.startswith("was killed by SIGILL"):
            return Trial(said=f"llama.cpp did not compute on a tiny file: it {fault}.")
        if _fault([*command, "--no-repack"], scratch):
            return Trial(
                refused=True, said=f"llama.cpp does not compute on this machine: it {fault}."
            )
    return Trial(
        ["--no-repack"],
        said=f"llama.cpp's fastest kernels do not run on this processor (it {fault}), "
        "so its programs are started with --no-repack.",
    )


def _fault(command: list[object], folder: str) -> str:
    """How the command ended, in words; '' when it did well."""
    try:  # in the scratch folder, where a core file is no harm
        done = _programs.run_until("PPL =", command, timeout=SECONDS, cwd=folder)
    except subprocess.TimeoutExpired:
        return f"did not end within {SECONDS} seconds"
    except OSError as error:
        return f"could not be started ({error.strerror})"
    if done.returncode == 0 and ANSWER in done.stdout:
        return ""
    last = f": {_programs.last_lines(done.stdout, 1)[:200]}" if done.returncode >= 0 else ""
    return _machine.how_it_ended(done.returncode) + last
