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
import runpy
import sys
import tempfile
from pathlib import Path

from helpers.course import places

CHAPTERS = (*(f"Chapter{number}" for number in range(7)), "AppendixB")
CELL_SECONDS = 1800
WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"

PICTURE = ".github/before-and-after.png"
MEASURED = r"(?s)(<!-- measured cards -->).*?(<!-- /measured cards -->)"

BADGE = (
    "[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]"
    "(https://colab.research.google.com/github/{repository}/blob/main/{name}.ipynb)"
)
BOOTSTRAP = """\
# Brings the course to Colab, Kaggle or a pod; takes one card of several.
import importlib.util
import os
import shutil
import subprocess
import sys

address = "https://github.com/{repository}"
folder, part = "fine-tuning-course", "fine-tuning-course.part"


def is_course(package):
    return os.path.isfile(os.path.join(package, "course", "places.py"))


if sys.version_info < (3, 11):
    here = sys.version.split()[0]
    raise RuntimeError(f"The course needs Python 3.11 or newer, not {here}.")

found = importlib.util.find_spec("helpers")
homes = found.submodule_search_locations if found else None
brought = not any(map(is_course, homes or []))
if brought and "helpers" in sys.modules:
    other = f"Another `helpers` is loaded ({found.origin})"
    raise RuntimeError(f"{other}: restart, and run this cell first.")

if brought:
    why = f"{folder} is something else here, rename it"
    if not os.path.isdir(folder):
        shutil.rmtree(part, ignore_errors=True)
        os.environ["GIT_TERMINAL_PROMPT"] = "0"  # a question would wait forever
        git = f"git clone -q --depth 1 {address} {part}"
        why = subprocess.getoutput(git) or "it holds something else"
        if is_course(f"{part}/helpers"):
            os.rename(part, folder)
        shutil.rmtree(part, ignore_errors=True)
    if not is_course(f"{folder}/helpers"):
        failed = f"{address} did not bring the course, nothing was run"
        raise RuntimeError(f"{failed}: {why}")
    os.chdir(folder)
    sys.path.insert(0, os.getcwd())

from helpers.course import places

places.settle(brought)
"""

# The course's address in a page, whoever's it was; other links to GitHub are left alone.
ADDRESSES = (
    r'(?m)(^Repository = "https://github\.com/)[\w.-]+/[\w.-]+(?="$)',
    r"(colab\.research\.google\.com/github/)[\w.-]+/[\w.-]+(?=/blob/main/)",
    r"(git clone [^\n]*https://github\.com/)[\w.-]+/[\w.-]+(?= fine-tuning-course\b)",
)


class NotebookError(RuntimeError):
    """The notebooks are not here, or one did not run to its end; the message says why."""


def root():
    """The folder of the course, where the notebooks lie; NotebookError where it is not."""
    folder = places.repository_folder()
    if folder is None:
        raise NotebookError(
            "This needs the course's repository, and `helpers` was installed without it: "
            f"git clone https://github.com/{address()} fine-tuning-course"
        )
    return folder


def address():
    """The course's 'owner/name' on GitHub, as [project.urls] of pyproject.toml has it."""
    return places.project_table()["urls"]["Repository"].removeprefix("https://github.com/")


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
    from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
    from tqdm.auto import tqdm

    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    bar = tqdm(total=len(code), desc=path.stem, unit="cell", disable=not progress)
    running = []

    def advance(cell, **_):
        bar.set_postfix_str(_first_line(cell))
        running.append(cell)

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
        source = "\n".join(f"    {line}" for line in running[-1].source.splitlines())
        why = f"failed.\n\n{source}\n\n{error.ename}: {error.evalue}"
    except DeadKernelError:
        why = (
            "did not end: the kernel died, most likely because memory ran out. Close other "
            "notebooks and programs, or take a machine with more, and run it again."
        )
    except CellTimeoutError:
        why = (
            f"ran for {CELL_SECONDS} seconds and was stopped: take a faster machine, or "
            "JupyterLab (`python -m helpers lab`), which knows no limit."
        )
    else:
        return
    number = next(n for n, cell in enumerate(code, 1) if cell is running[-1])
    raise NotebookError(f"{path.name}: code cell {number} of {len(code)} {why}")


def _first_line(cell):
    lines = [line for line in cell.source.splitlines() if line.strip()]
    return lines[0][:48] if lines else ""


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
            text = _shown(output)
            if output.output_type == "error" and "raises-exception" not in cell.metadata.get(
                "tags", []
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


def _shown(output):
    """What an output shows in letters; pictures are base64, which may spell anything."""
    parts = [output.get("text", ""), output.get("evalue", ""), *output.get("traceback", [])]
    for kind, value in output.get("data", {}).items():
        if kind == "image/svg+xml" or not kind.startswith("image/"):
            parts.append(value if isinstance(value, str) else json.dumps(value))
    return re.sub(r"data:image/[\w+.-]+;base64,[\w+/=]+", "", "\n".join(parts))


def _absolute_path(text):
    text = text.replace("\\\\", "\\")  # repr and JSON double them in Windows' paths
    homes = {str(root()), str(Path.home()), sys.prefix, tempfile.gettempdir()}
    ours = r"/(?:root|tmp|work|home|Users)/[\w./-]*"
    match = re.search(rf"{ours}|\b[A-Za-z]:\\Users\\[\w.\\-]*", text)
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
    return BADGE.format(repository=repository or address(), name=name)


def bootstrap(repository=None):
    """The source of the bootstrap cell, the same in every notebook."""
    return BOOTSTRAP.replace("{repository}", repository or address()).rstrip()


def sync(repository=None):
    """Put bootstrap cells, badges and addresses in step with pyproject.toml, everywhere.

    Covers the notebooks, the pages at the top, and README's figure, which is Chapter 0's.
    Stored outputs stay as they are. Nothing but Python is needed.
    repository: 'owner/name' of a fork, which goes into pyproject.toml too.
    Returns the names of the files that changed; raises ValueError for another form,
    NotebookError where `helpers` was installed without the repository.
    """
    if repository is not None and not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
        raise ValueError(f"repository must look like 'owner/name', not {repository!r}")
    target = repository or address()
    changed = []
    pages = [root() / "pyproject.toml", *sorted(root().glob("*.md"))]
    for path in [*pages, *map(find, written())]:
        before = path.read_text(encoding="utf-8")
        in_step = _notebook_in_step if path.suffix == ".ipynb" else _page_in_step
        if (text := in_step(before, target, path.stem)) != before:
            replace_file(path, text)
            changed.append(path.name)
    path, picture = root() / PICTURE, _picture()
    if not path.is_file() or path.read_bytes() != picture:
        path.parent.mkdir(exist_ok=True)
        replace_file(path, picture)
        changed.append(path.name)
    return changed


def write_measured_cards():
    """Put README's table of measured cards in step with the reports in tests/gpu/results.

    Returns [README's name], or [] when nothing changed.
    """
    folder, path = root() / "tests" / "gpu", root() / "README.md"
    table = runpy.run_path(str(folder / "measured.py"))["table"](folder / "results")
    before = path.read_text(encoding="utf-8")
    text = re.sub(MEASURED, lambda found: f"{found[1]}\n{table}\n{found[2]}", before)
    if text == before:
        return []
    replace_file(path, text)
    return [path.name]


def _picture():
    """README's figure: the last one stored in Chapter 0, base model beside fine-tuned."""
    cells = json.loads(find("Chapter0").read_text(encoding="utf-8"))["cells"]
    outputs = [output.get("data", {}) for c in cells for output in c.get("outputs", [])]
    return base64.b64decode([o["image/png"] for o in outputs if "image/png" in o][-1])


def _page_in_step(text, repository, _=None):
    for form in ADDRESSES:
        text = re.sub(form, rf"\g<1>{repository}", text)
    return text


def _notebook_in_step(text, repository, name):
    notebook, changed = json.loads(text), False
    for cell in notebook["cells"]:
        source = before = "".join(cell["source"])
        if "bootstrap" in cell["metadata"].get("tags", []):
            source = bootstrap(repository)
        elif before.startswith("[![Open in Colab"):
            source = badge(name, repository)
        elif cell["cell_type"] == "markdown":
            source = _page_in_step(before, repository)
        if source != before:
            cell["source"], changed = source.splitlines(keepends=True), True
    # As nbformat writes it, which only those have who work on notebooks.
    shape = {"indent": 1, "sort_keys": True, "ensure_ascii": False}
    return json.dumps(notebook, **shape) + "\n" if changed else text
