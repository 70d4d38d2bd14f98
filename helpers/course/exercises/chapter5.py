"""Chapter 5: what training takes, curves to read, runs to plan and mend, AdamW, tiles."""

import contextlib
import functools
import math
from collections.abc import Mapping
from typing import Any

from helpers.course.exercises import Exercise, Wrong, near, one_number


# ── 5.1 ──────────────────────────────────────────────────────────────────────────────────
def _check_lora(answer):
    number = one_number(answer)
    if near(number, 2.36):
        return "The frozen weights are now nearly all of it: hence quantization."
    faults = {
        2.24: "The trained parameters want a gradient and two states as well.",
        2.32: "You left one of the four out: weight, gradient, two states.",
        2.28: "The adapter is in float32: four bytes for each of its four numbers.",
        4.56: "The frozen base is in bfloat16: two bytes a weight.",
        8.96: "Frozen weights have neither gradients nor states.",
        2.36e9 / 2**30: "That is in GiB (2**30 bytes); GB of 1e9 bytes were asked for.",
    }
    told = [why for wrong, why in faults.items() if near(number, wrong)]
    raise Wrong(*told or ["1.1e9 weights of two bytes, and 10e6 parameters of four numbers each."])


# ── 5.2 ──────────────────────────────────────────────────────────────────────────────────
def _micro_batches():
    """Three of them: each token's loss, and its label; rows of unequal lengths."""
    import torch

    draw, made = torch.Generator().manual_seed(52), []
    for trained in ((9, 7), (2, 1), (4, 6)):
        labels = torch.full((2, 12), -100)
        for row, count in enumerate(trained):
            labels[row, 11 - count : 11] = 7  # behind it is padding
        made.append((3 * torch.rand(2, 12, generator=draw), labels))
    return made


def _check_update(answer):
    if not callable(answer):
        raise Wrong("Answer with a function of a list of (losses, labels).")
    given = _micro_batches()
    mine = one_number(answer([(a.clone(), b.clone()) for a, b in given]))
    trained = [losses[labels != -100] for losses, labels in given]
    total, count = float(sum(part.sum() for part in trained)), sum(map(len, trained))
    if near(mine, total / count):
        return "Each trained token counts the same, as if all had been in one batch."
    faults = {
        float(sum(part.mean() for part in trained)) / 3: "It averages three means: a token of the "
        "short micro-batch counts most.",
        float(sum(losses.mean() for losses, _ in given)) / 3: "Prompt and padding still count: "
        "their label is -100.",
        total / 72: "The sum is right; you divide by all tokens, not by the trained ones.",
        **dict.fromkeys((total, total / 3, total / 6), "Right sum: over how many trained tokens?"),
    }
    told = [why for wrong, why in faults.items() if near(mine, wrong)]
    raise Wrong(*told or ["Sum the losses of all trained tokens of the update, and divide once."])


# ── 5.3 ──────────────────────────────────────────────────────────────────────────────────
def _curve(rate, rows=0, broken=-1):
    """Losses of a linear model that learns 40 weights from noisy rows, in 30 logs."""
    import torch

    draw = torch.Generator().manual_seed(53)
    truth, w = torch.randn(40, generator=draw), torch.zeros(40)

    def sample(count):
        x = torch.randn(count, 40, generator=draw)
        return x, x @ truth + 4 * torch.randn(count, generator=draw)

    exam, kept, curve = sample(2000), sample(rows or 1), []
    for step in range(120):
        x, y = kept if rows else sample(256)
        off = x @ w - (y if step != broken else 2 * y[torch.randperm(256, generator=draw)])
        if step % 4 == 0:
            held_out = (exam[0] @ w - exam[1]).square().mean()
            curve.append((off.square().mean().item(), held_out.item()))
        w = w - rate * 2 * x.T @ off / len(x)
    return {name: [both[i] for both in curve] for i, name in enumerate(("training", "held-out"))}


CURVES = {
    "more rows, or fewer epochs": "its training loss goes on falling. And the other one?",
    "a higher learning rate": "both curves are nearly straight, and they are going the right way.",
    "read the rows of one batch": "it recovers by itself. What was different in that one update?",
    "a lower learning rate": "which way do both losses go, and how soon?",
}
REMEDIES = dict(zip("ABCD", CURVES, strict=True))


@functools.cache
def _curves():
    runs = {"A": _curve(0.05, rows=48), "B": _curve(5e-4), "C": _curve(0.1, broken=80)}
    offered = [*sorted(REMEDIES.values()), "a larger rank", "a mask for the prompt"]
    return {"runs": runs | {"D": _curve(0.95)}, "remedies": offered}


def _check_curves(answer):
    if not isinstance(answer, Mapping) or set(answer) != set(REMEDIES):
        raise Wrong('Answer with a dict: {"A": one of the remedies, "B": ..., "C": ..., "D": ...}.')
    for run, said in answer.items():
        if said not in _curves()["remedies"]:
            raise Wrong(f"{said!r} is none of the remedies.")
        if said != REMEDIES[run]:
            raise Wrong(f"{run}: {CURVES[REMEDIES[run]]}")
    return "Two of them have a wrong step size, two have the wrong rows."


# ── 5.4 ──────────────────────────────────────────────────────────────────────────────────
def _check_plan(answer):
    from peft import LoraConfig

    from helpers import memory

    if not isinstance(answer, Mapping):
        raise Wrong("Answer with a dict of keywords of memory.estimate_training.")
    run: dict[str, Any] = {**answer, "gpu": "RTX 4090"}
    run.pop("model", None)
    times = run.pop("gradient_accumulation_steps", 1)
    batch, lora = run.get("batch_size", 1), run.get("lora")
    if not all(isinstance(n, int) and n > 0 for n in (times, batch)) or times * batch != 32:
        raise Wrong(f"{batch} rows at once, {times} times, are not 32 rows for each update.")
    if batch < 8 or run.setdefault("sequence_length", 2048) != 2048:
        raise Wrong("At least 8 rows of 2,048 tokens at once were asked for.")
    if lora is None:
        raise Wrong("Without `lora` it is a full fine-tuning: gradients and states for all of it.")
    if not isinstance(lora, LoraConfig):
        run["lora"] = LoraConfig(r=int(one_number(lora)), target_modules="all-linear")
    elif lora.target_modules != "all-linear":
        raise Wrong('All linear layers were asked for: target_modules="all-linear".')
    if run["lora"].r < 16:
        raise Wrong(f"A rank of 16 was asked for, not {run['lora'].r}.")
    run["gradient_accumulation"] = times > 1
    try:
        found = memory.estimate_training("Llama-3.1-8B", **run)
        fits = found.fits("RTX 4090")
    except (TypeError, ValueError) as error:
        raise Wrong(f"The planner refuses it: {error}") from None
    peak = found.peak_bytes / 2**30
    if fits:
        return f"The planner says {peak:.1f} GiB at the peak, and room for the margin."
    most = max(found.parts, key=lambda part: found.parts[part])
    raise Wrong(f"{peak:.1f} GiB do not fit beside the margin. The largest part: {most}.")


# ── 5.5 ──────────────────────────────────────────────────────────────────────────────────
def _adamw(w, g, m, v, t, lr, *, corrected=True, eps=1e-8):
    m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
    m_hat, v_hat = (m / (1 - 0.9**t), v / (1 - 0.999**t)) if corrected else (m, v)
    return w - lr * m_hat / (v_hat.sqrt() + eps), m, v


def _check_adamw(answer):
    import torch

    if not callable(answer):
        raise Wrong("The answer should be a function of (w, g, m, v, t, lr).")
    draw = torch.Generator().manual_seed(5)
    w = torch.randn(6, generator=draw)
    mine = right = (w, torch.zeros(6), torch.zeros(6))
    for t in (1, 2, 3):
        g = torch.randn(6, generator=draw)
        given = (mine[0].clone(), g.clone(), mine[1].clone(), mine[2].clone())
        kept = [tensor.clone() for tensor in given]
        uncorrected = _adamw(mine[0], g, *mine[1:], t, 0.1, corrected=False)
        plus = _adamw(mine[0], -g, -mine[1], mine[2], t, 0.1)
        made = answer(*given, t, 0.1)
        right = _adamw(right[0], g, *right[1:], t, 0.1)
        if not isinstance(made, tuple | list) or len(made) != 3:
            raise Wrong("Return three things: the new w, m and v.")
        if not all(torch.equal(a, b) for a, b in zip(given, kept, strict=True)):
            raise Wrong("You changed an argument in place: `w -= …` does, `w = w - …` not.")
        close = [torch.allclose(a, b, atol=1e-6) for a, b in zip(made, right, strict=True)]
        if all(close):
            mine = (made[0], made[1], made[2])
            continue
        if torch.allclose(made[0], uncorrected[0], atol=1e-6) and close[1] and close[2]:
            raise Wrong(
                f"Step {t}: m and v began at zero and are too small. Divide by 1 - beta ** t."
            )
        if torch.allclose(made[0], plus[0], atol=1e-6):
            raise Wrong("You walk uphill: the step is subtracted.")
        if close[0]:
            raise Wrong("The weight is right, but return m and v *before* the correction.")
        if close[1] and close[2]:
            raise Wrong("m and v are right. The step is lr · m̂ / (√v̂ + 1e-8).")
        raise Wrong("m is 0.9 · m + 0.1 · g, and v is 0.999 · v + 0.001 · g².")
    return "At t = 1 the step is lr, however large g is. Hence the short walk of section 2."


# ── 5.6 ──────────────────────────────────────────────────────────────────────────────────
def _bad_runs():
    usual = {"learning_rate": 1e-3, "per_device_train_batch_size": 8, "max_length": 512}
    told: dict[str, dict[str, Any]] = {
        "the loss has hardly moved after 20 updates": {"packing": False, "learning_rate": 2e-5},
        "a step takes six times as long as on a friend's RTX 3060": {"card": "T4", "bf16": True},
        "fine on short questions; long answers break off, or never end": {
            "longest row": "900 tokens"
        },
        "out of memory in the first forward pass, 7B in NF4 on 24 GB": {
            "activation_checkpointing": False,
            "optim": "paged_adamw_8bit",
        },
    }
    return [{"what happens": what, **usual, **run} for what, run in told.items()]


FAULTS = {
    "learning_rate": "What is trained there, and how far does AdamW walk in 20 updates?",
    "bf16": "Which number format does that card only emulate?",
    "max_length": "What is in the last tokens of a long row, and is it there after the cut?",
    "activation_checkpointing": "What does forward keep for backward? What would give it back?",
}


def _check_faults(answer):
    if not isinstance(answer, list | tuple) or len(answer) != len(FAULTS):
        raise Wrong("Answer with a list of four names, one for each run.")
    for number, (name, run) in enumerate(zip(answer, _bad_runs(), strict=True), 1):
        if name not in run:
            raise Wrong(f"Run {number} has no setting {name!r}.")
    for number, (name, right) in enumerate(zip(answer, FAULTS, strict=True), 1):
        if name != right:
            raise Wrong(f"Run {number}: {FAULTS[right]}")
    return "Three of them are silent: only the last one raises an error."


# ── 5.7 ──────────────────────────────────────────────────────────────────────────────────
@contextlib.contextmanager
def _sizes_made():
    """How many numbers each tensor has that is made inside the block, as a list."""
    from torch.utils._python_dispatch import TorchDispatchMode

    sizes = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            made = function(*args, **(kwargs or {}))
            sizes.append(getattr(made, "numel", int)())
            return made

    with Watch():
        yield sizes


def _check_online(answer):
    import torch

    if not callable(answer):
        raise Wrong("The answer should be a function of a list of (scores, values).")
    draw = torch.Generator().manual_seed(58)
    joined = False
    for sizes, shift in (((3, 5, 2), 0.0), ((4, 1), 0.0), ((4, 4, 4), 200.0)):
        tiles = [torch.randn(2, n, generator=draw) for n in sizes]
        for i, (tile, _) in enumerate(tiles, 1):
            tile += shift * i  # each tile brings a larger maximum than the one before
        scores, values = torch.cat(tiles, dim=1)
        right = (scores.softmax(0) * values).sum().item()
        alone = [(s.softmax(0) * v).sum().item() for s, v in tiles]
        given = [(s.clone(), v.clone()) for s, v in tiles]
        with _sizes_made() as made:
            mine = one_number(answer(given))
        if abs(mine - right) <= 1e-4:
            joined = joined or max(made, default=0) >= len(scores)
            continue
        if mine != mine:
            raise Wrong(
                "It gives nan for large scores: exp(600) overflows. Subtract the largest "
                "score so far, and shrink what you have when a larger one comes."
            )
        if abs(mine - sum(alone) / len(alone)) <= 1e-4:
            raise Wrong("A mean of the tiles' means gives every tile the same weight.")
        if shift:
            raise Wrong(
                "Right for small scores, wrong when later tiles bring larger ones: what "
                "you have gathered must shrink by exp(old maximum - new maximum)."
            )
        raise Wrong(f"For the first tiles it should be {right:.4f}, not {mine:.4f}.")
    if joined:
        raise Wrong(
            "The numbers are right, but some tensor was as large as all tiles together: "
            "never join them. A running maximum, sum and output are all you need to keep."
        )
    return "A running maximum, a running sum, a running output: that is flash attention."


# ── 5.8 ──────────────────────────────────────────────────────────────────────────────────
def _runs(seed, count):
    """(true, measured) held-out losses at 40 evaluations: they fall, and then they rise."""
    import random

    draw, made = random.Random(seed), []
    for _ in range(count):
        pace, turn = draw.uniform(1, 12), draw.uniform(2, 36)
        true = [1 + math.exp(-t / pace) + 0.05 * max(0.0, t - turn) for t in range(40)]
        made.append((true, [loss + draw.gauss(0, 0.03) for loss in true]))
    return made


def _check_stop(answer):
    if not callable(answer):
        raise Wrong("Answer with a function of the list of losses so far.")
    lost, used = [], []
    for true, measured in _runs(9, 80):
        seen = next((t for t in range(1, 41) if answer(measured[:t].copy())), 40)
        kept = min(range(seen), key=measured.__getitem__)  # the best checkpoint so far
        lost.append(true[kept] - min(true))
        used.append(seen)
    loss, share = sum(lost) / len(lost), sum(used) / len(used)
    told = f"On 80 other runs it stops after {share:.1f} evaluations, {loss:.3f} above the best."
    if share > 39:
        raise Wrong(f"{told} It hardly ever stops, and that saves nothing.")
    if loss > 0.02:
        blind = "Look at the losses, not at the count."
        early = blind if len(set(used)) == 1 else "It stops too soon: a rise or two may be noise."
        raise Wrong(f"{told} More than 0.02. {early}")
    if share > 22:
        raise Wrong(f"{told} More than 22: it waits too long.")
    return told


EXERCISES = [
    Exercise(
        "5.1",
        "LoRA, in GB",
        _check_lora,
        hints=(
            "Only what is trained has gradients and states.",
            "Which four numbers has a parameter?",
        ),
        solution="answer = (1.1e9 * 2 + 10e6 * 4 * 4) / 1e9\n",
    ),
    Exercise(
        "5.2",
        "The loss of one update",
        _check_update,
        hints=(
            "Compare it with one batch that holds all rows: what would its mean be?",
            "Which tokens count, and by what is their sum divided?",
        ),
        solution=(
            "def answer(micro_batches):\n"
            "    losses = [loss[labels != -100] for loss, labels in micro_batches]\n"
            "    return sum(loss.sum() for loss in losses) / sum(map(len, losses))\n"
        ),
        given=_micro_batches,
    ),
    Exercise(
        "5.3",
        "Four curves",
        _check_curves,
        hints=("Does its training loss fall? Does the other follow?", "One overfits, one starves."),
        solution=f"answer = {REMEDIES}\n".replace("'", '"'),
        given=_curves,
    ),
    Exercise(
        "5.4",
        "Plan a run for a card",
        _check_plan,
        hints=(
            "Which part of the peak is the largest, and which choice shrinks that part?",
            "Quantize what is frozen, and compute activations again instead of keeping them.",
        ),
        solution=(
            'answer = {"quantization": "nf4", "lora": 16, "batch_size": 8}\n'
            'answer |= {"gradient_accumulation_steps": 4}\n'
        ),
    ),
    Exercise(
        "5.5",
        "One step of AdamW",
        _check_adamw,
        hints=(
            "m is a running mean of g, v one of g²; both start at zero.",
            "m̂ = m / (1 - 0.9 ** t), v̂ = v / (1 - 0.999 ** t), and the step is "
            "lr · m̂ / (√v̂ + 1e-8).",
        ),
        solution=(
            "def answer(w, g, m, v, t, lr):\n"
            "    m = 0.9 * m + 0.1 * g\n"
            "    v = 0.999 * v + 0.001 * g**2\n"
            "    m_hat, v_hat = m / (1 - 0.9**t), v / (1 - 0.999**t)\n"
            "    return w - lr * m_hat / (v_hat.sqrt() + 1e-8), m, v\n"
        ),
    ),
    Exercise(
        "5.6",
        "Four bad runs",
        _check_faults,
        hints=("What does each setting do to *this* run?", "A small step, a slow format, a cut."),
        solution=f"answer = {list(FAULTS)}\n".replace("'", '"'),
        given=_bad_runs,
    ),
    Exercise(
        "5.7",
        "Softmax, tile by tile",
        _check_online,
        hints=(
            "Keep three numbers: the largest score, the sum of exponentials, the output.",
            "When the maximum grows, multiply sum and output by exp(old - new).",
        ),
        solution=(
            "import math\n\n\n"
            "def answer(tiles):\n"
            "    top, total, output = -math.inf, 0.0, 0.0\n"
            "    for scores, values in tiles:\n"
            "        new = max(top, scores.max().item())\n"
            "        weights = (scores - new).exp()\n"
            "        shrink = math.exp(top - new)\n"
            "        total = total * shrink + weights.sum()\n"
            "        output = output * shrink + (weights * values).sum()\n"
            "        top = new\n"
            "    return output / total\n"
        ),
    ),
    Exercise(
        "5.8",
        "Stop in time (open)",
        _check_stop,
        hints=("How many evaluations without a new best convince you?", "Try several numbers."),
        solution=(
            "def answer(losses):\n"
            "    best = min(range(len(losses)), key=losses.__getitem__)\n"
            "    return len(losses) - 1 - best >= 4\n"
        ),
        given=lambda: [measured for _, measured in _runs(0, 12)],
    ),
]
