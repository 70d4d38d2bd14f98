"""llama.cpp: found on this machine, or built once from a pinned source (Chapter 6).

`binary("llama-server")` is the door. Looked for in the folder named by `LLAMA_CPP`, on
PATH, then in the course's cache; what is not there is built from the source inside the
sdist of llama-cpp-python (MIT license), which comes from PyPI. `source_folder()` holds the
converters of the same version.
"""

import contextlib
import functools
import hashlib
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from helpers import downloads, runtime

VARIABLE = "LLAMA_CPP"
REQUIREMENT = "llama-cpp-python==0.3.36"
SDIST_BYTES = 76_589_250
SDIST_SHA256 = "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"
OLDEST_BUILD = 6000  # has /apply-template, --jinja and today's GGUF types
NEEDED_BYTES = 2_500_000_000
PROGRAMS = ("llama-server", "llama-quantize", "llama-perplexity")
CONVERTERS = ("convert_hf_to_gguf.py", "convert_lora_to_gguf.py")
OPTIONS = (
    "-DCMAKE_BUILD_TYPE=Release",
    "-DBUILD_SHARED_LIBS=OFF",  # so that the programs can be moved
    "-DLLAMA_CURL=OFF",
    "-DLLAMA_OPENSSL=OFF",
    "-DLLAMA_BUILD_TESTS=OFF",
    "-DLLAMA_BUILD_EXAMPLES=OFF",
)
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
    return find(name) or _built() / "bin" / _executable(name)


def find(name):
    """The program's path when it is on this machine and new enough, else None.

    Raises FileNotFoundError or ValueError when `LLAMA_CPP` names a folder that lacks it or
    has an old one.
    """
    if chosen := os.environ.get(VARIABLE):
        places = [Path(chosen), Path(chosen, "bin"), Path(chosen, "build", "bin")]
        for place in places:
            if (path := place / _executable(name)).is_file():
                if not is_new_enough(found := version(path)):
                    raise ValueError(
                        f"{VARIABLE}={chosen!r}: {name} says {found or 'nothing'!r}, and "
                        f"build {OLDEST_BUILD} (July 2025) or later is needed"
                    )
                return path
        raise FileNotFoundError(
            f"{VARIABLE}={chosen!r} has no {name}, neither there nor in bin or build/bin. "
            "Name the folder of llama.cpp's programs, or unset the variable"
        )
    if (found := shutil.which(name)) and is_new_enough(version(found)):
        return Path(found)
    folder = _cached()
    return folder / "bin" / _executable(name) if _is_complete(folder) else None


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
    try:
        done = subprocess.run(
            [program, "--version"], capture_output=True, text=True, timeout=60
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    lines = (done.stdout + done.stderr).splitlines()
    return next((line for line in lines if line.startswith("version:")), "")


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
    """Whether the programs of the cache were built with the server's web page inside."""
    try:
        return json.loads((_cached() / "build.json").read_text("utf-8"))["web_page"]
    except FileNotFoundError:
        return False


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
                archive.extractall(partial, members=wanted, filter="data")
        top = next(partial.glob("*/vendor/llama.cpp"))
        (top / "complete").touch()
        _replace(top, folder)


# ── building ─────────────────────────────────────────────────────────────────────────────
def _built():
    folder = _cached()
    from filelock import FileLock

    # The system releases the lock of a process that dies.
    with FileLock(f"{folder}.lock"):
        if not _is_complete(folder):
            source = source_folder()
            _check_tools()
            _build(source, folder)
    return folder


def _cached():
    return runtime.cache_folder() / f"llama.cpp-{SDIST_SHA256[:12]}-{_processor()}"


@functools.cache
def _processor():
    # The programs are compiled for this processor: a cache that moves must not be trusted.
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


def _check_tools():
    compilers = ("c++", "g++", "clang++")
    missing = [] if shutil.which("cmake") else ["cmake"]
    missing += [] if any(map(shutil.which, compilers)) else ["a C++ compiler"]
    system = platform.system()
    if missing or system == "Windows":
        lacking = " and ".join(missing) or "a configured compiler"
        raise OSError(
            f"llama.cpp is not on this machine, and building it needs {lacking}. "
            f"Install: {INSTALL.get(system, INSTALL['Linux'])}. Or name the folder of its "
            f"programs in the variable {VARIABLE}."
        )


def _build(source, folder):
    from tqdm.auto import tqdm

    free = shutil.disk_usage(folder.parent).free
    if free < NEEDED_BYTES:
        raise OSError(
            f"Building llama.cpp needs {NEEDED_BYTES / 1e9:.1f} GB for a while, and "
            f"{free / 1e9:.1f} GB are free in {folder.parent}. Free some space or set "
            f"{runtime.CACHE_VARIABLE} to a folder on a larger disk"
        )
    with _partial(folder) as partial:
        tree, made = partial / "source", partial / "made"
        shutil.copytree(source, tree)
        with tqdm(total=100, desc="building llama.cpp", unit="%") as bar:
            bar.set_postfix_str("web page")
            web_page = _build_web_page(tree / "tools" / "ui")
            bar.set_postfix_str("configuring")
            _call(["cmake", "-S", tree, "-B", made, *OPTIONS], tree)
            bar.set_postfix_str("compiling")
            command = ["cmake", "--build", made, "--config", "Release"]
            command += ["-j", str(os.cpu_count()), "--target", *PROGRAMS]
            _call(command, tree, bar)
        done = partial / "done"
        (done / "bin").mkdir(parents=True)
        for name in PROGRAMS:
            shutil.copy2(made / "bin" / _executable(name), done / "bin")
        sizes = {path.name: path.stat().st_size for path in (done / "bin").iterdir()}
        about = {"bytes": sizes, "web_page": web_page, "from": REQUIREMENT}
        (done / "build.json").write_text(json.dumps(about, indent=2), "utf-8")
        _replace(done, folder)


def _build_web_page(folder):
    """Let npm make the server's page; without npm or a network there will be none."""
    if not shutil.which("npm"):
        return False
    try:
        _call(["npm", "ci", "--no-audit", "--no-fund"], folder)
        _call(["npm", "run", "build"], folder)
    except OSError as error:
        print(f"The server will have no web page: {error}", file=sys.stderr)
        shutil.rmtree(folder / "dist", ignore_errors=True)
    return (folder / "dist" / "index.html").is_file()


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
