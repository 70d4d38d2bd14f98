"""What no signature tells: code that still runs and means something else, one reader each.

A pattern looks at the calls of a whole notebook and names an entry of the doctor's catalog,
where cause and cure stand. Each is held by a test that runs the libraries and sees it happen.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from typing import Any

from helpers.course.check import _calls, _shell
from helpers.course.check._objects import Derived, Instance, Method, Program

# Checkpoints of 2023 to 2025 that are stored in 32 bits: their default dtype is what it was.
_STORED_IN_32_BITS = ("gpt2", "bert", "roberta", "t5", "bart", "pegasus", "electra")
_TRACKERS = ("tensorboard", "wandb", "mlflow", "comet_ml", "neptune", "swanlab", "trackio")
# Their samples read each other in a pack (Chapter 4 measures it).
_LEAKING = ("opt-", "falcon", "mpt", "bloom")


@dataclass(frozen=True)
class Hit:
    """A place, what happens there and the symptom that tells it.

    needs: a package that is not installed; where the notebook brings it, nothing happens.
    """

    node: ast.AST
    kind: str
    symptom: str
    word: str
    needs: str = ""


class Reading:
    """The calls of a program, found once for all patterns."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.nodes = list(ast.walk(program.tree))
        self.calls = [node for node in self.nodes if isinstance(node, ast.Call)]

    def named(self, *names: str) -> Iterator[tuple[ast.Call, dict[str, ast.AST]]]:
        """Calls of functions, methods or classes (or what is derived from them) by name."""
        for node in self.calls:
            target = self.program.value(node.func)
            target = target.base if isinstance(target, Derived) else target
            name = target.name if isinstance(target, Method) else getattr(target, "__name__", "")
            if name in names and target is not None:
                yield node, _calls.words_of(self.program, node)[0]

    def methods(self, *names: str) -> Iterator[ast.Call]:
        """Calls of anything's method, known or not, by name."""
        for node in self.calls:
            if isinstance(node.func, ast.Attribute) and node.func.attr in names:
                yield node

    def constant(self, node: ast.AST | None) -> Any:
        """The value of a keyword or an expression that is a plain constant; else None."""
        if isinstance(node, ast.keyword):
            node = node.value
        if isinstance(node, ast.Name):
            bound, _ = self.program.binding(node.id, node)
            node = bound if isinstance(bound, ast.AST) else node
        return node.value if isinstance(node, ast.Constant) else None

    @cached_property
    def trains(self) -> bool:
        """Whether an SFTTrainer is made."""
        return any(True for _ in self.named("SFTTrainer"))

    @cached_property
    def trains_all_tokens(self) -> bool:
        """Whether some config says that prompts are trained as well."""
        return any(
            self.constant(words.get("completion_only_loss")) is False
            for _, words in self.named("SFTConfig")
        )

    def columns_of(self, node: ast.AST | None, depth: int = 9) -> set[str] | None:
        """The columns of a data set that the code makes itself; None where not to be seen."""
        node = node.value if isinstance(node, ast.keyword) else node
        if isinstance(node, ast.Name):
            node = self.program.binding(node.id, node)[0]
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute) or not depth:
            return None
        given = [a.left if isinstance(a, ast.BinOp) else a for a in node.args]  # [row] * 4
        match node.func.attr, given:
            case "from_list", [ast.ListComp(elt=ast.Dict(keys=keys))]:
                return {str(self.constant(key)) for key in keys}
            case "from_list", [ast.List(elts=[ast.Dict(keys=keys), *_])]:
                return {str(self.constant(key)) for key in keys}
            case "from_dict", [ast.Dict(keys=keys)]:
                return {str(self.constant(key)) for key in keys}
            case "rename_column", [old, new]:
                before = self.columns_of(node.func.value, depth - 1)
                if before is not None:
                    return before - {self.constant(old)} | {str(self.constant(new))}
            case "select" | "shuffle", _:
                return self.columns_of(node.func.value, depth - 1)
        return None

    @cached_property
    def columns(self) -> dict[str, tuple[ast.AST, ast.AST | None]]:
        """Columns that the code makes: name -> (place, value where it is to be seen)."""
        found: dict[str, tuple[ast.AST, ast.AST | None]] = {}
        for node in self.nodes:
            match node:
                case ast.Dict(keys=keys, values=values):
                    for key, value in zip(keys, values, strict=True):
                        if isinstance(key, ast.Constant) and isinstance(key.value, str):
                            found.setdefault(key.value, (node, value))
                case ast.Assign(targets=[ast.Subscript(slice=ast.Constant(value=str(name)))]):
                    found.setdefault(name, (node, node.value))
                case ast.Call(func=ast.Attribute(attr="rename_column"), args=[_, new]):
                    if isinstance(name := self.constant(new), str):
                        found[name] = (node, None)
                case ast.Call(func=ast.Attribute(attr="add_column"), args=[new, *_]):
                    if isinstance(name := self.constant(new), str):
                        found[name] = (node, None)
                case ast.Call(func=ast.Attribute(attr="rename_columns"), args=[ast.Dict() as to]):
                    for value in to.values:
                        if isinstance(name := self.constant(value), str):
                            found[name] = (node, None)
        return found

    def is_bare_text(self, node: ast.AST | None) -> bool:
        """Whether a column's value is text without words of a template of its own."""
        if isinstance(node, ast.Name):
            bound, _ = self.program.binding(node.id, node)
            node = bound if isinstance(bound, ast.AST) else node
        match node:
            case ast.List() | ast.ListComp() | ast.Tuple() | ast.Subscript(slice=ast.Slice()):
                return False
            case ast.JoinedStr(values=parts):
                words = [part.value for part in parts if isinstance(part, ast.Constant)]
                return not any(char.isalpha() for char in "".join(map(str, words)))
        return True

    def function(self, node: ast.AST | None) -> ast.FunctionDef | ast.Lambda | None:
        """The function that a keyword's value is, where the code defines it."""
        node = node.value if isinstance(node, ast.keyword) else node
        if isinstance(node, ast.Name):
            node = self.program.binding(node.id, node)[0]
        return node if isinstance(node, ast.FunctionDef | ast.Lambda) else None

    def is_cache(self, node: ast.AST) -> bool:
        """Whether an expression is a model's cache of keys and values."""
        if isinstance(node, ast.Name):
            node = self.program.binding(node.id, node)[0]
        return isinstance(node, ast.Attribute) and node.attr == "past_key_values"

    def is_within(self, node: ast.AST, method: str) -> bool:
        """Whether a node stands in a `with thing.method():`."""
        while node in self.program.above:
            node = self.program.above[node][0]
            for item in node.items if isinstance(node, ast.With) else ():
                call = item.context_expr
                if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute):
                    if call.func.attr == method:
                        return True
        return False

    def uses(self, node: ast.Call) -> Iterator[tuple[ast.AST, ast.AST]]:
        """Where the result of a call goes: (what stands around it, the expression)."""
        above = self.program.above[node][0]
        if isinstance(above, ast.Attribute) and above.attr in ("to", "cuda"):  # …(…).to(device)
            call = self.program.above[above][0]
            if isinstance(call, ast.Call):
                yield from self.uses(call)
                return
        if isinstance(above, ast.Assign) and isinstance(above.targets[0], ast.Name):
            name = above.targets[0].id
            for other in self.nodes:
                if (
                    isinstance(other, ast.Name)
                    and other.id == name
                    and isinstance(other.ctx, ast.Load)
                    and self._bound_to(other, node)
                ):
                    yield self.program.above[other][0], other
        else:
            yield above, node

    def _bound_to(self, name: ast.Name, call: ast.Call) -> bool:
        bound, _ = self.program.binding(name.id, name)
        return isinstance(bound, ast.AST) and call in ast.walk(bound)


PATTERNS: list[Callable[[Reading], Iterator[Hit]]] = []


def pattern(function: Callable[[Reading], Iterator[Hit]]) -> Callable[[Reading], Iterator[Hit]]:
    """Register a pattern."""
    PATTERNS.append(function)
    return function


def hits(program: Program) -> Iterator[Hit]:
    """What all patterns find."""
    reading = Reading(program)
    for one in PATTERNS:
        yield from one(reading)


# ── rows and texts ───────────────────────────────────────────────────────────────────────
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
        columns = code.columns_of(words.get("train_dataset"))
        columns = code.columns.keys() if columns is None else columns
        if isinstance(function, ast.FunctionDef) and _handles_a_batch(function):
            yield Hit(place, "fails", "formatter_batched", "formatting_func")
        elif {"prompt", "completion"} <= columns and not code.trains_all_tokens:
            yield Hit(place, "fails", "formatter_refused", "formatting_func")
        elif columns >= {"prompt"} and code.columns_of(words.get("train_dataset")) is not None:
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
        named = "dataset_text_field" in (_config_of(code, words) or {})
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
        if code.constant((_config_of(code, words) or {}).get("packing")) is True:
            yield Hit(place, "fails", "collator_and_packing", "data_collator")
        elif isinstance(value, Instance) and value.kind in plain:
            yield Hit(place, "fails", "unequal_rows", "data_collator")


def _config_of(code: Reading, words: dict[str, ast.AST]) -> dict[str, ast.AST] | None:
    """The keywords of a trainer's config; None where they cannot be seen."""
    given = words.get("args")
    node = given.value if isinstance(given, ast.keyword) else None
    if isinstance(node, ast.Name):
        node = code.program.binding(node.id, node)[0]
    return _calls.words_of(code.program, node)[0] if isinstance(node, ast.Call) else None


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


# ── training ─────────────────────────────────────────────────────────────────────────────
@pattern
def adapter_twice(code: Reading) -> Iterator[Hit]:
    """A model that has its adapter, and the adapter's settings once more."""
    from peft import PeftModel

    for node, words in code.named("SFTTrainer", "DPOTrainer", "RewardTrainer"):
        model = words.get("model", node.args[0] if node.args else None)
        value = code.program.value(model.value if isinstance(model, ast.keyword) else model)  # type: ignore[arg-type]
        given = words.get("peft_config")
        is_none = isinstance(given, ast.keyword) and isinstance(given.value, ast.Constant)
        if given is None or is_none:
            continue
        if isinstance(value, Instance) and issubclass(value.kind, PeftModel):
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
    for _, words in code.named("SFTConfig", "TrainingArguments", "DPOConfig"):
        place = words.get("report_to")
        value = place.value if isinstance(place, ast.keyword) else None
        asked = value.elts if isinstance(value, ast.List) else [value] if value else []
        for one in asked:
            name = code.constant(one)
            if place is not None and name in _TRACKERS and find_spec(name) is None:
                yield Hit(place, "fails", "reporter_missing", "report_to", needs=name)


@pattern
def optimizer_of_torchao(code: Reading) -> Iterator[Hit]:
    """torchao's small optimizers have left the prototypes."""
    for node in code.nodes:
        if isinstance(node, ast.ImportFrom) and node.module == "torchao.prototype.low_bit_optim":
            yield Hit(node, "fails", "torchao_optimizer", node.module)


@pattern
def silent_trackers(code: Reading) -> Iterator[Hit]:
    """Weights & Biases imported and never named: it is not reported to by default."""
    wandb = [n for n in code.nodes if isinstance(n, ast.Import) and n.names[0].name == "wandb"]
    if not wandb:
        return
    for node, words in code.named("SFTConfig", "TrainingArguments"):
        if "report_to" not in words and _calls.words_of(code.program, node)[1]:
            yield Hit(node, "silent", "report_to_none", "report_to")


# ── models ───────────────────────────────────────────────────────────────────────────────
@pattern
def always_safetensors(code: Reading) -> Iterator[Hit]:
    """Weights are saved in one format."""
    for node, words in code.named("save_pretrained", "save_model"):
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
        if isinstance(node, ast.Attribute) and node.attr == "special_tokens_map":
            if isinstance(code.program.value(node.value), Instance):
                yield Hit(node, "silent", "special_tokens_map", "special_tokens_map")


@pattern
def stored_dtype(code: Reading) -> Iterator[Hit]:
    """A model loaded without a dtype: float32 it was, the checkpoint's own it is."""
    for node, words in code.named("from_pretrained"):
        target = code.program.value(node.func)
        owner = target.owner if isinstance(target, Method) else None
        name = getattr(owner, "__name__", "")
        is_model = name == "AutoModelForCausalLM" or name.endswith("ForCausalLM")
        given = {"dtype", "torch_dtype", "quantization_config", "load_in_8bit", "load_in_4bit"}
        if not is_model or given & words.keys() or not _calls.words_of(code.program, node)[1]:
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


# ── addresses and files in strings ───────────────────────────────────────────────────────
@pattern
def texts(code: Reading) -> Iterator[Hit]:
    """Addresses that have moved, and Modelfiles, inside of strings."""
    for node in code.nodes:
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            for kind, symptom, word in _shell.in_text(node.value):
                yield Hit(node, kind, symptom, word)
