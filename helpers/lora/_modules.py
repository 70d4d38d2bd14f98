"""What the room asks of a model's modules: which there are, of what kind, in what state."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from helpers.lora.layer import LoRALinear


def named_modules(model: nn.Module) -> dict[str, nn.Module]:
    """{name: module} without the root and without the children of adapted layers."""
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model must be a torch module such as a loaded model, not {type(model).__name__}"
        )
    modules: dict[str, nn.Module] = {}
    private: tuple[str, ...] = ()  # base_layer, lora_A, ... are the adapted layer's own matter
    for name, module in model.named_modules():
        if name and not name.startswith(private):
            modules[name] = module
            if hasattr(module, "base_layer"):
                private += (f"{name}.",)
    return modules


def inside_attention(name: str) -> bool:
    """Whether a module or parameter belongs to an attention block, by its name."""
    return any("attn" in part or "attention" in part for part in name.split("."))


def is_norm(module: nn.Module) -> bool:
    """LayerNorm, RMSNorm and whatever an architecture calls its own."""
    return "norm" in type(module).__name__.lower()


def is_repacked(module: nn.Module) -> bool:
    """True for a 4-bit layer in bitsandbytes' inference format for AVX512-BF16 CPUs.

    Its first forward in eval mode converts it there and back comes nothing: the kernel has
    no autograd, and whoever dequantizes the weight reads it in the wrong order.
    """
    state = getattr(getattr(module, "weight", None), "quant_state", None)
    return getattr(state, "packing_format_for_cpu", False)


def adapter_parts(model: nn.Module) -> Iterator[tuple[str, Any, str, list[nn.Parameter]]]:
    """(name, layer, adapter's name, its parameters) for adapters of PEFT and `LoRALinear`."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper

    for name, layer in model.named_modules():
        if isinstance(layer, LoRALinear):
            parameters = [*layer.lora_A.parameters(), *layer.lora_B.parameters()]
            yield name, layer, "default", parameters
        elif isinstance(layer, BaseTunerLayer | ModulesToSaveWrapper):
            for part in layer.adapter_layer_names:
                for adapter, item in getattr(layer, part, {}).items():
                    whole = isinstance(item, nn.Parameter)
                    yield name, layer, adapter, [item] if whole else list(item.parameters())


def low_rank_pairs(model: nn.Module) -> Iterator[tuple[str, float, list[torch.Tensor]]]:
    """(name, scaling, [A, B]) of every low-rank adapter that the forward pass goes through."""
    from peft.tuners.lora import LoraLayer

    for name, layer in model.named_modules():
        if isinstance(layer, LoRALinear):
            yield name, layer.scaling, [layer.lora_A.weight, layer.lora_B.weight]
        elif isinstance(layer, LoraLayer):
            for adapter in set(layer.active_adapters).intersection(layer.r):
                kind = "lora_" if adapter in layer.lora_A else "lora_embedding_"
                pair = [getattr(layer, kind + part)[adapter] for part in "AB"]
                yield name, layer.scaling[adapter], [getattr(x, "weight", x) for x in pair]
