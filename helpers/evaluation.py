"""Judge a model on sentences it has never seen, base beside tuned (Chapters 0 and 6).

Three questions, from strict to kind: is the answer exactly the reference; how close is its
text (chrF); is it at least a reordering of the right words, which may be fine Yoda-speak
that the reference's author did not choose. Case, punctuation at the end and interjections
such as "Yes, hrrrm," are ignored by all three.
"""

import html
from collections import Counter
from dataclasses import dataclass, field

from helpers import data
from helpers.generation import generate

ADDED_WORDS = ("you", "must")  # what a translated command may add (see helpers/yoda)
SPARE_TOKENS = 8  # an answer may be this much longer than the longest reference


@dataclass(frozen=True)
class Example:
    """One judged sentence."""

    sentence: str
    reference: str
    answer: str
    exact: bool
    valid_order: bool


@dataclass(frozen=True)
class Report:
    """How well the answers match: percentages from 0 to 100, and every example.

    exact_match: same text as the reference. valid_order: same words in a new order.
    chrf: character n-gram F-score (sacrebleu; Popović, 2015).
    """

    exact_match: float
    valid_order: float
    chrf: float
    examples: list = field(repr=False)

    def __str__(self):
        return (
            f"{len(self.examples)} sentences: exact match {self.exact_match:.1f} %, "
            f"valid word order {self.valid_order:.1f} %, chrF {self.chrf:.1f}"
        )

    def _repr_html_(self, limit=12):
        # Failures first: they teach more than successes.
        shown = sorted(self.examples, key=lambda example: (example.exact, example.valid_order))
        rows = "".join(_row(example) for example in shown[:limit])
        style = "text-align:left"
        head = "".join(
            f"<th style='{style}'>{title}</th>"
            for title in ("sentence", "reference", "answer", "verdict")
        )
        note = f"<p>{html.escape(str(self))}</p>"
        return f"{note}<table><tr>{head}</tr>{rows}</table>"


def _row(example):
    verdict = "exact" if example.exact else "valid order" if example.valid_order else "wrong"
    texts = (example.sentence, example.reference, _shorten(example.answer), verdict)
    return (
        "<tr>"
        + "".join(f"<td style='text-align:left'>{html.escape(text)}</td>" for text in texts)
        + "</tr>"
    )


def _shorten(text, width=90):
    return text if len(text) <= width else text[: width - 1] + "…"


def evaluate(model, tokenizer, dataset, *, limit=None, max_new_tokens=None):
    """Answer every prompt greedily and compare with the references (Chapter 0).

    dataset: rows with 'prompt' and 'completion' (message lists), with 'messages', or with
        'sentence' and 'translation', as `data.load_yoda` gives them.
    limit: judge only the first `limit` rows. max_new_tokens: cut longer answers off, as an
        untrained model would ramble on; None: a little behind the longest reference.
    Returns a `Report`. Raises ValueError for an empty dataset or unknown columns.
    """
    if limit is not None and (not isinstance(limit, int) or limit < 1):
        raise ValueError(f"limit must be a positive int or None, not {limit!r}")
    rows = list(dataset) if limit is None else list(dataset)[:limit]
    if not rows:
        raise ValueError("dataset is empty: there is nothing to judge")
    prompts, references = zip(*(_split(row) for row in rows), strict=True)
    if max_new_tokens is None:
        encoded = tokenizer(list(references), add_special_tokens=False)["input_ids"]
        max_new_tokens = max(map(len, encoded)) + SPARE_TOKENS
    answers = generate(model, tokenizer, list(prompts), max_new_tokens=max_new_tokens)
    return judge([prompt[-1]["content"] for prompt in prompts], references, answers)


def _split(row):
    """(prompt messages, reference text) of one dataset row."""
    if "prompt" in row and "completion" in row:
        if isinstance(row["prompt"], str):
            raise ValueError("dataset must hold message lists in 'prompt', not plain text")
        return row["prompt"], row["completion"][-1]["content"]
    if "messages" in row:
        return row["messages"][:-1], row["messages"][-1]["content"]
    if "sentence" in row and "translation" in row:
        return [{"role": "user", "content": row["sentence"]}], row["translation"]
    raise ValueError(
        "dataset needs columns 'prompt' and 'completion', 'messages', or 'sentence' and "
        f"'translation', but has {sorted(row)}"
    )


def judge(sentences, references, answers):
    """Score answers you already have; three equally long lists of str, as a `Report`."""
    from sacrebleu.metrics import CHRF

    if not len(sentences) == len(references) == len(answers) > 0:
        raise ValueError(
            "sentences, references and answers must be equally long and not empty, not "
            f"{len(sentences)}, {len(references)} and {len(answers)} long"
        )
    examples = [
        Example(
            sentence=sentence,
            reference=reference,
            answer=answer,
            exact=normalize(answer) == normalize(reference),
            valid_order=valid_order(sentence, answer),
        )
        for sentence, reference, answer in zip(sentences, references, answers, strict=True)
    ]
    chrf = CHRF().corpus_score(
        [normalize(answer) for answer in answers],
        [[normalize(reference) for reference in references]],
    )
    count = len(examples)
    return Report(
        exact_match=100 * sum(example.exact for example in examples) / count,
        valid_order=100 * sum(example.valid_order for example in examples) / count,
        chrf=chrf.score,
        examples=examples,
    )


def normalize(text):
    """What is compared: lower case, no interjections, no punctuation at the end."""
    return " ".join(data.strip_interjections(text).lower().split()).rstrip(" .!?")


def valid_order(sentence, answer):
    """True when the answer reorders exactly the sentence's words (interjections aside).

    A command may gain "you must". An answer in the original order is not valid.
    """
    before, after = (data.words(data.strip_interjections(text)) for text in (sentence, answer))
    added = Counter(after) - Counter(before)
    missing = Counter(before) - Counter(after)
    only_listed = not added or added == Counter(ADDED_WORDS)
    return only_listed and not missing and after != before


def compare(reports):
    """One row per report, as a DataFrame: `compare({"base": report, "tuned": report})`."""
    import pandas as pd

    if not reports:
        raise ValueError("reports is empty; pass a dict such as {'base': report}")
    rows = {
        name: {
            "exact match (%)": round(report.exact_match, 1),
            "valid order (%)": round(report.valid_order, 1),
            "chrF": round(report.chrf, 1),
            "sentences": len(report.examples),
        }
        for name, report in reports.items()
    }
    return pd.DataFrame.from_dict(rows, orient="index")
