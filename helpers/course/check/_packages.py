"""Which packages a shell line installs, and which versions it pins."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata

from packaging.specifiers import InvalidSpecifier, SpecifierSet

from helpers.course.check._lines import Command, commands, names

_DISTRIBUTIONS = dict(
    pair.split("=")
    for pair in names(
        "sklearn=scikit-learn skimage=scikit-image pil=pillow yaml=pyyaml cv2=opencv-python "
        "opencv-python-headless=opencv-python opencv-contrib-python=opencv-python "
        "dotenv=python-dotenv bs4=beautifulsoup4 docx=python-docx pptx=python-pptx "
        "fitz=pymupdf dateutil=python-dateutil slugify=python-slugify git=gitpython "
        "levenshtein=python-levenshtein jwt=pyjwt umap=umap-learn pynvml=nvidia-ml-py "
        "faiss=faiss-cpu faiss-gpu=faiss-cpu llama-cpp=llama-cpp-python awq=autoawq "
        "autogptq=auto-gptq flash-attention=flash-attn autotrain=autotrain-advanced "
        "lm-evaluation-harness=lm-eval pkg-resources=setuptools"
    )
)
# A pin of these replaces what is installed here.
PINNED = names("trl transformers peft bitsandbytes datasets accelerate")
# Options of the installers that are followed by a value.
_VALUED = names(
    "--channel --find-links --index-url --extra-index-url --target --name --prefix --root "
    "--requirement --constraint --index --default-index --python --torch-backend --platform "
    "--python-version --trusted-host --upgrade-strategy --src --progress-bar"
)


@dataclass(frozen=True)
class Need:
    """A package that a line installs: its name, the versions it allows, where it is from."""

    name: str
    specifier: str = ""
    address: str = ""


def canonical(name: str) -> str:
    """The name of a distribution for the name of an import, a repository, or itself."""
    plain = re.sub(r"[-_.]+", "-", name.strip()).lower()
    return _DISTRIBUTIONS.get(plain, plain)


def installed(text: str) -> set[str]:
    """The canonical names of the packages that a line installs (pip, uv, conda)."""
    names = {need.name for command in commands(text) for need in needs(command)}
    if any(name.startswith("google-") for name in names):
        names.add("google")  # several distributions share that import
    if "unsloth" in names:
        names.add("unsloth-zoo")
    return names


def notes(text: str) -> list[str]:
    """Worth knowing and no fault: what would replace the installed versions."""
    told, pins = [], []
    for command in commands(text):
        for need in needs(command):
            here = _version(need.name) if need.name in PINNED else ""
            if here and need.specifier and not _allows(need.specifier, here):
                pins.append(f"{need.name}{need.specifier} (here {here})")
            elif here and "github.com" in need.address:
                pins.append(f"{need.name} from its repository (here {here})")
            elif need.name in ("unsloth", "autotrain-advanced"):
                told.append(
                    f"{need.name} brings its own versions of transformers and trl: give it an "
                    "environment of its own"
                )
        if any(re.search(r"text-generation-(launcher|inference)\b", w) for w in command.words):
            told.append(
                "text-generation-inference still runs, and has been archived since March 2026: "
                "its authors recommend vLLM, SGLang or llama.cpp"
            )
    if pins:
        told.insert(
            0,
            f"{', '.join(pins)} would replace what is installed: in an environment of its own "
            "the code may run as it was, here drop the pin",
        )
    return list(dict.fromkeys(told))


def _allows(specifier: str, version: str) -> bool:
    try:
        return SpecifierSet(specifier).contains(version, prereleases=True)
    except InvalidSpecifier:
        return True


@functools.cache
def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""


def needs(command: Command) -> Iterator[Need]:
    """What `pip install`, `uv add`, `conda install` and their like are asked for."""
    words, name = command.arguments, command.module or command.name
    if name == "uv" and words[:1] == ["pip"]:
        words = words[1:]
    if name not in ("pip", "uv", "conda", "mamba", "micromamba", "poetry"):
        return
    while words and words[0].startswith("-"):
        words = words[1:]
    if not words or words[0] not in ("install", "add"):
        return
    skip = False
    for word in words[1:]:
        if skip or word.startswith("-"):
            valued = word in _VALUED or re.match(r"-[a-zA-Z]*[rcfitnp]$", word)
            skip = not skip and bool(valued) and "=" not in word
        elif found := _need(word):
            yield found


def _need(word: str) -> Need | None:
    word = word.split("::")[-1].split(";")[0].strip()
    at = re.match(r"([\w.-]+)\s*(?:\[[^]]*\])?\s*@\s*(\S+)", word)
    if at and not word.startswith(("git+", "http")):
        return Need(canonical(at[1]), address=at[2])
    if word.startswith(("git+", "http", "./", "../", "/")) or word.endswith((".whl", ".tar.gz")):
        egg = re.search(r"#(?:.*&)?egg=([\w.-]+)", word)
        last = re.sub(r"[?#].*|(?<=[\w/])@[\w./-]*$", "", word).rstrip("/").split("/")[-1]
        name = last.split("-")[0] if last.endswith((".whl", ".tar.gz")) else last
        name = egg[1] if egg else name.removesuffix(".git")
        return Need(canonical(name), address=word) if re.match(r"\w[\w.-]*$", name) else None
    plain = re.match(r"([A-Za-z0-9][\w.-]*)\s*(?:\[[^]]*\])?\s*([=<>!~].*)?$", word)
    return Need(canonical(plain[1]), (plain[2] or "").strip()) if plain else None
