"""Colab, Kaggle, a pod, a laptop: make the place a notebook runs in ready (all chapters).

The bootstrap cell calls `settle` first of all, so this module needs nothing but Python and
what every kernel has.
"""

import contextlib
import importlib
import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from helpers import _downloads as downloads
from helpers import runtime

DISTRIBUTION = "fine-tuning-helpers"
CARDS = "CUDA_VISIBLE_DEVICES"
_brought = False  # the cell, run again after a failure, finds `helpers` and says False
UNTOUCHED = ("torch", "numpy", "pandas")  # replacing them breaks a hosted notebook
OLDEST_PYTHON = (3, 11)


class RestartNeeded(RuntimeError):
    """This kernel had already loaded something that was replaced or set only now."""


def settle(brought=False):
    """What the bootstrap cell does last; on your own machine it installs nothing.

    Everywhere: of several cards, this kernel gets one. In Colab, on Kaggle and on a pod, or
    where the cell has just `brought` the course: caches go to the pod's volume, and what is
    missing or too old is installed; torch, numpy and pandas are left as they are. Raises
    RestartNeeded when it comes too late in this kernel, RuntimeError when pip fails and
    OSError where there is no pip.
    """
    global _brought
    _brought = brought = brought or _brought
    use_one_card()
    platform = runtime.detect_platform()
    if platform == "runpod":
        use_volume()
    if brought or platform != "local":
        install_missing()


def use_one_card():
    """Let this kernel see the first card where the machine has several.

    TRL's trainers would spread a model that lies on one card over all of them, and refuse.
    A CUDA_VISIBLE_DEVICES of your own is kept. Raises RestartNeeded when torch has already
    opened them all.
    """
    if CARDS in os.environ or (number := _cards()) < 2:
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


def _cards():
    """How many cards the driver sees; asking it leaves torch and CUDA asleep."""
    if not (program := shutil.which("nvidia-smi")):
        return 0
    try:
        done = subprocess.run([program, "-L"], capture_output=True, text=True, timeout=30)
    except subprocess.TimeoutExpired:
        return 0
    return len(re.findall(r"^GPU \d", done.stdout, re.MULTILINE))


def use_volume():
    """Let the caches of the Hub and of pip lie on a pod's volume, which survives a stop.

    Variables that are already set are kept. Raises RestartNeeded when the Hub's library
    was imported before: it reads its variable only once.
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


def missing(project=None, pins=None):
    """The requirements that this environment lacks or has too old, as pip wants them.

    project: path of pyproject.toml, whose lower bounds decide. pins: path of
    requirements.txt, whose tested version is what gets installed. Default: the
    repository's, or without one the bounds that pip noted when it installed `helpers`.
    torch, numpy and pandas never appear.
    """
    found = []
    tested = _pins(pins)
    for requirement in _requirements(project):
        if requirement.name not in UNTOUCHED and not _satisfied(requirement):
            found.append(tested.get(_normal(requirement.name), str(requirement)))
    return found


def tested_versions():
    """The versions of requirements.txt, by name; {} where there is no repository."""
    return dict(pin.split("==") for pin in _pins().values())


def install_missing():
    """Install what `missing` names; says what it did, and nothing where nothing was."""
    for requirement in _requirements():
        if requirement.name in UNTOUCHED and not _satisfied(requirement):
            here = runtime.package_version(requirement.name)
            print(f"Note: wanted is {requirement}, here it is {here}. It is left alone.")
    wanted = missing()
    if not wanted:
        return
    print("Installing", ", ".join(wanted), "…", flush=True)
    before = _versions()
    kept = [f"{name}=={before[name]}" for name in UNTOUCHED if name in before]
    _pip_install(wanted, kept)
    importlib.invalidate_caches()
    after = _versions()
    replaced = {name for name in before if before[name] != after.get(name)}
    if in_use := sorted(replaced & _loaded()):
        listing = ", ".join(f"{name} {before[name]} → {after.get(name)}" for name in in_use)
        raise RestartNeeded(
            f"Installed. This kernel had already loaded what was replaced: {listing}. "
            "Restart it once (Colab: Runtime > Restart session), then run from the top."
        )
    print("Ready. No restart is needed.")


def repository_folder():
    """The course's repository around `helpers`; None where pip installed it alone."""
    folder = Path(__file__).resolve().parents[2]
    project = folder / "pyproject.toml"
    ours = project.is_file() and f'name = "{DISTRIBUTION}"' in project.read_text("utf-8")
    return folder if ours else None


def project_table(path=None):
    """[project] of pyproject.toml, as far as the course asks: dependencies and urls.

    path: of the file. Default: the repository's, or without one what pip noted.
    """
    import tomllib

    if path is None and (folder := repository_folder()):
        path = folder / "pyproject.toml"
    if path is not None:
        return tomllib.loads(path.read_text(encoding="utf-8"))["project"]
    noted = importlib.metadata.metadata(DISTRIBUTION)
    urls = [line.partition(", ") for line in noted.get_all("Project-URL", [])]
    return {
        "dependencies": noted.get_all("Requires-Dist", []),
        "urls": {name: url for name, _, url in urls},
    }


def _requirements(path=None):
    from packaging.requirements import Requirement

    found = [Requirement(text) for text in project_table(path)["dependencies"]]
    return [one for one in found if not one.marker or one.marker.evaluate({"extra": ""})]


def _pins(path=None):
    if path is None and (folder := repository_folder()):
        path = folder / "requirements.txt"
    text = path.read_text(encoding="utf-8") if path else ""
    lines = re.findall(r"^([\w.-]+)==(\S+)", text, re.MULTILINE)
    return {_normal(name): f"{name}=={version}" for name, version in lines}


def _normal(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def _satisfied(requirement):
    version = runtime.package_version(requirement.name)
    if version == runtime.NOT_INSTALLED:
        return False
    return requirement.specifier.contains(version, prereleases=True)


def _versions():
    return {
        _normal(found.metadata["Name"]): found.version
        for found in importlib.metadata.distributions()
        if found.metadata["Name"]
    }


def _loaded():
    """The distributions of which this process has imported a module."""
    owners = importlib.metadata.packages_distributions()
    return {_normal(name) for top in owners if top in sys.modules for name in owners[top]}


def _pip_install(wanted, constraints):
    """pip or uv, held to the constraints; its output only when it fails."""
    handle, path = tempfile.mkstemp(prefix="constraints", suffix=".txt")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write("\n".join(constraints) + "\n")
        command = [*_installer(), "--constraint", path, *wanted]
        done = subprocess.run(command, capture_output=True, text=True)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
    if done.returncode != 0:
        last_words = "\n".join((done.stdout + done.stderr).strip().splitlines()[-8:])
        raise RuntimeError(
            f"pip could not install {', '.join(wanted)}. If the network was away, run this "
            f"cell again. pip says:\n{last_words}"
        )


def _installer():
    uv = shutil.which("uv")
    if uv and not importlib.util.find_spec("pip"):  # an environment that uv made
        return [uv, "pip", "install", "-q", "--python", sys.executable]
    return [*downloads.pip(), "install", "-q", "--no-input", "--disable-pip-version-check"]
