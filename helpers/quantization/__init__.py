"""Numbers in fewer bits, from evenly spaced levels to NF4 with double quantization (Chapter 2).

The codes equal those of bitsandbytes 0.50's CPU kernels bit for bit (on an H100: NF4's too, though
2 in 1,000 of its double-quantized scales differ; FP4's but for its two zeros, which change places,
and in bfloat16 one byte in nine hundred; int8's but for one in ten thousand, because CUDA divides
less exactly). Sources: Dettmers et al., "8-bit Optimizers via Block-wise Quantization"
(2110.02861), "LLM.int8()" (2208.07339) and "QLoRA" (2305.14314).
"""

from helpers.quantization.four_bit import (
    CODE_BOOKS,
    Quantized4Bit,
    bits_per_weight,
    dynamic_code_book,
    fp4_code_book,
    nf4_code_book,
    quantize_fp4,
    quantize_nf4,
)
from helpers.quantization.int8 import QuantizedInt8, quantize_int8
from helpers.quantization.linear import GROUPS, SCHEMES, QuantizedUniform, quantize_linear
from helpers.quantization.report import ErrorReport, compare_errors, error_report

__all__ = [
    "CODE_BOOKS",
    "GROUPS",
    "SCHEMES",
    "ErrorReport",
    "Quantized4Bit",
    "QuantizedInt8",
    "QuantizedUniform",
    "bits_per_weight",
    "compare_errors",
    "dynamic_code_book",
    "error_report",
    "fp4_code_book",
    "nf4_code_book",
    "quantize_fp4",
    "quantize_int8",
    "quantize_linear",
    "quantize_nf4",
]
