"""What merging an adapter loses, by the type the merged weights are stored in (Chapter 3)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

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
        ValueError: no adapters, merged or untrained ones, or a variant such as DoRA.

    Example:
        >>> merge_error(model).loc["all layers", "nf4"] > 1  # doctest: +SKIP
        True
    """
    import pandas as pd
    from peft.tuners.lora import LoraLayer
    from peft.utils.integrations import dequantize_module_weight

    rows = []
    for name, layer in model.named_modules():
        if not isinstance(layer, LoraLayer) or not len(layer.lora_A):
            continue
        base = layer.get_base_layer()
        for state, wrong in {
            "merged already": layer.merged,
            "a variant such as DoRA": layer.lora_variant,
            "repacked for CPU inference (see check_training)": is_repacked(base),
        }.items():
            if wrong:
                raise ValueError(f"{name} is {state}; merge_error needs unmerged, plain LoRA")
        weight = dequantize_module_weight(base).float()
        active = [adapter for adapter in layer.active_adapters if adapter in layer.lora_A]
        delta = layer.get_delta_weight  # type: ignore[attr-defined]  # of its subclasses
        exact = weight + sum(delta(adapter).float() for adapter in active)
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


def _stored(weight: torch.Tensor, target: str) -> torch.Tensor:
    """`weight` after a round trip through the storage type `target`, in float32."""
    if target in ("nf4", "fp4"):
        import bitsandbytes.functional as bnb

        codes, state = bnb.quantize_4bit(
            weight, quant_type=target, blocksize=64, compress_statistics=True
        )
        return bnb.dequantize_4bit(codes, state).float()
    dtype = getattr(torch, target, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"into must name 'nf4', 'fp4' or float dtypes, not {target!r}")
    return weight.to(dtype).float()
