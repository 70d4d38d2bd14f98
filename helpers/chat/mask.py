"""The mask view: which tokens a batch trains, and what is wrong with that (Chapter 4).

The alarms come from the chat template: a two-turn conversation is rendered with it, and
what it writes before, between and after the contents must, may or must not be trained.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, islice
from typing import TYPE_CHECKING, Any, TypeAlias

from helpers._checks import whole_number
from helpers._report import Finding, Shown, card, counted, escape
from helpers.chat._alarms import CODES, Sample, check_labels, trained_runs
from helpers.chat._dataset import check_dataset
from helpers.chat._format import read_format
from helpers.chat._tokens import Token, read_row, token_bytes, unfence

if TYPE_CHECKING:
    import numpy as np
    import torch
    from transformers import PreTrainedTokenizerBase as Tokenizer
    from transformers import Trainer

    Ids: TypeAlias = Sequence[int] | Sequence[Sequence[int]] | np.ndarray | torch.Tensor

_BRACKETS = {"trained": "⟦{}⟧", "ignored": "{}", "padding": "‹{}›"}
# GitHub may drop every style: bold, underline and strike-through carry the meaning without
# color. A white edge keeps neighbors apart: one box, one token.
_STYLES = {
    "trained": ("background:#cfe6f5;color:#00395c", "<b><u>{}</u></b>"),
    "ignored": ("color:#6b6b6b", "{}"),
    "padding": ("background:#eeeeee;color:#8c8c8c", "<s>{}</s>"),
}
# Of a large batch, enough to see in a notebook of one megabyte.
_SHOWN_ROWS = 8
_SHOWN_TOKENS = 2_400  # of all rows; without padding, which is counted
_SHOWN_RUNS = 12  # of a row's learned texts
_SHOWN_CHARACTERS = 1_200  # of a learned text
_COLUMNS = ("input_ids", "labels", "attention_mask", "position_ids")


@dataclass(frozen=True, repr=False, eq=False)
class MaskView(Shown):
    """What a batch trains; shows itself as text and, in a notebook, in color."""

    tokens: list[Token]  # row after row
    problems: list[Finding]  # with `.code` and `.message`; empty if all is well
    learned: list[list[str]]  # per row, the texts the model learns to say

    @property
    def rows(self) -> list[list[Token]]:
        """The tokens as one list per row."""
        return [list(group) for _, group in groupby(self.tokens, key=lambda t: t.row)]

    def __str__(self) -> str:
        lines = []
        for row, learned in self._shown():
            lines += [_count(row), _write(row, _brackets, self._most)]
            lines += [f"learned: {text}" for text in _learned(learned)]
        lines += [self._more] * bool(self._more)
        lines += [f"! {problem}" for problem in self.problems] or ["no problems found"]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        names = {"trained": "trained", "ignored": "ignored (context only)", "padding": "padding"}
        legend = " · ".join(_styled(name, kind) for kind, name in names.items())
        parts = [f"<p><small>legend: {legend}</small></p>"]
        for row, learned in self._shown():
            texts = " · ".join(f"<code>{escape(text)}</code>" for text in _learned(learned))
            parts += [
                f"<p><small>{_count(row)}</small></p>",
                f"<pre style='white-space:pre-wrap'>{_write(row, _boxes, self._most)}</pre>",
                f"<p><small>learned: {texts or 'nothing'}</small></p>",
            ]
        if self._more:
            parts.append(f"<p><small>{self._more}</small></p>")
        found = [card(str(problem), "bad") for problem in self.problems]
        return "\n".join(parts + (found or [card("no problems found", "good")]))

    def _shown(self) -> Iterator[tuple[list[Token], list[str]]]:
        return islice(zip(self.rows, self.learned, strict=True), _SHOWN_ROWS)

    @property
    def _most(self) -> int:
        """How many tokens of a row are shown."""
        return _SHOWN_TOKENS // max(1, min(len(self.learned), _SHOWN_ROWS))

    @property
    def _more(self) -> str:
        more = len(self.learned) - _SHOWN_ROWS
        return f"… and {counted(more, 'more row')}: see .rows and .learned" if more > 0 else ""


def _count(row: list[Token]) -> str:
    kinds = [token.kind for token in row]
    samples = len({token.sample for token in row if not token.padding})
    packed = f" · {samples} samples packed" if samples > 1 else ""
    counts = ", ".join(f"{kinds.count(kind)} {kind}" for kind in _STYLES)
    return f"row {row[0].row} · {len(row)} tokens: {counts}{packed}"


def _write(row: list[Token], write_run: Callable[[list[Token], str], str], most: int) -> str:
    """One row as text, run by run; of a long one, the beginning and the end."""
    real = [token.index for token in row if not token.padding]
    left_out = real[most // 2 : len(real) - most // 2] if len(real) > most else []
    gap = range(left_out[0], left_out[-1] + 1) if left_out else range(0)
    out, before = [], 0
    for (sample, kind, cut), group in groupby(row, lambda t: (t.sample, t.kind, t.index in gap)):
        run = list(group)
        if cut:
            if run[0].index == gap.start:
                out.append(f"\n─── {counted(len(gap), 'token')} not shown ───\n")
            before = sample
            continue
        if sample != before:
            before = sample
            out.append(f"\n─── sample {sample}, positions from {run[0].position} ───\n")
        out.append(write_run(run, kind))
    return "".join(out)


def _learned(texts: list[str]) -> list[str]:
    """The learned texts of a row, quoted; of a long text, the beginning and the end."""
    half, shown = _SHOWN_CHARACTERS // 2, []
    for text in texts[:_SHOWN_RUNS]:
        if (more := len(text) - _SHOWN_CHARACTERS) > 0:
            text = f"{text[:half]} … {counted(more, 'character')} not shown … {text[-half:]}"
        shown.append(repr(text))
    more = len(texts) - _SHOWN_RUNS
    return [*shown, f"… and {counted(more, 'more text')}"] if more > 0 else shown


def _visible(run: list[Token]) -> list[str]:
    """Text of each token, line breaks seen; long padding is counted rather than repeated."""
    if run[0].padding:
        return [f"{run[0].text} × {len(run)}"]
    return [token.text.replace("\n", "⏎\n") for token in run]


def _brackets(run: list[Token], kind: str) -> str:
    return _BRACKETS[kind].format("".join(_visible(run)))


def _boxes(run: list[Token], kind: str) -> str:
    pairs = zip(_visible(run), run, strict=False)  # padding is a single text
    about = " title='#{0.index} id {0.id} position {0.position}'"
    return "".join(_styled(text, kind, about.format(token)) for text, token in pairs)


def _styled(text: str, kind: str, title: str = "") -> str:
    style, tag = _STYLES[kind]
    style += ";border-right:1px solid #ffffff"
    return f"<span style='{style}'{title}>{tag.format(escape(text))}</span>"


def mask_view(
    tokenizer: Tokenizer,
    input_ids: Ids | Mapping[str, Any],
    labels: Ids | None = None,
    attention_mask: Ids | None = None,
    *,
    position_ids: Ids | None = None,
    template: str | None = None,
) -> MaskView:
    """Show which tokens of a row or a batch are trained, and raise alarms.

    Problem codes: 'nothing_trained', 'prompt_trained', 'start_not_trained',
    'end_of_turn_not_trained', 'eos_not_trained', 'truncated', 'double_bos',
    'padding_trained', 'labels_differ' where a label is not its own token, 'no_template'
    where half of a text is trained that has no roles, and 'end_of_turn_not_stop' where EOS is
    not what ends an answer. What the ids cannot tell is not guessed: an exchange that an
    answer quotes in real special tokens is reported as a trained prompt, for to the model it
    is one.

    Args:
        tokenizer: the one that made the ids.
        input_ids: (tokens,) or (rows, tokens), as lists, arrays or tensors; or a whole batch
            or row (a mapping), which brings the other columns along.
        labels: the same shape, not shifted, -100 where nothing is learned.
        attention_mask: 0 marks padding; without it, runs of PAD at either end count as such.
        position_ids: a restart at 0 marks the next sample of a packed row.
        template: reason from this chat template instead of the tokenizer's.

    Raises:
        ValueError: for a missing or broken template, or shapes that differ.
        TypeError: for ids that are no integers.

    Example:
        >>> mask_view(tokenizer, encode_chat(tokenizer, messages)).problems  # doctest: +SKIP
        []
    """
    given = {"labels": labels, "attention_mask": attention_mask, "position_ids": position_ids}
    batch: Any = input_ids if hasattr(input_ids, "keys") else {"input_ids": input_ids}
    batch = {**batch, **{name: column for name, column in given.items() if column is not None}}
    columns = {k: _as_rows(batch[k], k) for k in _COLUMNS if batch.get(k) is not None}
    return _view(tokenizer, columns, template)


def _view(
    tokenizer: Tokenizer,
    columns: Mapping[str, list[list[int]]],
    template: str | None,
    stops: Sequence[str] | None = None,
    before: Sequence[Finding] = (),
) -> MaskView:
    """The view of whole columns.

    stops: where the model is known, the tokens it stops at; before: what was found already.
    """
    if "labels" not in columns:
        raise ValueError(
            "labels are missing: pass the labels your collator made, or a batch that has "
            "them. A dataset row has none before the trainer or the collator builds them."
        )
    shape = [len(row) for row in columns["input_ids"]]
    for name, rows in columns.items():
        if (lengths := [len(row) for row in rows]) != shape:
            raise ValueError(
                f"{name} has rows of {lengths} tokens but input_ids has rows of {shape}: both "
                "must come from the same collator call."
            )
    format = read_format(tokenizer, template)
    tokens, learned = [], []
    found: dict[str, dict[int, str]] = {}  # by code: the first message of each row
    for number, ids in enumerate(columns["input_ids"]):
        row = read_row(tokenizer, number, {k: rows[number] for k, rows in columns.items()})
        pieces = token_bytes(tokenizer, ids, fenced=True)
        real = [token for token in row if not token.padding]
        alarms = list(check_labels(row))
        for _, group in groupby(real, key=lambda token: token.sample):
            alarms += Sample(format, tokenizer, list(group), pieces, stops).alarms()
        for code, message in alarms:
            found.setdefault(code, {}).setdefault(number, message)
        runs = [real[start:stop] for start, stop in trained_runs(real)]
        learned.append([unfence(b"".join(pieces[t.index] for t in run)) for run in runs])
        tokens += row
    problems = list(before)
    for code, messages in found.items():
        first, *others = messages
        also = f" (as do {len(others)} more rows)" if others else ""
        problems.append(Finding(code, f"row {first} {messages[first]}{also}"))
    problems.sort(key=lambda problem: CODES.index(problem.code))
    return MaskView(tokens, problems, learned)


def _as_rows(value: Any, name: str) -> list[list[int]]:
    """Lists of integers, row by row, from a list, array or tensor of one or two axes."""
    value = value.tolist() if hasattr(value, "tolist") else list(value)
    value = [row.tolist() if hasattr(row, "tolist") else row for row in value]
    rows = value if value and isinstance(value[0], list | tuple) else [value]
    if not all(isinstance(item, int) for row in rows for item in row):
        raise TypeError(f"{name} must hold integers: token ids as a tokenizer or a collator gives")
    return [list(row) for row in rows]


def trainer_mask_view(trainer: Trainer, batches: int = 1) -> MaskView:
    """The mask view of a trainer's first batches, as its collator makes them.

    Drawing them leaves the random state, and so the training, as it was. The template is
    the trainer's, which TRL swaps for a marked one when needed. What a batch cannot show is
    read from the model (where it stops) and from the dataset: 'rows_dropped' (TRL drops rows
    without a label), 'message_lost' (a message says what its row does not),
    'control_in_text' (it spells a token of the template).

    Args:
        trainer: a trainer with a train dataset.
        batches: how many batches to draw.

    Raises:
        ValueError: if the data loader gives no batch.

    Example:
        >>> trainer_mask_view(trainer).problems  # doctest: +SKIP
        []
    """
    import torch

    whole_number("batches", batches)
    processing: Any = trainer.processing_class
    tokenizer = getattr(processing, "tokenizer", processing)
    found = list(check_dataset(trainer, tokenizer))
    rows: dict[str, list[list[int]]] = {}
    with torch.random.fork_rng(devices=[]):
        for batch in islice(trainer.get_train_dataloader(), batches):
            for name in batch.keys() & set(_COLUMNS):
                rows.setdefault(name, []).extend(_as_rows(batch[name], name))
    if not rows:
        raise ValueError("trainer's data loader gives no batch: its train_dataset is empty.")
    model: Any = trainer.model
    stops = (getattr(model, "generation_config", None) or model.config).eos_token_id
    ids = {*(stops if isinstance(stops, list | tuple) else [stops]), tokenizer.eos_token_id}
    words = tokenizer.convert_ids_to_tokens(sorted(ids - {None}))
    return _view(tokenizer, rows, getattr(trainer, "chat_template", None), words, found)
