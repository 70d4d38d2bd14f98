"""LoRA from scratch: one layer to read in one sitting (Chapter 3).

Hu et al. 2021, "LoRA"; Kalajdzievski 2023 for rsLoRA's scaling.
"""

from __future__ import annotations

import math

import torch
from torch import nn

from helpers._checks import whole_number


class LoRALinear(nn.Module):
    """A frozen linear layer plus a trainable low-rank detour, W x + scaling B A x.

    A has shape (rank, in_features) and starts random, B has shape (out_features, rank) and
    starts at zero, so the first output is the base's.

    Args:
        base: an `nn.Linear` of shape (out_features, in_features), plain or quantized; it is
            frozen here.
        rank: of the update; at least 1.
        alpha: its volume: scaling is alpha / rank.
        dropout: on the detour's input, in [0, 1).
        rslora: scale by alpha / sqrt(rank) instead.

    Raises:
        TypeError: another kind of layer, or a rank that is no whole number.
        ValueError: a number out of its range.

    Example:
        >>> layer = LoRALinear(nn.Linear(6, 4), rank=2)
        >>> sum(p.numel() for p in layer.parameters() if p.requires_grad)  # 2 (6 + 4)
        20
    """

    def __init__(
        self,
        base: nn.Linear,
        rank: int = 8,
        alpha: float = 16,
        dropout: float = 0.0,
        *,
        rslora: bool = False,
    ) -> None:
        super().__init__()
        if not isinstance(base, nn.Linear):
            raise TypeError(
                f"base must be an nn.Linear, not {type(base).__name__}; for GPT-2's Conv1D use PEFT"
            )
        whole_number("rank", rank)
        if not 0 < alpha < math.inf:
            raise ValueError(f"alpha must be a positive number such as 16, not {alpha!r}")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), such as 0.05, not {dropout!r}")
        self.base = base.requires_grad_(False)
        self.scaling = alpha / (math.sqrt(rank) if rslora else rank)
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        # In float32 beside a 16-bit or quantized base: small updates would round away.
        dtype = torch.float64 if base.weight.dtype == torch.float64 else torch.float32
        device = base.weight.device
        self.lora_A = nn.Linear(base.in_features, rank, bias=False, device=device, dtype=dtype)
        self.lora_B = nn.Linear(rank, base.out_features, bias=False, device=device, dtype=dtype)
        nn.init.zeros_(self.lora_B.weight)
        self.merged = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The base's output plus the detour's; x has shape (..., in_features)."""
        output = self.base(x)
        if self.merged:
            return output
        detour = self.lora_B(self.lora_A(self.dropout(x.to(self.lora_A.weight.dtype))))
        return (output + self.scaling * detour).to(output.dtype)

    def delta(self) -> torch.Tensor:
        """The update in full, scaling B A, of shape (out_features, in_features)."""
        return self.scaling * (self.lora_B.weight @ self.lora_A.weight)

    def merge(self) -> LoRALinear:
        """Add the update to the base's weight: one matrix again, as fast as before.

        While merged, A and B receive no gradient. Raises TypeError on a quantized base.
        """
        return self._shift(+1, merged=True)

    def unmerge(self) -> LoRALinear:
        """Take the update out of the base's weight again, exact up to rounding."""
        return self._shift(-1, merged=False)

    @torch.no_grad()
    def _shift(self, sign: int, *, merged: bool) -> LoRALinear:
        weight = self.base.weight
        if not weight.is_floating_point():
            raise TypeError(
                f"base holds {weight.dtype} codes, not numbers one can add to: dequantize "
                "it first, or merge into a full-precision copy of the model"
            )
        if self.merged != merged:
            weight += sign * self.delta().to(weight.dtype)
            self.merged = merged
        return self

    def extra_repr(self) -> str:
        """What `print(layer)` adds to the names of its parts."""
        return f"scaling={self.scaling:g}, merged={self.merged}"
