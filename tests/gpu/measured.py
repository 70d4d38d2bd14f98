"""The table of measured cards for README, from the reports in `results/`.

Standard library only and on its own, so that `python tests/house.py sync` can load it by path.
"""

import json
import statistics
from pathlib import Path

NOBODY = (
    "No card has been measured yet. Yours can be the first: run "
    "`python tests/gpu/report.py` on it ([how](tests/gpu/README.md))."
)
HEAD = (
    "| card | memory | dtype | chapters, and cells without an error "
    "| error of predicted peaks | date |\n"
    "| --- | --- | --- | --- | --- | --- |"
)


def table(folder):
    """Markdown of the reports in a folder, the smallest card first.

    Without a report: a sentence that says so, and how to be the first.
    """
    paths = sorted(Path(folder).glob("*.json"))
    reports = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    if not reports:
        return NOBODY
    reports.sort(key=lambda report: (report["head"]["memory_bytes"], report["head"]["card"]))
    return "\n".join([HEAD, *map(_row, reports)])


def _row(report):
    head, lines = report["head"], report["lines"]
    memory = f"{head['memory_bytes'] / 2**30:.1f} GiB"
    cells = [
        head["card"].replace("|", "/"), memory, head["dtype"],
        chapters(lines), peaks(lines), head["date"],
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


def chapters(lines):
    """'0, 2, 5: 150 of 152': a cell that was never reached is no cell without error."""
    sizes = {line["chapter"]: line["cells"] for line in lines if line["kind"] == "chapter"}
    if not sizes:
        return "none"
    fine = sum(line["kind"] == "cell" and not line["error"] for line in lines)
    names = ", ".join(name.removeprefix("Chapter") for name in sorted(sizes))
    return f"{names}: {fine} of {sum(sizes.values())}"


def peaks(lines):
    """'median 0.8 %, largest -4.1 % (24 runs)' of the ladder's measured runs."""
    errors = [line["error_percent"] for line in lines if line["kind"] == "run"]
    measured = [error for error in errors if error is not None]
    if not measured:
        return "not measured"
    median, largest = statistics.median(map(abs, measured)), max(measured, key=abs)
    runs = "1 run" if len(measured) == 1 else f"{len(measured)} runs"
    if failed := len(errors) - len(measured):
        runs += f", {failed} out of memory"
    return f"median {median:.1f} %, largest {largest:+.1f} % ({runs})"
