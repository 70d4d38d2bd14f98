"""How wrong is it? Errors of quantized weights as numbers, pictures and tables (Chapter 2)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from helpers import plots
from helpers._report import Shown, counted
from helpers.quantization._shared import Quantized

if TYPE_CHECKING:
    from collections.abc import Mapping

    from matplotlib.figure import Figure
    from pandas import DataFrame


@dataclass(frozen=True, repr=False, eq=False)
class ErrorReport(Shown):
    """What quantization did to one tensor.

    rmse: root of the mean squared error, and worst: the largest error, both in the unit
    of the weights. snr: signal to noise in decibels (each bit is worth about 6).
    bits_per_weight: storage, scales included. how: the quantizer's settings, in words.
    """

    bits_per_weight: float
    rmse: float
    worst: float
    snr: float
    weights: Tensor
    restored: Tensor
    how: str = ""

    def __str__(self) -> str:
        return (
            f"{self.bits_per_weight:.3f} bits per weight, RMSE {self.rmse:.3g}, "
            f"worst {self.worst:.3g}, SNR {self.snr:.1f} dB"
        )

    def plot(self) -> Figure:
        """The weights and the values they were rounded to, beside the errors."""
        _, (left, right) = plots.figure(1, 2, width=9, height=3)
        levels = self.restored.unique()
        title = self.how or f"{self.bits_per_weight:.3g} bits per weight"
        title += f": {counted(len(levels), 'value')}"
        look: dict[str, Any] = {"bins": 120, "ylabel": "count"}
        rug = levels if len(levels) <= 256 else ()
        plots.histogram(
            self.weights, ax=left, rug=rug, title=title, xlabel="weight", yscale="log", **look
        )
        title = f"RMSE {self.rmse:.3g}, SNR {self.snr:.1f} dB"
        error = self.restored - self.weights
        fig = plots.histogram(
            error, ax=right, colors=["orange"], title=title, xlabel="error", **look
        )
        for ax in (left, right):
            ax.locator_params(axis="x", nbins=5)  # more labels would collide
        return fig


def error_report(weights: Tensor, quantized: Quantized | Tensor) -> ErrorReport:
    """Compare weights with their quantized form: RMSE, worst case, SNR, bits (Chapter 2).

    Args:
        weights: the original ones.
        quantized: what a quantizer returned, or a tensor of the same shape (of another
            dtype, say); ValueError if the shapes differ.

    Example:
        >>> error_report(torch.tensor([3.0, -4.0]), torch.tensor([3.0, -3.0]))
        32.000 bits per weight, RMSE 0.707, worst 1, SNR 14.0 dB
    """
    how = ""
    if isinstance(quantized, Tensor):
        restored, bits = quantized, 8.0 * quantized.element_size()
    else:
        restored, bits = quantized.dequantize(torch.float32), quantized.bits_per_weight
        how = quantized.how
    if restored.shape != weights.shape:
        raise ValueError(
            f"quantized has shape {tuple(restored.shape)}, weights {tuple(weights.shape)}; "
            "both must describe the same tensor"
        )
    weights, restored = weights.detach().float().cpu(), restored.detach().float().cpu()
    error = (restored - weights).double()
    noise, signal = error.square().mean().item(), weights.double().square().mean().item()
    snr = 10 * math.log10(signal / noise) if noise and signal else math.inf
    worst = error.abs().max().item()
    return ErrorReport(bits, math.sqrt(noise), worst, snr, weights, restored, how)


def compare_errors(weights: Tensor, candidates: Mapping[str, Quantized | Tensor]) -> DataFrame:
    """Errors of several quantized forms of the same weights, a row each (Chapter 2).

    Args:
        weights: the original ones.
        candidates: `{name: quantized}`, each as in `error_report`.

    Example:
        >>> weights = torch.randn(8, 64)
        >>> list(compare_errors(weights, {"bfloat16": weights.bfloat16()}))
        ['bits_per_weight', 'rmse', 'worst', 'snr']
    """
    import pandas

    columns = ["bits_per_weight", "rmse", "worst", "snr"]
    reports = {name: error_report(weights, candidates[name]) for name in candidates}
    rows = [[getattr(report, column) for column in columns] for report in reports.values()]
    return pandas.DataFrame(rows, index=list(reports), columns=columns)
