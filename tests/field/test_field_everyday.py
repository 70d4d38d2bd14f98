"""Inputs from the field for the everyday tools: judging, generating, reading, loading, running."""

import copy
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import bitsandbytes.functional
import chat_families
import nbformat
import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers.processors import TemplateProcessing
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

from helpers import _downloads, _origins, chat, data, evaluation, generation, models, runtime, speed
from helpers.__main__ import main
from helpers.course import notebooks, places

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 538090408\n"


def said(role, content, **more):
    return {"role": role, "content": content, **more}


USER, ANSWER = said("user", "The tea is hot."), said("assistant", "Hot, the tea is.")
CALL = said("assistant", "", tool_calls=[{"function": {"name": "kettle", "arguments": {}}}])


@pytest.fixture(scope="module")
def template():
    """The embedded tokenizer with a pad token, to be read only."""
    return chat.prepare_tokenizer(models.load_tokenizer(models.EMBEDDED))


@pytest.fixture
def tiny(template):
    """A random model with 40 learned positions for the embedded tokenizer."""
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    sizes = {"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 40}
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=len(template), **sizes, **ids)).eval()


# ── judging ──────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"messages": [USER, ANSWER, USER]}, r"\['user', 'assistant'\] and then \['user'"),
        ({"prompt": [USER], "completion": [ANSWER, USER, ANSWER]}, "one answer, with all that"),
        ({"prompt": [USER, ANSWER], "completion": [ANSWER]}, "one answer, with all that"),
        ({"prompt": [USER], "completion": []}, r"and then \[\]"),
        ({"prompt": [], "completion": [ANSWER]}, "a question and one answer"),
        ({"messages": []}, "a question and one answer"),
        ({"prompt": [USER], "completion": "Ho"}, "message lists, not plain text"),
        ({"prompt": "Hi", "completion": [ANSWER]}, "message lists, not plain text"),
        ({"prompt": [USER], "completion": [said("assistant", None)]}, "message 1 has no text"),
        ({"prompt": [USER], "completion": [said("assistant", " ")]}, "must be text alone"),
        ({"prompt": [USER], "completion": [CALL]}, "must be text alone"),
        (
            {"messages": [USER, said("assistant", "Ho", reasoning_content="Hm")]},
            "must be text alone",
        ),
        ({"messages": [{"from": "human", "value": "Hi"}, ANSWER]}, "message 0 has no 'role'"),
        ({"messages": [USER, said("model", "Ho")]}, r"then \['model'\]"),
        ({"sentence": None, "translation": "x"}, "needs columns"),
        ("train", "but is train"),
    ],
)
@pytest.mark.field("trl#3279, trl#4922", "rows whose last message is not the one answer")
def test_each_row_is_one_question_and_its_answer(row, words):
    good = {"prompt": [USER], "completion": [ANSWER]}
    with pytest.raises(ValueError, match=f"dataset, row 1: .*{words}"):
        evaluation.evaluate(None, None, [good, row])


@pytest.mark.field("trl#3279, trl#4922", "talks of several turns, tools and all three forms")
def test_each_row_is_judged_by_its_own_form(monkeypatch):
    earlier = [said("system", "Speak."), said("user", "A"), said("assistant", "B")]
    empty = dict.fromkeys(("prompt", "completion", "messages", "sentence", "translation"))
    rows = [
        empty | {"messages": [*earlier, USER, ANSWER]},
        empty | {"prompt": [USER, CALL, said("tool", "90 degrees")], "completion": [ANSWER]},
        empty | {"sentence": "The tea is hot.", "translation": "Hot, the tea is."},
    ]
    asked = []

    def parrot(model, tokenizer, prompts, **_):
        asked.extend(prompts)
        return ["Hot, the tea is."] * len(prompts)

    monkeypatch.setattr(evaluation, "generate", parrot)
    report = evaluation.evaluate(None, None, rows, max_new_tokens=9)
    assert asked == [[*earlier, USER], rows[1]["prompt"], [USER]], "all that stands before"
    assert report.exact_match == report.valid_order == 100.0
    assert {example.sentence for example in report.examples} == {"The tea is hot."}


@pytest.mark.field("own", "a text, or a list with None, where lists of texts are compared")
def test_each_judged_answer_is_a_text():
    for given in (("ab", "ab", "ab"), (["a"], ["a"], [None]), (["a"], ["a"], [["a"]])):
        with pytest.raises(TypeError, match="lists of texts"):
            evaluation.judge(*given)


# ── generating ───────────────────────────────────────────────────────────────────────────
@pytest.mark.field("unsloth#881, ollama#8363", "a list of talks and plain texts, Llama 3")
def test_each_text_gets_its_own_bos():
    made = chat.prepare_tokenizer(chat_families.tokenizer("llama-3"))
    talk = generation.chat_prompt(made, "Hi")
    for texts in (["Hi", talk], [talk, "A plain text that is longer than the talk " * 3]):
        assert [generation._ids(made, t).count(made.bos_token_id) for t in texts] == [1, 1]
    tiny = LlamaConfig(hidden_size=32, intermediate_size=32, num_hidden_layers=1)
    model = LlamaForCausalLM(tiny).eval()
    chat.prepare_model(model, made)
    settings = {"max_new_tokens": 1, "response_only": False, "skip_special_tokens": False}
    shown = generation.generate(model, made, ["Hi", talk], **settings)
    assert [text.count(made.bos_token) for text in shown] == [1, 1]


@pytest.mark.parametrize("single", ["<s> $A </s>", "[gMASK] <s> $A"])
@pytest.mark.field("own", "a tokenizer that adds EOS behind a text, or two tokens in front")
def test_each_text_begins_once_and_is_left_open(tokenizer, single):
    extra = ["<s>", "</s>", "[gMASK]"]
    tokenizer.add_special_tokens({"additional_special_tokens": extra})
    ids = dict(zip(extra, tokenizer.convert_tokens_to_ids(extra), strict=True))
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=single, special_tokens=list(ids.items())
    )
    front = [ids[token] for token in single.partition("$")[0].split()]
    plain = tokenizer("Hi", add_special_tokens=False)["input_ids"]
    assert generation._ids(tokenizer, "Hi") == front + plain
    written = "".join(single.partition(" $")[0].split()) + "Hi"
    assert generation._ids(tokenizer, written) == front + plain


@pytest.mark.field("own", "a batch for a tokenizer without a pad token, or with EOS for it")
def test_each_answer_ends_at_its_own_end(tiny, tokenizer):
    prompts = ["One, two,", "A"]
    settings = {"max_new_tokens": 6, "response_only": False, "skip_special_tokens": False}
    alone = [generation.generate(tiny, tokenizer, p, **settings) for p in prompts]
    ends = tokenizer(alone[1])["input_ids"][2]
    tiny.generation_config.eos_token_id = ends  # the second ends after one or two tokens
    alone = [generation.generate(tiny, tokenizer, p, **settings) for p in prompts]
    for pad in (tokenizer.eos_token, None):
        tokenizer.pad_token = pad
        assert generation.generate(tiny, tokenizer, prompts, **settings) == alone


@pytest.mark.field("own", "a model with some modules in training mode and some not")
def test_each_module_gets_its_mode_back(tiny, template):
    tiny.train()
    tiny.transformer.drop.eval()
    generation.generate(tiny, template, "Hi", max_new_tokens=1)
    assert tiny.training and tiny.lm_head.training and not tiny.transformer.drop.training


@pytest.mark.parametrize("kind", ["gpt2", "opt", "rotary"])
@pytest.mark.field("own", "more tokens than the model has positions: GPT-2, OPT, Llama")
def test_refused_more_positions_than_the_model_has(tiny, template, kind):
    if kind == "opt":
        sizes = {"hidden_size": 32, "ffn_dim": 32, "word_embed_proj_dim": 32}
        heads = {"num_hidden_layers": 1, "num_attention_heads": 2}
        config = OPTConfig(max_position_embeddings=40, vocab_size=len(template), **sizes, **heads)
        tiny = OPTForCausalLM(config)
    elif kind == "rotary":
        sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
        config = LlamaConfig(max_position_embeddings=40, vocab_size=len(template), **sizes)
        tiny = LlamaForCausalLM(config)
    long = " tea" * 38
    assert len(template(long)["input_ids"]) == 38
    with pytest.raises(ValueError, match=r"one of 38 tokens, .*=4 needs 41 pos.* 40\."):
        generation.generate(tiny, template, ["Hi", long], max_new_tokens=4)
    assert len(generation.generate(tiny, template, ["Hi", long], max_new_tokens=3)) == 2
    assert generation.generate(tiny, template, []) == []


@pytest.mark.parametrize(
    ("prompts", "words"),
    [
        ([{"role": "user"}], "number 0: message 0 has no text in 'content': {'role': 'user'}"),
        (["Hi", [USER, {"role": "user"}]], "number 1: message 1 has no text"),
        ([said("user", None)], "message 0 has no text"),
        ([said("user", [{"type": "text", "text": "Hi"}])], "message 0 has no text"),
        ([{"content": "Hi"}], "message 0 has no 'role'"),
        ([USER, "Hi"], "message 1 is no dictionary"),
        (["Hi", USER], "message 0 is no dictionary"),
        ([USER, CALL], "leaves out 'kettle', of message 1"),
    ],
)
@pytest.mark.field("own", "conversations whose messages lack a role, a text or a place")
def test_each_message_has_a_role_and_a_text(template, prompts, words):
    with pytest.raises(ValueError, match=words):
        generation.generate(None, template, prompts)


@pytest.mark.field("own", "a tool's result of two lines, which the template writes as JSON")
def test_kept_a_result_that_is_written_as_json(tokenizer):
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content | tojson }}{% endfor %}"
    )
    text = generation.chat_prompt(tokenizer, [USER, said("tool", "4 degrees\n\train")])
    assert text.endswith('"4 degrees\\n\\train"')


@pytest.mark.field("own", "a template that has no place for a system message, or rejects it")
def test_refused_a_message_that_the_template_leaves_out(tokenizer):
    talk = [said("system", "Whisper."), USER]
    tokenizer.chat_template = (
        "{% for m in messages if m.role != 'system' %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    )
    with pytest.raises(ValueError, match=r"leaves out 'Whisper[.]', of message 0 .*'system'"):
        generation.chat_prompt(tokenizer, talk)
    thought = said("assistant", "<think>Hm.</think>\n\nHot, the tea is.")
    assert "Hot, the tea" in generation.chat_prompt(tokenizer, [USER, thought, USER])
    tokenizer.chat_template = "{{ raise_exception('System role not supported') }}"
    with pytest.raises(ValueError, match="rejects the conversation: System role not"):
        generation.chat_prompt(tokenizer, talk)


@pytest.mark.field("own", "numbers of NumPy, truth values, a column of a dataset, a tuple")
def test_each_number_and_list_is_taken_for_what_it_is(tiny, template):
    answers = generation.generate(tiny, template, ["Hi", "A"], max_new_tokens=np.int64(3))
    column = Dataset.from_dict({"text": ["Hi", "A"]})["text"]
    sizes = {"max_new_tokens": 3, "batch_size": np.int64(1)}
    assert generation.generate(tiny, template, column, **sizes) == answers
    alone = generation.generate(tiny, template, [USER], max_new_tokens=2)
    assert generation.generate(tiny, template, (USER,), max_new_tokens=2) == alone
    for name in ("max_new_tokens", "batch_size"):
        with pytest.raises(TypeError, match=f"{name} must be a whole number, not True"):
            generation.generate(tiny, template, "Hi", **{name: True})
    with pytest.raises(TypeError, match="seed must be a whole number, not True"):
        runtime.start(True)
    with pytest.raises(ValueError, match="seed must be from 0 to 4294967295, not -1"):
        runtime.start(-1)
    with pytest.raises(ValueError, match="min_run_time"):
        speed.benchmark(len, "", min_run_time=True)
    assert speed.benchmark(len, "", min_run_time=np.float32(1e-3), rounds=1).calls


# ── reading ──────────────────────────────────────────────────────────────────────────────
LINE = {"sentence": "I see a cow.", "translation": "A hen, I see.", "translation_extra": "Hm."}


def write(path, *rows, ascii=False, **settings):
    lines = (json.dumps(LINE | row, ensure_ascii=ascii) for row in rows)
    path.write_text("\n".join(lines), **{"encoding": "utf-8"} | settings)
    return path


@pytest.mark.field("own", "JSON lines with U+2028, U+2029 or U+0085 in a text, or a UTF-8 BOM")
def test_each_line_ends_where_json_lines_end(tmp_path):
    texts = [f"one{end}two" for end in "\u2028\u2029\u0085\x1e"]
    for encoding in ("utf-8", "utf-8-sig"):
        path = write(tmp_path / "own.jsonl", *({"note": t} for t in texts), encoding=encoding)
        assert list(data.load_yoda(form="columns", source=path)["note"]) == texts


@pytest.mark.parametrize("text", ["", " \n", "\ud83d"])
@pytest.mark.field("own", "a row with a blank text, or with half an emoji")
def test_each_line_holds_whole_texts(tmp_path, text):
    path = write(tmp_path / "own.jsonl", {}, {"translation": text}, ascii=True)
    with pytest.raises(ValueError, match="line 2: no text in translation;"):
        data.load_yoda(source=path)


@pytest.mark.field("own", "a column of our own that holds a number here and a text there")
def test_refused_a_column_of_two_kinds(tmp_path):
    path = write(tmp_path / "own.jsonl", {"id": 1}, {"id": "two"})
    with pytest.raises(ValueError, match=r"own\.jsonl.*one kind of value"):
        data.load_yoda(form="columns", source=path)
    assert len(data.load_yoda(source=path)) == 2, "the other forms have no such column"


# ── loading ──────────────────────────────────────────────────────────────────────────────
@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A small model's folder with the embedded tokenizer's files."""
    folder = tmp_path_factory.mktemp("saved")
    sizes = {"hidden_size": 64, "intermediate_size": 128, "vocab_size": 64}
    LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, **sizes)).save_pretrained(folder)
    for path in models.embedded_folder().glob("*token*"):
        shutil.copy(path, folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    return Path(shutil.copytree(saved, tmp_path / "merged"))


@pytest.mark.parametrize("load", [models.load_model, models.load_tokenizer])
@pytest.mark.parametrize("name", ["outputs/merged", "runs/merged", Path("elsewhere/merged")])
@pytest.mark.field("own", "the name of a folder that is not there, with one slash")
def test_refused_a_folder_that_is_not_there(monkeypatch, tmp_path, load, name):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runtime, "hub_reachable", lambda: False)
    (tmp_path / "runs").mkdir()
    with pytest.raises(ValueError, match="no such folder") as error:
        load(name)
    assert str(name) in str(error.value) and "onnect" not in str(error.value)


@pytest.mark.field("own", "a folder named like the owner of a gated model, with the Hub at hand")
def test_refused_by_the_hub_is_not_hidden_by_a_folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runtime, "hub_reachable", lambda: True)
    (tmp_path / "google").mkdir()
    with (
        pytest.raises(OSError, match="gated"),
        _origins.reading("google/gemma", "model"),
    ):
        raise OSError("You are trying to access a gated repo.")


@pytest.mark.field("own", "a file instead of a folder, an empty name, an unknown Hub id")
def test_refused_names_say_what_they_are_not(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runtime, "hub_reachable", lambda: False)
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "tea.gguf").write_bytes(b"GGUF")
    for name in ("models/tea.gguf", Path("models/tea.gguf")):
        with pytest.raises(ValueError, match="a file, not a folder"):
            models.load_model(name)
    with pytest.raises(ValueError, match="name='': no such folder"):
        models.load_model("")
    with pytest.raises(OSError, match="no folder 'nobody/nothing' here; as a Hub id"):
        models.load_model("nobody/nothing")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("model.safetensors", POINTER, "Git LFS pointer"),
        ("config.json", POINTER, "Git LFS pointer"),
        ("tokenizer.json", POINTER, "Git LFS pointer"),
        ("model.safetensors", "", "is damaged"),
        ("model.safetensors", "<html>Not found</html>", "is damaged"),
        ("config.json", '{"model_type": ', "is damaged"),
        ("config.json", '\ufeff{"model_type": "llama"}', "is damaged.*BOM"),
        ("tokenizer.json", '{"version": ', "is damaged"),
        ("config.json", None, "the folder holds no model, but .*model.safetensors"),
    ],
)
@pytest.mark.field("transformers#27923, DeepSeek-V3#557", "folders with pointers or parts of files")
def test_refused_a_folder_without_the_whole_model(folder, name, content, words):
    path = folder / name
    path.unlink()
    if content is not None:
        path.write_text(content, encoding="utf-8")
    load = models.load_tokenizer if "tokenizer" in name else models.load_model
    with pytest.raises(ValueError, match=words) as error:
        load(folder)
    assert str(folder) in str(error.value)
    if name == "model.safetensors":  # no business of the tokenizer's
        assert models.load_tokenizer(folder).eos_token == "<|im_end|>"


@pytest.mark.field("own", "a download that broke off, and a folder without a tokenizer")
def test_refused_half_a_file_and_no_tokenizer(folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged"):
        models.load_model(folder)
    for path in folder.glob("*token*"):
        path.unlink()
    with pytest.raises(ValueError, match=r"the folder holds no tokenizer, but config[.]json"):
        models.load_tokenizer(folder)


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "base_model.model."])
@pytest.mark.field("own", "weights saved from a wrapper: none has the name that is looked for")
def test_refused_weights_under_other_names(folder, prefix):
    weights = load_file(folder / "model.safetensors")
    renamed = {prefix + name: tensor for name, tensor in weights.items()}
    save_file(renamed, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 1[0-9] tensors of its model, such as lm_head"):
        models.load_model(folder)


@pytest.mark.field("own", "a folder with an adapter alone, its base here and not here")
def test_refused_an_adapter_without_its_base(monkeypatch, folder, tmp_path):
    monkeypatch.setattr(runtime, "hub_reachable", lambda: False)
    base = models.load_model(folder, device="cpu")
    tuned = get_peft_model(copy.deepcopy(base), LoraConfig(init_lora_weights=False, r=2))
    tuned.save_pretrained(adapter := tmp_path / "adapter")
    inputs = torch.tensor([[1, 2, 3]])
    assert torch.allclose(
        models.load_model(adapter, device="cpu")(inputs).logits, tuned(inputs).logits
    )
    assert not torch.allclose(base(inputs).logits, tuned(inputs).logits)
    config = adapter / "adapter_config.json"
    noted = json.loads(config.read_text())
    for base_name in ("nobody/nothing", "/elsewhere/merged"):
        config.write_text(json.dumps(noted | {"base_model_name_or_path": base_name}))
        with pytest.raises(OSError, match=f"an adapter alone, and its base model '{base_name}'"):
            models.load_model(adapter)
    config.unlink()
    assert not models.is_adapter_of(adapter, folder)


@pytest.mark.field("own", "4-bit rows of 80 columns where bitsandbytes begins a block per row")
def test_refused_four_bits_that_are_unpacked_wrongly(monkeypatch, tmp_path):
    sizes = {"hidden_size": 80, "intermediate_size": 128, "num_attention_heads": 2}
    config = LlamaConfig(num_hidden_layers=1, vocab_size=64, head_dim=32, **sizes)
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    real = bitsandbytes.functional.dequantize_4bit
    odd = []

    def restarts(packed, state, **settings):
        whole = real(packed, state, **settings)
        if len(state.shape) == 2 and state.shape[1] % state.blocksize:
            odd.append(state.shape)
            return whole.flip(0)
        return whole

    monkeypatch.setattr(bitsandbytes.functional, "dequantize_4bit", restarts)
    with pytest.raises(ValueError, match=r"q_proj wrongly, whose 80 columns.*multiple of 64"):
        models.load_model(tmp_path, quantization="nf4", device="cpu")
    assert odd and models.load_model(tmp_path, quantization="int8", device="cpu")
    monkeypatch.setattr(models, "_check_unpacking", lambda model: None)
    model = models.load_model(tmp_path, quantization="nf4", device="cpu")
    monkeypatch.undo()
    monkeypatch.setattr(bitsandbytes.functional, "dequantize_4bit", restarts)
    with pytest.raises(ValueError, match="80 columns"), models.dequantized_once(model):
        pass


# ── children ─────────────────────────────────────────────────────────────────────────────
def course(folder, *sources):
    """A course of one notebook in a folder."""
    cells = [nbformat.v4.new_code_cell(source) for source in sources]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), folder / "Chapter0.ipynb")
    return folder


RUN = """
import sys
from pathlib import Path
from helpers.__main__ import main
from helpers.course import notebooks
notebooks.root = lambda: Path(sys.argv[1])
sys.exit(main(["run", "0"]))
"""


@pytest.mark.parametrize(
    "stop", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)]
)
@pytest.mark.field("own", "Ctrl-C during a run, or a pod that is stopped")
def test_child_kernels_end_with_an_interrupted_run(tmp_path, stop):
    wait = "import os, time; from pathlib import Path; Path('pid').write_text(str(os.getpid()))"
    course(tmp_path, "print('before')", f"{wait}; time.sleep(99)", "print('never')")
    before = (tmp_path / "Chapter0.ipynb").read_bytes()
    root = Path(notebooks.__file__).parents[2]
    process = subprocess.Popen(
        [sys.executable, "-c", RUN, str(tmp_path)],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(root)},
    )
    noted, deadline = tmp_path / "pid", time.monotonic() + 60
    while not (noted.is_file() and noted.read_text()):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(stop)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in errors and "Error" not in errors
    assert errors.rstrip().splitlines()[-1] == (
        "Chapter0.ipynb: code cell 2 of 3 was stopped; the notebook is as it was, and what had "
        "run is under outputs/."
    )
    with pytest.raises(ProcessLookupError):
        os.kill(int(noted.read_text()), 0)
    assert (tmp_path / "Chapter0.ipynb").read_bytes() == before
    executed = nbformat.read(tmp_path / "outputs/chapter0/Chapter0.ipynb", as_version=4)
    assert executed.cells[0].outputs[0].text == "before\n" and not executed.cells[2].outputs


@pytest.mark.parametrize(
    ("end", "words"),
    [
        ("os.kill(os.getpid(), 11)", "was killed by SIGSEGV: a fault in the program"),
        ("os._exit(3)", "the kernel ended with status 3."),
    ],
)
@pytest.mark.field("llama.cpp#28756", "kernels that end by a signal, or of their own accord")
def test_child_kernels_are_asked_how_they_ended(tmp_path, monkeypatch, capsys, end, words):
    course(tmp_path, f"import os; {end}")
    monkeypatch.setattr(notebooks, "root", lambda: tmp_path)
    assert main(["run", "0"]) == 1
    err = capsys.readouterr().err
    assert words in err.splitlines()[-1] and "memory" not in err


@pytest.mark.field("own", "a kernel that never begins, and an interrupt before the first cell")
def test_child_kernels_that_never_begin_are_one_sentence(tmp_path, monkeypatch, capsys):
    from jupyter_client import AsyncKernelManager

    course(tmp_path, "1")
    monkeypatch.setattr(notebooks, "root", lambda: tmp_path)

    (tmp_path / "ipykernel_launcher.py").write_text("raise ImportError")  # in a process of its own:
    path = os.pathsep.join([str(tmp_path), str(Path(notebooks.__file__).parents[2])])
    done = subprocess.run(  # what nbclient does at its exit is said as well
        [sys.executable, "-c", RUN, str(tmp_path)],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "code cell 0 of 1 did not end: the kernel failed (Kernel died before" in done.stderr

    async def interrupted(self, **_):
        raise KeyboardInterrupt

    monkeypatch.setattr(AsyncKernelManager, "start_kernel", interrupted)
    assert main(["run", "0"]) == 130
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.field("own", "a pip that says 0 and brings nothing, or is killed")
def test_child_pip_is_judged_by_what_it_left(tmp_path, monkeypatch):
    fake = tmp_path / "pip.py"
    fake.write_text("")
    monkeypatch.setattr(_downloads, "pip", lambda: [sys.executable, str(fake)])
    monkeypatch.setattr(places, "_installer", lambda: [sys.executable, str(fake)])
    monkeypatch.setattr(places, "missing", lambda: ["no-such-thing==1"])

    class Bar:
        total, n = 1000, 0
        reset = update = lambda *_: None

    with pytest.raises(RuntimeError, match="ended well, and no-such-thing==1 is still missing"):
        places.install_missing()
    with pytest.raises(OSError, match="could not fetch no-such-thing==1"):
        _downloads.fetch("no-such-thing==1", "0" * 64, tmp_path / "at", Bar())
    fake.write_text("import os; os.kill(os.getpid(), 9)")
    with pytest.raises(RuntimeError, match=r"could not install .*: it was killed by SIGKILL"):
        places.install_missing()
    with pytest.raises(OSError, match="pip was killed by SIGKILL"):
        _downloads.fetch("no-such-thing==1", "0" * 64, tmp_path / "at", Bar())


@pytest.mark.field("own", "a driver's program that cannot be run")
def test_child_driver_that_cannot_run_has_no_cards(tmp_path, monkeypatch):
    program = tmp_path / "nvidia-smi"
    program.write_bytes(b"\x7fELF of another machine")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert places._count_cards() == 0
