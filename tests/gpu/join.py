"""Put the results of several runs on one card together, into `results/<card>.json`.

    python tests/gpu/join.py results.tar.xz more.tar.xz --late Chapter5

Takes what `go.sh` sends back, or folders with results of `report.py`, in the order in
which they were made: a stage that ran again replaces what it found before. `--late` names
stages that the clock cut off on a machine lent for minutes: they count as skipped.
"""

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import lines  # noqa: E402
import report  # noqa: E402


def join(folders, late=()):
    """(head, lines) of all the reports in these folders, later stages instead of earlier.

    late: stages whose lines are left out, as skipped. Raises ValueError where there is no
    report, or where they are of different cards.
    """
    head, stages = None, {}
    for folder in map(Path, folders):
        for path in sorted(folder.rglob("*.json")):
            read = json.loads(path.read_text(encoding="utf-8"))["head"]
            if head is not None and read["card"] != head["card"]:
                raise ValueError(f"{path} is of a {read['card']}, not of a {head['card']}")
            head = read
        new = {}
        for path in sorted(folder.rglob("*.jsonl")):  # there even where a run was killed
            for line in lines.read(path):
                new.setdefault(line["stage"], []).append(line)
        for name, found in new.items():  # "no time was left" replaces nothing
            if name not in stages or any(line["kind"] != "skipped" for line in found):
                stages[name] = found
    if head is None:
        raise ValueError(f"no report in {', '.join(map(str, folders))}")
    for name in late:
        found = {"kind": "skipped", "stage": name, "what": name}
        stages[name] = [found | {"why": "no time was left"}]
    return head, [line for found in stages.values() for line in found]


def main(arguments=None):
    """Parse the command line; returns the exit status, 1 when something had failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", nargs="+", type=Path, help="archives or folders")
    parser.add_argument("--late", nargs="*", default=[], metavar="STAGE")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as place:
        folders = []
        for number, path in enumerate(options.results):
            if path.is_file():
                folder = Path(place, str(number))
                shutil.unpack_archive(path, folder)
                path = folder
            folders.append(path)
        try:
            head, found = join(folders, options.late)
        except ValueError as error:
            parser.error(str(error))
    path = options.out / f"{lines.slug(head['card'])}.json"
    lines.write_report(path, head, found)
    return report.finish(path)


if __name__ == "__main__":
    sys.exit(main())
