"""Run the course's notebooks with progress, and keep the stored ones clean (all chapters).

`python -m helpers run Chapter0` executes in a fresh kernel and writes the executed copy
under `outputs/`; `--write` also refreshes the stored notebook, refusing to store what a
reader would trip over: errors, stderr, progress-bar debris, absolute paths.
"""

import contextlib
import json
import os
import re
import sys
import tempfile
from pathlib import Path

CHAPTERS = (*(f"Chapter{number}" for number in range(7)), "AppendixB")
CELL_SECONDS = 1800
WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"

# The one place that says where the course lives; a fork changes it here.
REPOSITORY = "hands-on-fine-tuning/course"

BADGE = (
    "[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]"
    "(https://colab.research.google.com/github/{repository}/blob/main/{name}.ipynb)"
)
BOOTSTRAP = """\
# Fetches the course where it is not at hand (Colab, a pod); does nothing elsewhere.
import importlib.util
import os
import subprocess
import sys

if importlib.util.find_spec("helpers") is None:
    address = "https://github.com/{repository}"
    folder = os.path.abspath("fine-tuning-course")
    if not os.path.isdir(folder):
        subprocess.run(["git", "clone", "-q", "--depth", "1", address, folder], check=True)
    os.chdir(folder)
    sys.path.insert(0, folder)
    from helpers import notebooks

    notebooks.install_missing()
"""


class NotebookError(RuntimeError):
    """A cell failed; the message says which one, shows its source and the error."""


def root():
    """The folder of the course: where the notebooks lie."""
    return Path(__file__).resolve().parent.parent


def find(name):
    """The path of a chapter's notebook; accepts 'Chapter0', 'chapter0.ipynb', '0', 'B'."""
    wanted = str(name).removesuffix(".ipynb").lower()
    for chapter in CHAPTERS:
        short = chapter.lower().removeprefix("chapter").removeprefix("appendix")
        path = root() / f"{chapter}.ipynb"
        if wanted in (chapter.lower(), short) and path.is_file():
            return path
    raise ValueError(f"name must be one of {', '.join(written())}, not {name!r}")


def written():
    """The names of the notebooks that exist, in the course's order."""
    return [chapter for chapter in CHAPTERS if (root() / f"{chapter}.ipynb").is_file()]


def output_folder(path):
    """`outputs/chapterN/` of a notebook, created when missing."""
    folder = root() / "outputs" / path.stem.lower()
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def run(name, *, write=False, progress=True):
    """Execute a notebook top to bottom in a fresh kernel; return the executed copy's path.

    name: as in `find`. write: also store the outputs in the notebook itself.
    Raises NotebookError when a cell fails, ValueError for an unknown name or, with
    `write`, for outputs that must not be stored.
    """
    import nbformat

    path = find(name)
    folder = output_folder(path)
    notebook = nbformat.read(path, as_version=4)
    executed = folder / path.name
    try:
        _execute(notebook, path, progress)
    finally:
        clean(notebook)
        _write(notebook, executed)
    if write:
        if problems := complaints(notebook):
            listing = "\n".join(f"  {problem}" for problem in problems)
            raise ValueError(f"{path.name} is not fit to be stored:\n{listing}")
        _write(notebook, path)
    return executed


def _execute(notebook, path, progress):
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError
    from tqdm.auto import tqdm

    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    bar = tqdm(total=len(code), desc=path.stem, unit="cell", disable=not progress)

    def advance(cell, **_):
        bar.set_postfix_str(_first_line(cell))

    def done(cell, **_):
        bar.update(1)

    client = NotebookClient(
        notebook,
        timeout=CELL_SECONDS,
        kernel_name="python3",
        resources={"metadata": {"path": str(path.parent)}},
        store_widget_state=False,
        on_cell_execute=advance,
        on_cell_executed=done,
    )
    try:
        with bar:
            client.execute()
    except CellExecutionError as error:
        raise NotebookError(_explain(notebook, path, error)) from None


def _first_line(cell):
    lines = [line for line in cell.source.splitlines() if line.strip()]
    return lines[0][:48] if lines else ""


def _explain(notebook, path, error):
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    failed = next(
        (number, cell)
        for number, cell in enumerate(code, 1)
        if any(output.output_type == "error" for output in cell.get("outputs", []))
        and "raises-exception" not in cell.metadata.get("tags", [])
    )
    number, cell = failed
    source = "\n".join(f"    {line}" for line in cell.source.splitlines())
    return (
        f"{path.name}: code cell {number} of {len(code)} failed.\n\n{source}\n\n"
        f"{error.ename}: {error.evalue}"
    )


def clean(notebook):
    """Remove what only a live session needs: times, widget views, kernel details.

    The still picture of an explorer stays; consecutive stream outputs become one.
    """
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    for cell in notebook.cells:
        tags = cell.metadata.get("tags")
        cell.metadata = {"tags": tags} if tags else {}
        if cell.cell_type != "code":
            continue
        cell.outputs = _merge_streams(cell.outputs)
        for output in cell.outputs:
            if "data" in output:
                output.data.pop(WIDGET_VIEW, None)
                output.metadata = {}


def _merge_streams(outputs):
    merged = []
    for output in outputs:
        previous = merged[-1] if merged else None
        if (
            previous is not None
            and output.output_type == previous.output_type == "stream"
            and output.name == previous.name
        ):
            previous.text += output.text
        else:
            merged.append(output)
    return merged


def complaints(notebook):
    """What a reader of the stored notebook would trip over, one line each."""
    found = []
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    for number, cell in enumerate(code, 1):
        if cell.source.strip() and cell.execution_count is None:
            found.append(f"code cell {number} has not been run")
        for output in cell.outputs:
            text = json.dumps(output)
            if (
                output.output_type == "error"
                and "raises-exception" not in cell.metadata.get("tags", [])
            ):
                found.append(f"code cell {number} ends in {output.ename}: {output.evalue}")
            if output.get("name") == "stderr":
                found.append(f"code cell {number} wrote to stderr: {output.text[:300]!r}")
            if path := _absolute_path(text):
                found.append(f"code cell {number} shows an absolute path: {path}")
            if "it/s]" in text or "\u2588" in text:
                found.append(f"code cell {number} shows progress-bar debris")
    if (size := len(json.dumps(notebook))) > 1_000_000:
        found.append(f"the notebook has {size / 1e6:.1f} MB; the limit is 1 MB")
    return found


def _absolute_path(text):
    homes = {str(root()), str(Path.home()), sys.prefix, tempfile.gettempdir()}
    match = re.search(r"/(root|tmp|work|home|Users)/[\w./-]*", text)
    if match:
        return match.group()
    return next((home for home in homes if len(home) > 3 and home in text), None)


def _write(notebook, path):
    import nbformat

    # Indented like Jupyter does; to a temporary name first, so nothing is half-written.
    text = nbformat.writes(notebook, version=4)
    handle, temporary = tempfile.mkstemp(prefix=path.name, dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text + "\n")
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


def install_missing():
    """Install what the course needs and this environment lacks or has too old.

    Reads the lower bounds of pyproject.toml. torch, numpy and pandas are never touched:
    replacing them under a running kernel forces a restart and breaks hosted notebooks.
    """
    import subprocess
    import tomllib
    from importlib.metadata import PackageNotFoundError, version

    from packaging.requirements import Requirement

    project = tomllib.loads((root() / "pyproject.toml").read_text(encoding="utf-8"))
    missing = []
    for text in project["project"]["dependencies"]:
        requirement = Requirement(text)
        if requirement.name in ("torch", "numpy", "pandas"):
            continue
        try:
            satisfied = requirement.specifier.contains(
                version(requirement.name), prereleases=True
            )
        except PackageNotFoundError:
            satisfied = False
        if not satisfied:
            missing.append(text)
    if missing:
        print("Installing:", ", ".join(missing))
        subprocess.run([sys.executable, "-m", "pip", "install", "-q", *missing], check=True)


def badge(name):
    """The 'Open in Colab' badge of a notebook, as Markdown."""
    return BADGE.format(repository=REPOSITORY, name=name)


def bootstrap():
    """The source of the bootstrap cell, the same in every notebook."""
    return BOOTSTRAP.replace("{repository}", REPOSITORY).rstrip()
