"""Chapter 5's exercises: typical wrong answers get the feedback meant for them."""

import numpy as np
import pytest
import torch
from peft import LoraConfig

from helpers.course import exercises
from helpers.course.exercises import chapter5

NUMBERS = [f"5.{n}" for n in range(1, 9)]


def adamw(*, sign=-1, corrected=True, in_place=False, states="raw", root=True, betas=True):
    """A step of AdamW with one mistake."""

    def answer(w, g, m, v, t, lr):
        a, b = (0.9, 0.999) if betas else (0.1, 0.001)
        m, v = a * m + (1 - a) * g, b * v + (1 - b) * g**2
        m_hat, v_hat = (m / (1 - a**t), v / (1 - b**t)) if corrected else (m, v)
        step = sign * lr * m_hat / ((v_hat.sqrt() if root else v_hat) + 1e-8)
        if in_place:
            w += step
        else:
            w = w + step
        return (w, m, v) if states == "raw" else (w, m_hat, v_hat)

    return answer


def joined(tiles, exact=True):
    scores, values = (torch.cat(part) for part in zip(*tiles, strict=True))
    weights = scores.softmax(0) if exact else scores.exp() / scores.exp().sum()
    return (weights * values).sum()


def mean_of_means(tiles):
    return sum((s.softmax(0) * v).sum() for s, v in tiles) / len(tiles)


def never_shrinks(tiles):
    top = tiles[0][0].max()
    total = sum((s - top).clamp(max=80).exp().sum() for s, _ in tiles)
    return sum(((s - top).clamp(max=80).exp() * v).sum() for s, v in tiles) / total


def loss_of(pick, join):
    """The loss of an update, with tokens picked and joined in some way."""

    def answer(micro_batches):
        return join([pick(losses, labels) for losses, labels in micro_batches])

    return answer


def trained(losses, labels):
    return losses[labels != -100]


def whole(losses, labels):
    return losses


def total(parts):
    return sum(part.sum() for part in parts)


def means(parts):
    return sum(part.mean() for part in parts) / len(parts)


def plan(times=4, **changes):
    run = {"quantization": "nf4", "lora": 16, "batch_size": 8, "gradient_accumulation_steps": times}
    return run | changes


def patience(evaluations):
    def answer(losses):
        return len(losses) - 1 - losses.index(min(losses)) >= evaluations

    return answer


FAULTS = ["learning_rate", "bf16", "max_length", "activation_checkpointing"]
CURED = chapter5.REMEDIES
WRONG = [
    ("5.1", 2.24, "as well"),
    ("5.1", 2.32, "one of the four"),
    ("5.1", 2.28, "four bytes"),
    ("5.1", 4.56, "bfloat16"),
    ("5.1", 8.96, "Frozen"),
    ("5.1", 2.36e9 / 2**30, "GiB"),
    ("5.1", 17.6, "two bytes"),
    ("5.1", "much", "one number"),
    ("5.2", 1.5, "with a function"),
    ("5.2", loss_of(trained, means), "averages three means"),
    ("5.2", loss_of(whole, means), "Prompt and padding"),
    ("5.2", loss_of(whole, total), "Sum the losses"),
    ("5.2", loss_of(trained, total), "how many trained"),
    ("5.2", loss_of(trained, lambda parts: total(parts) / 3), "how many trained"),
    ("5.2", loss_of(trained, lambda parts: total(parts) / 6), "how many trained"),
    ("5.2", loss_of(trained, lambda parts: total(parts) / 72), "by all tokens"),
    ("5.2", loss_of(trained, lambda parts: parts), "one number"),
    ("5.3", "A", "a dict"),
    ("5.3", CURED | {"E": CURED["A"]}, "a dict"),
    ("5.3", CURED | {"A": "overfitting"}, "none of the remedies"),
    ("5.3", CURED | {"A": "a lower learning rate"}, "A: its training loss"),
    ("5.3", CURED | {"A": CURED["C"]}, "A: its training loss"),
    ("5.3", CURED | {"B": "a larger rank"}, "B: both"),
    ("5.3", CURED | {"B": CURED["A"]}, "B: both"),
    ("5.3", CURED | {"C": CURED["D"]}, "C: it recovers"),
    ("5.3", CURED | {"D": CURED["B"]}, "D: which way"),
    ("5.4", 8, "a dict"),
    ("5.4", {}, "not 32 rows"),
    ("5.4", plan(times=1), "not 32 rows"),
    ("5.4", plan(times=8, batch_size=4), "At least 8 rows"),
    ("5.4", plan(sequence_length=512), "At least 8 rows"),
    ("5.4", plan(lora=None), "full fine-tuning"),
    ("5.4", plan(lora=8), "rank of 16"),
    ("5.4", plan(lora=LoraConfig(r=16)), "All linear"),
    ("5.4", plan(lora=LoraConfig(r=16, target_modules=["q_proj"])), "All linear"),
    ("5.4", plan(model="SmolLM2-135M-Instruct", quantization=None), "do not fit"),
    ("5.4", plan(quantization="int3"), "planner refuses"),
    ("5.4", plan(bits=4), "planner refuses"),
    ("5.5", 1, "should be a function"),
    ("5.5", lambda w, g, m, v, t, lr: w - lr * g, "three things"),
    ("5.5", adamw(in_place=True), "in place"),
    ("5.5", adamw(corrected=False), "began at zero"),
    ("5.5", adamw(sign=1), "uphill"),
    ("5.5", adamw(states="corrected"), "before"),
    ("5.5", adamw(root=False), "The step is"),
    ("5.5", adamw(betas=False, corrected=False), "m is 0.9"),
    ("5.6", "bf16", "list of four"),
    ("5.6", FAULTS[:3], "list of four"),
    ("5.6", ["bf16", *FAULTS[1:]], "Run 1 has no"),
    ("5.6", ["max_length", *FAULTS[1:]], "Run 1"),
    ("5.6", [FAULTS[0], "learning_rate", *FAULTS[2:]], "Run 2"),
    ("5.6", [FAULTS[0], "card", *FAULTS[2:]], "Run 2"),
    ("5.6", [*FAULTS[:2], "packing", FAULTS[3]], "Run 3"),
    ("5.6", [*FAULTS[:3], "optim"], "Run 4"),
    ("5.7", 1, "should be a function"),
    ("5.7", mean_of_means, "same weight"),
    ("5.7", lambda tiles: joined(tiles, exact=False), "overflows"),
    ("5.7", lambda tiles: joined(tiles, exact=True), "never join"),
    ("5.7", never_shrinks, "must shrink"),
    ("5.7", lambda tiles: 3.0, "For the first tiles"),
    ("5.8", 4, "with a function"),
    ("5.8", lambda losses: False, "hardly ever stops"),
    ("5.8", lambda losses: True, "not at the count"),
    ("5.8", patience(1), "too soon"),
    ("5.8", patience(2), "too soon"),
    ("5.8", patience(3), "too soon"),
    ("5.8", patience(9), "waits too long"),
    ("5.8", lambda losses: len(losses) == 12, "not at the count"),
    ("5.8", lambda losses: len(losses) == 20, "not at the count"),
    ("5.8", lambda losses: len(losses) == 25, "waits too long"),
    ("5.8", lambda losses: losses[-1] < 1.2, "above the best"),
]
RIGHT = [
    ("5.1", torch.tensor(2.36)),
    ("5.2", loss_of(trained, lambda parts: torch.cat(parts).mean())),
    ("5.2", loss_of(trained, lambda parts: np.concatenate(parts).mean())),
    ("5.3", dict(reversed(CURED.items()))),
    ("5.4", plan(gpu="RTX 4090", model="Llama-3.1-8B")),
    ("5.4", plan(quantization="int8", gradient_checkpointing="reentrant")),
    ("5.6", tuple(FAULTS)),
    ("5.8", patience(5)),
    ("5.8", lambda losses: len(losses) > 5 and sum(losses[-3:]) > sum(losses[-6:-3])),
]


@pytest.mark.parametrize(("number", "answer"), RIGHT)
def test_other_right_answers_pass(number, answer):
    result = exercises.check(number, answer)
    assert result.passed, result.message


@pytest.mark.parametrize(("number", "answer", "feedback"), WRONG)
def test_wrong_answers_get_their_feedback(number, answer, feedback):
    result = exercises.check(number, answer)
    assert not result.passed
    assert feedback in result.message, result.message


@pytest.mark.parametrize("number", NUMBERS)
def test_the_shown_solution_passes(number):
    exercise = exercises.catalog()[number]
    names = {"given": exercises.given(number)} if exercise.given else {}
    exec(exercise.solution, names)
    result = exercises.check(number, names["answer"])
    assert result.passed, result.message


def test_pytorchs_own_adamw_passes_the_step():
    def answer(w, g, m, v, t, lr):
        weight = torch.nn.Parameter(w.clone())
        weight.grad = g.clone()
        optimizer = torch.optim.AdamW([weight], lr=lr, weight_decay=0.0)
        optimizer.state[weight] = {
            "step": torch.tensor(t - 1.0),
            "exp_avg": m.clone(),
            "exp_avg_sq": v.clone(),
        }
        optimizer.step()
        state = optimizer.state[weight]
        return weight.detach(), state["exp_avg"], state["exp_avg_sq"]

    assert exercises.check("5.5", answer).passed
