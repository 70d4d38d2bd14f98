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


# ── 2.2 a configuration that fits ────────────────────────────────────────────────────────
def _check_config(answer):
    fields = answer if isinstance(answer, dict) else getattr(answer, "to_dict", dict)()
    if not any(str(key).startswith(("load_in", "bnb_")) for key in fields):
        raise Wrong("A `BitsAndBytesConfig(...)` is wanted, or a dictionary of its fields.")
    if fields.get("load_in_8bit"):
        raise Wrong("8 bits make 32 GB of 32 billion weights: more than the card has.")
    if not fields.get("load_in_4bit"):
        raise Wrong("Nothing says how many bits: neither 8 nor 4 is switched on.")
    if fields.get("bnb_4bit_quant_type", "fp4") != "nf4":
        raise Wrong("The code book is 'fp4', the default. Which one errs less at this size?")
    if fields.get("bnb_4bit_use_double_quant"):
        raise Wrong("It fits, with room to spare. Would it with exact scales, which err less?")
    dtype = str(fields.get("bnb_4bit_compute_dtype") or "float32").removeprefix("torch.")
    if dtype == "float32":
        raise Wrong("It would compute in float32 (the default), which is slow on a card.")
    if dtype == "float16":
        raise Wrong("float16 ends at 65,504. This model was trained in a type with more range.")
    if dtype != "bfloat16":
        raise Wrong(f"It would compute in {dtype}: name the type that the model was trained in.")
    spared = fields.get("llm_int8_skip_modules")
    if spared and "lm_head" not in spared:
        raise Wrong("Your list of spared modules replaces the default one: name the head too.")
    return "18 of 19 GB, exact scales, the better code book, and a type that the card is fast at."


# ── 2.3 predict, then run ────────────────────────────────────────────────────────────────
_WORDS = ("smaller", "same", "larger")
_CHANGES = {  # what happens to RMSE / standard deviation, and what to think of
    "A": ("same", "Each block is divided by its own absmax. What is left of a factor of 10?"),
    "B": ("larger", "More weights share a scale: the largest of 1,024 is larger than that of 64."),
    "C": ("larger", "All blocks now lie on one side of zero. Which codes are never used?"),
    "D": ("smaller", "After sorting, a block holds neighbors. How large is its largest weight?"),
    "E": ("larger", "The scales are rounded now as well. It is little, but in which direction?"),
}


def _check_predictions(answer):
    if not isinstance(answer, dict) or set(answer) != set(_CHANGES):
        raise Wrong(f"Give a dictionary with the keys {', '.join(_CHANGES)}.")
    given = {key: str(word).strip().lower() for key, word in answer.items()}
    if unknown := sorted(set(given.values()) - set(_WORDS)):
        raise Wrong(f"{unknown[0]!r} is none of {', '.join(_WORDS)}.")
    wrong = [key for key, (right, _) in _CHANGES.items() if given[key] != right]
    if wrong:
        more = f" ({len(wrong)} predictions are off.)" if len(wrong) > 1 else ""
        raise Wrong(f"{wrong[0]}: {_CHANGES[wrong[0]][1]}{more}")
    return "A scale serves its block: what matters is who shares it."


# ── 2.4 diagnose a plot ──────────────────────────────────────────────────────────────────
_FAULTS = {
    "A": ("cut off", "All dots of A lie on one side of the line, the one toward zero."),
    "B": ("wrapped", "Follow the largest weights of B: they come back with another sign."),
    "C": ("outlier", "Count the levels that C uses in this window. Who took the others?"),
    "D": ("clipped", "D is fine in the middle. What do its largest weights have in common?"),
}


def _faulty():
    """Four quantizers with a fault each, restored against original."""
    from helpers import plots

    weights = torch.linspace(-1, 1, 401)
    steps, codes = weights * 7, (weights * 160).round().int()
    panels = {
        "A": steps.trunc() / 7,
        "B": ((codes + 128) % 256 - 128) / 160,
        "C": (steps / 5).round() / 1.4,
        "D": steps.round().clamp(-4, 4) / 7,
    }
    fig, axes = plots.figure(1, 4, width=9, height=2.6, sharey=True)
    for ax, (letter, restored) in zip(axes, panels.items(), strict=True):
        plots.lines(weights, weights, colors=["gray"], ax=ax, title=letter)
        plots.lines(restored, weights, style=".", colors=["orange"], ax=ax, xlabel="weight")
    axes[0].set_ylabel("restored")
    return fig


def _check_faults(answer):
    if not isinstance(answer, dict) or set(answer) != set(_FAULTS):
        raise Wrong("Give a dictionary with the keys A, B, C and D.")
    causes = {cause for cause, _ in _FAULTS.values()}
    for letter, (right, look) in _FAULTS.items():
        given = str(answer[letter]).strip().lower()
        if given not in causes:
            raise Wrong(f"{given!r} is none of the causes: {', '.join(sorted(causes))}.")
        if given != right:
            raise Wrong(look)
    return "Restored against original: the first plot to draw when a quantizer looks wrong."


# ── 2.5 half precision ───────────────────────────────────────────────────────────────────
VALUES = [1e-42, 1e-9, 5e-8, 0.3, 4097.0, 65510.0, 80000.0]
_CASES = {  # what each type does to VALUES, from torch itself
    name: [torch.tensor(value).to(dtype).item() for value in VALUES]
    for name, dtype in (("float16", torch.float16), ("bfloat16", torch.bfloat16))
}


def _check_half(answer):
    if not isinstance(answer, dict) or set(answer) != set(_CASES):
        raise Wrong("Give a dictionary with the keys 'float16' and 'bfloat16'.")
    for name, stored in _CASES.items():
        lost = {v for v, s in zip(VALUES, stored, strict=True) if s == 0 or math.isinf(s)}
        try:
            numbers = [float(number) for number in answer[name]]
        except (TypeError, ValueError):
            raise Wrong(f"{name}: give a list of numbers, the lost ones of VALUES.") from None
        given = {v for v in VALUES if any(math.isclose(v, n, rel_tol=1e-2) for n in numbers)}
        if len(given) < len(set(numbers)):
            raise Wrong(f"{name}: something is not among VALUES; list values from there.")
        if missed := lost - given:
            kind = "too large" if min(missed) > 1 else "too small"
            raise Wrong(f"{name}: at least one of your survivors is {kind} for it.")
        for extra in given - lost:
            if extra == 5e-8 and name == "float16":
                raise Wrong("float16: 5e-08 is nearer to its smallest *subnormal* than to zero.")
            if extra == 65510.0 and name == "float16":
                raise Wrong("float16: 65510 is rounded to the largest number, which is nearest.")
            if extra in (0.3, 4097.0):
                raise Wrong(f"{name}: {extra:g} is rounded, but not lost.")
            raise Wrong(f"{name}: {extra:g} is within its range.")
    return (
        "A number is lost where it is nearer to zero, or to infinity, than to any other. "
        "Gradients of 1e-9 are why training in float16 needs loss scaling."
    )


# ── 2.6 a block-wise quantizer ───────────────────────────────────────────────────────────
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


# ── 2.7 two codes in a byte ──────────────────────────────────────────────────────────────
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


# ── 2.8 levels of your own ───────────────────────────────────────────────────────────────
def _leaning(seed=0):
    """(4096, 64) weights that lean to one side, as no normal distribution does."""
    return torch.randn(4096, 64, generator=torch.Generator().manual_seed(seed)).abs() - 0.3


def _rmse(weights, levels):
    absmax = weights.abs().amax(dim=1, keepdim=True)
    codes = torch.bucketize(weights / absmax, (levels[:-1] + levels[1:]) / 2)
    return (levels[codes] * absmax - weights).square().mean().sqrt().item()


def _check_levels(answer):
    try:
        levels = torch.as_tensor(answer).detach().float().flatten().cpu()
    except (TypeError, ValueError, RuntimeError):
        raise Wrong("Give 16 numbers: a list or a tensor.") from None
    if levels.numel() != 16:
        raise Wrong(f"4 bits have 16 codes, so 16 levels are wanted, not {levels.numel()}.")
    if not torch.isfinite(levels).all() or levels.abs().max() > 1:
        raise Wrong("A block is divided by its absmax: levels lie between -1 and 1.")
    levels = levels.sort().values
    fresh = _leaning(seed=1)  # judged on weights that were not handed out
    gain = 100 * (1 - _rmse(fresh, levels) / _rmse(fresh, quantization.nf4_code_book()))
    told = f"Your RMSE is {abs(gain):.1f} % {'below' if gain > 0 else 'above'} NF4's"
    if gain >= 30:
        return f"{told}, on weights that your levels have not seen. 32 % is about the best."
    if gain < 0:
        raise Wrong(f"{told}. Draw the histogram of weight / absmax: where is there nothing?")
    raise Wrong(f"{told}; 30 % are wanted. Move each level to the mean of those it serves.")


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
        "A configuration that fits",
        _check_config,
        hints=(
            "Multiply: 32 billion weights in 8, 4.5 and 4.127 bits. Which of them fit?",
            "Two defaults are traps: the code book, and what it computes in.",
        ),
        solution=(
            "import torch\n"
            "from transformers import BitsAndBytesConfig\n\n"
            "answer = BitsAndBytesConfig(\n"
            "    load_in_4bit=True,\n"
            "    bnb_4bit_quant_type='nf4',\n"
            "    bnb_4bit_compute_dtype=torch.bfloat16,\n"
            ")\n"
        ),
    ),
    Exercise(
        "2.3",
        "Predict, then run",
        _check_predictions,
        hints=(
            "Write your five words down first; then measure with `quantization.error_report`.",
            "`report.rmse / weights.std()` is the number in question, before and after.",
        ),
        solution=(
            "import torch\n\nfrom helpers import quantization\n\n"
            "w = torch.randn(256, 1024, generator=torch.Generator().manual_seed(0))\n\n\n"
            "def error(weights, **how):\n"
            "    quantized = quantization.quantize_nf4(weights, **how)\n"
            "    report = quantization.error_report(weights, quantized)\n"
            "    return report.rmse / weights.std().item()\n\n\n"
            "tried = [error(10 * w), error(w, block_size=1024), error(w + 5)]\n"
            "tried += [error(w.flatten().sort().values), error(w, double_quantize=True)]\n"
            "words = {True: 'larger', False: 'smaller'}\n"
            "answer = {\n"
            "    letter: words[e > error(w)] if abs(e / error(w) - 1) > 1e-5 else 'same'\n"
            "    for letter, e in zip('ABCDE', tried)\n"
            "}\n"
        ),
    ),
    Exercise(
        "2.4",
        "Diagnose a plot",
        _check_faults,
        hints=(
            "A healthy quantizer is a staircase whose steps are cut in half by the gray line.",
            "One ends too early, one jumps, one has too few steps, one hangs to one side.",
        ),
        solution=("answer = {'A': 'cut off', 'B': 'wrapped', 'C': 'outlier', 'D': 'clipped'}\n"),
        given=_faulty,
    ),
    Exercise(
        "2.5",
        "What half precision loses",
        _check_half,
        hints=(
            "Rounded is not lost. What is nearest to a number just outside the limits?",
            "`torch.tensor(value).to(torch.float16)` tells; so does `torch.finfo`.",
        ),
        solution=(
            "import torch\n\n"
            "VALUES = [1e-42, 1e-9, 5e-8, 0.3, 4097.0, 65510.0, 80000.0]\n"
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
        "Find the bugs",
        _check_blockwise,
        hints=(
            "Try it on `torch.tensor([[-2.0, 1.0, 0.4, 0.3]])`, by hand. There are three bugs.",
            "The largest *magnitude*; codes that end at 127; rounding before the cast.",
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
        "2.7",
        "Two codes in a byte",
        _check_pack,
        hints=(
            "`codes[::2]` are the first of each pair, `codes[1::2]` the second.",
            "`<< 4` moves a code into the high half of its byte, `|` puts two together.",
        ),
        solution="def answer(codes):\n    return (codes[::2] << 4) | codes[1::2]\n",
    ),
    Exercise(
        "2.8",
        "Sixteen levels of your own",
        _check_levels,
        hints=(
            "`weights / weights.abs().amax(dim=1, keepdim=True)`: draw its histogram first.",
            "Repeat: give each weight its nearest level, then move each level to the mean "
            "of its weights (Lloyd, 1957). Start from NF4's levels, or from quantiles.",
        ),
        solution=(
            "import torch\n\n"
            "from helpers import quantization\n"
            "from helpers.course import exercises\n\n"
            "weights = exercises.given('2.8')\n"
            "scaled = (weights / weights.abs().amax(dim=1, keepdim=True)).flatten()\n"
            "levels = torch.quantile(scaled[:100_000], (torch.arange(16) + 0.5) / 16)\n"
            "for _ in range(30):\n"
            "    codes = torch.bucketize(scaled, (levels[:-1] + levels[1:]) / 2)\n"
            "    sums = torch.zeros(16).index_add_(0, codes, scaled)\n"
            "    levels = sums / torch.bincount(codes, minlength=16).clamp(min=1)\n"
            "answer = levels\n"
        ),
        given=_leaning,
    ),
]
