"""What `export_recipe` writes really runs, in one process and in two."""

import sys

import psutil
import pytest
import torch
import yaml
from peft import LoraConfig
from transformers import LlamaConfig, LlamaForCausalLM
from trl import SFTConfig

from helpers import chat, data, models, recipes, training

LORA = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear")
SETTINGS = {
    "use_cpu": True,
    "bf16": False,
    "report_to": "none",
    "disable_tqdm": True,
    "activation_checkpointing": False,
    "max_steps": 3,
    "logging_steps": 1,
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-2,
    "save_strategy": "no",
    "train_sampling_strategy": "sequential",
    "lr_scheduler_type": "constant",
}


@pytest.fixture(scope="module")
def tokenizer():
    made = models.load_tokenizer(models.EMBEDDED)
    made.chat_template = chat.chatml_template()
    return chat.prepare_tokenizer(made)


@pytest.fixture(scope="module")
def model(tokenizer, tmp_path_factory):
    """A small random model, saved with its tokenizer as a folder."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    config = LlamaConfig(**shape, num_attention_heads=4, vocab_size=len(tokenizer))
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def export(model, tokenizer, tmp_path):
    rows = data.load_yoda("train").select(range(12))

    def make(name="recipe", settings=(), **more):
        args = SFTConfig(str(tmp_path / "x"), **SETTINGS | dict(settings))
        given = {"model": model, "args": args, "dataset": rows, "tokenizer": tokenizer}
        return training.export_recipe(tmp_path / name, **given | {"lora": LORA} | more)

    return make


# ── what is written ──────────────────────────────────────────────────────────────────────
def test_the_folder_holds_all_that_is_needed(export):
    recipe = export()
    names = sorted(path.name for path in recipe.folder.iterdir())
    assert names == [
        "accelerate.yaml",
        "chat_template.jinja",
        "recipe.yaml",
        "train.jsonl",
    ]
    written = yaml.safe_load((recipe.folder / "recipe.yaml").read_text())
    assert written["learning_rate"] == 1e-2 and written["bf16"] is False
    assert written["use_peft"] is True and written["lora_target_modules"] == ["all-linear"]
    assert "weight_decay" not in written, "defaults stay out"
    assert recipe.command[:2] == ["trl", "sft"]
    assert "recipe.yaml" in str(recipe)


def test_the_batch_is_shared_out(export):
    recipe = export(backend="fsdp2", processes=2)
    written = yaml.safe_load((recipe.folder / "recipe.yaml").read_text())
    assert written["per_device_train_batch_size"] == 2
    config = yaml.safe_load((recipe.folder / "accelerate.yaml").read_text())
    assert config["distributed_type"] == "FSDP" and config["num_processes"] == 2
    assert config["fsdp_config"]["fsdp_version"] == 2


def test_quantization_and_deepspeed_are_written_and_the_untried_is_said(export):
    recipe = export(quantization="nf4", backend="deepspeed", processes=2)
    written = yaml.safe_load((recipe.folder / "recipe.yaml").read_text())
    assert written["load_in_4bit"] and written["bnb_4bit_quant_type"] == "nf4"
    assert "not been run" in str(recipe)


def stand_in(tmp_path, code):
    """A recipe whose command is a Python program of ours."""
    folder = tmp_path / "stand-in"
    folder.mkdir()
    return recipes.Recipe(folder, [sys.executable, "-c", code])


def still_asleep():
    family = psutil.Process().children(recursive=True)
    return [child for child in family if "time.sleep" in " ".join(child.cmdline())]


ENDED = "print({'loss': '1.5'}); print({'loss': '0.5'}); print({'train_runtime': '3'})\n"


def test_processes_that_never_leave_are_stopped_with_their_losses_read(tmp_path):
    # As PyTorch's gloo does now and then: a child of the launcher waits for itself.
    hang = "[sys.executable, '-c', 'import time; time.sleep(600)']"
    code = f"import subprocess, sys\n{ENDED}sys.stdout.flush()\nsubprocess.run({hang})"
    found = training.run_recipe(stand_in(tmp_path, code), leave_s=2)
    assert found == [1.5, 0.5]
    assert still_asleep() == []


def test_a_run_that_still_saves_is_left_alone(tmp_path):
    code = (
        f"import os, sys, time\n{ENDED}sys.stdout.flush()\nos.chdir({str(tmp_path)!r})\n"
        "for n in range(6): time.sleep(0.7); open(f'stand-in/{n}', 'w').close()"
    )
    recipe = stand_in(tmp_path, code)
    assert training.run_recipe(recipe, leave_s=2) == [1.5, 0.5]
    assert (recipe.folder / "5").exists()


def test_a_run_that_fails_or_takes_too_long_is_quoted(tmp_path):
    recipe = stand_in(tmp_path, ENDED + "raise OSError('the disk is full')")
    with pytest.raises(RuntimeError, match="the disk is full"):
        training.run_recipe(recipe)
    slow = recipes.Recipe(
        recipe.folder, [sys.executable, "-c", "import time; time.sleep(99)"]
    )
    with pytest.raises(TimeoutError, match="limit_s=1"):
        training.run_recipe(slow, limit_s=1)
    assert still_asleep() == []


@pytest.mark.parametrize(
    ("choices", "words"),
    [
        ({"backend": "fsdp3"}, "backend must be one of"),
        ({"quantization": "q4"}, "quantization must be one of"),
        ({"processes": 0}, "processes must be a whole number"),
        ({"processes": 2}, "backend='single' is one process"),
        ({"backend": "ddp", "processes": 3}, "cannot share a batch of 4"),
        ({"quantization": "nf4", "lora": None}, "needs lora"),
    ],
)
def test_contradictions_are_named_and_nothing_is_written(export, tmp_path, choices, words):
    with pytest.raises(ValueError, match=words):
        export(**choices)
    assert not list(tmp_path.glob("*recipe*"))


def test_an_existing_folder_is_kept(export, tmp_path):
    (tmp_path / "recipe").mkdir()
    (tmp_path / "recipe" / "mine.txt").write_text("precious")
    with pytest.raises(ValueError, match="exists; choose a new one"):
        export()
    assert (tmp_path / "recipe" / "mine.txt").read_text() == "precious"


# ── that it runs ─────────────────────────────────────────────────────────────────────────
@pytest.mark.slow
def test_one_process_and_two_agree(export):
    alone = training.run_recipe(export("alone"))
    assert len(alone) == 3 and alone[2] < alone[0]
    together = training.run_recipe(export("together", backend="fsdp2", processes=2))
    assert len(together) == 3, "only the first process reports"
    assert together == pytest.approx(alone, rel=2e-3)


@pytest.mark.slow
def test_the_embedded_model_in_four_bits_runs_by_trl(export, tokenizer):
    recipe = export(
        "nf4", {"max_steps": 2}, model=models.embedded_folder(), quantization="nf4"
    )
    losses = training.run_recipe(recipe)
    assert len(losses) == 2 and all(0 < loss < 6 for loss in losses)
    saved = recipe.folder / "trained" / "adapter_model.safetensors"
    assert saved.is_file(), sorted(p.name for p in saved.parent.iterdir())
