"""Rows and texts as a GGUF file's own template and vocabulary read them (Chapter 6)."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from helpers import evaluation
from helpers.serving import server
from helpers.serving._inspection import GGUFFile

HEAD = 8  # tokens at the beginning of a plain text that nothing is asked of


class Row(NamedTuple):
    """Token ids, and where among them the answer begins."""

    ids: list[int]
    begin: int


class Reader(NamedTuple):
    """`render` writes messages as one text, `cut` makes token ids of a text."""

    render: Callable[..., str]
    cut: Callable[[str], list[int]]

    def rows(
        self, text: str | Iterable[Mapping[str, Any]], ends: set[Any], context: int
    ) -> list[Row]:
        """Each row's ids to the end of its turn; a text in pieces of `context` tokens."""
        if isinstance(text, str):
            ids = self.cut(text)
            if len(ids) <= HEAD:
                raise ValueError(
                    f"text is too short: it has {len(ids)} tokens, and the first {HEAD} only "
                    "give the model something to go by"
                )
            starts = range(0, len(ids) - HEAD, context - HEAD)
            return [Row(ids[start : start + context], HEAD) for start in starts]
        rows = []
        for number, (prompt, whole) in enumerate(_talks(text)):
            asked = self.cut(self.render(prompt, add_generation_prompt=True))
            ids = self.cut(self.render(whole))
            begin = next((n for n, t in enumerate(asked) if ids[n : n + 1] != [t]), len(asked))
            # What the template writes behind the end of the turn, no model has to say.
            last = max((n for n, t in enumerate(ids) if n >= begin and t in ends), default=len(ids))
            if not 0 < begin < len(ids):
                raise ValueError(f"text, row {number}: the template writes no answer to the prompt")
            rows.append(Row(ids[: last + 1], begin))
        return rows


@contextlib.contextmanager
def reader(found: GGUFFile, tokenizer: Any = None) -> Iterator[Reader]:
    """What reads rows as the server of this file does, or as a tokenizer did in training."""
    if tokenizer is not None:
        rendered = functools.partial(tokenizer.apply_chat_template, tokenize=False)
        yield Reader(rendered, functools.partial(tokenizer.encode, add_special_tokens=False))
        return
    template = found.metadata.get("tokenizer.chat_template")
    bos = found.metadata.get("tokenizer.ggml.bos_token_id")
    with server.LlamaServer(found.path, context=64, slots=1) as served:
        words = served.get("/props")

        def render(messages: list[dict[str, Any]], **settings: Any) -> str:
            from transformers.utils.chat_template_utils import render_jinja_template

            if template is None:
                raise ValueError(f"{found.path.name} has no chat template: pass tokenizer=")
            settings |= {name: words.get(name, "") for name in ("bos_token", "eos_token")}
            return render_jinja_template([messages], chat_template=template, **settings)[0][0]

        def cut(text: str) -> list[int]:
            ids = served.tokenize(text, add_special=True)
            return ids[ids[:2] == [bos, bos] :]  # one BOS where server and template write it

        yield Reader(render, cut)


def as_text(found: GGUFFile, text: str | Iterable[Mapping[str, Any]], tokenizer: Any) -> str:
    """All rows in one text, as training lays them out; a text as it is."""
    if isinstance(text, str):
        return text
    with reader(found, tokenizer) as read:
        return "".join(read.render(whole) for _, whole in _talks(text))


def _talks(rows: Any) -> Iterator[tuple[list[dict[str, Any]], list[dict[str, Any]]]]:
    """The messages of each row without and with its last answer; ValueError where none is."""
    if isinstance(rows, Mapping | bytes) or not isinstance(rows, Iterable):
        raise TypeError(f"text must be rows or one text, not a {type(rows).__name__}")
    number = -1
    for number, row in enumerate(rows):
        try:
            prompt, answer = evaluation._split(row)
        except ValueError as error:
            raise ValueError(f"text, row {number}: {error}") from error
        yield prompt, [*prompt, {"role": "assistant", "content": answer}]
    if number < 0:
        raise ValueError("text has no rows")
