"""Chapter 5's exercises: typical wrong answers get the feedback meant for them."""

import pytest
import torch

from helpers.course import exercises

NUMBERS = [f"5.{n}" for n in range(1, 10)]


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


FAULTS = ["learning_rate", "bf16", "max_length", "activation_checkpointing"]
WRONG = [
    ("5.1", "much", "one number"),
    ("5.1", 16.39, "GiB"),
    ("5.1", 13.2, "two states"),
    ("5.1", 8.8, "float32"),
    ("5.1", 4.4, "weights alone"),
    ("5.1", 1, "Count the numbers"),
    ("5.2", 2.24, "as well"),
    ("5.2", 2.32, "one of the four"),
    ("5.2", 2.28, "four bytes"),
    ("5.2", 4.56, "bfloat16"),
    ("5.2", 8.96, "Frozen"),
    ("5.2", 0, "two bytes"),
    ("5.3", 1.0, "GiB"),
    ("5.3", 0.5369, "factor of two"),
    ("5.3", 0.0671, "Every head"),
    ("5.3", 2.6e-4, "square"),
    ("5.3", 7, "batch × heads"),
    ("5.4", 16, "one GPU"),
    ("5.4", 64, "512"),
    ("5.4", 3, "rows per GPU"),
    ("5.5", 1.5, "threefold"),
    ("5.5", 70, "the sum"),
    ("5.5", 3, "Make sums"),
    ("5.6", 1, "should be a function"),
    ("5.6", lambda w, g, m, v, t, lr: w - lr * g, "three things"),
    ("5.6", adamw(in_place=True), "in place"),
    ("5.6", adamw(corrected=False), "correction"),
    ("5.6", adamw(sign=1), "uphill"),
    ("5.6", adamw(states="corrected"), "before"),
    ("5.6", adamw(root=False), "The step is"),
    ("5.6", adamw(betas=False, corrected=False), "m is 0.9"),
    ("5.7", "bf16", "list of four"),
    ("5.7", ["bf16", *FAULTS[1:]], "Run 1 has no"),
    ("5.7", ["max_length", *FAULTS[1:]], "Run 1"),
    ("5.7", [FAULTS[0], "learning_rate", *FAULTS[2:]], "Run 2"),
    ("5.7", [*FAULTS[:2], "packing", FAULTS[3]], "Run 3"),
    ("5.7", [*FAULTS[:3], "optim"], "Run 4"),
    ("5.8", 1, "should be a function"),
    ("5.8", mean_of_means, "same weight"),
    ("5.8", lambda tiles: joined(tiles, exact=False), "overflows"),
    ("5.8", lambda tiles: joined(tiles, exact=True), "never join"),
    ("5.8", never_shrinks, "must shrink"),
    ("5.8", lambda tiles: 3.0, "For the first tiles"),
    ("5.9", 0, "to the nearest"),
    ("5.9", 25, "between 0 and 1"),
    ("5.9", 0.75, "stays"),
    ("5.9", 0.5, "How far"),
]


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

    assert exercises.check("5.6", answer).passed
