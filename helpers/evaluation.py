"""Judge a model on sentences it has never seen, base beside tuned (Chapters 0 and 6).

Three questions, from strict to kind: is the answer exactly the reference; how close is its
text (chrF); is it at least a reordering of the right words, which may be fine Yoda-speak
that the reference's author did not choose. Case, punctuation at the end and interjections
such as "Yes, hrrrm," are ignored by all three.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from helpers import data
from helpers._checks import whole_number
from helpers._report import Shown, card, counted, escape, shorten, table
from helpers.generation import check_conversation, generate

if TYPE_CHECKING:
    import pandas as pd
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_ADDED_WORDS = ("you", "must")  # what a translated command may add (see helpers/yoda)
_SPARE_TOKENS = 8  # an answer may be this much longer than the longest reference
_NO_TEXT = ("tool_calls", "reasoning_content")  # what a message may say beside its text
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
            with 'sentence' and 'translation', as `data.load_yoda` gives them. Judged is the
            assistant's last message, in answer to all that stands before it.
        limit: judge only the first `limit` rows.
        max_new_tokens: cut longer answers off, as an untrained model would ramble on;
            None: a little behind the longest reference.

    Raises:
        ValueError: an empty dataset, a limit below 1, or a row that is not a question and
            its answer in text; the row is named.

    Example:
        >>> evaluate(model, tokenizer, data.load_yoda("test")).exact_match  # doctest: +SKIP
        85.3
    """
    if limit is not None:
        whole_number("limit", limit)
    pairs = []
    for number, row in enumerate(itertools.islice(dataset, limit)):
        try:
            pairs.append(_split(row))
        except ValueError as error:
            raise ValueError(f"dataset, row {number}: {error}") from error
    if not pairs:
        raise ValueError("dataset is empty: there is nothing to judge")
    prompts, references = zip(*pairs, strict=True)
    if max_new_tokens is None:
        encoded = tokenizer(list(references), add_special_tokens=False)["input_ids"]
        max_new_tokens = max(map(len, encoded)) + _SPARE_TOKENS
    answers = generate(model, tokenizer, list(prompts), max_new_tokens=max_new_tokens)
    asked = [[m["content"] for m in prompt if m["role"] == "user"][-1] for prompt in prompts]
    return judge(asked, references, answers)


def _split(row: Any) -> tuple[list[dict[str, Any]], str]:
    """(prompt messages, reference text) of one dataset row."""
    filled = {k for k, v in row.items() if v is not None} if isinstance(row, Mapping) else set()
    if {"prompt", "completion"} <= filled:
        prompt, answers = row["prompt"], row["completion"]
    elif "messages" in filled:
        prompt, answers = row["messages"][:-1], row["messages"][-1:]
    elif {"sentence", "translation"} <= filled:
        prompt = [{"role": "user", "content": row["sentence"]}]
        answers = [{"role": "assistant", "content": row["translation"]}]
    else:
        raise ValueError(
            "it needs columns 'prompt' and 'completion', 'messages', or 'sentence' and "
            f"'translation', but is {shorten(row)}"
        )
    if isinstance(prompt, str) or isinstance(answers, str):
        raise ValueError("it must hold message lists, not plain text")
    check_conversation([*prompt, *answers])
    asked, said = [m["role"] for m in prompt], [m["role"] for m in answers]
    if said != ["assistant"] or "user" not in asked or asked[-1] == "assistant":
        raise ValueError(
            "it must hold a question and one answer, with all that was said before the answer "
            f"in the prompt, but its roles are {asked} and then {said}"
        )
    answer = answers[0]
    if any(map(answer.get, _NO_TEXT)) or not (answer.get("content") or "").strip():
        raise ValueError(f"its answer must be text alone, not {shorten(answer)}")
    return list(prompt), answer["content"]


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
    for texts in (sentences, references, answers):
        if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
            raise TypeError(f"judge compares lists of texts, not {shorten(texts)}")
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
