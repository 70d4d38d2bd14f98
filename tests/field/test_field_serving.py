"""Inputs from the field, tried on what takes a model from a folder to a server."""

import functools
import gzip
import json
import math
import os
import re
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
import trl
from trial_model import llama
from trial_model import tokenizer as byte_tokenizer

from helpers import _machine, models, serving
from helpers.serving import _anatomy, _folders, _programs, _rest, _trial, gguf, llamacpp

SHELL = pytest.mark.skipif(os.name == "nt", reason="shell scripts and signals")
GO = pytest.mark.skipif(not shutil.which("go"), reason="needs Go: apt-get install golang-go")
SERVES = pytest.mark.skipif(
    llamacpp.find("llama-server") is None,
    reason="llama.cpp has not been built yet; the slow tests build it",
)
QUESTION = [{"role": "user", "content": "Hi?"}]


def message(role, content):
    return {"role": role, "content": content}


@pytest.fixture(scope="module")
def trial(tmp_path_factory):
    """A GGUF file of four megabytes whose tokens are bytes."""
    path = tmp_path_factory.mktemp("trial") / "tiny.gguf"
    path.write_bytes(gzip.decompress(_trial.MODEL.read_bytes()))
    return path


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A tiny model and its tokenizer, as transformers saves them."""
    path = tmp_path_factory.mktemp("saved") / "model"
    llama(64, 64).save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return path


def gguf_file(path, kind="model", tensor="token_embd.weight"):
    """A GGUF file of one small tensor in float16."""
    import gguf as library

    writer = library.GGUFWriter(path, "llama")
    writer.add_type(kind)
    writer.add_file_type(1)
    writer.add_tensor(tensor, np.zeros((4, 32), dtype=np.float16))
    for step in ("header", "kv_data", "tensors"):
        getattr(writer, f"write_{step}_to_file")()
    writer.close()
    return path


@pytest.fixture
def folder(saved, tmp_path):
    return Path(shutil.copytree(saved, tmp_path / "model"))


def programs(folder, computes="echo 'Final estimate: PPL = 259.0'", **does):
    """Stand-ins for llama.cpp's programs; the trial of `computes` comes first."""
    folder.mkdir()
    for name in llamacpp.PROGRAMS:
        version = 'if [ "$1" = --version ]; then echo "version: 9000 (x)"; exit 0; fi'
        small = f'case "$*" in *tiny.gguf*text.txt*) {computes}; exit 0;; esac'
        script = does.get(name.split("-")[1], "exit 0")
        (folder / name).write_text(f"#!/bin/sh\n{version}\n{small}\n{script}\n")
        (folder / name).chmod(0o755)
    return folder


def converter(monkeypatch, folder, script):
    """Puts a script of ours in the place of llama.cpp's converters."""
    folder.mkdir()
    for name in ("convert_hf_to_gguf.py", "convert_lora_to_gguf.py"):
        (folder / name).write_text(f"import os, signal, sys\nout = sys.argv[-1]\n{script}\n")
    monkeypatch.setattr(llamacpp, "source_folder", lambda: folder)


# ── child processes ──────────────────────────────────────────────────────────────────────
@SHELL
@pytest.mark.field(
    "llama.cpp#28756, llama.cpp#8734, llama.cpp#13678",
    "a program killed by an illegal instruction",
)
@pytest.mark.parametrize("program", ["quantize", "imatrix", "server"])
@pytest.mark.parametrize("signal", ["ILL", "KILL"])
def test_child_that_a_signal_killed_names_the_signal(program, signal, trial, tmp_path, monkeypatch):
    source = gguf_file(tmp_path / "f16.gguf")
    monkeypatch.setenv(
        llamacpp.VARIABLE, str(programs(tmp_path / "bin", **{program: f"kill -{signal} $$"}))
    )
    with pytest.raises(RuntimeError, match=f"killed by SIG{signal}: "):
        if program == "quantize":
            gguf.quantize(source, tmp_path / "out.gguf", "Q8_0")
        elif program == "imatrix":
            gguf.imatrix(source, tmp_path / "out.gguf", "Once. " * 200)
        else:
            gguf.fidelity(source, {"same": source}, "Once. " * 200)
    assert not (tmp_path / "out.gguf").exists()


@pytest.mark.field("own", "a signal told by a shell, by Windows, and one without a name")
@pytest.mark.parametrize(
    ("status", "words"),
    [
        (132, "was killed by SIGILL: it uses an instruction"),
        (137, "was killed by SIGKILL: most likely because memory"),
        (0xC000001D, "was killed by SIGILL"),
        (0xC0000005, "was killed by SIGSEGV"),
        (-60, "was killed by signal 60"),
        (255, "ended with status 255"),
    ],
)
@SHELL
def test_child_whose_signal_is_told_in_another_way(status, words):
    assert _machine.how_it_ended(status).startswith(words)


@pytest.mark.field("own", "a converter that ends well and leaves nothing, or half a file")
@pytest.mark.parametrize("left", [None, b"", b"GGUF", "half"])
def test_child_is_judged_by_what_it_left(left, trial, folder, tmp_path, monkeypatch):
    left = trial.read_bytes()[:2_000_000] if left == "half" else left
    script = "" if left is None else "open(out, 'wb').write(open('left', 'rb').read())"
    monkeypatch.chdir(tmp_path)
    if left is not None:
        Path("left").write_bytes(left)
    converter(monkeypatch, tmp_path / "source", script)
    with pytest.raises(ValueError, match=r"convert_hf_to_gguf\.py .*ended with status 0"):
        gguf.convert_model(folder, tmp_path / "out.gguf")
    assert not (tmp_path / "out.gguf").exists()


@SHELL
@pytest.mark.field("own", "a converter and a quantizer killed for memory, a half file left")
def test_child_that_was_killed_leaves_nothing(folder, tmp_path, monkeypatch):
    converter(
        monkeypatch,
        tmp_path / "source",
        "open(out, 'w').write('GGUF')\nos.kill(os.getpid(), signal.SIGKILL)",
    )
    with pytest.raises(RuntimeError, match="killed by SIGKILL: most likely because memory"):
        gguf.convert_model(folder, tmp_path / "out.gguf")
    full = 'head -c 99 "$1" > "$2"'
    monkeypatch.setenv(llamacpp.VARIABLE, str(programs(tmp_path / "bin", quantize=full)))
    with pytest.raises(ValueError, match="llama-quantize left no whole file"):
        gguf.quantize(gguf_file(tmp_path / "f16.gguf"), tmp_path / "out.gguf", "Q8_0")
    assert not (tmp_path / "out.gguf").exists()


@SHELL
@pytest.mark.field("own", "a program that ends well and has computed nothing")
def test_child_of_the_trial_must_compute(tmp_path):
    mute = programs(tmp_path / "mute", computes="true")
    assert "did not compute on a tiny file" in str(_trial.run(mute / "llama-imatrix"))
    wrong = programs(tmp_path / "wrong", computes="echo 'Final estimate: PPL = 312.7'")
    assert "PPL = 312.7" in str(_trial.run(wrong / "llama-imatrix"))
    good = programs(tmp_path / "good")
    assert str(_trial.run(good / "llama-imatrix")) == ""


@SHELL
@pytest.mark.field("own", "a measurement that ends well and says something else")
def test_child_without_a_matrix_is_no_short_text(trial, tmp_path, monkeypatch):
    mute = programs(tmp_path / "bin", imatrix="echo the disk is full")
    monkeypatch.setenv(llamacpp.VARIABLE, str(mute))
    with pytest.raises(ValueError, match="the disk is full"):
        gguf.imatrix(trial, tmp_path / "im.gguf", "Once. " * 200)


@SHELL
@pytest.mark.field("own", "a program that ended well and lost its last lines")
def test_child_that_lost_its_last_words_is_run_again(tmp_path):
    (tmp_path / "mumbles").write_text(
        "#!/bin/sh\necho x >> count\n[ $(wc -l < count) -lt 3 ] || echo 'PPL = 259.0'\n"
    )
    (tmp_path / "mumbles").chmod(0o755)
    done = _programs.run_until("PPL", [tmp_path / "mumbles"], cwd=tmp_path)
    assert done.stdout == "PPL = 259.0\n"
    assert (tmp_path / "count").read_text().count("x") == 3


@SHELL
@pytest.mark.field("own", "a server that dies while it answers")
def test_child_that_dies_while_answering_is_named(trial, monkeypatch):
    server = serving.LlamaServer(trial)
    server._process = subprocess.Popen(["sleep", "60"])

    def hang_up(*_, **__):
        server._process.kill()
        raise ConnectionResetError("the remote end hung up")

    monkeypatch.setattr(_rest, "ask", hang_up)
    with pytest.raises(RuntimeError, match=r"killed by SIGKILL.* while answering"):
        server.chat(QUESTION)


@SHELL
@pytest.mark.field("own", "Go that is killed, or cannot write its cache")
@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("kill -KILL $$", "killed by SIGKILL"),
        ("echo 'build cache is required' >&2; exit 1", "status 1 .*\n.*build cache"),
        ("printf '[\"half'", "status 0 before it had rendered"),
    ],
)
def test_child_go_is_no_verdict_on_the_template(script, words, tmp_path, monkeypatch):
    made = shipped()
    modelfile = serving.ollama_modelfile(made, "x.gguf")
    (tmp_path / "go").write_text(f"#!/bin/sh\n{script}\n")
    (tmp_path / "go").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    with pytest.raises(RuntimeError, match=f"`go run` .*{words}"):
        serving.template_parity(made, [QUESTION], modelfile=modelfile)


@pytest.mark.field("own", "weights that are no numbers after a diverged training")
@SERVES
def test_child_whose_figures_are_nan_is_read(trial, tmp_path):
    from gguf import GGUFReader

    broken = Path(shutil.copy(trial, tmp_path / "nan.gguf"))
    reader = GGUFReader(broken, "r+")
    next(t for t in reader.tensors if t.name == "output_norm.weight").data[:] = np.nan
    reader.data.flush()
    with pytest.raises(ValueError, match=r"nan\.gguf holds weights that are no numbers"):
        gguf.fidelity(broken, {"tiny": trial}, "Once upon a time. " * 20, context=32)


@pytest.mark.field("own", "an importance matrix of another model, and a model in its place")
def test_refused_importance_matrix(tmp_path):
    source = gguf_file(tmp_path / "f16.gguf")
    other = gguf_file(tmp_path / "other.gguf", "imatrix", "blk.0.attn_q.weight.in_sum2")
    for wrong in (other, source):
        with pytest.raises(ValueError, match=rf"{wrong.name}' was not measured on this model"):
            gguf.quantize(source, tmp_path / "out.gguf", "Q4_0", imatrix=wrong)


# ── folders that cannot become GGUF ──────────────────────────────────────────────────────
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 538090408\n"


def edit(name, change):
    def run(folder):
        content = json.loads((folder / name).read_text())
        change(content)
        (folder / name).write_text(json.dumps(content))

    return run


def write(name, text):
    return lambda folder: (folder / name).write_text(text)


def more_tokens(folder):
    made = byte_tokenizer()
    made.add_tokens(["<a>", "<b>"])
    made.save_pretrained(folder)


def shard(folder):
    index = {"metadata": {}, "weight_map": {"x": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def cut(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


SPOILED = {
    "more tokens than rows": (more_tokens, r"302 tokens and the model 300 rows.*prepare_model"),
    "config.json cut short": (write("config.json", '{"model_'), r"config\.json' is no JSON"),
    "tokenizer.json cut short": (write("tokenizer.json", "{"), r"tokenizer\.json' is no JSON"),
    "weights a Git LFS pointer": (write("model.safetensors", POINTER), "Git LFS pointer.*lfs pull"),
    "tokenizer a Git LFS pointer": (write("tokenizer.json", POINTER), "Git LFS pointer"),
    "weights cut short": (cut, "model.safetensors' is cut short or damaged"),
    "a shard missing": (shard, r"has no model-00001-of-00002\.safetensors"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "has no weights"),
    "no architectures": (
        edit("config.json", lambda c: c.pop("architectures")),
        'no "architectures".*LlamaForCausalLM',
    ),
}


@pytest.mark.field(
    "llama.cpp#6111, h2o-llmstudio#297, transformers#27923, DeepSeek-V3#557",
    "folders with too many tokens, an LFS pointer, a broken config",
)
@pytest.mark.parametrize("what", SPOILED)
def test_refused_folder_says_what_is_wrong_with_it(what, folder, tmp_path):
    spoil, words = SPOILED[what]
    spoil(folder)
    with pytest.raises(ValueError, match=words):
        gguf.convert_model(folder, tmp_path / "out.gguf")


@pytest.mark.field(
    "transformers#37011, llama.cpp#12876", "an id without a row beside a tokenizer.model"
)
def test_kept_folder_with_a_spare_id_and_other_files(folder):
    more_tokens(folder)
    (folder / "tokenizer.model").write_bytes(b"")
    (folder / "predictions.json").write_text('{"a": 1}\n{"a": 2}\n')
    _folders.check_model(folder)


@pytest.mark.field("llama.cpp#8649, llama.cpp#22700", "an unknown pre-tokenizer")
def test_refused_pre_tokenizer_has_a_cure(folder, tmp_path, monkeypatch):
    raised = "raise NotImplementedError('BPE pre-tokenizer was not recognized - update x')"
    converter(monkeypatch, tmp_path / "source", raised)
    with pytest.raises(ValueError, match=r"cuts a text into words.*Take the base's own tokenizer"):
        gguf.convert_model(folder, tmp_path / "out.gguf")


@pytest.mark.slow
@pytest.mark.field("llama.cpp#8649", "both refusals, by the real converter")
def test_refused_by_the_real_converter(folder, tmp_path):
    made = models.load_tokenizer(models.EMBEDDED)
    made.backend_tokenizer.pre_tokenizer = None
    llama(64, 64, vocab_size=len(made)).save_pretrained(tmp_path / "bpe")
    made.save_pretrained(tmp_path / "bpe")
    with pytest.raises(ValueError, match="cuts a text into words"):
        gguf.convert_model(tmp_path / "bpe", tmp_path / "out.gguf")
    llama(64, 64, vocab_size=320).save_pretrained(folder)
    with pytest.raises(ValueError, match=r"300 tokens and the embedding 320 rows"):
        gguf.convert_model(folder, tmp_path / "out.gguf")
    assert not (tmp_path / "out.gguf").exists()


# ── adapters that are more than low-rank pairs ───────────────────────────────────────────
def adapter(path, base=None, **settings):
    from peft import LoraConfig, get_peft_model

    settings = {"r": 4, "target_modules": ["q_proj", "down_proj"]} | settings
    model = get_peft_model(base or llama(64, 64), LoraConfig(**settings))
    model.save_pretrained(path)
    return model


@pytest.mark.field("own", "an adapter that begins by changing its base")
@pytest.mark.parametrize(
    "start", ["pissa", "pissa_niter_4", "olora", "OLoRA", "corda", "loftq", "lora_ga", "later"]
)
def test_refused_beginning_that_changes_the_base(start, saved, tmp_path):
    real = start in ("pissa", "pissa_niter_4", "olora", "OLoRA")
    adapter(tmp_path / "a", **({"init_lora_weights": start} if real else {}))
    if not real:  # they want data or packages
        edit("adapter_config.json", lambda c: c.update(init_lora_weights=start))(tmp_path / "a")
    with pytest.raises(ValueError, match=f"init_lora_weights='{start}'.*weight_conversion"):
        gguf.convert_adapter(tmp_path / "a", saved, tmp_path / "out.gguf")


@pytest.mark.field("own", "beginnings that leave the base as it is")
@pytest.mark.parametrize("start", [True, False, "gaussian", "orthogonal", "mica"])
def test_kept_beginning_that_leaves_the_base(start, saved, tmp_path):
    before = llama(64, 64).model.layers[0].self_attn.q_proj.weight
    tuned = adapter(tmp_path / "a", init_lora_weights=start)
    layer = tuned.base_model.model.model.layers[0].self_attn.q_proj.base_layer
    assert torch.equal(layer.weight, before)
    assert _folders.check_adapter(tmp_path / "a", saved) is None


@pytest.mark.slow
@pytest.mark.field("own", "PiSSA and OLoRA, converted to plain LoRA by PEFT")
@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_kept_converted_beginning_serves_what_peft_answers(start, saved, tmp_path):
    from gguf import GGUFReader
    from peft import LoraConfig, get_peft_model

    settings = {"r": 4, "target_modules": ["q_proj"], "init_lora_weights": start}
    tuned = get_peft_model(llama(64, 64), LoraConfig(**settings))
    tuned.peft_config["default"].init_lora_weights = True
    tuned.save_pretrained(tmp_path / "begin")
    tuned.peft_config["default"].init_lora_weights = start
    layer = tuned.base_model.model.model.layers[0].self_attn.q_proj
    torch.nn.init.normal_(layer.lora_B["default"].weight)
    tuned.save_pretrained(
        tmp_path / "a", path_initial_model_for_weight_conversion=str(tmp_path / "begin")
    )
    file = gguf.convert_adapter(tmp_path / "a", saved, tmp_path / "a.gguf", dtype="f32")
    scale = gguf.inspect(file).metadata["adapter.lora.alpha"]
    pair = {t.name[-1]: torch.tensor(t.data.copy()) for t in GGUFReader(file).tensors}
    rank = pair["a"].shape[0]
    # llama.cpp keeps the two halves of each head's rotation apart.
    moved = (pair["b"] @ pair["a"] * scale / rank).view(4, 8, 2, 64).transpose(1, 2)
    wanted = layer.base_layer.weight + layer.get_delta_weight("default")
    wanted = wanted - llama(64, 64).model.layers[0].self_attn.q_proj.weight
    assert torch.allclose(moved.reshape(64, 64), wanted, atol=1e-5)


UNKNOWN = {
    "use_qalora": True,
    "kasa_config": {"beta": 1},
    "arrow_config": {"top_k": 3},
    "layer_replication": [[0, 1], [0, 1]],
    "target_parameters": ["experts.w1"],
    "a_field_of_next_year": 1,
}


@pytest.mark.field("own", "settings of LoRA that the GGUF of an adapter cannot say")
@pytest.mark.parametrize("field", UNKNOWN)
def test_refused_setting_of_an_adapter_is_named(field, saved, tmp_path):
    adapter(tmp_path / "a")
    edit("adapter_config.json", lambda c: c.update({field: UNKNOWN[field]}))(tmp_path / "a")
    with pytest.raises(ValueError, match=f"has {field}: .*nothing else. Merge it instead"):
        gguf.convert_adapter(tmp_path / "a", saved, tmp_path / "out.gguf")


@pytest.mark.field("own", "an adapter of another kind, a pointer, a broken config")
def test_refused_adapter_of_another_kind(saved, tmp_path):
    from peft import IA3Config, get_peft_model

    settings = {"target_modules": ["q_proj"], "feedforward_modules": []}
    get_peft_model(llama(64, 64), IA3Config(**settings)).save_pretrained(tmp_path / "ia3")
    with pytest.raises(ValueError, match=r"of the type IA3, and llama.cpp knows LoRA only"):
        gguf.convert_adapter(tmp_path / "ia3", saved, tmp_path / "out.gguf")
    adapter(tmp_path / "a")
    (tmp_path / "a" / "adapter_model.safetensors").write_text(POINTER)
    with pytest.raises(ValueError, match="Git LFS pointer"):
        gguf.convert_adapter(tmp_path / "a", saved, tmp_path / "out.gguf")
    (tmp_path / "a" / "adapter_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"adapter_config\.json' is no JSON"):
        gguf.convert_adapter(tmp_path / "a", saved, tmp_path / "out.gguf")


@pytest.mark.field(
    "peft#2018, peft#2777, llama.cpp#11554",
    "LoRA on a tied head or embedding",
)
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
@pytest.mark.parametrize("tied", [True, False])
def test_refused_pair_on_a_tied_head_is_not_sent_to_merging(target, tied, saved, tmp_path):
    base, settings = saved, {"target_modules": ["q_proj", target]}
    if not tied:
        base = tmp_path / "untied"
        llama(64, 64, tie_word_embeddings=False).save_pretrained(base)
    adapter(tmp_path / "a", llama(64, 64, tie_word_embeddings=tied), **settings)
    with pytest.raises(ValueError, match="holds") as error:
        gguf.convert_adapter(tmp_path / "a", base, tmp_path / "out.gguf")
    said = str(error.value)
    assert ("Merge it instead" in said) is not tied
    assert ("nor merged" in said and "modules_to_save" in said) is tied


# ── Ollama's Modelfiles ──────────────────────────────────────────────────────────────────
@functools.cache
def embedded_tokenizer():
    made = models.load_tokenizer(models.EMBEDDED)
    return made, made.chat_template


def shipped(name=None, special=(), eos=None):
    """The embedded tokenizer with a chat template that TRL ships, one of ours, or its own."""
    made, own = embedded_tokenizer()
    made.chat_template = own
    if special:
        made = models.load_tokenizer(models.EMBEDDED)
        made.add_tokens(list(special), special_tokens=True)
        made.eos_token = eos
    if name is not None:
        path = Path(trl.__file__).with_name("chat_templates") / f"{name}.jinja"
        made.chat_template = name if "{" in name else path.read_text("utf-8")
    return made


DATED = "{{ strftime_now('%Y') }}{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"


@pytest.mark.field("sglang#3296, unsloth#881", "a template that writes today's date")
@pytest.mark.parametrize("name", ["llama3_2", "gptoss", "muse_glimmer", DATED])
def test_refused_template_that_writes_the_date(name):
    made = shipped(name)
    with pytest.raises(ValueError, match=r"writes today's date.*re.sub") as error:
        serving.ollama_modelfile(made, "x.gguf")
    cure = re.search(r"tokenizer\.chat_template = (re\.sub\(.*\))", str(error.value))[1]
    made.chat_template = eval(cure, {"re": re, "tokenizer": made})
    assert "26 Jul 2024" in serving.ollama_modelfile(made, "x.gguf")


@pytest.mark.field("sglang#3296", "the date of today in a comparison")
def test_each_day_has_another_prompt_and_the_report_says_so():
    modelfile = serving.ollama_modelfile(shipped(), "x.gguf")
    report = serving.template_parity(shipped("llama3_2"), [QUESTION], modelfile=modelfile)
    assert "not compared: prompts of another day" in str(report)
    report = serving.template_parity(shipped("llama3_1"), [QUESTION], modelfile=modelfile)
    assert "another day" not in str(report)


HARMONY = ("<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|return|>")


@pytest.mark.field("ollama#17939", "a stop word that each answer begins with")
def test_each_stop_word_ends_an_answer_and_begins_none():
    made = shipped("gptoss", HARMONY, "<|return|>")
    # With thoughts first, an answer has <|end|> and <|start|> in its middle as well.
    assert _anatomy.stop_words(made) == ["<|return|>"]
    made.chat_template = re.sub(r"strftime_now\([^)]*\)", "'2024'", made.chat_template)
    for stop in ("<|message|>", "<|channel|>", "final"):
        with pytest.raises(ValueError, match=r"parameters\['stop'\].*cut it to nothing"):
            serving.ollama_modelfile(made, "x.gguf", parameters={"stop": [stop]})
    good = serving.ollama_modelfile(made, "x.gguf")
    report = serving.template_parity(
        made, [QUESTION], modelfile=good + 'PARAMETER stop "<|message|>"\n'
    )
    assert "cutting_stop" in report.codes and "<|message|>" in str(report)
    assert "cutting_stop" not in serving.template_parity(made, [QUESTION], modelfile=good).codes


THOUGHTS = (
    *("qwen3", "qwen3_5_think", "qwen3_5_nothink", "qwen3_6", "deepseek_r1_distill"),
    *("deepseekv3", "glm4moe", "nemotron_3_nano", "gemma4", "lfm2_2_5"),
    "{% for m in messages %}[{{ m.role }}]{{ m.content.split('[/THINK]')[-1] }}{% endfor %}",
    "{% for m in messages %}[{{ m.role }}]{% if '<seed:think>' in m.content and m.role !="
    " 'user' %}{{ m.content.split('</seed:think>')[-1] }}{% else %}{{ m.content }}{% endif %}"
    "{% endfor %}",
)


@pytest.mark.field("own", "templates that strip the thoughts of earlier answers")
@pytest.mark.parametrize("name", THOUGHTS)
def test_refused_template_that_strips_thoughts(name):
    with pytest.raises(ValueError, match="strips the thoughts of earlier answers"):
        serving.ollama_modelfile(shipped(name), "x.gguf")


ODD = [
    [message("system", ""), *QUESTION],
    [message("system", ""), *QUESTION, message("assistant", "Ho."), *QUESTION],
    [*QUESTION, message("assistant", "Ho."), message("system", "Late."), *QUESTION],
    [message("system", "One."), message("system", "Two."), *QUESTION],
    [*QUESTION, message("assistant", None), message("tool", "4 degrees"), *QUESTION],
    [message("system", "Be."), *QUESTION, message("tool", "4"), message("tool", "5"), *QUESTION],
    [*QUESTION, message("user", "Well?"), message("assistant", ""), message("user", "")],
]
SYSTEMS = ("cohere", "gemma3", "lfm2", "llama3", "phi3_5", "qwen2_5", "qwen3_8")


@GO
@pytest.mark.field("own", "an empty system message")
@pytest.mark.parametrize("name", SYSTEMS)
def test_each_empty_system_message_is_said_as_in_training(name):
    made = shipped(name)
    modelfile = serving.ollama_modelfile(made, "x.gguf")
    report = serving.template_parity(made, ODD[:2], modelfile=modelfile)
    assert report.exact, str(report)


@GO
@pytest.mark.field("sglang#892", "tool messages, late system messages, two users in a row")
@pytest.mark.parametrize("name", ["gemma", "phi3_5", "qwen2_5"])
def test_each_odd_talk_is_rendered_as_go_renders_it(name):
    made = shipped(name)
    modelfile = serving.ollama_modelfile(made, "x.gguf")
    parsed = _anatomy.parse_template(made)
    told = [message("system", parsed.default)] if parsed.default is not None else []
    rendered = serving.parity._render_in_go(modelfile, ODD)
    for talk, text in zip(ODD, rendered, strict=True):
        begins = talk[0]["role"] == "system"
        assert text == parsed.render(talk if begins else [*told, *talk])
        assert "4 degrees" not in text and "Late." not in text
        assert text.count("Hi?") == sum(each["content"] == "Hi?" for each in talk)
    lost = "system messages." if name == "gemma" else "system messages after the first."
    assert f"# Ollama drops what TEMPLATE does not say: tool calls, tool messages, {lost}" in (
        modelfile.splitlines()
    )


@pytest.mark.field("own", "a talk that the tokenizer's own template refuses")
def test_refused_talk_is_numbered():
    made = shipped("gemma")
    talks = [QUESTION, [message("system", "Be."), *QUESTION]]
    with pytest.raises(ValueError, match=r"conversations\[1\]: .*System role not supported"):
        serving.template_parity(made, talks, modelfile="FROM x")


@pytest.mark.field("own", "NaN, nothing, several stops, texts that a Modelfile cannot hold")
@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        ({"parameters": {"temperature": math.nan}}, ValueError, r"\['temperature'\].*finite.*nan"),
        ({"parameters": {"top_p": math.inf}}, ValueError, r"\['top_p'\].*finite.*inf"),
        ({"parameters": {"top_k": [1, 2]}}, TypeError, r"\['top_k'\].*number or text"),
        ({"parameters": {"stop": [["a"]]}}, TypeError, r"\['stop'\].*number or text"),
        ({"parameters": {"stop": ""}}, ValueError, r"\['stop'\]"),
        ({"parameters": {"stop": 'a"""b'}}, ValueError, r"\['stop'\]"),
        ({"parameters": {"stop": "a\u200bb"}}, ValueError, "invisible"),
        ({"parameters": {"two words": 1}}, ValueError, "letters, digits and _"),
        ({"source": ""}, ValueError, "source must be"),
        ({"source": None}, ValueError, "source must be"),
        ({"source": "a\nSYSTEM b"}, ValueError, "source must be"),
        ({"adapter": ""}, ValueError, "adapter must be"),
    ],
)
def test_refused_in_a_modelfile(given, error, words):
    made = shipped()
    with pytest.raises(error, match=words):
        serving.ollama_modelfile(made, **{"source": "x.gguf"} | given)


@pytest.mark.field("own", "several stop words, numbers of NumPy")
def test_each_stop_word_gets_its_line():
    made = shipped()
    settings = {"stop": ["###", "\n\n", 'say "no" more', "<|im_end|>"], "top_p": np.float32(0.5)}
    settings |= {"num_ctx": np.int64(64), "use_mmap": False}
    text = serving.ollama_modelfile(made, "my model.gguf", parameters=settings)
    assert serving.parity._fields(text)["stop"] == [
        *("<|im_end|>", "<|im_start|>", "###", "\n\n", 'say "no" more')
    ]
    assert "PARAMETER top_p 0.5\nPARAMETER num_ctx 64\nPARAMETER use_mmap false\n" in text


@pytest.mark.field("own", "a template with a character that Ollama's parser drops")
@pytest.mark.parametrize("odd", ["\u200b", "\u00a0"])
def test_refused_template_with_an_invisible_character(odd):
    made = shipped()
    made.chat_template = "{% for m in messages %}[{{ m.role }}]ODD{{ m.content }}{% endfor %}"
    made.chat_template = made.chat_template.replace("ODD", odd)
    with pytest.raises(ValueError, match=r"invisible characters are dropped.*raw"):
        serving.ollama_modelfile(made, "x.gguf")


@pytest.mark.field("own", "a template that writes what Go's engine would run")
@pytest.mark.parametrize("odd", ["{{", "x{"])
def test_refused_template_that_writes_braces(odd):
    template = "{% for m in messages %}<{{ m.role }}>{{ 'ODD' }}{{ m.content }}{% endfor %}"
    made = shipped(template.replace("ODD", odd))
    with pytest.raises(ValueError, match=r"writes \{\{, which Go reads.*raw"):
        serving.ollama_modelfile(made, "x.gguf")


@pytest.mark.field("own", "a template that trims system and question as one text (Llama 2's way)")
def test_kept_template_that_trims_both_together():
    made = shipped(
        "{% set ns = namespace(s='') %}{% for m in messages %}{% if m.role == 'system' %}"
        "{% set ns.s = '<<SYS>>' + m.content + '<</SYS>>\n\n' %}{% elif m.role == 'user' %}"
        "[INST] {{ (ns.s + m.content).strip() }} [/INST]{% set ns.s = '' %}"
        "{% else %} {{ m.content }} {{ eos_token }}{% endif %}{% endfor %}"
    )
    assert "[INST]" in serving.ollama_modelfile(made, "x.gguf")


@pytest.mark.field("own", "a LICENSE whose lines begin like commands")
def test_each_license_is_one_text():
    text = 'FROM x\nLICENSE """GPL\n   system (if any) on which it runs\n"""\nSYSTEM "Be kind."\n'
    assert serving.parity._fields(text)["system"] == ["Be kind."]


@GO
@pytest.mark.field("own", "a Modelfile in Ollama's other spellings")
@pytest.mark.parametrize(
    "text",
    [
        'from x\ntemplate "{{ range .Messages }}{{ .Role }}{{ end }}"\nparameter stop {stop}\n',
        'TEMPLATE {{ range .Messages }}{{ .Role }}{{ end }}\nPARAMETER  stop "{stop}"\n',
        '  TEMPLATE """{{ range .Messages }}{{ .Role }}{{ end }}"""\nPARAMETER stop """{stop}"""',
    ],
)
def test_each_spelling_of_a_modelfile_is_read(text):
    made = shipped()
    made.chat_template = "{% for m in messages %}{{ m.role }}{% endfor %}"
    text = text.replace("{stop}", made.eos_token)
    with_order = text + '\nSYSTEM "Be brief."\n'
    for modelfile, prompt in ((text, "user"), (with_order, "systemuser")):
        assert serving.parity._render_in_go(modelfile, [QUESTION]) == [prompt]
        assert serving.parity._fields(modelfile)["stop"] == [made.eos_token]


# ── the server and its answers ───────────────────────────────────────────────────────────
@pytest.mark.field("own", "no token of context, no slot, a model in the adapter's place")
def test_refused_before_the_server_starts(trial, tmp_path):
    for name in ("context", "slots"):
        for value in (0, -5):
            with pytest.raises(ValueError, match=f"{name} must be at least 1, not {value}"):
                serving.LlamaServer(trial, **{name: value})
        with pytest.raises(TypeError, match=f"{name} must be a whole number"):
            serving.LlamaServer(trial, **{name: 1.5})
    for template in ("", "template.jinja"):
        with pytest.raises(ValueError, match="template must be the text of a Jinja template"):
            serving.LlamaServer(trial, template=template)
    with pytest.raises(ValueError, match=r"max_tokens must be at least 1, not -1"):
        serving.LlamaServer(trial).chat(QUESTION, max_tokens=-1)
    lora = gguf_file(tmp_path / "lora.gguf", "adapter", "blk.0.attn_q.weight.lora_a")
    with pytest.raises(ValueError, match=r"model=.*is a file of the type 'adapter'"):
        serving.LlamaServer(lora)
    with pytest.raises(ValueError, match=r"adapter=.*is a file of the type 'model'"):
        serving.LlamaServer(gguf_file(tmp_path / "a.gguf"), adapter=gguf_file(tmp_path / "b.gguf"))


class Answers(BaseHTTPRequestHandler):
    """A server that answers each POST with the same text."""

    text = ""

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.end_headers()
        self.wfile.write(self.text.encode())

    def log_message(self, *_):
        return


@pytest.fixture
def says():
    server = HTTPServer(("127.0.0.1", 0), Answers)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()

    def prepare(text):
        Answers.text = text if isinstance(text, str) else json.dumps(text)
        return f"http://127.0.0.1:{server.server_port}"

    yield prepare
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.field("own", "a stream asked for where an answer is returned whole")
def test_refused_stream_is_named(trial, says):
    url = says('data: {"choices": []}\n\n')
    with pytest.raises(ValueError, match=r"stream=True: .*'data: '"):
        serving.ollama_chat("yoda", QUESTION, address=url, stream=True)
    server = serving.LlamaServer(trial)
    server._process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        for ask in (server.chat, server.complete):
            with pytest.raises(ValueError, match="stream=True: "):
                ask("Hi" if ask == server.complete else QUESTION, stream=True)
    finally:
        server._process.communicate(b"\n")
    with pytest.raises(ConnectionError, match="answered, but no JSON: 'data: "):
        _rest.ask(url, {})


@pytest.mark.field("own", "an answer that is thoughts or a call of a tool alone")
@pytest.mark.parametrize("field", ["thinking", "reasoning_content", "tool_calls"])
def test_refused_answer_without_text_says_what_it_has(field, says):
    url = says({"message": {"role": "assistant", "content": "", field: ["Hmm"]}})
    with pytest.raises(ValueError, match=f"no text, only {field}: .*Hmm.*more tokens"):
        serving.ollama_chat("yoda", QUESTION, address=url)
    url = says({"message": {"role": "assistant", "content": "", field: None}})
    assert serving.ollama_chat("yoda", QUESTION, address=url) == ""


THINKS = (
    "{% for m in messages %}{% if m.role == 'assistant' %}<|a|>{% if m.reasoning_content %}"
    "<think>\n{{ m.reasoning_content }}\n</think>\n\n{% endif %}{{ m.content }}<|e|>"
    "{% else %}<|{{ m.role }}|>{{ m.content }}<|e|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|a|><think>\n{% endif %}"
)


@SERVES
@pytest.mark.field("own", "a template that opens a thought, an answer cut inside an emoji")
def test_each_answer_is_all_that_the_model_wrote(trial):
    only_a = {"logit_bias": [[3 + ord("a"), 100]]}
    with serving.LlamaServer(trial, context=64, slots=1, template=THINKS) as server:
        assert server.chat(QUESTION, max_tokens=5, **only_a) == "<think>\naaaaa"
        whole = {"grammar": 'root ::= "ok\\n</think>\\n\\nyes"'}
        assert server.chat(QUESTION, **whole) == "<think>\nok\n</think>\n\nyes"
        assert server.chat(QUESTION, reasoning_format="auto", **whole) == "yes"
        with pytest.raises(ValueError, match=r"only reasoning_content: 'aaaaa'.*more tokens"):
            server.chat(QUESTION, max_tokens=5, reasoning_format="auto", **only_a)
        emoji = {"grammar": 'root ::= "👩‍🚀 \ufffd"'}
        for tokens, text in ((1, ""), (4, "👩"), (5, "👩"), (8, "👩\u200d"), (40, "👩‍🚀 \ufffd")):
            assert server.complete("x", max_tokens=tokens, **emoji) == text
        for stop in ("no", ["no", "never"]):
            on_and_no = {"grammar": 'root ::= "on and no"', "stop": stop}
            assert server.complete("x", **on_and_no) == "on and "
        with pytest.raises(TypeError, match="prompt must be one text or its token ids"):
            server.complete(["a", "b"])
        with pytest.raises(ConnectionError, match="HTTP 400"):
            server.complete("much too long " * 40)
