"""Colab, Kaggle, a pod, a laptop: make the place a notebook runs in ready (all chapters).

The bootstrap cell calls `settle` first of all, so this module needs nothing but Python and
what every kernel has.
"""

from __future__ import annotations

import importlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from helpers import _downloads, _machine, runtime

if TYPE_CHECKING:
    from packaging.requirements import Requirement

DISTRIBUTION = "fine-tuning-helpers"
EXTRAS = ("notebook", "serve")  # of the distribution: what the course needs beside its core
CARDS = "CUDA_VISIBLE_DEVICES"
UNTOUCHED = ("torch", "numpy", "pandas")  # replacing them breaks a hosted notebook
OLDEST_PYTHON = (3, 11)
_brought = False  # the cell, run again after a failure, finds `helpers` and says False


class RestartNeeded(RuntimeError):
    """This kernel had already loaded something that was replaced or set only now."""


def settle(brought: bool = False) -> None:
    """What the bootstrap cell does last; on your own machine it installs nothing.

    Everywhere: of several cards, this kernel gets one. In Colab, on Kaggle and on a pod, or
    where the cell brought the course: caches go to the pod's volume, and what is missing or
    too old is installed; torch, numpy and pandas are left as they are. Raises RestartNeeded
    when it comes too late in this kernel, RuntimeError when pip fails, OSError without pip.

    Args:
        brought: the cell has just cloned the course.

    Example:
        >>> settle()  # on your own machine, with one card or none  # doctest: +SKIP
    """
    global _brought
    _brought = brought = brought or _brought
    use_one_card()
    platform = runtime.detect_platform()
    if platform == "runpod":
        use_volume()
    if brought or platform != "local":
        install_missing()


def use_one_card() -> None:
    """Let this kernel see the first card where the machine has several.

    TRL's trainers would spread a model that lies on one card over all of them, and refuse.
    A CUDA_VISIBLE_DEVICES of your own is kept.

    Example:
        >>> use_one_card()
    """
    if CARDS in os.environ or (number := _count_cards()) < 2:
        return
    os.environ[CARDS] = "0"
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.init()  # until then, device_count() reads the variable, not the truth
        if torch.cuda.device_count() > 1:
            del os.environ[CARDS]  # or this cell, run again, would be content
            raise RestartNeeded(
                f"torch has already opened {number} cards in this kernel, and the course "
                "trains on one: restart the kernel and begin with the bootstrap cell."
            )
    print(f"{number} cards here; the course trains on one: {CARDS}=0, unless you set it.")


def _count_cards() -> int:
    """How many cards the driver sees; asking it leaves torch and CUDA asleep."""
    if not (program := shutil.which("nvidia-smi")):
        return 0
    try:
        done = subprocess.run([program, "-L"], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return 0
    return len(re.findall(r"^GPU \d", done.stdout, re.MULTILINE))


def use_volume() -> None:
    """Let the caches of the Hub and of pip lie on a pod's volume, which survives a stop.

    Variables that are already set are kept.
    """
    if not runtime.POD_VOLUME.is_dir():
        return
    caches = runtime.POD_VOLUME / ".cache"
    os.environ.setdefault("PIP_CACHE_DIR", str(caches / "pip"))
    if "HF_HOME" not in os.environ:
        if "huggingface_hub" in sys.modules:
            raise RestartNeeded(
                f"huggingface_hub was imported before its cache was moved to {caches}: "
                "restart the kernel and begin with the bootstrap cell."
            )
        os.environ["HF_HOME"] = str(caches / "huggingface")


# ── what is missing ──────────────────────────────────────────────────────────────────────
def missing(folder: Path | None = None, *, extras: tuple[str, ...] = EXTRAS) -> list[str]:
    """The requirements that this environment lacks or has too old, as pip wants them.

    Args:
        folder: holds pyproject.toml, whose lower bounds decide, and requirements.txt, whose
            tested versions are what gets installed. Default: the course's repository, or
            without it the bounds that pip noted when it installed `helpers`.
        extras: the parts of the course that count, beside its core.

    Returns:
        Such as ['trl==1.16.0']; torch, numpy and pandas never appear.

    Example:
        >>> missing()
        []
    """
    tested = tested_versions(folder)
    found = []
    for wanted in _unsatisfied(folder, extras):
        name = _normal(wanted.name)
        if name not in UNTOUCHED:
            found.append(f"{name}=={tested[name]}" if name in tested else str(wanted))
    return found


def tested_versions(folder: Path | None = None) -> dict[str, str]:
    """The versions of requirements.txt, by name; {} where there is no repository.

    Args:
        folder: as in `missing`.

    Example:
        >>> tested_versions()["torch"]  # doctest: +SKIP
        '2.13.0'
    """
    folder = folder or repository_folder()
    text = (folder / "requirements.txt").read_text("utf-8") if folder else ""
    return {_normal(n): v for n, v in re.findall(r"(?m)^([\w.-]+)==(\S+)", text)}


def repository_folder() -> Path | None:
    """The course's repository around `helpers`; None where pip installed it alone.

    Example:
        >>> (repository_folder() / "helpers").is_dir()
        True
    """
    folder = Path(__file__).resolve().parents[2]
    project = folder / "pyproject.toml"
    ours = project.is_file() and f'name = "{DISTRIBUTION}"' in project.read_text("utf-8")
    return folder if ours else None


def address() -> str:
    """The course's 'owner/name' on GitHub, as [project.urls] of pyproject.toml has it.

    Example:
        >>> address().count("/")
        1
    """
    if folder := repository_folder():
        url = _project(folder)["urls"]["Repository"]
    else:
        urls = metadata.metadata(DISTRIBUTION).get_all("Project-URL") or []
        url = next(line for line in urls if line.startswith("Repository, "))
    return url.partition("https://github.com/")[2]


def _project(folder: Path) -> dict[str, Any]:
    return tomllib.loads((folder / "pyproject.toml").read_text("utf-8"))["project"]


def _unsatisfied(folder: Path | None, extras: tuple[str, ...]) -> list[Requirement]:
    from packaging.requirements import Requirement

    if folder := folder or repository_folder():
        project = _project(folder)
        listed = list(project["dependencies"])
        for extra in extras:
            listed += project.get("optional-dependencies", {}).get(extra, [])
    else:
        listed = metadata.requires(DISTRIBUTION) or []
    found = []
    for wanted in map(Requirement, listed):
        marker, wanted.marker = wanted.marker, None
        if marker and not any(marker.evaluate({"extra": extra}) for extra in ("", *extras)):
            continue
        here = runtime.package_version(wanted.name)
        if here == runtime.NOT_INSTALLED or not wanted.specifier.contains(here, True):
            found.append(wanted)
    return found


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


# ── installing it ────────────────────────────────────────────────────────────────────────
def install_missing() -> None:
    """Install what `missing` names; says what it did, and nothing where nothing was."""
    for wanted in _unsatisfied(None, EXTRAS):
        if wanted.name in UNTOUCHED:
            here = runtime.package_version(wanted.name)
            print(f"Note: wanted is {wanted}, here it is {here}. It is left alone.")
    if not (lacking := missing()):
        return
    print("Installing", ", ".join(lacking), "…", flush=True)
    before = _versions()
    _pip_install(lacking, [f"{name}=={before[name]}" for name in UNTOUCHED if name in before])
    importlib.invalidate_caches()
    if still := missing():
        raise RuntimeError(
            f"pip ended well, and {', '.join(still)} is still missing here: it installs for "
            f"another Python than this kernel's, {sys.executable}. Restart the kernel; if that "
            "changes nothing, install by hand."
        )
    after, owners = _versions(), metadata.packages_distributions()
    loaded = {_normal(name) for top in owners if top in sys.modules for name in owners[top]}
    changed = {name for name in before if before[name] != after.get(name)}
    if replaced := sorted(changed & loaded):
        listing = ", ".join(f"{name} {before[name]} → {after.get(name)}" for name in replaced)
        raise RestartNeeded(
            f"Installed. This kernel had already loaded what was replaced: {listing}. "
            "Restart it once (Colab: Runtime > Restart session), then run from the top."
        )
    print("Ready. No restart is needed.")


def _versions() -> dict[str, str]:
    found = metadata.distributions()
    return {_normal(one.metadata["Name"]): one.version for one in found if one.metadata["Name"]}


def _pip_install(wanted: list[str], held: list[str]) -> None:
    """pip or uv, held to the versions of `held`; its output only when it fails."""
    with tempfile.TemporaryDirectory() as folder:
        constraints = Path(folder, "constraints.txt")
        constraints.write_text("\n".join([*held, ""]), "utf-8")
        command = [*_installer(), "--constraint", str(constraints), *wanted]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        last_words = "\n".join((done.stdout + done.stderr).strip().splitlines()[-8:])
        raise RuntimeError(
            f"pip could not install {', '.join(wanted)}: it "
            f"{_machine.how_it_ended(done.returncode)}. If the network was away, run this "
            f"cell again. pip says:\n{last_words}"
        )


def _installer() -> list[str]:
    uv = shutil.which("uv")
    if uv and not _downloads.has_pip():  # an environment that uv made
        return [uv, "pip", "install", "-q", "--python", sys.executable]
    return [*_downloads.pip(), "install", "-q", "--no-input", "--disable-pip-version-check"]
