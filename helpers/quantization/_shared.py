"""What all quantizers share: a result with a way back, blocks, and checks."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from helpers._report import Shown


@dataclass(frozen=True, repr=False, eq=False)
class Quantized(Shown):
    """Codes of a tensor of this shape and dtype, and what decodes them."""

    codes: Tensor
    shape: torch.Size
    dtype: torch.dtype

    def __str__(self) -> str:
        weights = " × ".join(map(str, self.shape))
        return f"{type(self).__name__}: {weights} weights, {self.bits_per_weight:.3f} bits each"

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The values that the codes stand for, in the weights' shape.

        Args:
            dtype: of the result; the weights' own unless given.
        """
        values = self._values().flatten()[: self.shape.numel()]
        return values.reshape(self.shape).to(dtype or self.dtype)

    @property
    def bits_per_weight(self) -> float:
        """Measured: all that is stored but single numbers."""
        parts = [part for part in vars(self).values() if isinstance(part, Tensor) and part.ndim]
        return 8 * sum(part.nbytes for part in parts) / self.shape.numel()

    @property
    def how(self) -> str:
        """The settings in words, where there is a choice."""
        return ""

    def _values(self) -> Tensor:
        """In the order of the weights, perhaps with a few too many at the end."""
        raise NotImplementedError


def in_blocks(values: Tensor, block_size: int) -> Tensor:
    """(blocks, block_size); a short last block repeats its last value: same extremes."""
    flat = values.flatten()
    if missing := -flat.numel() % block_size:
        flat = torch.cat([flat, flat[-1:].expand(missing)])
    return flat.reshape(-1, block_size)


def or_one(scale: Tensor) -> Tensor:
    """A scale to divide by: all-zero weights have none, and any will do."""
    return torch.where(scale > 0, scale, 1.0)


def check_weights(weights: object, name: str = "weights") -> None:
    """Raise unless this is a tensor with numbers in it, and all of them finite."""
    if not isinstance(weights, Tensor):
        raise TypeError(f"{name} must be a torch tensor, not {type(weights).__name__}")
    if weights.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(f"{name} must be float32, bfloat16 or float16, not {weights.dtype}")
    if not weights.numel():
        raise ValueError(f"{name} is empty (shape {tuple(weights.shape)})")
    # The extremes of a tensor with a NaN are NaN: no mask as large as the tensor needed.
    if not all(math.isfinite(extreme) for extreme in weights.detach().aminmax()):
        bad = int((~torch.isfinite(weights)).sum())
        raise ValueError(f"{name} holds {bad} infinite or NaN value(s) of {weights.numel():,}")
