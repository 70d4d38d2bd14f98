"""Chapter 2's exercises: typical wrong answers get the feedback that fits them."""

import numpy as np
import pytest
import torch
from transformers import BitsAndBytesConfig

from helpers import quantization
from helpers.course import exercises
from helpers.course.exercises import chapter2


def blockwise(weights, block_size, *, scale=127, magnitude=True, dtype=torch.int8):
    blocks = weights.reshape(-1, block_size)
    absmax = blocks.abs().amax(1) if magnitude else blocks.amax(1)
    codes = (blocks / absmax[:, None] * scale).round().to(dtype)
    return codes.reshape(weights.shape), absmax


def truncated_blocks(weights, block_size):
    blocks = weights.reshape(-1, block_size)
    absmax = blocks.abs().amax(1)
    return (blocks / absmax[:, None] * 127).to(torch.int8), absmax


CONFIG = {
    "load_in_4bit": True,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_compute_dtype": "bfloat16",
}
PREDICTED = {"A": "same", "B": "larger", "C": "larger", "D": "smaller", "E": "larger"}
FAULTS = {"A": "cut off", "B": "wrapped", "C": "outlier", "D": "clipped"}
NF4 = quantization.nf4_code_book()


def buggy(weights, block_size):
    """As exercise 2.6 shows it."""
    blocks = weights.reshape(-1, block_size)
    absmax = blocks.amax(dim=1, keepdim=True)
    codes = (blocks / absmax * 128).to(torch.int8)
    return codes.reshape(weights.shape), absmax.flatten()


def wrong_way(weights, block_size):
    columns = weights.reshape(block_size, -1)
    absmax = columns.abs().amax(0)
    return (columns / absmax * 127).round().to(torch.int8).reshape(weights.shape), absmax


def leaning(count=16, steps=30):
    """Levels for the given weights, by Lloyd's algorithm on a sample."""
    weights = exercises.given("2.8")[:500]
    scaled = (weights / weights.abs().amax(1, keepdim=True)).flatten()
    levels = torch.quantile(scaled, (torch.arange(count) + 0.5) / count)
    for _ in range(steps):
        nearest = (scaled[:, None] - levels).abs().argmin(1)
        levels = torch.stack([scaled[nearest == i].mean() for i in range(count)])
    return levels


LOST = [1e-42, 1e-9, 80000.0]
HALF = {"float16": LOST, "bfloat16": [1e-42]}
WRONG = [
    ("2.1", 4.5 / 16, "count the gaps"),
    ("2.1", 3.0 / 15, "both signs"),
    ("2.1", 4.5 / 4, "each bit doubles"),
    ("2.1", 7, "Divide the whole range"),
    ("2.1", "wide", "one number"),
    ("2.1", 3.0 / 7.5, "both signs"),
    ("2.1", 1.5, "each bit doubles"),
    ("2.1", None, "one number"),
    ("2.1", -0.3, "Divide the whole range"),
    ("2.2", None, "is wanted"),
    ("2.2", "nf4", "is wanted"),
    ("2.2", {"quant_type": "nf4"}, "is wanted"),
    ("2.2", BitsAndBytesConfig(load_in_8bit=True), "8 bits make 32 GB"),
    ("2.2", BitsAndBytesConfig(), "Nothing says how many bits"),
    ("2.2", BitsAndBytesConfig(load_in_4bit=True), "'fp4', the default"),
    ("2.2", CONFIG | {"bnb_4bit_quant_type": "fp4"}, "'fp4', the default"),
    ("2.2", CONFIG | {"bnb_4bit_use_double_quant": True}, "exact scales"),
    ("2.2", {k: v for k, v in CONFIG.items() if "compute" not in k}, "compute in float32"),
    ("2.2", CONFIG | {"bnb_4bit_compute_dtype": torch.float32}, "compute in float32"),
    ("2.2", CONFIG | {"bnb_4bit_compute_dtype": torch.float16}, "ends at 65,504"),
    ("2.2", CONFIG | {"bnb_4bit_compute_dtype": "int8"}, "compute in int8"),
    ("2.2", CONFIG | {"llm_int8_skip_modules": ["q_proj"]}, "replaces the default one"),
    ("2.3", "larger", "Give a dictionary"),
    ("2.3", ["same"] * 5, "Give a dictionary"),
    ("2.3", {"A": "same"}, "Give a dictionary"),
    ("2.3", PREDICTED | {"B": 1.1}, "is none of smaller"),
    ("2.3", PREDICTED | {"A": "bigger"}, "'bigger' is none of"),
    ("2.3", PREDICTED | {"A": "larger"}, "divided by its own absmax"),
    ("2.3", PREDICTED | {"B": "same"}, "More weights share a scale"),
    ("2.3", PREDICTED | {"C": "same"}, "never used"),
    ("2.3", PREDICTED | {"D": "same"}, "a block holds neighbors"),
    ("2.3", PREDICTED | {"E": "smaller"}, "in which direction"),
    ("2.3", dict.fromkeys("ABCDE", "same"), "4 predictions are off"),
    ("2.3", dict.fromkeys("ABCDE", "larger"), "2 predictions are off"),
    ("2.4", None, "Give a dictionary"),
    ("2.4", list(FAULTS.values()), "Give a dictionary"),
    ("2.4", FAULTS | {"E": "clipped"}, "Give a dictionary"),
    ("2.4", FAULTS | {"A": "rounding"}, "is none of the causes"),
    ("2.4", FAULTS | {"A": "outlier"}, "toward zero"),
    ("2.4", FAULTS | {"A": "clipped"}, "toward zero"),
    ("2.4", FAULTS | {"B": "clipped"}, "another sign"),
    ("2.4", FAULTS | {"B": "outlier"}, "another sign"),
    ("2.4", FAULTS | {"C": "cut off"}, "Count the levels"),
    ("2.4", FAULTS | {"D": "wrapped"}, "largest weights have in common"),
    ("2.5", LOST, "Give a dictionary"),
    ("2.5", {**HALF, "float16": [1e-42, 80000.0]}, "too small"),
    ("2.5", {**HALF, "float16": [1e-42, 1e-9]}, "too large"),
    ("2.5", {**HALF, "float16": [*LOST, 5e-8]}, "smallest *subnormal*"),
    ("2.5", {**HALF, "float16": [*LOST, 65510.0]}, "the largest number"),
    ("2.5", {**HALF, "float16": [*LOST, 4097.0]}, "rounded, but not lost"),
    ("2.5", {**HALF, "bfloat16": []}, "too small"),
    ("2.5", {**HALF, "bfloat16": LOST}, "within its range"),
    ("2.5", {**HALF, "bfloat16": [1e-42, 0.3]}, "rounded, but not lost"),
    ("2.5", {**HALF, "bfloat16": [1e-42, 5.0]}, "not among VALUES"),
    ("2.5", {**HALF, "bfloat16": 1e-42}, "give a list"),
    ("2.5", {**HALF, "bfloat16": None}, "give a list"),
    ("2.6", None, "A function is wanted"),
    ("2.6", buggy, "largest magnitude"),
    ("2.6", lambda w, n: blockwise(w, n)[0], "Return two things"),
    ("2.6", lambda w, n: blockwise(w, w.numel()), "one scale for everything"),
    ("2.6", lambda w, n: blockwise(w, n // 2), "blocks of 64 make 4 blocks"),
    ("2.6", lambda w, n: blockwise(w, n, magnitude=False), "largest magnitude"),
    ("2.6", lambda w, n: (blockwise(w, n)[0], blockwise(w, n)[1] / 127), "divided by 127"),
    ("2.6", lambda w, n: (blockwise(w, n)[0][:1], blockwise(w, n)[1]), "as many codes"),
    ("2.6", lambda w, n: blockwise(w, n, dtype=torch.int32), "torch.int8"),
    ("2.6", lambda w, n: blockwise(w, n, scale=-128), "wrap around"),
    ("2.6", wrong_way, "cut the wrong way"),
    ("2.6", truncated_blocks, "a plain cast cuts off"),
    ("2.6", lambda w, n: (blockwise(w, n)[0].tolist(), blockwise(w, n)[1]), "torch tensor"),
    ("2.6", lambda w: w, "TypeError"),
    ("2.7", lambda codes: codes, "nothing was packed"),
    ("2.7", lambda codes: codes[:8], "should make 32 bytes"),
    ("2.7", lambda codes: (codes[::2].int() << 4) | codes[1::2], "torch.uint8"),
    ("2.7", lambda codes: (codes[1::2] << 4) | codes[::2], "swapped"),
    ("2.7", lambda codes: (codes[:32] << 4) | codes[32:], "Neighbors share a byte"),
    ("2.7", lambda codes: codes[::2] + codes[1::2], "Shift the first code up"),
    ("2.7", None, "A function is wanted"),
    ("2.7", lambda codes: codes.tolist(), "should be a torch tensor"),
    ("2.8", None, "Give 16 numbers"),
    ("2.8", "levels", "Give 16 numbers"),
    ("2.8", NF4[:15], "not 15"),
    ("2.8", 0.5, "not 1"),
    ("2.8", [float("nan")] * 16, "between -1 and 1"),
    ("2.8", torch.arange(16), "between -1 and 1"),
    ("2.8", NF4, "30 % are wanted"),
    ("2.8", NF4 * 0.9, "above NF4's"),
    ("2.8", torch.linspace(-1, 1, 16), "above NF4's"),
    ("2.8", torch.linspace(0, 1, 16), "above NF4's"),
    ("2.8", torch.linspace(-0.2, 1, 16), "30 % are wanted"),
    ("2.8", torch.zeros(16), "above NF4's"),
    ("2.8", quantization.fp4_code_book(), "above NF4's"),
]


@pytest.mark.parametrize(
    ("number", "answer", "feedback"), WRONG, ids=[f"{n}: {f[:24]}" for n, _, f in WRONG]
)
def test_wrong_answers_get_fitting_feedback(number, answer, feedback):
    result = exercises.check(number, answer)
    assert not result.passed
    assert feedback in result.message


RIGHT = [
    ("2.1", 0.3),
    ("2.1", torch.tensor(0.3)),
    ("2.1", np.float32(0.3)),
    ("2.1", "0.3"),
    ("2.2", CONFIG),
    ("2.2", BitsAndBytesConfig(**CONFIG)),
    ("2.2", CONFIG | {"bnb_4bit_compute_dtype": torch.bfloat16}),
    ("2.2", CONFIG | {"llm_int8_skip_modules": ["lm_head"]}),
    ("2.2", CONFIG | {"bnb_4bit_use_double_quant": False}),
    ("2.2", BitsAndBytesConfig(**CONFIG, bnb_4bit_quant_storage=torch.bfloat16)),
    ("2.3", PREDICTED),
    ("2.3", {key: f" {word.upper()}" for key, word in PREDICTED.items()}),
    ("2.4", FAULTS),
    ("2.4", {key: cause.title() for key, cause in FAULTS.items()}),
    ("2.5", {"bfloat16": (1e-42,), "float16": set(LOST)}),
    ("2.5", {"bfloat16": np.array([1e-42]), "float16": np.array(LOST[::-1])}),
    ("2.5", {"bfloat16": torch.tensor([1e-42]), "float16": torch.tensor(LOST)}),
    ("2.6", blockwise),
    ("2.6", lambda w, n: list(blockwise(w, n))),
    ("2.6", lambda w, n: (blockwise(w, n)[0].flatten(), blockwise(w, n)[1][:, None])),
    ("2.7", lambda codes: (codes[::2] * 16 + codes[1::2]).view(-1, 1)),
    ("2.7", lambda codes: (codes.view(-1, 2).int() @ torch.tensor([16, 1]).int()).byte()),
    ("2.8", leaning()),
    ("2.8", leaning().flip(0).tolist()),
    ("2.8", leaning().double().numpy()),
]


@pytest.mark.parametrize(
    ("number", "answer"), RIGHT, ids=[f"{n} #{i}" for i, (n, _) in enumerate(RIGHT)]
)
def test_right_answers_in_any_form(number, answer):
    result = exercises.check(number, answer)
    assert result.passed, result.message


@pytest.mark.parametrize("exercise", chapter2.EXERCISES, ids=lambda e: e.number)
def test_solutions_pass_and_hints_do_not_repeat(exercise):
    scope = {}
    exec(exercise.solution, scope)
    assert exercises.check(exercise.number, scope["answer"]).passed
    assert len(exercise.hints) >= 2 and len(set(exercise.hints)) == len(exercise.hints)


def test_the_predictions_are_what_measuring_gives():
    for seed in range(5):
        w = torch.randn(256, 1024, generator=torch.Generator().manual_seed(seed))

        def error(weights, **how):
            quantized = quantization.quantize_nf4(weights, **how)
            return quantization.error_report(weights, quantized).rmse / weights.std().item()

        tried = [error(10 * w), error(w, block_size=1024), error(w + 5)]
        tried += [error(w.flatten().sort().values), error(w, double_quantize=True)]
        changes = [value / error(w) - 1 for value in tried]
        words = ["same" if abs(c) < 1e-5 else "larger" if c > 0 else "smaller" for c in changes]
        assert words == list(PREDICTED.values())


def test_every_exercise_is_scored_against_many_wrong_answers():
    for exercise in chapter2.EXERCISES:
        assert sum(number == exercise.number for number, _, _ in WRONG) >= 8, exercise.number


def test_the_faulty_quantizers_are_drawn():
    assert [ax.get_title(loc="left") for ax in exercises.given("2.4").axes] == list("ABCD")
