"""Other environments than ours: pyproject's lower bounds, and what Colab brings along.

    python tests/environments.py                          lower bounds, then the fast tests
    python tests/environments.py --torch 2.13.0           with another torch
    python tests/environments.py -- tests/test_lora.py    other arguments for pytest

Takes some 20 minutes on two cores. The environment is left in outputs/lowest/.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tomllib
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# What Colab's image has (FACTS of June 2026), of what PyPI still serves; torch is the build
# of this machine.
COLAB = (
    "transformers==5.9.0",
    "peft==0.19.1",
    "accelerate==1.13.0",
    "datasets==4.0.0",
    "numpy==2.0.2",
    "pandas==2.2.2",
    "ipywidgets==7.7.1",
    "ipykernel==6.17.1",
    "ipython==7.34.0",
    "matplotlib==3.10.0",
    "nbclient==0.10.2",
    "pyarrow==18.1.0",
    "protobuf==5.29.5",
    "sentencepiece==0.2.1",
    "psutil==5.9.5",
)


def make(folder, requirements):
    """A fresh virtual environment with these requirements; returns its Python."""
    venv.create(folder, clear=True, with_pip=True)
    python = python_of(folder)
    command = [python, "-m", "pip", "install", "-q", "--no-compile", *requirements]
    subprocess.run(command, check=True)
    return python


def python_of(folder):
    """The interpreter of an environment."""
    return str(folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python"))


def twin(folder, new):
    """A copy that costs no space: hard links. pip replaces files, it never edits them."""
    shutil.copytree(folder, new, symlinks=True, copy_function=os.link)
    return python_of(new)


def lower_bounds(torch=None):
    """What pyproject asks for to run the course and its tests, each at its oldest version."""
    tables = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    extras, groups = tables["project"]["optional-dependencies"], tables["dependency-groups"]
    wanted = [*tables["project"]["dependencies"], *extras["notebook"], *extras["serve"]]
    wanted += [*extras["lab"], *groups["test"]]
    pins = dict(requirement.split(">=") for requirement in wanted)
    pins["torch"] = torch or pins["torch"]
    return [f"{name}=={version}" for name, version in pins.items()]


def main():
    """Make the environment of lower bounds and run pytest in it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--torch", help="this version instead of the lower bound")
    parser.add_argument("pytest", nargs="*", help="arguments for pytest")
    options = parser.parse_args()
    pins = lower_bounds(options.torch)
    print("Installing", *pins)
    python = make(ROOT / "outputs" / "lowest", pins)
    return subprocess.call([python, "-m", "pytest", *options.pytest], cwd=ROOT)


if __name__ == "__main__":
    sys.exit(main())
