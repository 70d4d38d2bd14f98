"""Chapter 6's exercises: typical wrong answers get the feedback meant for them."""

import shutil

import pytest
import torch

from helpers.course import exercises
from helpers.course.exercises import chapter6

NUMBERS = [f"6.{n}" for n in range(1, 8)]


def padded(side, mask_by_id=False):
    def answer(rows, pad_id):
        longest = max(map(len, rows))
        gaps = [longest - len(row) for row in rows]
        pairs = list(zip(gaps, rows, strict=True))
        if side == "left":
            ids = [[pad_id] * gap + row for gap, row in pairs]
            mask = [[0] * gap + [1] * len(row) for gap, row in pairs]
        else:
            ids = [row + [pad_id] * gap for gap, row in pairs]
            mask = [[1] * len(row) + [0] * gap for gap, row in pairs]
        if mask_by_id:
            mask = [[int(token != pad_id) for token in row] for row in ids]
        return ids, mask

    return answer


def rounded(weights, inputs, *, weigh=True, levels=(-2, 1), shares=80):
    """Two bits for each weight; the scale of a block of 32 is searched for."""
    matters = inputs.square().mean(0) if weigh else torch.ones(weights.shape[1])
    blocks, matters = (x.reshape(-1, 32) for x in (weights, matters.expand_as(weights)))
    largest, tried = blocks.abs().amax(1, keepdim=True), []
    for share in torch.linspace(-1, 1, shares):
        scale = largest * share
        tried.append(scale * (blocks / scale).round().clamp(*levels))
    tried = torch.stack(tried)
    best = ((tried - blocks) ** 2 * matters).sum(-1).argmin(0)
    return tried[best, torch.arange(len(blocks))].reshape(weights.shape)


def with_offset(weights, inputs, weigh=True):
    """As `rounded`, but four values between any two ends: an offset beside the scale."""
    matters = inputs.square().mean(0) if weigh else torch.ones(weights.shape[1])
    blocks, matters = (x.reshape(-1, 32) for x in (weights, matters.expand_as(weights)))
    tried = []
    for low, high in torch.cartesian_prod(*2 * [torch.linspace(0.4, 1, 12)]):
        start = low * blocks.amin(1, keepdim=True)
        step = (high * blocks.amax(1, keepdim=True) - start) / 3
        tried.append(start + step * ((blocks - start) / step).round().clamp(0, 3))
    tried = torch.stack(tried)
    best = ((tried - blocks) ** 2 * matters).sum(-1).argmin(0)
    return tried[best, torch.arange(len(blocks))].reshape(weights.shape)


def four_means(weights, inputs):
    """The best four values for each block, not evenly spaced: these cost more than a scale."""
    blocks = weights.reshape(-1, 32).sort(1).values.reshape(-1, 4, 8)
    values = blocks.mean(-1)
    near = (weights.reshape(-1, 32, 1) - values[:, None]).abs().argmin(-1)
    return values.gather(1, near).reshape(weights.shape)


def request(opened=True, bos="told", stop="both", **drawn):
    """The function of 6.5 with some of its bugs left in."""

    def answer(tokenizer, messages, end_of_turn, adds_bos):
        options = {"tokenize": False, "add_generation_prompt": opened}
        prompt = tokenizer.apply_chat_template(messages, **options)
        if bos == "never" or (bos == "told" and adds_bos):
            prompt = prompt.removeprefix(tokenizer.bos_token)
        stops = {"both": [end_of_turn, tokenizer.eos_token], "eos": [tokenizer.eos_token]}
        return {"prompt": prompt, "stop": stops.get(stop, end_of_turn), **drawn}

    return answer


def pairs(**changes):
    return {"A": 6, "B": 5, "C": 3, "D": 2} | changes


def divergence(p, q):
    p, q = p.log_softmax(-1), q.log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)


def with_stop(text):
    return text + 'PARAMETER stop "<|im_end|>"\n'


BROKEN = exercises.given("6.7")
WRONG = [
    ("6.1", "Q4_K_M", "two things"),
    ("6.1", ("Q4_0", 7.38), "the name of a file"),
    ("6.1", ("Q8_0", "much"), "one number"),
    ("6.1", ("Q8_0", 10.75), "do not fit"),
    ("6.1", ("Q6_K", 8.95), "do not fit"),
    ("6.1", ("Q5_K_M", 8.14), "do not fit"),
    ("6.1", ("Q6_K", 6.95), "cache is missing"),
    ("6.1", ("Q5_K_M", 7.14), "half of the cache"),
    ("6.1", ("Q4_K_M", 6.58), "card keeps"),
    ("6.1", ("Q4_K_M + imatrix", 7.72), "in GB"),
    ("6.1", ("Q4_K_M + imatrix", 4.92), "Add up"),
    ("6.1", ("Q4_K_M", 7.38), "closer to the float16"),
    ("6.1", ("Q3_K_M", 6.54), "closer to the float16"),
    ("6.1", {"file": "IQ2_M + imatrix", "GiB": 5.55}, "closer to the float16"),
    ("6.2", 4, "should be a function"),
    ("6.2", lambda weights, inputs: weights[:1], "the same shape"),
    ("6.2", lambda weights, inputs: weights, "four evenly spaced"),
    ("6.2", lambda weights, inputs: rounded(weights, inputs, levels=(-8, 7)), "four evenly"),
    ("6.2", four_means, "four evenly spaced"),
    ("6.2", lambda weights, inputs: torch.zeros_like(weights), "nothing is won"),
    ("6.2", lambda weights, inputs: weights.sign(), "nothing is won"),
    ("6.2", lambda weights, inputs: chapter6._plain(weights), "nothing is won"),
    ("6.2", lambda weights, inputs: rounded(weights, inputs, levels=(-1, 1)), "Weigh each"),
    ("6.2", lambda weights, inputs: rounded(weights, inputs, weigh=False), "Weigh each"),
    ("6.2", lambda weights, inputs: with_offset(weights, inputs, weigh=False), "Weigh each"),
    ("6.2", lambda weights, inputs: weights * torch.nan, "no numbers"),
    ("6.3", [[1]], "should be a function"),
    ("6.3", lambda rows, pad: rows[:1], "two things"),
    ("6.3", lambda rows, pad: padded("left")(rows, pad)[0], "a list of rows"),
    ("6.3", lambda rows, pad: (rows, rows), "must be 3 long"),
    ("6.3", padded("right"), "right padding"),
    ("6.3", padded("left", mask_by_id=True), "happen to have"),
    ("6.4", [6, 5, 3, 2], "a dictionary"),
    ("6.4", {"A": 6}, "four letters"),
    ("6.4", pairs(A="six"), "one number"),
    ("6.4", pairs(A=4), "How do its answers end"),
    ("6.4", pairs(C=1), "line breaks"),
    ("6.4", pairs(D=7), "between the role"),
    ("6.4", pairs(B=2, D=5), "2 of 4 are right. Look at B"),
    ("6.4", pairs(A=4, C=1, D=7), "1 of 4 are right. Look at A"),
    ("6.4", pairs(D=9), "3 of 4 are right. Look at D"),
    ("6.4", dict(zip("ABCD", range(1, 5), strict=True)), "1 of 4"),
    ("6.5", {"prompt": ""}, "should be a function"),
    ("6.5", lambda tokenizer, messages, end_of_turn, adds_bos: "Who?", "a dictionary"),
    ("6.5", request(opened=False, temperature=0), "Nothing opens"),
    ("6.5", request(bos="always", temperature=0), "BOS twice. With adds_bos=True"),
    ("6.5", request(bos="never", temperature=0), "No BOS at all. With adds_bos=False"),
    ("6.5", request(stop="eos", temperature=0), "With EOS '<|endoftext|>'"),
    ("6.5", request(), "drawn by chance"),
    ("6.5", request(temperature=0.8), "drawn by chance"),
    ("6.5", lambda tokenizer, messages, *_: {"prompt": "[assistant]"}, "Trained was"),
    ("6.5", request(opened=False, bos="always", stop="eos"), "Nothing opens"),
    ("6.6", 3, "should be a function"),
    ("6.6", divergence, "one number"),
    ("6.6", lambda p, q: divergence(q, p).mean(), "Weigh with"),
    ("6.6", lambda p, q: divergence(p, q).sum(), "the sum over"),
    ("6.6", lambda p, q: divergence(p, q).sum() / p.numel(), "over the vocabulary"),
    ("6.6", lambda p, q: divergence(p, q).mean() / torch.tensor(2.0).log(), "in bits"),
    ("6.6", lambda p, q: (p * (p - q)).sum(-1).mean(), "log-probabilities"),
    ("6.7", None, "the text"),
    ("6.7", "FROM x\n", "no TEMPLATE"),
    ("6.7", BROKEN, "still never stops"),
    ("6.7", with_stop(BROKEN), "still goes nowhere"),
]


@pytest.mark.parametrize(("number", "answer", "feedback"), WRONG)
def test_wrong_answers_get_their_feedback(number, answer, feedback):
    result = exercises.check(number, answer)
    assert not result.passed
    assert feedback in result.message, result.message


@pytest.mark.skipif(not shutil.which("go"), reason="needs Go: apt-get install golang-go")
def test_a_template_with_another_text_is_caught_by_go():
    text = BROKEN.replace('{{ if ne .Role "system" }}', "").replace("{{ end }}{{", "{{")
    result = exercises.check("6.7", with_stop(text.replace("assistant\n", "assistant")))
    assert "differ from training's" in result.message


@pytest.mark.parametrize("number", NUMBERS)
def test_the_shown_solution_passes(number):
    exercise = exercises.catalog()[number]
    names = {"given": exercises.given(number)} if exercise.given else {}
    exec(exercise.solution, names)
    result = exercises.check(number, names["answer"])
    assert result.passed, result.message


RIGHT = [
    ("6.1", {"file": "Q4_K_M + imatrix", "GiB": 7.38}),
    ("6.1", ["Q4_K_M + imatrix", torch.tensor(7.382)]),
    ("6.2", rounded),
    ("6.2", with_offset),
    ("6.2", lambda weights, inputs: rounded(weights, inputs).double().numpy()),
    ("6.2", lambda weights, inputs: rounded(weights, inputs, levels=(-1, 2)).numpy()),
    ("6.2", lambda weights, inputs: rounded(weights, inputs, shares=30)),
    ("6.3", lambda rows, pad: tuple(torch.tensor(part) for part in padded("left")(rows, pad))),
    ("6.4", {"a": 6, "b": 5.0, "c": "3", "d": 2}),
    ("6.5", request(temperature=0)),
    ("6.5", request(top_k=1, stop="text")),
]


@pytest.mark.parametrize(("number", "answer"), RIGHT)
def test_other_right_answers_pass(number, answer):
    result = exercises.check(number, answer)
    assert result.passed, result.message
