"""What a batch cannot show: rows that a trainer dropped, and what its template lost."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from helpers._report import Finding, counted
from helpers.chat._messages import REJECTIONS, check_messages

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase as Tokenizer

_READ_ROWS = 2_000  # enough to meet every shape of conversation that a dataset has


def check_dataset(trainer: Any, tokenizer: Tokenizer) -> Iterator[Finding]:
    """The findings about a trainer's dataset; ValueError if no row of it is left."""
    from datasets import Dataset

    rows = trainer.train_dataset
    if isinstance(rows, Dataset):
        yield from _dropped(rows, getattr(trainer.args, "max_length", None))
        if trainer.processing_class is tokenizer:  # a processor also writes what is no text
            yield from _unsaid(rows, tokenizer, getattr(trainer, "chat_template", None))


def _dropped(rows: Dataset, limit: int | None) -> Iterator[Finding]:
    """TRL filters its dataset: the table behind it still has the rows without a label."""
    if rows.data.num_rows == len(rows) or "labels" not in rows.column_names:
        return
    before = type(rows)(rows.data).select_columns("labels")
    gone = sum(set(row["labels"]) <= {-100} for row in before)
    message = (
        f"{gone} of {counted(len(before), 'row')} are gone: TRL drops a row without a label, and "
        f"in these no answer begins within max_length={limit}. Raise it, or shorten the prompts."
    )
    if gone and not len(rows):
        raise ValueError(f"trainer's data loader gives no batch: {message}")
    if gone:
        yield Finding("rows_dropped", message)


def _unsaid(rows: Dataset, tokenizer: Any, template: str | None) -> Iterator[Finding]:
    """What messages say and their rows do not, or not as a text: the first case of each."""
    names = {"messages", "prompt", "completion", "tools", "chat_template_kwargs"}
    names &= set(rows.column_names)
    if not (template or tokenizer.chat_template) or not names & {"messages", "prompt"}:
        return
    found: dict[str, Finding] = {}
    for number, row in enumerate(rows.select_columns(sorted(names)).take(_READ_ROWS)):
        parts = [row.get(name) for name in ("prompt", "completion", "messages")]
        talk = [message for part in parts if isinstance(part, list) for message in part]
        if not talk or not all(isinstance(message, Mapping) for message in talk):
            continue
        tools, more = row.get("tools"), row.get("chat_template_kwargs") or {}
        asked = {"tools": json.loads(tools) if isinstance(tools, str) else tools, **more}
        render = partial(
            tokenizer.apply_chat_template, chat_template=template, tokenize=False, **asked
        )
        talk = [{k: v for k, v in message.items() if v is not None} for message in talk]
        try:
            for code, message in check_messages(tokenizer, talk, render):
                found.setdefault(code, Finding(code, f"row {number} of the dataset: {message}."))
        except REJECTIONS:  # then these rows were not made by this template
            continue
    yield from found.values()
