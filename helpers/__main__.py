"""The command line: `python -m helpers run Chapter0`, `plan`, `lab`, `doctor`, `sync`."""

import argparse
import subprocess
import sys

from helpers.course import notebooks


def main(arguments=None):
    """Parse and run one command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m helpers", description="The course's commands.")
    commands = parser.add_subparsers(dest="command", required=True)

    run = commands.add_parser("run", help="execute chapters in a fresh kernel each")
    run.add_argument("chapters", nargs="+", metavar="CHAPTER", help="Chapter0, B, all, …")
    run.add_argument(
        "--write", action="store_true", help="also refresh the stored notebook in place"
    )

    lab = commands.add_parser("lab", help="open the course in JupyterLab")
    lab.add_argument("--port", type=int, default=8888)

    doctor = commands.add_parser("doctor", help="look at this machine, or at an error")
    doctor.add_argument("error", nargs="?", help="a message to look up instead")

    sync = commands.add_parser("sync", help="put bootstrap cells, badges and links in step")
    sync.add_argument("--repository", metavar="OWNER/NAME", help="point them at a fork")

    from helpers import memory

    plan = commands.add_parser("plan", help="predict the peak GPU memory of a run")
    memory.add_arguments(plan)

    options = parser.parse_args(arguments)
    chosen = {
        "run": _run,
        "lab": _lab,
        "doctor": _doctor,
        "sync": _sync,
        "plan": memory.main,
    }
    try:
        return chosen[options.command](options)
    except notebooks.NotebookError as error:
        print(f"\n{error}", file=sys.stderr)
        return 1


def _run(options):
    chapters = notebooks.written() if options.chapters == ["all"] else options.chapters
    for chapter in chapters:
        try:
            path = notebooks.find(chapter)
            summary = notebooks.output_folder(path) / "summary.txt"
            summary.unlink(missing_ok=True)  # an old run's word would be a lie
            executed = notebooks.run(chapter, write=options.write)
        except ValueError as error:
            print(f"\n{error}", file=sys.stderr)
            return 1
        print(f"\n{path.stem} ran; the executed copy is {_short(executed)}")
        if summary.is_file():
            print(f"\n{summary.read_text(encoding='utf-8').rstrip()}")
    return 0


def _short(path):
    return path.relative_to(notebooks.root())


def _lab(options):
    command = [sys.executable, "-m", "jupyterlab", "--ip", "127.0.0.1"]
    command += ["--port", str(options.port)]
    return subprocess.call(command, cwd=notebooks.root())


def _doctor(options):
    from helpers.course import doctor

    if options.error:
        print(doctor.explain(options.error))
        return 0
    print(found := doctor.report())
    return int(found.failed)


def _sync(options):
    from helpers.course import doctor

    # Each brings a page in step with the code and returns the names that changed.
    pages = (doctor.write_page, notebooks.write_measured_cards)
    try:
        changed = notebooks.sync(options.repository)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    for write in pages:
        changed += write()
    print(f"Changed: {', '.join(changed)}" if changed else "Everything is in step.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
