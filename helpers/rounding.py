"""Training in pure bfloat16: why small updates vanish, and rounding that keeps them
(Chapter 5).

bfloat16 has 8 bits of precision. An update smaller than half the distance to the next
number is rounded away every time; stochastic rounding keeps it once in a while, so that it
is kept on average (Gupta et al., 2015).
"""

import torch

DROPPED_BITS = 16  # what bfloat16 leaves out of a float32's 32


def stochastic_round(values, *, generator=None):
    """Round float32 to bfloat16, up or down at random, right on average (Chapter 5).

    values: a floating-point tensor of any shape. The chance to go up is how far the value
    lies on the way to the next bfloat16, so a value bfloat16 can hold stays as it is;
    infinities and NaN stay too. generator: a torch.Generator for the draws; the global one
    otherwise. Nothing global is changed but the state of the generator.
    """
    if not torch.is_tensor(values) or not values.is_floating_point():
        raise TypeError(f"values must be a floating-point tensor, not {type(values).__name__}")
    exact = values.detach().to(torch.float32)
    noise = torch.randint(
        0,
        1 << DROPPED_BITS,
        exact.shape,
        dtype=torch.int32,
        device=exact.device,
        generator=generator,
    )
    # A bfloat16 is the upper half of a float32: add noise to the lower half, let it carry
    # into the upper one or not, and cut the lower half off.
    bits = exact.contiguous().view(torch.int32) + noise
    cut = (bits >> DROPPED_BITS << DROPPED_BITS).view(torch.float32)
    return torch.where(exact.isfinite(), cut, exact).to(torch.bfloat16)


class BFloat16AdamW(torch.optim.Optimizer):
    """AdamW for weights and states in bfloat16, with either kind of rounding (Chapter 5).

    The arithmetic of a step is float32; its results are stored in bfloat16. rounding:
    'nearest', as every optimizer does, or 'stochastic'. seed: of the draws. Keeps 2 + 2 + 2
    bytes per trained weight where float32 training keeps 4 + 4 + 4.
    """

    def __init__(
        self,
        params,
        lr=1e-3,
        betas=(0.9, 0.999),
        eps=1e-8,
        weight_decay=0.0,
        rounding="stochastic",
        seed=0,
    ):
        if rounding not in ("nearest", "stochastic"):
            raise ValueError(f"rounding must be 'nearest' or 'stochastic', not {rounding!r}")
        settings = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, settings)
        self.rounding, self.seed = rounding, seed
        self._generators = {}

    def _rounded(self, values):
        if self.rounding == "nearest":
            return values.to(torch.bfloat16)
        device = values.device
        if device not in self._generators:
            self._generators[device] = torch.Generator(device).manual_seed(self.seed)
        return stochastic_round(values, generator=self._generators[device])

    @torch.no_grad()
    def step(self, closure=None):
        """One update of all weights that have a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    self._update(weight, self.state[weight], group)
        return loss

    def _update(self, weight, state, group):
        if not state:
            state["step"] = 0
            state["exp_avg"] = torch.zeros_like(weight)
            state["exp_avg_sq"] = torch.zeros_like(weight)
        state["step"] += 1
        first, second = group["betas"]
        gradient = weight.grad.float()
        mean = torch.lerp(state["exp_avg"].float(), gradient, 1 - first)
        square = torch.lerp(state["exp_avg_sq"].float(), gradient**2, 1 - second)
        state["exp_avg"].copy_(self._rounded(mean))
        state["exp_avg_sq"].copy_(self._rounded(square))
        mean = mean / (1 - first ** state["step"])
        square = square / (1 - second ** state["step"])
        kept = weight.float() * (1 - group["lr"] * group["weight_decay"])
        weight.copy_(self._rounded(kept - group["lr"] * mean / (square.sqrt() + group["eps"])))
