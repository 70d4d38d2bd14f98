"""Training in pure bfloat16: why small updates vanish, and rounding that keeps them (Chapter 5).

bfloat16 has 8 bits of precision. An update smaller than half the distance to the next
number is rounded away every time; stochastic rounding keeps it once in a while, so that it
is kept on average (Gupta et al., 2015).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from helpers._checks import one_of

_DROPPED_BITS = 16  # what bfloat16 leaves out of a float32's 32


def stochastic_round(values: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
    """Round float32 to bfloat16, up or down at random, right on average (Chapter 5).

    The chance to go up is how far a value lies on the way to the next bfloat16, so one that
    bfloat16 can hold stays as it is; infinities and NaN stay too.

    Args:
        values: floating point, of any shape; TypeError otherwise.
        generator: of the draws; the global one unless given.

    Example:
        >>> stochastic_round(torch.full((10_000,), 1.001)).float().unique()
        tensor([1.0000, 1.0078])
    """
    if not torch.is_tensor(values) or not values.is_floating_point():
        raise TypeError(f"values must be a floating-point tensor, not {type(values).__name__}")
    exact = values.detach().to(torch.float32).contiguous()
    noise = torch.empty_like(exact, dtype=torch.int32)
    noise.random_(0, 1 << _DROPPED_BITS, generator=generator)
    # A bfloat16 is the upper half of a float32: add noise to the lower half, let it carry
    # into the upper one or not, and cut the lower half off.
    bits = exact.view(torch.int32) + noise
    cut = (bits >> _DROPPED_BITS << _DROPPED_BITS).view(torch.float32)
    return torch.where(exact.isfinite(), cut, exact).to(torch.bfloat16)


class BFloat16AdamW(torch.optim.Optimizer):
    """AdamW for weights and states in bfloat16, with either kind of rounding (Chapter 5).

    The arithmetic of a step is float32; its results are stored in bfloat16. Keeps 2 + 2 + 2
    bytes per trained weight where float32 training keeps 4 + 4 + 4.

    Args:
        params: weights, or groups of them.
        lr: learning rate.
        betas: decay of both running means.
        eps: added to the denominator.
        weight_decay: decoupled.
        rounding: 'nearest', as every optimizer does, or 'stochastic'.
        seed: of the draws.

    Example:
        >>> weight = torch.nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
        >>> optimizer = BFloat16AdamW([weight], lr=0.5)
        >>> weight.sum().backward()
        >>> optimizer.step()
        >>> weight.data
        tensor([0.5000, 0.5000], dtype=torch.bfloat16)
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        rounding: str = "stochastic",
        seed: int = 0,
    ) -> None:
        one_of("rounding", rounding, ("nearest", "stochastic"))
        settings = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, settings)
        self.rounding, self.seed = rounding, seed
        self._generators: dict[torch.device, torch.Generator] = {}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of all weights that have a gradient; returns the closure's loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    self._update(weight, weight.grad.float(), self.state[weight], group)
        return loss

    def _update(self, weight: Tensor, gradient: Tensor, state: dict, group: dict) -> None:
        if not state:
            state["step"] = 0
            state["exp_avg"] = torch.zeros_like(weight)
            state["exp_avg_sq"] = torch.zeros_like(weight)
        state["step"] += 1
        first, second = group["betas"]
        mean = torch.lerp(state["exp_avg"].float(), gradient, 1 - first)
        square = torch.lerp(state["exp_avg_sq"].float(), gradient**2, 1 - second)
        state["exp_avg"].copy_(self._rounded(mean))
        state["exp_avg_sq"].copy_(self._rounded(square))
        mean = mean / (1 - first ** state["step"])
        square = square / (1 - second ** state["step"])
        kept = weight.float() * (1 - group["lr"] * group["weight_decay"])
        weight.copy_(self._rounded(kept - group["lr"] * mean / (square.sqrt() + group["eps"])))

    def _rounded(self, values: Tensor) -> Tensor:
        if self.rounding == "nearest":
            return values.to(torch.bfloat16)
        device = values.device
        if device not in self._generators:
            self._generators[device] = torch.Generator(device).manual_seed(self.seed)
        return stochastic_round(values, generator=self._generators[device])
