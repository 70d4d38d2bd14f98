"""The wheel, installed where no repository is around it: what a reader imports at work."""

import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from helpers import runtime
from helpers.course import notebooks, places

pytestmark = pytest.mark.slow
ROOT = notebooks.root()
LEFT_BEHIND = shutil.ignore_patterns(
    ".*", "outputs", "__pycache__", "build", "*.egg-info", "tests", "*.ipynb"
)
IMPORT_ALL = """
import importlib, pkgutil, helpers
names = [found.name for found in pkgutil.walk_packages(helpers.__path__, "helpers.")]
names = [name for name in names if not any(part[0] == "_" for part in name.split("."))]
print(helpers.__file__, *filter(importlib.import_module, names))
"""
# Stands in front of everything: as if the packages of the extras were not installed.
WITHOUT = """
import importlib.metadata, sys
sys.modules.update(dict.fromkeys({modules!r}))
find = importlib.metadata.Distribution.from_name.__func__

def from_name(cls, name):
    if name.lower() in {packages!r}:
        raise importlib.metadata.PackageNotFoundError(name)
    return find(cls, name)

importlib.metadata.Distribution.from_name = classmethod(from_name)
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """What `pip install --target` makes of a wheel that was built from this tree."""
    folder = tmp_path_factory.mktemp("installed")
    shutil.copytree(ROOT, folder / "source", ignore=LEFT_BEHIND)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    build = ["wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(folder), "."]
    if runtime.package_version("setuptools").split(".")[0] < "77":
        build.remove("--no-build-isolation")
    subprocess.run([*pip, *build], cwd=folder / "source", check=True)
    (wheel,) = folder.glob("*.whl")
    install = ["install", "-q", "--no-deps", "--target", str(folder / "site"), str(wheel)]
    subprocess.run([*pip, *install], check=True)
    shutil.rmtree(folder / "source")
    return folder / "site"


@pytest.fixture(params=["with the extras", "without the extras"])
def command(request, site, tmp_path):
    """Runs a command in an empty folder, with `helpers` from the wheel."""
    paths = [str(site)]
    if request.param == "without the extras":
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
        extras = [extras["optional-dependencies"][name] for name in (*places.EXTRAS, "lab")]
        packages = {Requirement(text).name for texts in extras for text in texts}
        modules = packages - {"ipython", "protobuf"} | {"google.protobuf", "IPython"}
        text = WITHOUT.format(modules=modules, packages=packages)
        (tmp_path / "sitecustomize.py").write_text(text)
        paths.insert(0, str(tmp_path))
    (tmp_path / "empty").mkdir()
    around = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}

    def run(*arguments):
        return subprocess.run(
            arguments, cwd=tmp_path / "empty", env=around, capture_output=True, text=True
        )

    run.bare = request.param == "without the extras"
    return run


def test_every_public_module_imports(command, site):
    done = command(sys.executable, "-c", IMPORT_ALL)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.split()[0]).is_relative_to(site)
    for name in ("floats", "serving.gguf", "training.trainer", "course.exercises.chapter6"):
        assert f"helpers.{name}" in done.stdout.split()


def test_the_data_came_along(site):
    tracked = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "helpers"]
    for name in subprocess.check_output(tracked, cwd=ROOT, text=True).splitlines():
        if not name.endswith("ruff.toml") and (ROOT / name).exists():
            assert (site / name).is_file(), name


def test_the_commands_work_or_say_what_they_miss(command, site):
    program = site / "bin" / "fine-tuning-course"
    done = command(sys.executable, program, "doctor")
    assert done.returncode == 0, done.stdout + done.stderr
    assert ("[WARN]  packages      to run and serve, gguf" in done.stdout) == command.bare
    assert "[FAIL]" not in done.stdout
    done = command(sys.executable, program, "doctor", "CUDA out of memory")
    assert "python -m helpers plan" in done.stdout
    plan = ["--model", "SmolLM2-135M-Instruct", "--gpu", "T4"]
    done = command(sys.executable, program, "plan", *plan)
    assert done.returncode == 0 and "GiB" in done.stdout, done.stderr
    for arguments in (["run", "Chapter0"], ["lab"]):
        done = command(sys.executable, program, *arguments)
        assert done.returncode == 1 and done.stdout == ""
        assert done.stderr.strip().count("\n") == 0 and "git clone" in done.stderr


def test_the_data_can_be_read_and_a_model_made(command):
    code = (
        "from helpers import data, floats, memory\n"
        "from helpers.course import doctor, exercises\n"
        "print(len(data.load_yoda('test')), floats.encode(0.1, 'fp16').bits)\n"
        "print(len(memory.catalog()) > 5, doctor.explain('size mismatch for x').name)\n"
        "print(exercises.show('2.3').code[:0] or 'shown')"
    )
    done = command(sys.executable, "-c", code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[:2] == ["150", "0010111001100110"]
    assert done.stdout.split()[2:] == ["True", "adapter_other_base", "shown"]
