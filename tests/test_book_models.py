"""The chapters with models built like the book's: what a reader with a GPU meets, here.

OPT has another architecture, biases, dropout and no chat template; Phi-3 has markers of its
own, and an EOS that is not the end of a turn. A tiny OPT with random weights, and the
embedded model behind a tokenizer like Phi-3's, find cells that take SmolLM2 for granted.
"""

import json
import os
import shutil

import nbformat
import pytest
import torch
from nbclient import NotebookClient

from helpers import chat, data, evaluation, models, training
from helpers.course import exercises, notebooks
from helpers.course.exercises import chapter0, chapter4

pytestmark = pytest.mark.environments
PHI_TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
)


def embedded_as(folder, names, template=None, **roles):
    """A copy of the embedded model whose special tokens have other names."""
    shutil.copytree(models.embedded_folder(), folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        text = (folder / name).read_text(encoding="utf-8")
        for old, new in names.items():
            text = text.replace(old, new)
        (folder / name).write_text(text, encoding="utf-8")
    for path in folder.glob("*.jinja"):
        path.unlink()
    amend(folder / "tokenizer_config.json", chat_template=template, **roles)
    return folder


def amend(path, **changes):
    """Change entries of a JSON file."""
    settings = json.loads(path.read_text(encoding="utf-8")) | changes
    path.write_text(json.dumps(settings), encoding="utf-8")


@pytest.fixture(scope="module")
def phi(tmp_path_factory):
    """Phi-3's markers and its two stop tokens, on the embedded model's weights."""
    folder = embedded_as(
        tmp_path_factory.mktemp("phi") / "model",
        {
            "<|im_start|>": "<|user|>",
            "<|im_end|>": "<|end|>",
            "<repo_name>": "<|assistant|>",
        },
        PHI_TEMPLATE,
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
    )
    tokenizer = models.load_tokenizer(folder)
    stops = tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|end|>"])
    amend(folder / "generation_config.json", eos_token_id=stops)
    return folder


@pytest.fixture(scope="module")
def opt(tmp_path_factory):
    """OPT-350M's architecture, small and random; BOS and EOS are one token, as in OPT."""
    from transformers import OPTConfig, OPTForCausalLM

    folder = embedded_as(
        tmp_path_factory.mktemp("opt") / "model",
        {"<|im_start|>": "<s>", "<|im_end|>": "</s>"},
        bos_token="</s>",
        eos_token="</s>",
        pad_token="</s>",
    )
    tokenizer = models.load_tokenizer(folder)
    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        ffn_dim=512,
        num_hidden_layers=14,
        num_attention_heads=4,
        word_embed_proj_dim=64,
        do_layer_norm_before=False,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    for path in folder.glob("model*.safetensors"):
        path.unlink()
    OPTForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("chapter", "kind"),
    [
        ("Chapter1", "phi"),
        ("Chapter2", "opt"),
        ("Chapter3", "opt"),
        ("Chapter4", "phi"),
        ("Chapter5", "opt"),
        ("Chapter0", "phi"),
        # Not Chapter 6: on a card it takes the embedded model too.
    ],
)
def test_a_chapter_runs_with_a_model_like_the_books(chapter, kind, request, tmp_path, monkeypatch):
    folder = request.getfixturevalue(kind)
    notebook = nbformat.read(notebooks.find(chapter), as_version=4)
    second = [i for i, c in enumerate(notebook.cells) if c.cell_type == "code"][1]
    swap = (
        f"from helpers import models\nmodels.default_model = lambda chapter=None: {str(folder)!r}"
    )
    notebook.cells.insert(second, nbformat.v4.new_code_cell(swap))
    paths = [str(notebooks.root()), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))
    client = NotebookClient(
        notebook,
        timeout=1800,
        kernel_name="python3",
        resources={"metadata": {"path": str(tmp_path)}},
    )
    client.execute()


@pytest.mark.parametrize("kind", ["opt", "phi"])
def test_no_exercise_asks_which_model_this_machine_would_take(kind, request, monkeypatch):
    folder = request.getfixturevalue(kind)
    monkeypatch.setattr(models, "default_model", lambda chapter=None: str(folder))
    for module in (chapter0, chapter4):
        module._tokenizer.cache_clear()
    failed = {}
    for number, exercise in exercises.catalog().items():
        names = {"given": exercise.given()} if exercise.given else {}
        exec(exercise.solution, names)
        result = exercises.check(number, names["answer"])
        if not result.passed:
            failed[number] = result.message
    assert not failed


def test_a_model_with_markers_of_its_own_answers_and_stops(phi, tmp_path):
    from peft import LoraConfig
    from trl import SFTConfig

    tokenizer = models.load_tokenizer(phi)
    tokenizer.chat_template = chat.choose_template(tokenizer)
    chat.prepare_tokenizer(tokenizer)
    model = models.load_model(phi, attention="eager", device="cpu")
    trainer = training.LeanSFTTrainer(
        model=chat.prepare_model(model, tokenizer),
        args=SFTConfig(
            str(tmp_path),
            use_cpu=True,
            bf16=False,
            activation_checkpointing=False,
            per_device_train_batch_size=8,
            learning_rate=3e-3,
            warmup_steps=5,
            max_steps=40,
            save_strategy="no",
            report_to="none",
        ),
        train_dataset=data.load_yoda("train").shuffle(seed=42).select(range(320)),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"),
    )
    trainer.train()
    report = evaluation.evaluate(trainer.model, tokenizer, data.load_yoda("test"), limit=24)
    assert report.chrf > 70
    assert all("<|" not in example.answer for example in report.examples)
    longest = max(len(example.reference) for example in report.examples)
    stopped = sum(len(e.answer) < 1.5 * longest for e in report.examples)
    assert stopped >= 20, [example.answer for example in report.examples]
