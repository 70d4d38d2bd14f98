"""Chapter 3's exercises: typical wrong answers get the feedback meant for them."""

import itertools
import math

import nbformat
import numpy as np
import pytest
import torch
from peft import LoraConfig
from torch import nn

from helpers import lora
from helpers.course import exercises, notebooks

NUMBERS = [f"3.{n}" for n in range(1, 8)]
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]
LAST = list(range(20, 30))


def config(**changes):
    right = {"r": 9, "lora_alpha": 18, "target_modules": [*ATTENTION, *MLP]}
    return LoraConfig(**right | {"layers_to_transform": LAST} | changes)


def adapter(**changes):
    """The repaired class of 3.2, with some of its parts as they were or worse."""

    class Adapter(nn.Module):
        def __init__(self, base, rank=8, alpha=16):
            super().__init__()
            self.base = base.requires_grad_(changes.get("base", False))
            A = changes.get("A", torch.randn)(rank, base.in_features) / 10
            B = changes.get("B", torch.zeros)(base.out_features, rank) / 10
            self.A = A if "tensors" in changes else nn.Parameter(A)
            self.B = nn.Parameter(B, requires_grad="half" not in changes)
            self.scaling = changes.get("scaling", lambda a, r: a / r)(alpha, rank)

        def forward(self, x):
            detour = self.scaling * (x @ self.A.T @ self.B.T)
            return changes.get("sum", lambda base, detour: base + detour)(self.base(x), detour)

    return Adapter


class WithLinears(nn.Module):
    """Another way to write it: two layers, and A at zero instead of B."""

    def __init__(self, base, rank=8, alpha=16):
        super().__init__()
        self.base, self.alpha, self.rank = base, alpha, rank
        self.down = nn.Linear(base.in_features, rank, bias=False)
        self.up = nn.Linear(rank, base.out_features, bias=False)
        nn.init.zeros_(self.down.weight)
        base.weight.requires_grad = base.bias.requires_grad = False

    def forward(self, x):
        return self.base(x) + self.up(self.down(x)) * self.alpha / self.rank


class Transposed(nn.Module):
    def __init__(self, base, rank=8, alpha=16):
        super().__init__()
        self.W, self.bias = base.weight.detach(), base.bias.detach()
        self.A = nn.Parameter(torch.randn(base.in_features, rank))
        self.B = nn.Parameter(torch.zeros(rank, base.out_features))
        self.scaling = alpha / rank

    def forward(self, x):
        return x @ self.W.T + self.bias + self.scaling * x @ self.A @ self.B


def merge(formula):
    def answer(weight, A, B, alpha):
        return formula(weight, B @ A, alpha / A.shape[0])

    return answer


def sometimes_transposed(weight, delta, scaling):
    return weight + scaling * (delta if weight.shape == delta.shape else delta.T)


def causes(**changes):
    names = ("too slow", "random start", "frozen", "healthy", "too hot")
    return dict(zip("ABCDE", names, strict=True)) | changes


def ranks(*numbers):
    return {f"layer {n}": rank for n, rank in enumerate(numbers)}


WRONG = [
    ("3.1", 9, "with a LoraConfig, not with int"),
    ("3.1", {"r": 9}, "with a LoraConfig, not with dict"),
    ("3.1", config(r=8, lora_alpha=16), "814,080 parameters: a higher rank"),
    ("3.1", config(r=10, lora_alpha=20), "over the budget"),
    ("3.1", config(r=16, lora_alpha=32), "over the budget"),
    ("3.1", config(layers_to_transform=None), "Layers 0 to 29"),
    ("3.1", config(layers_to_transform=list(range(10))), "Layers 0 to 9"),
    ("3.1", config(layers_to_transform=list(range(21, 30))), "Layers 21 to 29"),
    ("3.1", config(layers_to_transform=list(range(19, 30))), "Layers 19 to 29"),
    ("3.1", config(target_modules=ATTENTION), "You adapt k_proj, o_proj, q_proj, v_proj"),
    ("3.1", config(target_modules=MLP), "You adapt down_proj, gate_proj, up_proj"),
    ("3.1", config(target_modules=None), "You adapt q_proj, v_proj"),
    ("3.1", config(lora_alpha=8), "scaled by 0.88"),
    ("3.1", config(lora_alpha=2), "scaled by 0.22"),
    ("3.1", config(use_rslora=True), "scaled by 6"),
    ("3.1", config(modules_to_save=["input_layernorm"]), "besides A and B"),
    ("3.1", config(trainable_token_indices=[1, 2]), "besides A and B"),
    ("3.1", config(use_dora=True), "besides A and B"),
    ("3.1", config(rank_pattern={"k_proj": 10}), "the same everywhere"),
    ("3.1", LoraConfig(r=9, lora_alpha=18, target_modules="all-linear"), "Layers 0 to 29"),
    ("3.1", config(target_modules=["q_prj"]), "raised NoMatching"),
    ("3.2", 3, "class itself"),
    ("3.2", adapter()(nn.Linear(2, 2)), "class itself"),
    ("3.2", lambda base, rank, alpha: base, "An optimizer finds 0"),
    ("3.2", lambda base, rank, alpha: lambda x: x, "make an nn.Module"),
    ("3.2", adapter(B=torch.randn), "must change nothing"),
    ("3.2", adapter(B=torch.ones, scaling=lambda a, r: r / a), "must change nothing"),
    ("3.2", adapter(tensors=True), "An optimizer finds 1"),
    ("3.2", adapter(half=True), "An optimizer finds 1"),
    ("3.2", adapter(base=True), "What of the base"),
    ("3.2", adapter(A=torch.zeros), "has not moved"),
    ("3.2", adapter(scaling=lambda a, r: r / a), "you scale by 0.25"),
    ("3.2", adapter(scaling=lambda a, r: a), "you scale by 8"),
    ("3.2", adapter(scaling=lambda a, r: 1), "you scale by 1,"),
    ("3.2", adapter(scaling=lambda a, r: a / math.sqrt(r)), "you scale by 5.66"),
    ("3.2", adapter(scaling=lambda a, r: 2), "you scale by 2,"),
    ("3.2", adapter(sum=lambda base, detour: detour), "must change nothing"),
    ("3.2", adapter(sum=lambda base, detour: base - detour), "positive number times"),
    ("3.2", adapter(sum=lambda base, detour: base + detour.tanh()), "positive number times"),
    ("3.3", "abcd", "each of the five letters once"),
    ("3.3", "aabcd", "each of the five letters once"),
    ("3.3", 3, "raised TypeError"),
    ("3.3", "abcde", "Compare c and a"),
    ("3.3", "acdbe", "Compare c and a"),
    ("3.3", "cdabe", "Compare a and d"),
    ("3.3", "cabde", "Compare d and b"),
    ("3.3", "cadeb", "Compare b and e"),
    ("3.3", "ecadb", "Compare b and e"),
    ("3.3", list("ebdac"), "Compare c and a"),
    ("3.4", "A is frozen", "a dictionary with the five letters"),
    ("3.4", {"A": "frozen"}, "a dictionary with the five letters"),
    ("3.4", causes(A="overfitting"), "none of the causes"),
    ("3.4", causes(A="frozen", C="too slow"), "3 of 5 are right. Look at A again"),
    ("3.4", causes(A="healthy"), "it goes down, in a nearly straight line"),
    ("3.4", causes(B="too hot", E="random start"), "its very first loss"),
    ("3.4", causes(B="healthy", D="random start"), "its very first loss"),
    ("3.4", causes(D="too hot", E="healthy"), "falls fast, and stays down"),
    ("3.4", causes(C="too slow"), "only follow the batches"),
    ("3.4", causes(E="frozen"), "come to rest"),
    ("3.4", dict.fromkeys("ABCDE", "frozen"), "1 of 5 are right"),
    ("3.5", "query", "list of module names"),
    ("3.5", [1, 2], "list of module names"),
    ("3.5", 5, "raised TypeError"),
    ("3.5", ["query", "key", "value", "dense"], "5 of the 13 adapted layers are outside"),
    ("3.5", ["query", "key", "value", "output.dense"], "2 of the 10 adapted layers are outside"),
    ("3.5", ["dense"], "such as `encoder.layer.0.intermediate.dense`"),
    ("3.5", ["query", "key", "value"], "6 layers are adapted"),
    ("3.5", ["attention.output.dense"], "2 layers are adapted"),
    ("3.5", ["query", "value"], "4 layers are adapted"),
    ("3.5", ["q_proj", "v_proj"], "PEFT refuses these names"),
    ("3.5", ["attention"], "BertAttention"),
    ("3.6", "weight + delta", "should be a function"),
    ("3.6", lambda weight, A, B, alpha: weight.T, "shaped like the weight, (6, 9)"),
    ("3.6", lambda weight, A, B, alpha: None, "shaped like the weight, (6, 9)"),
    ("3.6", lambda weight, A, B, alpha: weight + A @ B, "raised RuntimeError"),
    ("3.6", merge(sometimes_transposed), "wrong for a square one"),
    ("3.6", merge(lambda weight, delta, s: weight + delta.T), "you scale by 1, not"),
    ("3.6", merge(lambda weight, delta, s: weight - s * delta.T), "unmerge"),
    ("3.6", merge(lambda weight, delta, s: weight), "Nothing was added"),
    ("3.6", merge(lambda weight, delta, s: weight + delta.T / s), "you scale by 0.25, not"),
    ("3.6", merge(lambda weight, delta, s: weight - delta.T), "unmerge"),
    ("3.6", lambda weight, A, B, alpha: weight + alpha * (B @ A).T, "you scale by 8, not"),
    ("3.6", merge(lambda weight, delta, s: s * delta.T), "stored weight is (in, out)"),
    ("3.7", ranks(8, 8, 8, 8, 8), "Get below three quarters"),
    ("3.7", ranks(7, 7, 7, 7, 7), "Get below three quarters"),
    ("3.7", ranks(16, 0, 8, 8, 8), "Get below three quarters"),
    ("3.7", ranks(13, 13, 12, 4, 4), "Get below three quarters"),
    ("3.7", ranks(5, 5, 5, 10, 10), "for 9,920 of 10,240 parameters"),
    ("3.7", ranks(9, 9, 9, 9, 9), "costs 11,520 parameters"),
    ("3.7", ranks(96, 96, 96, 96, 96), "rank 8 everywhere costs 10,240"),
    ("3.7", ranks(2, 15, 8, 12), "a rank for each of layer 0"),
    ("3.7", [2, 15, 8, 12, 3], "a rank for each of layer 0"),
    ("3.7", ranks(2.5, 15, 8, 12, 3), "a whole number"),
    ("3.7", ranks(-2, 15, 8, 12, 3), "a whole number"),
    ("3.7", ranks(0, 0, 0, 0, 97), "a whole number"),
    ("3.7", ranks("two", 15, 8, 12, 3), "raised ValueError"),
]

RIGHT = [
    ("3.1", config(target_modules=r".*\.2\d\..*_proj", layers_to_transform=None)),
    ("3.1", config(use_rslora=True, lora_alpha=6)),
    ("3.1", config(layers_to_transform=LAST[::-1], task_type="CAUSAL_LM", lora_dropout=0.1)),
    ("3.1", config(init_lora_weights="gaussian", bias="all")),
    ("3.2", adapter()),
    ("3.2", adapter(A=torch.zeros, B=torch.randn)),
    ("3.2", WithLinears),
    ("3.2", Transposed),
    ("3.2", lambda base, rank, alpha: WithLinears(base, rank, alpha)),
    ("3.3", "c < a < d < b < e"),
    ("3.3", ["C", "A", "D", "B", "E"]),
    ("3.3", ("c", "a", "d", "b", "e")),
    ("3.4", causes()),
    ("3.4", {key.lower(): f" {cause.title()} " for key, cause in causes().items()}),
    ("3.5", ("self.query", "self.key", "self.value", "attention.output.dense")),
    ("3.5", {"query", "key", "value", "attention.output.dense"}),
    ("3.5", lora.find_target_modules(exercises.given("3.5"), attention_only=True)),
    ("3.6", lambda weight, A, B, alpha: weight + (alpha / len(A)) * A.T @ B.T),
    ("3.6", lambda w, A, B, alpha: w + torch.einsum("ri,or->io", A, B) * alpha / B.shape[1]),
    ("3.7", ranks(2, 15, 8, 12, 3)),
    ("3.7", ranks(2, 14, 7, 12, 3)),
    ("3.7", ranks(*np.array([2, 15, 8, 12, 3]))),
    ("3.7", ranks(2.0, 15.0, 8.0, 12.0, 3.0)),
]


@pytest.mark.parametrize(("number", "answer", "fragment"), WRONG)
def test_wrong_answers_get_specific_feedback(number, answer, fragment):
    result = exercises.check(number, answer)
    assert not result.passed
    assert fragment in str(result)


@pytest.mark.parametrize(("number", "answer"), RIGHT)
def test_right_answers_of_every_kind_pass(number, answer):
    result = exercises.check(number, answer)
    assert result.passed, result.message


def test_one_order_of_120_is_right_and_it_is_what_the_run_says():
    orders = ["".join(order) for order in itertools.permutations("abcde")]
    (right,) = [order for order in orders if exercises.check("3.3", order).passed]
    losses = exercises.given("3.3")
    assert sorted(losses, key=losses.get) == list(right)
    assert losses["d"] < losses["b"] - 3e-4, "the two that lie closest"


def test_one_diagnosis_of_120_is_right_and_can_be_seen():
    right = causes()
    for order in itertools.permutations(right.values()):
        answer = dict(zip(right, order, strict=True))
        assert exercises.check("3.4", answer).passed == (answer == right)
    curves = exercises.given("3.4")
    first = {letter: losses[0] for letter, losses in curves.items()}
    assert first["B"] > 3 * first["A"] and len(set(first.values())) == 2
    end = {letter: np.mean(losses[-10:]) for letter, losses in curves.items()}
    assert end["D"] < 0.1 < end["B"] < end["A"] < 0.9 < end["C"] < end["E"]


def test_each_bug_of_the_notebooks_class_is_found():
    cells = nbformat.read(notebooks.find("Chapter3"), as_version=4).cells
    (code,) = [cell.source for cell in cells if "class Adapter" in cell.source]
    repairs = {
        "torch.randn(base.out_features, rank) / 10": "torch.zeros(base.out_features, rank)",
        "= torch.randn(rank, base.in_features) / 10": "= nn.Parameter(torch.randn(rank, 6))",
        "self.base = base": "self.base = base.requires_grad_(False)",
        "rank / alpha": "alpha / rank",
    }
    said = ("must change nothing", "An optimizer finds 1", "What of the base", "0.25")
    code = code.split("answer =")[0]
    for (bug, repair), fragment in zip(repairs.items(), said, strict=True):
        names = {"nn": nn, "torch": torch}
        exec(code, names)
        assert fragment in exercises.check("3.2", names["Adapter"]).message
        assert code.count(bug) == 1
        code = code.replace(bug, repair)
    exec(code, names)
    assert exercises.check("3.2", names["Adapter"]).passed


def test_the_budget_of_ranks_can_be_kept_and_its_target_met():
    given = exercises.given("3.7")
    assert len(given) == 5 and len({change.shape for change in given.values()}) == 3
    assert "16.3%" in exercises.check("3.7", ranks(8, 8, 8, 8, 8)).message
    best = exercises.check("3.7", ranks(2, 15, 7, 13, 3)).message  # of all that fit
    assert "yours 8.9%" in best and "8.9 % is the least" in best


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


def test_checking_leaves_the_readers_config_alone():
    mine = config()
    before = mine.to_dict()
    assert exercises.check("3.1", mine).passed and mine.to_dict() == before
