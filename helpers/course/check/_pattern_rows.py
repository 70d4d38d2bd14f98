"""Patterns of rows, texts and templates: what is trained on is something else now."""

from __future__ import annotations

import ast
from collections.abc import Iterator

from helpers.course.check import _calls
from helpers.course.check._examples import Instance
from helpers.course.check._reading import Hit, Reading, config_of, pattern


@pattern
def strings_without_template(code: Reading) -> Iterator[Hit]:
    """Prompt and completion as strings: trl put them into the template, and does no more."""
    if not code.trains or not {"prompt", "completion"} <= code.columns.keys():
        return
    (place, prompt), (other, completion) = code.columns["prompt"], code.columns["completion"]
    if code.is_bare_text(prompt) and code.is_bare_text(completion):
        later = max(place, other, key=lambda node: node.lineno)  # type: ignore[attr-defined]
        yield Hit(later, "silent", "strings", "completion")


@pattern
def formatting_function(code: Reading) -> Iterator[Hit]:
    """A formatting function of a batch, or one that is refused or not asked."""
    for _, words in code.named("SFTTrainer"):
        if "formatting_func" not in words:
            continue
        place, function = words["formatting_func"], code.function(words["formatting_func"])
        known = code.columns_of(words.get("train_dataset"))
        columns = code.columns.keys() if known is None else known
        if isinstance(function, ast.FunctionDef) and _handles_a_batch(function):
            yield Hit(place, "fails", "formatter_batched", "formatting_func")
        elif {"prompt", "completion"} <= columns and not code.trains_all_tokens:
            yield Hit(place, "fails", "formatter_refused", "formatting_func")
        elif known is not None and "prompt" in known and "completion" not in known:
            yield Hit(place, "fails", "prompt_alone", "formatting_func")
        elif {"prompt", "messages"} & columns:
            yield Hit(place, "silent", "formatter_ignored", "formatting_func")


@pattern
def columns_without_a_meaning(code: Reading) -> Iterator[Hit]:
    """Rows none of whose columns the trainer reads."""
    for _, words in code.named("SFTTrainer"):
        place = words.get("train_dataset")
        columns = code.columns_of(place)
        if place is None or not columns or "formatting_func" in words:
            continue
        named = "dataset_text_field" in (config_of(code, words) or {})
        read = {"text", "messages", "prompt", "input_ids", "images", "image"}
        if not read & columns and not named:
            word = "conversations" if "conversations" in columns else "train_dataset"
            yield Hit(place, "fails", "no_text_column", word)


@pattern
def collators(code: Reading) -> Iterator[Hit]:
    """A collator that cannot pad the labels that trl now makes, or one beside packing."""
    from transformers import DataCollatorForLanguageModeling, DataCollatorWithPadding

    for _, words in code.named("SFTTrainer"):
        place = words.get("data_collator")
        if not isinstance(place, ast.keyword) or code.constant(place.value) is not None:
            continue
        value = code.program.value(place.value)
        plain = (DataCollatorForLanguageModeling, DataCollatorWithPadding)
        if code.constant((config_of(code, words) or {}).get("packing")) is True:
            yield Hit(place, "fails", "collator_and_packing", "data_collator")
        elif isinstance(value, Instance) and value.kind in plain:
            yield Hit(place, "fails", "unequal_rows", "data_collator")


def _handles_a_batch(function: ast.FunctionDef) -> bool:
    """Whether a function returns a list of texts, as trl asked for until 0.15."""
    returns = [n.value for n in ast.walk(function) if isinstance(n, ast.Return) and n.value]
    lists = {
        target.id
        for n in ast.walk(function)
        if isinstance(n, ast.Assign) and isinstance(n.value, ast.List | ast.ListComp)
        for target in n.targets
        if isinstance(target, ast.Name)
    }
    return bool(returns) and all(
        isinstance(value, ast.List | ast.ListComp)
        or (isinstance(value, ast.Name) and value.id in lists)
        for value in returns
    )


@pattern
def end_appended(code: Reading) -> Iterator[Hit]:
    """A text that a template has ended already: trl appends the end-of-sequence token."""
    if not code.trains:
        return
    templated = [
        node
        for node in code.methods("apply_chat_template")
        if code.constant(_calls.words_of(code.program, node)[0].get("tokenize")) is False
    ]
    for _, words in code.named("SFTConfig", "SFTTrainer"):
        place = words.get("dataset_text_field")
        if place is not None and templated and _is_config(code, place):
            yield Hit(place, "silent", "second_end", "dataset_text_field")


def _is_config(code: Reading, place: ast.AST) -> bool:
    call = code.program.above.get(place, (None, None))[0]
    target = code.program.value(call.func) if isinstance(call, ast.Call) else None
    return getattr(target, "__name__", "") == "SFTConfig" or isinstance(call, ast.Dict)


@pattern
def template_gives_a_dictionary(code: Reading) -> Iterator[Hit]:
    """Ids from a template, used as the list or tensor that they were."""
    for node in code.methods("apply_chat_template"):
        words, _ = _calls.words_of(code.program, node)
        if code.constant(words.get("tokenize")) is False or "return_dict" in words:
            continue
        if len(node.args) > 3:  # tokenize or more given by position
            continue
        used = [_as_what(around, inner) for around, inner in code.uses(node)]
        if "mapping" in used or not used:
            continue
        if "fails" in used:
            yield Hit(node, "fails", "template_returns_dict", "apply_chat_template")
        elif "changed" in used:
            yield Hit(node, "silent", "template_returns_dict", "apply_chat_template")


def _as_what(around: ast.AST, inner: ast.AST) -> str:
    """How a result is used: as a mapping, in a way that fails now, or otherwise."""
    match around:
        case ast.Subscript(value=value, slice=ast.Constant(value=str())) if value is inner:
            return "mapping"
        case ast.keyword(arg=None):
            return "mapping"
        case ast.Attribute(attr=name) if name in ("input_ids", "attention_mask", "keys", "items"):
            return "mapping"
        case ast.Attribute(attr=name) if name in ("shape", "size", "dim", "unsqueeze", "squeeze"):
            return "fails"
        case ast.Call(func=ast.Attribute(attr="generate"), args=[first, *_]) if first is inner:
            return "fails"
        case ast.keyword(arg="input_ids" | "inputs"):
            return "fails"
        case ast.Call(func=ast.Attribute(attr="tensor" | "LongTensor")):
            return "fails"
        case ast.Call(func=ast.Name(id="len")):
            return "changed"
        case ast.Subscript(value=value) if value is inner:
            return "changed"
        case ast.ListComp(elt=value) if value is inner:
            return "changed"
        case ast.Call(func=ast.Attribute(attr="append")) | ast.Dict():
            return "changed"
    return "other"


@pattern
def columns_are_lazy(code: Reading) -> Iterator[Hit]:
    """A tokenizer given a whole column, which is no list any more."""
    for node in code.calls:
        target = code.program.value(node.func)
        if not (isinstance(target, Instance) and hasattr(target.kind, "apply_chat_template")):
            continue
        for argument in node.args[:1]:
            if isinstance(argument, ast.Subscript) and _is_column(code, argument):
                yield Hit(argument, "fails", "column_is_lazy", "tokenizer")


def _is_column(code: Reading, node: ast.Subscript) -> bool:
    from datasets import Dataset, DatasetDict

    owner = code.program.value(node.value)
    return (
        isinstance(owner, Instance)
        and issubclass(owner.kind, Dataset)
        and not issubclass(owner.kind, DatasetDict)
        and isinstance(code.constant(node.slice), str)
    )


@pattern
def settings_not_read(code: Reading) -> Iterator[Hit]:
    """Words that are taken and thrown away: a misspelled setting, an old padding switch."""
    import inspect

    from transformers import BitsAndBytesConfig

    known = set(inspect.signature(BitsAndBytesConfig).parameters)
    for _, words in code.named("BitsAndBytesConfig"):
        for word, place in words.items():
            if word not in known:
                yield Hit(place, "silent", "setting_ignored", word)
    for node in code.calls:
        value = code.program.value(node.func)
        if isinstance(value, Instance) and hasattr(value.kind, "apply_chat_template"):
            for word, place in _calls.words_of(code.program, node)[0].items():
                if word == "pad_to_max_length":
                    yield Hit(place, "silent", "pad_to_max_length", word)


@pattern
def loading_scripts(code: Reading) -> Iterator[Hit]:
    """Data sets are no longer loaded by code of theirs."""
    for _, words in code.named("load_dataset"):
        place = words.get("trust_remote_code")
        if place is not None and code.constant(place) is not False:
            yield Hit(place, "warns", "dataset_script", "trust_remote_code")
