"""Why a model is going to learn nothing, or the wrong thing (Chapter 3)."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from helpers._report import Finding, Shown, card
from helpers.lora import _modules
from helpers.lora._tokens import untrained_rows
from helpers.lora.report import parameter_report

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, repr=False)
class TrainingCheck(Shown):
    """What `check_training` found.

    Attributes:
        problems: a `Finding(code, message)` each.
        headline: how much is trainable, in a sentence.
    """

    problems: list[Finding]
    headline: str

    @property
    def ok(self) -> bool:
        """Whether nothing was found."""
        return not self.problems

    @property
    def codes(self) -> list[str]:
        """The problems' codes."""
        return [problem.code for problem in self.problems]

    def __str__(self) -> str:
        lines = [f"✗ {problem}" for problem in self.problems] or ["✓ ready to train"]
        return "\n".join([*lines, self.headline])

    def _repr_html_(self) -> str:
        return card(str(self), "good" if self.ok else "bad")


def check_training(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> TrainingCheck:
    """Say why a model is going to learn nothing, or the wrong thing (Chapter 3).

    It looks at flags, settings and numbers and runs nothing. The codes: 'nothing_trainable',
    'adapter_inactive', 'adapter_frozen', 'adapter_merged', 'adapter_dead', 'alpha_zero',
    'dropout_one', 'not_finite', 'names_unmatched', 'base_trainable', 'new_tokens_untrained',
    'no_gradient_path', 'optimizer_misses', 'learning_rate_zero'.

    Args:
        model: plain, quantized, or with adapters of PEFT or of this package; TypeError when
            it is no torch module.
        optimizer: to have its parameters compared with the model's, and its learning rates
            looked at.
        tokenizer: to know which rows of a grown embedding belong to tokens; without it, of
            64 new rows only what cannot be rounding up is noticed.

    Example:
        >>> check_training(nn.Linear(2, 2).requires_grad_(False)).codes
        ['nothing_trainable']
    """
    modules, tensors = _modules.named_modules(model), dict(model.named_parameters())
    trainable = {id(p): name for name, p in tensors.items() if p.requires_grad}
    # 'Params4bit' and 'Int8Params', told by name to leave bitsandbytes unimported.
    kbit = any(type(p).__name__ in ("Params4bit", "Int8Params") for p in tensors.values())

    configs = getattr(model, "peft_config", {}).values()
    prompt = getattr(model, "prompt_encoder", None) if configs else None  # which adapts no layer
    own = {id(p) for p in prompt.parameters()} if isinstance(prompt, nn.Module) else set()
    everyone, off, idle, merged = [list[str]() for _ in range(4)]
    active: list[tuple[str, nn.Parameter]] = []
    for _, layer, adapter, parameters in _modules.adapter_parts(model):
        own.update(map(id, parameters))
        everyone.append(adapter)
        if getattr(layer, "merged", False):
            merged.append(adapter)
        if getattr(layer, "disable_adapters", False):
            off.append(adapter)
        elif adapter in getattr(layer, "active_adapters", ["default"]):
            active += [(adapter, parameter) for parameter in parameters]
        elif any(p.requires_grad for p in parameters):
            idle.append(adapter)
    frozen = [adapter for adapter, parameter in active if not parameter.requires_grad]

    biases = any(getattr(config, "bias", "none") != "none" for config in configs)
    rates = _learning_rates(optimizer)
    pairs = list(_modules.low_rank_pairs(model))
    culprits = {
        "nothing_trainable": [] if trainable else list(tensors),
        "adapter_inactive": off or idle or ([] if active else everyone),
        "adapter_frozen": frozen,
        "adapter_merged": merged,
        "adapter_dead": [
            name for name, _, ab in pairs if not any(x.is_meta or x.any() for x in ab)
        ],
        "alpha_zero": [name for name, scaling, _ in pairs if not scaling],
        "dropout_one": [
            name for name, m in model.named_modules() if isinstance(m, nn.Dropout) and m.p == 1
        ],
        "not_finite": [
            *(name for name, p in tensors.items() if not _is_finite(p)),
            *(f"{name}.scaling" for name, scaling, _ in pairs if not math.isfinite(scaling)),
            *["the learning rate"] * any(not math.isfinite(rate or 0) for rate in rates.values()),
        ],
        "names_unmatched": _unmatched(model),
        "base_trainable": [
            name
            for key, name in trainable.items()
            if (own or kbit) and key not in own and not (biases and name.endswith("bias"))
        ],
        "new_tokens_untrained": untrained_rows(model, tokenizer),
        "no_gradient_path": [name for name, m in modules.items() if _modules.is_repacked(m)],
        "optimizer_misses": [name for key, name in trainable.items() if rates and key not in rates],
        "learning_rate_zero": [name for key, name in trainable.items() if rates.get(key) == 0],
    }
    words = {
        "cure": _CURES["adapter" if own else "quantized" if kbit else "plain"],
        "active": sum(adapter in frozen for adapter, _ in active),
        "used": _listed(adapter for adapter, _ in active) or "no adapter",
        "route": "enable_adapter_layers()" if off else "set_adapter(name)",
        "trainable": len(trainable),
    }
    problems = [
        Finding(
            code,
            _MESSAGES[code].format(n=len(names), first=names[0], names=_listed(names), **words),
        )
        for code, names in culprits.items()
        if names
    ]
    return TrainingCheck(problems, parameter_report(model).headline)


def _learning_rates(optimizer: torch.optim.Optimizer | None) -> dict[int, Any]:
    """{id of a parameter: its learning rate}; before a warm-up, the rate that it leads to."""
    groups = optimizer.param_groups if optimizer else []
    return {id(p): g.get("initial_lr", g.get("lr")) for g in groups for p in g["params"]}


def _is_finite(parameter: torch.Tensor) -> bool:
    """Whether a parameter holds numbers only, or its scales do where it holds codes."""
    state = getattr(parameter, "quant_state", None)
    # Of 4-bit weights only the scales: codes may be stored as bfloat16, and mean no number.
    parts = state.as_dict().values() if state else [parameter, getattr(parameter, "SCB", None)]
    for part in parts:
        numbers = torch.as_tensor(part if isinstance(part, torch.Tensor | float) else 0).detach()
        real = numbers.is_floating_point() and numbers.itemsize > 1
        if numbers.is_meta or not real or not numbers.numel():
            continue
        # The extremes of a tensor with a NaN are NaN: no mask as large as it is needed.
        if not all(math.isfinite(extreme) for extreme in numbers.aminmax()):
            return False
    return True


def _unmatched(model: nn.Module) -> list[str]:
    """Names in the adapters' configs that fit no adapted layer; PEFT passes over them."""
    found = []
    for adapter, config in getattr(model, "peft_config", {}).items():
        adapted = set()
        for name, layer, other, _ in _modules.adapter_parts(model):
            if other == adapter:
                name = name.rpartition("base_model.model.")[2].replace(".base_layer", "")
                adapted |= {name, f"{name}.{getattr(layer, 'parameter_name', '')}"}
        for field, pattern in _NAMING.items():
            names: Any = getattr(config, field, None)
            if isinstance(names, str | None):  # a regex must fit something, or PEFT refuses
                continue
            if field == "target_modules" and getattr(config, "exclude_modules", None):
                continue  # which may take out what it names
            for said in [names] if isinstance(names, int) else names:
                wanted = pattern.format(said if "_pattern" in field else re.escape(str(said)))
                if not any(re.fullmatch(wanted, name) for name in adapted):
                    found.append(f"{field}: {said}")
    # For a classifier PEFT names both heads there are, of which a model has one.
    return [name for name in found if not name.endswith((": classifier", ": score"))]


def _listed(names: Iterable[str]) -> str:
    return ", ".join(map(repr, sorted(set(names))))


# How PEFT looks for the names that a field of its config holds.
_BY_ENDING = ("target_modules", "target_parameters", "rank_pattern", "alpha_pattern")
_NAMING = dict.fromkeys(_BY_ENDING, r"(.*\.)?({})")
_NAMING |= {"modules_to_save": r".*{}", "layers_to_transform": r".*\.{}\..*"}
_CURES = {
    "adapter": "its adapter is the part to unfreeze",
    "quantized": "quantized weights cannot train by themselves: attach an adapter",
    "plain": "nothing is left to do",
}
_MESSAGES = {
    "nothing_trainable": "all {n} tensors are frozen: {cure}.",
    "adapter_inactive": "{names} is attached and not used: the forward pass goes through {used}. "
    "Call model.{route}.",
    "adapter_frozen": "{n} of the {active} tensors of adapter {names} are frozen. Loaded from "
    "disk? PeftModel.from_pretrained(..., is_trainable=True); else model.set_adapter({names}).",
    "adapter_merged": "{names} is merged into the base weights and gets no gradient: unmerge "
    "first (model.unmerge_adapter()).",
    "adapter_dead": "A and B are both zero in {n} layers, such as {first}: each one's gradient is "
    "a product with the other, so they stay zero. Start A at random (init_lora_weights=True), or "
    "load the tensors that were trained.",
    "alpha_zero": "the scaling is 0 in {n} layers, such as {first}, and whatever the adapter "
    "computes is multiplied by it: give lora_alpha (or alpha_pattern) a number such as 16.",
    "dropout_one": "{n} dropout layers let nothing through (p=1), such as {first}: use 0.05 or 0.",
    "not_finite": "{n} tensors or numbers are NaN or infinite, such as {first}, and the loss will "
    "be NaN: make or load them anew.",
    "names_unmatched": "the adapter's config names what fits no adapted layer ({names}), and PEFT "
    "passes over it: mind the spelling, or see lora.find_target_modules(model).",
    "base_trainable": "{n} tensors of the base model train too, such as {first}, and would not "
    "be saved with an adapter: freeze them, or name their modules in "
    "LoraConfig(modules_to_save=...).",
    "new_tokens_untrained": "rows of new tokens are still the mean of all rows, such as {first}, "
    "and nothing trains them: name them in LoraConfig(trainable_token_indices=...), or their "
    "layer in modules_to_save.",
    "no_gradient_path": "{n} 4-bit layers ran in eval mode on this CPU, where bitsandbytes "
    "repacks them for good and without gradients, such as {first}: load the model again and "
    "call model.train() before its first forward pass.",
    "optimizer_misses": "{n} of {trainable} trainable tensors are not in the optimizer, such as "
    "{first}: create it after the adapter.",
    "learning_rate_zero": "{n} of {trainable} trainable tensors have a learning rate of 0, such as "
    "{first}: adapters learn with 1e-4 to 3e-3.",
}
