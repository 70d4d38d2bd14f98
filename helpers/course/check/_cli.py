"""The command `check`: its arguments and what it prints."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path

from helpers.course import check
from helpers.course.check import _fix


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what `python -m helpers check` takes."""
    parser.add_argument("files", nargs="+", metavar="FILE", help="a notebook, a script, a folder")
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")
    parser.add_argument(
        "--kinds",
        default=",".join(check.KINDS),
        help="which kinds count, with commas between (default: %(default)s)",
    )
    parser.add_argument(
        "--old", action="store_true", help="it is old code: tell other defaults in any case"
    )
    parser.add_argument(
        "--fix", metavar="COPY", help="write a copy of the one file with the renames made"
    )


def main(options: argparse.Namespace) -> int:
    """Print what was found; 1 where something was, 2 where a file could not be read."""
    kinds = set(options.kinds.split(","))
    try:
        if unknown := kinds - check.KINDS.keys():
            known = ", ".join(check.KINDS)
            raise ValueError(f"--kinds takes {known}, not {', '.join(sorted(unknown))}")
        if options.fix and len(options.files) > 1:
            raise ValueError(f"--fix takes one file, not {len(options.files)}")
        reports = []
        for name in options.files:
            is_folder = Path(name).is_dir()
            old = options.old or None
            reports += check.folder(name, old=old) if is_folder else [check.notebook(name, old=old)]
        made = _fix.write(options.files[0], options.fix) if options.fix else 0
    except (ValueError, OSError) as error:
        print(f"check: {error}", file=sys.stderr)
        return 2
    chosen = [
        dataclasses.replace(report, found=tuple(f for f in report if f.kind in kinds))
        for report in reports
    ]
    if options.json:
        print("[" + ",\n".join(report.to_json() for report in chosen) + "]")
    else:
        print("\n\n".join(map(str, chosen)))
        if options.fix:
            print(f"{options.fix}: a copy with {made} of them mended; check it again")
    return int(any(chosen))
