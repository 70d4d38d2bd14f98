"""Chat templates: how a conversation becomes one row of tokens and labels (Chapter 4)."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from helpers.chat._messages import REJECTIONS, check_messages, find_wrong

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer


def chatml_template(*, system: str | None = None) -> str:
    """A ChatML template that marks what the assistant says: its words and `<|im_end|>`.

    Assistant-only loss therefore learns to answer and to stop, and a prompt rendered with
    `add_generation_prompt=True` is a prefix of the whole conversation.

    Args:
        system: text of a system turn for conversations that bring none; None adds nothing.

    Returns:
        Jinja; a turn is `<|im_start|>role`, newline, content, `<|im_end|>`, newline.

    Raises:
        TypeError: if `system` is neither a string nor None.

    Example:
        >>> print(chatml_template().splitlines()[4])
        {{- message['content'] + '<|im_end|>' }}
    """
    if system is None:
        return _read("chatml.jinja")
    if not isinstance(system, str):
        raise TypeError(f"system must be a string or None, not {system!r}")
    # repr() is a valid Jinja literal: quotes and newlines in the text are safe.
    turn = f"{{{{- '<|im_start|>system\\n' + {system!r} + '<|im_end|>\\n' }}}}"
    start = f"{{%- if messages[0]['role'] != 'system' %}}\n{turn}\n{{%- endif %}}\n"
    return start + _read("chatml.jinja")


def _read(name: str) -> str:
    return (Path(__file__).parent / name).read_text(encoding="utf-8").removesuffix("\n")


def choose_template(tokenizer: Tokenizer) -> str:
    """A chat template whose end of turn is one token of `tokenizer` (Chapters 0, 5, 6).

    A marker that is no token is spelled in scraps, and the model never stops at it.

    Args:
        tokenizer: of a chat model or of a base model.

    Returns:
        `chatml_template()` where the vocabulary has its markers (SmolLM2, Qwen 2.5), unless the
        tokenizer's own template writes another prompt (Phi-4, Qwen3.5); else the own one
        (Phi-3); else, for a base model (OPT), roles in plain words and EOS behind what the
        assistant says.

    Raises:
        ValueError: where there is neither a template nor an EOS token.

    Example:
        >>> tokenizer.chat_template = choose_template(tokenizer)  # doctest: +SKIP
    """
    vocabulary = tokenizer.get_vocab()
    chatml = {"<|im_start|>", "<|im_end|>"} <= vocabulary.keys()
    if chatml and not _own_prompt(tokenizer):
        return chatml_template()
    if tokenizer.chat_template:
        return tokenizer.get_chat_template()
    if tokenizer.eos_token is None:
        raise ValueError(
            "tokenizer has neither a chat template nor an EOS token, so no answer could end: "
            "set tokenizer.eos_token first"
        )
    return _read("plain.jinja")


def _own_prompt(tokenizer: Any) -> bool:
    """True if the tokenizer's own template asks otherwise than ChatML, a system turn aside."""
    if not tokenizer.chat_template:
        return False
    talk = [{"role": r, "content": "Zebrafink"} for r in ("user", "assistant", "user")]
    asked: dict[str, Any] = {"tokenize": False, "add_generation_prompt": True}
    try:
        own = tokenizer.apply_chat_template(talk, **asked)
    except REJECTIONS:
        return False
    plain = tokenizer.apply_chat_template(talk, chat_template=chatml_template(), **asked)
    before = own.removesuffix(plain)
    same = before != own and (not before or before.startswith("<|im_start|>system"))
    return "Zebrafink" in own and not same


def encode_chat(
    tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]], *, template: str | None = None
) -> dict[str, list[int]]:
    """A conversation as a training row: `input_ids` and `labels`, of one length.

    A text of a message that spells one of the template's own tokens becomes that token, as
    everywhere in transformers; here with a warning.

    Args:
        tokenizer: with a chat template, unless `template` is given.
        messages: each with 'role' and 'content', and what else the template can write.
        template: used instead of the tokenizer's own.

    Returns:
        The row; labels are -100 outside the template's `{% generation %}` blocks.

    Raises:
        ValueError: if the template is missing, has no markers, does not compile, rejects a
            message or leaves out what one says; it names the message.

    Example:
        >>> row = encode_chat(tokenizer, messages)  # doctest: +SKIP
    """
    from jinja2 import TemplateSyntaxError

    template = template or (tokenizer.get_chat_template() if tokenizer.chat_template else "")
    if "endgeneration" not in template:
        lacks = "has no {% generation %} markers" if template else "is missing"
        raise ValueError(
            f"the chat template {lacks}, so nothing says what the assistant says: set "
            "tokenizer.chat_template = chat.chatml_template(), or what TRL's "
            "get_training_chat_template(tokenizer) returns."
        )

    render: Any = partial(tokenizer.apply_chat_template, chat_template=template, tokenize=False)
    talk: list[Any] = list(messages)
    for i, given in enumerate(talk or [None]):
        if not isinstance(given, Mapping):
            raise ValueError(f"messages[{i}] must hold 'role' and 'content', and is {given!r}")
    try:
        row: Any = tokenizer.apply_chat_template(
            list(map(dict, talk)),
            chat_template=template,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
    except TemplateSyntaxError as error:
        raise ValueError(
            f"the template does not compile: {error.message} (line {error.lineno})"
        ) from error
    except REJECTIONS as error:
        which = find_wrong(talk, render, error) or "these messages"
        raise ValueError(
            f"the template rejects {which}: {error}. Each message needs 'role' and "
            "'content', and the roles and their order must be ones the template knows."
        ) from error
    for code, found in check_messages(tokenizer, talk, render):
        if code == "message_lost":
            raise ValueError(f"{found}.")
        warnings.warn(f"{found}.", stacklevel=2)
    said = zip(row["input_ids"], row["assistant_masks"], strict=True)
    labels = [token if kept else -100 for token, kept in said]
    return {"input_ids": list(row["input_ids"]), "labels": labels}
