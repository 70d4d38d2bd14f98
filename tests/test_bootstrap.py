"""The bootstrap cell: at home, among namesakes, in an emulated Colab and on a pod."""

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import types
import venv
from pathlib import Path

import environments
import house
import nbformat
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from helpers import runtime
from helpers.course import notebooks, places

ROOT = notebooks.root()
TAKEN_ALONG = shutil.ignore_patterns(".git", ".venv", "outputs", "__pycache__", ".*_cache")


# ── at home: nothing ─────────────────────────────────────────────────────────────────────
def test_the_bootstrap_does_nothing_where_helpers_imports(tmp_path):
    code = house.bootstrap() + "\nprint(os.getcwd(), sys.modules.keys() & {'torch'})"
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
    monkeypatch.setenv(places.CARDS, "0")
    monkeypatch.setattr(runtime, "detect_platform", lambda: "local")
    monkeypatch.setattr(places, "install_missing", lambda: pytest.fail("at home!"))
    places.settle(brought=False)


def test_the_cell_run_again_after_a_failure_installs_what_was_not(monkeypatch):
    """The second time it finds `helpers`, which the first time brought."""
    monkeypatch.setenv(places.CARDS, "0")
    monkeypatch.setattr(places, "_brought", False)
    monkeypatch.setattr(runtime, "detect_platform", lambda: "local")  # another host
    calls = []

    def no_network_the_first_time():
        calls.append(1)
        if len(calls) == 1:
            raise RuntimeError("pip could not install trl")

    monkeypatch.setattr(places, "install_missing", no_network_the_first_time)
    with pytest.raises(RuntimeError, match="could not install"):
        places.settle(brought=True)
    places.settle(brought=False)
    assert len(calls) == 2


# ── what is missing, and how it is said ──────────────────────────────────────────────────
def test_missing_names_the_tested_version_and_never_the_untouched(tmp_path):
    wanted = ["No_Such.Thing>=3", "not-pinned>=2", "tqdm>=999", "pytest>=8", "torch>=1000"]
    wanted += ["numpy>=1000", "pandas>=1000", "elsewhere>=1; sys_platform == 'other'"]
    extras = "notebook = ['no-lab>=1']\nflash = ['no-flash>=1']"
    (tmp_path / "pyproject.toml").write_text(
        f"[project]\ndependencies = {json.dumps(wanted)}\n"
        f"[project.optional-dependencies]\n{extras}\n"
    )
    (tmp_path / "requirements.txt").write_text(
        "# tested\nno-such-thing==3.1\ntqdm==999.5\nnumpy==1000.1\n"
    )
    core = ["no-such-thing==3.1", "not-pinned>=2", "tqdm==999.5"]
    assert places.missing(tmp_path, extras=()) == core
    assert places.missing(tmp_path) == [*core, "no-lab>=1"], "flash-attn is nobody's need"


def test_what_the_tests_pin_covers_all_that_the_course_needs():
    """Else a hosted notebook would get a version that nobody has tried."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    wanted = list(project["dependencies"])
    for extra in places.EXTRAS:
        wanted += project["optional-dependencies"][extra]
    for requirement in map(Requirement, wanted):
        tested = places.tested_versions()[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(tested), requirement


def pretend(monkeypatch, *, before, after, wanted=("probe==2",)):
    """`install_missing` with a pip that changes the versions of `before` into `after`."""
    versions = iter([before, after])
    calls = []
    monkeypatch.setattr(places, "missing", lambda: [] if calls else list(wanted))
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


@pytest.mark.parametrize("uv", [True, False])
def test_without_pip_uv_or_pythons_own_copy_installs(tmp_path, monkeypatch, uv):
    venv.create(tmp_path / "bare", with_pip=False, symlinks=os.name != "nt")
    python = environments.python_of(tmp_path / "bare")
    script = "#!/bin/sh\necho uv was asked: $@ >&2\nexit 1"
    given = executable(tmp_path / "programs", "uv", script).parent if uv else tmp_path
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    done = subprocess.run(
        [
            python,
            "-c",
            "from helpers.course import places; places._pip_install(['no-such==1'], [])",
        ],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PATH": str(given)},
    )
    assert "could not install no-such==1" in done.stderr, done.stderr
    if uv:
        assert f"uv was asked: pip install -q --python {python}" in done.stderr
    else:
        assert "No matching distribution found for no-such==1" in done.stderr


def executable(folder, name, script):
    """A program of our own, to be put on PATH."""
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(script)
    (folder / name).chmod(0o755)
    return folder / name


def test_the_library_of_the_hub_loaded_too_early_is_said(monkeypatch, tmp_path):
    monkeypatch.setattr(runtime, "POD_VOLUME", tmp_path)
    monkeypatch.delenv("HF_HOME", raising=False)
    monkeypatch.setitem(sys.modules, "huggingface_hub", object())
    with pytest.raises(places.RestartNeeded, match="huggingface_hub"):
        places.use_volume()
    monkeypatch.setenv("HF_HOME", "mine")
    places.use_volume()
    assert os.environ["HF_HOME"] == "mine"


# ── several cards ────────────────────────────────────────────────────────────────────────
@pytest.fixture
def cards(tmp_path, monkeypatch):
    """A machine with as many cards as told; torch is not imported, nothing is chosen."""
    monkeypatch.setenv(places.CARDS, "")  # so that what the test leaves is taken back
    monkeypatch.delenv(places.CARDS)
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    monkeypatch.setattr(runtime, "detect_platform", lambda: "local")

    def have(number):
        lines = [f"GPU {n}: Tesla T4 (UUID: GPU-{n})" for n in range(number)]
        script = "#!/bin/sh\n" + "".join(f"echo '{line}'\n" for line in lines)
        executable(tmp_path / "programs", "nvidia-smi", script)
        monkeypatch.setenv("PATH", f"{tmp_path / 'programs'}{os.pathsep}{os.defpath}")

    return have


def test_of_two_cards_the_first_is_taken_and_said_in_a_line(cards, capsys):
    cards(2)
    places.settle()
    assert os.environ[places.CARDS] == "0"
    out = capsys.readouterr().out
    assert out.startswith("2 cards here") and out.count("\n") == 1
    places.settle()
    assert capsys.readouterr().out == "", "said once"


@pytest.mark.parametrize("number", [0, 1])
def test_with_one_card_or_none_nothing_is_chosen(cards, capsys, number):
    cards(number)
    places.settle()
    assert places.CARDS not in os.environ and capsys.readouterr().out == ""


def test_without_a_driver_nothing_is_chosen(cards, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    places.settle()
    assert places.CARDS not in os.environ


@pytest.mark.parametrize("own", ["1", "0,1", ""])
def test_a_choice_of_your_own_is_kept(cards, monkeypatch, own):
    cards(2)
    monkeypatch.setenv(places.CARDS, own)
    places.settle()
    assert os.environ[places.CARDS] == own


class Cuda:
    """torch.cuda, as it counts: by the variable until it has begun, then what it opened."""

    def __init__(self, opened):
        self.opened, self.begun = opened, False

    def is_available(self):
        return True

    def init(self):
        self.begun = True

    def device_count(self):
        return self.opened if self.begun else 1


def test_cards_that_torch_has_opened_ask_for_a_restart_every_time(cards, monkeypatch):
    cards(2)
    monkeypatch.setitem(sys.modules, "torch", types.SimpleNamespace(cuda=Cuda(opened=2)))
    for _ in range(2):
        with pytest.raises(places.RestartNeeded, match=r"opened 2 cards.*restart"):
            places.settle()
    monkeypatch.setitem(sys.modules, "torch", types.SimpleNamespace(cuda=Cuda(opened=1)))
    places.settle()
    assert os.environ[places.CARDS] == "0", "torch was imported, and had opened none yet"


# ── installed with pip, the repository is not around ─────────────────────────────────────
@pytest.fixture
def installed(tmp_path):
    """What pip makes of the repository: `helpers` and what the project says of itself."""
    site = tmp_path / "site"
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "helpers", site / "helpers", ignore=ignored)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    lines = ["Metadata-Version: 2.4", f"Name: {project['name']}", "Version: 0.1.0"]
    lines += [f"Project-URL: {name}, {url}" for name, url in project["urls"].items()]
    lines += [f"Requires-Dist: {text}" for text in project["dependencies"]]
    lines += [f'Requires-Dist: no-such-{name}>=1; extra == "{name}"' for name in ("flash", "serve")]
    info = site / "fine_tuning_helpers-0.1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("\n".join([*lines, ""]))

    def run(*command):
        around = {**os.environ, "PYTHONPATH": str(site)}
        command = [sys.executable, *command]
        done = subprocess.run(command, cwd=tmp_path, env=around, capture_output=True, text=True)
        assert sorted(p.name for p in site.iterdir()) == [info.name, "helpers"]
        return done

    return run


def test_installed_it_knows_its_bounds_and_its_address(installed):
    code = (
        "from helpers.course import places\n"
        "print(places.repository_folder(), places.missing(extras=()), places.missing())\n"
        "print(places.tested_versions(), places.address())"
    )
    done = installed("-c", code)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"None [] ['no-such-serve>=1']\n{{}} {places.address()}\n"


@pytest.mark.parametrize("command", [["run", "Chapter0"], ["run", "all"], ["lab"]])
def test_installed_the_commands_say_what_they_lack(installed, command):
    done = installed("-m", "helpers", *command)
    assert done.returncode == 1 and done.stdout == ""
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert f"git clone https://github.com/{places.address()}" in done.stderr


# ── in step ──────────────────────────────────────────────────────────────────────────────
@pytest.fixture
def course(tmp_path):
    """A copy of the course's files, to be changed."""
    shutil.copytree(ROOT, tmp_path / "course", ignore=TAKEN_ALONG)
    return tmp_path / "course"


def sync(course, *arguments):
    command = [sys.executable, "tests/house.py", "sync", *arguments]
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


ADDRESS = re.compile(
    r"colab\.research\.google\.com/github/([\w.-]+/[\w.-]+)/blob"
    r"|https://github\.com/([\w.-]+/[\w.-]+)(?: fine-tuning-course|\\?\")"
)


def addresses(course):
    """Every file that says where the course lives, with what it says."""
    paths = [course / "pyproject.toml", *course.glob("*.md"), *course.glob("*.ipynb")]
    found = {p.name: ADDRESS.findall(p.read_text(encoding="utf-8")) for p in paths}
    return {name: {a or b for a, b in pairs} for name, pairs in found.items() if pairs}


def test_a_fork_takes_one_command_and_another_brings_it_back(course):
    here = addresses(ROOT)
    assert len(here) > len(notebooks.written()) + 2
    assert all(found == {places.address()} for found in here.values()), here
    before = {name: (course / name).read_bytes() for name in here}
    done = sync(course, "--repository", "someone/el.se-2")
    assert done.returncode == 0, done.stderr
    assert addresses(course) == {name: {"someone/el.se-2"} for name in here}
    assert sync(course).stdout == "Everything is in step.\n"
    sync(course, "--repository", places.address())
    assert before == {name: (course / name).read_bytes() for name in here}


def test_a_fork_changes_neither_the_library_nor_links_to_others(course):
    page = "[The book](https://github.com/dvgodoy/FineTuningLLMs) is its author's."
    (course / "Elsewhere.md").write_text(page)
    sync(course, "--repository", "someone/else")
    assert (course / "Elsewhere.md").read_text() == page
    for path in course.rglob("helpers/**/*.py"):
        assert path.read_bytes() == (ROOT / path.relative_to(course)).read_bytes()


def test_the_address_stands_in_one_place():
    for path in [*ROOT.rglob("helpers/**/*.py"), *ROOT.rglob(".github/**/*.yml")]:
        text = path.read_text(encoding="utf-8")
        assert places.address() not in text and "hands-on-fine-tuning" not in text, path


def test_a_forks_first_push_puts_its_address_in(course, tmp_path):
    """The workflow's own commands, in a fresh clone, with nothing but Python and git."""
    flow = yaml.safe_load((course / ".github/workflows/address.yml").read_text())
    assert flow["permissions"] == {"contents": "read"}
    assert set(flow[True]) == {"push", "workflow_dispatch"}, "never for a pull request"
    commands = [step["run"] for step in flow["jobs"]["address"]["steps"] if "run" in step]
    fork = bare_repository(course, tmp_path)
    script = f"#!/bin/sh\nexec '{sys.executable}' -S \"$@\"\n"  # no installed packages
    programs = executable(tmp_path / "programs", "python", script).parent
    around = {
        **os.environ,
        "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
        "GITHUB_REPOSITORY": "someone/else",
    }
    around.pop("PYTHONPATH", None)
    messages = []
    for number in range(2):
        clone = tmp_path / f"clone{number}"
        subprocess.run(["git", "clone", "-q", str(fork), str(clone)], check=True)
        for command in commands:
            command = ["bash", "-e", "-c", command]
            done = subprocess.run(command, cwd=clone, env=around, capture_output=True, text=True)
            assert done.returncode == 0, done.stdout + done.stderr
        log = ["git", "-C", str(fork), "log", "--format=%s"]
        messages.append(subprocess.check_output(log, text=True).splitlines())
    assert messages == [["The course lives at someone/else", "x"]] * 2, "one commit, once"
    subprocess.run(["git", "-C", str(clone), "diff", "--exit-code"], check=True)
    assert all(found == {"someone/else"} for found in addresses(clone).values())

    # Later a notebook arrives from upstream, with upstream's address.
    shutil.copy(ROOT / "Chapter6.ipynb", clone / "Chapter6.ipynb")
    for command in (["commit", "-qam", "from upstream"], ["push", "-q"]):
        author = ["-c", "user.name=x", "-c", "user.email=x@example.com"]
        subprocess.run(["git", "-C", str(clone), *author, *command], check=True)
    for command in commands:
        command = ["bash", "-e", "-c", command]
        subprocess.run(command, cwd=clone, env=around, check=True, capture_output=True)
    assert subprocess.check_output(log, text=True).startswith("The course lives at")
    assert all(found == {"someone/else"} for found in addresses(clone).values())


@pytest.mark.parametrize("address", ["https://github.com/me/mine", "me", "me/mine/more", ""])
def test_an_address_of_another_form_is_refused(course, address):
    done = sync(course, "--repository", address)
    assert done.returncode == 1 and "'owner/name'" in done.stderr


def bare_repository(tree, folder):
    """A folder's files as a bare git repository."""
    identity = ["-c", "user.name=a", "-c", "user.email=a@example.com"]
    for command in (["init", "-q"], ["add", "-A"], [*identity, "commit", "-q", "-m", "x"]):
        subprocess.run(["git", *command], cwd=tree, check=True)
    bare = folder / f"{tree.name}.git"
    subprocess.run(["git", "clone", "-q", "--bare", str(tree), str(bare)], check=True)
    return bare


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    """The working tree as a bare git repository."""
    folder = tmp_path_factory.mktemp("repository")
    shutil.copytree(ROOT, folder / "course", ignore=TAKEN_ALONG)
    return bare_repository(folder / "course", folder)


def surroundings(repository, tmp_path, **more):
    """Environment variables: git brings our copy in place of the address on the net."""
    kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    return kept | {
        "GIT_CONFIG_COUNT": "1",
        "GIT_CONFIG_KEY_0": f"url.file://{repository}.insteadOf",
        "GIT_CONFIG_VALUE_0": f"https://github.com/{places.address()}",
        "HF_HUB_OFFLINE": "1",
        "JUPYTER_DATA_DIR": str(tmp_path / "jupyter"),
        **more,
    }


# ── among namesakes, and where nothing comes ─────────────────────────────────────────────
@pytest.fixture
def cell(repository, tmp_path):
    """Runs the bootstrap cell in an empty folder as `.at`, with code before and after."""
    folder = tmp_path / "content"
    folder.mkdir()

    def run(before="", after="", *, source=repository, **more):
        code = f"{before}\n{house.bootstrap()}\n{after}"
        return subprocess.run(
            [sys.executable, "-c", code],
            cwd=folder,
            capture_output=True,
            text=True,
            env=surroundings(source, tmp_path, **more),
        )

    run.at = folder
    return run


def sentence(done):
    """What a cell that stopped says below its traceback: all that a reader needs."""
    assert done.returncode == 1 and done.stdout == "", done.stdout
    _, error, text = done.stderr.rpartition("RuntimeError: ")
    return error + text.strip()


WHERE = "import helpers; print(helpers.__file__)"


@pytest.mark.parametrize("name", ["helpers.py", "helpers/__init__.py", "helpers/other.py"])
def test_a_namesake_is_not_taken_for_the_course(cell, name):
    path = cell.at / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"from pathlib import Path\nPath({str(cell.at)!r}, 'was-run').touch()")
    done = cell(after=WHERE)
    assert done.returncode == 0, done.stderr
    ours = cell.at / "fine-tuning-course" / "helpers" / "__init__.py"
    assert Path(done.stdout.strip().splitlines()[-1]).samefile(ours)
    assert not (cell.at / "was-run").exists()
    again = cell("import helpers")
    assert re.match(r"RuntimeError: Another `helpers` .*: restart", sentence(again))


@pytest.mark.parametrize("name", ["helper_functions.py", "helpers.py", "helpers/__init__.py"])
def test_a_repository_without_the_course_is_never_run(cell, repository, tmp_path, name):
    tree = tmp_path / "other"
    (tree / name).parent.mkdir(parents=True)
    (tree / name).write_text(f"from pathlib import Path\nPath({str(tmp_path)!r}, 'run').touch()")
    (tree / "Chapter0.ipynb").write_text("{}")
    said = sentence(cell(source=bare_repository(tree, tmp_path)))
    address = f"https://github.com/{places.address()}"
    assert said == f"RuntimeError: No course from {address}: other files"
    assert not (tmp_path / "run").exists() and list(cell.at.iterdir()) == []
    assert cell(source=repository).returncode == 0, "and then it is simply run again"


def test_a_clone_that_fails_is_said_and_leaves_nothing(cell, tmp_path):
    said = sentence(cell(source=tmp_path / "nowhere.git"))
    assert f"No course from https://github.com/{places.address()}" in said
    assert "nowhere.git" in said and list(cell.at.iterdir()) == []
    assert cell().returncode == 0


@pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="asks Linux who its parent is")
def test_a_clone_that_is_interrupted_leaves_nothing_that_is_taken_for_the_course(cell, tmp_path):
    """A git that has brought part of the files when the kernel is killed."""
    half = "mkdir -p $6/helpers/course && touch $6/helpers/course/places.py"
    kernel = "$(cut -d' ' -f4 /proc/$PPID/stat)"  # the parent of git's shell
    git = executable(tmp_path / "bin", "git", f"#!/bin/sh\n{half}\nkill -9 {kernel}\n")
    done = cell(PATH=f"{git.parent}{os.pathsep}{os.environ['PATH']}")
    assert done.returncode == -9
    assert not (cell.at / "fine-tuning-course").exists()
    assert cell().returncode == 0, "what lies about does not disturb the next try"


def test_a_missing_git_is_said(cell, tmp_path):
    said = sentence(cell(PATH=str(executable(tmp_path / "bin", "x", "").parent)))
    assert f"No course from https://github.com/{places.address()}" in said
    assert "git: not found" in said or "git: command not found" in said


def test_a_folder_of_that_name_is_not_overwritten(cell):
    (cell.at / "fine-tuning-course").mkdir()
    (cell.at / "fine-tuning-course" / "mine").touch()
    assert "rename fine-tuning-course, which holds something else" in sentence(cell())
    assert (cell.at / "fine-tuning-course" / "mine").exists()


def test_an_old_python_is_refused_before_anything_else(cell):
    done = cell("import sys\nsys.version_info = (3, 10, 12)", PATH="/nowhere")
    bound = ".".join(map(str, places.OLDEST_PYTHON))
    assert done.stderr.strip().endswith(f"The course needs Python {bound} or newer")
    assert done.returncode == 1 and list(cell.at.iterdir()) == []
    assert f'requires-python = ">={bound}"' in (ROOT / "pyproject.toml").read_text("utf-8")


def test_the_cell_fits_a_narrow_page_and_a_screen():
    lines = house.bootstrap().splitlines()
    assert len(lines) <= 25 and all(len(line) <= 80 for line in lines)


# ── in an emulated Colab and on an emulated pod ──────────────────────────────────────────
WATCHED = ("torch", "numpy", "pandas", "transformers", "datasets", "trl", "ipywidgets")
EXPLORER = """\
import ipywidgets
from helpers.course import widgets

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


@pytest.mark.environments
def test_colab_gets_what_is_missing_and_the_next_cells_run(colab, repository, tmp_path):
    python = environments.twin(colab, tmp_path / "environment")
    before = versions(python)
    content = tmp_path / "content"
    content.mkdir()
    chapter = nbformat.read(ROOT / "Chapter0.ipynb", as_version=4)
    code = [cell for cell in chapter.cells if cell.cell_type == "code"][:9]
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
    assert re.search(r"takes +(166\.5|109\.8) MB", text_of(ran[3])), text_of(ran[3])
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
    around = surroundings(repository, tmp_path, RUNPOD_POD_ID="pod", COURSE_VOLUME=str(volume))
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

    early = run("import pyarrow\n" + house.bootstrap())
    assert early.returncode != 0 and "RestartNeeded" in early.stderr, early.stderr
    assert "pyarrow 18.1.0 →" in early.stderr and "Restart it once" in early.stderr

    done = run(house.bootstrap() + POD)
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
