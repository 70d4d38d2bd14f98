"""Chapter 1: attention, heads, generation, and when to fine-tune."""

import functools
import itertools
import math

from helpers.course.exercises import Exercise, Wrong, one_number


def _words(answer, known, count):
    """The answer as a list of that many known words, whatever it came in."""
    if isinstance(answer, dict):
        answer = list(answer.values())
    if isinstance(answer, str) or not hasattr(answer, "__len__") or len(answer) != count:
        raise Wrong(f"Give a list of {count} words, one per case.")
    words = [" ".join(str(word).lower().replace("-", " ").split()) for word in answer]
    for number, word in enumerate(words, 1):
        if word not in known:
            choices = ", ".join(repr(choice) for choice in known)
            raise Wrong(f"Case {number}: {word!r} is none of {choices}.")
    return words


# ── 1.1 ──────────────────────────────────────────────────────────────────────────────────
CHANGES = (
    ("sharper", "all differences between scores grow threefold. What does softmax make of that?"),
    ("same", "every score of a row grows by the same number. What does softmax do with it?"),
    ("same", "where in the formula do the values come in, before the softmax or after it?"),
    ("flatter", "the scores come out smaller than they should. What does softmax make of that?"),
    ("same", "a dot product depends on two lengths and the angle *between* the two vectors."),
    ("flatter", "halve both, and what becomes of their product, the score?"),
)


def _check_changes(answer):
    words = _words(answer, ("sharper", "flatter", "same"), len(CHANGES))
    for number, (word, (right, clue)) in enumerate(zip(words, CHANGES, strict=True), 1):
        if word != right:
            raise Wrong(f"Case {number} is not {word!r}: {clue}")
    return (
        "Only differences between the scores of a row count. The fifth case is the reason why "
        "RoPE works: what turns a query and a key alike drops out, and the distance is left."
    )


# ── 1.2 ──────────────────────────────────────────────────────────────────────────────────
PANELS = {"A": "wrong axis", "B": "no scale", "C": "late mask", "D": "healthy", "E": "no mask"}
CLUES = {
    "no mask": "is the upper right, the future, really empty?",
    "late mask": "the first token can look only at itself. How much weight should it give there?",
    "wrong axis": "add up the last column, then the last row. Which of the two makes 1?",
    "no scale": "how many tokens share the weight of a row? Compare with the other pictures.",
    "healthy": "check the future, the first row, the last column: is there anything wrong?",
}


def _pictures():
    """Causal attention with the same queries and keys, right and wrong."""
    import torch

    from helpers import plots

    query, key = torch.randn(2, 8, 64, generator=torch.Generator().manual_seed(5))
    dots, future = query @ key.T, torch.ones(8, 8, dtype=torch.bool).triu(1)
    hidden = dots.masked_fill(future, -math.inf)
    weights = {
        "healthy": (hidden / 8).softmax(-1),
        "no mask": (dots / 8).softmax(-1),
        "late mask": (dots / 8).softmax(-1) * ~future,
        "no scale": hidden.softmax(-1),
        "wrong axis": (hidden / 8).softmax(-2),
    }
    fig, axes = plots.figure(1, 5, width=11, height=2.5, alt="Attention weights, five times.")
    for ax, (name, label) in zip(axes, PANELS.items(), strict=True):
        plots.heatmap(weights[label].numpy(), ax=ax, limits=(0, 1), title=name, xlabel="key")
        ax.set_aspect("equal")
    axes[0].set_ylabel("query")
    fig.colorbar(axes[0].images[0], ax=axes, label="weight")
    return fig


def _check_diagnosis(answer):
    if isinstance(answer, dict):
        answer = [answer.get(name, "") for name in PANELS]
    words = _words(answer, CLUES, len(PANELS))
    for word, (name, right) in zip(words, PANELS.items(), strict=True):
        if word != right:
            raise Wrong(f"Picture {name} is not {word!r}: {CLUES[right]}")
    return "Nothing in the code complains about any of these; a look at the weights shows them."


# ── 1.3 ──────────────────────────────────────────────────────────────────────────────────
def _check_mask(answer):
    import torch

    if not callable(answer):
        raise Wrong("The answer should be a function of `queries` and `keys`.")
    for queries, keys in ((4, 4), (2, 5), (1, 7)):
        mask = torch.as_tensor(answer(queries, keys))
        where = f"for queries={queries}, keys={keys}"
        if mask.shape != (queries, keys):
            raise Wrong(f"The shape is {tuple(mask.shape)} {where}, not {(queries, keys)}.")
        mask = mask.bool()
        full = torch.ones(queries, keys, dtype=torch.bool)
        right = full.tril(keys - queries)
        if mask.equal(right):
            continue
        if mask.equal(~right):
            raise Wrong(f"Upside down {where}: True should mean *may look*.")
        if mask.equal(full.tril(keys - queries - 1)):
            raise Wrong(f"The diagonal is missing {where}: a token may look at itself.")
        if mask.equal(full.tril()):
            raise Wrong(
                f"Fine for a square, but {where} the queries are the *last* positions: the "
                "newest one may look at every key in the cache."
            )
        raise Wrong(f"Some entries are off {where}. Print your mask and read it row by row.")
    return (
        "With a single query the mask is all True: token by token, generation needs no causal "
        "mask. It matters in training and when the prompt is read."
    )


# ── 1.4 ──────────────────────────────────────────────────────────────────────────────────
def _many_heads(query, key, value, heads, *faults):
    """Causal attention of many heads, with faults: 'split', 'merge', 'scale', 'mask'."""
    import torch

    tokens, features = query.shape

    def split(x):
        if "split" in faults:
            return x.reshape(heads, tokens, -1)
        return x.reshape(tokens, heads, -1).transpose(0, 1)

    scores = split(query) @ split(key).transpose(-2, -1)
    scores = scores / (features if "scale" in faults else features / heads) ** 0.5
    if "mask" not in faults:
        future = torch.ones(tokens, tokens, dtype=torch.bool).triu(1)
        scores = scores.masked_fill(future, -math.inf)
    output = scores.softmax(-1) @ split(value)
    return (output if "merge" in faults else output.transpose(0, 1)).reshape(tokens, features)


FAULTS = {
    "mask": "A token sees the future now; the mask was right.",
    "split": "The heads are still cut wrongly: a head takes its features from each token's row.",
    "merge": "The heads are joined wrongly: put the tokens first again, then join their heads.",
    "scale": "Only the scale is left: over how many features does one head's dot product run?",
}


def _check_bugs(answer):
    import torch

    if not callable(answer):
        raise Wrong("The answer should be a function of `Q`, `K`, `V` and `heads`.")
    generator = torch.Generator().manual_seed(0)
    for tokens, features, heads in ((5, 12, 1), (5, 12, 3), (6, 16, 4), (4, 8, 8)):
        matrices = torch.randn(3, tokens, features, generator=generator)
        output = answer(*matrices.clone(), heads)
        where = f"with {tokens} tokens, {features} features and heads={heads}"
        shape = tuple(getattr(output, "shape", ())) or type(output).__name__
        if shape != (tokens, features):
            raise Wrong(f"Expected a tensor of shape {(tokens, features)} {where}, got {shape}.")
        output = torch.as_tensor(output)
        if output.isnan().any():
            raise Wrong(f"There are NaNs {where}: is some row masked entirely?")
        choices = (some for n in range(5) for some in itertools.combinations(FAULTS, n))
        for faults in choices:
            expected = _many_heads(*matrices, heads, *faults).to(output.dtype)
            if torch.allclose(output, expected, atol=1e-4):
                break
        else:
            if heads == 1:
                raise Wrong(f"Even one head is off ({where}): compare with `attend`.")
            raise Wrong(f"One head is right, but not {where}: heads take neighboring features.")
        if faults:
            raise Wrong(FAULTS[faults[0]])
    return "The first two let tokens mix features of other tokens, and every shape still fits."


# ── 1.5 ──────────────────────────────────────────────────────────────────────────────────
TOKEN = 30 * 2 * 3 * 64 * 2  # bytes: layers, K and V, heads, features, bytes of a number


def _check_cache(answer):
    number, room = one_number(answer), 4e9 / 2000
    if number == room // TOKEN:
        return "With a key-value head per query head it would be 28: that is what sharing buys."
    known = {
        room / (3 * TOKEN): "Keys and values come from the 3 key-value heads, not from all 9.",
        room / (TOKEN / 2): "Twice as many as fit. Keys and values both? Two bytes per number?",
        room / (2 * TOKEN): "Half of it: a bfloat16 number takes 2 bytes, not 4.",
        room / (TOKEN / 30): "That is for one layer; every layer keeps its own keys and values.",
        room * 1.073741824 / TOKEN: "GB is 1e9 bytes here, not 2**30.",
        4e9 / TOKEN: "That is the number of tokens; one conversation has 2,000.",
        2000 * TOKEN: "Those are the bytes of one conversation. How many of them fit in 4e9?",
        4e9 / 8192 / TOKEN: "That is for conversations of 8,192 tokens; here they have 2,000.",
    }
    if abs(number - room / TOKEN) < 1:
        raise Wrong("Nearly: whole conversations only, and the last one must fit too.")
    for other, feedback in known.items():
        if abs(number - other) < max(1, 1e-3 * other):
            raise Wrong(feedback)
    raise Wrong("First the bytes of one token: layers, K and V, key-value heads, features, 2.")


# ── 1.6 ──────────────────────────────────────────────────────────────────────────────────
def _planted(layers, heads, chosen, seed):
    """Random heads: one looks at earlier equal tokens, the decoys have the other `JOBS`."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    words = ["a", "b", "c", "d", "b", "e", "a", "f", "c", "g", "b", "d"]
    n = len(words)
    scores = torch.randn(layers, heads, n, n, generator=generator)
    equal = torch.tensor([[float(x == y) for y in words] for x in words]).tril(-1)
    first, once = torch.zeros(2, n, n)
    first[:, 0], once[6, 0] = 9, 12
    before = torch.diag(torch.ones(n - 1), -1)
    jobs = [12 * torch.eye(n), 9 * before, first, 9 * equal.roll(1, 1), once]
    order = torch.randperm(layers * heads, generator=generator).tolist()
    places = [divmod(i, heads) for i in order if divmod(i, heads) not in (chosen, chosen[::-1])]
    decoys = dict(zip(JOBS, places, strict=False))
    for place, job in zip(decoys.values(), jobs, strict=True):
        scores[place] += job
    scores[chosen] += 5 * equal
    future = torch.ones(n, n, dtype=torch.bool).triu(1)
    return words, scores.masked_fill(future, -math.inf).softmax(-1), decoys


JOBS = {
    "itself": "That head looks at the token itself. Count *earlier* occurrences only.",
    "before": "That head looks at the token before, whatever it is.",
    "first": "That head looks at the first token, a resting place.",
    "followed": "That is an induction head: it looks at what came *after* the equal token.",
    "once": "That head does it for a single pair of tokens. Take the mean over all pairs.",
}


def _check_finder(answer):
    if not callable(answer):
        raise Wrong("The answer should be a function of `weights` and `tokens`.")
    cases = ((3, 4, (1, 2)), (5, 2, (4, 1)), (2, 6, (0, 3)), (4, 3, (2, 0)))
    for seed, (layers, heads, chosen) in enumerate(cases):
        words, weights, decoys = _planted(layers, heads, chosen, seed)
        found = answer(weights.clone(), list(words))
        try:
            found = tuple(int(number) for number in found)
        except TypeError:
            if found is not None and int(found) == chosen[0] * heads + chosen[1]:
                raise Wrong(
                    "The right head, counted through all layers. Give (layer, head)."
                ) from None
            raise Wrong("Return two numbers, `(layer, head)`.") from None
        if found == chosen:
            continue
        for job, place in decoys.items():
            if found == place:
                raise Wrong(JOBS[job])
        if found == chosen[::-1]:
            raise Wrong("The right head, the wrong way round: (layer, head), please.")
        raise Wrong(f"Head {found} gives less weight to earlier equal tokens than another one.")
    return "Published studies call these duplicate-token heads (Wang and colleagues, 2022)."


# ── 1.7 ──────────────────────────────────────────────────────────────────────────────────
@functools.cache
def _toy():
    """Logits of a model with 200 tokens: six likely ones after each, and a long tail."""
    import torch

    generator = torch.Generator().manual_seed(1)
    table = torch.randn(200, 200, generator=generator) * 0.5
    likely = torch.stack([torch.randperm(200, generator=generator)[:6] for _ in range(200)])
    return table.scatter(1, likely, torch.linspace(5.8, 4.3, 6).expand(200, 6))


def _measure(decoder, prompts=10, steps=80):
    """(share of repeated triples, mean log-probability of a token) of a decoder's texts."""
    repeated, likely = 0.0, 0.0
    for k in range(prompts):
        start = [k, k + 50, k + 100]
        text = decoder(lambda ids: _toy()[int(ids[-1])].clone(), list(start), steps)
        try:
            text = [int(token) for token in text]
        except TypeError:
            raise Wrong("Return the ids as one list.") from None
        if text[:3] != start:
            raise Wrong("Return `ids` and the new tokens together, `ids` first.")
        if len(text) != 3 + steps:
            raise Wrong(f"{steps} new tokens are due; you returned {len(text) - 3}.")
        if not all(0 <= token < 200 for token in text):
            raise Wrong("There are only the tokens 0 to 199, the places in the logits.")
        triples = list(zip(text, text[1:], text[2:], strict=False))
        repeated += (1 - len(set(triples)) / len(triples)) / prompts
        chances = (_toy()[a].softmax(-1)[b].item() for a, b in itertools.pairwise(text[2:]))
        likely += sum(map(math.log, chances)) / steps / prompts
    return repeated, likely


@functools.cache
def _baselines():
    import torch

    dice = torch.Generator().manual_seed(0)

    def measure(choose):
        def decoder(next_logits, ids, steps):
            for _ in range(steps):
                ids.append(int(choose(next_logits(ids).softmax(-1))))
            return ids

        return _measure(decoder)

    return measure(torch.argmax), measure(lambda x: torch.multinomial(x, 1, generator=dice))


def _told(repeated, likely):
    return f"{repeated:.0%} of the triples of tokens repeated, {likely:.2f} nats per token"


def _baseline_text():
    greedy, drawn = _baselines()
    return f"greedy: {_told(*greedy)}\ndrawn:  {_told(*drawn)}"


def _check_decoder(answer):
    if not callable(answer):
        raise Wrong("The answer should be a function of `next_logits`, `ids` and `steps`.")
    repeated, likely = _measure(answer)
    greedy, drawn = _baselines()
    yours = f"Your text has {_told(repeated, likely)}."
    if likely < drawn[1] + 0.3:
        raise Wrong(f"{yours} It takes unlikely tokens, as plain drawing does, or more of them.")
    if repeated > greedy[0] / 4:
        raise Wrong(f"{yours} It goes round in circles, more than a quarter as much as greedy.")
    return f"{yours} Try it on the real model: does a better number read better, too?"


# ── 1.8 ──────────────────────────────────────────────────────────────────────────────────
CASES = {
    "opening hours that change every week": "rag",
    "always answer in your company's tone, thousands of times a day": "fine-tune",
    "summarize one e-mail in three sentences": "prompt",
    "a private handbook of 900 pages, answers with the page quoted": "rag",
    "a small model should write a report format it gets wrong with any prompt": "fine-tune",
}
WHY = {
    "rag": "What is missing is a *fact*, one that is long, private or keeps changing.",
    "fine-tune": "What is missing is a *behavior*, wanted every time, not a fact.",
    "prompt": "An instruct model can do this already. Try asking before anything else.",
}


def _check_when(answer):
    if isinstance(answer, list | tuple):
        answer = ["fine tune" if str(x).lower().startswith("fine") else x for x in answer]
    known = {word.replace("-", " "): word for word in WHY}
    words = [known[word] for word in _words(answer, known, len(CASES))]
    for number, (word, (case, right)) in enumerate(zip(words, CASES.items(), strict=True), 1):
        if word != right:
            raise Wrong(f"Case {number} ({case}): {WHY[right]}")
    return "Facts from outside, behavior from training, and a good prompt before both."


EXERCISES = [
    Exercise(
        "1.1",
        "Sharper, flatter or the same",
        _check_changes,
        hints=(
            "Follow each change through the formula: scores, softmax, values.",
            "Adding one number to all scores of a row changes no weight; stretching does.",
        ),
        solution='answer = ["sharper", "same", "same", "flatter", "same", "flatter"]\n',
    ),
    Exercise(
        "1.2",
        "Five pictures, four mistakes",
        _check_diagnosis,
        hints=(
            "Three questions: is the future empty, does the first row give 1 to the first "
            "token, and is a row shared by several tokens?",
            "With the softmax down the columns, the last column has one entry to share: 1.",
        ),
        solution="""\
answer = ["wrong axis", "no scale", "late mask", "healthy", "no mask"]
""",
        given=_pictures,
    ),
    Exercise(
        "1.3",
        "A causal mask that knows about the cache",
        _check_mask,
        hints=(
            "`torch.ones(...).tril()` keeps the lower triangle; `tril(k)` moves its edge.",
            "The last query must see the last key. How far must the edge move for that?",
        ),
        solution="""\
import torch


def answer(queries, keys):
    return torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
""",
    ),
    Exercise(
        "1.4",
        "Three bugs between the heads",
        _check_bugs,
        hints=(
            "Split a small matrix of numbers 0 to 11 by hand, and compare with the reshape.",
            "A row belongs to a token. Split it into (tokens, heads, size) first, then move "
            "the heads to the front; on the way back do the same steps in reverse.",
            "The scale belongs to the features of one head.",
        ),
        solution="""\
import torch


def answer(Q, K, V, heads):
    tokens, features = Q.shape
    q, k, v = (x.reshape(tokens, heads, -1).transpose(0, 1) for x in (Q, K, V))
    scores = q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5
    future = torch.ones(tokens, tokens, dtype=torch.bool).triu(1)
    weights = scores.masked_fill(future, float("-inf")).softmax(-1)
    return (weights @ v).transpose(0, 1).reshape(tokens, features)
""",
    ),
    Exercise(
        "1.5",
        "How many conversations fit",
        _check_cache,
        hints=(
            "Each layer keeps two vectors per key-value head and token: which two?",
            "A token takes 30 layers × 2 × 3 heads × 64 numbers × the bytes of a number.",
        ),
        solution="answer = 4e9 // (2000 * 30 * 2 * 3 * 64 * 2)\n",
    ),
    Exercise(
        "1.6",
        "Find the head that looks at equal tokens",
        _check_finder,
        hints=(
            "First collect the pairs of places (i, j) with j < i and equal tokens.",
            "`weights[:, :, i, j]` takes lists of places; its mean over the pairs scores a head.",
            "`divmod(index, heads)` turns the place of `argmax` into (layer, head).",
        ),
        solution="""\
def answer(weights, tokens):
    pairs = [
        (i, j) for i in range(len(tokens)) for j in range(i) if tokens[i] == tokens[j]
    ]
    looking, looked_at = (list(places) for places in zip(*pairs))
    score = weights[:, :, looking, looked_at].mean(-1)
    return divmod(int(score.argmax()), score.shape[1])
""",
    ),
    Exercise(
        "1.7",
        "Beat greedy and plain drawing",
        _check_decoder,
        hints=(
            "Draw, but not from the long tail: section 9 has three settings for that.",
            "Or choose, but never a token that would repeat what the text has already said.",
        ),
        solution="""\
import torch


def answer(next_logits, ids, steps):
    ids = list(ids)
    for _ in range(steps):
        top = next_logits(ids).topk(5)
        drawn = torch.multinomial(top.values.softmax(-1), 1)
        ids.append(int(top.indices[drawn]))
    return ids
""",
        given=_baseline_text,
    ),
    Exercise(
        "1.8",
        "Prompt, RAG or fine-tune",
        _check_when,
        hints=(
            "Ask of each case: is a fact missing, a behavior, or nothing?",
            "Two cases lack facts, two lack behavior, one lacks nothing.",
        ),
        solution='answer = ["rag", "fine-tune", "prompt", "rag", "fine-tune"]\n',
        given=lambda: list(CASES),
    ),
]
