"""Is all that the messages say in the text that a template makes of them?"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from jinja2 import TemplateError

from helpers._report import shorten

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

Messages: TypeAlias = Sequence[Mapping[str, Any]]
Render: TypeAlias = Callable[[list[Any]], str]

REJECTIONS = (TemplateError, TypeError, KeyError, AttributeError, IndexError)
# What labels a message or a part of one; no template has to write it.
_LABELS = {"role", "id", "type", "index", "tool_call_id"}
_TAG = re.compile(r"(<[^<>\s]*>)")  # templates split contents at tags such as </think>
_TWICE = re.compile(r"<think>\s*</think>\s*<think>")


def find_lost(messages: Messages, render: Render) -> str:
    """Which text of which message the template loses, in words; "" if all of it is there.

    Each text gets letters of its own and is looked for by these: so one that stands elsewhere
    too is not missed, and one that is trimmed or escaped is not taken for lost.
    """
    marks: dict[str, tuple[str, str]] = {}
    marked = [_mark(message, f"messages[{i}]", marks) for i, message in enumerate(messages)]
    text = render(list(messages))
    try:
        seen = render(marked).lower()
    except REJECTIONS:  # a template that reads contents, and cannot read these
        seen = text + "".join(mark for mark, (_, said) in marks.items() if said in text)
    for mark, (path, said) in marks.items():
        if mark not in seen:
            return f"{path} says {shorten(said, 60)!r}, which the template leaves out of its text"
    if _TWICE.search(text):
        at = next((i for i, m in enumerate(messages) if "<think>" in str(m.get("content"))), 0)
        return (
            f"messages[{at}]['content'] brings its own <think>, and the template writes an empty "
            "one before it: 'reasoning_content' is the field for thoughts"
        )
    return ""


def _mark(value: Any, path: str, marks: dict[str, tuple[str, str]]) -> Any:
    """The value, a mark in each of its texts; None and labels stay as they are."""
    if isinstance(value, Mapping):
        # A result finds its tool by order; the name of a person tells who speaks.
        labels = _LABELS | ({"name"} if value.get("role") in {"tool", "function"} else set())
        items = value.items()
        return {k: v if k in labels else _mark(v, f"{path}[{k!r}]", marks) for k, v in items}
    if isinstance(value, list | tuple):
        return [_mark(item, f"{path}[{i}]", marks) for i, item in enumerate(value)]
    if not isinstance(value, str):
        return value
    pieces = _TAG.split(value)
    for i, piece in enumerate(pieces[::2]):  # between the tags
        if word := re.search(r"\w", piece):
            mark = "xq" + "".join("bcdfghjkmn"[int(n)] for n in f"{len(marks):04}") + "qx"
            marks[mark] = path, piece.strip()
            pieces[2 * i] = piece[: word.end()] + mark + piece[word.end() :]
    return "".join(pieces)


def find_controls(tokenizer: Tokenizer, messages: Messages, text: str) -> str:
    """Which message spells a token with which the template marks its turns, in words."""
    said = [str(message.get("content") or "") for message in messages]
    for token in tokenizer.added_tokens_decoder.values():
        word = token.content
        if token.special and sum(s.count(word) for s in said) < text.count(word):
            for i, content in enumerate(said):
                if word in content:
                    return (
                        f"messages[{i}]['content'] spells {word!r}, which becomes that very "
                        "token: for the model a turn begins or ends there"
                    )
    return ""


def find_wrong(messages: Messages, render: Render, error: Exception) -> str:
    """Which message a template rejects with `error`, in words; "" if no single one."""
    for i, message in enumerate(messages):
        for key in ("role", "content"):
            if key not in message and not (key == "content" and message.get("tool_calls")):
                return f"messages[{i}] has no {key!r} but {', '.join(map(repr, message))}"
        try:
            render(list(messages[: i + 1]))
        except REJECTIONS as found:
            if str(found) == str(error):
                said = shorten(repr(message.get("content")), 40)
                return f"messages[{i}] (role {message['role']!r}, content {said})"
    return ""
