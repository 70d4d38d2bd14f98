"""What `export_recipe` writes really runs, in one process and in two."""

import math
import os
import sys
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM
from trl import SFTConfig, get_peft_config
from trl.scripts.sft import make_parser

from helpers import chat, data, models, training

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
    command = f"python -m trl.scripts.sft --config {recipe.folder / 'recipe.yaml'}"
    assert str(recipe).splitlines()[1] == " ".join(recipe.command) == command


def test_the_batch_is_shared_out(export):
    recipe = export(backend="fsdp2", processes=2)
    written = yaml.safe_load((recipe.folder / "recipe.yaml").read_text())
    assert written["per_device_train_batch_size"] == 2
    config = yaml.safe_load((recipe.folder / "accelerate.yaml").read_text())
    assert config["distributed_type"] == "FSDP" and config["num_processes"] == 2
    assert config["fsdp_config"]["fsdp_version"] == 2
    assert "python -m accelerate.commands.launch --config_file" in str(recipe)
    assert " -m trl.scripts.sft --config" in str(recipe)


def test_quantization_and_deepspeed_are_written_and_the_untried_is_said(export):
    recipe = export(quantization="nf4", backend="deepspeed", processes=2)
    written = yaml.safe_load((recipe.folder / "recipe.yaml").read_text())
    assert written["load_in_4bit"] and written["bnb_4bit_quant_type"] == "nf4"
    assert "not been run" in str(recipe)


def stand_in(tmp_path, code, processes=1, use_cpu=True):
    """A recipe whose command is a Python program of ours."""
    folder = tmp_path / "stand-in"
    folder.mkdir()
    launch = {"num_processes": processes, "use_cpu": use_cpu}
    (folder / "accelerate.yaml").write_text(yaml.safe_dump(launch))
    settings = {"max_steps": 3, "output_dir": str(folder)}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(settings))
    (folder / "model.safetensors").write_text("as if trained")
    return training.Recipe(folder, ["python", "-c", code])


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
    slow = training.Recipe(recipe.folder, ["python", "-c", "import time; time.sleep(99)"])
    with pytest.raises(TimeoutError, match="limit_s=1"):
        training.run_recipe(slow, limit_s=1)
    assert still_asleep() == []


def test_losses_are_read_whatever_they_look_like(tmp_path):
    # As transformers prints them, four digits and text; a progress bar may share the line.
    code = (
        "print({'loss': '5e-05', 'grad_norm': '1.2'}, {'eval_loss': '7', 'loss': 'nan'})\n"
        "print('50%|##|', {'loss': 'inf'}, {'loss': 2.25}, {'train_loss': '9'})\n"
        "print({'train_runtime': '3'})"
    )
    found = training.run_recipe(stand_in(tmp_path, code))
    assert found == pytest.approx([5e-05, math.nan, math.inf, 2.25], nan_ok=True)


# ── cards ────────────────────────────────────────────────────────────────────────────────
@pytest.fixture
def cards(monkeypatch):
    def pretend(count):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)

    return pretend


TWO = {"backend": "fsdp2", "processes": 2}
ON_CARDS = {"use_cpu": False}


def test_more_processes_than_cards_are_refused(export, cards, tmp_path):
    on_cards = SFTConfig(str(tmp_path / "x"), **SETTINGS | ON_CARDS)
    cards(1)
    with pytest.raises(ValueError, match=r"processes=2 .* needs 2 GPUs, and torch sees 1.*; use"):
        export(args=on_cards, **TWO)
    assert not (tmp_path / "recipe").exists()
    export("on the CPU", **TWO)
    cards(2)
    export(args=on_cards, **TWO)


def test_a_card_that_was_hidden_is_named(export, cards, tmp_path, monkeypatch):
    on_cards = SFTConfig(str(tmp_path / "x"), **SETTINGS | ON_CARDS)
    cards(1)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")  # as the bootstrap cell sets it
    with pytest.raises(ValueError, match="CUDA_VISIBLE_DEVICES=0 shows no more"):
        export(args=on_cards, **TWO)


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_a_t4_cannot_hand_a_quantized_model_to_trls_script(export, tmp_path, quantization):
    """TRL makes its adapters bfloat16, and fp16's gradient scaler takes none."""
    lora = LoraConfig(r=4, target_modules="all-linear")
    args = SFTConfig(str(tmp_path / "x"), **SETTINGS)
    args.fp16, args.use_cpu = True, False
    with pytest.raises(ValueError, match=r"fp16=True.*LeanSFTTrainer"):
        export(args=args, lora=lora, quantization=quantization)
    args.use_cpu = True
    export(args=args, lora=lora, quantization=quantization)


def test_a_recipe_for_another_machine_is_written_and_not_run_here(export, cards, tmp_path):
    cards(0)
    recipe = export(args=SFTConfig(str(tmp_path / "x"), **SETTINGS | ON_CARDS), **TWO)
    with pytest.raises(ValueError, match=r"processes=2 .* sees 0.*; use .*use_cpu=True"):
        training.run_recipe(recipe)
    assert not (recipe.folder / "log.txt").exists(), "nothing was started"


def test_a_file_that_was_changed_to_the_cpu_is_taken_at_its_word(tmp_path, cards):
    cards(1)
    recipe = stand_in(tmp_path, ENDED, processes=2, use_cpu=False)
    with pytest.raises(ValueError, match="needs 2 GPUs"):
        training.run_recipe(recipe)
    settings = {"use_cpu": True, "output_dir": str(recipe.folder)}
    (recipe.folder / "recipe.yaml").write_text(yaml.safe_dump(settings))
    assert training.run_recipe(recipe) == [1.5, 0.5]


@pytest.mark.parametrize(
    ("count", "visible", "expected"),
    [(1, None, "None"), (2, None, "0"), (2, "3,1", "3")],
)
def test_one_process_sees_one_card(tmp_path, cards, monkeypatch, count, visible, expected):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    cards(count)
    code = f"{ENDED}import os; print(os.environ.get('CUDA_VISIBLE_DEVICES'))"
    recipe = stand_in(tmp_path, code, use_cpu=False)
    training.run_recipe(recipe)
    assert (recipe.folder / "log.txt").read_text().split()[-1] == expected


# ── what a recipe can say ────────────────────────────────────────────────────────────────
@pytest.mark.parametrize(
    "setting",
    [
        {"layers_to_transform": [0]},
        {"exclude_modules": ["lm_head"]},
        {"rank_pattern": {"q_proj": 2}},
        {"alpha_pattern": {"q_proj": 2}},
        {"bias": "all"},
        {"init_lora_weights": "pissa"},
        {"trainable_token_indices": [1]},
        {"ensure_weight_tying": True},
    ],
)
def test_an_adapter_that_a_recipe_cannot_say_is_refused(export, tmp_path, setting):
    lora = LoraConfig(target_modules=["q_proj", "v_proj"], **setting)
    with pytest.raises(ValueError, match=f"lora has {next(iter(setting))}="):
        export(lora=lora)
    assert not (tmp_path / "recipe").exists()


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": "all-linear"},
        {"target_modules": ["q_proj", "v_proj"]},
        {"target_modules": ["q_proj"]},
        {"target_modules": r".*\.1\..*_proj", "use_rslora": True, "task_type": "CAUSAL_LM"},
        {"target_modules": ["o_proj"], "modules_to_save": ["lm_head"], "use_dora": True},
    ],
)
def test_trl_reads_the_adapter_that_was_meant(export, model, settings):
    def adapted(config):
        base = LlamaForCausalLM.from_pretrained(model)
        return {n: p.shape for n, p in get_peft_model(base, config).named_parameters()}

    meant = LoraConfig(r=3, lora_alpha=5, **settings)
    recipe = export(lora=meant)
    given = ["--config", str(recipe.folder / "recipe.yaml")]
    _, _, said, _ = make_parser().parse_args_and_config(given)
    read = get_peft_config(said)
    assert adapted(read) == adapted(meant)
    for name in ("r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora"):
        assert getattr(read, name) == getattr(meant, name)


def test_an_argument_that_is_no_text_is_refused(export, tmp_path):
    args = SFTConfig(str(tmp_path / "x"), **SETTINGS)
    args.accelerator_config.even_batches = False
    with pytest.raises(ValueError, match=r"args.accelerator_config=.*cannot be written"):
        export(args=args)


@pytest.mark.parametrize(
    ("choices", "words"),
    [
        ({"backend": "fsdp3"}, "backend must be one of"),
        ({"quantization": "q4"}, "quantization must be one of"),
        ({"processes": 0}, "processes must be at least 1"),
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
def test_no_script_needs_to_lie_beside_python(export, monkeypatch, tmp_path):
    # On Colab Python is /usr/bin/python3 and `trl` lies in /usr/local/bin.
    (tmp_path / "bin").mkdir()
    alone = tmp_path / "bin" / "python3"
    alone.symlink_to(Path(sys.executable).resolve())
    packages = [path for path in sys.path if path.endswith("site-packages")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(packages))
    monkeypatch.setattr(sys, "executable", str(alone))
    losses = training.run_recipe(export(settings={"max_steps": 1}))
    assert len(losses) == 1 and 0 < losses[0] < 20


@pytest.mark.slow
def test_one_process_and_two_agree(export):
    alone = training.run_recipe(export("alone"))
    assert len(alone) == 3 and alone[2] < alone[0]
    for backend in ("fsdp2", "ddp"):
        recipe = export(backend, backend=backend, processes=2)
        together = training.run_recipe(recipe, leave_s=10)
        assert len(together) == 3, "only the first process reports"
        assert together == pytest.approx(alone, rel=2e-3), backend


@pytest.mark.slow
def test_the_embedded_model_in_four_bits_runs_by_trl(export, tokenizer):
    recipe = export("nf4", {"max_steps": 2}, model=models.embedded_folder(), quantization="nf4")
    losses = training.run_recipe(recipe)
    assert len(losses) == 2 and all(0 < loss < 6 for loss in losses)
    saved = recipe.folder / "trained" / "adapter_model.safetensors"
    assert saved.is_file(), sorted(p.name for p in saved.parent.iterdir())
