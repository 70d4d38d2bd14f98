"""Patterns of models, tokenizers and files."""

from __future__ import annotations

import ast
from collections.abc import Iterator

from helpers.course.check import _calls, _shell
from helpers.course.check._examples import Instance
from helpers.course.check._reading import Hit, Reading, pattern
from helpers.course.check._values import Method

# Checkpoints of 2023 to 2025 that are stored in 32 bits: their default dtype is what it was.
_STORED_IN_32_BITS = ("gpt2", "bert", "roberta", "t5", "bart", "pegasus", "electra")


@pattern
def always_safetensors(code: Reading) -> Iterator[Hit]:
    """Weights are saved in one format."""
    for _, words in code.named("save_pretrained", "save_model"):
        place = words.get("safe_serialization")
        if place is not None and code.constant(place) is False:
            yield Hit(place, "silent", "always_safetensors", "safe_serialization")


@pattern
def tokens_that_are_not_listed(code: Reading) -> Iterator[Hit]:
    """The additional special tokens have a place of their own."""
    old = "additional_special_tokens"
    if not any(old in (getattr(n, "attr", ""), getattr(n, "value", "")) for n in code.nodes):
        return
    for node in code.nodes:
        if not isinstance(node, ast.Attribute) or node.attr != "special_tokens_map":
            continue
        if isinstance(code.program.value(node.value), Instance):
            yield Hit(node, "silent", "special_tokens_map", "special_tokens_map")


@pattern
def dtype_of_a_config(code: Reading) -> Iterator[Hit]:
    """The config's attribute has the argument's new name, too."""
    for node in code.nodes:
        match node:
            case ast.Attribute(attr="torch_dtype", value=ast.Attribute(attr="config")):
                yield Hit(node, "warns", "torch_dtype", "torch_dtype")


@pattern
def stored_dtype(code: Reading) -> Iterator[Hit]:
    """A model loaded without a dtype: float32 it was, the checkpoint's own it is."""
    for node, words in code.named("from_pretrained"):
        target = code.program.value(node.func)
        owner = target.owner if isinstance(target, Method) else None
        name = getattr(owner, "__name__", "")
        is_model = name == "AutoModelForCausalLM" or name.endswith("ForCausalLM")
        if not is_model or not _calls.words_of(code.program, node)[1]:
            continue
        given = {"dtype", "torch_dtype", "load_in_8bit", "load_in_4bit", "quantization_config"}
        if given & words.keys():
            continue
        first = node.args[0] if node.args else words.get("pretrained_model_name_or_path")
        model = str(code.constant(first) or "").lower()
        if not any(part in model for part in _STORED_IN_32_BITS) and "config" not in words:
            yield Hit(node, "silent", "default_dtype", "dtype")


@pattern
def the_adapted_base(code: Reading) -> Iterator[Hit]:
    """`base_model` of a PEFT model is the model with the adapter in it."""
    from peft import PeftModel

    for node in code.methods("base_model"):
        owner = code.program.value(node.func.value)  # type: ignore[attr-defined]
        if code.is_within(node, "disable_adapter"):
            continue
        if isinstance(owner, Instance) and issubclass(owner.kind, PeftModel):
            yield Hit(node, "silent", "base_model_is_adapted", "base_model")


@pattern
def attentions_without_eager(code: Reading) -> Iterator[Hit]:
    """Attention weights asked of a kernel that has none."""
    words = {
        keyword.arg: code.constant(keyword)
        for node in code.calls
        for keyword in node.keywords
        if keyword.arg in ("attn_implementation", "attn_implementation_internal")
    }
    if "eager" in words.values():
        return
    for node in code.calls:
        for keyword in node.keywords:
            asked = keyword.arg == "output_attentions" and code.constant(keyword) is True
            target = code.program.value(node.func)
            if asked and isinstance(target, Instance | Method):
                yield Hit(keyword, "silent", "no_attentions", "output_attentions")


@pattern
def tuples_of_keys_and_values(code: Reading) -> Iterator[Hit]:
    """The cache of keys and values is an object; it was a tuple for each layer."""
    for node in code.nodes:
        match node:
            case ast.Subscript(value=value, slice=index) if code.is_cache(value):
                if not isinstance(index, ast.Constant) or isinstance(index.value, int):
                    yield Hit(node, "fails", "cache_is_an_object", "past_key_values")
            case ast.Attribute(attr="key_cache" | "value_cache" as name, value=value):
                if code.is_cache(value):
                    yield Hit(node, "fails", "cache_is_an_object", name)


@pattern
def tasks_of_pipelines(code: Reading) -> Iterator[Hit]:
    """Pipelines for tasks that chat models do now."""
    from transformers.pipelines import PIPELINE_REGISTRY

    there = {*PIPELINE_REGISTRY.supported_tasks, *PIPELINE_REGISTRY.task_aliases}
    for node, words in code.named("pipeline"):
        place = words.get("task", node.args[0] if node.args else None)
        task = code.constant(place)
        if place is not None and isinstance(task, str) and task not in there:
            yield Hit(place, "fails", "pipeline_task", task)


@pattern
def bfloat16_by_emulation(code: Reading) -> Iterator[Hit]:
    """A T4 says yes to bfloat16, which it emulates."""
    for node, words in code.named("is_bf16_supported"):
        if "including_emulation" not in words and not node.args:
            yield Hit(node, "silent", "bf16_on_t4", "is_bf16_supported")


@pattern
def ends_without_beginnings(code: Reading) -> Iterator[Hit]:
    """`add_eos_token` makes the tokenizer's frame anew, and drops the beginning."""
    for _, words in code.named("from_pretrained"):
        place = words.get("add_eos_token")
        if place is not None and code.constant(place) is True:
            yield Hit(place, "silent", "add_eos_token", "add_eos_token")
    for node in code.nodes:
        match node:
            case ast.Assign(targets=[ast.Attribute(attr="add_eos_token")], value=value):
                if code.constant(value) is True:
                    yield Hit(node, "silent", "add_eos_token", "add_eos_token")


@pattern
def files_of_before(code: Reading) -> Iterator[Hit]:
    """Weights are looked for under names that nothing writes any more."""
    for node in code.nodes:
        text = node.value if isinstance(node, ast.Constant) else None
        if isinstance(text, str) and text.endswith(("pytorch_model.bin", "adapter_model.bin")):
            yield Hit(node, "silent", "bin_files", text.split("/")[-1])


# ── addresses and files in strings ───────────────────────────────────────────────────────
@pattern
def texts(code: Reading) -> Iterator[Hit]:
    """Addresses that have moved, and Modelfiles, inside of strings."""
    for node in code.nodes:
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            for kind, symptom, word in _shell.in_text(node.value):
                yield Hit(node, kind, symptom, word)
