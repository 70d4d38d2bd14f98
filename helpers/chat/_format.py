"""How a chat template writes a conversation, learned by rendering one with it.

Nothing here knows a template by name; the mask view's alarms reason from the `ChatFormat`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Any, TypeAlias

from helpers.chat._messages import REJECTIONS
from helpers.chat._tokens import shared_start, squeeze, token_bytes, unfence

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

Render: TypeAlias = Callable[..., tuple[str, list[tuple[int, int]]]]  # text and marked spans

# Two questions and two answers: words that no template contains.
_NAMES = ("Zebrafink", "Wolfsmilch", "Quittenbaum", "Kranichfeder")
_ROLES = ("user", "assistant") * 2
_TOOL = "dompfaff"


@dataclass(frozen=True)
class ChatFormat:
    """What a template writes around contents, as bytes in which specials are fenced."""

    starts: frozenset[tuple[bytes, bytes]]  # (before, after): where training may start
    header: bytes  # opens an answer
    question: bytes  # opens a question
    between: bytes  # all that stands between an answer and the next question
    turn_end: bytes  # ends an answer in mid-conversation
    last_end: bytes  # ends the last answer
    opening: bytes  # the beginning of every conversation
    tool: bytes  # all that stands between an answer and a tool's result
    call_end: bytes  # ends an answer that calls a tool
    spaces: bool  # False: the tokenizer drops spaces, so they are not compared

    @property
    def stop_words(self) -> list[str]:
        """What ends the last answer, token by token; several where a template ends twice."""
        end = self.last_end or self.turn_end
        words = [word.decode() for word in re.findall(rb"\xfe(.*?)\xff", end, re.DOTALL)]
        return words or [unfence(end)] * bool(end)


def read_format(tokenizer: Tokenizer, template: str | None = None) -> ChatFormat:
    """Learn the format of a template (None: the tokenizer's) from a two-turn conversation."""
    render = _renderer(tokenizer, _pick(tokenizer, template))
    full, marked, alone, prompt = _probe(render)
    at = [full.index(name) for name in _NAMES]
    end = [start + len(name) for start, name in zip(at, _NAMES, strict=True)]
    between, tail = full[end[1] : at[2]], full[end[3] :].strip()

    said: list[tuple[int, int]] = []  # adjacent generation blocks are one
    for start, stop in marked:
        if said and said[-1][1] == start:
            start = said.pop()[0]
        said.append((start, stop))
    blocks = [next((b for b in said if b[0] <= at[i] < b[1]), (at[i], end[i])) for i in (1, 3)]

    # How a turn ends. The markers say it; without them (or with markers that forget it)
    # the structure does: what closes the last answer, or what is left of the text
    # between two turns without the opening of the next, or what closes a question.
    closing = [full[end[i] : block[1]].strip() for i, block in zip((1, 3), blocks, strict=True)]
    asked = alone[end[0] :].strip() if full.startswith(alone) else ""
    opening = shared_start(full[: at[0]][::-1], between[::-1])[::-1]
    guesses = (closing[0], tail, between.removesuffix(opening).strip(), asked)
    turn_end = next((g for g in guesses if g and between.lstrip().startswith(g)), "")

    # How an answer opens, in both turns: training may start at the block's start, at
    # the end of the generation prompt, or right at the content.
    first = end[0]
    if full.startswith(alone):
        first = len(alone)
    elif turn_end and (closed := re.match(rf"\s*{re.escape(turn_end)}\s*", full[first:])):
        first += closed.end()
    if not full[first : at[1]].strip():  # "[/INST]" both closes a question and opens an answer
        first = end[0]
    prompted = min(len(shared_start(prompt, full)), at[1])
    lead = (prompted if prompted > first else at[1]) - first
    starts = set()
    for shift, content, block in ((0, at[1], blocks[0]), (end[2] - end[0], at[3], blocks[1])):
        begun = first + shift
        for point in {begun + lead, content, block[0]}:
            before = full[begun:point]
            after = "" if before.strip() else full[point : begun + lead]
            if (before + after).strip():
                starts.add((before, after))

    call_end, tool, resumed = _probe_tools(render, turn_end)
    headers = [before.strip() for before, _ in starts if before.strip()]
    if resumed and not resumed.endswith((turn_end, *headers)):
        starts.add((resumed, ""))  # no header behind a tool's result (DeepSeek)

    def tidy(text: str) -> bytes:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        data = b"".join(token_bytes(tokenizer, ids, fenced=True))
        return data if spaces else squeeze(data)

    ids = tokenizer(full, add_special_tokens=False)["input_ids"]
    spaces = b"".join(token_bytes(tokenizer, ids)) == full.encode()
    return ChatFormat(
        starts=frozenset((tidy(before), tidy(after)) for before, after in starts),
        header=tidy(full[first : first + lead].strip()),
        question=tidy(between.lstrip().removeprefix(turn_end).strip()),
        between=tidy(between.strip()),
        turn_end=tidy(turn_end),
        last_end=tidy(closing[1] or tail),
        opening=tidy(full[: at[0]].strip()),
        tool=tidy(tool),
        call_end=tidy(call_end),
        spaces=spaces,
    )


def _pick(tokenizer: Tokenizer, template: str | None) -> str:
    """The template to reason from: the given one, or TRL's marked twin of a known one."""
    if template is None and not tokenizer.chat_template:
        raise ValueError(
            "tokenizer has no chat template, so nothing says where an answer starts or ends: "
            "set tokenizer.chat_template = chat.chatml_template(), or your data's own."
        )
    template = template or tokenizer.get_chat_template()
    if "endgeneration" not in template:
        from trl.chat_template_utils import get_training_chat_template

        try:
            return get_training_chat_template(tokenizer) or template
        except ValueError:  # a template TRL does not know: read its structure instead
            pass
    return template


def _renderer(tokenizer: Tokenizer, template: str) -> Render:
    from transformers.utils.chat_template_utils import render_jinja_template

    specials: dict[str, Any] = dict(tokenizer.special_tokens_map)

    def render(messages, prompt=False):
        rendered: Any = render_jinja_template(
            conversations=[messages],
            chat_template=template,
            return_assistant_tokens_mask="endgeneration" in template,
            add_generation_prompt=prompt,
            **specials,
        )
        (text,), spans = rendered
        return text, spans[0] if spans else []

    return render


def _probe(render: Render) -> tuple[str, list[tuple[int, int]], str, str]:
    """Two turns and their marked spans, and the first question without and with a prompt."""
    from jinja2 import TemplateSyntaxError

    failure = ""
    for parts in (False, True):  # vision templates take content as a list of parts
        contents = [[{"type": "text", "text": name}] if parts else name for name in _NAMES]
        chat = [{"role": r, "content": c} for r, c in zip(_ROLES, contents, strict=True)]
        try:
            full, spans = render(chat)
            alone, _ = render(chat[:1])
            prompt, _ = render(chat[:1], prompt=True)
        except TemplateSyntaxError as error:
            failure = f"does not compile: {error.message} (line {error.lineno})"
        except REJECTIONS as error:
            failure = f"fails with {type(error).__name__}: {error}"
        else:
            if all(name in full for name in _NAMES):
                return full, spans, alone, prompt
            failure = "leaves contents out of its text"
    raise ValueError(
        "tokenizer.chat_template must render plain chats of the roles 'user' and 'assistant' "
        f"but {failure}. Use one that does, for example chat.chatml_template()."
    )


def _probe_tools(render: Render, turn_end: str) -> tuple[str, str, str]:
    """Around a tool's result: what ends the call; this and what opens the result; what closes it.

    Empty where the template knows no tools. A call is tried first: it may end otherwise
    than an answer does, and only where calls are not written an answer stands in for it.
    """
    question, said, result, answer = _NAMES
    call = {"type": "function", "function": {"name": _TOOL, "arguments": {"a": said}}}
    asks: tuple[dict[str, Any], ...] = ({"content": "", "tool_calls": [call]}, {"content": said})
    for parts, ask in product((False, True), asks):
        talk = [{"role": "user", "content": question}, {"role": "assistant", **ask}]
        talk += [{"role": "tool", "name": _TOOL, "content": result}]
        talk += [{"role": "assistant", "content": answer}]
        for message in talk if parts else ():
            message["content"] = [{"type": "text", "text": message["content"]}]
        try:
            text, spans = render(talk)
        except REJECTIONS:
            continue
        at = [text.find(name) for name in (said, result, answer)]
        if not -1 < at[0] < at[1] < at[2]:
            continue
        starts = [i + len(name) for i, name in zip(at, (said, result), strict=False)]
        asked, answered = (next((b for b in spans if b[0] <= i < b[1]), None) for i in at[::2])
        behind = text[starts[0] : min(asked[1] if asked else at[1], at[1])]
        marks = re.search(r"(<[^<>\s]+>)+\s*$", behind) if asked else None
        end = turn_end if turn_end and turn_end in behind else marks[0].strip() if marks else ""
        if end:
            begin = text.index(end, starts[0])
            opening = text[begin : at[1]].split(_TOOL)[0].strip()
            closing = text[starts[1] : answered[0]] if answered else ""
            return end, opening if opening != end else "", closing.strip()
    return "", "", ""
