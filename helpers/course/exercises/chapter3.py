"""Chapter 3: what adapters cost, where they go, and why one does not learn."""

import copy
import functools
import re
from typing import Any

from helpers.course.exercises import Exercise, Wrong, near


def _is_near(mine, reference):
    """Same shape, and equal up to float32 rounding."""
    import torch

    return mine.shape == reference.shape and torch.allclose(
        mine.float(), reference, atol=1e-4, rtol=1e-4
    )


def _matrices(inputs, outputs, rank):
    """A weight (outputs, inputs) with A and B, drawn the same way each time."""
    import torch

    draw = torch.Generator().manual_seed(rank)
    shapes = ((outputs, inputs), (rank, inputs), (outputs, rank))
    return [torch.randn(*shape, generator=draw) for shape in shapes]


# ── 3.1 ──────────────────────────────────────────────────────────────────────────────────
def _empty_model():
    """The shapes of SmolLM2-135M, without memory."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    size: dict[str, Any] = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30}
    heads: dict[str, Any] = {"num_attention_heads": 9, "num_key_value_heads": 3}
    with torch.device("meta"):
        return LlamaForCausalLM(LlamaConfig(vocab_size=49152, **size, **heads))


def _check_config(answer):
    from peft import LoraConfig, get_peft_model
    from peft.tuners.lora import LoraLayer

    if not isinstance(answer, LoraConfig):
        raise Wrong(f"Answer with a LoraConfig, not with {type(answer).__name__}.")
    model = get_peft_model(_empty_model(), copy.deepcopy(answer), low_cpu_mem_usage=True)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, LoraLayer)}
    where = {int(part) for name in layers for part in name.split(".") if part.isdigit()}
    if any("lm_head" in name or "embed" in name for name in layers):
        raise Wrong("The embedding or the head has an adapter too: they belong to no layer.")
    if where != set(range(20, 30)):
        raise Wrong(f"Layers {min(where)} to {max(where)} are adapted, and they count from 0.")
    if len(layers) < 70:
        kinds = sorted({name.rsplit(".", 1)[-1] for name in layers})
        raise Wrong(f"Each layer has seven linear layers. You adapt {', '.join(kinds)}.")
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    if others := [n for n in names if ".lora_A." not in n and ".lora_B." not in n]:
        raise Wrong(f"Something besides A and B trains: {others[0]}.")
    trained, _ = model.get_nb_trainable_parameters()
    if trained > 1_000_000:
        raise Wrong(f"{trained:,} parameters would train: that is over the budget.")
    if {layer.r["default"] for layer in layers.values()} != {9}:
        raise Wrong(f"{trained:,} parameters: a higher rank, the same everywhere, would fit.")
    if not near(scaling := layers.popitem()[1].scaling["default"], 2):
        raise Wrong(f"The budget is used well, but the detour is scaled by {scaling:g}.")
    return (
        f"{trained:,} parameters, and no rank above 9 fits. Is it enough? Held-out data must say."
    )


# ── 3.2 ──────────────────────────────────────────────────────────────────────────────────
def _check_mended(answer):
    import torch
    from torch import nn

    if isinstance(answer, nn.Module) or not callable(answer):
        raise Wrong("Answer with the class itself, not with a layer made from it.")
    x, eye, base = torch.linspace(-1, 1, 48).reshape(8, 6).sin(), torch.eye(6), nn.Linear(6, 5)
    layer = answer(copy.deepcopy(base), rank=2, alpha=8)
    if not isinstance(layer, nn.Module) or layer(x).shape != (8, 5):
        raise Wrong("The class should make an nn.Module that maps 6 features to 5 here.")
    if not torch.allclose(layer(x), base(x), atol=1e-6):
        raise Wrong("The first output is not the base's: a new adapter must change nothing.")
    trainable = [p for p in layer.parameters() if p.requires_grad]
    pair = [p for p in trainable if sorted(p.shape) in ([2, 6], [2, 5])]
    if len(pair) < 2:
        raise Wrong(f"An optimizer finds {len(pair)} of the two thin matrices in parameters().")
    if len(trainable) > 2:
        raise Wrong(f"{len(trainable)} tensors train; A and B are two. What of the base?")
    optimizer, before = torch.optim.SGD(pair, lr=1.0), [p.detach().clone() for p in pair]
    for _ in range(3):
        (layer(x) - x[:, :5] - 1).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    if any(torch.equal(p, old) for p, old in zip(pair, before, strict=True)):
        raise Wrong("After three steps one of the two has not moved: what is its gradient?")
    with torch.no_grad():
        change = layer(eye) - base(eye)
        A, B = sorted((p if len(p) == 2 else p.T for p in pair), key=lambda p: -p.shape[1])
        scaling = float(change.norm() / (A.T @ B).norm())
    if not _is_near(change, scaling * (A.T @ B)):
        raise Wrong("The detour does not add a positive number times x A B to the base's output.")
    if not near(scaling, 4):
        raise Wrong(f"With alpha = 8 and rank 2 you scale by {scaling:.3g}, not by alpha / r.")
    return "Four questions find them: same first output? What trains? What moves? How loud?"


# ── 3.3 and 3.4 ──────────────────────────────────────────────────────────────────────────
def _losses(steps, alpha=16, rate=1e-3, A=True, B=False, frozen=False, rows=256):
    """A LoRA layer of rank 8 learns a change of its weight, on new random rows per step."""
    import torch

    draw = torch.Generator().manual_seed(4)
    change = torch.randn(48, 4, generator=draw) @ torch.randn(4, 48, generator=draw) / 14
    A = torch.randn(8, 48, generator=draw) / 7 * A
    B = torch.randn(48, 8, generator=draw) / 3 * B
    optimizer = torch.optim.Adam([A.requires_grad_(), B.requires_grad_()], lr=rate)
    losses = []
    for _ in range(steps):
        x = torch.randn(rows, 48, generator=draw)
        loss = (x @ change.T - alpha / 8 * x @ A.T @ B.T).square().mean()
        losses.append(loss.item())
        loss.backward()
        if not frozen:
            optimizer.step()
        optimizer.zero_grad()
    return losses


@functools.cache
def _race():
    """{letter: loss after twenty steps} of the five adapters of 3.3."""
    chosen: dict[str, dict[str, Any]] = {"b": {"A": False}, "c": {"alpha": 64}}
    chosen |= {"d": {"rate": 1e-5}, "e": {"rate": 3.0}}
    return {letter: _losses(21, **chosen.get(letter, {}))[-1] for letter in "abcde"}


def _check_race(answer):
    letters = re.sub(r"[^a-z]", "", "".join(map(str, answer)).lower())
    if sorted(letters) != list("abcde"):
        raise Wrong("Give each of the five letters once, the lowest loss first, like 'abcde'.")
    for pair, why in {
        "ca": "alpha = 64 makes the same step of A and B count four times as much.",
        "ad": "a hundredth of the learning rate goes a hundredth of the way.",
        "db": "little is more than nothing. What do two zero matrices pass to each other?",
        "be": "one of them takes steps far longer than the weights are.",
    }.items():
        if letters.index(pair[0]) > letters.index(pair[1]):
            raise Wrong(f"Compare {pair[0]} and {pair[1]} again: {why}")
    losses = ", ".join(f"{letter} {_race()[letter]:.5g}" for letter in letters)
    return f"The run agrees: {losses}. Only b and e are broken; a, c and d differ in speed."


_CAUSES = {
    "A": ("too slow", "it goes down, in a nearly straight line, and has not got far."),
    "B": ("random start", "compare its very first loss, before any step, with the others'."),
    "C": ("frozen", "does it go anywhere, or does it only follow the batches?"),
    "D": ("healthy", "it starts where most of them start, falls fast, and stays down."),
    "E": ("too hot", "where is it after a few steps, and does it come to rest?"),
}


@functools.cache
def _curves():
    """{letter: losses} of the five runs of 3.4."""
    settings: dict[str, dict[str, Any]] = {"A": {"rate": 2e-3}, "B": {"B": True, "rate": 1e-2}}
    settings |= {"C": {"frozen": True}, "D": {"rate": 1e-2}, "E": {"rate": 1.0}}
    return {letter: _losses(60, rows=48, **chosen) for letter, chosen in settings.items()}


def _check_diagnosis(answer):
    if not isinstance(answer, dict) or {str(key).upper() for key in answer} != set(_CAUSES):
        raise Wrong("Give a dictionary with the five letters, such as {'A': 'healthy', ...}.")
    said = {str(key).upper(): str(cause).strip().lower() for key, cause in answer.items()}
    causes = sorted(cause for cause, _ in _CAUSES.values())
    if unknown := set(said.values()).difference(causes):
        raise Wrong(f"{min(unknown)!r} is none of the causes: {', '.join(causes)}.")
    wrong = [letter for letter in _CAUSES if said[letter] != _CAUSES[letter][0]]
    if wrong:
        sign = _CAUSES[wrong[0]][1]
        raise Wrong(f"{5 - len(wrong)} of 5 are right. Look at {wrong[0]} again: {sign}")
    return "A slow run and a frozen one look alike at first: `grad_norm` tells them apart."


# ── 3.5 ──────────────────────────────────────────────────────────────────────────────────
def _tiny_bert():
    """BERT with two small, random blocks: four layers in each are called `dense`."""
    import torch
    from transformers import BertConfig, BertModel

    size: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return BertModel(BertConfig(**size, intermediate_size=32, vocab_size=64))


def _check_targets(answer):
    from peft import LoraConfig, get_peft_model
    from peft.tuners.lora import LoraLayer

    if isinstance(answer, str) or not all(isinstance(name, str) for name in answer):
        raise Wrong("Give a list of module names, such as ['q_proj', 'v_proj'].")
    config = LoraConfig(target_modules=list(answer))
    try:
        model = get_peft_model(_tiny_bert(), config)
    except ValueError as error:
        said = re.sub(r"\(\n.*?\n\)", "", str(error), flags=re.DOTALL).splitlines()[0]
        raise Wrong(f"PEFT refuses these names: {said}") from None
    names = [n for n, m in model.named_modules() if isinstance(m, LoraLayer)]
    stray = [name for name in names if ".attention." not in name]
    if stray:
        where = stray[0].removeprefix("base_model.model.")
        raise Wrong(
            f"{len(stray)} of the {len(names)} adapted layers are outside attention, such "
            f"as `{where}`: a name matches everything that ends in it."
        )
    if len(names) < 8:
        raise Wrong(f"{len(names)} layers are adapted; two blocks have eight in their attention.")
    return (
        "A target is a suffix, so the fix is a longer suffix. `lora.find_target_modules` looks "
        "for the shortest one that is safe."
    )


# ── 3.6 ──────────────────────────────────────────────────────────────────────────────────
def _check_conv1d(answer):
    import torch

    if not callable(answer):
        raise Wrong("The answer should be a function of (weight, A, B, alpha).")
    for inputs, outputs, rank, alpha in ((6, 9, 2, 8), (5, 5, 3, 3)):
        W, A, B = _matrices(inputs, outputs, rank)
        weight, delta = W.T.contiguous(), alpha / rank * (B @ A)
        mine = answer(weight.clone(), A.clone(), B.clone(), alpha)
        if not isinstance(mine, torch.Tensor) or mine.shape != weight.shape:
            raise Wrong(f"Return a tensor shaped like the weight, {tuple(weight.shape)}.")
        if _is_near(mine, weight + delta.T):
            continue
        if inputs == outputs and _is_near(mine, weight + delta):
            raise Wrong(
                "Right for a long layer, wrong for a square one: there the missing "
                "transpose fits, silently. Which way round is the weight stored?"
            )
        scale = float(((mine - weight) * (B @ A).T).sum() / (B @ A).square().sum())
        if _is_near(mine, weight):
            raise Wrong("Nothing was added to the weight.")
        if _is_near(mine, weight + scale * (B @ A).T) and scale < 0:
            raise Wrong("The update is taken away: that is how to unmerge.")
        if _is_near(mine, weight + scale * (B @ A).T):
            raise Wrong(
                f"The orientation is right, but you scale by {scale:.3g}, not by alpha / r."
            )
        raise Wrong("A is (r, in) and B is (out, r); the stored weight is (in, out).")
    return (
        "This transpose is all that `fan_in_fan_out=True` means. On a square layer, nobody "
        "would have told you that it was missing."
    )


# ── 3.7 ──────────────────────────────────────────────────────────────────────────────────
@functools.cache
def _changes():
    """{layer: weight change}; some are simple, some are not, and some layers are larger."""
    import torch

    made: dict[str, Any] = {}
    draw = torch.Generator().manual_seed(8)
    shapes = ((96, 96, 0.5, 1), (96, 96, 0.05, 1), (96, 96, 0.2, 2), (256, 96, 0.1, 2))
    for outputs, inputs, decay, size in (*shapes, (96, 256, 0.6, 3)):
        left, right = (torch.randn(n, 96, generator=draw) for n in (outputs, inputs))
        strengths = size * torch.exp(-decay * torch.arange(96.0))
        change = torch.linalg.qr(left)[0] * strengths @ torch.linalg.qr(right)[0].T
        made[f"layer {len(made)}"] = change
    return made


def _missed(ranks):
    """The share of the squared size of all changes that the best updates of these ranks miss."""
    import torch

    squares = {name: torch.linalg.svdvals(c).square() for name, c in _changes().items()}
    missed = sum(float(squares[name][rank:].sum()) for name, rank in ranks.items())
    return missed / sum(float(square.sum()) for square in squares.values())


def _check_ranks(answer):
    price = {name: sum(change.shape) for name, change in _changes().items()}
    if not isinstance(answer, dict) or set(answer) != set(price):
        raise Wrong(f"Give a dictionary with a rank for each of {', '.join(price)}.")
    if any(float(rank) != int(rank) or not 0 <= rank <= 96 for rank in answer.values()):
        raise Wrong("Each rank is a whole number from 0 to 96, the shorter side of every layer.")
    ranks = {name: int(rank) for name, rank in answer.items()}
    spent, budget = sum(ranks[n] * price[n] for n in price), 8 * sum(price.values())
    if spent > budget:
        raise Wrong(f"That costs {spent:,} parameters; rank 8 everywhere costs {budget:,}.")
    missed, baseline = _missed(ranks), _missed(dict.fromkeys(price, 8))
    said = f"Rank 8 everywhere misses {baseline:.1%} of the changes, yours {missed:.1%}"
    if missed > 0.75 * baseline:
        raise Wrong(f"{said}, for {spent:,} of {budget:,} parameters. Get below three quarters.")
    return f"{said}; 8.9 % is the least for this price. PEFT takes it as `rank_pattern`."


EXERCISES = [
    Exercise(
        "3.1",
        "A config for a budget",
        _check_config,
        hints=(
            "`layers_to_transform` takes layer numbers from 0, and goes with a list of names.",
            "Count with r=1 (`lora.count_trainable(model, config)`) and divide the budget by it.",
        ),
        solution="""from peft import LoraConfig

names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
last = list(range(20, 30))
answer = LoraConfig(r=9, lora_alpha=18, target_modules=names, layers_to_transform=last)
""",
        given=_empty_model,
    ),
    Exercise(
        "3.2",
        "Find the bugs",
        _check_mended,
        hints=(
            "Make a layer: compare its first output with the base's, and list its parameters().",
            "What is frozen, what is an nn.Parameter, what starts at zero, what is the scaling?",
        ),
        solution="""import torch
from torch import nn


class Adapter(nn.Module):
    def __init__(self, base, rank=8, alpha=16):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.A = nn.Parameter(torch.randn(rank, base.in_features) / 10)
        self.B = nn.Parameter(torch.zeros(base.out_features, rank))
        self.scaling = alpha / rank

    def forward(self, x):
        return self.base(x) + self.scaling * (x @ self.A.T @ self.B.T)


answer = Adapter
""",
    ),
    Exercise(
        "3.3",
        "Predict, then run",
        _check_race,
        hints=("Adam's first steps are as long as its learning rate.", "One cannot move at all."),
        solution='answer = "cadbe"\n',
        given=_race,
    ),
    Exercise(
        "3.4",
        "Read the curves",
        _check_diagnosis,
        hints=("Four begin at the base's loss.", "A frozen run wobbles too: compare its ends."),
        solution="""causes = "too slow", "random start", "frozen", "healthy", "too hot"
answer = dict(zip("ABCDE", causes))
""",
        given=_curves,
    ),
    Exercise(
        "3.5",
        "Attention only, on BERT",
        _check_targets,
        hints=(
            "Print the names: `[name for name, _ in model.named_modules()]`.",
            "Where do `attention.output.dense` and `output.dense` differ? Name enough of it.",
        ),
        solution='answer = ["query", "key", "value", "attention.output.dense"]\n',
        given=_tiny_bert,
    ),
    Exercise(
        "3.6",
        "Merging into a transposed weight",
        _check_conv1d,
        hints=("B @ A has the shape (out, in).", "Transpose the update before you add it."),
        solution=(
            "def answer(weight, A, B, alpha):\n    return weight + alpha / A.shape[0] * (B @ A).T\n"
        ),
    ),
    Exercise(
        "3.7",
        "Spend the rank better",
        _check_ranks,
        hints=(
            "Singular values squared say what a rank wins.",
            "Give one at a time, by its price.",
        ),
        solution="""import torch

price = {name: sum(change.shape) for name, change in given.items()}
gains = [
    (float(value) ** 2 / price[name], name)
    for name, change in given.items()
    for value in torch.linalg.svdvals(change)
]
answer, left = dict.fromkeys(given, 0), 8 * sum(price.values())
for _, name in sorted(gains, reverse=True):
    if price[name] <= left:
        answer[name] += 1
        left -= price[name]
""",
        given=_changes,
    ),
]
