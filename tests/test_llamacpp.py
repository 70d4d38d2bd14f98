"""llama.cpp's programs: found, or built once; never half-built; tried before use.

The build runs for real here, with CMake and a compiler, on a source tree of three lines.
The tree of llama.cpp itself is built by the slow set where the cache is cold.
"""

import gzip
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
import trial_model

from helpers import _machine, runtime
from helpers.course import notebooks
from helpers.serving import _build, _trial, gguf, llamacpp

BUILDS = pytest.mark.skipif(
    not (shutil.which("cmake") and shutil.which("c++")) or os.name == "nt",
    reason="needs cmake and a C++ compiler",
)
PROGRAM = '#include <cstdio>\nint main() {{ std::puts("version: {version} (abc)"); }}\n'
LISTS = """\
cmake_minimum_required(VERSION 3.10)
project(tiny CXX)
set(CMAKE_RUNTIME_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR}/bin)
foreach(name llama-server llama-quantize llama-imatrix)
  add_executable(${name} main.cpp)
endforeach()
"""
SLOW_STEP = """\
add_custom_target(wait ALL COMMAND sleep 60)
add_dependencies(llama-server wait)
"""
MAKE = """\
import sys
from pathlib import Path
from helpers.serving import llamacpp

llamacpp.source_folder = lambda: Path(sys.argv[1])
print(llamacpp.binary("llama-server"))
"""


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache, and nothing on PATH or in the variable."""
    monkeypatch.setenv(runtime.CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.delenv(llamacpp.VARIABLE, raising=False)
    found = shutil.which
    monkeypatch.setattr(
        shutil, "which", lambda name, **k: None if "llama-" in name else found(name, **k)
    )
    return runtime.cache_folder()


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "CMakeLists.txt").write_text(LISTS)
    (folder / "main.cpp").write_text(PROGRAM.format(version=6500))
    return folder


def start(source, cache):
    """A process of its own that asks for the server."""
    return subprocess.Popen(
        [sys.executable, "-c", MAKE, str(source)],
        cwd=notebooks.root(),
        env={**os.environ, runtime.CACHE_VARIABLE: str(cache)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def partials(cache):
    return [path.name for path in cache.iterdir() if path.name.startswith(".")]


# ── names and versions ───────────────────────────────────────────────────────────────────
def test_an_unknown_program_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"one of 'llama-server', .*not 'llama-cli'"):
        llamacpp.binary("llama-cli")


@pytest.mark.skipif(os.name == "nt", reason="shell scripts")
@pytest.mark.parametrize(
    ("said", "good"),
    [
        ("6000 (abc)", True),
        ("5999 (abc)", False),
        ("0.5.0-dev (build 1, commit abc)", True),
        ("unknown", False),
        ("", False),
    ],
)
def test_old_versions_are_told_from_new_ones(cache, tmp_path, monkeypatch, said, good):
    path = program(tmp_path / "mine", said)
    monkeypatch.setattr(shutil, "which", lambda name, **_: str(path))
    assert (llamacpp.find("llama-server") == path) is good


def test_a_program_that_is_none_has_no_version(tmp_path):
    (tmp_path / "llama-server").write_text("not a program")
    assert llamacpp.version(tmp_path / "llama-server") == ""


# ── where it is looked for ───────────────────────────────────────────────────────────────
def program(folder, version):
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "llama-server"
    path.write_text(f"#!/bin/sh\necho 'version: {version}'\n")
    path.chmod(0o755)
    return path


@pytest.mark.skipif(os.name == "nt", reason="shell scripts")
@pytest.mark.parametrize("inside", [".", "bin", "build/bin"])
def test_the_variable_names_a_folder(cache, tmp_path, monkeypatch, inside):
    path = program(tmp_path / "mine" / inside, "6100 (abc)")
    monkeypatch.setenv(llamacpp.VARIABLE, str(tmp_path / "mine"))
    assert llamacpp.binary("llama-server").samefile(path)
    with pytest.raises(FileNotFoundError, match="has no llama-quantize"):
        llamacpp.binary("llama-quantize")


@pytest.mark.skipif(os.name == "nt", reason="shell scripts")
def test_a_quantizer_that_says_no_version_is_as_old_as_the_programs_beside_it(
    cache, tmp_path, monkeypatch
):
    """The real llama-quantize answers `--version` with its usage."""
    new, old = (program(tmp_path / v, f"{v} (abc)").parent for v in ("6100", "4000"))
    for folder in (new, old):
        (folder / "llama-quantize").write_text("#!/bin/sh\necho usage: llama-quantize; exit 1\n")
        (folder / "llama-quantize").chmod(0o755)
    monkeypatch.setattr(shutil, "which", lambda name, **_: str(new / name))
    assert llamacpp.find("llama-quantize") == new / "llama-quantize"
    monkeypatch.setenv(llamacpp.VARIABLE, str(new))
    assert llamacpp.binary("llama-quantize") == new / "llama-quantize"
    monkeypatch.setenv(llamacpp.VARIABLE, str(old))
    with pytest.raises(ValueError, match="says 'version: 4000"):
        llamacpp.binary("llama-quantize")


@pytest.mark.skipif(os.name == "nt", reason="shell scripts")
def test_an_old_one_in_the_variable_is_an_error_and_on_the_path_is_passed_over(
    cache, tmp_path, monkeypatch
):
    path = program(tmp_path / "old", "4000 (abc)")
    monkeypatch.setenv(llamacpp.VARIABLE, str(tmp_path / "old"))
    with pytest.raises(ValueError, match=r"says 'version: 4000.*build 6000"):
        llamacpp.find("llama-server")
    monkeypatch.delenv(llamacpp.VARIABLE)
    monkeypatch.setattr(shutil, "which", lambda name, **_: str(path))
    assert llamacpp.find("llama-server") is None
    newer = program(tmp_path / "new", "7000 (abc)")
    monkeypatch.setattr(shutil, "which", lambda name, **_: str(newer))
    assert llamacpp.find("llama-server") == newer


@pytest.mark.parametrize(
    ("system", "words"),
    [
        ("Linux", "apt-get install cmake"),
        ("Darwin", "brew install llama.cpp"),
        ("Windows", "winget install llama.cpp"),
    ],
)
def test_without_tools_the_package_manager_is_named(cache, source, monkeypatch, system, words):
    monkeypatch.setattr(llamacpp, "source_folder", lambda: source)
    monkeypatch.setattr(_build.platform, "system", lambda: system)
    monkeypatch.setattr(shutil, "which", lambda *_, **__: None)
    with pytest.raises(OSError, match=words) as error:
        llamacpp.binary("llama-server")
    assert "cmake" in str(error.value) and llamacpp.VARIABLE in str(error.value)
    assert not partials(cache)


@BUILDS
def test_too_little_space_is_said_first(cache, source, monkeypatch):
    monkeypatch.setattr(llamacpp, "source_folder", lambda: source)
    monkeypatch.setattr(_build, "NEEDED_BYTES", 10**18)
    with pytest.raises(OSError, match=runtime.CACHE_VARIABLE):
        llamacpp.binary("llama-server")
    assert not partials(cache)


# ── a processor that refuses what it lists ───────────────────────────────────────────────
SIGILL = "kill -ILL $$"
COMPUTES = f"echo 'Final estimate: {_trial.ANSWER}'"
NEEDS_PLAIN = f'case "$*" in *--no-repack*) {COMPUTES};; *) {SIGILL};; esac'


def stand_in(folder, does):
    """Programs that say a new version, and when they should compute do as told."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in llamacpp.PROGRAMS:
        path = folder / name
        said = 'if [ "$1" = --version ]; then echo "version: 9000 (abc)"; exit 0; fi'
        path.write_text(f"#!/bin/sh\n{said}\n{does}\n")
        path.chmod(0o755)
    return folder


@pytest.mark.skipif(os.name == "nt", reason="shell scripts and signals")
@pytest.mark.parametrize(
    ("does", "options", "words"),
    [
        (COMPUTES, [], ""),
        ("exit 0", [], r"did not compute on a tiny file: it ended with status 0"),
        (NEEDS_PLAIN, ["--no-repack"], r"killed by SIGILL: .*started with --no-repack"),
        (SIGILL, None, r"does not compute on this machine: it was killed by SIGILL"),
        (
            "echo no such file; exit 3",
            [],
            r"on a tiny file: it ended with status 3: no such",
        ),
        ("kill -KILL $$", [], r"on a tiny file: it was killed by SIGKILL"),
    ],
)
def test_programs_are_tried_before_anybody_relies_on_them(tmp_path, does, options, words):
    folder = stand_in(tmp_path, does)
    trial = _trial.run(folder / "llama-imatrix")
    assert trial.refused is (options is None)
    assert trial.options == (options or [])
    assert re.search(words, str(trial)) and bool(str(trial)) is bool(words)


def test_without_the_program_nothing_is_tried(tmp_path):
    trial = _trial.run(tmp_path / "llama-imatrix")
    assert (trial.options, trial.refused, str(trial)) == ([], False, "")


@pytest.mark.skipif(os.name == "nt", reason="shell scripts and signals")
def test_an_older_build_is_tried_with_the_program_it_has(tmp_path):
    folder = stand_in(tmp_path, SIGILL)
    (folder / "llama-imatrix").rename(folder / "llama-perplexity")
    assert llamacpp._tried(folder).refused


@pytest.mark.skipif(os.name == "nt", reason="shell scripts and signals")
def test_your_own_programs_are_started_plainly_or_refused_in_words(
    cache, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setenv(llamacpp.VARIABLE, str(stand_in(tmp_path / "plain", NEEDS_PLAIN)))
    assert llamacpp.options("llama-server") == ["--threads", "3", "--no-repack"]
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert llamacpp.options("llama-imatrix") == ["--no-repack"]
    assert capsys.readouterr().out.count("--no-repack") == 1, "said once, not per program"
    assert "SIGILL" in llamacpp.trouble()
    monkeypatch.setenv(llamacpp.VARIABLE, str(stand_in(tmp_path / "dead", SIGILL)))
    with pytest.raises(OSError, match=rf"killed by SIGILL.*{llamacpp.VARIABLE}"):
        llamacpp.options("llama-server")
    monkeypatch.setenv(llamacpp.VARIABLE, str(stand_in(tmp_path / "well", COMPUTES)))
    assert llamacpp.options("llama-server") == [] and llamacpp.trouble() is None


def test_the_tiny_file_has_a_layer_of_each_type(tmp_path):
    """It is what tests/trial_model.py writes."""
    stored, written = tmp_path / "stored.gguf", tmp_path / "written.gguf"
    stored.write_bytes(gzip.decompress(_trial.MODEL.read_bytes()))
    trial_model.write(written)
    found, expected = gguf.inspect(stored), gguf.inspect(written)
    assert found.metadata == expected.metadata
    assert found.tensors.equals(expected.tensors)
    for block, kind in enumerate(trial_model.TYPES):
        assert found.tensors.loc[f"blk.{block}.ffn_up.weight", "type"] == kind
    dying = {"Q8_0", "Q6_K", "Q4_K", "Q4_0", "Q2_K"}  # where AMX is listed and refused
    assert dying <= set(trial_model.TYPES)


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (0, "ended with status 0"),
        (7, "ended with status 7"),
        (-signal.SIGILL, "killed by SIGILL: it uses an instruction"),
        (-signal.SIGKILL, "killed by SIGKILL: most likely because memory ran out"),
        (-signal.SIGSEGV, "killed by SIGSEGV"),
        (-signal.SIGTERM, r"killed by SIGTERM$"),
    ],
)
@pytest.mark.skipif(os.name == "nt", reason="signals")
def test_a_negative_status_is_read_as_the_signal_it_is(status, words):
    assert re.search(words, _machine.how_it_ended(status))


# ── fetched ──────────────────────────────────────────────────────────────────────────────
def test_the_source_is_what_lies_in_the_sdist_and_is_fetched_once(cache, monkeypatch):
    files = {"vendor/llama.cpp/convert.py": "1", "vendor/llama.cpp/a/b.txt": "2", "setup.py": "3"}
    files[".git/modules/vendor/llama.cpp/HEAD"] = "4"
    asked = []

    def fetch(requirement, checksum, folder, bar, *, source):
        asked.append((requirement, checksum, source))
        folder.mkdir(parents=True)
        with tarfile.open(folder / "x.tar.gz", "w:gz") as archive:
            for name, text in files.items():
                member = tarfile.TarInfo(f"llama_cpp_python-0/{name}")
                member.size = len(text)
                archive.addfile(member, io.BytesIO(text.encode()))
        return folder / "x.tar.gz"

    monkeypatch.setattr(_build._downloads, "fetch", fetch)
    folder = llamacpp.source_folder()
    assert folder == llamacpp.source_folder() and not partials(cache)
    assert asked == [(_build.REQUIREMENT, _build.SDIST_SHA256, True)]
    found = {str(p.relative_to(folder)): p.read_text() for p in folder.rglob("*") if p.is_file()}
    assert found == {"convert.py": "1", str(Path("a", "b.txt")): "2"}


# ── built ────────────────────────────────────────────────────────────────────────────────
@BUILDS
def test_it_is_built_once_kept_and_built_again_for_a_program_that_is_missing(
    cache, source, monkeypatch
):
    monkeypatch.setattr(llamacpp, "source_folder", lambda: source)
    assert llamacpp.find("llama-server") is None
    path = llamacpp.binary("llama-server")
    assert llamacpp.version(path) == "version: 6500 (abc)"
    assert llamacpp.find("llama-quantize") == path.parent / "llama-quantize"
    made = path.stat().st_mtime_ns
    assert llamacpp.binary("llama-server").stat().st_mtime_ns == made
    assert llamacpp.has_web_page() is False and not partials(cache)
    (path.parent / "llama-imatrix").unlink()  # as in a build of the time before
    assert llamacpp.binary("llama-server").stat().st_mtime_ns == made, "it serves all the same"
    assert llamacpp.find("llama-imatrix") is None
    assert llamacpp.binary("llama-imatrix").is_file() and not partials(cache)
    assert path.stat().st_mtime_ns > made


@BUILDS
def test_a_build_that_this_processor_refuses_is_followed_by_a_portable_one(
    cache, source, monkeypatch, capsys
):
    monkeypatch.setattr(llamacpp, "source_folder", lambda: source)
    (source / "CMakeLists.txt").write_text(
        LISTS + 'option(GGML_NATIVE "" ON)\nif(GGML_NATIVE)\n'
        "target_compile_definitions(llama-imatrix PRIVATE REFUSED)\nendif()\n"
    )
    (source / "main.cpp").write_text(
        "#include <csignal>\n#include <cstdio>\nint main(int n, char **) {\n"
        "#ifdef REFUSED\nif (n > 2) raise(SIGILL);\n#endif\n"
        'std::puts("version: 6500 (abc)"); }\n'
    )
    path = llamacpp.binary("llama-server")
    assert "portable" in path.parent.parent.name
    assert "killed by SIGILL" in capsys.readouterr().out
    assert llamacpp.find("llama-server") == path, "the one that dies is passed over"
    assert "--no-repack" not in llamacpp.options("llama-server")


@BUILDS
def test_the_web_page_is_made_only_when_asked_for(cache, source, monkeypatch):
    monkeypatch.setattr(llamacpp, "source_folder", lambda: source)
    called = []
    real = _build._call
    monkeypatch.setattr(
        _build,
        "_call",
        lambda c, *rest: called.append(c[0]) or (c[0] != "npm" and real(c, *rest)),
    )
    plain = llamacpp.binary("llama-server")
    assert "npm" not in called and not llamacpp.has_web_page()
    tools = shutil.which
    monkeypatch.setattr(shutil, "which", lambda name, **k: "npm" if name == "npm" else tools(name))
    llamacpp.build(web_page=True)
    assert called.count("npm") == 2 and llamacpp.has_web_page()
    assert llamacpp.binary("llama-server") != plain, "the abler one is taken"
    monkeypatch.setattr(shutil, "which", lambda name, **k: None)
    with pytest.raises(OSError, match=r"needs .*nvcc.* CUDA toolkit"):
        llamacpp.build(cuda=True)


@BUILDS
def test_only_ggml_gets_the_compilers_full_effort(cache, source, monkeypatch):
    """Asked by an option of one's own for CMake, which writes down its commands."""
    (source / "ggml").mkdir()
    (source / "ggml" / "g.cpp").write_text("int g() { return 0; }\n")
    (source / "ggml" / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.10)\nproject(ggml CXX)\nadd_library(ggml STATIC g.cpp)\n"
    )
    (source / "CMakeLists.txt").write_text(LISTS + "add_subdirectory(ggml)\n")
    monkeypatch.setattr(llamacpp, "source_folder", lambda: source)
    monkeypatch.setenv("CMAKE_ARGS", "-DCMAKE_EXPORT_COMPILE_COMMANDS=ON '-DA=b c'")
    real, commands = _build._call, []

    def call(command, folder, bar=None):
        real(command, folder, bar)
        if "--build" not in command:
            assert "-DA=b c" in command
            made = command[command.index("-B") + 1]
            commands.extend(json.loads((made / "compile_commands.json").read_text()))

    monkeypatch.setattr(_build, "_call", call)
    own = llamacpp.binary("llama-server")
    monkeypatch.delenv("CMAKE_ARGS")
    assert llamacpp.find("llama-server") != own, "a build with other options is another"
    level = {
        Path(one["file"]).name: re.findall(r" -O\d", one["command"])[-1].strip() for one in commands
    }
    assert level == {"main.cpp": "-O1", "g.cpp": "-O3"}


def test_no_more_compilers_than_cores_and_memory_allow(monkeypatch):
    monkeypatch.setattr(runtime, "usable_cores", lambda: 8)
    monkeypatch.setattr(runtime, "available_memory_bytes", lambda: 4 * 10**9)
    assert _build._jobs() == 3
    monkeypatch.setattr(runtime, "available_memory_bytes", lambda: 10**8)
    assert _build._jobs() == 1
    monkeypatch.setattr(runtime, "available_memory_bytes", lambda: 10**12)
    assert _build._jobs() == 8


@BUILDS
def test_a_failing_build_is_quoted_and_leaves_nothing(cache, source, monkeypatch):
    monkeypatch.setattr(llamacpp, "source_folder", lambda: source)
    (source / "main.cpp").write_text("int main() { return nonsense; }\n")
    with pytest.raises(OSError, match=r"cmake --build (.|\n)*nonsense"):
        llamacpp.binary("llama-server")
    assert llamacpp.find("llama-server") is None and not partials(cache)


@BUILDS
def test_a_killed_build_is_never_used_and_two_at_once_build_once(cache, source):
    slow = source.parent / "slow"
    shutil.copytree(source, slow)
    (slow / "CMakeLists.txt").write_text(LISTS + SLOW_STEP)
    victim = start(slow, cache)
    deadline = time.monotonic() + 60
    while not list(cache.glob(".*/*/made/CMakeCache.txt")):
        assert victim.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(victim.pid, signal.SIGKILL)
    victim.communicate()
    assert partials(cache), "it was in the middle"

    both = [start(source, cache), start(source, cache)]
    said = [process.communicate(timeout=120) for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert said[0][0] == said[1][0] != ""
    assert sum("compiling" in err for _, err in said) == 1, "the other one waited"
    assert not partials(cache)
