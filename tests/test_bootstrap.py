"""The bootstrap cell: on this machine, in an emulated Colab, on an emulated pod."""

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import environments
import nbformat
import pytest

from helpers import notebooks, places, runtime

ROOT = notebooks.root()
TAKEN_ALONG = shutil.ignore_patterns(".git", ".venv", "outputs", "__pycache__", ".*_cache")


# ── at home: nothing ─────────────────────────────────────────────────────────────────────
def test_the_bootstrap_does_nothing_where_helpers_imports(tmp_path):
    code = notebooks.bootstrap() + "\nprint(os.getcwd(), sys.modules.keys() & {'torch'})"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"{tmp_path.resolve()} set()"
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_installed_where_all_is_there(capsys):
    assert places.missing() == []
    places.install_missing()
    assert capsys.readouterr().out == ""


def test_on_your_own_machine_nothing_is_installed_even_if_it_is_missing(monkeypatch):
    monkeypatch.setattr(runtime, "detect_platform", lambda: "local")
    monkeypatch.setattr(places, "install_missing", lambda: pytest.fail("at home!"))
    places.settle(brought=False)


# ── what is missing, and how it is said ──────────────────────────────────────────────────
def project(tmp_path, *requirements):
    path = tmp_path / "pyproject.toml"
    path.write_text(f"[project]\ndependencies = {json.dumps(requirements)}\n")
    return path


def test_missing_names_the_tested_version_and_never_the_untouched(tmp_path):
    pins = tmp_path / "requirements.txt"
    pins.write_text("# tested\nno-such-thing==3.1\ntqdm==999.5\nnumpy==1000.1\n")
    found = places.missing(
        project(
            tmp_path,
            "No_Such.Thing>=3",
            "not-pinned>=2",
            "tqdm>=999",
            "pytest>=8",
            "torch>=1000",
            "numpy>=1000",
            "pandas>=1000",
        ),
        pins,
    )
    assert found == ["no-such-thing==3.1", "not-pinned>=2", "tqdm==999.5"]


def pretend(monkeypatch, *, before, after, wanted=("probe==2",)):
    """`install_missing` with a pip that changes the versions of `before` into `after`."""
    versions = iter([before, after])
    calls = []
    monkeypatch.setattr(places, "missing", lambda: list(wanted))
    monkeypatch.setattr(places, "_versions", lambda: next(versions))
    monkeypatch.setattr(places, "_pip_install", lambda *given: calls.append(given))
    owners = {"tqdm": ["tqdm"], "probe": ["probe"]}
    monkeypatch.setattr(importlib.metadata, "packages_distributions", lambda: owners)
    return calls


def test_torch_numpy_and_pandas_are_held_at_what_is_there(monkeypatch, capsys):
    before = {"torch": "2.11.0+cu128", "numpy": "2.0.2", "probe": "1"}
    calls = pretend(monkeypatch, before=before, after={**before, "probe": "2"})
    places.install_missing()
    assert calls == [(["probe==2"], ["torch==2.11.0+cu128", "numpy==2.0.2"])]
    assert "probe==2" in (out := capsys.readouterr().out) and "No restart" in out


def test_a_restart_is_asked_for_when_a_loaded_package_was_replaced(monkeypatch):
    assert "tqdm" in sys.modules or __import__("tqdm")
    pretend(monkeypatch, before={"tqdm": "1", "probe": "1"}, after={"tqdm": "2"})
    with pytest.raises(places.RestartNeeded, match="tqdm 1 → 2") as error:
        places.install_missing()
    assert "probe" not in str(error.value), "that one was not loaded"


def test_a_pip_that_fails_is_quoted(monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    with pytest.raises(RuntimeError, match="run this cell again") as error:
        places._pip_install(["no-such-distribution-anywhere==1"], [])
    assert "no-such-distribution-anywhere" in str(error.value).split("pip says:")[1]


def test_an_old_python_is_refused_by_name(monkeypatch):
    monkeypatch.setattr(places, "OLDEST_PYTHON", (99, 1))
    with pytest.raises(RuntimeError, match=r"Python 99\.1 or newer"):
        places.install_missing()


def test_the_library_of_the_hub_loaded_too_early_is_said(monkeypatch, tmp_path):
    monkeypatch.setattr(runtime, "POD_VOLUME", tmp_path)
    monkeypatch.delenv("HF_HOME", raising=False)
    monkeypatch.setitem(sys.modules, "huggingface_hub", object())
    with pytest.raises(places.RestartNeeded, match="huggingface_hub"):
        places.use_volume()
    monkeypatch.setenv("HF_HOME", "mine")
    places.use_volume()
    assert os.environ["HF_HOME"] == "mine"


# ── in step ──────────────────────────────────────────────────────────────────────────────
@pytest.fixture
def course(tmp_path):
    """A copy of the course's files, to be changed."""
    shutil.copytree(ROOT, tmp_path / "course", ignore=TAKEN_ALONG)
    return tmp_path / "course"


def sync(course, *arguments):
    command = [sys.executable, "-m", "helpers", "sync", *arguments]
    return subprocess.run(command, cwd=course, capture_output=True, text=True)


def test_sync_changes_nothing_that_is_in_step(course):
    done = sync(course)
    assert done.stdout == "Everything is in step.\n", done.stdout + done.stderr


def test_sync_repairs_a_cell_and_a_badge_and_keeps_the_outputs(course):
    path = course / "Chapter2.ipynb"
    notebook = nbformat.read(path, as_version=4)
    outputs = [cell.get("outputs") for cell in notebook.cells]
    for cell in notebook.cells:
        if "bootstrap" in cell.metadata.get("tags", []):
            cell.source = "!pip install torch"
        elif cell.source.startswith("[![Open"):
            cell.source = "[![Open in Colab](old)](old)"
    nbformat.write(notebook, path)
    assert sync(course).stdout == "Changed: Chapter2.ipynb\n"
    assert path.read_bytes() == (ROOT / "Chapter2.ipynb").read_bytes()
    repaired = nbformat.read(path, as_version=4)
    assert [cell.get("outputs") for cell in repaired.cells] == outputs


def test_a_fork_takes_one_command_and_another_brings_it_back(course):
    done = sync(course, "--repository", "someone/else")
    assert done.returncode == 0, done.stderr
    for path in [
        *course.glob("*.md"),
        *course.glob("*.ipynb"),
        *course.glob("helpers/*.py"),
    ]:
        assert notebooks.REPOSITORY not in path.read_text(encoding="utf-8"), path.name
    assert "github.com/someone/else" in (course / "Chapter0.ipynb").read_text()
    assert (
        "/github/someone/else/blob/main/Chapter1.ipynb"
        in (course / "README.md").read_text()
    )
    assert sync(course).stdout == "Everything is in step.\n"
    sync(course, "--repository", notebooks.REPOSITORY)
    for name in ["README.md", "Chapter0.ipynb", "helpers/notebooks.py"]:
        assert (course / name).read_bytes() == (ROOT / name).read_bytes(), name


@pytest.mark.parametrize(
    "address", ["https://github.com/me/mine", "me", "me/mine/more", ""]
)
def test_an_address_of_another_form_is_refused(course, address):
    done = sync(course, "--repository", address)
    assert done.returncode == 1 and "'owner/name'" in done.stderr


# ── in an emulated Colab and on an emulated pod ──────────────────────────────────────────
WATCHED = ("torch", "numpy", "pandas", "transformers", "datasets", "trl", "ipywidgets")
EXPLORER = """\
import ipywidgets
from helpers import widgets

widgets.bit_explorer(0.1, "fp16")
everything = list(ipywidgets.Widget.widgets.values())
number = [widget for widget in everything if isinstance(widget, ipywidgets.Text)][-1]
picture = [widget for widget in everything if isinstance(widget, ipywidgets.HTML)][-1]
before = picture.value
number.value = "2"
print("moved:", before != picture.value, ipywidgets.__version__)
"""
# Runs in the other environment: the cells in its own kernel, like the site would.
RUN_CELLS = """\
import sys, nbformat
from nbclient import NotebookClient

notebook = nbformat.read(sys.argv[1], as_version=4)
try:
    NotebookClient(notebook, timeout=600, kernel_name="python3").execute()
finally:
    nbformat.write(notebook, sys.argv[2])
"""


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    """The working tree as a bare git repository."""
    folder = tmp_path_factory.mktemp("repository")
    tree = folder / "tree"
    shutil.copytree(ROOT, tree, ignore=TAKEN_ALONG)
    identity = ["-c", "user.name=a", "-c", "user.email=a@example.com"]
    for command in (["init", "-q"], ["add", "-A"], [*identity, "commit", "-q", "-m", "x"]):
        subprocess.run(["git", *command], cwd=tree, check=True)
    bare = folder / "course.git"
    subprocess.run(["git", "clone", "-q", "--bare", str(tree), str(bare)], check=True)
    return bare


@pytest.fixture(scope="module")
def colab(tmp_path_factory):
    """Colab's versions in a fresh environment, with a stub of its own package."""
    folder = tmp_path_factory.mktemp("colab") / "environment"
    torch = runtime.package_version("torch").split("+")[0]
    environments.make(folder, [f"torch=={torch}", *environments.COLAB])
    stub = next(folder.glob("lib/python*/site-packages")) / "google" / "colab"
    stub.mkdir(parents=True)
    (stub / "__init__.py").write_text("")
    return folder


def versions(python):
    """Version and fingerprint of the installed files of the watched distributions."""
    code = (
        "import hashlib, json, sys; from importlib.metadata import distribution\n"
        "def look(name):\n"
        "    try: found = distribution(name)\n"
        "    except Exception: return None\n"
        "    record = found.locate_file(found._path / 'RECORD')\n"
        "    return [found.version, record.stat().st_ino, record.stat().st_mtime_ns]\n"
        "print(json.dumps({name: look(name) for name in sys.argv[1:]}))"
    )
    done = subprocess.run([python, "-c", code, *WATCHED], capture_output=True, text=True)
    return json.loads(done.stdout)


def surroundings(repository, tmp_path, **more):
    """Environment variables: git brings our copy in place of the address on the net."""
    kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    return kept | {
        "GIT_CONFIG_COUNT": "1",
        "GIT_CONFIG_KEY_0": f"url.file://{repository}.insteadOf",
        "GIT_CONFIG_VALUE_0": f"https://github.com/{notebooks.REPOSITORY}",
        "HF_HUB_OFFLINE": "1",
        "JUPYTER_DATA_DIR": str(tmp_path / "jupyter"),
        **more,
    }


@pytest.mark.environments
def test_colab_gets_what_is_missing_and_the_next_cells_run(colab, repository, tmp_path):
    python = environments.twin(colab, tmp_path / "environment")
    before = versions(python)
    content = tmp_path / "content"
    content.mkdir()
    chapter = nbformat.read(ROOT / "Chapter0.ipynb", as_version=4)
    code = [cell for cell in chapter.cells if cell.cell_type == "code"][:7]
    chapter.cells = [*code, nbformat.v4.new_code_cell(EXPLORER)]
    nbformat.write(chapter, content / "Chapter0.ipynb")
    (tmp_path / "run.py").write_text(RUN_CELLS)
    done = subprocess.run(
        [python, str(tmp_path / "run.py"), "Chapter0.ipynb", "executed.ipynb"],
        cwd=content,
        capture_output=True,
        text=True,
        timeout=900,
        env=surroundings(repository, tmp_path, HELPERS_CACHE=str(runtime.cache_folder())),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    ran = nbformat.read(content / "executed.ipynb", as_version=4).cells
    said = text_of(ran[0])
    assert "trl==" in said and "bitsandbytes==" in said and "No restart is needed" in said
    assert "peft==" not in said and "accelerate==" not in said, "those were good enough"
    assert "colab" in text_of(ran[1])
    # In four bits; what is not quantized is in float32, or in bfloat16 where that is fast.
    assert re.search(r"takes +(166\.5|109\.8) MB", text_of(ran[2])), text_of(ran[2])
    assert "moved: True 7.7.1" in text_of(ran[-1])

    after = versions(python)
    for name in ("torch", "numpy", "pandas", "ipywidgets"):
        assert after[name] == before[name], f"{name} was touched"
    assert before["trl"] is None and after["trl"] is not None
    assert after["datasets"][0] != before["datasets"][0] == "4.0.0"


def text_of(cell):
    return "".join(
        output.get("text", "")
        + output.get("data", {}).get("text/plain", "")
        + output.get("data", {}).get("text/html", "")
        for output in cell.outputs
    )


POD = """
import json
import huggingface_hub.constants
from helpers import models, runtime

pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "cache", "dir"]
print(json.dumps([
    huggingface_hub.constants.HF_HOME,
    subprocess.check_output(pip, text=True).strip(),
    str(runtime.cache_folder()),
    str(models.embedded_folder()),
    os.getcwd(),
    runtime.detect_platform(),
]))
"""


@pytest.mark.environments
def test_on_a_pod_the_caches_land_on_the_volume(colab, repository, tmp_path):
    python = environments.twin(colab, tmp_path / "environment")
    volume = tmp_path / "volume"
    volume.mkdir()
    unset = ("HF_HOME", "HELPERS_CACHE", "PIP_CACHE_DIR", "XDG_CACHE_HOME")
    around = surroundings(
        repository, tmp_path, RUNPOD_POD_ID="pod", COURSE_VOLUME=str(volume)
    )
    around = {name: value for name, value in around.items() if name not in unset}
    around["HOME"] = str(tmp_path / "home")  # what a stop would wipe

    def run(code):
        return subprocess.run(
            [python, "-c", code],
            cwd=volume,
            capture_output=True,
            text=True,
            timeout=900,
            env=around,
        )

    early = run("import pyarrow\n" + notebooks.bootstrap())
    assert early.returncode != 0 and "RestartNeeded" in early.stderr, early.stderr
    assert "pyarrow 18.1.0 →" in early.stderr and "Restart it once" in early.stderr

    done = run(notebooks.bootstrap() + POD)
    assert done.returncode == 0, done.stderr
    *folders, platform = json.loads(done.stdout)
    assert platform == "runpod" and "Installing" not in done.stdout
    assert [Path(folder).relative_to(volume).parts[0] for folder in folders] == [
        *[".cache"] * 4,
        "fine-tuning-course",
    ]
    assert (Path(folders[3]) / "model.safetensors").stat().st_size > 500e6
    # (Whether pip put anything into its folder depends on where packages come from.)
    assert not list((tmp_path / "home").rglob("*.safetensors"))
    assert not (tmp_path / "home" / ".cache" / "pip").exists()
