"""What is this machine, and what just went wrong? (all chapters)

`doctor.report()`, or `python -m helpers doctor`, looks at Python, packages, hardware and
programs. `doctor.explain()` after an exception says cause, cure and the cell that shows it.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import sys
import tomllib
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import resources
from importlib.util import find_spec

from helpers import _machine, runtime
from helpers._report import Shown, table
from helpers.course import places

OK, WARN, FAIL = "OK", "WARN", "FAIL"
GIB = 2**30


# ── the machine ──────────────────────────────────────────────────────────────────────────
@dataclass(frozen=True, repr=False)
class Look(Shown):
    """One line of a checkup: level ('OK', 'WARN', 'FAIL'), what was looked at, result."""

    level: str
    about: str
    text: str

    def __str__(self) -> str:
        return f"{f'[{self.level}]':7} {self.about:13} {self.text}"


@dataclass(frozen=True, repr=False)
class Checkup(Shown):
    """What `report` found; prints one line per look, `.failed` when one is a FAIL."""

    findings: tuple[Look, ...]

    @property
    def failed(self) -> bool:
        """Whether something is broken, rather than merely absent."""
        return any(look.level == FAIL for look in self.findings)

    def __str__(self) -> str:
        return "\n".join(map(str, self.findings))


def report() -> Checkup:
    """Look at everything the course uses; takes a few seconds.

    FAIL: the notebooks cannot run. WARN: they run, and something is absent or slow.

    Example:
        >>> report()  # doctest: +SKIP
        [OK]    Python        3.11.9 (local)
        [OK]    packages      the tested versions
        ...
    """
    found = []
    for about, look in LOOKS.items():
        try:
            level, text = look()
        except Exception as error:  # a doctor who faints helps nobody: say what it was
            level, text = FAIL, f"{type(error).__name__}: {error}"
        found.append(Look(level, about, text))
    return Checkup(tuple(found))


def _present(found: object, text: str, otherwise: str) -> tuple[str, str]:
    return (OK, text) if found else (WARN, otherwise)


def _python() -> tuple[str, str]:
    oldest = ".".join(map(str, places.OLDEST_PYTHON))
    if sys.version_info < places.OLDEST_PYTHON:
        return FAIL, f"{platform.python_version()}; the course needs {oldest} or newer"
    return OK, f"{platform.python_version()} ({runtime.detect_platform()})"


def _packages() -> tuple[str, str]:
    alone = places.repository_folder() is None
    if lacking := places.missing(extras=()):
        cure = f"'{places.DISTRIBUTION}'" if alone else "-r requirements.txt"
        listing = ", ".join(lacking)
        return FAIL, f"missing or too old: {listing}. Cure: python -m pip install {cure}"
    if lacking := places.missing():
        wanted = f"'{places.DISTRIBUTION}[{','.join(places.EXTRAS)}]'"
        return WARN, f"to run and serve, {', '.join(lacking)} is missing: pip install {wanted}"
    other = [
        f"{name} {here} (tested: {tested})"
        for name, tested in places.tested_versions().items()
        if (here := runtime.package_version(name)) not in (runtime.NOT_INSTALLED, tested)
        and here.split("+")[0] != tested
    ]
    if other:
        return WARN, f"new enough, but not the tested versions: {', '.join(other)}"
    return OK, "new enough" if alone else "the tested versions"


def _accelerator() -> tuple[str, str]:
    import torch

    if torch.cuda.is_available():
        found = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
        cards = [f"{card.name}, {card.total_memory / GIB:.1f} GiB" for card in found]
        listing = "; ".join(f"cuda:{number} {card}" for number, card in enumerate(cards))
        advice = (
            f"{listing}; torch {torch.__version__}. Used is cuda:{torch.cuda.current_device()}. "
            f"TRL's trainers refuse several in a process: the bootstrap cell sets {places.CARDS}=0"
        )
        return _present(len(cards) == 1, f"{cards[0]}, torch {torch.__version__}", advice)
    if shutil.which("nvidia-smi"):
        return WARN, (
            f"there is an NVIDIA driver, and torch {torch.__version__} sees no card: a CPU "
            f"build of torch, a driver older than its CUDA, or an empty {places.CARDS}"
        )
    return OK, f"none: {runtime.usable_cores()} CPU cores, the embedded model"


def _data_types() -> tuple[str, str]:
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    name = str(runtime.native_dtype(device)).removeprefix("torch.")
    text = f"{name} ({runtime.native_dtype_reason(device)})"
    native = (device, name) != ("cuda", "float16")
    return _present(native, text, f"{text}: train with fp16=True, bf16=False")


def _attention() -> tuple[str, str]:
    if (problem := _machine.flash_attention_problem()) is None:
        wanted = 'attention="flash_attention_2"'
        return OK, f"SDPA; flash-attn can be had, for 16-bit models on the card: {wanted}"
    # Being installed is all that some programs look at before they take it.
    cure = f"SDPA: {problem}. Cure: python -m pip uninstall flash-attn"
    return _present(find_spec("flash_attn") is None, f"SDPA ({problem})", cure)


def _memory() -> tuple[str, str]:
    total, free = runtime.memory_bytes("cpu"), runtime.available_memory_bytes()
    text = f"{free / GIB:.1f} of {total / GIB:.1f} GiB free"
    advice = f"{text}; Chapter 0 on a CPU takes 4: close other notebooks"
    return _present(free >= 6 * GIB, text, advice)


def _disk() -> tuple[str, str]:
    free = shutil.disk_usage(runtime.cache_folder()).free
    text = f"{free / GIB:.1f} GiB free where the caches are"
    if free < 2 * GIB:
        return FAIL, f"{text}; the embedded model and llama.cpp need 2"
    return (WARN if free < 10 * GIB else OK), text


def _embedded() -> tuple[str, str]:
    from helpers import models

    absent = "the embedded model will be fetched on first use (93 MB, once)"
    return _present(models.embedded_is_ready(), "the embedded model is in the cache", absent)


def _llamacpp() -> tuple[str, str]:
    from helpers.serving import llamacpp

    program = llamacpp.find("llama-server")
    if program is None:
        return WARN, "not there; Chapter 6 builds it once (about 6 minutes on two cores)"
    if trouble := llamacpp.trouble():
        return WARN, f"{llamacpp.version(program) or program}: {trouble}"
    return OK, llamacpp.version(program)


def _ollama() -> tuple[str, str]:
    absent = "not installed; only the end of Chapter 6 uses it (ollama.com/download)"
    return _present(program := shutil.which("ollama"), str(program), absent)


def _hub() -> tuple[str, str]:
    absent = "not reachable (or HF_HUB_OFFLINE is set): embedded model and data are used"
    answers = f"{os.environ.get('HF_ENDPOINT', 'huggingface.co')} answers"
    return _present(runtime.hub_reachable(), answers, absent)


def _token() -> tuple[str, str]:
    from huggingface_hub import get_token

    absent = "none; only needed for gated models and to push (hf auth login)"
    return _present(get_token(), "there is one (not shown, not checked)", absent)


LOOKS: dict[str, Callable[[], tuple[str, str]]] = {
    "Python": _python,
    "packages": _packages,
    "accelerator": _accelerator,
    "data types": _data_types,
    "attention": _attention,
    "memory": _memory,
    "disk": _disk,
    "model": _embedded,
    "llama.cpp": _llamacpp,
    "Ollama": _ollama,
    "Hub": _hub,
    "token": _token,
}


# ── the error ────────────────────────────────────────────────────────────────────────────
@dataclass(frozen=True, repr=False)
class Symptom(Shown):
    """One thing that goes wrong: an entry of symptoms.toml, whose head explains the fields."""

    name: str
    title: str
    cause: str
    cure: str
    error: str = ""
    where: str = ""
    words: str = ""
    proof: tuple[str, str] | None = None
    origin: str = "library"

    def rows(self) -> list[tuple[str, str]]:
        """(label, text) pairs, the content of the table."""
        found = [("symptom", self.title), ("cause", self.cause), ("cure", self.cure)]
        if self.proof:
            found.append(("shown in", f"{self.proof[0]}.ipynb, “{self.proof[1]}”"))
        return found

    def __str__(self) -> str:
        return "\n".join(f"{label:9} {text}" for label, text in self.rows())

    def _repr_html_(self) -> str:
        return table(self.rows(), row_heads=True)


def _read_symptoms() -> Iterator[tuple[str, list[Symptom]]]:
    text = (resources.files("helpers.course") / "symptoms.toml").read_text("utf-8")
    for section in tomllib.loads(text).values():
        title, entries = section.pop("title"), []
        for name, fields in section.items():
            for key in fields.keys() & {"error", "words", "where"}:
                found = [fields[key]] if isinstance(fields[key], str) else fields[key]
                fields[key] = re.sub("[`'\"]", "", "|".join(found))  # as in `_plain`
            proof = tuple(fields.pop("proof", ())) or None
            entries.append(Symptom(name, proof=proof, **fields))
        yield title, entries


SECTIONS = dict(_read_symptoms())  # Troubleshooting.md has the same
SYMPTOMS = {symptom.name: symptom for entries in SECTIONS.values() for symptom in entries}
UNKNOWN = Symptom(
    "unknown",
    "unknown",
    "Not in this course's catalog, which only knows what it has seen.",
    "Read the last line of the traceback, then the last line of *your* code in it. "
    "`doctor.report()` checks the machine. Troubleshooting.md lists what is known; search the "
    "library's issues for the message without names and numbers.",
)


def explain(error: BaseException | str | None = None) -> Symptom:
    """Name the cause and the cure of an error.

    Args:
        error: an exception, the text of a traceback, a message alone, or your own words.
            None: the last exception of this notebook or terminal; ValueError without one.

    Returns:
        The `Symptom`, which shows itself: `.name`, `.cause`, `.cure`, `.proof`. An error that
        is not among them is `UNKNOWN`, with a next step and no guess.

    Example:
        >>> explain("RuntimeError: size mismatch for lora_A").name
        'adapter_other_base'
        >>> explain("the model never stops").proof
        ('Chapter4', '1. The model that never stops')
    """
    if error is None and (error := getattr(sys, "last_value", None)) is None:
        raise ValueError("error=None means the last exception, and there has been none")
    if isinstance(error, BaseException):
        error = "".join(traceback.format_exception(error))
    elif not isinstance(error, str):
        raise TypeError(f"error must be an exception or a text, not {type(error).__name__}")
    text = _plain(error)
    raised = _raised(text)
    for message in raised or [text]:  # a text without an exception: all of it
        line, wrapped = _in_a_line(message), "\n" in message  # inside a word, too
        for symptom in SYMPTOMS.values():
            said = _says(symptom.error, line)
            if not said and wrapped:
                said = _says(symptom.error.replace(" ", ""), line.replace(" ", ""))
            if said and _says(symptom.where or "^", text):
                return symptom
    line = _in_a_line(text)
    for symptom in SYMPTOMS.values():
        described = not raised and len(line) < 400 and _says(symptom.words, line)
        if described or line == _in_a_line(_plain(symptom.title)):
            return symptom
    return UNKNOWN


# What is put around a message on its way here: a frame, torchrun's process, Markdown's and
# pytest's marks. And quotes, which everybody draws differently.
AROUND = re.compile(
    r"""\x1b\[[\d;]*[A-Za-z] | [`'"“”‘’„*°\\] | [ \t]*[│┃|╮╯]+[ \t]*$
    | ^[ \t]*(?:(?:[>│┃|╭╰─]+|\[(?:rank|default)\d+\]:|E(?=[ ]{3}))[ \t]?)+""",
    re.I | re.M | re.X,
)
# An exception's line, unless it is one of the source lines that Jupyter and rich show around
# a call, or only says that another process failed; and where its message ends.
OTHERS = "CalledProcessE|ChildFailedE"
START = re.compile(
    rf"""^(?![^:\n]*\bexcept\b | [ \t]*(?:❱|-+>)?[ \t]*\d+[ \t])
    (?=(?:.{{0,80}}?[^\w.\n])?(?![\w.]*(?:{OTHERS}))
    [\w.]*(?:Error|Exception|Interrupt|Needed|Expired)(?::|[ \t]*$))""",
    re.M | re.X,
)
ENDS = rf"The above exception|During handling|(?:DEBUG|INFO|WARNING|ERROR)\b|.*(?:{OTHERS})"
STOP = re.compile(rf"^.*Traceback \(most|\n(?:{ENDS})", re.M)


def _says(pattern: str, text: str) -> bool:
    return bool(pattern and re.search(pattern, text, re.I))


def _plain(text: str) -> str:
    return AROUND.sub("", "\n".join(text.splitlines())).strip()


def _in_a_line(text: str) -> str:
    return " ".join(text.split()).casefold()


def _raised(text: str) -> list[str]:
    # "package.SomeError: message", down to the next traceback. The last one first: it is the
    # error itself, those before it are what it was raised from.
    return [STOP.split(piece)[0] for piece in reversed(START.split(text)[1:])]
