"""Judge a model on sentences it has never seen, base beside tuned (Chapters 0 and 6).

Three questions, from strict to kind: is the answer exactly the reference; how close is its
text (chrF); is it at least a reordering of the right words, which may be fine Yoda-speak
that the reference's author did not choose. Case, punctuation at the end and interjections
such as "Yes, hrrrm," are ignored by all three. Each score comes with its 95 % interval: of
100 intervals from other sets of such sentences, about 95 hold the score on all of them.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from helpers import data
from helpers._checks import one_of, whole_number
from helpers._intervals import Interval, draw, interval, middle, wilson
from helpers._report import Shown, card, counted, escape, shorten, table
from helpers.generation import check_conversation, generate

if TYPE_CHECKING:
    import pandas as pd
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_ADDED_WORDS = ["you", "must"]  # what a translated command may add (see helpers/yoda)
# A sentence that begins with one of these is no command: it has a subject, or asks.
_NO_COMMAND = """a all am an another any anybody anyone are aren't both can can't could did didn't
does doesn't each either every everybody everyone everything few four had has hasn't have he her
here his how i is isn't it its many may maybe might most must my neither no nobody nothing one
only our perhaps several shall she should some somebody someone something than that the their
there these they this those three today two was wasn't we were weren't what when where which
who whose why will won't would yesterday you your"""
METRICS = ("exact_match", "valid_order", "chrf")
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
        exact, valid, chrf = map(self.interval, METRICS)
        return (
            f"{counted(len(self.examples), 'sentence')}: exact match {exact.mean:.1f} % "
            f"({exact.low:.1f} to {exact.high:.1f}), valid word order {valid.mean:.1f} % "
            f"({valid.low:.1f} to {valid.high:.1f}), chrF {chrf}"
        )

    def interval(self, metric: str = "exact_match", *, over: Report | None = None) -> Interval:
        """A score with its 95 % interval, or how much it gained.

        A share of sentences has Wilson's interval, which also says something where all of
        them are right; chrF and every gain have a bootstrap's (see `evaluation.interval`).

        Args:
            metric: 'exact_match', 'valid_order' or 'chrf'.
            over: an earlier report on the same sentences; the interval is then that of the
                gain over it, sentence by sentence.

        Raises:
            ValueError: an unknown metric, or a report on other sentences.
        """
        one_of("metric", metric, METRICS)
        if over is not None and self._asked() != over._asked():
            raise ValueError("over judges other sentences: a gain compares the same ones")
        if metric == "chrf":
            chrfs, mean = self._chrfs(), self.chrf
            if over is not None:
                chrfs, mean = chrfs - over._chrfs(), mean - over.chrf
            return Interval(mean, *middle(chrfs))
        if over is not None:
            return interval(self._right(metric), over=over._right(metric))
        return wilson(self._right(metric))

    def _asked(self) -> list[tuple[str, str]]:
        return [(example.sentence, example.reference) for example in self.examples]

    def _right(self, metric: str) -> list[float]:
        """100 or 0 for each sentence."""
        name = {"exact_match": "exact"}.get(metric, metric)
        return [100.0 * getattr(example, name) for example in self.examples]

    def _chrfs(self) -> np.ndarray:
        """chrF of each resample, from the n-gram counts that sacrebleu's own bootstrap adds."""
        from sacrebleu.metrics import CHRF

        score = CHRF()
        answers = [_normalize(example.answer) for example in self.examples]
        references = [_normalize(example.reference) for example in self.examples]
        counts = np.array(score._extract_corpus_statistics(answers, [references]))
        return np.array([score._compute_f_score(counts[rows].sum(0)) for rows in draw(len(counts))])

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
        1 sentence: exact match 0.0 % (0.0 to 79.3), valid word order 100.0 % (20.7 to 100.0), \
chrF 66.7 (66.7 to 66.7)
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
        answer: the original order is not valid, but a command may stay whole and end in "you
            must". A command is a sentence that is no question and whose first word is
            neither a subject's nor an auxiliary; of our 2,278 sentences, that takes every
            command for one, and 1 % of the others, such as "Penguins are swimming.".

    Example:
        >>> valid_order("The tea is hot.", "Hmm, hot, the tea is.")
        True
    """
    before, after = (data.words(data.strip_interjections(text)) for text in (sentence, answer))
    if _is_command(sentence) and after[-2:] == _ADDED_WORDS:
        return Counter(after[:-2]) == Counter(before)
    return Counter(after) == Counter(before) and after != before


def _is_command(sentence: str) -> bool:
    first = next(iter(data.words(sentence)), "")
    return bool(first) and first not in _NO_COMMAND.split() and not sentence.rstrip().endswith("?")


def compare(reports: Mapping[str, Report]) -> pd.DataFrame:
    """A row per report: exact match, valid order, chrF, how many sentences, and the gain.

    The last column is the gain in exact match over the first report, in points, with its
    95 % interval (paired bootstrap); it is empty where other sentences were judged.

    Args:
        reports: such as {"base": report, "tuned": report}; ValueError when empty.

    Example:
        >>> compare({"base": judge(["a b"], ["b a"], ["a b"])})["valid order (%)"].tolist()
        [0.0]
    """
    import pandas as pd

    if not reports:
        raise ValueError("reports is empty; pass a dict such as {'base': report}")
    rows: dict[str, dict[str, Any]] = {
        name: {
            "exact match (%)": round(report.exact_match, 1),
            "valid order (%)": round(report.valid_order, 1),
            "chrF": round(report.chrf, 1),
            "sentences": len(report.examples),
        }
        for name, report in reports.items()
    }
    first, *others = reports
    for name in others:
        if reports[name]._asked() == reports[first]._asked():
            gain = reports[name].interval(over=reports[first])
            rows[name][f"exact match, gain over {first}"] = f"{gain:+.1f}"
    return pd.DataFrame.from_dict(rows, orient="index").fillna("")
