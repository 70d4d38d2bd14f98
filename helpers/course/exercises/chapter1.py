"""Chapter 1: attention, heads, generation, and when to fine-tune."""

import math

from helpers.course.exercises import Exercise, Wrong, one_number


def _numbers(answer, expected, name):
    """The answer as a list of floats, whatever it came in."""
    try:
        numbers = [float(x) for x in answer]
    except TypeError:
        raise Wrong(f"Give {name} as a list of {expected} numbers.") from None
    if len(numbers) != expected:
        raise Wrong(f"You gave {len(numbers)} numbers, and there are {expected} keys.")
    return numbers


def _close(a, b, tolerance=2e-3):
    return abs(a - b) <= tolerance * max(1.0, abs(b))


# ── 1.1 ──────────────────────────────────────────────────────────────────────────────────
def _softmax(scores):
    powers = [math.exp(score - max(scores)) for score in scores]
    return [power / sum(powers) for power in powers]


def _check_by_hand(answer):
    weights = _numbers(answer, 3, "the weights")
    dots = [3.0, 1.0, -3.0]  # query (3, 1) with keys (1, 0), (0, 1), (-1, 0)
    right = _softmax([dot / math.sqrt(2) for dot in dots])

    def same(other):
        return all(_close(a, b) for a, b in zip(weights, other, strict=True))

    if same(right):
        return (
            "The key the query points at takes most of it, yet even the opposite one keeps "
            "a little: softmax never says zero. Only a mask does."
        )
    if same([dot / math.sqrt(2) for dot in dots]) or same(dots):
        raise Wrong("These are scores. Attention weights are what softmax makes of them.")
    if same(_softmax(dots)):
        raise Wrong("The softmax is right, but the scores went in unscaled.")
    if same(_softmax([dot / 2 for dot in dots])):
        raise Wrong("You divided the scores by the number of features, not by its root.")
    if not _close(sum(weights), 1):
        raise Wrong(f"Weights of one query sum to 1; yours sum to {sum(weights):.3f}.")
    raise Wrong("They sum to 1, so the softmax works. Look at the dot products again.")


# ── 1.2 ──────────────────────────────────────────────────────────────────────────────────
def _check_spread(answer):
    spread = one_number(answer)
    if _close(spread, 32):
        return (
            "Each of the 256 products has a variance of 4, variances add, and the root of "
            "1024 is 32. Dividing by sqrt(256) would leave 2, the query's own spread."
        )
    if _close(spread, 1024):
        raise Wrong("That is the variance. The spread is its root.")
    if _close(spread, 16):
        raise Wrong("Right for queries of spread 1. Here theirs is 2.")
    if _close(spread, 512):
        raise Wrong("Spreads do not add up over the features; variances do.")
    if _close(spread, 2):
        raise Wrong("That is the spread after dividing by sqrt(256); we ask for before.")
    raise Wrong("Start from the variance of one product, then add 256 of them.")


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
        "With one query and a full cache the mask is all True: while generating, nobody "
        "needs a causal mask. It matters in training and when the prompt is read."
    )


# ── 1.4 ──────────────────────────────────────────────────────────────────────────────────
def _check_attention(answer):
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    if not callable(answer):
        raise Wrong("The answer should be a function of `query`, `key` and `value`.")
    generator = torch.Generator().manual_seed(0)
    query, key, value = torch.randn(3, 2, 4, 6, 16, generator=generator)
    output = answer(query.clone(), key.clone(), value.clone())
    if not isinstance(output, torch.Tensor) or output.shape != query.shape:
        got = tuple(getattr(output, "shape", ())) or type(output).__name__
        raise Wrong(f"Expected a tensor of the query's shape {tuple(query.shape)}, got {got}.")

    def same(weights):
        return torch.allclose(output, weights @ value, atol=1e-4)

    def check(expected):
        return torch.allclose(output, expected, atol=1e-4)

    if check(scaled_dot_product_attention(query, key, value, is_causal=True)):
        return "Five lines, and the heart of every model in this book."
    may_look = torch.ones(6, 6, dtype=torch.bool).tril()
    dots = query @ key.transpose(-2, -1)
    hidden = (dots / 4).masked_fill(~may_look, -math.inf)
    if check(scaled_dot_product_attention(query, key, value)):
        raise Wrong("Equal to PyTorch without a mask: your tokens can see the future.")
    if same(dots.masked_fill(~may_look, -math.inf).softmax(-1)):
        raise Wrong("Only the scale is missing.")
    if same((dots / 16).masked_fill(~may_look, -math.inf).softmax(-1)):
        raise Wrong("You divided by head_dim; its square root is asked for.")
    if same((dots / 4).softmax(-1) * may_look):
        raise Wrong(
            "You masked after the softmax, so the rows no longer sum to 1: the future has "
            "already taken its share. Mask the scores."
        )
    if same((dots / 4).masked_fill(~may_look, 0).softmax(-1)):
        raise Wrong("A masked score of 0 still gets weight, because exp(0) is 1.")
    if same(hidden.softmax(-2).nan_to_num()):
        raise Wrong("The softmax runs over the queries; each query's row should sum to 1.")
    if output.isnan().any():
        raise Wrong("There are NaNs: is some row masked entirely, or the mask inverted?")
    raise Wrong("Not equal to PyTorch's. Check scale, mask and softmax one at a time.")


# ── 1.5 ──────────────────────────────────────────────────────────────────────────────────
CACHE = 30 * 2 * 3 * 64 * 2


def _check_cache(answer):
    number = one_number(answer)
    if number == CACHE:
        return (
            "At the full context of 8,192 tokens that is 189 MB (1e6) per sequence; nine "
            "key-value heads would need 566 MB. That is what grouped-query attention buys."
        )
    known: dict[float, str] = {
        CACHE * 3: "Keys and values come from the 3 key-value heads, not from all 9 heads.",
        CACHE // 2: "Half of it. Keys and values both? And two bytes per number?",
        CACHE * 2: "A bf16 number takes 2 bytes, not 4.",
        CACHE // 30: "That is one layer; every layer keeps its own.",
        CACHE * 8192: "That is for the whole context; one token is asked for.",
    }
    raise Wrong(
        known.get(
            number,
            "Multiply: layers, two kinds of vectors, key-value heads, head_dim, bytes.",
        )
    )


# ── 1.6 ──────────────────────────────────────────────────────────────────────────────────
def _planted(layers, heads, chosen, seed):
    """Causal attention of random heads, one of which looks at the token before.

    Others look at themselves, at the first token, or at everything (as real heads do).
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    tokens = 12
    scores = torch.randn(layers, heads, tokens, tokens, generator=generator)
    itself, before = torch.eye(tokens), torch.diag(torch.ones(tokens - 1), -1)
    scores[(chosen[0] + 1) % layers, chosen[1]] += 9 * itself
    scores[chosen[0], (chosen[1] + 1) % heads, :, 0] += 9
    scores[chosen] += 5 * before
    future = torch.ones(tokens, tokens, dtype=torch.bool).triu(1)
    return scores.masked_fill(future, -math.inf).softmax(-1)


def _check_previous_head(answer):
    if not callable(answer):
        raise Wrong("The answer should be a function of `weights`.")
    for layers, heads, chosen, seed in (
        (3, 4, (1, 2), 0),
        (5, 2, (4, 1), 1),
        (2, 6, (0, 3), 2),
    ):
        weights = _planted(layers, heads, chosen, seed)
        found = answer(weights.clone())
        try:
            found = tuple(int(number) for number in found)
        except TypeError:
            if int(found) == chosen[0] * heads + chosen[1]:
                raise Wrong(
                    f"{int(found)} is the right head counted through all layers. Turn it "
                    f"into (layer, head): there are {heads} heads in a layer here."
                ) from None
            raise Wrong("Return two numbers, `(layer, head)`.") from None
        if found == chosen:
            continue
        if found == ((chosen[0] + 1) % layers, chosen[1]):
            raise Wrong("That head looks at the token itself: you took the main diagonal.")
        if found == (chosen[0], (chosen[1] + 1) % heads):
            raise Wrong("That head stares at the first token, a resting place, not a neighbor.")
        if found == chosen[::-1]:
            raise Wrong("The right head, the wrong way round: (layer, head), please.")
        raise Wrong(
            f"In {layers} layers of {heads} heads you found {found}; another one has more "
            "weight just below the main diagonal."
        )
    return (
        "A head of this kind in a lower layer is half of an induction head: it tells every "
        "token what came before it, so a later layer can ask what followed this one."
    )


# ── 1.7 ──────────────────────────────────────────────────────────────────────────────────
def _clockwork(ids):
    """A toy model: what comes next depends on the last *two* tokens and the length."""
    import torch

    logits = torch.zeros(10)
    logits[(ids[-1] + ids[-2]) % 10] = 2.0
    logits[9] = 4.0 if len(ids) >= 7 else 0.0  # 9 ends the text
    logits[3] = 1.9
    return logits


def _check_greedy(answer):
    if not callable(answer):
        raise Wrong("The answer should be a function of `next_logits`, `ids`, `steps`, `eos`.")
    lengths = []

    def watched(ids):
        ids = [int(x) for x in ids]
        if len(ids) < 2:
            raise Wrong(
                "The model was given a single token. It has no memory of its own: hand it "
                "the whole text so far at every step."
            )
        lengths.append(len(ids))
        return _clockwork(ids)

    start = [1, 2]
    found = [int(x) for x in answer(watched, list(start), 20, 9)]
    if len(lengths) > 1 and len(set(lengths)) == 1:
        raise Wrong("Every step saw the same text: append the new token before you go on.")
    right = [1, 2, 3, 5, 8, 3, 1, 9]
    if found == right:
        short = [int(x) for x in answer(_clockwork, list(start), 3, 9)]
        if short != right[:5]:
            raise Wrong(f"With steps=3 three new tokens are due; you returned {short}.")
        return "That is all `generate` does at heart. The rest is speed, choice and stopping."
    if found == right[:-1]:
        raise Wrong("Almost: keep the end-of-text token, so a reader sees the text is over.")
    if found == right[2:]:
        raise Wrong("Those are the new tokens; return the prompt and the new tokens together.")
    if len(found) > len(right) and found[: len(right)] == right:
        raise Wrong("It ran past the end-of-text token. Who stops it?")
    raise Wrong(f"Expected greedy choices, the likeliest token each time; you got {found}.")


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


def _case_list():
    return list(CASES)


def _check_when(answer):
    if isinstance(answer, str) or len(answer) != len(CASES):
        raise Wrong(f"Give a list of {len(CASES)} words, one per case.")
    words = [str(word).strip().lower().replace("finetune", "fine-tune") for word in answer]
    for number, word in enumerate(words, 1):
        if word not in WHY:
            raise Wrong(f"Case {number}: {word!r} is none of 'prompt', 'rag', 'fine-tune'.")
    for number, (word, (case, right)) in enumerate(zip(words, CASES.items(), strict=True), 1):
        if word != right:
            raise Wrong(f"Case {number} ({case}): {WHY[right]}")
    return "Facts from outside, behavior from training, and a good prompt before both."


EXERCISES = [
    Exercise(
        "1.1",
        "Three weights by hand",
        _check_by_hand,
        hints=(
            "A dot product is one multiplication per feature, then a sum.",
            "Divide the three dot products by sqrt(2), because there are two features.",
            "Softmax: exp of each scaled score, divided by the sum of the three.",
        ),
        solution="""\
import torch

query = torch.tensor([3.0, 1.0])
keys = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
answer = (keys @ query / 2**0.5).softmax(-1).tolist()
""",
    ),
    Exercise(
        "1.2",
        "The spread of a dot product",
        _check_spread,
        hints=(
            "The variance of a product of two independent, centered numbers is the product "
            "of their variances.",
            "Variances of independent terms add up. Take the root at the very end.",
        ),
        solution="answer = (256 * 2**2 * 1**2) ** 0.5\n",
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
        "Causal attention, from memory",
        _check_attention,
        hints=(
            "Scores, scale, mask, softmax, values: in this order.",
            "`scores.masked_fill(~mask, float('-inf'))` before `softmax(-1)`.",
        ),
        solution="""\
import torch


def answer(query, key, value):
    scores = query @ key.transpose(-2, -1) / query.shape[-1] ** 0.5
    tokens = scores.shape[-1]
    future = torch.ones(tokens, tokens, dtype=torch.bool).triu(1)
    return scores.masked_fill(future, float("-inf")).softmax(-1) @ value
""",
    ),
    Exercise(
        "1.5",
        "What one token leaves in the cache",
        _check_cache,
        hints=(
            "Each layer keeps two vectors per key-value head: which two?",
            "30 layers × 2 × 3 heads × 64 numbers × the bytes of a bf16 number.",
        ),
        solution="answer = 30 * 2 * 3 * 64 * 2\n",
    ),
    Exercise(
        "1.6",
        "Find the head that looks one token back",
        _check_previous_head,
        hints=(
            "`weights.diagonal(-1, dim1=-2, dim2=-1)` is what each gives its neighbor.",
            "Take its mean over the tokens, then `argmax`: it counts through all heads.",
            "`divmod(index, heads)` turns such a count into (layer, head).",
        ),
        solution="""\
def answer(weights):
    score = weights.diagonal(-1, dim1=-2, dim2=-1).mean(-1)
    return divmod(int(score.argmax()), score.shape[1])
""",
    ),
    Exercise(
        "1.7",
        "A greedy generator",
        _check_greedy,
        hints=(
            "A `for` loop over the steps: ask for logits of the whole text, take `argmax`.",
            "Append first, then look whether it was `eos` and leave the loop.",
        ),
        solution="""\
def answer(next_logits, ids, steps, eos):
    ids = list(ids)
    for _ in range(steps):
        ids.append(int(next_logits(ids).argmax()))
        if ids[-1] == eos:
            break
    return ids
""",
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
        given=_case_list,
    ),
]
