"""Where to put adapters: the linear layers of any architecture, by name (Chapter 3)."""

from __future__ import annotations

from collections import Counter

from torch import nn

from helpers.lora._modules import inside_attention, named_modules


def find_target_modules(model: nn.Module, *, attention_only: bool = False) -> list[str]:
    """The linear layers of any model as short names for `LoraConfig(target_modules=...)`.

    The same layers as PEFT's 'all-linear': every `nn.Linear` (quantized ones too) and
    GPT-2 `Conv1D` except the output head (QLoRA, section 4). A name is as short as it can
    be without matching any other module, so GPT-2's attention gives 'attn.c_proj', because
    'c_proj' alone would match its MLP too.

    Args:
        model: loaded, quantized, adapted or on the meta device.
        attention_only: only the layers inside attention blocks.

    Raises:
        TypeError: `model` is no torch module.
        ValueError: there is nothing to adapt.

    Example:
        >>> find_target_modules(nn.ModuleDict({"up": nn.Linear(2, 8), "act": nn.ReLU()}))
        ['up']
    """
    from transformers.pytorch_utils import Conv1D

    modules = named_modules(model)
    head = getattr(model, "get_output_embeddings", lambda: None)()
    linear = {
        name
        for name, module in modules.items()
        if isinstance(getattr(module, "base_layer", module), nn.Linear | Conv1D)
        and module is not head
    }
    wanted = {name for name in linear if not attention_only or inside_attention(name)}
    if not wanted:
        kinds = Counter(type(module).__name__ for module in modules.values())
        found = ", ".join(f"{kind} × {n}" for kind, n in kinds.most_common(4)) or "nothing"
        what = "linear layers inside attention blocks" if linear else "linear layers"
        advice = "leave attention_only off" if linear else "name its layers yourself"
        raise ValueError(
            f"model ({type(model).__name__}) has no {what} to adapt; it holds {found}. "
            f"Pass a causal language model, or {advice}."
        )
    targets: list[str] = []
    for name in modules:  # in the model's order, which reads better than the alphabet's
        if name in wanted and not any(_matches(name, target) for target in targets):
            targets.append(_shortest_suffix(name, wanted, modules))
    return targets


def _matches(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _shortest_suffix(name: str, wanted: set[str], modules: dict[str, nn.Module]) -> str:
    parts = name.split(".")
    for length in range(1, len(parts)):
        suffix = ".".join(parts[-length:])
        if all(other in wanted for other in modules if _matches(other, suffix)):
            return suffix
    return name
