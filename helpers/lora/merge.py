"""What merging an adapter loses, by the type the merged weights are stored in (Chapter 3)."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from helpers.lora._modules import is_repacked

if TYPE_CHECKING:
    import pandas as pd


@torch.no_grad()
def merge_error(
    model: nn.Module, into: Sequence[str] = ("nf4", "bfloat16", "float16", "float32")
) -> pd.DataFrame:
    """How much of the adapters' update is lost by merging, per destination (Chapter 3).

    Args:
        model: with unmerged, trained LoRA adapters of PEFT, its base quantized or not; it is
            not changed.
        into: what the merged weight is stored as: 'nf4', 'fp4' or names of float dtypes.

    Returns:
        A row per kind of layer and one for all: `update` is |BA| / |W|, each other column
        |stored - exact| / |BA| in Frobenius norms, where exact is W + BA in float32. 0 keeps
        the update, 1 loses as much as the update is long.

    Raises:
        ValueError: no adapters, merged or untrained ones, a variant such as DoRA, or what
            merging would get wrong: a weight that another layer shares (tied embeddings).

    Example:
        >>> merge_error(model).loc["all layers", "nf4"] > 1  # doctest: +SKIP
        True
    """
    import pandas as pd
    from peft.tuners.lora import LoraLayer

    rows, modules, holders = [], dict(model.named_modules()), _holders(model)
    for name, layer in modules.items():
        if not isinstance(layer, LoraLayer) or not layer.r:
            continue
        base: Any = layer.get_base_layer()
        active = [adapter for adapter in layer.active_adapters if adapter in layer.r]
        biased = any(layer.lora_bias[a] for a in active) and getattr(base, "bias", None) is None
        for state, wrong in {
            "merged already": layer.merged,
            "a variant such as DoRA": layer.lora_variant,
            "repacked for CPU inference (see check_training)": is_repacked(base),
            "trained with lora_bias, on a base without a bias": biased,
            "without data (meta or offloaded)": next(base.parameters()).is_meta,
        }.items():
            if wrong:
                raise ValueError(f"{name} is {state}; merge_error needs unmerged, plain LoRA")
        weight = layer.get_param() if hasattr(layer, "get_param") else base.weight
        others = [other for other in holders[weight.data_ptr()] if base is not modules[other]]
        if others:
            raise ValueError(
                f"{name} shares its weight with {others[0].removesuffix('.base_layer')}, and "
                "merging would change both: serve the adapter unmerged, or train tied embeddings "
                "by trainable_token_indices, or by modules_to_save with ensure_weight_tying=True"
            )
        weight = _dequantized(base, weight)
        delta = layer.get_delta_weight  # type: ignore[attr-defined]  # of its subclasses
        exact = weight + sum(delta(adapter).float() for adapter in active)
        if not exact.isfinite().all():
            raise ValueError(f"{name} holds NaN or infinite numbers (see check_training)")
        parts = [weight, exact - weight, *(_stored(exact, target) - exact for target in into)]
        rows.append((name.rsplit(".", 1)[-1], 1, *(float(p.square().sum()) for p in parts)))
    squares = pd.DataFrame(rows, columns=["kind", "layers", "weight", "update", *into])
    if not squares["update"].sum():
        raise ValueError("model has no trained LoRA layers: attach an adapter and train it")
    squares = squares.groupby("kind", sort=False).sum()
    squares.loc["all layers"] = squares.sum()
    lost = squares[list(into)].div(squares["update"], axis=0) ** 0.5
    lost.insert(0, "update", (squares["update"] / squares["weight"]) ** 0.5)
    lost.insert(0, "layers", squares["layers"].astype(int))
    return lost


def _holders(model: nn.Module) -> dict[int, list[str]]:
    """{where a weight lies: names of the modules that use it}."""
    from peft.utils import ModulesToSaveWrapper

    found = defaultdict(list)
    saved = [m.original_module for m in model.modules() if isinstance(m, ModulesToSaveWrapper)]
    for name, module in model.named_modules():
        if not any(module is original for original in saved):  # a copy stands in for these
            for parameter in module.parameters(recurse=False):
                found[parameter.data_ptr()].append(name)
    return found


def _dequantized(base: nn.Module, weight: Any) -> torch.Tensor:
    from peft.utils.integrations import dequantize_module_weight

    if type(weight).__name__ == "Params4bit":
        return _read_4bit(weight.data, weight.quant_state)
    whole = weight is getattr(base, "weight", None)  # not one of several, as experts have them
    return (dequantize_module_weight(base) if whole else weight).float()


def _read_4bit(codes: torch.Tensor, state: Any) -> torch.Tensor:
    """`dequantize_4bit` as one long row, which is right everywhere.

    By rows, bitsandbytes' kernel for AVX512 restarts the blocks at each of them.
    """
    import bitsandbytes.functional as bnb

    flat = copy.copy(state)
    flat.shape = torch.Size([state.shape.numel()])
    return bnb.dequantize_4bit(codes, flat).reshape(state.shape).float()


def _stored(weight: torch.Tensor, target: str) -> torch.Tensor:
    """`weight` after a round trip through the storage type `target`, in float32."""
    if target in ("nf4", "fp4"):
        import bitsandbytes.functional as bnb

        codes, state = bnb.quantize_4bit(
            weight, quant_type=target, blocksize=64, compress_statistics=True
        )
        return _read_4bit(codes, state)
    dtype = getattr(torch, target, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"into must name 'nf4', 'fp4' or float dtypes, not {target!r}")
    return weight.to(dtype).float()
