"""llama.cpp: found on this machine, or built once from a pinned source (Chapter 6).

`binary("llama-server")` is the door. Looked for in the folder named by `LLAMA_CPP`, on
PATH, then in the course's cache; what is not there is built from the source inside the
sdist of llama-cpp-python (MIT license), which comes from PyPI. A program is compiled for
the processor it is built on, and some virtual machines list instructions that they refuse:
`_trial` lets it compute once before anybody relies on it.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Collection
from pathlib import Path

from helpers import runtime
from helpers._checks import one_of
from helpers._files import make_once
from helpers.serving import _build, _programs, _trial

VARIABLE = "LLAMA_CPP"
PROGRAMS, EXE = _build.PROGRAMS, _build.EXE
OLDEST_BUILD = 6000  # has /apply-template, --jinja and today's GGUF types


def binary(name: str) -> Path:
    """The path of one of llama.cpp's programs; builds them on first use (some minutes).

    Args:
        name: 'llama-server', 'llama-quantize' or 'llama-imatrix'.

    Raises:
        ValueError: for another name, or an old program in the folder that `LLAMA_CPP` names.
        FileNotFoundError: when that folder lacks the program.
        OSError: when it had to be built and could not be.

    Example:
        >>> print(binary("llama-server").name)  # doctest: +SKIP
        llama-server
    """
    one_of("name", name, PROGRAMS)
    return find(name) or build() / (name + EXE)


def find(name: str) -> Path | None:
    """As `binary`, but builds nothing: None where no program of that name will do.

    Of the course's own builds, one that this processor refuses is passed over.

    Example:
        >>> find("llama-server") is None  # doctest: +SKIP
        False
    """
    if chosen := os.environ.get(VARIABLE):
        places = (Path(chosen, inside, name + EXE) for inside in ("", "bin", "build/bin"))
        path = next(filter(Path.is_file, places), None)
        if path is None:
            raise FileNotFoundError(
                f"{VARIABLE}={chosen!r} has no {name}, neither there nor in bin or build/bin: "
                "name the folder of llama.cpp's programs, or unset the variable"
            )
        if not _is_new_enough(path):
            raise ValueError(
                f"{VARIABLE}={chosen!r}: {name} says {_release(path) or 'nothing'!r}, and "
                f"build {OLDEST_BUILD} (July 2025) or later is needed"
            )
        return path
    if (found := shutil.which(name)) and _is_new_enough(Path(found)):
        return Path(found)
    folders = (folder for folder in _finished(name) if not _tried(folder).refused)
    return next((folder / (name + EXE) for folder in folders), None)


def build(*, web_page: bool = False, cuda: bool = False) -> Path:
    """Build the programs for this machine unless they are there; returns their folder.

    Options of your own for CMake go into the variable `CMAKE_ARGS`, as for
    llama-cpp-python; with others it is another build. A build that this processor refuses
    is followed by a portable one (AVX2 at most).

    Args:
        web_page: with the server's chat page inside, made by npm (a minute or two more).
        cuda: for the card of this machine; needs `nvcc` (begun once, on 16 cores: half done
            after seven minutes, never seen to its end).

    Raises:
        OSError: saying what is missing or what failed.

    Example:
        >>> build(cuda=True)  # doctest: +SKIP
    """
    wanted = [*["cuda"] * cuda, *["page"] * web_page]
    for extras in (wanted, ["portable", *wanted]):
        folder = make_once(_folder(extras), functools.partial(_make, extras), _is_complete)
        trial = _tried(folder / "bin")
        if not trial.refused:
            return folder / "bin"
        print(f"{trial} It is built once more, for any processor.")
    raise OSError(
        f"llama.cpp was built here and does not run here. {trial} Name the folder of a "
        f"llama.cpp that does in the variable {VARIABLE}."
    )


def options(name: str) -> list[str]:
    """What llama-server or llama-imatrix needs on its command line on this machine.

    The number of threads where `OMP_NUM_THREADS` is set; '--no-repack' where the fastest
    kernels are refused. OSError for programs of yours that do not compute either way.

    Example:
        >>> options("llama-server")  # doctest: +SKIP
        ['--threads', '2']
    """
    trial = _tried(binary(name).parent)
    if trial.refused:
        raise OSError(
            f"{trial} Name the folder of another llama.cpp in the variable {VARIABLE}, or "
            "unset it and take the old one off your PATH: the course then builds its own."
        )
    if trial.options:
        _say_once(str(trial))
    threads = os.environ.get("OMP_NUM_THREADS", "")
    return [*(["--threads", threads] if threads.isdigit() else []), *trial.options]


def trouble() -> str | None:
    """What is unusual about the llama.cpp at hand, as a sentence; None where nothing is."""
    path = find("llama-server")
    return str(_tried(path.parent)) or None if path else None


def uses_card() -> bool:
    """Whether the llama.cpp at hand computes on a CUDA card of this machine."""
    path = find("llama-server")
    return path is not None and "CUDA0" in _said(path, "--list-devices")


def has_web_page() -> bool:
    """Whether the server at hand is one that the course built with its web page inside."""
    path = find("llama-server")
    return path is not None and path.parent in _finished() and "page" in path.parts[-3]


def version(program: Path) -> str:
    """What a program says to `--version`, as one line; '' when it does not answer.

    Example:
        >>> version(Path("no-such-program"))
        ''
    """
    lines = _said(program, "--version").splitlines()
    return next((line for line in lines if line.startswith("version:")), "")


def source_folder() -> Path:
    """The folder with llama.cpp's converters and `gguf-py`; fetched on first use (77 MB)."""
    folder = runtime.cache_folder() / f"llama.cpp-source-{_build.SDIST_SHA256[:12]}"
    return make_once(folder, _build.fetch_source)


# ── asking the programs ──────────────────────────────────────────────────────────────────
_say_once = functools.cache(print)


@functools.cache
def _tried(folder: Path) -> _trial.Trial:
    # Builds from before llama-imatrix was asked for have the other one, which computes alike.
    programs = [folder / f"llama-{name}{EXE}" for name in ("imatrix", "perplexity")]
    return _trial.run(next(filter(Path.is_file, programs), programs[0]))


@functools.cache
def _said(program: Path, option: str) -> str:
    try:
        return _programs.run([program, option], timeout=60).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""


def _release(path: Path) -> str:
    """The version line of a program, or of one beside it: llama-quantize knows none."""
    paths = [path, *(path.with_name(name + EXE) for name in PROGRAMS)]
    return next(filter(None, map(version, paths)), "")


def _is_new_enough(path: Path) -> bool:
    # Older programs say "version: 5123 (abc)", newer ones "version: 0.5.0 (build 1, …)".
    match = re.match(r"version: (\d+)(\.\d+)?", _release(path))
    return match is not None and (bool(match[2]) or int(match[1]) >= OLDEST_BUILD)


# ── the course's own builds ──────────────────────────────────────────────────────────────
def _folder(extras: Collection[str] = ()) -> Path:
    # The programs are compiled for this processor: a cache that moves must not be trusted.
    # What a processor lists it may still refuse: `_tried` asks it, in every process anew.
    machine = _processor()
    if own := os.environ.get("CMAKE_ARGS"):
        machine = hashlib.sha256((machine + own).encode()).hexdigest()[:8]
    name = f"llama.cpp-{_build.SDIST_SHA256[:12]}-{machine}"
    return runtime.cache_folder() / "-".join([name, *(x for x in _build.EXTRAS if x in extras)])


@functools.cache
def _processor() -> str:
    text = platform.machine() + platform.processor()
    with contextlib.suppress(OSError):  # Linux only
        info = Path("/proc/cpuinfo").read_text("utf-8")
        text += next((x for x in info.splitlines() if x.startswith(("flags", "Feat"))), "")
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def _make(extras: Collection[str], folder: Path) -> None:
    _build.check_machine(extras, VARIABLE)
    _build.compile_programs(source_folder(), extras, folder)
    _tried.cache_clear()  # what was known of an older build in this place
    _said.cache_clear()


def _is_complete(folder: Path) -> bool:
    return all((folder / "bin" / (name + EXE)).is_file() for name in PROGRAMS)


def _finished(name: str = "llama-server") -> list[Path]:
    """The folders of all builds for this processor that have a program, the ablest first.

    Builds of an older course have no llama-imatrix: what they have is good, and is kept.
    """
    found = [path.parent for path in _folder().parent.glob(f"{_folder().name}*/bin/{name}{EXE}")]
    return sorted(found, key=_ability, reverse=True)


def _ability(programs: Path) -> tuple[bool, ...]:
    name = programs.parent.name
    return "cuda" in name, "portable" not in name, "page" in name
