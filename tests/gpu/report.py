"""A report from a card, in one command: what the course does on a real GPU.

    python tests/gpu/report.py                  all stages; nothing to install, no questions
    python tests/gpu/report.py ladder Chapter5  these only; the others' results are kept
    DEVICE=cpu python tests/gpu/report.py       what needs no card, to try the script itself

Each stage is a process of its own with a time limit, and every number is on the disk the
moment it is there: what is killed, or dies, loses nothing that was measured. At the end
there are one JSON, named after the card, and a short table on the terminal.
"""

import argparse
import contextlib
import functools
import json
import os
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import lines  # noqa: E402
from lines import ROOT  # noqa: E402
from measured import chapters, peaks  # noqa: E402

DEVICE = os.environ.get("DEVICE", "cuda")
CHAPTERS = ("Chapter0", "Chapter5", "Chapter4", "Chapter2", "Chapter3")
STAGES = ("env", "codes", "gpu_tests", "ladder", "model", *CHAPTERS)
LIMITS = {  # seconds on a machine of one's own, and where --seconds are counted
    "env": (600, 60), "codes": (1200, 60), "gpu_tests": (3600, 200),
    "ladder": (5400, 240), "model": (3600, 150), "chapter": (5400, 230),
}  # fmt: skip
SHORTEST = 15  # seconds that no stage can do with less than


def main(arguments=None):
    """Parse the command line; returns the exit status, 1 when something failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="STAGE", help=", ".join(STAGES))
    parser.add_argument("--stages", metavar="A,B", help="the same, joined by commas")
    parser.add_argument("--seconds", type=int, help="for everything; tightens each limit")
    parser.add_argument("--out", type=Path, default=ROOT / "outputs" / "gpu",
                        help="folder of the results (default: outputs/gpu)")  # fmt: skip
    parser.add_argument("--plan", type=Path, default=HERE / "plan.json",
                        help="predictions made elsewhere, for such a card")  # fmt: skip
    parser.add_argument("--only", nargs=2, help=argparse.SUPPRESS)  # one stage, in a child
    options = parser.parse_args(arguments)
    options.out, options.plan = options.out.resolve(), options.plan.resolve()
    if DEVICE not in ("cuda", "cpu"):
        parser.error(f"DEVICE must be cuda or cpu, not {DEVICE!r}")
    if options.only:
        return one_stage(*options.only, options)
    named = [*options.names, *(options.stages or "").replace(",", " ").split()]
    for name in named:
        if name not in STAGES and not (ROOT / f"{name}.ipynb").is_file():
            parser.error(f"no stage {name!r}; there are {', '.join(STAGES)}")
    return all_stages(named, options)


# ── the child: one stage ─────────────────────────────────────────────────────────────────
def one_stage(name, limit, options):
    """Run a stage in this process; whatever it raises becomes a line of its results."""
    import stages

    if name == "machine":
        print(json.dumps(stages.machine()))
        return 0
    head = json.loads(os.environ["GPU_REPORT_HEAD"])
    path, limit = options.out / f"{lines.slug(head['card'])}.jsonl", int(limit)
    save = functools.partial(lines.save, path, name)
    started = time.perf_counter()
    try:
        if name == "ladder":
            import ladder

            ladder.climb(save, limit, head, options.plan)
        elif name in STAGES and name not in CHAPTERS:
            getattr(stages, name)(save, limit)
        else:
            stages.chapter(save, limit, name, options.out)
    except Exception:
        save("error", what=name, text=stages.last_words())
    save("stage", seconds=round(time.perf_counter() - started, 1))
    return 0


# ── the parent: one stage after the other ────────────────────────────────────────────────
def all_stages(named, options):
    """Every stage in its own process, then the report."""
    until = None if options.seconds is None else time.monotonic() + options.seconds
    environment = os.environ | {"PYTHONUNBUFFERED": "1", "TOKENIZERS_PARALLELISM": "false"}
    if DEVICE == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    environment.setdefault("CUDA_VISIBLE_DEVICES", "0")  # trainers here are for one card
    head = machine(environment)
    environment["GPU_REPORT_HEAD"] = json.dumps(head)
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"{lines.slug(head['card'])}.jsonl"
    lines.forget(path, named or STAGES)
    try:
        for name in named or STAGES:
            limit = limit_of(name, until)
            if reason := why_skipped(name, named, limit):
                lines.save(path, name, "skipped", what=name, why=reason)
            else:
                print(f"── {name}, at most {limit:.0f} s", flush=True)
                run(name, limit, path, options, environment)
            lines.write_report(path.with_suffix(".json"), head, lines.read(path))
    except KeyboardInterrupt:
        print("Stopped; what was measured is kept.")
    return finish(path.with_suffix(".json"))


def machine(environment):
    """The head of the report, from a child, so that no CUDA lives in this process."""
    command = [sys.executable, __file__, "--only", "machine", "0"]
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(done.returncode)  # it has said why
    return json.loads(done.stdout.splitlines()[-1])


def limit_of(name, until):
    """Seconds a stage may take."""
    generous, tight = LIMITS.get(name, LIMITS["chapter"])
    return generous if until is None else min(tight, until - time.monotonic())


def why_skipped(name, named, limit):
    """Why a stage is not run here, or None."""
    if DEVICE == "cpu" and name == "gpu_tests":
        return "it needs a card"
    if DEVICE == "cpu" and name in CHAPTERS and name not in named:
        return "chapters run on a CPU with `python -m helpers run`; name it to have it here"
    return "no time was left" if limit < SHORTEST else None


def run(name, limit, path, options, environment):
    """One stage as a child; its end is noted where it cannot do that itself."""
    command = [sys.executable, __file__, "--only", name, str(int(limit))]
    command += ["--out", str(options.out), "--plan", str(options.plan)]
    process = subprocess.Popen(command, cwd=ROOT, env=environment)
    try:
        status = process.wait(limit + 5)
    except subprocess.TimeoutExpired:
        lines.save(path, name, "error", what=name, text=f"stopped after {limit:.0f} s")
    else:
        if status:
            lines.save(path, name, "error", what=name, text=died(status))
    finally:
        end(process)


def died(status):
    """What an exit status of a stage means."""
    if status == -9:
        return "killed (signal 9): perhaps the machine's memory was full"
    return f"ended by signal {-status}" if status < 0 else f"ended with status {status}"


def end(process):
    """End a stage and all it has started; does nothing where it is over."""
    import psutil

    try:
        family = psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return
    process.kill()
    process.wait()
    for child in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()
    psutil.wait_procs(family, timeout=10)  # the card's memory is free once they are gone


# ── the end: what the terminal shows ─────────────────────────────────────────────────────
def finish(path):
    """Print the numbers that matter, short, and what to do with the file."""
    report = json.loads(path.read_text(encoding="utf-8"))
    head, found = report["head"], report["lines"]
    failed = [text for line in found if (text := failure(line))]
    print(f"\n{head['card']}, {head['memory_bytes'] / 2**30:.1f} GiB, {head['dtype']}")
    for line in found:
        if text := shown(line):
            print(text)
    print(f"chapters, cells without an error: {chapters(found)}")
    print(f"predicted peaks: {peaks(found)}")
    print("\n".join(["", f"{len(failed)} failed:", *failed]) if failed else "Nothing failed.")
    print(f"\nThe report is {_short(path)}.")
    if head["device"] == "cuda":
        print(
            f"Please send it: as tests/gpu/results/{path.name} in a pull request, or "
            "attached to an issue. It holds no paths of yours, no names and no tokens; "
            "have a look."
        )
    return int(bool(failed))


def shown(line):
    """A line of results for the terminal, or None for those that only the JSON holds."""
    kind = line["kind"]
    if kind == "run" and "measured" in line:
        error = line["error_percent"]
        error = "" if error is None else f"{error:+6.1f} %"
        return (
            f"{line['id']:58} predicted {line['peak_bytes'] / 1e6:9,.0f} measured "
            f"{line['measured'] / 1e6:9,.0f} MB {error} {line['seconds'][-1]:7.2f} s"
        )
    if kind == "codes" and line["card_against_ours"]:
        different, size = line["card_against_ours"], line["bytes"]
        which = f"{line['what']} {line['matrix']} {line['dtype']}"
        return f"codes unlike ours: {different} of {size} ({which})"
    if kind == "cublas_workspace":
        both = f"{line['forward']:,} forward, {line['after_backward']:,} with backward"
        return f"cuBLAS takes {both}"
    if kind == "skipped":
        return f"skipped {line['what']}: {line['why']}"
    return f"{line['stage']}: {line['seconds']} s" if kind == "stage" else None


def failure(line):
    """One sentence about a line that tells of a failure, or None."""
    kind = line["kind"]
    if kind == "error":
        where = dict.fromkeys([line["stage"], str(line["what"])])  # once, where the same
        return f"  {', '.join(where)}: {line['text'].strip().splitlines()[-1][:200]}"
    if kind == "cell" and line["error"]:
        return f"  {line['chapter']}, cell {line['cell']}: {line['error'][:200]}"
    if kind == "test" and line["outcome"] == "failed":
        return f"  {line['test']}: {line['text'].strip().splitlines()[-1][:200]}"
    if kind == "run" and "measured" not in line:
        return f"  {line['id']}: out of memory, though it was predicted to fit"
    return None


def _short(path):
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


if __name__ == "__main__":
    sys.exit(main())
