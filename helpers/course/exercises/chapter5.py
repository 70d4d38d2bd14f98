"""Chapter 5: what training takes, one AdamW step by hand, bad runs, tiles, rounding."""

import contextlib

from helpers.course.exercises import Exercise, Wrong, near, one_number


# ── 5.1 ──────────────────────────────────────────────────────────────────────────────────
def _check_full(answer):
    number = one_number(answer)
    if near(number, 17.6):
        return "Four numbers of four bytes for every parameter, before a single activation."
    if near(number, 17.6e9 / 2**30):
        raise Wrong("That is in GiB (2**30 bytes); GB of 1e9 bytes were asked for.")
    if near(number, 13.2):
        raise Wrong("Three numbers per parameter. AdamW keeps two states, not one.")
    if near(number, 8.8):
        raise Wrong("Right in 16 bits; here everything is in float32, four bytes.")
    if near(number, 4.4):
        raise Wrong("Those are the weights alone.")
    raise Wrong("Count the numbers kept per parameter: weight, gradient, AdamW's states.")


# ── 5.2 ──────────────────────────────────────────────────────────────────────────────────
def _check_lora(answer):
    number = one_number(answer)
    if near(number, 1.1 * 2 + 0.01 * 16):
        return "The frozen weights are now nearly all of it: hence quantization."
    if near(number, 1.1 * 2 + 0.01 * 4):
        raise Wrong("The trained parameters want a gradient and two states as well.")
    if near(number, 1.1 * 2 + 0.01 * 12):
        raise Wrong("You left one of the four out: weight, gradient, two states.")
    if near(number, 1.1 * 2 + 0.01 * 8):
        raise Wrong("The adapter is in float32: four bytes for each of its four numbers.")
    if near(number, 1.1 * 4 + 0.01 * 16):
        raise Wrong("The frozen base is in bfloat16: two bytes a weight.")
    if near(number, 1.1 * 8 + 0.01 * 16):
        raise Wrong("Frozen weights have neither gradients nor states.")
    raise Wrong("1.1e9 weights of two bytes, and 10e6 parameters of four numbers each.")


# ── 5.3 ──────────────────────────────────────────────────────────────────────────────────
def _check_scores(answer):
    number, right = one_number(answer), 2 * 16 * 4096**2 * 2 / 1e9
    if near(number, right):
        return "And that of one layer, once. Flash attention never writes it down."
    if near(number, right * 1e9 / 2**30):
        raise Wrong("That is in GiB (2**30 bytes); GB of 1e9 bytes were asked for.")
    if near(number, right / 2):
        raise Wrong("A factor of two is missing: two rows in the batch, two bytes a score.")
    if near(number, right / 16):
        raise Wrong("Every head has a matrix of its own.")
    if number < right / 1000:
        raise Wrong("The matrix is square: every position scores every position.")
    raise Wrong("batch × heads × sequence × sequence scores, two bytes each.")


# ── 5.4 ──────────────────────────────────────────────────────────────────────────────────
def _check_accumulation(answer):
    number = one_number(answer)
    if number == 8:
        return "4 rows × 2 GPUs × 8 times = 64 rows for one update."
    if number == 16:
        raise Wrong("That is for one GPU. Both work on the same update.")
    if number == 64:
        raise Wrong("That many steps would make an effective batch of 512.")
    raise Wrong("rows per GPU × GPUs × accumulation = effective batch.")


# ── 5.5 ──────────────────────────────────────────────────────────────────────────────────
def _check_weighted(answer):
    number = one_number(answer)
    if near(number, 1.75):
        return "Each token counts the same, as if all had been in one batch."
    if near(number, 1.5):
        raise Wrong("That is the mean of the means: each of the ten would count threefold.")
    if near(number, 70):
        raise Wrong("That is the sum; divide by the number of trained tokens.")
    raise Wrong("Make sums of the means first, and divide the whole by all tokens.")


# ── 5.6 ──────────────────────────────────────────────────────────────────────────────────
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
                f"Step {t} lacks the correction of the start: m and v began at zero and "
                "are too small at first. Divide by 1 - beta ** t."
            )
        if torch.allclose(made[0], plus[0], atol=1e-6):
            raise Wrong("You walk uphill: the step is subtracted.")
        if close[0]:
            raise Wrong("The weight is right, but return m and v *before* the correction.")
        if close[1] and close[2]:
            raise Wrong("m and v are right. The step is lr · m̂ / (√v̂ + 1e-8).")
        raise Wrong("m is 0.9 · m + 0.1 · g, and v is 0.999 · v + 0.001 · g².")
    return (
        "At t = 1 the step is lr times the sign of g: AdamW walks about lr per update, "
        "however large the gradient. Hence the tiny |B| above."
    )


# ── 5.7 ──────────────────────────────────────────────────────────────────────────────────
def _bad_runs():
    return [
        {
            "what happens": "the loss hardly moves in 200 updates",
            "adapter": "LoRA, r = 16, all linear layers",
            "learning_rate": 2e-5,
            "per_device_train_batch_size": 8,
            "max_length": 512,
            "longest row": "310 tokens",
        },
        {
            "what happens": "one step takes six times as long as on a friend's RTX 3060",
            "card": "T4",
            "bf16": True,
            "learning_rate": 1e-3,
            "per_device_train_batch_size": 8,
            "max_length": 512,
        },
        {
            "what happens": "fine on short questions; long answers break off, or never end",
            "learning_rate": 1e-3,
            "max_length": 256,
            "longest row": "900 tokens",
            "activation_checkpointing": True,
            "packing": False,
        },
        {
            "what happens": "out of memory in the first forward pass, 7B in NF4 on 24 GB",
            "learning_rate": 2e-4,
            "per_device_train_batch_size": 4,
            "max_length": 2048,
            "activation_checkpointing": False,
            "optim": "paged_adamw_8bit",
        },
    ]


FAULTS = ["learning_rate", "bf16", "max_length", "activation_checkpointing"]


def _check_faults(answer):
    if not isinstance(answer, list | tuple) or len(answer) != len(FAULTS):
        raise Wrong("Answer with a list of four names, one for each run.")
    for number, (name, run) in enumerate(zip(answer, _bad_runs(), strict=True), 1):
        if name not in run:
            raise Wrong(f"Run {number} has no setting {name!r}.")
    hints = (
        "What is trained there, and how far does AdamW walk in 200 updates?",
        "Which number format does that card only emulate?",
        "What is in the last tokens of a long row, and is it still there after the cut?",
        "What does forward keep for backward, and what would give it back?",
    )
    for number, (name, right) in enumerate(zip(answer, FAULTS, strict=True)):
        if name != right:
            raise Wrong(f"Run {number + 1}: {hints[number]}")
    return "Four silent ones. None of them but the last raises an error."


# ── 5.8 ──────────────────────────────────────────────────────────────────────────────────
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
        tiles = [
            # Each tile brings a larger maximum than the one before.
            (
                torch.randn(n, generator=draw) + shift * (i + 1),
                torch.randn(n, generator=draw),
            )
            for i, n in enumerate(sizes)
        ]
        scores = torch.cat([s for s, _ in tiles])
        values = torch.cat([v for _, v in tiles])
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


# ── 5.9 ──────────────────────────────────────────────────────────────────────────────────
def _check_probability(answer):
    number = one_number(answer)
    if near(number, 0.25):
        return "A quarter of the way up, so up once in four; to the nearest, it never moves."
    if number == 0:
        raise Wrong("That is what rounding to the nearest would do.")
    if near(number, 25):
        raise Wrong("A probability is between 0 and 1.")
    if near(number, 0.75):
        raise Wrong("That is how probable it is that it stays.")
    raise Wrong("How far is 1 + the update on the way from 1.0 to its neighbour?")


EXERCISES = [
    Exercise(
        "5.1",
        "Full fine-tuning, in GB",
        _check_full,
        hints=("Weight, gradient, and AdamW's two states.", "Four numbers of four bytes."),
        solution="answer = 1.1e9 * 4 * 4 / 1e9\n",
    ),
    Exercise(
        "5.2",
        "The same with LoRA",
        _check_lora,
        hints=(
            "Only what is trained has gradients and states.",
            "1.1e9 * 2 bytes for the base; what does a trained parameter take?",
        ),
        solution="answer = (1.1e9 * 2 + 10e6 * 4 * 4) / 1e9\n",
    ),
    Exercise(
        "5.3",
        "A matrix of scores",
        _check_scores,
        hints=("One score for each pair of positions.", "2 * 16 * 4096 * 4096 scores."),
        solution="answer = 2 * 16 * 4096**2 * 2 / 1e9\n",
    ),
    Exercise(
        "5.4",
        "Sixty-four rows on two cards",
        _check_accumulation,
        hints=(
            "How many rows go through both GPUs at once?",
            "4 rows on each of 2 GPUs; how often, until 64 have gone through?",
        ),
        solution="answer = 64 // (2 * 4)\n",
    ),
    Exercise(
        "5.5",
        "Two unequal micro-batches",
        _check_weighted,
        hints=("A mean times its number of tokens is a sum.", "(60 + 10) / 40."),
        solution="answer = (2.0 * 30 + 1.0 * 10) / (30 + 10)\n",
    ),
    Exercise(
        "5.6",
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
        "5.7",
        "Four bad runs",
        _check_faults,
        hints=(
            "Go through them one at a time and ask what each setting does to *this* run.",
            "Too small a step, an emulated format, a silent cut, something kept in memory.",
        ),
        solution=f"answer = {FAULTS}\n".replace("'", '"'),
        given=_bad_runs,
    ),
    Exercise(
        "5.8",
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
        "5.9",
        "A chance to move",
        _check_probability,
        hints=(
            "The distance travelled, over the distance to the neighbour.",
            "On average it must come out right: chance × distance = update.",
        ),
        solution="answer = 0.001953125 / 0.0078125\n",
    ),
]
