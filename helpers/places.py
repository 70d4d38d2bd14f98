"""Colab, a pod, a laptop: make the place that a notebook runs in ready (all chapters).

The bootstrap cell calls `settle` first of all, so this module needs nothing but Python and
what every kernel has.
"""

import contextlib
import importlib
import importlib.metadata
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from helpers import runtime

UNTOUCHED = ("torch", "numpy", "pandas")  # replacing them breaks a hosted notebook
OLDEST_PYTHON = (3, 11)


class RestartNeeded(RuntimeError):
    """A package was replaced that this kernel had already loaded."""


def settle(brought=False):
    """What the bootstrap cell does last; on your own machine, nothing.

    In Colab and on a pod, or where the cell has just `brought` the course: caches go to the
    pod's volume, and what is missing or too old is installed; torch, numpy and pandas are
    left as they are. Raises RestartNeeded when a package was replaced under this kernel,
    RuntimeError when pip fails or Python is too old.
    """
    platform = runtime.detect_platform()
    if platform == "runpod":
        use_volume()
    if brought or platform != "local":
        install_missing()


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
    requirements.txt, whose tested version is what gets installed. torch, numpy and pandas
    never appear.
    """
    found = []
    tested = _pins(pins or _root() / "requirements.txt")
    for requirement in _requirements(project or _root() / "pyproject.toml"):
        if requirement.name not in UNTOUCHED and not _satisfied(requirement):
            found.append(tested.get(_normal(requirement.name), str(requirement)))
    return found


def tested_versions():
    """The versions of requirements.txt, by name: what the course was run with."""
    return dict(pin.split("==") for pin in _pins(_root() / "requirements.txt").values())


def install_missing():
    """Install what `missing` names; says what it did, and nothing where nothing was."""
    if sys.version_info < OLDEST_PYTHON:
        raise RuntimeError(
            f"The course needs Python {'.'.join(map(str, OLDEST_PYTHON))} or newer; this "
            f"kernel runs {sys.version.split()[0]}. On a pod, choose a newer template."
        )
    for requirement in _requirements(_root() / "pyproject.toml"):
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


def _root():
    return Path(__file__).resolve().parent.parent


def _requirements(path):
    import tomllib

    from packaging.requirements import Requirement

    project = tomllib.loads(path.read_text(encoding="utf-8"))
    return [Requirement(text) for text in project["project"]["dependencies"]]


def _pins(path):
    lines = re.findall(r"^([\w.-]+)==(\S+)", path.read_text(encoding="utf-8"), re.MULTILINE)
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
    """pip, held to the constraints; its output only when it fails."""
    handle, path = tempfile.mkstemp(prefix="constraints", suffix=".txt")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write("\n".join(constraints) + "\n")
        command = [sys.executable, "-m", "pip", "install", "-q", "--no-input"]
        command += ["--disable-pip-version-check", "--constraint", path, *wanted]
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
