"""Chapter 3's exercises: typical wrong answers get the feedback meant for them."""

import pytest
import torch

from helpers.course import exercises
from helpers.lora import check_training

NUMBERS = [f"3.{n}" for n in range(1, 8)]


def forward(formula):
    """A wrong `lora_forward`, from its two paths."""

    def answer(x, W, A, B, alpha):
        return formula(x @ W.T, x @ A.T @ B.T, alpha, A.shape[0])

    return answer


def merge(formula):
    def answer(weight, A, B, alpha):
        return formula(weight, B @ A, alpha / A.shape[0])

    return answer


def sometimes_transposed(weight, delta, scaling):
    return weight + scaling * (delta if weight.shape == delta.shape else delta.T)


WRONG = [
    ("3.1", 884_736, "frozen layer"),
    ("3.1", 9_216, "one of the two thin matrices"),
    ("3.1", 24_576, "one of the two thin matrices"),
    ("3.1", 16 * 576 * 1536, "multiplies a sum"),
    ("3.1", 2 * 16 * 576, "not square"),
    ("3.1", 5, "shapes of A and of B"),
    ("3.1", "many", "one number"),
    ("3.2", 3, "should be a function"),
    ("3.2", lambda x, W, A, B, alpha: None, "return a tensor"),
    ("3.2", lambda x, W, A, B, alpha: x, "yours is (2, 7)"),
    ("3.2", lambda x, W, A, B, alpha: x @ W, "raised RuntimeError"),
    ("3.2", forward(lambda base, detour, alpha, r: alpha / r * detour), "detour alone"),
    ("3.2", forward(lambda base, detour, alpha, r: base + detour), "not scaled yet"),
    ("3.2", forward(lambda base, detour, alpha, r: base + alpha * detour), "alpha alone"),
    (
        "3.2",
        forward(lambda base, detour, alpha, r: base + alpha / r**0.5 * detour),
        "rsLoRA",
    ),
    ("3.2", forward(lambda base, detour, alpha, r: alpha / r * (base + detour)), "the sum"),
    ("3.2", forward(lambda base, detour, alpha, r: base - detour), "path by path"),
    ("3.3", 64, "right for plain LoRA"),
    ("3.3", 16, "2.83"),
    ("3.3", 16 * 32**0.5, "multiplied alpha"),
    ("3.3", 1, "solve for the new alpha"),
    ("3.4", 418.909, "whole number"),
    ("3.4", 419, "already the larger"),
    ("3.4", 576, "full rank"),
    ("3.4", 16, "solve for r"),
    ("3.5", "c_attn", "list of module names"),
    ("3.5", [1, 2], "list of module names"),
    ("3.5", ["c_attn", "c_proj"], "2 of the 6 adapted layers are outside attention"),
    ("3.5", ["c_attn"], "2 layers are adapted"),
    ("3.5", ["q_proj", "v_proj"], "PEFT refuses these names"),
    ("3.5", ["attn"], "GPT2Attention is not supported"),
    ("3.6", "weight + delta", "should be a function"),
    ("3.6", lambda weight, A, B, alpha: weight.T, "shaped like the weight, (6, 9)"),
    ("3.6", merge(sometimes_transposed), "wrong for a square one"),
    (
        "3.6",
        merge(lambda weight, delta, s: weight + delta.T),
        "scaling alpha / r is missing",
    ),
    ("3.6", merge(lambda weight, delta, s: weight - s * delta.T), "unmerge"),
    ("3.6", merge(lambda weight, delta, s: weight), "stored weight is (in, out)"),
    ("3.7", "it is frozen", "answer with the model itself"),
]


@pytest.mark.parametrize(("number", "answer", "fragment"), WRONG)
def test_wrong_answers_get_specific_feedback(number, answer, fragment):
    result = exercises.check(number, answer)
    assert not result.passed
    assert fragment in str(result)


def unchanged(model):
    return model


def thaw_everything(model):
    model.set_adapter("yoda")
    return model.requires_grad_(True)


def both_adapters(model):
    model.base_model.set_adapter(["poems", "yoda"])
    return model


def the_other_adapter(model):
    model.set_adapter("poems")
    return model


def freeze_everything(model):
    return model.requires_grad_(False)


def drop_the_adapter(model):
    model.delete_adapter("yoda")
    return model


def half_thawed(model):
    model.set_adapter("yoda")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("yoda" in name and "lora_B" in name)
    return model


@pytest.mark.parametrize(
    ("repair", "fragment"),
    [
        (unchanged, "does the forward pass go through them"),
        (thaw_everything, "tensors of the base model moved"),
        (both_adapters, "'poems' changed too"),
        (the_other_adapter, "'poems' changed too"),
        (freeze_everything, "nothing is trainable"),
        (drop_the_adapter, "'yoda' is gone"),
        (half_thawed, "'yoda' learns in part"),
    ],
)
def test_wrong_repairs_get_specific_feedback(repair, fragment):
    result = exercises.check("3.7", repair(exercises.given("3.7")))
    assert not result.passed
    assert fragment in str(result)


def test_the_stalled_model_is_silent_and_the_alarm_is_not():
    model, ids = exercises.given("3.7"), torch.arange(2, 12).reshape(1, -1)
    before = model(input_ids=ids, labels=ids).loss
    before.backward()  # raises nothing, which is the point
    trainable = [p for p in model.parameters() if p.requires_grad]
    torch.optim.SGD(trainable, lr=1.0).step()
    assert torch.equal(model(input_ids=ids, labels=ids).loss, before)
    assert "adapter_inactive" in check_training(model).codes


@pytest.mark.parametrize("number", NUMBERS)
def test_solutions_pass_and_say_something(number):
    exercise = exercises.catalog()[number]
    names = {"given": exercise.given()} if exercise.given else {}
    exec(exercise.solution, names)
    result = exercises.check(number, names["answer"])
    assert result.passed and len(result.message) > 60
    assert exercise.hints


@pytest.mark.parametrize("number", NUMBERS)
def test_dots_are_no_answer_yet(number):
    assert exercises.check(number, ...).state == "open"


def test_tensors_and_tuples_are_answers_too():
    assert exercises.check("3.1", torch.tensor(33_792)).passed
    assert exercises.check("3.3", torch.tensor(11.3137)).passed
    assert exercises.check("3.5", ("attn.c_attn", "attn.c_proj")).passed


def test_checking_leaves_the_readers_model_alone():
    model = exercises.given("3.7")
    model.set_adapter("yoda")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    assert exercises.check("3.7", model).passed
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
    assert all(p.grad is None for p in model.parameters())
