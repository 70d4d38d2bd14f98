"""The command line: `python -m helpers run Chapter0`, `plan`, `lab`, `doctor`, `check`.

Installed with pip it is also called `fine-tuning-course`.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from importlib.util import find_spec

from helpers.course import doctor, notebooks, places


def main(arguments: list[str] | None = None) -> int:
    """Parse and run one command.

    Args:
        arguments: what follows the command's name; default: what this process was given.

    Returns:
        The exit status.

    Example:
        >>> main(["doctor", "the model never stops"])
        symptom   the model never stops, or repeats itself to the limit
        ...
        0
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser("fine-tuning-course", description="The course's commands.")
    commands = parser.add_subparsers(dest="command", required=True)

    run = commands.add_parser("run", help="execute chapters in a fresh kernel each")
    run.add_argument("chapters", nargs="+", metavar="CHAPTER", help="Chapter0, B, all, …")
    run.set_defaults(call=_run)
    lab = commands.add_parser("lab", help="open the course in JupyterLab")
    lab.add_argument("--port", type=int, default=8888)
    lab.set_defaults(call=_lab)
    look = commands.add_parser("doctor", help="look at this machine, or at an error")
    look.add_argument("error", nargs="*", help="a message to look up instead")
    look.set_defaults(call=_doctor)
    plan = commands.add_parser("plan", help="predict the peak GPU memory of a run")
    if arguments[:1] == ["plan"]:  # the others work where its libraries do not
        from helpers.memory import _cli

        _cli.add_arguments(plan)
        plan.set_defaults(call=_cli.main)
    old = commands.add_parser("check", help="hold old code against the installed libraries")
    if arguments[:1] == ["check"]:
        from helpers.course.check import _cli as check_cli

        check_cli.add_arguments(old)
        old.set_defaults(call=check_cli.main)

    options = parser.parse_args(arguments)
    try:
        return options.call(options)
    except notebooks.NotebookError as error:
        print(f"\n{error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as stop:
        print(f"\n{stop or 'Stopped.'}", file=sys.stderr)
        return 130


def _run(options: argparse.Namespace) -> int:
    chapters = notebooks.written() if options.chapters == ["all"] else options.chapters
    try:
        paths = [notebooks.find(chapter) for chapter in chapters]
    except ValueError as error:
        raise notebooks.NotebookError(str(error)) from None
    for path in paths:
        summary = notebooks.output_folder(path) / "summary.txt"
        summary.unlink(missing_ok=True)  # an old run's word would be a lie
        executed = notebooks.run(path.name).relative_to(notebooks.root())
        print(f"\n{path.stem} ran; the executed copy is {executed}")
        if summary.is_file():
            print(f"\n{summary.read_text(encoding='utf-8').rstrip()}")
    return 0


def _lab(options: argparse.Namespace) -> int:
    folder = notebooks.root()
    if not find_spec("jupyterlab"):
        wanted = f"pip install '{places.DISTRIBUTION}[lab]'"
        raise notebooks.NotebookError(f"JupyterLab is not installed: {wanted}")
    command = [sys.executable, "-m", "jupyterlab", "--ip", "127.0.0.1"]
    return subprocess.call([*command, "--port", str(options.port)], cwd=folder)


def _doctor(options: argparse.Namespace) -> int:
    if options.error:
        print(doctor.explain(" ".join(options.error)))
        return 0
    print(found := doctor.report())
    return int(found.failed)


if __name__ == "__main__":
    sys.exit(main())
