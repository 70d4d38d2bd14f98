"""The notebooks: stored clean, run as readers run them, and what trips readers is refused."""

import json
import os
import subprocess
import sys

import house
import nbformat
import pytest

from helpers.__main__ import main
from helpers.course import notebooks

ROOT = notebooks.root()
WRITTEN = notebooks.written()


def make(tmp_path, monkeypatch, *sources, tags=None):
    """A small course of one notebook in a temporary folder."""
    cells = [nbformat.v4.new_code_cell(source) for source in sources]
    for index, cell in enumerate(cells):
        cell.metadata["tags"] = (tags or {}).get(index, [])
    notebook = nbformat.v4.new_notebook(cells=cells)
    nbformat.write(notebook, tmp_path / "Chapter0.ipynb")
    monkeypatch.setattr(notebooks, "root", lambda: tmp_path)
    return tmp_path / "Chapter0.ipynb"


# ── the stored notebooks ─────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("name", WRITTEN)
def test_stored_notebooks_are_clean(name):
    notebook = nbformat.read(ROOT / f"{name}.ipynb", as_version=4)
    nbformat.validate(notebook)
    assert house.complaints(notebook) == []
    assert "widgets" not in notebook.metadata
    counts = [c.execution_count for c in notebook.cells if c.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1)), "one clean top-to-bottom run"


@pytest.mark.parametrize("name", WRITTEN)
def test_every_notebook_has_the_badge_and_the_same_bootstrap(name):
    notebook = nbformat.read(ROOT / f"{name}.ipynb", as_version=4)
    sources = [cell.source for cell in notebook.cells]
    assert house.badge(name) in sources
    tagged = [
        cell.source for cell in notebook.cells if "bootstrap" in cell.metadata.get("tags", [])
    ]
    assert tagged == [house.bootstrap()]


# ── running ──────────────────────────────────────────────────────────────────────────────
def test_a_run_leaves_an_executed_copy_and_the_original(tmp_path, monkeypatch):
    path = make(tmp_path, monkeypatch, "print(6 * 7)", "1 / 3")
    before = path.read_bytes()
    executed = notebooks.run("0", progress=False)
    assert executed == tmp_path / "outputs" / "chapter0" / "Chapter0.ipynb"
    outputs = nbformat.read(executed, as_version=4).cells
    assert outputs[0].outputs[0].text == "42\n"
    assert path.read_bytes() == before
    house.store("chapter0.ipynb")
    assert "42" in path.read_text()


def test_a_failing_cell_is_named_with_its_source(tmp_path, monkeypatch):
    make(tmp_path, monkeypatch, "x = 1", "undefined_name + x")
    with pytest.raises(notebooks.NotebookError) as error:
        house.store("Chapter0")
    message = str(error.value)
    assert "code cell 2 of 2" in message
    assert "undefined_name + x" in message and "NameError" in message


@pytest.mark.parametrize(
    "source", ["import os; os.kill(os.getpid(), 9)", "import time; time.sleep(99)"]
)
def test_a_killed_kernel_and_an_endless_cell_are_one_sentence(
    tmp_path, monkeypatch, capsys, source
):
    make(tmp_path, monkeypatch, "", "print('before')", source)
    monkeypatch.setattr(notebooks, "CELL_SECONDS", 2)
    assert main(["run", "Chapter0"]) == 1
    err = capsys.readouterr().err
    said = err.strip().splitlines()[-1]
    assert said.startswith("Chapter0.ipynb: code cell 3 of 3 ") and "Traceback" not in err
    assert ("memory ran out" in said) == ("kill" in source)
    assert ("ran for 2 seconds and was stopped" in said) == ("sleep" in source)
    executed = nbformat.read(tmp_path / "outputs/chapter0/Chapter0.ipynb", as_version=4)
    assert executed.cells[1].outputs[0].text == "before\n", "what had run is kept"


def test_a_cell_may_fail_on_purpose(tmp_path, monkeypatch):
    path = make(tmp_path, monkeypatch, "raise ValueError('see?')", tags={0: ["raises-exception"]})
    house.store("Chapter0")
    assert nbformat.read(path, as_version=4).cells[0].outputs[0].evalue == "see?"


@pytest.mark.parametrize(
    ("source", "complaint"),
    [
        ("import sys; print('careful', file=sys.stderr)", "stderr"),
        ("import os; print(os.path.expanduser('~/x'), '/home/me/x')", "absolute path"),
        ("print('10%|\u2588\u2588 1.2it/s]')", "debris"),
        ("print('10%|\u2588\u2588  |')", "debris"),
        (r"print(r'C:\Users\me\x.txt')", "absolute path"),
        (r"print(repr(r'D:\Users\me'))", "absolute path"),
        (
            r"from IPython.display import JSON; JSON({'in': r'C:\Users\me'})",
            "absolute path",
        ),
        (
            "from matplotlib.figure import Figure; from IPython.display import Image; import io\n"
            "Figure((1, 1)).savefig(png := io.BytesIO()); Image(png.getvalue())",
            "a figure without a text alternative",
        ),
        ("from IPython.display import SVG; SVG('<svg><!--/home/me/x--></svg>')", "path"),
        ("x = 1\n" * 26, "26 lines; the limit is 25"),
    ],
)
def test_what_trips_readers_is_not_stored(tmp_path, monkeypatch, source, complaint):
    path = make(tmp_path, monkeypatch, source)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=complaint):
        house.store("Chapter0")
    assert path.read_bytes() == before


def test_pictures_are_not_searched_for_words():
    picture = {"image/png": "iVBOR/home/it/s]", "text/plain": "<Figure>"}
    inline = {"text/html": "<img src='data:image/png;base64,iVBOR/home/w+A=='>"}
    told = {"image/png": {"alt": "A curve that falls from 3 to 1."}}
    outputs = [
        nbformat.v4.new_output("display_data", picture, metadata=told),
        nbformat.v4.new_output("display_data", inline),
    ]
    cell = nbformat.v4.new_code_cell("1", outputs=outputs, execution_count=1)
    assert house.complaints(nbformat.v4.new_notebook(cells=[cell])) == []


def test_cleaning_keeps_the_still_picture_of_an_explorer(tmp_path, monkeypatch):
    source = (
        "from helpers import plots; from helpers.course import widgets\n"
        "def draw(power):\n"
        "    fig, ax = plots.figure(width=2, height=1)\n"
        "    ax.plot([x**power for x in range(5)])\n"
        "    return fig\n"
        "widgets.explore(draw, power=(1, 3, 1, 2))"
    )
    path = make(tmp_path, monkeypatch, source)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    house.store("0")
    notebook = nbformat.read(path, as_version=4)
    data = notebook.cells[0].outputs[0].data
    assert "image/png" in data and data["text/plain"].startswith("Curves.")
    assert notebook.cells[0].outputs[0].metadata["image/png"]["alt"] == data["text/plain"]
    assert house.WIDGET_VIEW not in data
    assert "widgets" not in notebook.metadata


def test_unknown_chapters_list_the_written_ones():
    with pytest.raises(ValueError, match="Chapter0"):
        notebooks.find("Chapter99")
    assert notebooks.find("b" if "AppendixB" in WRITTEN else "0").is_file()


def test_storing_is_all_or_nothing(tmp_path, monkeypatch):
    path = make(tmp_path, monkeypatch, "1")
    before, replace = path.read_bytes(), os.replace

    def full(source, target):
        if target == path:
            raise OSError("full")
        replace(source, target)

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="full"):
        house.store("Chapter0")
    assert path.read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["Chapter0.ipynb", "outputs"]


def test_without_nbclient_a_sentence_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "nbclient", None)
    assert main(["run", "Chapter0"]) == 1
    assert "pip install 'fine-tuning-helpers[notebook]'" in capsys.readouterr().err


def test_the_command_line_reports_a_failure(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "helpers", "run", "Chapter99"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "name must be one of" in done.stderr and "Traceback" not in done.stderr


# ── every chapter, top to bottom ─────────────────────────────────────────────────────────
def run_offline(name):
    """Run a chapter as a reader would, without a network where that is allowed."""
    command = [sys.executable, "-m", "helpers", "run", name]
    if cut_off := network_cut():
        command = [*cut_off, *command]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=2400)


def network_cut():
    """A command prefix with loopback and nothing else, or [] where that is not allowed."""
    prefix = ["unshare", "-n", "sh", "-c", 'ip link set lo up && exec "$@"', "sh"]
    try:
        works = subprocess.run([*prefix, "true"], capture_output=True).returncode == 0
    except FileNotFoundError:
        works = False
    return prefix if works else []


def test_a_short_chapter0_runs_and_its_model_has_begun_to_learn(tmp_path, monkeypatch):
    """Twelve steps of two rows, twelve questions; the rest is as readers run it."""
    source = (ROOT / "Chapter0.ipynb").read_text(encoding="utf-8")
    for old, new in {
        "everything.select(range(1200))": "everything.select(range(24))",
        r"test = data.load_yoda(\"test\")": r"test = data.load_yoda(\"test\").select(range(12))",
        r"per_device_train_batch_size\": 4": r"per_device_train_batch_size\": 2",
        r"warmup_steps\": 10": r"warmup_steps\": 1",
        r"logging_steps\": 20": r"logging_steps\": 10",
        "prompt, max_new_tokens=40": "prompt, max_new_tokens=8",
        "validation.select(range(16))": "validation.select(range(1))",
        "(model, tokenizer, prompts)": "(model, tokenizer, prompts, max_new_tokens=9)",
        "test.select(range(8))": "test.select(range(1))",
    }.items():
        assert source.count(old) == 1, f"Chapter 0 has changed: {old}"
        source = source.replace(old, new)
    (tmp_path / "Chapter0.ipynb").write_text(source, encoding="utf-8")
    monkeypatch.setattr(notebooks, "root", lambda: tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebooks.run("Chapter0", progress=False)
    scores = json.loads((tmp_path / "outputs/chapter0/scores.json").read_text())
    assert (tmp_path / "outputs/chapter0/adapter/adapter_model.safetensors").is_file()
    assert scores["fine-tuned"]["chrF"] > scores["base"]["chrF"] + 20
    assert scores["fine-tuned"]["valid order (%)"] > scores["base"]["valid order (%)"]


@pytest.mark.chapter0
def test_chapter0_runs_top_to_bottom_and_its_model_has_learned():
    done = run_offline("Chapter0")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "The adapter lies in outputs/chapter0/adapter" in done.stdout
    scores = json.loads((ROOT / "outputs/chapter0/scores.json").read_text())
    # Floors under what the runs of helpers/yoda/runs.csv gave.
    assert scores["fine-tuned"]["exact match (%)"] >= 84
    assert scores["fine-tuned"]["valid order (%)"] >= 90
    assert scores["fine-tuned"]["chrF"] >= 96
    assert scores["base"]["exact match (%)"] < 10
    assert complaints_of("Chapter0") == []


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in WRITTEN if name != "Chapter0"])
def test_chapters_run_top_to_bottom(name):
    done = run_offline(name)
    assert done.returncode == 0, done.stdout + done.stderr
    assert complaints_of(name) == []


def complaints_of(name):
    executed = nbformat.read(ROOT / "outputs" / name.lower() / f"{name}.ipynb", as_version=4)
    house.clean(executed)
    return house.complaints(executed)
