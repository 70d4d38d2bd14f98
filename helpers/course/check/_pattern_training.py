"""Patterns of trainers and their settings."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from importlib.util import find_spec

from helpers.course.check import _calls
from helpers.course.check._examples import Instance
from helpers.course.check._reading import Hit, Reading, config_of, is_adapted, pattern

_CONFIGS = ("SFTConfig", "TrainingArguments", "Seq2SeqTrainingArguments", "DPOConfig")
_TRACKERS = ("tensorboard", "wandb", "mlflow", "comet_ml", "neptune", "swanlab", "trackio")
# Their samples read each other in a pack (Chapter 4 measures it).
_LEAKING = ("opt-", "falcon", "mpt", "bloom")


@pattern
def adapter_twice(code: Reading) -> Iterator[Hit]:
    """A model that has its adapter, and the adapter's settings once more."""
    for node, words in code.named("SFTTrainer", "DPOTrainer", "RewardTrainer"):
        given = words.get("peft_config")
        is_none = isinstance(given, ast.keyword) and isinstance(given.value, ast.Constant)
        if given is None or is_none:
            continue
        if is_adapted(code, node, words):
            yield Hit(given, "fails", "adapter_twice", "peft_config")


@pattern
def trainer_without_data(code: Reading) -> Iterator[Hit]:
    """A trainer made for its model alone, as a search for the batch size did."""
    for node, words in code.named("SFTTrainer"):
        complete = _calls.words_of(code.program, node)[1]
        if complete and "train_dataset" not in words and len(node.args) < 4:
            yield Hit(node, "fails", "no_dataset", "train_dataset")


@pattern
def packing(code: Reading) -> Iterator[Hit]:
    """Packing keeps samples whole now; on some architectures they read one another."""
    names = {str(n.value).lower() for n in code.nodes if isinstance(n, ast.Constant)}
    leaking = any(part in name and "/" in name for name in names for part in _LEAKING)
    for _, words in code.named("SFTConfig"):
        place = words.get("packing")
        if place is None or code.constant(place) is not True or "packing_strategy" in words:
            continue
        yield Hit(place, "silent", "packing_changed", "packing")
        if leaking:
            yield Hit(place, "silent", "packing_leaks", "packing")


@pattern
def settings_that_changed(code: Reading) -> Iterator[Hit]:
    """SFTConfig's own defaults: bfloat16 and checkpointing are on."""
    for node, words in code.named("SFTConfig"):
        chosen = "bf16" in words or "use_cpu" in words
        chosen |= "fp16" in words and code.constant(words["fp16"]) is not False
        if _calls.words_of(code.program, node)[1] and not chosen:
            yield Hit(node, "silent", "sft_defaults", "bf16")


@pattern
def int8_checkpointing(code: Reading) -> Iterator[Hit]:
    """8-bit layers keep their inputs under the checkpointing of today."""
    for _, words in code.named("BitsAndBytesConfig", "from_pretrained"):
        place = words.get("load_in_8bit")
        if place is None or code.constant(place) is not True or not code.trains:
            continue
        reentrant = [
            value
            for n in code.nodes
            if isinstance(n, ast.Dict)
            for key, value in zip(n.keys, n.values, strict=True)
            if code.constant(key) == "use_reentrant"
        ]
        off = any(
            code.constant(words.get(name)) is False
            for _, words in code.named("SFTConfig", "TrainingArguments")
            for name in ("gradient_checkpointing", "activation_checkpointing")
        )
        if not off and not any(code.constant(value) is True for value in reentrant):
            yield Hit(place, "silent", "int8_checkpointing", "load_in_8bit")


@pattern
def trackers_that_are_missing(code: Reading) -> Iterator[Hit]:
    """A report to a program that is not installed."""
    for _, words in code.named(*_CONFIGS):
        place = words.get("report_to")
        value = place.value if isinstance(place, ast.keyword) else None
        asked = value.elts if isinstance(value, ast.List) else [value] if value else []
        for one in asked:
            name = code.constant(one)
            if place is not None and name in _TRACKERS and find_spec(name) is None:
                yield Hit(place, "fails", "reporter_missing", "report_to", needs=name)


@pattern
def report_to_nothing(code: Reading) -> Iterator[Hit]:
    """`None`, which meant all that is installed, or nothing."""
    for _, words in code.named(*_CONFIGS):
        place = words.get("report_to")
        if isinstance(place, ast.keyword):
            branches = [place.value, *ast.walk(place.value)]
            if any(isinstance(n, ast.Constant) and n.value is None for n in branches):
                yield Hit(place, "fails", "report_to_none_value", "report_to")


@pattern
def config_of_another_trainer(code: Reading) -> Iterator[Hit]:
    """TRL's trainers but one want the config that bears their name."""
    from transformers import TrainingArguments

    for node, words in code.named("DPOTrainer", "RewardTrainer", "KTOTrainer", "ORPOTrainer"):
        place = words.get("args", node.args[2] if len(node.args) > 2 else None)
        value = place.value if isinstance(place, ast.keyword) else place
        found = code.program.value(value) if value is not None else None
        if place and isinstance(found, Instance) and found.kind is TrainingArguments:
            yield Hit(place, "fails", "config_of_its_own", "args")


@pattern
def evaluation_without_data(code: Reading) -> Iterator[Hit]:
    """A strategy for an evaluation that has no rows."""
    for node, words in code.named("Trainer", "SFTTrainer", "DPOTrainer", "Seq2SeqTrainer"):
        complete = _calls.words_of(code.program, node)[1]
        config = config_of(code, words) or {}
        asked = config.get("eval_strategy", config.get("evaluation_strategy"))
        without = complete and "eval_dataset" not in words and len(node.args) < 5
        if without and asked is not None and code.constant(asked) in ("steps", "epoch"):
            yield Hit(node, "fails", "no_eval_data", "eval_dataset")


@pattern
def state_that_is_no_model(code: Reading) -> Iterator[Hit]:
    """`set_peft_model_state_dict` changes its model and returns a report."""
    for node in code.nodes:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call):
            target = code.program.value(node.value.func)
            if getattr(target, "__name__", "") == "set_peft_model_state_dict":
                yield Hit(node, "fails", "state_is_no_model", "set_peft_model_state_dict")


@pattern
def optimizer_of_torchao(code: Reading) -> Iterator[Hit]:
    """torchao's small optimizers have left the prototypes."""
    for node in code.nodes:
        if isinstance(node, ast.ImportFrom) and node.module == "torchao.prototype.low_bit_optim":
            yield Hit(node, "fails", "torchao_optimizer", node.module)


@pattern
def silent_trackers(code: Reading) -> Iterator[Hit]:
    """No tracker named: none is reported to, where all that are installed were."""
    for node, words in code.named("TrainingArguments", "Seq2SeqTrainingArguments"):
        if "report_to" not in words and _calls.words_of(code.program, node)[1]:
            yield Hit(node, "silent", "report_to_none", "report_to")


@pattern
def adapter_in_bfloat16(code: Reading) -> Iterator[Hit]:
    """The adapter of a quantized model becomes bfloat16 in the trainer."""
    quantized = any(
        code.constant(words.get(name)) is True
        for _, words in code.named("BitsAndBytesConfig")
        for name in ("load_in_4bit", "load_in_8bit")
    )
    for node, words in code.named("SFTTrainer"):
        if quantized and ("peft_config" in words or is_adapted(code, node, words)):
            yield Hit(words.get("model", node), "silent", "adapter_bfloat16", "model")
