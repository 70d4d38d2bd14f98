"""Is all that the messages say in the text that a template makes of them?"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from jinja2 import TemplateError

from helpers._report import shorten

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

Messages: TypeAlias = Sequence[Mapping[str, Any]]
Render: TypeAlias = Callable[[Messages], str]
Marks: TypeAlias = dict[str, tuple[str, str]]  # mark: whose text it marks, and what that says

REJECTIONS = (TemplateError, TypeError, KeyError, AttributeError, IndexError)
# What labels a message or a part of one; no template has to write it.
_LABELS = {"role", "id", "type", "index", "tool_call_id"}
_TAG = re.compile(r"(<[^<>\s]*>)")  # templates split contents at tags such as </think>
_TWICE = re.compile(r"<think>\s*</think>\s*<think>")


def check_messages(
    tokenizer: Tokenizer, messages: Messages, render: Render
) -> Iterator[tuple[str, str]]:
    """(code, sentence) for a text that the template leaves out, and for one it misreads.

    Each text gets letters of its own and is looked for by these: so one that stands elsewhere
    too is not missed, and one that is trimmed or escaped is not taken for lost.
    """
    text, marks = render(messages), Marks()
    marked = [_mark(message, f"messages[{i}]", marks) for i, message in enumerate(messages)]
    try:
        seen = render(marked).lower()
    except REJECTIONS:  # a template that reads contents, and cannot read these
        seen = "".join(mark for mark, (_, said) in marks.items() if said in text)
    contents = [str(message.get("content") or "") for message in messages]
    for at, said in (found for mark, found in marks.items() if mark not in seen):
        yield (
            "message_lost",
            f"{at} says {shorten(said, 60)!r}, which the template leaves out: the model would "
            "never see it. Use a template that writes it, put it into 'content', or take it out",
        )
    for i, (message, content) in enumerate(zip(messages, contents, strict=True)):
        if "<think>" in content and _TWICE.search(text):
            yield (
                "message_lost",
                f"messages[{i}]['content'] brings its own <think>, and the template writes an "
                "empty one before it. Give the thoughts as 'reasoning_content'",
            )
        for call in message.get("tool_calls") or ():
            given = call.get("function", call).get("arguments")
            if isinstance(given, str) and json.dumps(given, ensure_ascii=False) in text:
                yield (
                    "message_lost",
                    f"messages[{i}]['tool_calls'] has its arguments as a string, which the "
                    "template quotes once more. Give a mapping: json.loads(arguments)",
                )
    for token in filter(lambda token: token.special, tokenizer.added_tokens_decoder.values()):
        word = token.content
        if word == tokenizer.eos_token or text.count(word) > sum(c.count(word) for c in contents):
            for i in (i for i, content in enumerate(contents) if word in content):
                yield (
                    "control_in_text",
                    f"messages[{i}]['content'] spells {word!r}, which becomes that very token: for "
                    "the model a turn begins or ends there. Clean or respell such texts",
                )


def _mark(value: Any, path: str, marks: Marks) -> Any:
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


def find_wrong(messages: Messages, render: Render, error: Exception) -> str:
    """Which message a template rejects with `error`, in words; "" if no single one."""
    for i, message in enumerate(messages):
        for key in ("role", "content"):
            if key not in message and not (key == "content" and message.get("tool_calls")):
                return f"messages[{i}] has no {key!r} but {', '.join(map(repr, message))}"
        try:
            render(messages[: i + 1])
        except REJECTIONS as found:
            if str(found) == str(error):
                said = shorten(repr(message.get("content")), 40)
                return f"messages[{i}] (role {message['role']!r}, content {said})"
    return ""
