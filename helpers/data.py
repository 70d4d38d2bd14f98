"""The Yoda sentences, their two splits, and the forms TRL eats (Chapters 0 and 4).

The packaged rows were written for this course; `helpers/yoda/README.md` has the grammar
they follow: one cut, the back part first. The book's own set stays one argument away.
"""

from __future__ import annotations

import hashlib
import json
import re
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from helpers._checks import one_of

if TYPE_CHECKING:
    from datasets import Dataset

SPLITS = ("train", "test")
_FORMS = ("prompt_completion", "messages", "columns")
COLUMNS = ("sentence", "translation", "translation_extra")
_HUB_NAME = "dvgodoy/yoda_sentences"  # the book's set: 720 rows, one split

# A stranded "it's" or "I'll" cannot end an English sentence, so Yoda says both words. Only
# forms with one reading are listed: "he'd" is "he had" or "he would", and stays as it is.
CONTRACTIONS = {"i'm": "i am"} | {
    f"{word}'{short}": f"{word} {full}"
    for group, short, full in (
        ("you we they", "re", "are"),
        ("i you he she it we they there", "ll", "will"),
        ("i you we they", "ve", "have"),
        ("he she it that there what where who", "s", "is"),
    )
    for word in group.split()
}

# Looser than the hums of our rows on purpose: a model that hums one r too many still hums.
_SOUND = r"(?:h+r*m+|m{2,}|he+r?h|y+r*s{2,})\b"
_AT_START = re.compile(
    rf"^(?:yes,\s+)?{_SOUND}(?:[\s,]+{_SOUND})*(?:,\s+yes)?\s*[,.!?\u2026]+\s+(?=\w)(?!{_SOUND})",
    re.IGNORECASE,
)
_AT_END = re.compile(rf"(?<=[.!?])\s+(?:(?:\byes\b|\b{_SOUND})[\s,.!?]*)+$", re.IGNORECASE)
_SURROGATE = re.compile("[\ud800-\udfff]")
_PUNCTUATION = re.compile(r"[^\w\s'-]|(?<!\w)['-]|['-](?!\w)")


def load_yoda(
    split: str = "train",
    *,
    interjections: bool = True,
    form: str = "prompt_completion",
    source: str | Path | None = None,
) -> Dataset:
    """Load English sentences with their Yoda translations (Chapter 0).

    Args:
        split: 'train' or 'test'.
        interjections: the assistant says translation_extra, which begins with a hum, instead
            of translation; 'columns' always has both.
        form: 'prompt_completion' (columns prompt and completion, each a list with one
            message), 'messages' (one column, a user and an assistant message) or 'columns'
            (sentence, translation, translation_extra and whatever else a row has, None in
            the rows that lack it).
        source: None for the packaged rows; 'hub' for the book's `dvgodoy/yoda_sentences`; or
            a path to JSON lines with those columns. The last two come without a split: about
            one row in six, chosen by a hash of its sentence, is held out as 'test'.

    Raises:
        ValueError: an unknown split or form; a file that is missing, empty or malformed.
        ConnectionError: the Hub cannot be reached.

    Example:
        >>> load_yoda("test")[0]["prompt"][0]["role"]
        'user'
    """
    one_of("split", split, SPLITS)
    one_of("form", form, _FORMS)
    if source is None:
        text = resources.files("helpers").joinpath("yoda", f"{split}.jsonl")
        rows = _parse(text.read_text(encoding="utf-8"), f"the packaged {split} split")
    else:
        everything = _hub_rows() if source == "hub" else _file_rows(source)
        rows = [r for r in everything if _held_out(r["sentence"]) == (split == "test")]
        if not rows:
            raise ValueError(
                f"source={str(source)!r} has {len(everything)} rows and none of them falls "
                f"into split={split!r} (one in six is held out); give more rows"
            )

    from datasets import Dataset

    if form == "columns":
        try:
            return Dataset.from_list(rows)
        except (ValueError, TypeError) as error:  # Arrow's, of columns beside ours
            raise ValueError(
                f"source={str(source)!r}: a column must hold one kind of value in all rows: {error}"
            ) from error
    answer = "translation_extra" if interjections else "translation"
    talks = []
    for row in rows:
        user = {"role": "user", "content": row["sentence"]}
        assistant = {"role": "assistant", "content": row[answer]}
        if form == "messages":
            talks.append({"messages": [user, assistant]})
        else:
            talks.append({"prompt": [user], "completion": [assistant]})
    return Dataset.from_list(talks)


def strip_interjections(text: str) -> str:
    """A text without the humming before and behind its sentence (Chapter 0).

    Args:
        text: loses hums however long they are drawn out, at the start (where our rows have
            them) and at the end (where the book's have). A word that belongs to the sentence
            ("Say yes, you must.") stays, and so does a text that is all sound.

    Example:
        >>> strip_interjections("Hmm, cold, it is. Yes, hrrrrm.")
        'cold, it is.'
    """
    return _AT_END.sub("", _AT_START.sub("", text.strip(), count=1))


def words(text: str) -> list[str]:
    """The lower-case words of a text without punctuation, for scoring (Chapter 0).

    Args:
        text: apostrophes and hyphens inside a word stay ("don't", "captain's"); contractions
            of pronouns are spelled out, so that "it's cold" and "cold, it is" are equal.

    Example:
        >>> words("It's cold!")
        ['it', 'is', 'cold']
    """
    text = text.lower().replace("\u2019", "'")
    spelled = (CONTRACTIONS.get(w, w) for w in _PUNCTUATION.sub(" ", text).split())
    return " ".join(spelled).split()


def _held_out(sentence: str) -> bool:
    """Decide by the words alone, so that order, reruns and duplicates change nothing."""
    digest = hashlib.sha256(" ".join(words(sentence)).encode()).digest()
    return digest[0] % 6 == 0


def _is_text(value: object) -> bool:
    """Not blank, and no half of an emoji, which no tokenizer would take."""
    return isinstance(value, str) and bool(value.strip()) and not _SURROGATE.search(value)


def _parse(text: str, where: str) -> list[dict[str, Any]]:
    rows = []
    # Not splitlines(): JSON strings may hold other line ends of Unicode as they are.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{where}, line {number}: not JSON ({error})") from error
        texts = row if isinstance(row, dict) else {}
        missing = [c for c in COLUMNS if not _is_text(texts.get(c))]
        if missing:
            raise ValueError(
                f"{where}, line {number}: no text in {', '.join(missing)}; every line is "
                f"an object with the columns {', '.join(COLUMNS)}"
            )
        rows.append(row)
    if not rows:
        raise ValueError(f"{where} has no rows")
    names = dict.fromkeys(name for row in rows for name in row)
    return [{name: row.get(name) for name in names} for row in rows]


def _file_rows(source: str | Path) -> list[dict[str, Any]]:
    try:
        text = Path(source).read_text(encoding="utf-8-sig")  # Windows marks its UTF-8
    except (OSError, TypeError, UnicodeDecodeError) as error:
        raise ValueError(
            f"source={source!r} cannot be read ({error}); give None for the packaged rows, "
            "'hub' for the book's set, or the path of a JSON-lines file"
        ) from error
    return _parse(text, f"source={str(source)!r}")


def _hub_rows() -> list[dict[str, Any]]:
    from datasets import load_dataset

    try:
        return load_dataset(_HUB_NAME, split="train").select_columns(COLUMNS).to_list()
    except Exception as error:  # what a missing network raises differs by layer and version
        raise ConnectionError(
            f"source='hub': {_HUB_NAME} could not be loaded "
            f"({type(error).__name__}: {error}); without the Hub use source=None, the "
            "packaged sentences"
        ) from error
