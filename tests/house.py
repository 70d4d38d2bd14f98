"""Keep the course's pages in step with its code, and the stored notebooks clean.

    python tests/house.py sync                             badges, bootstrap cells, tables
    python tests/house.py sync --repository you/yours      the same, for a fork
    python tests/house.py store Chapter0 Chapter1          run and store with the outputs

`sync` needs nothing but Python. `store` refuses what a reader would trip over: errors,
stderr, progress-bar debris, absolute paths.
"""

import argparse
import base64
import json
import re
import runpy
import sys
import tempfile
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from helpers import _files  # noqa: E402
from helpers.course import doctor, notebooks, places  # noqa: E402

LONGEST = 25  # lines of a cell: more do not fit on a screen
WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"
PAGE = "Troubleshooting.md"
BOOK_PAGE = "BOOK.md"
PICTURE = ".github/before-and-after.png"
BADGE = (
    "[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]"
    "(https://colab.research.google.com/github/{repository}/blob/main/{name}.ipynb)"
)
BOOTSTRAP = """\
# Brings the course to Colab, Kaggle or a pod; takes one card of several.
import importlib.util
import os
import sys
from tempfile import TemporaryDirectory

assert sys.version_info >= (3, 11), "The course needs Python 3.11 or newer"
url = "https://github.com/{repository}"
places, folder = "course/places.py", "fine-tuning-course"
origin = getattr(importlib.util.find_spec("helpers"), "origin", 0) or "./"
if brought := not os.path.isfile(f"{os.path.dirname(origin)}/{places}"):
    if "helpers" in sys.modules:
        raise RuntimeError(f"Another `helpers` ({origin}) is loaded: restart")
    why = f"rename {folder}, which holds something else"
    if not os.path.isdir(folder):
        os.environ["GIT_TERMINAL_PROMPT"] = "0"  # or it may wait forever
        with TemporaryDirectory(dir=".") as at:
            why = os.popen(f"git clone -q --depth 1 {url} {at}/c 2>&1").read()
            if os.path.isfile(f"{at}/c/helpers/{places}"):
                os.rename(f"{at}/c", folder)
    if not os.path.isfile(f"{folder}/helpers/{places}"):
        raise RuntimeError(f"No course from {url}: {why or 'other files'}")
    os.chdir(folder)
    sys.path.insert(0, os.getcwd())
importlib.import_module("helpers.course.places").settle(brought)
"""

# The course's address in a page, whoever's it was; other links to GitHub are left alone.
ADDRESSES = (
    r'(?m)(^Repository = "https://github\.com/)[\w.-]+/[\w.-]+(?="$)',
    r"(colab\.research\.google\.com/github/)[\w.-]+/[\w.-]+(?=/blob/main/)",
    r"(git clone [^\n]*https://github\.com/)[\w.-]+/[\w.-]+(?= fine-tuning-course\b)",
)


# ── in step ──────────────────────────────────────────────────────────────────────────────
def sync(repository=None):
    """Put badges, bootstrap cells and addresses, Troubleshooting.md, BOOK.md with the notebooks'
    tables of the book's calls, README's figure and its table of cards, and the log of tests/field
    in step; returns the names of the files that changed.

    Stored outputs stay as they are. repository: 'owner/name' of a fork, which goes into
    pyproject.toml too; ValueError for another form.
    """
    if repository is not None and not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
        raise ValueError(f"repository must look like 'owner/name', not {repository!r}")
    target = repository or places.address()
    root, new = notebooks.root(), {}
    for path in (root / "pyproject.toml", *sorted(root.glob("*.md"))):
        new[path] = _with_address(path.read_text("utf-8"), target)
    for path in map(notebooks.find, notebooks.written()):
        new[path] = _notebook_in_step(path.read_text("utf-8"), target, path.stem)
    new[root / PAGE] = troubleshooting()
    new[root / BOOK_PAGE] = book_page()
    readme, log = root / "README.md", root / "tests" / "field" / "README.md"
    new[readme] = _filled(new[readme], "measured cards", _cards(root))
    new[log] = _filled(log.read_text("utf-8"), "field log", _field(root))
    new[root / PICTURE] = _picture()
    changed = []
    for path, content in new.items():
        content = content.encode() if isinstance(content, str) else content
        if not path.is_file() or path.read_bytes() != content:
            _files.write_whole(path, content)
            changed.append(path.name)
    return changed


def badge(name, repository=None):
    """The 'Open in Colab' badge of a notebook, as Markdown."""
    return BADGE.format(repository=repository or places.address(), name=name)


def bootstrap(repository=None):
    """The source of the bootstrap cell, the same in every notebook."""
    return BOOTSTRAP.replace("{repository}", repository or places.address()).rstrip()


def _with_address(text, repository):
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
            source = _with_address(before, repository)
            source = _filled(source, CALLS, book_calls(name)) if CALLS in source else source
        if source != before:
            cell["source"], changed = source.splitlines(keepends=True), True
    # As nbformat writes it, which only those have who work on notebooks.
    shape = {"indent": 1, "sort_keys": True, "ensure_ascii": False}
    return json.dumps(notebook, **shape) + "\n" if changed else text


def _picture():
    """README's figure: the bars stored in Chapter 0, base model beside fine-tuned."""
    cells = json.loads(notebooks.find("Chapter0").read_text("utf-8"))["cells"]
    outputs = [output.get("data", {}) for c in cells for output in c.get("outputs", [])]
    told = "held-out sentences"  # in its title, and so in what is read aloud
    bars = [o for o in outputs if "image/png" in o and told in "".join(o["text/plain"])]
    return base64.b64decode(bars[-1]["image/png"])


def _filled(text, name, content):
    """The page with what stands between `<!-- name -->` and `<!-- /name -->` renewed."""
    place = rf"(?s)(<!-- {name} -->).*?(<!-- /{name} -->)"
    return re.sub(place, lambda old: f"{old[1]}\n{content}\n{old[2]}", text)


def _field(root):
    """The log of tests/field: thread, input, test."""
    return runpy.run_path(str(root / "tests" / "field" / "field_log.py"))["table"]()


def _cards(root):
    """README's table of measured cards, from the reports in tests/gpu/results."""
    folder = root / "tests" / "gpu"
    return runpy.run_path(str(folder / "measured.py"))["table"](folder / "results")


def troubleshooting():
    """The text of Troubleshooting.md, from helpers/course/symptoms.toml."""
    kinds = [symptom.origin for symptom in doctor.SYMPTOMS.values() if symptom.error]
    parts = [
        "# Troubleshooting",
        "What goes wrong in fine-tuning, why, and what helps. In a notebook, "
        "`from helpers.course import doctor` and `doctor.explain()` after an error looks it up "
        'here; so does `doctor.explain("the model never stops")`. '
        "`python -m helpers doctor` checks the machine.",
        f"Of the {len(doctor.SYMPTOMS)} entries, {kinds.count('library')} are errors that the "
        "libraries, Python or the system really raise in this course's tests (some pretend a "
        "second card or a broken installation; the error they get is the library's own); "
        f"{kinds.count('course')} more are messages of the course itself. Those marked ° could "
        "not be raised on a machine without a GPU or the Hub. This page is written by "
        "`python tests/house.py sync` from `helpers/course/symptoms.toml`.",
    ]
    for title, symptoms in doctor.SECTIONS.items():
        parts.append(f"## {title}")
        for symptom in symptoms:
            mark = " °" if symptom.origin == "read" else ""
            parts.append(
                f"**{symptom.title[0].upper()}{symptom.title[1:]}**{mark}  \n"
                f"Cause: {symptom.cause}  \nCure: {symptom.cure}{_link(symptom.proof)}"
            )
    return "\n\n".join(parts) + "\n"


def _link(proof):
    if proof is None or proof[0] not in notebooks.written():
        return ""
    name, heading = proof
    return f"  \nShown in [{name}]({name}.ipynb), “{heading}”."


# ── the book ─────────────────────────────────────────────────────────────────────────────
CALLS = "the book's calls"
WORDS = {
    "fails": "fails",
    "warns": "warns",
    "silent": "**silently differs**",
    "moved": "moved",
    "same": "works",
}
ORDER = tuple(WORDS)


def read_book():
    """What helpers/course/book.toml says, whose head explains the fields."""
    text = Path(doctor.__file__).with_name("book.toml").read_text("utf-8")
    return tomllib.loads(text)


def chapters(book):
    """(name, entry) of each chapter, in the book's order."""
    return [(name, entry) for name, entry in book.items() if isinstance(entry, dict)]


def book_calls(name):
    """The last table of a notebook: the book's calls and today's."""
    entry = read_book()[name]
    at = f"{BOOK_PAGE}#{_anchor(entry['title'])}"
    told = (
        f"[The page for readers of the book]({at}) has the rest of this chapter: where each "
        "heading went, the printed numbers, errata, and what still works."
    )
    return f"\n{_call_table(entry['calls'])}\n\n{told}\n"  # Markdown's empty lines


def book_page():
    """The text of BOOK.md, from helpers/course/book.toml."""
    book = read_book()
    parts = [
        "# For readers of the printed book",
        "You have *A Hands-On Guide to Fine-Tuning LLMs with PyTorch and Hugging Face* on the "
        "desk, and its code is from 2024. For each of its chapters this page says where to find "
        "a heading here, what each call is called today, which printed numbers you will see "
        "again, and what still works. Look for the chapter, then for the heading or the call "
        "you are at. If you have a notebook of that time, let the course read it: "
        "`python -m helpers check THEIR.ipynb` names what fails in it, what warns and what "
        "silently means something else, cell by cell, without running it.",
        "The code of the book is that of its public repository; the printed text was not at "
        "hand. “Today” means the versions in `requirements.txt`, among them transformers 5 and "
        "trl 1. This page and the last table of each notebook are written by "
        "`python tests/house.py sync` from `helpers/course/book.toml`.",
        " · ".join(_jump(entry["title"]) for _, entry in chapters(book))
        + " · "
        + " · ".join(map(_jump, [OWN_FUNCTIONS, *(part["title"] for part in book["parts"])])),
    ]
    for name, entry in chapters(book):
        parts += _book_chapter(name, entry)
    rows = [(row["then"], row["today"] or "–", row["note"]) for row in book["helpers"]]
    parts += [f"## {OWN_FUNCTIONS}", _table(("the book's (chapter)", "ours", "what differs"), rows)]
    for part in book["parts"]:
        parts += [f"## {part['title']}", part["text"].strip()]
        if "rows" in part:
            head = ("Table", "run", "printed, MB", "today, MB (predicted)")
            cells = [
                (r["table"], r["run"], f"{r['printed']:,}", f"{r['today']:,}") for r in part["rows"]
            ]
            parts.append(_table(head, cells))
    return "\n\n".join(parts) + "\n"


OWN_FUNCTIONS = "The book's own functions"


def _book_chapter(name, entry):
    yield f"## {entry['title']}"
    yield f"*{entry['book']}* in the book; here *{entry['ours']}*: {_page(name)}. {entry['note']}"
    rows = [
        (heading, _places(found) or "–", _how(how, note))
        for heading, how, found, note in entry["headings"]
    ]
    yield _table(("the book's heading", "here", "remark"), rows)
    if entry.get("calls"):
        yield f"**Calls of {entry['title']}**"
        yield _call_table(entry["calls"])
    if entry["numbers"]:
        yield f"**Printed numbers of {entry['title']}**"
        yield _table(("printed", "today", "why"), entry["numbers"])
    for label, key in (("Errata", "errata"), ("Still works as printed", "same")):
        if entry[key]:
            yield f"**{label}**"
            yield "\n".join(f"- {line}" for line in entry[key])


def _call_table(calls):
    calls = sorted(calls, key=lambda row: ORDER.index(row["kind"]))
    rows = [
        (row["then"] + " †" * row.get("elsewhere", False), row["today"], WORDS[row["kind"]])
        for row in calls
    ]
    table = _table(("the book's call", "today's call", "the old one"), rows)
    if any(row.get("elsewhere") for row in calls):
        table += "\n\n† Not in the book's code; in other code of its time."
    return table


def _table(head, rows):
    safe = [[cell.replace("|", r"\|") for cell in row] for row in rows]
    lines = [head, ["---"] * len(head), *safe]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _how(how, note):
    said = {"here": "", "differently": "covered differently", "not here": "not here"}[how]
    return ": ".join(filter(None, [said, note]))


def _places(found):
    """Links to the pages, each followed by the headings in quotes."""
    pages = {}
    for place in found:
        name, heading = place.split(": ", 1)
        pages.setdefault(name, []).append(heading)
    return "; ".join(
        f"{_page(name, headings[0])}, " + " and ".join(f"“{one}”" for one in headings)
        for name, headings in pages.items()
    )


def _page(name, heading=None):
    """A link to a notebook, or to a page and its heading: only pages have stable anchors."""
    shown = re.sub(r"(?<=[a-z])(?=[A-Z0-9])", " ", name) if name != "FAQ" else name
    if name in notebooks.written():
        return f"[{shown}]({name}.ipynb)"
    return f"[{shown}]({name}.md{'#' + _anchor(heading) if heading else ''})"


def _jump(title):
    return f"[{title}](#{_anchor(title)})"


def _anchor(heading):
    """What GitHub makes of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


# ── fit to be stored ─────────────────────────────────────────────────────────────────────
def store(name):
    """Run a notebook and store it with its outputs; ValueError where it is not fit for it."""
    import nbformat

    path = notebooks.find(name)
    found = list(too_long(nbformat.read(path, as_version=4)))  # before minutes of running
    if not found:
        notebook = nbformat.read(notebooks.run(name), as_version=4)
        clean(notebook)
        found = complaints(notebook)
    if found:
        listing = "\n".join(f"  {one}" for one in found)
        raise ValueError(f"{path.name} is not fit to be stored:\n{listing}")
    _files.write_whole(path, nbformat.writes(notebook, version=4) + "\n")


def too_long(notebook):
    """A sentence for each code cell that fits on no screen."""
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    for number, cell in enumerate(code, 1):
        if (lines := len(cell.source.splitlines())) > LONGEST:
            yield f"code cell {number} has {lines} lines; the limit is {LONGEST}"


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
        merged = []
        for output in cell.outputs:
            last = merged[-1] if merged else {}
            if "name" in output and output.name == last.get("name"):  # stdout, stderr
                last.text += output.text
            else:
                merged.append(output)
            if "data" in output:
                output.data.pop(WIDGET_VIEW, None)
                alt = output.metadata.get("image/png", {}).get("alt")
                output.metadata = {"image/png": {"alt": alt}} if alt else {}
        cell.outputs = merged


def complaints(notebook):
    """What a reader of the stored notebook would trip over, one line each."""
    found = []
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    found += too_long(notebook)
    for number, cell in enumerate(code, 1):
        if cell.source.strip() and cell.execution_count is None:
            found.append(f"code cell {number} has not been run")
        may_fail = "raises-exception" in cell.metadata.get("tags", [])
        for output in cell.outputs:
            text = _shown(output)
            if output.output_type == "error" and not may_fail:
                found.append(f"code cell {number} ends in {output.ename}: {output.evalue}")
            if output.get("name") == "stderr":
                found.append(f"code cell {number} wrote to stderr: {output.text[:300]!r}")
            if path := _absolute_path(text):
                found.append(f"code cell {number} shows an absolute path: {path}")
            told = output.get("metadata", {}).get("image/png", {}).get("alt", "")
            if "image/png" in output.get("data", {}) and len(told) < 20:
                found.append(f"code cell {number} has a figure without a text alternative")
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
    ours = r"/(?:root|tmp|work|home|Users)/[\w./-]*"
    if match := re.search(rf"{ours}|\b[A-Za-z]:\\Users\\[\w.\\-]*", text):
        return match.group()
    homes = {str(notebooks.root()), str(Path.home()), sys.prefix, tempfile.gettempdir()}
    return next((home for home in homes if len(home) > 3 and home in text), None)


def main(arguments=None):
    """Run one command; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    step = commands.add_parser("sync", help="put pages, badges and bootstrap cells in step")
    step.add_argument("--repository", metavar="OWNER/NAME", help="point them at a fork")
    keep = commands.add_parser("store", help="run chapters and store them with their outputs")
    keep.add_argument("chapters", nargs="+", metavar="CHAPTER", help="Chapter0, B, all, …")
    options = parser.parse_args(arguments)
    try:
        if options.command == "sync":
            changed = sync(options.repository)
            print(f"Changed: {', '.join(changed)}" if changed else "Everything is in step.")
        else:
            everything = options.chapters == ["all"]
            for name in notebooks.written() if everything else options.chapters:
                store(name)
    except (ValueError, notebooks.NotebookError) as error:
        print(f"\n{error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
