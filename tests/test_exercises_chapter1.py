"""Chapter 1's exercises: typical wrong answers get the feedback that helps."""

import math

import pytest
import torch

from helpers.course import exercises
from helpers.course.exercises import chapter1


def solution(number):
    names = {}
    exec(exercises.show(number).code, names)
    return names["answer"]


@pytest.mark.parametrize("exercise", chapter1.EXERCISES, ids=lambda e: e.number)
def test_solutions_pass_and_blanks_wait(exercise):
    result = exercises.check(exercise.number, solution(exercise.number))
    assert result.passed, result
    assert exercises.check(exercise.number, ...).state == "open"
    assert exercise.hints
    assert exercise.solution.count("answer") >= 1


SAME = ["sharper", "same", "same", "flatter", "same", "flatter"]
SEEN = ["wrong axis", "no scale", "late mask", "healthy", "no mask"]


def but(words, number, word):
    return [*words[: number - 1], word, *words[number:]]


def many_heads(*faults):
    return lambda Q, K, V, heads: chapter1._many_heads(Q, K, V, heads, *faults)


def finder(job="equal", *, flat=False, swapped=False, strongest=False):
    """A head finder for another job, or with another mistake."""

    def answer(weights, tokens):
        n = len(tokens)
        equal = torch.tensor([[x == y for y in tokens] for x in tokens])
        pairs = {
            "equal": equal.tril(-1),
            "itself": equal.tril(),
            "followed": equal.tril(-1).roll(1, 1),
            "before": torch.ones(n, n).tril(-1).triu(-1).bool(),
            "first": torch.arange(n) * torch.ones(n, 1) == 0,
        }[job]
        found = weights[:, :, pairs]
        score = found.amax(-1) if strongest else found.mean(-1)
        index = int(score.argmax())
        place = divmod(index, score.shape[1])
        return index if flat else place[::-1] if swapped else place

    return answer


def writer(*, temperature=1.0, top_k=200, top_p=1.0, penalty=0.0, prompt=True, extra=0):
    """Draws, or with temperature 0 chooses, what to write next."""
    dice = torch.Generator().manual_seed(3)

    def answer(next_logits, ids, steps):
        start, ids = len(ids), list(ids)
        for _ in range(steps + extra):
            logits = next_logits(ids)
            logits[list(set(ids))] -= penalty
            chances, order = (logits / (temperature or 1)).softmax(-1).sort(descending=True)
            chances[chances.cumsum(0) - chances >= top_p] = 0
            chances[top_k:] = 0
            drawn = torch.multinomial(chances, 1, generator=dice)
            ids.append(int(order[drawn if temperature else 0]))
        return ids if prompt else ids[start:]

    return answer


def chunks(*matrices_and_heads):
    *matrices, heads = matrices_and_heads
    return zip(*(x.chunk(heads, -1) for x in matrices), strict=True)


def one_head_only(Q, K, V, heads):
    """Every head takes every heads-th feature."""
    Q, K, V = (x.unflatten(1, (-1, heads)).mT.flatten(1) for x in (Q, K, V))
    return many_heads()(Q, K, V, heads).unflatten(1, (heads, -1)).mT.flatten(1)


def no_triple_twice(next_logits, ids, steps):
    for _ in range(steps):
        seen = set(zip(ids, ids[1:], ids[2:], strict=False))
        best = next_logits(ids).argsort(descending=True).tolist()
        ids.append(next(token for token in best if (*ids[-2:], token) not in seen))
    return torch.tensor(ids)


def uniform(next_logits, ids, steps):
    return ids + torch.randint(200, (steps,), generator=torch.Generator()).tolist()


WRONG = [
    ("1.1", but(SAME, 1, "same"), "Case 1 is not 'same': all differences"),
    ("1.1", but(SAME, 1, "flatter"), "threefold"),
    ("1.1", but(SAME, 2, "sharper"), "by the same number"),
    ("1.1", but(SAME, 2, "flatter"), "by the same number"),
    ("1.1", but(SAME, 3, "sharper"), "values come in"),
    ("1.1", but(SAME, 4, "sharper"), "smaller than they should"),
    ("1.1", but(SAME, 4, "same"), "smaller than they should"),
    ("1.1", but(SAME, 5, "sharper"), "*between* the two"),
    ("1.1", but(SAME, 6, "same"), "halve both"),
    ("1.1", but(SAME, 6, "sharper"), "halve both"),
    ("1.1", ["same"] * 6, "Case 1"),
    ("1.1", SAME[:5], "list of 6 words"),
    ("1.1", but(SAME, 2, "steeper"), "'steeper' is none of 'sharper'"),
    ("1.1", "sharper", "list of 6 words"),
    ("1.1", 6, "list of 6 words"),
    ("1.2", but(SEEN, 1, "late mask"), "Picture A is not 'late mask': add up the last column"),
    ("1.2", but(SEEN, 1, "healthy"), "add up the last column"),
    ("1.2", but(SEEN, 2, "healthy"), "share the weight of a row"),
    ("1.2", but(SEEN, 3, "wrong axis"), "only at itself"),
    ("1.2", but(SEEN, 3, "healthy"), "only at itself"),
    ("1.2", but(SEEN, 4, "no scale"), "is there anything wrong"),
    ("1.2", but(SEEN, 4, "late mask"), "is there anything wrong"),
    ("1.2", but(SEEN, 5, "no scale"), "really empty"),
    ("1.2", ["healthy"] * 5, "Picture A"),
    ("1.2", SEEN[::-1], "Picture A"),
    ("1.2", but(SEEN, 2, "sharp"), "'sharp' is none of"),
    ("1.2", {"A": "wrong axis"}, "Case 2: '' is none of"),
    ("1.2", SEEN[:4], "list of 5 words"),
    ("1.2", "no mask", "list of 5 words"),
    ("1.3", lambda queries, keys: torch.ones(queries, keys).tril(), "newest one"),
    ("1.3", lambda queries, keys: torch.ones(queries, keys).triu(1), "Upside down"),
    ("1.3", lambda queries, keys: torch.ones(queries, keys).tril(-1), "diagonal"),
    ("1.3", lambda queries, keys: torch.ones(queries, keys), "row by row"),
    ("1.3", lambda queries, keys: torch.ones(keys, keys).tril(), "shape is (5, 5)"),
    ("1.3", lambda queries, keys: torch.ones(keys, queries).tril(), "shape is (5, 2)"),
    ("1.3", lambda queries, keys: torch.zeros(queries, keys), "row by row"),
    ("1.3", lambda queries, keys: torch.ones(queries, keys).tril(keys - queries - 1),
     "may look at itself"),
    ("1.3", torch.ones(4, 4).tril(), "function"),
    ("1.4", many_heads("split", "merge", "scale"), "cut wrongly"),
    ("1.4", many_heads("split", "merge"), "cut wrongly"),
    ("1.4", many_heads("split", "scale"), "cut wrongly"),
    ("1.4", many_heads("split"), "cut wrongly"),
    ("1.4", many_heads("merge", "scale"), "joined wrongly"),
    ("1.4", many_heads("merge"), "joined wrongly"),
    ("1.4", many_heads("scale"), "Only the scale"),
    ("1.4", many_heads("mask"), "sees the future"),
    ("1.4", many_heads("mask", "scale"), "sees the future"),
    ("1.4", lambda Q, K, V, heads: Q.reshape(heads, len(Q), -1), "got (1, 5, 12)"),
    ("1.4", lambda Q, K, V, heads: V * math.nan, "NaN"),
    ("1.4", lambda Q, K, V, heads: V, "compare with `attend`"),
    ("1.4", one_head_only, "One head is right"),
    ("1.4", lambda Q, K, V, heads: many_heads()(Q * heads / 2, K, V, heads), "`attend`"),
    ("1.4", lambda Q, K, V, heads: None, "got NoneType"),
    ("1.4", lambda Q, K, V, heads: many_heads()(Q, K, V, 1), "with 5 tokens, 12 features and"),
    ("1.4", "reshape", "function"),
    ("1.5", 28, "3 key-value heads"),
    ("1.5", 29, "3 key-value heads"),
    ("1.5", 173, "Twice as many"),
    ("1.5", 43, "2 bytes, not 4"),
    ("1.5", 2604, "one layer"),
    ("1.5", 93, "1e9 bytes"),
    ("1.5", 173611, "number of tokens"),
    ("1.5", 21, "8,192 tokens"),
    ("1.5", 87, "whole conversations only"),
    ("1.5", 4e9 / 23040 / 2000, "whole conversations only"),
    ("1.5", 23040, "bytes of one token"),
    ("1.5", 46_080_000, "bytes of one conversation"),
    ("1.5", 1, "bytes of one token"),
    ("1.5", "many", "one number"),
    ("1.6", finder("itself"), "token itself"),
    ("1.6", finder("before"), "token before"),
    ("1.6", finder("first"), "first token"),
    ("1.6", finder("followed"), "induction head"),
    ("1.6", finder(strongest=True), "mean over all pairs"),
    ("1.6", finder(flat=True), "(layer, head)"),
    ("1.6", finder(swapped=True), "wrong way round"),
    ("1.6", lambda weights, tokens: (0, 1), "less weight"),
    ("1.6", lambda weights, tokens: None, "two numbers"),
    ("1.6", (1, 2), "function"),
    ("1.7", writer(temperature=0), "round in circles"),
    ("1.7", writer(temperature=0.05), "round in circles"),
    ("1.7", writer(temperature=0.1), "round in circles"),
    ("1.7", writer(top_k=1), "round in circles"),
    ("1.7", writer(), "unlikely tokens"),
    ("1.7", writer(temperature=2.0), "unlikely tokens"),
    ("1.7", uniform, "unlikely tokens"),
    ("1.7", lambda next_logits, ids, steps: ids + [7] * steps, "unlikely tokens"),
    ("1.7", writer(prompt=False), "together"),
    ("1.7", writer(extra=1), "81"),
    ("1.7", writer(extra=-80), "80 new tokens are due"),
    ("1.7", lambda next_logits, ids, steps: ids + [999] * steps, "0 to 199"),
    ("1.7", lambda next_logits, ids, steps: None, "one list"),
    ("1.7", [1, 2, 3], "function"),
    ("1.8", ["rag", "prompt", "prompt", "rag", "fine-tune"], "Case 2"),
    ("1.8", ["fine-tune"] * 5, "*fact*"),
    ("1.8", ["prompt"] * 5, "*fact*"),
    ("1.8", ["rag", "fine-tune", "rag", "rag", "fine-tune"], "Try asking"),
    ("1.8", ["rag", "fine-tune", "prompt", "fine-tune", "fine-tune"], "Case 4"),
    ("1.8", ["rag", "fine-tune", "prompt", "rag", "prompt"], "*behavior*"),
    ("1.8", ["rag", "fine-tune", "magic", "rag", "fine-tune"], "'magic' is none of"),
    ("1.8", ["rag"], "5 words"),
    ("1.8", "rag", "5 words"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("number", "answer", "fragment"), WRONG, ids=[f"{n}-{f[:20]}" for n, _, f in WRONG]
)
def test_wrong_answers_get_their_feedback(number, answer, fragment):
    result = exercises.check(number, answer)
    assert result.state == "wrong"
    assert fragment in result.message


RIGHT = [
    ("1.1", dict(enumerate(SAME, 1))),
    ("1.1", ("Sharper", " same", "SAME", "flatter", "same", "flatter")),
    ("1.2", dict(zip("ABCDE", SEEN, strict=True))),
    ("1.2", dict(zip("EDCBA", SEEN[::-1], strict=True))),
    ("1.2", ("Wrong Axis", "no-scale", "late  mask", "Healthy", "no mask")),
    ("1.3", lambda q, k: solution("1.3")(q, k).int()),
    ("1.3", lambda q, k: [[j <= i + k - q for j in range(k)] for i in range(q)]),
    ("1.4", many_heads()),
    ("1.4", lambda Q, K, V, heads: torch.cat(
        [many_heads()(*part, 1) for part in chunks(Q, K, V, heads)], -1)),
    ("1.4", lambda Q, K, V, heads: many_heads()(Q.double(), K.double(), V.double(), heads)),
    ("1.5", 86.0),
    ("1.5", torch.tensor(86)),
    ("1.5", "86"),
    ("1.6", finder()),
    ("1.6", lambda weights, tokens: torch.tensor(finder()(weights, tokens))),
    ("1.6", lambda weights, tokens: list(map(float, finder()(weights, tokens)))),
    ("1.7", writer(top_k=6)),
    ("1.7", writer(top_k=20)),
    ("1.7", writer(top_k=2)),
    ("1.7", writer(top_p=0.9)),
    ("1.7", writer(top_p=0.5)),
    ("1.7", writer(temperature=0.7)),
    ("1.7", writer(temperature=0.3)),
    ("1.7", writer(temperature=0, penalty=2.0)),
    ("1.7", no_triple_twice),
    ("1.8", ("RAG", "finetune", "Prompt", "rag", "fine-tune ")),
    ("1.8", ["rag", "fine-tuning", "prompt", "rag", "Fine tuning"]),
    ("1.8", ["rag", "fine tune", "prompt", "rag", "fine-tune"]),
]  # fmt: skip


@pytest.mark.parametrize(("number", "answer"), RIGHT)
def test_answers_in_other_clothes_pass(number, answer):
    result = exercises.check(number, answer)
    assert result.passed, result


def test_an_answer_that_raises_is_reported_kindly():
    result = exercises.check("1.4", lambda Q, K, V, heads: Q @ K)
    assert result.state == "wrong"
    assert "RuntimeError" in result.message


def test_given_material():
    assert exercises.given("1.8") == list(chapter1.CASES)
    assert exercises.given("1.7").startswith("greedy: 67%")
    assert len(exercises.given("1.2").axes) == 6  # five pictures and a color bar
