"""Run the course's notebooks with progress, and keep the stored ones clean (all chapters).

`python -m helpers run Chapter0` executes in a fresh kernel and writes the executed copy
under `outputs/`; `--write` also refreshes the stored notebook, refusing to store what a
reader would trip over: errors, stderr, progress-bar debris, absolute paths.
"""

import base64
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

# The one place that says where the course lives: `python -m helpers sync --repository`.
REPOSITORY = "hands-on-fine-tuning/course"
PICTURE = ".github/before-and-after.png"

BADGE = (
    "[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]"
    "(https://colab.research.google.com/github/{repository}/blob/main/{name}.ipynb)"
)
BOOTSTRAP = """\
# Brings the course to Colab or a pod; where it is at hand, there is nothing to do.
import importlib.util
import os
import subprocess
import sys

address = "https://github.com/{repository}"
brought = importlib.util.find_spec("helpers") is None
if brought:
    folder = os.path.abspath("fine-tuning-course")
    if not os.path.isdir(folder):
        clone = ["git", "clone", "-q", "--depth", "1", address, folder + ".part"]
        subprocess.run(clone, check=True)
        os.rename(folder + ".part", folder)
    os.chdir(folder)
    sys.path.insert(0, folder)

from helpers import places

places.settle(brought)
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

    # Indented as Jupyter does it.
    replace_file(path, nbformat.writes(notebook, version=4) + "\n")


def replace_file(path, content):
    """Write a text or bytes whole or not at all: to a temporary name, then renamed."""
    content = content.encode() if isinstance(content, str) else content
    handle, temporary = tempfile.mkstemp(prefix=path.name, dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


def badge(name, repository=None):
    """The 'Open in Colab' badge of a notebook, as Markdown."""
    return BADGE.format(repository=repository or REPOSITORY, name=name)


def bootstrap(repository=None):
    """The source of the bootstrap cell, the same in every notebook."""
    return BOOTSTRAP.replace("{repository}", repository or REPOSITORY).rstrip()


def sync(repository=None):
    """Put bootstrap cells, badges and links in step with this module, everywhere.

    Covers the notebooks and the pages at the top, and the README's figure, which is Chapter
    0's. Stored outputs stay as they are.
    repository: 'owner/name', to point them all (and this module) at a fork.
    Returns the names of the files that changed; raises ValueError for another form.
    """
    if repository is not None and not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
        raise ValueError(f"repository must look like 'owner/name', not {repository!r}")
    target = repository or REPOSITORY
    paths = [root() / "helpers" / "notebooks.py", *sorted(root().glob("*.md"))]
    texts = {path: path.read_text(encoding="utf-8") for path in paths}
    texts |= {path: path.read_text(encoding="utf-8") for path in map(find, written())}
    changed = []
    for path, before in texts.items():
        text = re.sub(rf"(github(?:\.com)?/){REPOSITORY}\b", rf"\g<1>{target}", before)
        if path.suffix == ".py":
            text = before.replace(f'= "{REPOSITORY}"\n', f'= "{target}"\n')
        if path.suffix == ".ipynb":
            text = _with_cells_in_step(text, path.stem, target)
        if text != before:
            replace_file(path, text)
            changed.append(path.name)
    path, picture = root() / PICTURE, _picture()
    if not path.is_file() or path.read_bytes() != picture:
        path.parent.mkdir(exist_ok=True)
        replace_file(path, picture)
        changed.append(path.name)
    return changed


def _picture():
    """README's figure: the last one stored in Chapter 0, base model beside fine-tuned."""
    import nbformat

    cells = nbformat.read(find("Chapter0"), as_version=4).cells
    outputs = [output.get("data", {}) for c in cells for output in c.get("outputs", [])]
    return base64.b64decode([o["image/png"] for o in outputs if "image/png" in o][-1])


def _with_cells_in_step(text, name, repository):
    import nbformat

    notebook = nbformat.reads(text, as_version=4)
    for cell in notebook.cells:
        if "bootstrap" in cell.metadata.get("tags", []):
            cell.source = bootstrap(repository)
        elif cell.source.startswith("[![Open in Colab]"):
            cell.source = badge(name, repository)
    return nbformat.writes(notebook, version=4) + "\n"
