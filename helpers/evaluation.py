"""Judge a model on sentences it has never seen, base beside tuned (Chapters 0 and 6).

Three questions, from strict to kind: is the answer exactly the reference; how close is its
text (chrF); is it at least a reordering of the right words, which may be fine Yoda-speak
that the reference's author did not choose. Case, punctuation at the end and interjections
such as "Yes, hrrrm," are ignored by all three.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from helpers import data
from helpers._checks import whole_number
from helpers._report import Shown, card, counted, escape, shorten, table
from helpers.generation import generate

if TYPE_CHECKING:
    import pandas as pd
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_ADDED_WORDS = ("you", "must")  # what a translated command may add (see helpers/yoda)
_SPARE_TOKENS = 8  # an answer may be this much longer than the longest reference
_MOST_ROWS = 12  # of a report in a notebook


@dataclass(frozen=True)
class Example:
    """One judged sentence."""

    sentence: str
    reference: str
    answer: str
    exact: bool
    valid_order: bool

    @property
    def verdict(self) -> str:
        """'exact', 'valid order' or 'wrong'."""
        return "exact" if self.exact else "valid order" if self.valid_order else "wrong"


@dataclass(frozen=True, repr=False)
class Report(Shown):
    """How well the answers match: percentages from 0 to 100, and every example.

    Attributes:
        exact_match: same text as the reference.
        valid_order: same words in a new order.
        chrf: character n-gram F-score (sacrebleu; Popović, 2015).
        examples: an `Example` per sentence.
    """

    exact_match: float
    valid_order: float
    chrf: float
    examples: list[Example]

    def __str__(self) -> str:
        return (
            f"{counted(len(self.examples), 'sentence')}: exact match {self.exact_match:.1f} %, "
            f"valid word order {self.valid_order:.1f} %, chrF {self.chrf:.1f}"
        )

    def _repr_html_(self) -> str:
        # Failures first: they teach more than successes.
        shown = sorted(self.examples, key=lambda example: (example.exact, example.valid_order))
        rows = [(e.sentence, e.reference, shorten(e.answer), e.verdict) for e in shown[:_MOST_ROWS]]
        head = ("sentence", "reference", "answer", "verdict")
        return card(str(self), html=f"<p>{escape(str(self))}</p>{table(rows, head)}")


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Iterable[Mapping[str, Any]],
    *,
    limit: int | None = None,
    max_new_tokens: int | None = None,
) -> Report:
    """Answer every prompt greedily and compare with the references (Chapter 0).

    Args:
        model: a causal language model, with or without adapters.
        tokenizer: the model's, with a chat template.
        dataset: rows with 'prompt' and 'completion' (message lists), with 'messages', or
            with 'sentence' and 'translation', as `data.load_yoda` gives them.
        limit: judge only the first `limit` rows.
        max_new_tokens: cut longer answers off, as an untrained model would ramble on;
            None: a little behind the longest reference.

    Raises:
        ValueError: an empty dataset, unknown columns, or a limit below 1.

    Example:
        >>> evaluate(model, tokenizer, data.load_yoda("test")).exact_match  # doctest: +SKIP
        85.3
    """
    if limit is not None:
        whole_number("limit", limit)
    rows = list(dataset)[:limit]
    if not rows:
        raise ValueError("dataset is empty: there is nothing to judge")
    prompts, references = zip(*map(_split, rows), strict=True)
    if max_new_tokens is None:
        encoded = tokenizer(list(references), add_special_tokens=False)["input_ids"]
        max_new_tokens = max(map(len, encoded)) + _SPARE_TOKENS
    answers = generate(model, tokenizer, list(prompts), max_new_tokens=max_new_tokens)
    return judge([prompt[-1]["content"] for prompt in prompts], references, answers)


def _split(row: Mapping[str, Any]) -> tuple[list[dict[str, Any]], str]:
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


def judge(sentences: Sequence[str], references: Sequence[str], answers: Sequence[str]) -> Report:
    """Score answers you already have.

    Args:
        sentences: what was asked.
        references: the right answers.
        answers: the model's; all three equally long, ValueError otherwise.

    Example:
        >>> print(judge(["The tea is hot."], ["Hot, the tea is."], ["hot the tea is"]))
        1 sentence: exact match 0.0 %, valid word order 100.0 %, chrF 66.7
    """
    from sacrebleu.metrics import CHRF

    if not len(sentences) == len(references) == len(answers) > 0:
        raise ValueError(
            "sentences, references and answers must be equally long and not empty, not "
            f"{len(sentences)}, {len(references)} and {len(answers)} long"
        )
    said, wanted = list(map(_normalize, answers)), list(map(_normalize, references))
    exact = [mine == theirs for mine, theirs in zip(said, wanted, strict=True)]
    valid = list(map(valid_order, sentences, answers))
    return Report(
        exact_match=100 * sum(exact) / len(exact),
        valid_order=100 * sum(valid) / len(valid),
        chrf=CHRF().corpus_score(said, [wanted]).score,
        examples=list(map(Example, sentences, references, answers, exact, valid)),
    )


def _normalize(text: str) -> str:
    """What is compared: lower case, no interjections, no punctuation at the end."""
    return " ".join(data.strip_interjections(text).lower().split()).rstrip(" .!?")


def valid_order(sentence: str, answer: str) -> bool:
    """Whether the answer reorders exactly the sentence's words (interjections aside).

    Args:
        sentence: what was asked.
        answer: a command may gain "you must"; the original order is not valid.

    Example:
        >>> valid_order("The tea is hot.", "Hmm, hot, the tea is.")
        True
    """
    before, after = (data.words(data.strip_interjections(text)) for text in (sentence, answer))
    added = Counter(after) - Counter(before)
    missing = Counter(before) - Counter(after)
    return added in (Counter(), Counter(_ADDED_WORDS)) and not missing and after != before


def compare(reports: Mapping[str, Report]) -> pd.DataFrame:
    """A row per report: exact match, valid order, chrF and how many sentences.

    Args:
        reports: such as {"base": report, "tuned": report}; ValueError when empty.

    Example:
        >>> compare({"base": judge(["a b"], ["b a"], ["a b"])})["valid order (%)"].tolist()
        [0.0]
    """
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
