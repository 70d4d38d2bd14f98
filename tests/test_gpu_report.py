"""The report from a card: what it keeps when killed, what it leaves out, what it shows."""

import argparse
import json
import os
import runpy
import shutil
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path

import nbformat
import psutil
import pytest

GPU = Path(__file__).resolve().parent / "gpu"
sys.path.insert(0, str(GPU))

import join  # noqa: E402
import ladder  # noqa: E402
import lines  # noqa: E402
import measured  # noqa: E402
import pack  # noqa: E402
import report  # noqa: E402
import stages  # noqa: E402

T4 = {"card": "Tesla T4", "capability": [7, 5], "memory_bytes": 15_637_086_208,
      "dtype": "float16", "device": "cuda", "date": "2026-11-27"}  # fmt: skip
H100 = T4 | {"card": "NVIDIA H100 80GB HBM3", "capability": [9, 0], "dtype": "bfloat16",
             "memory_bytes": 84_942_979_072}  # fmt: skip


@pytest.fixture
def on_cpu(monkeypatch):
    for module in (stages, ladder, report):
        monkeypatch.setattr(module, "DEVICE", "cpu")


def collector():
    """A `save` that keeps its lines in a list, and the list."""
    found = []
    return lambda kind, **fields: found.append({"kind": kind} | fields), found


# ── lines ────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize(
    ("card", "name"),
    [("Tesla T4", "tesla-t4"), ("NVIDIA H100 80GB HBM3", "nvidia-h100-80gb-hbm3"),
     ("NVIDIA A100-SXM4-40GB", "nvidia-a100-sxm4-40gb"), ("../..", "card")],
)  # fmt: skip
def test_a_card_names_its_file(card, name):
    assert lines.slug(card) == name


def test_a_line_is_on_the_disk_when_save_returns(tmp_path, monkeypatch):
    path, synced = tmp_path / "results.jsonl", []
    monkeypatch.setattr(os, "fsync", lambda _: synced.append(path.read_text()))
    lines.save(path, "codes", "layer", ms=1.5, error=float("nan"), dtype=Path("x"))
    assert json.loads(synced[0])["ms"] == 1.5
    assert lines.read(path)[0]["error"] == "nan", "JSON knows no nan"


def test_a_torn_line_takes_no_other_with_it(tmp_path):
    path = tmp_path / "results.jsonl"
    lines.save(path, "env", "memory", number=1)
    with open(path, "a") as file:
        file.write('{"kind": "memory", "num')
    lines.save(path, "env", "memory", number=2)
    assert [line["number"] for line in lines.read(path)] == [1, 2]


def test_stages_that_run_again_replace_their_own_lines_only(tmp_path):
    path = tmp_path / "results.jsonl"
    for stage in ("env", "ladder", "env", "Chapter0"):
        lines.save(path, stage, "stage", seconds=1)
    lines.forget(path, ["env", "codes"])
    assert [line["stage"] for line in lines.read(path)] == ["ladder", "Chapter0"]


@pytest.fixture
def owner(monkeypatch):
    monkeypatch.setenv("HOME", "/srv/people/daniela")
    monkeypatch.setenv("LOGNAME", "dani")
    monkeypatch.setenv("MY_TOKEN", "correct-horse-battery")
    monkeypatch.setattr(lines.socket, "gethostname", lambda: "danis-box")


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("/srv/people/daniela/course/x.py", "~/course/x.py"),
        ("-I/srv/people/daniela/include", "-I~/include"),
        (f"{lines.ROOT}/helpers/memory.py", "./helpers/memory.py"),
        (f"{lines.sysconfig.get_path('purelib')}/torch/x.py", "<packages>/torch/x.py"),
        ("at /mnt/disk of dani/models/x.bin", "at …/disk of <user>/models/x.bin"),
        ("open('/mnt/big/disk/x.bin')", "open('…/x.bin')"),
        ("file:///mnt/big/disk/x.bin", "file://…/x.bin"),
        (r"C:\Users\Dani V\x.py", r"…\x.py"),
        (r"'D:\\data\\x.bin'", r"'…\x.bin'"),
        ("pytest-of-dani, on danis-box", "pytest-of-<user>, on <user>"),
        ("hf_AbCdEfGhIjKlMnOpQr", "<secret>"),
        ("key correct-horse-battery!", "key <secret>!"),
        ("https://me:pw@host/simple", "https://<secret>@host/simple"),
        # and what must stay as it is
        ("https://github.com/a/b/c and/or 1/2/3 </s> 5 / 6", None),
        ("Danish dandelions", None),
    ],
)
def test_nothing_private_in_a_text(owner, text, clean):
    assert lines.scrub({"a": [text]}) == {"a": [text if clean is None else clean]}


def test_a_shared_user_name_is_a_word_like_others(monkeypatch):
    monkeypatch.setenv("LOGNAME", "root")
    assert lines.scrub("the root of it") == "the root of it"


# ── the table of README ──────────────────────────────────────────────────────────────────
def a_report(folder, head, found):
    lines.write_report(folder / f"{lines.slug(head['card'])}.json", head, found)


def test_the_table_of_no_card_says_how_to_be_the_first(tmp_path):
    text = measured.table(tmp_path)
    assert "No card has been measured yet" in text
    assert "python tests/gpu/report.py" in text


def test_the_table_of_two_cards(tmp_path):
    def cell(chapter, error=None):
        return {"kind": "cell", "chapter": chapter, "error": error}

    a_report(tmp_path, H100, [{"kind": "run", "error_percent": -4.1}])
    a_report(
        tmp_path, T4,
        [{"kind": "chapter", "chapter": "Chapter5", "cells": 4}, cell("Chapter5"),
         cell("Chapter5", "KeyError: 1"),  # and then the kernel died: two never ran
         {"kind": "chapter", "chapter": "Chapter0", "cells": 1}, cell("Chapter0"),
         *({"kind": "run", "error_percent": e} for e in (0.5, -3.25, 1.0, None))],
    )  # fmt: skip
    rows = measured.table(tmp_path).splitlines()[2:]
    assert rows == [
        "| Tesla T4 | 14.6 GiB | float16 | 0, 5: 2 of 5 | median 1.0 %, largest -3.2 % "
        "(3 runs, 1 out of memory) | 2026-11-27 |",
        "| NVIDIA H100 80GB HBM3 | 79.1 GiB | bfloat16 | none | median 4.1 %, largest "
        "-4.1 % (1 run) | 2026-11-27 |",
    ]


def test_the_table_loads_by_path_and_needs_no_package(tmp_path):
    code = "import runpy, sys; print(runpy.run_path(sys.argv[1])['table'](sys.argv[2]))"
    command = [sys.executable, "-I", "-S", "-c", code, str(GPU / "measured.py")]
    done = subprocess.run([*command, str(tmp_path)], capture_output=True, text=True)
    assert done.stdout.strip() == measured.NOBODY, done.stderr
    assert runpy.run_path(str(GPU / "measured.py"))["table"](GPU / "results")


# ── the ladder ───────────────────────────────────────────────────────────────────────────
def entry(**changes):
    predicted = {"peak_bytes": 6 * 2**30, "reserved_predicted": 7 * 2**30}
    build = {"model": "opt-350m", **ladder.BASE, "dtype": "float16"}
    found = {"id": "x", "build": build, "run": {}, "padded": False, "predicted": predicted}
    return found | changes


def test_every_rung_is_a_known_model_and_has_its_own_name():
    from helpers import memory

    found = ladder.runs(ladder.RUNGS + ladder.CPU_RUNGS, "bfloat16")
    assert len({run["id"] for run in found}) == len(found) > 25
    for name in {run["build"]["model"] for run in found}:
        assert memory.load_config(name).num_hidden_layers
    own = [run["build"]["dtype"] for run in found if run["build"]["dtype"] != "bfloat16"]
    assert "float32" in own and "float16" in own


def test_what_cannot_run_on_a_card_is_skipped_with_its_reason(monkeypatch):
    assert ladder.why_not(entry(), T4, 8 * 2**30) is None
    reason = ladder.why_not(entry(), T4, 6.5 * 2**30)
    assert reason == "needs 7.0 GiB, and 6.5 GiB are free"
    flash = entry()
    flash["build"] = flash["build"] | {"attention": "flash_attention_2"}
    assert "8.0" in ladder.why_not(flash, T4, 8 * 2**30)
    assert ladder.why_not(flash, H100, 8 * 2**30) is None
    assert ladder.why_not(entry(refused="no such kernel"), T4, 8 * 2**30) == "no such kernel"
    bare = entry()
    del bare["predicted"]
    bare["build"] = bare["build"] | {"dtype": "bfloat16"}
    bare["run"] = {"batch_size": 1, "sequence_length": 64}
    assert "bfloat16" in ladder.why_not(bare, T4, 8 * 2**30), "the predictor's own words"


def test_a_ladder_on_a_full_card_says_so_and_builds_nothing(on_cpu, monkeypatch):
    save, found = collector()
    monkeypatch.setattr(ladder, "free_bytes", lambda: 2**20)
    monkeypatch.setattr(ladder, "planned", lambda *_: [entry(), entry(id="y")])
    monkeypatch.setattr(ladder, "build", lambda _: pytest.fail("nothing fits"))
    ladder.climb(save, 60, T4, None)
    assert [(line["kind"], line["what"]) for line in found] == [
        ("skipped", "x"), ("skipped", "y"),
    ]  # fmt: skip
    found.clear()
    ladder.climb(save, 0, T4, None)
    assert {line["why"] for line in found} == {"no time was left"}


def test_a_prediction_is_of_the_card_itself():
    from helpers.memory import cards

    run = entry(run={"batch_size": 1, "sequence_length": 64})
    run["build"] = run["build"] | {"attention": "eager"}
    hopper, turing = (ladder.predict(run, ladder.card_of(head)) for head in (H100, T4))
    more = cards.cublas_workspace((9, 0)) - cards.cublas_workspace((7, 5))
    assert hopper["peak_bytes"] - turing["peak_bytes"] == 2 * more
    assert ladder.card_of(T4 | {"capability": None}) is None


def test_a_plan_is_for_cards_of_its_kind_only(tmp_path):
    path = tmp_path / "plan.json"
    runs = [entry(id="planned")]
    path.write_text(json.dumps({"capability": [9, 0], "dtype": "bfloat16", "runs": runs}))
    assert [run["id"] for run in ladder.planned(path, H100)] == ["planned"]
    bare = ladder.planned(path, H100 | {"capability": [8, 0]})
    assert len(bare) > 20
    assert not any("predicted" in run for run in bare)
    assert len(ladder.planned(path, H100 | {"dtype": "float16"})) == len(bare)
    assert len(ladder.planned(tmp_path / "none.json", H100)) == len(bare)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("quantization", [None, "nf4", "int8"])
def test_a_rung_is_built_as_predicted_and_takes_two_steps(on_cpu, quantization, tied):
    import torch
    from bitsandbytes import nn as bits
    from transformers import LlamaConfig

    config = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=10_000, tie_word_embeddings=tied,
    )  # fmt: skip
    choices = {"model": config, **ladder.BASE, "dtype": "float32", "lora": 4,
               "quantization": quantization}  # fmt: skip
    model, optimizer = ladder.build(choices)
    layer = {None: torch.nn.Linear, "nf4": bits.Linear4bit, "int8": bits.Linear8bitLt}
    base = model.get_base_model()
    assert type(base.model.layers[0].mlp.up_proj) is layer[quantization]
    assert type(base.lm_head) is torch.nn.Linear
    assert (base.lm_head.weight is base.model.embed_tokens.weight) is tied
    tensors = [*model.parameters(), *model.buffers()]
    assert not any(tensor.is_meta for tensor in tensors)
    assert base.model.rotary_emb.inv_freq[0] == 1, "buffers hold their real numbers"
    save, found = collector()
    run = entry(build=choices, padded=True, run={"batch_size": 2, "sequence_length": 8})
    ladder.one_run(save, run, model, optimizer)
    assert found[0]["measured"] > 0
    assert len(found[0]["seconds"]) == 2
    assert found[0]["error_percent"] is None, "a CPU is no card"


def test_a_full_card_is_a_line_and_the_next_run_goes_on(on_cpu, monkeypatch):
    import torch

    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    save, found = collector()
    monkeypatch.setattr(ladder, "two_steps", full)
    weight = torch.nn.Parameter(torch.ones(2))
    weight.grad = torch.ones(2)
    run = entry(run={"batch_size": 1, "sequence_length": 8})
    ladder.one_run(save, run, None, torch.optim.SGD([weight]))
    assert found[0]["error"] == "CUDA out of memory"
    assert weight.grad is None, "the next run starts without old gradients"
    assert "out of memory" in report.failure(found[0])


# ── the stages ───────────────────────────────────────────────────────────────────────────
def test_a_notebook_goes_on_after_errors_and_keeps_all_lines(tmp_path, monkeypatch):
    sources = ["1 + 1", "1 / 0", "{}['expected']", "import os\nos._exit(3)", "'never'"]
    cells = [nbformat.v4.new_code_cell(source) for source in sources]
    cells[2].metadata["tags"] = ["raises-exception"]
    cells.insert(0, nbformat.v4.new_markdown_cell("words"))
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "Tiny.ipynb")
    monkeypatch.setattr(stages, "ROOT", tmp_path)
    monkeypatch.setenv("GPU_REPORT_HEAD", json.dumps(T4))
    options = argparse.Namespace(out=tmp_path, plan=tmp_path / "none.json")
    assert report.one_stage("Tiny", 60, options) == 0
    found = lines.read(tmp_path / "tesla-t4.jsonl")
    done = {line["cell"]: line for line in found if line["kind"] == "cell"}
    assert list(done) == [1, 2, 3]
    assert done[1]["output"] == "2"
    assert done[2]["error"] == "ZeroDivisionError: division by zero"
    assert done[3]["error"] is None, "this error is part of the lesson"
    assert measured.chapters(found) == "Tiny: 2 of 5"
    assert "DeadKernelError" in next(x for x in found if x["kind"] == "error")["text"]
    assert found[-1]["kind"] == "stage"


def test_every_gpu_test_is_a_line_and_a_broken_module_stops_none(tmp_path):
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_a.py").write_text(
        "import pytest\n"
        "@pytest.mark.gpu\ndef test_good():\n    print('predicted 5 MB')\n"
        "@pytest.mark.gpu\ndef test_bad():\n    assert 1 == 2\n"
        "def test_unmarked():\n    pass\n"
    )
    (tmp_path / "tests" / "test_b.py").write_text(
        "import pytest\nimport no_such_package\npytestmark = pytest.mark.gpu\n"
    )
    # No test of a card in it: it is not even read.
    (tmp_path / "tests" / "test_c.py").write_text("raise SystemExit('read')\n")
    code = (
        "import functools, sys, pathlib; sys.path.insert(0, sys.argv[1])\n"
        "import lines, stages; stages.ROOT = pathlib.Path(sys.argv[2])\n"
        "stages.gpu_tests(functools.partial(lines.save, sys.argv[3], 'gpu_tests'), 60)"
    )
    path = tmp_path / "x.jsonl"
    command = [sys.executable, "-c", code, str(GPU), str(tmp_path), str(path)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    found = lines.read(path)
    tests = {x["test"].split("::")[1]: x for x in found if x["kind"] == "test"}
    assert tests, done.stdout + done.stderr
    assert {name: x["outcome"] for name, x in tests.items()} == {
        "test_good": "passed", "test_bad": "failed",
    }  # fmt: skip
    assert "predicted 5 MB" in tests["test_good"]["output"]
    assert "no_such_package" in next(x for x in found if x["kind"] == "error")["text"]


def test_without_a_card_there_is_a_sentence(monkeypatch):
    import torch

    monkeypatch.setattr(stages, "DEVICE", "cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match=r"sees no CUDA card.*DEVICE=cpu"):
        stages.machine()


# ── processes ────────────────────────────────────────────────────────────────────────────
def start(out, *arguments):
    environment = os.environ | {"DEVICE": "cpu"}
    command = [sys.executable, str(GPU / "report.py"), "--out", str(out), *arguments]
    return subprocess.Popen(command, cwd=out, env=environment, text=True, stdout=subprocess.PIPE)


def test_a_killed_stage_loses_no_line(tmp_path):
    """Kill -9 in the middle of a real stage, as a machine does whose memory is full."""
    path = tmp_path / "cpu.jsonl"
    process, before = start(tmp_path, "--stages", "codes"), []
    try:
        while len(before) < 3:
            time.sleep(0.02)
            assert process.poll() is None, process.stdout.read()
            before = lines.read(path)
        (stage,) = psutil.Process(process.pid).children()
        stage.kill()
        shown, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    found = json.loads((tmp_path / "cpu.json").read_text())
    assert found["head"]["card"] == "CPU"
    assert found["lines"][: len(before)] == before
    assert "killed (signal 9)" in found["lines"][-1]["text"]
    assert process.returncode == 1
    assert "1 failed:" in shown


def test_a_stage_is_stopped_at_its_limit_with_all_it_started(tmp_path, monkeypatch):
    path, sleeper = tmp_path / "x.jsonl", tmp_path / "sleeper.py"
    sleeper.write_text(
        "import pathlib, subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        f"pathlib.Path({str(tmp_path / 'pid')!r}).write_text(str(child.pid))\n"
        "time.sleep(600)\n"
    )
    monkeypatch.setattr(report, "__file__", str(sleeper))
    options = argparse.Namespace(out=tmp_path, plan=tmp_path)
    report.run("env", -3, path, options, dict(os.environ))  # 5 s of grace are added
    assert lines.read(path)[0]["text"] == "stopped after -3 s"
    child = int((tmp_path / "pid").read_text())
    gone = [psutil.STATUS_ZOMBIE]  # until whoever inherits it looks
    assert not psutil.pid_exists(child) or psutil.Process(child).status() in gone


def test_limits_are_generous_and_tight_when_seconds_count(on_cpu):
    assert report.limit_of("Chapter0", None) > 3000
    assert report.limit_of("YourData", None) > 3000
    assert report.limit_of("Chapter0", time.monotonic() + 1000) == 230
    assert report.limit_of("Chapter0", time.monotonic() + 20) <= 20
    assert report.why_skipped("env", [], 14) == "no time was left"
    assert report.why_skipped("gpu_tests", ["gpu_tests"], 60) == "it needs a card"
    assert "name it" in report.why_skipped("Chapter0", [], 60)
    assert report.why_skipped("Chapter0", ["Chapter0"], 60) is None


def test_an_unknown_stage_is_refused_with_the_known_ones(capsys):
    with pytest.raises(SystemExit):
        report.main(["laddr"])
    assert "no stage 'laddr'; there are env, codes" in capsys.readouterr().err


def test_the_end_shows_what_failed_and_asks_for_the_file(tmp_path, capsys):
    run = {"kind": "run", "stage": "ladder", "id": "opt-350m 1x500", "peak_bytes": 3e9,
           "measured": 3.1e9, "error_percent": -3.2, "seconds": [2.0, 1.0]}  # fmt: skip
    codes = {"kind": "codes", "stage": "codes", "card_against_ours": 7, "bytes": 100,
             "what": "int8", "matrix": "m", "dtype": "float16"}  # fmt: skip
    path = tmp_path / "tesla-t4.json"
    lines.write_report(path, T4, [run, codes])
    assert report.finish(path) == 0
    shown = capsys.readouterr().out
    assert "predicted     3,000 measured     3,100 MB   -3.2 %" in shown
    assert "codes unlike ours: 7 of 100" in shown
    assert "Nothing failed." in shown
    assert "tests/gpu/results/tesla-t4.json" in shown
    test = {"kind": "test", "stage": "gpu_tests", "test": "t.py::test_x",
            "outcome": "failed", "text": "trace\nE assert 1 == 2"}  # fmt: skip
    lines.write_report(path, T4, [test])
    assert report.finish(path) == 1
    assert "t.py::test_x: E assert 1 == 2" in capsys.readouterr().out


# ── packing ──────────────────────────────────────────────────────────────────────────────
def test_the_model_is_split_so_that_both_loads_fit(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(pack, "LIMIT", 1000)
    monkeypatch.setattr(pack, "AIR", 100)
    a, b = tmp_path / "a", tmp_path / "b"
    for folder in (a, b):
        folder.mkdir()
    (a / "wheel").write_bytes(bytes(300))
    data = os.urandom(1000)
    pack.split(data, a, b, tree=100)
    assert (a / "part0").stat().st_size == 500
    assert (a / "part0").read_bytes() + (b / "part1").read_bytes() == data
    with pytest.raises(SystemExit, match="300 bytes too large"):
        pack.split(bytes(1600), a, b, tree=100)


def test_bitsandbytes_travels_with_one_cuda_library(tmp_path):
    wheel = tmp_path / "bitsandbytes-1-py3-none-any.whl"
    record = "bitsandbytes-1.dist-info/RECORD"
    kept = [
        "bitsandbytes/libbitsandbytes_cpu.so",
        "bitsandbytes/libbitsandbytes_cuda130.so",
    ]
    spared = [
        "bitsandbytes/libbitsandbytes_cuda118.so",
        "bitsandbytes/libbitsandbytes_rocm7.so",
    ]
    with zipfile.ZipFile(wheel, "w") as archive:
        for name in kept + spared:
            archive.writestr(name, b"x")
        archive.writestr(record, "".join(f"{name},,\n" for name in kept + spared))
    pack.only_one_cuda(wheel)
    with zipfile.ZipFile(wheel) as archive:
        assert archive.namelist() == [*kept, record]
        assert archive.read(record).decode() == "".join(f"{name},,\n" for name in kept)


def test_git_does_not_see_the_loads(tmp_path, monkeypatch):
    monkeypatch.setattr(pack, "ROOT", tmp_path)
    (tmp_path / ".git" / "info").mkdir(parents=True)
    exclude = tmp_path / ".git" / "info" / "exclude"
    exclude.write_text("/mine/")
    for _ in range(2):
        pack.unseen_by_git()
    assert exclude.read_text() == "/mine/\n/.gpu/\n"


def test_reports_of_several_runs_are_put_together(tmp_path, capsys):
    for number, names in enumerate((("env", "ladder"), ("ladder", "Chapter0"))):
        folder = tmp_path / str(number) / "group"
        folder.mkdir(parents=True)
        for stage in names:
            path = folder / f"{lines.slug(H100['card'])}.jsonl"
            lines.save(path, stage, "stage", seconds=number)
        if number == 0:  # the second run was killed before it could write its report
            a_report(folder, H100, lines.read(path))
    with tarfile.open(tmp_path / "0.tar.xz", "w:xz") as archive:
        archive.add(tmp_path / "0", ".")
    out = tmp_path / "out"
    out.mkdir()
    given = [str(tmp_path / "0.tar.xz"), str(tmp_path / "1"), "--out", str(out)]
    assert join.main([*given, "--late", "Chapter0"]) == 0
    report = json.loads(next(out.glob("*.json")).read_text())
    assert report["head"] == H100
    found = [(x["stage"], x.get("seconds"), x.get("why")) for x in report["lines"]]
    assert found == [
        ("env", 0, None), ("ladder", 1, None), ("Chapter0", None, "no time was left"),
    ]  # fmt: skip
    a_report(tmp_path / "1", T4, [])
    with pytest.raises(SystemExit):
        join.main(given)
    assert "is of a Tesla T4, not of a NVIDIA H100" in capsys.readouterr().err
    with pytest.raises(ValueError, match="no report in"):
        join.join([out / "nothing"])


def test_wheels_travel_in_one_archive_and_stay_wheels(tmp_path):
    folder = tmp_path / "wheels"
    folder.mkdir()
    text = b"the same words again " * 1000
    for name in ("a-1-py3-none-any.whl", "b-1-py3-none-any.whl"):
        with zipfile.ZipFile(folder / name, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("x/data", text)
    pack.pack_wheels(folder, tmp_path / "wheels.tar.xz")
    assert not folder.exists()
    shutil.unpack_archive(tmp_path / "wheels.tar.xz", tmp_path)
    for wheel in folder.glob("*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            assert archive.read("x/data") == text
    assert len(list(folder.iterdir())) == 2


# ── all of it ────────────────────────────────────────────────────────────────────────────
@pytest.mark.slow
def test_all_stages_that_need_no_card_pass_on_a_cpu(tmp_path):
    process = start(tmp_path)
    shown, _ = process.communicate(timeout=900)
    assert process.returncode == 0, shown
    text = (tmp_path / "cpu.json").read_text()
    found = json.loads(text)
    ran = [line["stage"] for line in found["lines"] if line["kind"] == "stage"]
    assert ran == ["env", "codes", "ladder", "model"]
    skipped = {line["what"] for line in found["lines"] if line["kind"] == "skipped"}
    assert skipped >= {"gpu_tests", *report.CHAPTERS}
    runs = [line for line in found["lines"] if line["kind"] == "run"]
    assert len(runs) == 3
    # Predictions are of a card's kernels; a CPU's keep other tensors, but no other worlds.
    for run in runs:
        assert 0.5 < run["peak_bytes"] / run["measured"] < 2, run["id"]
    codes = [line for line in found["lines"] if line["kind"] == "codes"]
    assert codes
    assert not any(line["card_against_ours"] for line in codes)
    answers = {x["quantization"]: x["text"] for x in found["lines"] if x["kind"] == "answer"}
    assert all("Paris" in answer for answer in answers.values())
    assert set(answers) == {None, "nf4", "fp4", "int8"}
    assert "Nothing failed." in shown
    assert str(lines.ROOT) not in text
    assert str(Path.home()) + "/" not in text
    assert not list((GPU / "results").glob("cpu*"))
