"""Exercises of Chapter 2: numbers in fewer bits."""

import math

import torch

from helpers import quantization
from helpers.course.exercises import Exercise, Wrong, one_number


def _tensor(answer, what):
    if not isinstance(answer, torch.Tensor):
        raise Wrong(f"{what} should be a torch tensor, not {type(answer).__name__}.")
    return answer


def _function(answer):
    if not callable(answer):
        raise Wrong(f"A function is wanted; got {answer!r}.")
    return answer


# ── 2.1 the step size ────────────────────────────────────────────────────────────────────
def _check_step(answer):
    step = one_number(answer)
    right = 4.5 / 15
    if math.isclose(step, right, rel_tol=1e-3):
        return (
            "Sixteen fence posts have fifteen gaps. With 8 bits the difference between 255 "
            "and 256 hardly shows; with 2 bits it is 3 against 4."
        )
    if math.isclose(step, 4.5 / 16, rel_tol=1e-3):
        raise Wrong("You divided by the number of levels; count the gaps between them.")
    if math.isclose(step, 3.0 / 15, rel_tol=1e-3) or math.isclose(step, 3.0 / 7.5):
        raise Wrong("The range runs from the smallest weight to the largest, both signs.")
    if math.isclose(step, 4.5 / 4, rel_tol=1e-3) or math.isclose(step, 4.5 / 3):
        raise Wrong("4 bits make more than 4 levels: each bit doubles their number.")
    raise Wrong("Divide the whole range by the number of gaps between its levels.")


# ── 2.2 a model's size ───────────────────────────────────────────────────────────────────
def _check_size(answer):
    size = one_number(answer)
    right = 8e9 * quantization.bits_per_weight((4096, 4096)) / 8 / 1e9
    if abs(size - right) < 0.02:
        return (
            "A quarter of its bfloat16 size and a bit. Real models come out larger: "
            "embeddings and head are not quantized."
        )
    if abs(size - 4.0) < 0.02:
        raise Wrong("You counted the codes only; the block scales take some space too.")
    if abs(size - 4.5) < 0.02:
        raise Wrong("That is without double quantization.")
    if abs(size - right * 8) < 0.2:
        raise Wrong("These are gigabits. A byte has 8 bits.")
    if abs(size - right * 1e9 / 2**30) < 0.02:
        raise Wrong("That is in GiB (2**30 bytes); the question asks for GB (1e9 bytes).")
    if size > 1e6:
        raise Wrong("Give the answer in GB: divide bytes by 1e9.")
    raise Wrong("Parameters times bits per weight, divided by 8, gives bytes.")


# ── 2.3 quantize in one line ─────────────────────────────────────────────────────────────
def _check_quantize(answer):
    quantize = _function(answer)
    for seed, bits in ((0, 4), (1, 2), (2, 8)):
        weights = torch.randn(500, generator=torch.Generator().manual_seed(seed)) * 0.1
        codes = _tensor(quantize(weights, bits), "The result")
        if codes.shape != weights.shape:
            raise Wrong(
                f"For weights of shape {tuple(weights.shape)} the codes have shape "
                f"{tuple(codes.shape)}; every weight needs exactly one."
            )
        codes = codes.double()
        if not torch.equal(codes, codes.round()):
            raise Wrong("Codes are whole numbers: something is not rounded yet.")
        if codes.min() < 0:
            raise Wrong(
                f"The lowest code is {codes.min():.0f}. It should be 0, for the smallest "
                "weight: the very fault of the first draft."
            )
        if codes.max() > 2**bits - 1:
            raise Wrong(
                f"With {bits} bits the highest code is {codes.max():.0f}, which does not "
                "fit: counting starts at 0."
            )
        right = quantization.quantize_linear(weights, bits, scheme="minmax").codes
        off = (codes - right.double()).abs()
        if codes.min() > 0 or codes.max() < 2**bits - 1:
            raise Wrong(
                f"With {bits} bits only the codes {codes.min():.0f} to {codes.max():.0f} "
                f"are used; the outermost weights should get 0 and {2**bits - 1}."
            )
        if (off > 0).float().mean() > 0.02:
            raise Wrong(
                "Many weights land one level too low: cutting off decimals is not rounding."
                if off.max() <= 1
                else "The codes are in range but do not follow the weights evenly."
            )
    return "One subtraction, one division, one rounding: no weight is compared with a bin."


# ── 2.4 the zero point ───────────────────────────────────────────────────────────────────
def _check_zero_point(answer):
    code = one_number(answer)
    if code == 85:
        return (
            "Zero is now a level of its own, so padding, pruned weights and ReLU outputs "
            "survive without any error."
        )
    if abs(code - 85.0) < 1:
        raise Wrong("A zero point is a code: a whole number.")
    if code == -85:
        raise Wrong("The right size, but codes run from 0 to 255.")
    if code in (127, 128):
        raise Wrong("That is the middle of the codes; 0.0 is not the middle of this range.")
    if code == 0:
        raise Wrong("Code 0 stands for the smallest value, -1.0.")
    raise Wrong("How many steps is it from the smallest value up to 0.0?")


# ── 2.5 half precision ───────────────────────────────────────────────────────────────────
VALUES = [1e-9, 3e-6, 0.1, 2049.0, 30000.0, 70000.0, 1e30]
_CASES = {  # what each type does to VALUES, from torch itself
    name: [torch.tensor(value).to(dtype).item() for value in VALUES]
    for name, dtype in (("float16", torch.float16), ("bfloat16", torch.bfloat16))
}


def _check_half(answer):
    if not isinstance(answer, dict) or set(answer) != set(_CASES):
        raise Wrong("Give a dictionary with the keys 'float16' and 'bfloat16'.")
    for name, stored in _CASES.items():
        lost = {v for v, s in zip(VALUES, stored, strict=True) if s == 0 or math.isinf(s)}
        given = {float(v) for v in answer[name]}
        if unknown := given - set(VALUES):
            raise Wrong(f"{unknown} is not among VALUES; list values from there.")
        if missed := lost - given:
            kind = "too large" if min(missed) > 1 else "too small"
            raise Wrong(f"{name}: at least one of your survivors is {kind} for it.")
        for extra in given - lost:
            if extra == 3e-6 and name == "float16":
                raise Wrong("float16: below its smallest *normal* number, it still has some.")
            if extra in (0.1, 2049.0):
                raise Wrong(f"{name}: {extra:g} is rounded, but not lost.")
            raise Wrong(f"{name}: {extra:g} is within its range.")
    return (
        "bfloat16 spends its bits on range and loses nothing here; float16 spends them on "
        "precision, and gradients of 1e-9 are why it needs loss scaling."
    )


# ── 2.6 bits per weight ──────────────────────────────────────────────────────────────────
def _check_bits(answer):
    bits = one_number(answer)
    right = 4 + 8 / 32 + 32 / (32 * 256)
    if abs(bits - right) < 5e-4:
        return "Half the block, twice the overhead: 4.254 against 4.127 bits."
    if abs(bits - (4 + 8 / 64 + 32 / (64 * 256))) < 5e-4:
        raise Wrong("That is for blocks of 64; here each scale serves only 32 weights.")
    if abs(bits - 5.0) < 5e-4:
        raise Wrong("That is without double quantization: scales of 8 bits, not 32.")
    if abs(bits - 4.25) < 5e-4:
        raise Wrong("Nearly: the 8-bit scales have scales of their own, one in 256.")
    if abs(bits - (right - 4)) < 5e-4:
        raise Wrong("That is the overhead; add the codes themselves.")
    raise Wrong("Add three terms: the code, its share of a scale, its share of a scale's scale.")


# ── 2.7 a block-wise quantizer ───────────────────────────────────────────────────────────
def _check_blockwise(answer):
    quantize = _function(answer)
    for shape, block_size in (((4, 64), 64), ((6, 32), 16), ((256,), 128)):
        weights = torch.randn(shape, generator=torch.Generator().manual_seed(3)) * 0.05
        weights.view(-1)[7] = -4.0
        result = quantize(weights, block_size)
        if not isinstance(result, tuple | list) or len(result) != 2:
            raise Wrong("Return two things: the codes and one absmax per block.")
        codes, absmax = (_tensor(part, "Each part") for part in result)
        blocks = weights.numel() // block_size
        if absmax.numel() == 1 and blocks > 1:
            raise Wrong(
                f"There is one scale for everything; {weights.numel()} weights in blocks "
                f"of {block_size} need {blocks}."
            )
        if absmax.numel() != blocks:
            raise Wrong(
                f"absmax has {absmax.numel()} entries; {weights.numel()} weights in blocks "
                f"of {block_size} make {blocks} blocks."
            )
        if (absmax < 0).any() or absmax.max() < 3.9:
            raise Wrong(
                "absmax is the largest magnitude itself, not divided by 127; mind the "
                "negative weights."
            )
        if codes.numel() != weights.numel():
            raise Wrong(f"{weights.numel()} weights need as many codes, not {codes.numel()}.")
        if codes.dtype != torch.int8:
            raise Wrong(f"The codes are {codes.dtype}; torch.int8 would take one byte each.")
        right = quantization.quantize_linear(weights, 8, per="block", block_size=block_size)
        off = (codes.flatten().int() - right.codes.flatten().int()).abs()
        if (off > 100).any():
            raise Wrong(
                "Some codes are far off. Did they wrap around (int8 ends at 127), or were "
                "the blocks cut the wrong way?"
            )
        if off.max() > 1 or (off > 0).float().mean() > 0.02:
            raise Wrong(
                "The codes are off. Divide each block by its own absmax, multiply by 127, "
                "and round (a plain cast cuts off)."
            )
    return "The outlier of -4.0 spoils 1 block and no other: this is the heart of NF4 too."


# ── 2.8 two codes in a byte ──────────────────────────────────────────────────────────────
def _check_pack(answer):
    pack = _function(answer)
    codes = torch.randint(16, (64,), generator=torch.Generator().manual_seed(4)).byte()
    packed = _tensor(pack(codes.clone()), "The result")
    if packed.numel() == codes.numel():
        raise Wrong("As many bytes as codes: nothing was packed.")
    if packed.numel() != codes.numel() // 2:
        raise Wrong(f"{codes.numel()} codes should make {codes.numel() // 2} bytes.")
    if packed.dtype != torch.uint8:
        raise Wrong(f"The result is {packed.dtype}; torch.uint8 is the byte type.")
    first, second = codes[::2], codes[1::2]
    packed = packed.flatten()
    if torch.equal(packed, (second << 4) | first):
        raise Wrong("The two codes of each byte are swapped: the first is the high half.")
    if torch.equal(packed, (codes[:32] << 4) | codes[32:]):
        raise Wrong("Neighbors share a byte: codes 0 and 1, codes 2 and 3, and so on.")
    if not torch.equal(packed, (first << 4) | second):
        raise Wrong("Shift the first code up by 4 bits, then combine it with the second.")
    return "That is byte for byte what `layer.weight` of a 4-bit layer holds."


EXERCISES = [
    Exercise(
        "2.1",
        "The step size",
        _check_step,
        hints=(
            "How many different codes do 4 bits have?",
            "Draw the levels as fence posts: how many gaps are there between 16 posts?",
        ),
        solution="answer = (3.0 - -1.5) / (2**4 - 1)\n",
    ),
    Exercise(
        "2.2",
        "What will it weigh?",
        _check_size,
        hints=(
            "`quantization.bits_per_weight((4096, 4096))` knows the bits per weight.",
            "8e9 parameters, so many bits each, 8 bits to a byte, 1e9 bytes to a GB.",
        ),
        solution=(
            "from helpers import quantization\n\n"
            "answer = 8e9 * quantization.bits_per_weight((4096, 4096)) / 8 / 1e9\n"
        ),
    ),
    Exercise(
        "2.3",
        "Codes by a direct formula",
        _check_quantize,
        hints=(
            "Shift so that the smallest weight becomes 0, then count in steps.",
            "The step is the range divided by `2**bits - 1`; round at the very end.",
        ),
        solution=(
            "import torch\n\n\n"
            "def answer(weights, bits):\n"
            "    step = (weights.max() - weights.min()) / (2**bits - 1)\n"
            "    return ((weights - weights.min()) / step).round().to(torch.uint8)\n"
        ),
    ),
    Exercise(
        "2.4",
        "The zero point",
        _check_zero_point,
        hints=(
            "First the step: 255 of them between -1.0 and 2.0.",
            "0.0 lies one third of the way up.",
        ),
        solution="step = (2.0 - -1.0) / 255\nanswer = round(1.0 / step)\n",
    ),
    Exercise(
        "2.5",
        "What half precision loses",
        _check_half,
        hints=(
            "Lost means stored as 0 or as infinity; rounded is not lost.",
            "`torch.tensor(value).to(torch.float16)` tells; so does `torch.finfo`.",
        ),
        solution=(
            "import torch\n\n"
            "VALUES = [1e-9, 3e-6, 0.1, 2049.0, 30000.0, 70000.0, 1e30]\n"
            "answer = {}\n"
            "for dtype in (torch.float16, torch.bfloat16):\n"
            "    stored = [torch.tensor(value).to(dtype).item() for value in VALUES]\n"
            "    name = str(dtype).removeprefix('torch.')\n"
            "    answer[name] = [\n"
            "        value\n"
            "        for value, kept in zip(VALUES, stored)\n"
            "        if kept in (0.0, float('inf'))\n"
            "    ]\n"
        ),
    ),
    Exercise(
        "2.6",
        "Bits per weight for smaller blocks",
        _check_bits,
        hints=(
            "Each block of 32 weights shares one 8-bit scale.",
            "256 of those scales share one 32-bit scale of their own.",
        ),
        solution="answer = 4 + 8 / 32 + 32 / (32 * 256)\n",
    ),
    Exercise(
        "2.7",
        "A block-wise quantizer",
        _check_blockwise,
        hints=(
            "`weights.reshape(-1, block_size)` puts each block on a row of its own.",
            "`blocks.abs().amax(dim=1, keepdim=True)` is one scale for each row.",
        ),
        solution=(
            "import torch\n\n\n"
            "def answer(weights, block_size):\n"
            "    blocks = weights.reshape(-1, block_size)\n"
            "    absmax = blocks.abs().amax(dim=1, keepdim=True)\n"
            "    codes = (blocks / absmax * 127).round().to(torch.int8)\n"
            "    return codes.reshape(weights.shape), absmax.flatten()\n"
        ),
    ),
    Exercise(
        "2.8",
        "Two codes in a byte",
        _check_pack,
        hints=(
            "`codes[::2]` are the first of each pair, `codes[1::2]` the second.",
            "`<< 4` moves a code into the high half of its byte, `|` puts two together.",
        ),
        solution="def answer(codes):\n    return (codes[::2] << 4) | codes[1::2]\n",
    ),
]
