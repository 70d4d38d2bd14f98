"""What is this machine, and what just went wrong? (all chapters)

`doctor.report()`, or `python -m helpers doctor`, looks at Python, packages, hardware and
programs. `doctor.explain()` after an exception says cause, cure and the cell that shows it.
"""

import html
import os
import re
import shutil
import sys
import traceback
from dataclasses import dataclass
from importlib.util import find_spec

from helpers import runtime
from helpers.course import notebooks, places
from helpers.course.symptoms import SECTIONS, SYMPTOMS, Symptom

OK, WARN, FAIL = "OK", "WARN", "FAIL"
GIB = 2**30
PAGE = "Troubleshooting.md"


# ── the machine ─────────────────────────────────────────────────────────────────────────
@dataclass(frozen=True)
class Finding:
    """One line of a report: level ('OK', 'WARN', 'FAIL'), what was looked at, result."""

    level: str
    about: str
    text: str

    def __str__(self):
        return f"{f'[{self.level}]':7} {self.about:13} {self.text}"


@dataclass(frozen=True)
class Report:
    """What `report` found; prints one line per finding, `.failed` when one is a FAIL."""

    findings: tuple[Finding, ...]

    @property
    def failed(self):
        """Whether something is broken, rather than merely absent."""
        return any(finding.level == FAIL for finding in self.findings)

    def __str__(self):
        return "\n".join(map(str, self.findings))

    __repr__ = __str__


def report():
    """Look at everything the course uses; returns a `Report`, takes a few seconds.

    FAIL: the notebooks cannot run. WARN: they run, and something is absent or slow.
    Each look that raises becomes a FAIL with its error, and the others go on.
    """
    looks = (
        ("Python", _python),
        ("packages", _packages),
        ("accelerator", _accelerator),
        ("data types", _data_types),
        ("attention", _attention),
        ("memory", _memory),
        ("disk", _disk),
        ("model", _embedded),
        ("llama.cpp", _llamacpp),
        ("Ollama", _ollama),
        ("Hub", _hub),
        ("token", _token),
    )
    findings = []
    for about, look in looks:
        try:
            level, text = look()
        except Exception as error:  # a doctor who faints helps nobody: say what it was
            level, text = FAIL, f"{type(error).__name__}: {error}"
        findings.append(Finding(level, about, text))
    return Report(tuple(findings))


def _python():
    version = ".".join(map(str, sys.version_info[:3]))
    if sys.version_info < places.OLDEST_PYTHON:
        oldest = ".".join(map(str, places.OLDEST_PYTHON))
        return FAIL, f"{version}; the course needs {oldest} or newer"
    return OK, f"{version} ({runtime.detect_platform()})"


def _packages():
    lacking = places.missing()
    if lacking:
        return FAIL, (
            f"missing or too old: {', '.join(lacking)}. "
            "Cure: python -m pip install -r requirements.txt"
        )
    other = []
    for name, tested in places.tested_versions().items():
        here = runtime.package_version(name)
        if here not in (runtime.NOT_INSTALLED, tested) and here.split("+")[0] != tested:
            other.append(f"{name} {here} (tested: {tested})")
    if other:
        return WARN, "new enough, but not the tested versions: " + ", ".join(other)
    return OK, "the tested versions" if places.repository_folder() else "new enough"


def _accelerator():
    import torch

    if torch.cuda.is_available():
        found = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
        cards = [f"{card.name}, {card.total_memory / GIB:.1f} GiB" for card in found]
        if len(cards) == 1:
            return OK, f"{cards[0]}, torch {torch.__version__}"
        used = torch.cuda.current_device()
        listing = "; ".join(f"cuda:{number} {card}" for number, card in enumerate(cards))
        return WARN, (
            f"{listing}; torch {torch.__version__}. Used is cuda:{used}. TRL's trainers "
            "refuse several in one process: the bootstrap cell sets CUDA_VISIBLE_DEVICES=0"
        )
    if shutil.which("nvidia-smi"):
        return WARN, (
            f"there is an NVIDIA driver, and torch {torch.__version__} sees no card: a CPU "
            "build of torch, a driver older than its CUDA, or an empty CUDA_VISIBLE_DEVICES"
        )
    return OK, f"none: {runtime.usable_cores()} CPU cores, the embedded model"


def _data_types():
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = runtime.native_dtype(device)
    name = str(dtype).removeprefix("torch.")
    text = f"{name} ({runtime.native_dtype_reason(device)})"
    if device == "cuda" and dtype == torch.float16:
        return WARN, f"{text}: train with fp16=True, bf16=False"
    return OK, text


def _attention():
    problem = runtime.flash_attention_problem()
    if problem is None:
        return OK, (
            "SDPA; flash-attn can be had, for 16-bit models on the card: "
            'attention="flash_attention_2"'
        )
    if find_spec("flash_attn") is None:
        return OK, f"SDPA ({problem})"
    # Being installed is all that some programs look at before they take it.
    return WARN, f"SDPA: {problem}. Cure: python -m pip uninstall flash-attn"


def _memory():
    total, free = runtime._memory_bytes("cpu"), runtime.available_memory_bytes()
    text = f"{free / GIB:.1f} of {total / GIB:.1f} GiB free"
    if free < 6 * GIB:
        return WARN, f"{text}; Chapter 0 on a CPU takes 4: close other notebooks"
    return OK, text


def _disk():
    folder = runtime.cache_folder()
    free = shutil.disk_usage(folder).free
    text = f"{free / GIB:.1f} GiB free where the caches are"
    if free < 2 * GIB:
        return FAIL, f"{text}; the embedded model and llama.cpp need 2"
    return (WARN if free < 10 * GIB else OK), text


def _embedded():
    from helpers import models

    if models.embedded_is_ready():
        return OK, "the embedded model is in the cache"
    return WARN, "the embedded model will be fetched on first use (93 MB, once)"


def _llamacpp():
    from helpers.serving import llamacpp

    program = llamacpp.find("llama-server")
    if program is None:
        return WARN, "not there; Chapter 6 builds it once (about 6 minutes on two cores)"
    if trouble := llamacpp.trouble():
        return WARN, f"{llamacpp.version(program) or program}: {trouble}"
    return OK, llamacpp.version(program)


def _ollama():
    program = shutil.which("ollama")
    if program is None:
        return (
            WARN,
            "not installed; only the end of Chapter 6 uses it (ollama.com/download)",
        )
    return OK, program


def _hub():
    if runtime.hub_reachable():
        return OK, f"{os.environ.get('HF_ENDPOINT', 'huggingface.co')} answers"
    return (
        WARN,
        "not reachable (or HF_HUB_OFFLINE is set): embedded model and data are used",
    )


def _token():
    from huggingface_hub import get_token

    if get_token():
        return OK, "there is one (not shown, not checked)"
    return WARN, "none; only needed for gated models and to push (hf auth login)"


# ── the error ────────────────────────────────────────────────────────────────────────────
@dataclass(frozen=True)
class Explanation:
    """What `explain` found: `.name` ('unknown' without a match), `.cause`, `.cure`.

    symptom: the catalogue's entry, or None. said: what was looked at.
    """

    symptom: Symptom | None
    said: str

    @property
    def name(self):
        """The symptom's name, or 'unknown'."""
        return self.symptom.name if self.symptom else "unknown"

    @property
    def cause(self):
        """Why it happens."""
        if self.symptom:
            return self.symptom.cause
        return "Not in this course's catalogue, which only knows what it has seen."

    @property
    def cure(self):
        """What helps, or where to look next."""
        if self.symptom:
            return self.symptom.cure
        return (
            "Read the last line of the traceback, then the last line of *your* code in it. "
            f"`doctor.report()` checks the machine. {PAGE} lists what is known; search the "
            "library's issues for the message without names and numbers."
        )

    @property
    def proof(self):
        """Where it is shown: (notebook, heading), or None."""
        return self.symptom.proof if self.symptom else None

    def lines(self):
        """(label, text) pairs: what is shown."""
        rows = [("symptom", self.symptom.title if self.symptom else "unknown")]
        rows += [("cause", self.cause), ("cure", self.cure)]
        if self.proof:
            rows.append(("shown in", f"{self.proof[0]}.ipynb, “{self.proof[1]}”"))
        return rows

    def __str__(self):
        return "\n".join(f"{label:9} {text}" for label, text in self.lines())

    __repr__ = __str__

    def _repr_html_(self):
        rows = "".join(
            f"<tr><th style='text-align:left;vertical-align:top'>{label}</th>"
            f"<td style='text-align:left'>{html.escape(text)}</td></tr>"
            for label, text in self.lines()
        )
        return f"<table>{rows}</table>"


def explain(error=None):
    """Name the cause and the cure of an error; returns an `Explanation`.

    error: an exception, the text of a traceback, a message alone, or your own words ("the
    model never stops"). None: the last exception of this notebook or terminal.
    An error that is not in the catalogue is 'unknown', with a next step and no guess.
    """
    if error is None:
        error = getattr(sys, "last_value", None)
        if error is None:
            raise ValueError(
                "error=None means the last exception, and there has been none. Give an "
                "exception, a traceback's text, or your own words"
            )
    if isinstance(error, BaseException):
        messages = _messages(error)
    elif isinstance(error, str):
        messages = _messages_in(error)
    else:
        raise TypeError(
            f"error must be an exception or a text, not {type(error).__name__}: {error!r}"
        )
    for message in messages or [error]:  # no exception's line in it: a message alone?
        for symptom in SYMPTOMS:
            if symptom.error and re.search(symptom.error, message):
                return Explanation(symptom, message)
    if messages:
        return Explanation(None, messages[0])
    found = (s for s in SYMPTOMS if s.words and re.search(s.words, error, re.IGNORECASE))
    return Explanation(next(found, None), error)


def _messages(error):
    # The error itself first, then what it was raised from.
    found = []
    while error is not None and len(found) < 9:
        found.append("".join(traceback.format_exception_only(error)).strip())
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return found


def _messages_in(text):
    # "package.SomeError: message", at the beginning of a line, down to the next traceback.
    # Without a terminal's colours, and without "[rank0]: " as torchrun's processes write.
    text = re.sub(r"\x1b\[[\d;]*m|(?m:^\[rank\d+\]: ?)", "", text)
    start = r"^(?:[\w.]+\.)?\w*(?:Error|Exception|Interrupt|Needed|Expired)\b:?"
    pieces = re.split(rf"(?m)(?={start})", text)[1:]
    stop = r"\n\s*\n(?:The above exception|During handling)|\nTraceback "
    return [re.split(stop, piece)[0].strip() for piece in reversed(pieces)]


# ── the page ─────────────────────────────────────────────────────────────────────────────
def write_page():
    """Write Troubleshooting.md anew; returns [its name], or [] when nothing changed."""
    path, text = notebooks.root() / PAGE, page()
    if path.is_file() and path.read_text(encoding="utf-8") == text:
        return []
    notebooks.replace_file(path, text)
    return [PAGE]


def page():
    """The text of Troubleshooting.md, from the catalogue."""
    raised = [symptom for symptom in SYMPTOMS if symptom.provoked and symptom.error]
    own = sum(symptom.own for symptom in raised)
    parts = [
        "# Troubleshooting",
        "What goes wrong in fine-tuning, why, and what helps. In a notebook, "
        "`from helpers.course import doctor` and `doctor.explain()` after an error looks it up "
        'here; so does `doctor.explain("the model never stops")`. '
        "`python -m helpers doctor` checks the machine.",
        f"Of the {len(SYMPTOMS)} entries, {len(raised) - own} are errors that the "
        "libraries really raise in this course's tests (some pretend a second card or a "
        "broken installation; the error they get is the library's own); "
        f"{own} more are messages of the course itself. Those marked ° could not be raised "
        "on a machine without a GPU or the Hub. This page is written by "
        "`python -m helpers sync` from `helpers/symptoms.py`.",
    ]
    for section, symptoms in SECTIONS.items():
        parts.append(f"## {section}")
        for symptom in symptoms:
            mark = "" if symptom.provoked else " °"
            parts.append(
                f"**{symptom.title[0].upper()}{symptom.title[1:]}**{mark}  \n"
                f"Cause: {symptom.cause}  \nCure: {symptom.cure}{_link(symptom.proof)}"
            )
    return "\n\n".join(parts) + "\n"


def _link(proof):
    if proof is None or not (notebooks.root() / f"{proof[0]}.ipynb").is_file():
        return ""
    name, heading = proof
    return f"  \nShown in [{name}]({name}.ipynb), “{heading}”."
