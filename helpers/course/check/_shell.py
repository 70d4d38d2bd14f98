"""What a notebook hands to the shell: which commands fail today.

Only what can be held against a source that is at hand or was read is called a fault: the
installed packages' own parsers and files, and llama.cpp's, Ollama's and pip's as they are now.
Where a line asks for a version of its time (`git checkout b1500`), nothing is.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import importlib.util
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path

from helpers.course.check import _llamacpp as llamacpp
from helpers.course.check import _packages
from helpers.course.check._lines import Command, commands

Hit = tuple[str, str, str]  # kind, symptom, word
_LLAMACPP = re.compile(r"(?:^|[/\\])llama\.cpp(?:[-_](?:master|main))?(?=[/\\]|$)")
_A_MODEL = re.compile(r"\.gguf\b|ggml|[.-]q\d_\w+\b", re.I)

# ── addresses ────────────────────────────────────────────────────────────────────────────
ADDRESSES = {
    "llamacpp_moved": r"(?:github\.com[/:]|githubusercontent\.com/|ghcr\.io/)ggerganov/"
    r"(?:llama\.cpp|ggml|whisper\.cpp)\b",
    "repository_moved": r"github\.com[/:](?:TimDettmers/bitsandbytes|"
    r"lvwerra/trl|HazyResearch/flash-attention|jmorganca/ollama|PanQiWei/AutoGPTQ|"
    r"OpenAccess-AI-Collective/axolotl)\b",
    "ollama_address": r"(?<![\w.@-])(?:www\.)?ollama\.ai(?![\w-])",
}
_ADDRESSES = {name: re.compile(pattern, re.I) for name, pattern in ADDRESSES.items()}
_MODELFILE = re.compile(r"(?:^|[\n\"'`]|\\n)[ \t]*ADAPTER[ \t]+[\w./\\$~{<\"'-]")


# ── what fails ───────────────────────────────────────────────────────────────────────────
class Session:
    """The lines of one notebook in their order: where the shell stands, and what was built."""

    def __init__(self) -> None:
        self.folder = ""
        self.of_its_time = False  # a llama.cpp of another day than today
        self.configured = False  # CMake wrote a Makefile there
        self.made = self.copied = False

    def hits(self, text: str) -> Iterator[Hit]:
        """What today's programs would say to a line, each thing once."""
        yield from dict.fromkeys(self._hits(text))

    def _hits(self, text: str) -> Iterator[Hit]:
        start, read = self.folder, list(commands(text))
        exported: dict[str, str] = {}
        for command in read:
            for word in [*command.words, *command.variables.values()]:
                yield from _moved(word)
            if not command.words[0]:  # nothing but `export CMAKE_ARGS=…`
                exported |= command.variables
                continue
            command.variables = exported | command.variables
            if command.name == "git" or "releases/download" in text:
                self.of_its_time |= _asks_for_its_time(text, self.folder)
            yield from self._command_hits(command)
            if command.name in ("cd", "pushd", "chdir") and command.words[1:]:
                self.folder = posixpath.normpath(posixpath.join(self.folder, command.words[1]))
            written = command.name in ("echo", "printf", "cat", "tee") and _MODELFILE.search(text)
            if written or (command.words[0] == "ADAPTER" and len(command.words) == 2):
                yield "fails", "ollama_adapter", "ADAPTER"
        if len(read) > 1:  # `!cd somewhere && …` leaves the notebook where it was
            self.folder = start

    def _command_hits(self, command: Command) -> Iterator[Hit]:
        name, module = command.name, command.module
        if name in ("huggingface-cli", "transformers-cli"):
            yield "fails", name.replace("-", "_"), name
        elif name == "trl" or module in ("trl", "trl.cli"):
            yield from _trl_hits(command.arguments)
        elif name == "accelerate" and command.words[1:2] == ["launch"]:
            yield from _launch_hits(command.words[2:])
        elif name == "autotrain":
            yield from _autotrain_hits(command.words[1:])
        elif module.startswith("trl.scripts."):
            yield from _unknown(command.arguments, _trl_options(module[12:]))
        elif module and _is_lost(module):
            yield "fails", "module_gone", module
        elif script := re.search(r"(?:^|/)scripts/(\w+)\.py$", command.script):
            yield from _script_hits(command.script, script[1], command.arguments)
        if not self.of_its_time:
            yield from self._llamacpp_hits(command)

    def _llamacpp_hits(self, command: Command) -> Iterator[Hit]:
        yield from self._build_hits(command)
        yield from self._converter_hits(command)
        yield from self._program_hits(command)
        for word in command.words:
            example = re.search(r"llama\.cpp/examples/([\w-]+)(?=/|$)", word)
            if example and example[1] in llamacpp.TOOLS and not _moved_any(word):
                yield "moved", "llamacpp_tools", f"examples/{example[1]}"
            if wanted := llamacpp.SCRIPT_REQUIREMENTS.search(word):
                yield "fails", "llamacpp_script", wanted[0]
        if command.name in ("cp", "mv", "ln") and "build/bin" in " ".join(command.words):
            self.copied = True

    def _build_hits(self, command: Command) -> Iterator[Hit]:
        name, words = command.name, command.words[1:]
        if name == "make":
            folder = words[words.index("-C") + 1 :][:1] if "-C" in words else []
            given = [*words, *(f"{key}=" for key in command.variables)]
            theirs = any(map(re.compile(r"(LLAMA|GGML)_\w+=|llama-|quantize$").match, given))
            if (theirs or self._inside("".join(folder))) and not self.configured:
                self.made = True
                yield "fails", "makefile", "make"
        elif name == "cmake":
            self.configured |= "." in words and self._inside("")
            yield from _option_hits(" ".join(words))
        packages = {need.name: need for need in _packages.needs(command)}
        need, line = packages.get("flash-attn"), " ".join(words)
        pip = "pip" in (name, command.module, *words[:1])  # conda builds nothing
        if need and not need.address and pip and "no-build-isolation" not in line:
            yield "fails", "flash_pip", need.name
        need = packages.get("llama-cpp-python")
        if need and not need.specifier and "llama-cpp-python/whl" not in line:
            yield from _option_hits(" ".join([line, *command.variables.values()]))

    def _inside(self, path: str) -> bool:
        """Whether a folder, seen from where the shell stands, is llama.cpp's top."""
        whole = posixpath.normpath(posixpath.join(self.folder, path))
        found = _LLAMACPP.search(whole)
        return bool(found and found.end() == len(whole))

    def _converter_hits(self, command: Command) -> Iterator[Hit]:
        path, words = command.script, command.arguments
        name = re.split(r"[/\\]", path)[-1]
        known = _LLAMACPP.search(path) or _LLAMACPP.search(self.folder)
        theirs = known or any(w.startswith(("--outtype", "--outfile", "--vocab")) for w in words)
        lost = llamacpp.SCRIPT.fullmatch(name) or "gguf-py/scripts/" in path
        if lost or (name == "convert.py" and theirs):
            yield "fails", "llamacpp_script", name
        elif name in ("convert_hf_to_gguf.py", "convert_lora_to_gguf.py"):
            for number, word in enumerate(words):
                option, _, value = word.partition("=")
                value = value or "".join(words[number + 1 : number + 2])
                if option in llamacpp.SCRIPT_OPTIONS:
                    yield "fails", "converter_option", option
                elif (
                    option == "--outtype"
                    and re.match(r"\w+$", value)
                    and value not in llamacpp.OUTTYPES
                ):
                    yield "fails", "converter_option", f"--outtype {value}"

    def _program_hits(self, command: Command) -> Iterator[Hit]:
        name, words = command.name, command.words[1:]
        path = posixpath.join(self.folder, command.words[0].replace("\\", "/"))
        here = _LLAMACPP.search(path)
        today = llamacpp.PROGRAMS.get(name, name)
        if name in llamacpp.PROGRAMS:
            if "/" not in path or not (here or any(map(_A_MODEL.search, words))):
                return  # somebody else's
            yield "fails", "llamacpp_program", name
        elif self.made and not self.copied and self._inside(posixpath.dirname(path)):
            if not name.startswith("llama-"):  # where make used to put it
                return
            yield "fails", "llamacpp_program", name
        if not (today.startswith("llama-") or command.module == "llama_cpp.server"):
            return
        if any(re.search(r"ggmlv\d.*\.bin$", word) for word in words):
            yield "fails", "ggml_file", "ggmlv3"
        if today in ("llama-cli", "llama-server", "llama-completion", "llama-perplexity"):
            for number, word in enumerate(words):
                plain = word.replace("_", "-") if word.startswith("--") else word
                value = "".join(words[number + 1 : number + 2])
                gone = plain in llamacpp.OPTIONS or plain in llamacpp.OPTIONS_OF_OTHERS.get(
                    today, ()
                )
                if gone or (plain in llamacpp.NEEDS_VALUE and (not value or value[0] == "-")):
                    yield "fails", "llamacpp_option", word


def hits(text: str) -> Iterator[Hit]:
    """What today's programs would say to one line: (kind, symptom, word) of each thing."""
    return Session().hits(text)


def in_text(text: str) -> Iterator[Hit]:
    """The same for a string of the program: an address, a path, a command, a Modelfile."""
    yield from dict.fromkeys(_in_text(text))


def _in_text(text: str) -> Iterator[Hit]:
    stripped = text.strip()
    whole = _MODELFILE.search(text) and re.search(r"(?m)^\s*FROM\s+\S", text)
    if whole or re.fullmatch(r"[^\n]*\n[ \t]*ADAPTER ", text):  # the second in an f-string
        yield "fails", "ollama_adapter", "ADAPTER"
    elif stripped and not re.search(r"\s", stripped):
        if stripped in ("huggingface-cli", "transformers-cli"):
            yield "fails", stripped.replace("-", "_"), stripped
        yield from _moved(stripped)
        yield from _option_hits(stripped)
        if _LLAMACPP.search(stripped) and not _moved_any(stripped):
            yield from hits(f"python {stripped}" if stripped.endswith(".py") else stripped)
    elif len(stripped) < 2000 and _STARTS.match(stripped):
        session = Session()
        for line in re.sub(r"\\\n", " ", stripped).splitlines():
            yield from session.hits(line)
    elif stripped.startswith("-DLLAMA_"):
        yield from _option_hits(stripped)


_STARTS = re.compile(
    r"(?:sudo +)?(?:git clone|curl|wget|docker|pip3? install|python3? +\S+\.py|python3? -m|cmake|"
    r"huggingface-cli|transformers-cli|trl +\w+ +-|accelerate launch|autotrain +\w+ +-|"
    r"CMAKE_ARGS|(?:LLAMA|GGML)_\w+=|cd +\S+ *(?:&&|;|\n)|make -|\S*llama\.cpp/\S+ )"
)


def _asks_for_its_time(text: str, folder: str) -> bool:
    """Whether llama.cpp is taken as it was at a commit, from a release or from a fork."""
    if re.search(r"llama\.cpp/releases/download/", text):
        return True
    if not (_LLAMACPP.search(folder) or "llama.cpp" in text):
        return False
    fork = re.search(r"\bclone\b.*github\.com[/:]([\w.-]+)/llama\.cpp", text)
    if fork and fork[1].lower() not in ("ggerganov", "ggml-org"):
        return True
    asked = re.search(r"\bgit\b[^;&|]*?\s(?:checkout|switch|--hard|--branch|-b)[ =]+(\S+)", text)
    return bool(asked and _OLD_VERSION.match(asked[1]))


_OLD_VERSION = re.compile(r"b?\d+$|[0-9a-f]{6,40}$|tags/|master-|gguf-v")


def _moved(word: str) -> Iterator[Hit]:
    for symptom, pattern in _ADDRESSES.items():
        if found := pattern.search(word):
            yield "moved", symptom, re.sub(r"^(?:github|githubuser\w+)\.com[/:]", "", found[0])


def _moved_any(word: str) -> bool:
    return any(True for _ in _moved(word))


def _option_hits(text: str) -> Iterator[Hit]:
    for name, value in re.findall(r"-D\s*(LLAMA_\w+)(?::\w+)?=(\w+)", text):
        if value.lower() in ("on", "1", "true", "yes", "y"):
            for kind, names in llamacpp.BUILD_OPTIONS.items():
                if name in names:
                    yield kind, "build_option", name


# ── against the installed parsers ────────────────────────────────────────────────────────
def _trl_hits(words: list[str]) -> Iterator[Hit]:
    name = words[0] if words else "-"
    if re.match(r"[a-z][\w-]*$", name) and (known := _trl_commands()):
        if name not in known:
            yield "fails", "trl_command", f"trl {name}"
        else:
            yield from _unknown(words[1:], _trl_options(name))


def _script_hits(path: str, name: str, words: list[str]) -> Iterator[Hit]:
    if "examples/scripts/" in path and name in ("sft", "sft_trainer", "dpo", "orpo"):
        yield "moved", "trl_script", f"examples/scripts/{name}.py"
    elif "trl/scripts/" in path:
        yield from _unknown(words, _trl_options(name))


def _unknown(words: list[str], options: frozenset[str]) -> Iterator[Hit]:
    for word in words if options else ():
        flag = word.split("=")[0]
        # An unambiguous beginning is enough for argparse.
        if re.match(r"--[a-z][\w-]*$", flag) and not any(o.startswith(flag) for o in options):
            yield "fails", "trl_option", flag


def _launch_hits(words: list[str]) -> Iterator[Hit]:
    known = _launch_options()
    number = 0
    while known and number < len(words):
        flag = words[number].split("=")[0]
        if flag == "-m" or not flag.startswith("-"):
            script = re.search(r"(?:^|/)scripts/(\w+)\.py$", words[number])
            if script:
                yield from _script_hits(words[number], script[1], words[number + 1 :])
            return
        if flag not in known:
            if re.match(r"--[a-z][\w-]*$", flag):
                yield "fails", "launch_option", flag
            return
        number += 1 if "=" in words[number] or known[flag] else 2


@functools.cache
def _trl_commands() -> tuple[str, ...]:
    try:
        from trl.cli.commands import get_commands

        return tuple(command.name for command in get_commands())
    except Exception:  # another trl than the course's: nothing can be said
        return ()


@functools.cache
def _trl_options(name: str) -> frozenset[str]:
    try:
        module = importlib.import_module(f"trl.scripts.{name.replace('-', '_')}")
        parser = module.make_parser()
        # What it does not know itself goes on to `accelerate launch`.
        own = [option for action in parser._actions for option in action.option_strings]
        return frozenset([*own, *_launch_options(), "--config", "--accelerate_config"])
    except Exception:  # a script without a parser; another trl than the course's
        return frozenset()


@functools.cache
def _launch_options() -> dict[str, bool]:
    """The options of `accelerate launch`, and whether each is a switch."""
    try:
        from accelerate.commands.launch import launch_command_parser

        actions: list[argparse.Action] = launch_command_parser()._actions
    except Exception:
        return {}
    found = {option: action.nargs == 0 for action in actions for option in action.option_strings}
    return found | {name.replace("_", "-"): switch for name, switch in found.items()}


def _autotrain_hits(words: list[str]) -> Iterator[Hit]:
    for word in words if words[:1] == ["llm"] else ():
        flag = word.split("=")[0]
        if flag.replace("-", "_").replace("__", "--", 1) in llamacpp.AUTOTRAIN_OPTIONS:
            yield "fails", "autotrain_option", flag


def _is_lost(module: str) -> bool:
    """Whether `python -m module` finds the package here, and in it no such module."""
    package, *inner = module.split(".")
    if package not in _packages.PINNED or not inner or not all(map(str.isidentifier, inner)):
        return False
    spec = importlib.util.find_spec(package)
    places = [Path(place, *inner) for place in (spec and spec.submodule_search_locations) or []]
    found = [place.with_suffix(".py").is_file() or place.is_dir() for place in places]
    return bool(found) and not any(found)
