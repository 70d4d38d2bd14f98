"""Recipes that would have said less than the notebook, and runs judged by what they left."""

import copy
import json
import warnings
from dataclasses import fields

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import AdaLoraConfig, IA3Config, LoraConfig, TaskType, get_peft_model
from test_lora import tiny
from test_recipes import SETTINGS, export, model, stand_in, tokenizer  # noqa: F401 (fixtures)
from transformers import BitsAndBytesConfig
from trl import DPOConfig, SFTConfig, get_peft_config
from trl.scripts.sft import make_parser

from helpers import chat, models, training


def read(recipe):
    """What `trl sft` reads: its SFTConfig, and the adapter it makes."""
    given = ["--config", str(recipe.folder / "recipe.yaml")]
    _, args, chosen, _ = make_parser().parse_args_and_config(given, fail_with_unknown_args=True)
    return args, get_peft_config(chosen), chosen


def said(export, tmp_path, **settings):  # noqa: F811
    args = SFTConfig(str(tmp_path / "x"), **SETTINGS | settings)
    return args, *read(export(args=args))


# ── the adapter ──────────────────────────────────────────────────────────────────────────
@pytest.mark.field("own", "every field of LoraConfig: said, or refused, or a note")
def test_each_field_of_the_adapter_is_said_or_refused(export):  # noqa: F811
    notes = {"auto_mapping", "peft_version", "inference_mode", "base_model_name_or_path"}
    notes |= {"peft_type", "fan_in_fan_out"}  # PEFT itself sets the last one by the layer
    sayable = {"r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "target_modules"}
    sayable |= {"target_parameters", "modules_to_save", "task_type", "revision"}
    for number, field in enumerate(fields(LoraConfig)):
        if field.name not in notes | sayable:
            lora = LoraConfig(target_modules=["q_proj"])
            setattr(lora, field.name, "something else")
            with pytest.raises(ValueError, match=f"lora has {field.name}='something else'"):
                export(f"recipe {number}", lora=lora)
    assert number > 35, "every field has been looked at"


@pytest.mark.field("own", "settings of LoraConfig that trl sft has, and that were left out")
def test_refused_nothing_that_a_recipe_can_say_of_the_adapter(export):  # noqa: F811
    experts = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    lora = LoraConfig(
        target_modules=["q_proj", "v_proj"],
        target_parameters=experts,
        task_type=TaskType.SEQ_CLS,
        modules_to_save={"score"},
        revision="v2",
        lora_alpha=0.5,
    )
    _, adapter, chosen = read(export(lora=lora))
    assert adapter.target_parameters == experts and adapter.task_type == "SEQ_CLS"
    assert adapter.modules_to_save == ["score"] and adapter.lora_alpha == 0.5
    assert chosen.model_revision == "v2"


@pytest.mark.field("own", "the config of an adapter that is attached to GPT-2")
def test_refused_nothing_that_peft_set_by_itself(export):  # noqa: F811
    lora = LoraConfig(target_modules=["c_attn"])
    with warnings.catch_warnings(action="ignore"):  # "Setting fan_in_fan_out to True"
        attached = get_peft_model(tiny("gpt2"), lora).peft_config["default"]
    assert attached.fan_in_fan_out
    _, adapter, _ = read(export(lora=attached))
    assert adapter.r == lora.r


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"lora": AdaLoraConfig(total_step=9)}, "lora must be a LoraConfig or None .*AdaLora"),
        ({"lora": IA3Config()}, "lora must be a LoraConfig or None .*IA3Config"),
        ({"model": tiny}, "model must be a Hub id or a folder .*not Llama"),
        ({"dataset": [{"prompt": "a", "completion": "b"}]}, "dataset must be .*not list"),
        ({"args": "DPO"}, "args must be an SFTConfig .*DPOConfig"),
    ],
    ids=["AdaLoRA", "IA3", "a loaded model", "a list of rows", "DPO"],
)
@pytest.mark.field("own", "another adapter, another trainer's arguments, a loaded model")
def test_refused_recipes_of_another_kind(export, tmp_path, given, words):  # noqa: F811
    if "args" in given:
        given = {"args": DPOConfig(str(tmp_path / "x"), use_cpu=True)}
    elif "model" in given:
        given = {"model": given["model"]()}
    with pytest.raises(TypeError, match=words):
        export(**given)
    assert not (tmp_path / "recipe").exists()


# ── the arguments ────────────────────────────────────────────────────────────────────────
SAYABLE = {
    "run_name": "yoda",
    "max_length": None,
    "lr_scheduler_kwargs": {"num_cycles": 2},
    "label_names": [],
    "warmup_steps": 0.1,
    "optim": "sgd",
    "weight_decay": 1e-5,
    "neftune_noise_alpha": 5.0,
    "packing": True,
    "padding_free": True,
    "assistant_only_loss": True,
    "completion_only_loss": False,
    "loss_type": "dft",
    "seed": 7,
    "model_init_kwargs": {"attn_implementation": "eager"},
    "debug": "underflow_overflow",
    "gradient_accumulation_steps": 3,
    "max_grad_norm": 0.0,
    "dataset_kwargs": {"skip_prepare_dataset": True},
    "save_total_limit": 2,
    "torch_empty_cache_steps": 4,
}


@pytest.mark.field("own", "fields of SFTConfig that the file changed or dropped (run_name, lists)")
def test_each_argument_comes_back_as_it_was(export, tmp_path):  # noqa: F811
    meant, found, _, _ = said(export, tmp_path, **SAYABLE)
    apart = {"output_dir", "accelerator_config"}  # the folder's; an object of its own
    apart |= {"eos_token", "pad_token", "chat_template_path"}  # the tokenizer's
    for field in fields(SFTConfig):
        if field.name not in apart:
            assert getattr(found, field.name) == getattr(meant, field.name), field.name


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("model_init_kwargs", {"quantization_config": BitsAndBytesConfig(load_in_4bit=True)}),
        ("model_init_kwargs", {"dtype": torch.bfloat16}),
        ("learning_rate", np.float64(1e-4)),
    ],
    ids=["BitsAndBytesConfig", "torch.dtype", "a number of NumPy"],
)
@pytest.mark.field("own", "objects inside the fields of SFTConfig")
def test_refused_objects_that_a_file_has_no_words_for(export, tmp_path, name, value):  # noqa: F811
    args = SFTConfig(str(tmp_path / "x"), **SETTINGS)
    setattr(args, name, value)
    with pytest.raises(ValueError, match=f"(?s)args.{name}=.* cannot be written into a file"):
        export(args=args)
    assert not (tmp_path / "recipe").exists()


@pytest.mark.field("own", "evaluation while training, for which a recipe has no rows")
def test_refused_evaluation_without_rows(export, tmp_path):  # noqa: F811
    for number, settings in enumerate(({"eval_strategy": "steps"}, {"eval_on_start": True})):
        args = SFTConfig(str(tmp_path / "x"), **SETTINGS | settings)
        with pytest.raises(
            ValueError, match=r"args\.eval_strategy='(steps|no)' .* need held-out rows"
        ):
            export(str(number), args=args)


@pytest.mark.field("own", "push_to_hub without a name: the folder's would be taken")
def test_each_push_goes_where_the_notebook_said(export, tmp_path):  # noqa: F811
    _, found, _, _ = said(export, tmp_path, push_to_hub=True)
    assert found.hub_model_id == "x"
    _, found, _, _ = said(
        lambda **more: export("two", **more), tmp_path, push_to_hub=True, hub_model_id="you/y"
    )
    assert found.hub_model_id == "you/y"


@pytest.mark.parametrize(
    ("dtype", "quantization"), [("fp16", None), ("float64", None), ("auto", "nf4")]
)
@pytest.mark.field("own", "a dtype that trl sft does not know")
def test_refused_types_that_a_recipe_cannot_load(export, dtype, quantization):  # noqa: F811
    with pytest.raises(ValueError, match=f"dtype must be one of 'float32'.*not '{dtype}'"):
        export(dtype=dtype, quantization=quantization)


# ── the tokenizer ────────────────────────────────────────────────────────────────────────
@pytest.mark.field("LlamaFactory#6749, own", "a tokenizer with tokens that the model folder lacks")
def test_refused_tokens_that_the_model_does_not_have(export, tokenizer, tmp_path):  # noqa: F811
    mine = copy.deepcopy(tokenizer)
    chat.prepare_tokenizer(mine, special_tokens=["<yoda>", "ünï"])
    with pytest.raises(
        ValueError, match=r"tokenizer has tokens that model=.* lacks \(<yoda>, ünï\)"
    ):
        export(tokenizer=mine)
    assert not (tmp_path / "recipe").exists()
    mine.save_pretrained(tmp_path / "grown")
    export(tokenizer=mine, model=tmp_path / "grown")
    file = tmp_path / "grown" / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text("utf-8"))))  # ü as an escape
    export("escaped", tokenizer=mine, model=tmp_path / "grown")
    export("elsewhere", tokenizer=mine, model="you/a-model-that-is-not-here")
    (tmp_path / "binary").mkdir()  # a vocabulary that is no text, as SentencePiece's
    (tmp_path / "binary" / "tokenizer_config.json").write_text("{}")
    export("unread", tokenizer=mine, model=tmp_path / "binary")
    (tmp_path / "split").mkdir()  # and OPT's, whose words lie in a file of their own
    (tmp_path / "split" / "vocab.json").write_text(json.dumps(tokenizer.get_vocab()))
    export("two files", tokenizer=tokenizer, model=tmp_path / "split")
    with pytest.raises(ValueError, match="tokenizer has tokens that"):
        export("no", tokenizer=mine, model=tmp_path / "split")


@pytest.mark.field("own", "args that name another eos token than the tokenizer")
def test_each_token_is_the_one_the_trainer_would_take(export, tmp_path):  # noqa: F811
    _, found, _, _ = said(export, tmp_path, eos_token="<|endoftext|>")
    assert found.eos_token == "<|endoftext|>"


@pytest.mark.field("own", "a tokenizer with several chat templates")
def test_each_recipe_has_the_default_one_of_several_templates(export, tokenizer):  # noqa: F811
    mine = copy.deepcopy(tokenizer)
    mine.chat_template = {"default": tokenizer.chat_template, "tool_use": "{{ 1 }}"}
    written = (export(tokenizer=mine).folder / "chat_template.jinja").read_text()
    assert written == tokenizer.chat_template


# ── what a run left ──────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("name", ["SIGKILL", "SIGSEGV", "SIGILL", "SIGTERM"])
@pytest.mark.field("ggml-org/llama.cpp#28756, own", "trl sft ended by a signal")
def test_child_signals_are_named(tmp_path, name):
    recipe = stand_in(tmp_path, f"import os, signal; os.kill(os.getpid(), signal.{name})")
    words = f"{name}: most likely because memory ran out" if name == "SIGKILL" else name
    with pytest.raises(RuntimeError, match=f"the run was killed by {words}: "):
        training.run_recipe(recipe)


ENDED = "print({'loss': '1.5'}); print({'train_runtime': '3'})\n"


@pytest.mark.parametrize("fault", ["no training", "no weights", "empty weights"])
@pytest.mark.field("own", "trl sft that ends well and leaves nothing")
def test_child_that_ends_well_without_a_model_has_failed(tmp_path, fault):
    recipe = stand_in(tmp_path, "print('usage: sft')" if fault == "no training" else ENDED)
    weights = recipe.folder / "model.safetensors"
    if fault == "no weights":
        weights.unlink()
    elif fault == "empty weights":
        weights.write_text("")
    with pytest.raises(RuntimeError, match="ended without a trained model"):
        training.run_recipe(recipe)


# ── the loop and the batch ───────────────────────────────────────────────────────────────
def batch(**changes):
    ids = torch.arange(1, 9).reshape(1, -1)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids} | changes


@pytest.mark.field("trl#6668, own", "an update whose labels are all -100")
def test_each_update_must_train_a_token():
    model = tiny()  # noqa: F811
    nothing = batch(labels=torch.full((1, 8), -100))
    with pytest.raises(ValueError, match="update 2 have no trained token"):
        training.simple_loop(model, [batch(), nothing], lr=1e-3)
    assert all(p.isfinite().all() for p in model.parameters())
    [loss] = training.simple_loop(model, [batch(), nothing], lr=1e-3, gradient_accumulation_steps=2)
    assert 0 < loss < 10
    only_first = batch(labels=torch.tensor([[3] + [-100] * 7]))  # nothing predicts it
    with pytest.raises(ValueError, match="update 1 have no trained token"):
        training.simple_loop(model, [only_first], lr=1e-3)


@pytest.mark.field("own", "a packed batch, whose position_ids were dropped")
def test_each_field_of_a_batch_reaches_the_model():
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]])
    packed = batch(position_ids=positions)
    del packed["attention_mask"]
    expected = tiny()(**packed, use_cache=False).loss.item()
    [loss] = training.simple_loop(tiny(), [packed], lr=0.0)
    assert loss == pytest.approx(expected, rel=1e-5)
    assert abs(loss - tiny()(**batch()).loss.item()) > 1e-6  # and that is another number


def trainer(tmp_path, rows):
    args = SFTConfig(
        str(tmp_path), per_device_train_batch_size=1, **training.machine_settings(cpu())
    )
    made = training.LeanSFTTrainer(
        tiny(vocab_size=4096),
        args=args,
        train_dataset=Dataset.from_list(rows),
        processing_class=chat.prepare_tokenizer(models.load_tokenizer(models.EMBEDDED)),
    )
    return made


def cpu():
    from helpers import runtime

    return runtime.detect()


@pytest.mark.field("own", "rows of one length, of which one trains more tokens")
def test_each_length_is_measured_on_its_dearest_row(tmp_path):
    ids = list(range(100, 164))
    few = {"input_ids": ids, "labels": [-100] * 60 + ids[60:]}
    many = {"input_ids": ids, "labels": ids}
    made = [trainer(tmp_path, rows) for rows in ([few, many], [many])]
    made[0].train_dataset = made[0].train_dataset.with_format("torch")  # a format changes nothing
    peaks = [training.measure_step(one) for one in made]
    assert peaks[0] == pytest.approx(peaks[1], rel=0.01)
    assert training.measure_step(trainer(tmp_path, [few])) < 0.8 * peaks[1]


@pytest.mark.field(
    "trl#6668, trl#1053, trl#3927", "a train set that TRL has emptied, or that streams"
)
def test_refused_train_sets_without_rows_to_measure(tmp_path):
    made = trainer(tmp_path, [{"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}])
    full = made.train_dataset
    made.train_dataset = full.select([])
    with pytest.raises(ValueError, match="TRL left out all of its rows"):
        training.find_max_batch_size(made)
    made.train_dataset = full.to_iterable_dataset()
    with pytest.raises(ValueError, match="train_dataset streams"):
        training.measure_step(made)
