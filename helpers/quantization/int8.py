"""LLM.int8(): a scale for every row, and columns that stay out (Chapter 2)."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from helpers.quantization._shared import Quantized, check_weights, or_one


@dataclass(frozen=True, repr=False, eq=False)
class QuantizedInt8(Quantized):
    """Row-wise int8 codes of a matrix, and the outlier columns kept out of them.

    codes: int8 (rows, columns). absmax: float32 (rows,); value = code × absmax / 127.
    outlier_columns: indices; outliers: those columns in float16, (rows, outliers).
    """

    absmax: Tensor
    outlier_columns: Tensor
    outliers: Tensor

    def _values(self) -> Tensor:
        values = self.codes * self.absmax[:, None] * (1 / 127)
        values[:, self.outlier_columns] = self.outliers.float()
        return values


def quantize_int8(matrix: Tensor, *, threshold: float = 0.0) -> QuantizedInt8:
    """Quantize a matrix to int8 with one scale per row, as LLM.int8() does (Chapter 2).

    Args:
        matrix: weights (out, in) or activations (tokens, features). It passes through
            float16 first, as in bitsandbytes' `Linear8bitLt`, whose codes these equal.
        threshold: columns that hold a magnitude of at least this much stay in float16. The
            library's default for activations is 6.0; 0.0 means no outliers.

    Example:
        >>> quantize_int8(torch.tensor([[-0.5, 1.0], [0.0, 0.25]])).codes
        tensor([[-64, 127],
                [  0, 127]], dtype=torch.int8)
    """
    check_weights(matrix, "matrix")
    if matrix.ndim != 2:
        raise ValueError(f"matrix must have two dimensions, not shape {tuple(matrix.shape)}")
    if not isinstance(threshold, int | float) or not threshold >= 0:
        raise ValueError(f"threshold must be 0.0 (off) or positive, not {threshold!r}")
    half = matrix.detach().to(torch.float16)
    if not math.isfinite(half.abs().max()):
        raise ValueError("matrix holds values beyond float16's 65504: use quantize_linear")
    is_outlier = half.abs() >= (threshold or math.inf)
    columns = is_outlier.any(dim=0).nonzero().flatten()
    inliers = half.masked_fill(is_outlier, 0)
    absmax = inliers.abs().amax(dim=1).float()
    codes = torch.round(inliers * (127.0 / or_one(absmax))[:, None]).to(torch.int8)
    codes[:, columns] = 0
    return QuantizedInt8(codes, matrix.shape, matrix.dtype, absmax, columns, half[:, columns])
