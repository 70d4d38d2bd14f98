"""Old code against the installed libraries: what is named, and what is left alone."""

import json
import subprocess
import sys

import nbformat
import pytest

from helpers import chat, models
from helpers.__main__ import main
from helpers.course import check, doctor, notebooks

IMPORTS = """
import bitsandbytes as bnb
from datasets import load_dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from transformers import Trainer, TrainingArguments, pipeline
from trl import SFTConfig, SFTTrainer
from helpers import data, models
"""
# Each is run as well, in a folder with a tiny model `tiny` and rows in `rows`.
TRAINS = "SFTTrainer(model, args=a, train_dataset=rows, processing_class=tokenizer"
FAILS = [
    ("SFTTrainer(model, train_dataset=rows, tokenizer=tokenizer)", "tokenizer"),
    ("SFTTrainer(model, train_dataset=rows, max_seq_length=9)", "max_seq_length"),
    ("SFTTrainer(model, train_dataset=rows, packing=True)", "packing"),
    ("Trainer(model=model, tokenizer=tokenizer)", "tokenizer"),
    ("SFTTrainer(model=model, args=a, processing_class=tokenizer)", "train_dataset"),
    ("SFTConfig('out', bf16=False, max_seq_length=9)", "max_seq_length"),
    ("SFTConfig('out', bf16=False, evaluation_strategy='no')", "evaluation_strategy"),
    ("SFTConfig('out', bf16=False, evaluation_steps=3)", "evaluation_steps"),
    ("SFTConfig('out', bf16=False, group_by_length=True)", "group_by_length"),
    ("given = {'logging_dir': 'x'}\nSFTConfig('out', bf16=False, **given)", "logging_dir"),
    ("given = dict(warmup_ratio=0.1)\nTrainingArguments('x', **given)", "warmup_ratio"),
    ("TrainingArguments('out', no_cuda=True)", "no_cuda"),
    ("TrainingArguments('out', optim='adamw_hf')", "adamw_hf"),
    ("from trl import DPOConfig\nDPOConfig('x', max_prompt_length=9)", "max_prompt_length"),
    ("from trl import DPOTrainer\nDPOTrainer(model, beta=0.1)", "beta"),
    (
        "AutoModelForCausalLM.from_pretrained('tiny', dtype='auto', load_in_4bit=True)",
        "load_in_4bit",
    ),
    (
        "AutoModelForCausalLM.from_pretrained('tiny', dtype='auto', use_auth_token=1)",
        "use_auth_token",
    ),
    (
        "AutoModelForCausalLM.from_pretrained('tiny', dtype='auto', resume_download=True)",
        "resume_download",
    ),
    (
        "AutoModelForCausalLM.from_pretrained('tiny', dtype='auto', use_flash_attention_2=True)",
        "use_flash_attention_2",
    ),
    ("load_dataset('rows', split='train', use_auth_token=1)", "use_auth_token"),
    ("load_dataset('rows', split='train', task='x')", "task"),
    ("from trl import setup_chat_format", "setup_chat_format"),
    ("from trl import DataCollatorForCompletionOnlyLM", "DataCollatorForCompletionOnlyLM"),
    ("from trl import ORPOTrainer", "ORPOTrainer"),
    ("from trl import PPOConfig", "PPOConfig"),
    ("from trl.core import LengthSampler", "trl.core"),
    ("from transformers import TFAutoModel", "TFAutoModel"),
    ("from transformers import AutoModelWithLMHead", "AutoModelWithLMHead"),
    ("from transformers import AdamW", "AdamW"),
    ("from huggingface_hub import HfFolder", "HfFolder"),
    ("from peft import prepare_model_for_int8_training", "prepare_model_for_int8_training"),
    ("import datasets\ndatasets.load_metric('x')", "load_metric"),
    ("from helper_functions import generate", "helper_functions"),
    ("tokenizer = AutoTokenizer.from_pretrained('tiny')\ntokenizer.encode_plus(1)", "encode_plus"),
    ("tokenizer.batch_encode_plus([1])", "batch_encode_plus"),
    ("tokenizer.additional_special_tokens", "additional_special_tokens"),
    ("model.generate(input_ids=x, max_new_tokens=9, penalty_alpha=0.6)", "penalty_alpha"),
    ("model.push_to_hub('x', use_temp_dir=True)", "use_temp_dir"),
    (f"trainer = {TRAINS})\nprint(trainer.tokenizer)", "tokenizer"),
    ("def f(trainer):\n    trainer.tokenizer.decode(1)\nf(" + TRAINS + "))", "tokenizer"),
    (
        "class T(Trainer):\n    def compute_loss(self, model, inputs): ...\n"
        "T(model, b, train_dataset=ids).train()",
        "compute_loss",
    ),
    ("class T(SFTTrainer): ...\nT(model, train_dataset=rows, tokenizer=tokenizer)", "tokenizer"),
    (f"model = get_peft_model(model, c)\n{TRAINS}, peft_config=c)", "peft_config"),
    ("pipeline('summarization')", "summarization"),
    ("keys = model(x, use_cache=True).past_key_values[0][0]", "past_key_values"),
    ("rows = load_dataset('rows', split='train')\ntokenizer(rows['text'])", "tokenizer"),
    (
        "x = tokenizer.apply_chat_template(t, return_tensors='pt')\nmodel.generate(x)",
        "apply_chat_template",
    ),
    ("import torch\ntorch.tensor(tokenizer.apply_chat_template(t))", "apply_chat_template"),
    (
        "def f(rows):\n    out = []\n    for row in rows['text']:\n        out.append(row)\n"
        f"    return out\n{TRAINS}, formatting_func=f)",
        "formatting_func",
    ),
]
FAILS += [
    (
        "b = TrainingArguments('out', report_to=None, use_cpu=True)\n"
        "Trainer(model, args=b, train_dataset=ids)",
        "report_to",
    ),
    (
        "from trl import DPOTrainer\nb = TrainingArguments('out', report_to='none', use_cpu=True)\n"
        "DPOTrainer(model, args=b, train_dataset=rows, processing_class=tokenizer)",
        "args",
    ),
    (
        "b = TrainingArguments('out', eval_strategy='steps', report_to='none', use_cpu=True)\n"
        "Trainer(model, args=b, train_dataset=ids)",
        "eval_dataset",
    ),
    (
        "from peft import set_peft_model_state_dict\nmodel = get_peft_model(model, c)\n"
        "model = set_peft_model_state_dict(model, {})\nmodel.print_trainable_parameters()",
        "set_peft_model_state_dict",
    ),
    (
        "from transformers import DynamicCache\nDynamicCache.from_legacy_cache(x)",
        "from_legacy_cache",
    ),
    ("past = model(x, use_cache=True).past_key_values\npast.key_cache", "key_cache"),
    ("model.prune_heads({})", "prune_heads"),
    (
        "d = SFTConfig('o', use_cpu=True, bf16=False, report_to='none', packing=True,"
        " packing_strategy='bfd')\n"
        f"{TRAINS.replace('args=a', 'args=d')}, data_collator=print)",
        "data_collator",
    ),
    (
        "from datasets import Dataset\nfrom transformers import DataCollatorForLanguageModeling\n"
        "rows = Dataset.from_list([{'text': 'a'}, {'text': 'a b'}] * 4)\n"
        f"{TRAINS}, data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False)).train()",
        "data_collator",
    ),
    (
        "from datasets import Dataset\nrows = Dataset.from_list([{'conversations': t}] * 4)\n"
        f"{TRAINS})",
        "conversations",
    ),
    (
        "from datasets import Dataset\n"
        "rows = Dataset.from_list([{'prompt': 'a', 'answer': 'b'}] * 4)\n"
        f"{TRAINS}, formatting_func=lambda row: row['answer'])",
        "formatting_func",
    ),
    (
        "from datasets import Dataset\n"
        "rows = Dataset.from_list([{'prompt': [t[0]], 'completion': [t[0]]}] * 4)\n"
        f"{TRAINS}, formatting_func=lambda row: 'b')",
        "formatting_func",
    ),
]
# Of nobody's past: only the signature tells, and the catalog says nothing.
SLIPS = [
    ("SFTConfig('out', **{'a': 1} | dict(bf16=True))", "a"),
    ("LoraConfig(rank=8)", "rank"),
    ("get_peft_model(model)", ""),
    ("get_peft_model(model, 1, 2, 3, 4, 5, 6, 7)", ""),
    ("bnb.functional.quantize_4bit(x, kind='nf4')", "kind"),
    ("bnb.functional.quantize_five_bit(x)", "quantize_five_bit"),
    ("from transformers.nowhere import Trainer", "transformers.nowhere"),
    ("import peft.nowhere", "peft.nowhere"),
    ("tokenizer.encode_all(1)", "encode_all"),
    ("model.generate(input_ids=1, max_tokens=9)", "max_tokens"),
    ("import nowhere_at_all", "nowhere_at_all"),
]


def raised():
    """The symptoms whose errors `test_it_fails_so_when_it_is_run` really meets."""
    return {f.symptom for source, _ in FAILS for f in check.cell(IMPORTS + source, old=False)}


@pytest.mark.parametrize(("source", "word"), FAILS + SLIPS, ids=[s for s, _ in FAILS + SLIPS])
def test_what_fails_is_named(source, word):
    found = check.cell(IMPORTS + source, old=False)
    assert [(f.kind, f.word) for f in found] == [("fails", word)], found


@pytest.fixture(scope="module")
def names(tmp_path_factory):
    """What the snippets find bound, in a folder with what they load."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments
    from trl import SFTConfig

    folder = tmp_path_factory.mktemp("old")
    tokenizer = models.load_tokenizer(models.EMBEDDED)
    tokenizer.chat_template = chat.chatml_template()
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    config = LlamaConfig(**shape, num_attention_heads=2, vocab_size=len(tokenizer))
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder / "tiny")
    tokenizer.save_pretrained(folder / "tiny")
    rows = Dataset.from_list([{"text": "Late you are."}] * 4)
    (folder / "rows").mkdir()
    rows.to_json(folder / "rows" / "rows.json")
    given = {"use_cpu": True, "max_steps": 1, "report_to": "none", "bf16": False}
    return {
        "folder": folder,
        "model": model,
        "tokenizer": tokenizer,
        "rows": rows,
        "a": SFTConfig(str(folder / "a"), **given),
        "b": TrainingArguments(str(folder / "b"), **given),
        "c": LoraConfig(task_type="CAUSAL_LM"),
        "x": torch.tensor([[1, 2, 3]]),
        "ids": [{"input_ids": [1, 2], "labels": [1, 2]}] * 4,
        "t": [{"role": "user", "content": "Hi"}],
    }


@pytest.mark.parametrize("source", [source for source, _ in FAILS + SLIPS])
def test_it_fails_so_when_it_is_run(source, names, monkeypatch):
    monkeypatch.chdir(names["folder"])
    (found,) = check.cell(IMPORTS + source, old=False)
    with pytest.raises(Exception) as raised:
        exec(IMPORTS + source, dict(names, __name__="__main__"))
    assert doctor.explain(raised.value).name == found.symptom, repr(raised.value)


@pytest.mark.parametrize("source", [source for source, _ in FAILS])
def test_what_fails_is_explained(source):
    (found,) = check.cell(IMPORTS + source, old=False)
    assert found.symptom != doctor.UNKNOWN.name
    assert found.symptom not in ("import_gone", "other_keyword"), "a cure of its own, please"


def test_a_slip_is_told_what_is_spelled_alike():
    (found,) = check.cell(IMPORTS + "bnb.functional.quantize_4bit(x, quant_typ='nf4')")
    assert "spelled alike: quant_type" in found.today


OTHER = [
    ("warns", "SFTConfig('o', bf16=False, gradient_checkpointing=True)", "gradient_checkpointing"),
    ("warns", "AutoModelForCausalLM.from_pretrained('x', torch_dtype=1)", "torch_dtype"),
    ("warns", "model.gradient_checkpointing_enable()", "gradient_checkpointing_enable"),
    ("warns", "load_dataset('x', split='train', trust_remote_code=True)", "trust_remote_code"),
    ("silent", "AutoModelForCausalLM.from_pretrained('facebook/opt-350m')", "dtype"),
    ("silent", "SFTConfig('out')", "bf16"),
    ("silent", "TrainingArguments('out')", "report_to"),
    ("silent", "tokenizer.add_eos_token = True", "add_eos_token"),
    ("silent", "path = 'out/adapter_model.bin'", "adapter_model.bin"),
    (
        "silent",
        "q = BitsAndBytesConfig(load_in_4bit=True)\n"
        "SFTTrainer(model, train_dataset=rows, peft_config=c)",
        "model",
    ),
    ("silent", "SFTConfig('out', bf16=True, packing=True)", "packing"),
    ("silent", "BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_type='nf4')", "bnb_4bit_type"),
    ("silent", "tokenizer('a', pad_to_max_length=True)", "pad_to_max_length"),
    ("silent", "model.save_pretrained('x', safe_serialization=False)", "safe_serialization"),
    (
        "silent",
        "d = {'additional_special_tokens': []}\ntokenizer.special_tokens_map",
        "special_tokens_map",
    ),
    ("silent", "model = get_peft_model(model, c)\nmodel.base_model(x)", "base_model"),
    ("silent", "model(x, output_attentions=True)", "output_attentions"),
    ("silent", "import torch\ntorch.cuda.is_bf16_supported()", "is_bf16_supported"),
    ("silent", "n = len(tokenizer.apply_chat_template(t))", "apply_chat_template"),
    (
        "silent",
        "SFTTrainer(model, train_dataset=rows)\n"
        "rows.map(lambda r: {'prompt': r['q'], 'completion': r['a']})",
        "completion",
    ),
    (
        "silent",
        "rows.map(lambda r: {'messages': r['q']})\n"
        "SFTTrainer(model, train_dataset=rows, formatting_func=f)",
        "formatting_func",
    ),
    (
        "silent",
        "SFTTrainer(model, train_dataset=rows)\nBitsAndBytesConfig(load_in_8bit=True)",
        "load_in_8bit",
    ),
    (
        "silent",
        "text = tokenizer.apply_chat_template(t, tokenize=False)\n"
        "SFTTrainer(model, train_dataset=rows)\n"
        "SFTConfig('out', bf16=True, dataset_text_field='text')",
        "dataset_text_field",
    ),
    ("moved", "url = 'https://github.com/ggerganov/llama.cpp'", "ggerganov/llama.cpp"),
]


@pytest.mark.parametrize(("kind", "source", "word"), OTHER, ids=[source for _, source, _ in OTHER])
def test_what_warns_moved_or_changed_its_meaning_is_named(kind, source, word):
    found = check.cell(IMPORTS + source, old=True)
    assert [(f.kind, f.word) for f in found] == [(kind, word)], found
    assert found[0].symptom in doctor.SYMPTOMS


def test_other_defaults_are_told_of_old_code_only():
    today = IMPORTS + "SFTConfig('out', packing=True)"
    assert not check.cell(today)
    for sign in ("from trl import setup_chat_format", "!pip install trl==0.12.1"):
        found = check.cell(f"{today}\n{sign}")
        assert {"bf16", "packing"} <= {f.word for f in found}
        assert {"bf16", "packing"} & {
            f.word for f in check.cell(f"{today}\n{sign}", old=False)
        } == set()


def test_names_that_nothing_binds_are_named_in_a_file_alone(tmp_path):
    text = "from trl import *\nprint(nowhere)\n"
    path = tmp_path / "a.py"
    path.write_text("model = AutoModelForCausalLM.from_pretrained('x', load_in_4bit=True)\n")
    words = {f.word for f in check.notebook(path)}
    assert words == {"AutoModelForCausalLM", "load_in_4bit"}
    path.write_text(text)
    assert not check.notebook(path)
    path.write_text(text.splitlines()[1])
    assert [f.word for f in check.notebook(path)] == ["nowhere"]
    assert not check.cell("print(nowhere)")


SOUND = [
    "SFTTrainer(model, args=a, processing_class=tokenizer, train_dataset=rows)",
    "SFTConfig('out', **{'bf16': False} | unknown)",
    "SFTTrainer(model, data, data, data, data, data, *more, **most)",
    "AutoModelForCausalLM.from_pretrained('x', dtype='auto', device_map='cpu')",
    "AutoModelForCausalLM.from_pretrained('x', dtype=1, use_cache=False, num_labels=3)",
    "AutoModelForCausalLM.from_pretrained('gpt2', low_cpu_mem_usage=True)",
    "AutoModelForCausalLM.from_pretrained('x', torch_dtype='auto')",
    "model.generate(input_ids=1, attention_mask=2, max_new_tokens=9, do_sample=False)",
    "model(input_ids=1, labels=2)\nmodel.own_layer\nmodel.eval().save_pretrained('x')",
    "from pathlib import Path\nmodel = Path('a')\nmodel.write_bytes(b'')",
    "rows = data.load_yoda()\nrows.map(len, batched=True)\nrows = [1]\nrows.append(2)",
    "try:\n    from trl import setup_chat_format\nexcept ImportError:\n    pass",
    "class T(Trainer):\n    def compute_loss(self, model, inputs, **kwargs): ...",
    "x = tokenizer('a', return_tensors='pt').to('cpu')\nmodel.transformer(x)",
    "x = tokenizer.apply_chat_template(t, return_tensors='pt')\nmodel.generate(**x)",
    "x = tokenizer.apply_chat_template(t, return_dict=False)\nmodel.generate(x)",
    "rows = load_dataset('x', split='train')\ntokenizer(list(rows['text']))",
    "rows.map(lambda r: {'prompt': f'Q: {r[0]} A:', 'completion': r[1]})\n"
    "SFTTrainer(model, train_dataset=rows)",
    "!pip install nowhere-at-all\nimport nowhere_at_all",
    "import os, sys\nos.path.join(sys.argv[0])",
    "from trl import setup_chat_format  # on purpose",
    "m = get_peft_model(model, c)\nwith m.disable_adapter():\n    m.base_model(x)",
]


@pytest.mark.parametrize("source", SOUND)
def test_sound_code_is_left_alone(source):
    assert not check.cell(IMPORTS + source), check.cell(IMPORTS + source)


# In the style of today's documentation, five kinds of run.
TODAY = [
    """
    from datasets import load_dataset
    from trl import SFTConfig, SFTTrainer
    dataset = load_dataset("trl-lib/Capybara", split="train")
    trainer = SFTTrainer(
        model="Qwen/Qwen3-0.6B",
        train_dataset=dataset,
        args=SFTConfig(output_dir="out", bf16=True, max_length=2048, packing_strategy="bfd"),
    )
    trainer.train()
    """,
    """
    from datasets import load_dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer
    model = AutoModelForCausalLM.from_pretrained("Qwen/Qwen2-0.5B-Instruct", dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained("Qwen/Qwen2-0.5B-Instruct")
    rows = load_dataset("trl-lib/ultrafeedback_binarized", split="train")
    arguments = DPOConfig(output_dir="out", beta=0.1, max_length=1024)
    trainer = DPOTrainer(model=model, args=arguments, processing_class=tokenizer,
                         train_dataset=rows, peft_config=LoraConfig(r=16))
    trainer.train()
    """,
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4",
                                bnb_4bit_compute_dtype=torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained("x", quantization_config=config,
                                                 device_map="auto", attn_implementation="sdpa")
    model = prepare_model_for_kbit_training(model)
    model = get_peft_model(model, LoraConfig(target_modules="all-linear"))
    model.print_trainable_parameters()
    """,
    """
    from trl import GRPOConfig, GRPOTrainer
    from datasets import load_dataset
    def reward(completions, **kwargs):
        return [len(set(text)) for text in completions]
    trainer = GRPOTrainer(model="Qwen/Qwen2-0.5B-Instruct", reward_funcs=reward,
                          args=GRPOConfig(output_dir="out", bf16=True),
                          train_dataset=load_dataset("trl-lib/tldr", split="train"))
    trainer.train()
    """,
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline
    chat = pipeline("text-generation", model="HuggingFaceTB/SmolLM2-135M-Instruct")
    print(chat([{"role": "user", "content": "Hi"}], max_new_tokens=9)[0]["generated_text"])
    model = AutoModelForCausalLM.from_pretrained("x", dtype="auto", device_map="auto")
    tokenizer = AutoTokenizer.from_pretrained("x")
    inputs = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}],
        add_generation_prompt=True, return_tensors="pt").to(model.device)
    text = model.generate(**inputs, max_new_tokens=9)
    print(tokenizer.decode(text[0][inputs["input_ids"].shape[1]:]))
    """,
]


@pytest.mark.parametrize("source", TODAY)
def test_code_of_today_is_left_alone(source):
    lines = [line.removeprefix("    ") for line in source.splitlines()]
    assert not check.cell("\n".join(lines)), check.cell("\n".join(lines))


def ours():
    root = notebooks.root()
    files = sorted((root / "helpers").rglob("*.py"))
    yield from (path for path in files if path.name not in ("_shell.py", "_llamacpp.py"))
    yield from map(notebooks.find, notebooks.written())


@pytest.mark.parametrize("path", ours(), ids=lambda path: path.name)
def test_nothing_of_ours_is_old(path):
    found = check.notebook(path)
    assert not found, str(found)
    assert not found.notes


# ── files ────────────────────────────────────────────────────────────────────────────────
OLD = """\
from transformers import AutoModelForCausalLM
from trl import SFTConfig, SFTTrainer
model = AutoModelForCausalLM.from_pretrained("x", torch_dtype="float32")
settings = SFTConfig(
    output_dir="é out",
    max_seq_length=512,
    logging_dir="./logs",
    bf16=True, evaluation_strategy="steps")
trainer = SFTTrainer(model, settings, None, rows, rows, tokenizer=tokenizer)
"""


HAVE = "rows = tokenizer = None"


def notebook(folder, *cells, name="old.ipynb"):
    made = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    made.cells.insert(0, nbformat.v4.new_markdown_cell("# Prose, tokenizer="))
    path = folder / name
    nbformat.write(made, path)
    return path


def test_places_are_those_of_the_cells(tmp_path):
    path = notebook(tmp_path, f"!pip install -q trl\n{HAVE}", OLD, "%time x = 1\n!ls\ny = (")
    found = check.notebook(path)
    assert [(f.cell, f.line, f.word) for f in found] == [
        (2, 3, "torch_dtype"),
        (2, 6, "max_seq_length"),
        (2, 7, "logging_dir"),
        (2, 8, "evaluation_strategy"),
        (2, 9, "tokenizer"),
    ]
    (note,) = found.notes
    assert note.startswith("cell 3, line 3: is no Python that can be read")


def test_magics_and_shell_lines_are_no_python(tmp_path):
    cells = [
        "%%capture\n!pip install x \\\n  y\nfrom trl import setup_chat_format",
        "%%bash\nif true; then\n  ls\nfi",
        "%load_ext autoreload\nfiles = !ls\nprint(files)\n?print\nprint?",
        "%%writefile train.py\nfrom trl import setup_chat_format",
        "%%time\nfrom trl import setup_chat_format",
        "for name in ['a']:\n    !echo {name}\ntext = '''\n!not a command\n'''",
    ]
    found = check.notebook(notebook(tmp_path, *cells))
    assert [(f.cell, f.line) for f in found] == [(1, 4), (4, 2), (5, 2)]
    assert found.notes == ()


def test_a_cell_that_is_meant_to_fail_is_left_alone(tmp_path):
    made = nbformat.v4.new_code_cell("from trl import setup_chat_format")
    made.metadata["tags"] = ["raises-exception"]
    nbformat.write(nbformat.v4.new_notebook(cells=[made]), tmp_path / "a.ipynb")
    assert not check.notebook(tmp_path / "a.ipynb")


def test_pasted_code_may_be_a_session_or_a_page():
    for text in (
        ">>> from trl import (\n...     setup_chat_format)\nprinted",
        "Some words\n```python\nfrom trl import setup_chat_format\n```\nmore",
    ):
        assert [f.word for f in check.cell(text)] == ["setup_chat_format"]


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"{", b"[]", b'{"cells": 3}', b"{}"])
def test_what_is_no_notebook_is_refused(content, tmp_path):
    path = tmp_path / "x.ipynb"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"x\.ipynb is no (notebook|text)"):
        check.notebook(path)


def test_other_wrong_inputs_are_refused(tmp_path):
    with pytest.raises(TypeError, match="text must be code as a str, not int"):
        check.cell(3)
    with pytest.raises(FileNotFoundError):
        check.notebook(tmp_path / "none.py")
    with pytest.raises(ValueError, match="holds no notebook"):
        check.folder(tmp_path)


def test_findings_show_themselves():
    found = check.cell(OLD)
    assert len(found) == 5
    assert {f.kind for f in found[1:]} == {"fails"}
    assert str(found).splitlines()[-1] == "cell: 5 findings (4 fails, 1 warns)"
    assert "max_length" in found._repr_html_()
    assert json.loads(found.to_json())["findings"][1]["word"] == "max_seq_length"


# ── the command ──────────────────────────────────────────────────────────────────────────
def test_the_command_says_what_it_found(tmp_path, capsys):
    path = notebook(tmp_path, HAVE, OLD)
    assert main(["check", str(path)]) == 1
    assert "max_seq_length" in capsys.readouterr().out
    assert main(["check", str(path), "--kinds", "silent,moved"]) == 0
    assert main(["check", str(tmp_path), "--json"]) == 1
    capsys.readouterr()
    assert main(["check", str(path), "--json"]) == 1
    (report,) = json.loads(capsys.readouterr().out)
    assert [f["kind"] for f in report["findings"]] == ["warns"] + ["fails"] * 4
    assert main(["check", str(path), "--kinds", "loud"]) == 2
    assert "--kinds takes fails, warns, silent, moved" in capsys.readouterr().err
    assert main(["check", str(tmp_path / "none.py")]) == 2


@pytest.mark.parametrize("form", ["ipynb", "py"])
def test_the_copy_has_the_new_names(form, tmp_path, capsys):
    path = notebook(tmp_path, HAVE, OLD) if form == "ipynb" else tmp_path / "old.py"
    if form == "py":
        path.write_text(f"{HAVE}\n{OLD}", encoding="utf-8")
    before = path.read_bytes()
    copy = tmp_path / f"new.{form}"
    assert main(["check", str(path), "--fix", str(copy)]) == 1
    assert "5 of them mended" in capsys.readouterr().out
    assert path.read_bytes() == before
    assert not check.notebook(copy)
    text = copy.read_text("utf-8")
    if form == "ipynb":
        text = nbformat.read(copy, as_version=4).cells[-1].source + "\n"
    assert text.removeprefix(f"{HAVE}\n") == OLD.replace("torch_dtype", "dtype").replace(
        "max_seq_length", "max_length"
    ).replace('    logging_dir="./logs",\n', "").replace("evaluation_s", "eval_s").replace(
        "tokenizer=", "processing_class="
    )


@pytest.mark.parametrize(
    ("call", "fixed"),
    [
        ("SFTConfig('o', bf16=True, logging_dir='x')", "SFTConfig('o', bf16=True)"),
        ("SFTConfig(logging_dir='x', bf16=True)", "SFTConfig(bf16=True)"),
        ("SFTConfig(logging_dir='x')", "SFTConfig()"),
        (
            "SFTConfig(warmup_ratio=0.1, warmup_steps=0)",
            "SFTConfig(warmup_ratio=0.1, warmup_steps=0)",
        ),
        ("model.gradient_checkpointing_enable()", "model.activation_checkpointing_enable()"),
        ("SFTConfig('é', logging_dir=\n  'x', bf16=True)", "SFTConfig('é', bf16=True)"),
        (
            "k = {'max_seq_length': 1}\nSFTConfig(bf16=True, **k)",
            "k = {'max_length': 1}\nSFTConfig(bf16=True, **k)",
        ),
    ],
)
def test_a_copy_of_one_call(call, fixed, tmp_path):
    head = "from trl import SFTConfig\n"
    for ends in ("\n", "\r\n"):
        path, copy = tmp_path / f"a{len(ends)}.py", tmp_path / f"b{len(ends)}.py"
        path.write_bytes(f"{head}{call}\n".replace("\n", ends).encode())
        main(["check", str(path), "--fix", str(copy)])
        assert copy.read_bytes() == f"{head}{fixed}\n".replace("\n", ends).encode()


def test_a_copy_overwrites_nothing(tmp_path, capsys):
    path = tmp_path / "a.py"
    path.write_text(OLD, encoding="utf-8")
    for out in (str(path), str(tmp_path / "b.ipynb")):
        assert main(["check", str(path), "--fix", out]) == 2
    assert path.read_text("utf-8") == OLD
    assert main(["check", str(path), str(path), "--fix", "c.py"]) == 2
    assert "--fix takes one file" in capsys.readouterr().err


def test_nothing_of_the_code_runs(tmp_path):
    path = tmp_path / "a.py"
    path.write_text(f"open({str(tmp_path / 'made')!r}, 'w')\nimport beside\n")
    (tmp_path / "beside.py").write_text("raise SystemExit('it ran')")
    command = [sys.executable, "-m", "helpers", "check", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=notebooks.root())
    assert not (tmp_path / "made").exists()
    assert "it ran" not in done.stdout + done.stderr
