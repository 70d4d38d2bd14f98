"""Why a model is going to learn nothing, or the wrong thing (Chapter 3)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from helpers._report import Finding, Shown, card
from helpers.lora._modules import adapter_parts, is_norm, is_repacked, named_modules
from helpers.lora.report import parameter_report


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
    model: nn.Module, optimizer: torch.optim.Optimizer | None = None
) -> TrainingCheck:
    """Say why a model is going to learn nothing, or the wrong thing (Chapter 3).

    It looks at flags and dtypes and runs nothing. The codes: 'nothing_trainable',
    'adapter_inactive', 'adapter_frozen', 'adapter_merged', 'base_trainable',
    'norms_half_precision', 'no_gradient_path', 'optimizer_misses'.

    Args:
        model: plain, quantized, or with adapters of PEFT or of this package; TypeError when
            it is no torch module.
        optimizer: to have its parameters compared with the model's.

    Example:
        >>> check_training(nn.Linear(2, 2).requires_grad_(False)).codes
        ['nothing_trainable']
    """
    modules, tensors = named_modules(model), dict(model.named_parameters())
    trainable = {id(p): name for name, p in tensors.items() if p.requires_grad}
    # 'Params4bit' and 'Int8Params', told by name to leave bitsandbytes unimported.
    kbit = any(type(p).__name__ in ("Params4bit", "Int8Params") for p in tensors.values())

    own: set[int] = set()
    everyone, off, idle, merged = [list[str]() for _ in range(4)]
    active: list[tuple[str, nn.Parameter]] = []
    for layer, adapter, parameters in adapter_parts(model):
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

    biases = any(c.bias != "none" for c in getattr(model, "peft_config", {}).values())
    held = trainable if optimizer is None else _held(optimizer)
    culprits = {
        "nothing_trainable": [] if trainable else list(tensors),
        "adapter_inactive": off or idle or ([] if active else everyone),
        "adapter_frozen": frozen,
        "adapter_merged": merged,
        "base_trainable": [
            name
            for key, name in trainable.items()
            if (own or kbit) and key not in own and not (biases and name.endswith("bias"))
        ],
        "norms_half_precision": [
            name
            for name, module in modules.items()
            if kbit and is_norm(module) and any(p.itemsize == 2 for p in module.parameters())
        ],
        "no_gradient_path": [name for name, module in modules.items() if is_repacked(module)],
        "optimizer_misses": [name for key, name in trainable.items() if key not in held],
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


def _held(optimizer: torch.optim.Optimizer) -> set[int]:
    return {id(p) for group in optimizer.param_groups for p in group["params"]}


def _listed(names: Iterable[str]) -> str:
    return ", ".join(map(repr, sorted(set(names))))


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
    "base_trainable": "{n} tensors of the base model train too, such as {first}, and would not "
    "be saved with an adapter: freeze them, or name their modules in "
    "LoraConfig(modules_to_save=...).",
    "norms_half_precision": "{n} norm layers are in half precision, such as {first}: call "
    "prepare_model_for_kbit_training(model) before attaching the adapter.",
    "no_gradient_path": "{n} 4-bit layers ran in eval mode on this CPU, where bitsandbytes "
    "repacks them for good and without gradients, such as {first}: load the model again and "
    "call model.train() before its first forward pass.",
    "optimizer_misses": "{n} of {trainable} trainable tensors are not in the optimizer, such as "
    "{first}: create it after the adapter.",
}
