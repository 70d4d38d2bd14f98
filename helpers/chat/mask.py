"""The mask X-ray: which tokens a batch trains, and what is wrong with that (Chapter 4).

Use it as `chat.mask_view(tokenizer, input_ids, labels)`. The alarms come from the chat
template: two-turn conversations are rendered with it, and what it writes before, between
and after their contents is what must, may and must not be trained.
"""

import html
from dataclasses import dataclass
from itertools import groupby, pairwise

from helpers.chat.templates import (
    pick_template,
    read_template,
    squeeze,
    token_bytes,
    unfence,
)

IGNORED = -100


@dataclass(frozen=True)
class Problem:
    """One alarm: a stable `code` for programs and a `message` for people."""

    code: str
    message: str

    def __str__(self):
        return f"{self.code}: {self.message}"


@dataclass(frozen=True)
class Token:
    """One token of a batch: where it stands, what it says, whether it is trained."""

    row: int
    index: int
    id: int
    label: int
    text: str
    special: bool
    padding: bool
    position: int
    sample: int

    @property
    def trained(self):
        """True if the token is a label, so that the model learns to say it."""
        return self.label != IGNORED

    @property
    def kind(self):
        """'padding', 'trained' or 'ignored'."""
        return "padding" if self.padding else "trained" if self.trained else "ignored"


# ------------------------------------------------------------------ the alarms


def _examine(anatomy, tokenizer, tokens, pieces, report):
    """Raise the alarms of one sample (no padding), token by token against the template."""
    if not anatomy.spaces:
        pieces = [squeeze(piece) for piece in pieces]
    edges = [0]
    for piece in pieces:
        edges.append(edges[-1] + len(piece))
    text = b"".join(pieces)
    row = tokens[0].row
    eos, bos = tokenizer.eos_token_id, tokenizer.bos_token_id
    shared = tokenizer.pad_token_id == eos
    why = " pad_token is eos_token: whoever masked padding masked it too." if shared else ""

    if bos is not None:
        mark, own = b"\xfe" + tokenizer.bos_token.encode() + b"\xff", 1
        while anatomy.opening.startswith(mark * (own + 1)):
            own += 1
        if [token.id for token in tokens[: own + 1]] == [bos] * (own + 1):
            report(
                "double_bos",
                row,
                f"starts with one {tokenizer.bos_token!r} too many: the template wrote it, "
                "and the tokenizer added another. Tokenize with add_special_tokens=False.",
            )
    if not any(token.trained for token in tokens):
        report("nothing_trained", row, "has no label at all: it teaches nothing.")
        return

    headers = [mark for mark in (anatomy.header, anatomy.question) if mark]
    if not any(mark in text for mark in headers):
        if tokens[-1].id != eos or not tokens[-1].trained:
            lacks = "its EOS is not trained" if tokens[-1].id == eos else "no EOS at its end"
            report("eos_not_trained", row, f"is plain text, and {lacks}.{why}")
        return

    for run in _runs(tokens):
        start, stop = run[0], run[-1] + 1
        begin, finish = edges[start], edges[stop]
        said = text[begin:finish]
        token = f"token {tokens[start].index} ({tokens[start].text!r})"
        if _start_in(anatomy, text, begin, edges[start + 1]):
            question = said.find(anatomy.between) if anatomy.between else -1
            if question >= 0 and anatomy.header in said[question + len(anatomy.between) :]:
                report("prompt_trained", row, "trains a question between two answers.")
        elif start == 0 and not any(mark in said for mark in headers):
            report("truncated", row, "starts in the middle of an answer.")
        elif _inside_answer(anatomy, text, begin, finish, edges[start + 1]):
            report(
                "start_not_trained",
                row,
                f"trains an answer only from {token} on: the mask begins late.",
            )
        else:
            report(
                "prompt_trained",
                row,
                f"trains the prompt from {token} on: the model learns to write questions.",
            )
            if not _start_in(anatomy, text, begin, finish):
                continue  # no answer in it that could end badly
        _check_end(anatomy, tokenizer, tokens, run, text, edges, report, why)


def _runs(tokens):
    """Index ranges of consecutive trained tokens."""
    for trained, group in groupby(range(len(tokens)), key=lambda i: tokens[i].trained):
        if trained:
            yield list(group)


def _start_in(anatomy, text, begin, end):
    """True if the template lets an answer start at `begin`, or after it but before `end`.

    The first token may begin in the header and reach into the content: `>` + newline.
    """
    return any(
        text.endswith(before, 0, cut) and text.startswith(after, cut)
        for cut in {begin, *range(begin + 1, end)}
        for before, after in anatomy.starts
    )


def _inside_answer(anatomy, text, begin, finish, first_end):
    """True if `begin` lies behind an answer's start and before its end."""
    header = text.rfind(anatomy.header, 0, begin)
    since = text[header + len(anatomy.header) : begin]
    closed = any(end in since for end in anatomy.ends if end)
    return header >= 0 and not closed and not _start_in(anatomy, text, first_end, finish)


def _check_end(anatomy, tokenizer, tokens, run, text, edges, report, why):
    """Raise the alarms of the end of a trained run."""
    row, final = tokens[0].row, tokens[run[-1]]
    begin, tip, finish = edges[run[0]], edges[run[-1]], edges[run[-1] + 1]
    middle, last = anatomy.ends
    ends = [end for end in (middle, last) if end]
    eos = b"\xfe" + str(tokenizer.eos_token).encode() + b"\xff"
    rest = text[finish:].lstrip()
    # The last token may end the turn and reach into what follows: "><".
    for cut in range(finish, tip, -1):
        done = text[:cut].rstrip()
        if any(done.endswith(end) for end in ends):
            # Some templates close the last turn twice: `<|end|>` and then EOS.
            more = last[len(middle) :] if last.startswith(middle) else b""
            if done.endswith(middle) and eos in more and rest.startswith(eos):
                report("eos_not_trained", row, f"leaves the final EOS out of the loss.{why}")
            return
    for end in ends:
        _, closed, beyond = text[begin:finish].rpartition(end)
        if closed and beyond.strip() and anatomy.question.startswith(beyond.strip()):
            report("prompt_trained", row, "trains on past the end of an answer.")
            return
    if not rest and run[-1] + 1 == len(tokens):
        if last:
            report(
                "truncated",
                row,
                f"ends inside an answer, before its {unfence(last)!r}: raise max_length or "
                "drop the sample, or the model learns to stop in mid-sentence.",
            )
        return
    if not ends:
        return
    missing = next((end for end in ends if rest.startswith(end)), middle or last)
    report(
        "end_of_turn_not_trained",
        row,
        f"trains an answer up to token {final.index} ({final.text!r}) but not the "
        f"{unfence(missing)!r} that ends it: the model will not learn to stop.",
    )
    if eos in missing:
        report("eos_not_trained", row, f"never trains EOS {tokenizer.eos_token!r}.{why}")


# ------------------------------------------------------------------ the view

_ORDER = (
    "nothing_trained",
    "labels_differ",
    "double_bos",
    "prompt_trained",
    "start_not_trained",
    "end_of_turn_not_trained",
    "eos_not_trained",
    "truncated",
    "padding_trained",
)


class MaskView:
    """What a batch trains: `.tokens`, `.problems`, `.learned`; shows itself (Chapter 4).

    tokens: list of `Token`, row after row. problems: list of `Problem`, empty if all is
    well. learned: per row, the texts the model learns to say.
    """

    def __init__(self, tokens, problems, learned):
        self.tokens, self.problems, self.learned = tokens, problems, learned

    @property
    def rows(self):
        """The tokens as one list per row."""
        return [list(group) for _, group in groupby(self.tokens, key=lambda t: t.row)]

    def __str__(self):
        lines = []
        for row, learned in zip(self.rows, self.learned, strict=True):
            lines += [_count(row), _draw(row, _plain_run)]
            lines += [f"learned: {text!r}" for text in learned]
        lines += [f"! {problem}" for problem in self.problems] or ["no problems found"]
        return "\n".join(lines)

    __repr__ = __str__

    def _repr_html_(self):
        # GitHub may drop every style: bold underline, strike-through and the words of
        # the legend carry the meaning without color.
        parts = [
            "<p><small>legend: "
            + _styled("trained", "trained")
            + " · "
            + _styled("ignored (context only)", "ignored")
            + " · "
            + _styled("padding", "padding")
            + "</small></p>"
        ]
        for row, learned in zip(self.rows[:8], self.learned, strict=False):
            parts.append(f"<p><small>{html.escape(_count(row))}</small></p>")
            parts.append(f"<pre style='white-space:pre-wrap'>{_draw(row, _html_run)}</pre>")
            texts = " · ".join(f"<code>{html.escape(repr(text))}</code>" for text in learned)
            parts.append(f"<p><small>learned: {texts or 'nothing'}</small></p>")
        if len(self.rows) > 8:
            parts.append(f"<p><small>… and {len(self.rows) - 8} more rows</small></p>")
        if not self.problems:
            parts.append("<p>✔ <b>no problems found</b></p>")
        for problem in self.problems:
            parts.append(f"<p>⚠ <b>{problem.code}</b>: {html.escape(problem.message)}</p>")
        return "\n".join(parts)


def _count(row):
    kinds = [token.kind for token in row]
    samples = len({token.sample for token in row if not token.padding})
    packed = f" · {samples} samples packed" if samples > 1 else ""
    counts = ", ".join(f"{kinds.count(k)} {k}" for k in ("trained", "ignored", "padding"))
    return f"row {row[0].row} · {len(row)} tokens: {counts}{packed}"


def _draw(row, draw_run):
    """One row as text, run by run; long padding is counted rather than repeated."""
    out = []
    for (sample, kind), group in groupby(row, key=lambda t: (t.sample, t.kind)):
        run = list(group)
        if run[0].index and kind != "padding" and run[0].sample != row[run[0].index - 1].sample:
            out.append(f"\n─── sample {sample}, positions from {run[0].position} ───\n")
        out.append(draw_run(run, kind))
    return "".join(out)


def _visible(token):
    """Text of a token; a line break shows as ⏎ and still breaks the line."""
    return token.text.replace("\n", "⏎\n")


def _plain_run(run, kind):
    if kind == "padding":
        return f"‹{run[0].text} × {len(run)}›"
    text = "".join(_visible(token) for token in run)
    return f"⟦{text}⟧" if kind == "trained" else text


def _styled(text, kind, title=""):
    style, tag = {
        "trained": ("background:#cfe6f5;color:#00395c", "<b><u>{}</u></b>"),
        "ignored": ("color:#6b6b6b", "{}"),
        "padding": ("background:#eeeeee;color:#8c8c8c", "<s>{}</s>"),
    }[kind]
    title = f" title='{html.escape(title)}'" if title else ""
    # A white edge keeps neighbors apart: one box, one token.
    style += ";border-right:1px solid #ffffff"
    return f"<span style='{style}'{title}>{tag.format(html.escape(text))}</span>"


def _html_run(run, kind):
    if kind == "padding":
        return _styled(f"{run[0].text} × {len(run)}", kind)
    return "".join(
        _styled(_visible(token), kind, f"#{token.index} id {token.id} position {token.position}")
        for token in run
    )


def _as_rows(value, name):
    """Lists of integers, row by row, from a list, array or tensor of one or two axes."""
    if value is None:
        return None
    value = value.tolist() if hasattr(value, "tolist") else list(value)
    value = [row.tolist() if hasattr(row, "tolist") else row for row in value]
    rows = value if value and isinstance(value[0], list | tuple) else [value]
    if not all(isinstance(item, int) for row in rows for item in row):
        raise TypeError(
            f"{name} must hold integers, one row or several: token ids as a tokenizer or "
            f"a collator gives them, not {type(rows[0][0]).__name__}"
        )
    return [list(row) for row in rows]


def _pad_flags(tokenizer, ids, attention):
    """True where a token is padding: by attention mask, or by runs of PAD at the edges."""
    flags = [not seen for seen in attention] if attention else [False] * len(ids)
    if any(flags) or tokenizer.pad_token_id is None:
        return flags
    pad, kept = tokenizer.pad_token_id, 0
    if pad == tokenizer.eos_token_id:
        kept = 1  # the first of a run at the end is the end itself
    tail = len(ids)
    while tail and ids[tail - 1] == pad:
        tail -= 1
    head = 0
    while head < tail and ids[head] == pad:
        head += 1
    if pad == tokenizer.bos_token_id:
        head = 0
    return [i < head or i >= tail + kept for i in range(len(ids))]


def mask_view(
    tokenizer,
    input_ids,
    labels=None,
    attention_mask=None,
    *,
    position_ids=None,
    template=None,
):
    """Show which tokens of a row or batch are trained, and raise alarms (Chapter 4).

    input_ids: (tokens,) or (rows, tokens), as lists, arrays or tensors; or a whole batch
    or dataset row (a mapping), which brings the other arguments along. labels: same
    shape, -100 where nothing is learned, not shifted. attention_mask: 0 marks padding;
    without it, runs of PAD at either end are taken for padding. position_ids: a restart
    at 0 marks the next sample of a packed row. template: reason from this chat template
    instead of the tokenizer's.
    Problem codes: 'nothing_trained', 'prompt_trained', 'start_not_trained',
    'end_of_turn_not_trained', 'eos_not_trained', 'truncated', 'double_bos',
    'padding_trained', and 'labels_differ' where a label is not its own token.
    What the ids cannot tell is not guessed: a whole exchange that an answer quotes in
    real special tokens is reported as a trained prompt, for to the model it is one.
    Raises ValueError for a missing or broken template and for shapes that differ.
    """
    if hasattr(input_ids, "keys"):
        batch = input_ids
        input_ids = batch["input_ids"]
        labels = batch.get("labels") if labels is None else labels
        if attention_mask is None:
            attention_mask = batch.get("attention_mask")
        if position_ids is None:
            position_ids = batch.get("position_ids")
    if labels is None:
        raise ValueError(
            "labels are missing: pass the labels your collator made, or a batch that has "
            "them. A dataset row has none before the trainer or the collator builds them."
        )
    given = {
        "input_ids": _as_rows(input_ids, "input_ids"),
        "labels": _as_rows(labels, "labels"),
        "attention_mask": _as_rows(attention_mask, "attention_mask"),
        "position_ids": _as_rows(position_ids, "position_ids"),
    }
    shape = [len(row) for row in given["input_ids"]]
    for name, rows in given.items():
        if rows is not None and [len(row) for row in rows] != shape:
            raise ValueError(
                f"{name} has rows of {[len(row) for row in rows]} tokens but input_ids has "
                f"rows of {shape}: both must come from the same collator call."
            )
    anatomy = read_template(tokenizer, pick_template(tokenizer, template))
    found, tokens, learned = {}, [], []

    def report(code, row, message):
        found.setdefault(code, {}).setdefault(row, message)

    for number, ids in enumerate(given["input_ids"]):
        extras = [given[name] for name in ("labels", "attention_mask", "position_ids")]
        wanted, seen, places = (rows[number] if rows else None for rows in extras)
        row = _tokens_of_row(tokenizer, number, ids, wanted, seen, places)
        tokens += row
        _examine_labels(row, report)
        pieces = token_bytes(tokenizer, ids, fenced=True)
        real = [token for token in row if not token.padding]
        for _, group in groupby(real, key=lambda token: token.sample):
            sample = list(group)
            chunk = [pieces[token.index] for token in sample]
            _examine(anatomy, tokenizer, sample, chunk, report)
        learned.append(
            [unfence(b"".join(pieces[real[i].index] for i in run)) for run in _runs(real)]
        )
    problems = []
    for code in sorted(found, key=_ORDER.index):
        first, *others = found[code]
        also = f" (as do {len(others)} more rows)" if others else ""
        problems.append(Problem(code, f"row {first} {found[code][first]}{also}"))
    return MaskView(tokens, problems, learned)


def _tokens_of_row(tokenizer, number, ids, labels, attention, places):
    padding = _pad_flags(tokenizer, ids, attention)
    special = set(tokenizer.all_special_ids) | {
        index for index, token in tokenizer.added_tokens_decoder.items() if token.special
    }
    pieces = token_bytes(tokenizer, ids)
    row, sample, position, begun = [], 0, 0, False
    for index, token in enumerate(ids):
        position = places[index] if places else position
        if not padding[index]:
            sample += bool(places) and position == 0 and begun
            begun = True
        row.append(
            Token(
                row=number,
                index=index,
                id=token,
                label=labels[index],
                text=pieces[index].decode(errors="backslashreplace"),
                special=token in special,
                padding=padding[index],
                position=position,
                sample=sample,
            )
        )
        position += not padding[index]
    return row


def _examine_labels(row, report):
    """The alarms that need no template."""
    number = row[0].row if row else 0
    if trained := [token for token in row if token.padding and token.trained]:
        report(
            "padding_trained",
            number,
            f"trains {len(trained)} padding tokens: their labels must be -100.",
        )
    wrong = [token for token in row if token.trained and token.label != token.id]
    if wrong:
        following = {token.index: after.id for token, after in pairwise(row)}
        ahead = sum(following.get(token.index) == token.label for token in wrong)
        cause = (
            "they are shifted by one. The model shifts labels itself: labels[i] is input_ids[i]"
            if ahead > len(wrong) / 2
            else "labels[i] must be input_ids[i] or -100"
        )
        report(
            "labels_differ",
            number,
            f"has {len(wrong)} labels that are not their own token: {cause}.",
        )


def _of_trainer(trainer, *, batches=1):
    """The X-ray of a trainer's first batches, as its collator makes them (Chapter 4).

    Drawing them leaves the random state as it was, so training is not changed. Reasons
    from the template the trainer uses, which TRL swaps for a marked one when needed.
    """
    from itertools import islice

    import torch

    tokenizer = getattr(trainer.processing_class, "tokenizer", trainer.processing_class)
    names = ("input_ids", "labels", "attention_mask", "position_ids")
    rows = {name: [] for name in names}
    with torch.random.fork_rng(devices=[]):
        for batch in islice(iter(trainer.get_train_dataloader()), batches):
            for name in names:
                rows[name] += _as_rows(batch.get(name), name) or []
    if not rows["input_ids"]:
        raise ValueError(
            "trainer's data loader gives no batch: its train_dataset is empty, perhaps "
            "because every sample was cut before its answer began (raise max_length)."
        )
    return mask_view(
        tokenizer,
        {name: value for name, value in rows.items() if value},
        template=getattr(trainer, "chat_template", None),
    )


mask_view.of_trainer = _of_trainer
