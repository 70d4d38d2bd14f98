"""Chat templates: how a conversation becomes one row of tokens and labels (Chapter 4)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
        `chatml_template()` where the vocabulary has its markers (SmolLM2, Qwen); else the
        tokenizer's own template (Phi-3); else, for a base model (OPT), roles in plain words
        and EOS behind what the assistant says.

    Raises:
        ValueError: where there is neither a template nor an EOS token.

    Example:
        >>> tokenizer.chat_template = choose_template(tokenizer)  # doctest: +SKIP
    """
    vocabulary = tokenizer.get_vocab()
    if "<|im_start|>" in vocabulary and "<|im_end|>" in vocabulary:
        return chatml_template()
    if tokenizer.chat_template:
        return tokenizer.chat_template
    if tokenizer.eos_token is None:
        raise ValueError(
            "tokenizer has neither a chat template nor an EOS token, so no answer could end: "
            "set tokenizer.eos_token first"
        )
    return _read("plain.jinja")


def encode_chat(
    tokenizer: Tokenizer, messages: Sequence[Mapping[str, str]], *, template: str | None = None
) -> dict[str, list[int]]:
    """A conversation as a training row: `input_ids` and `labels`, of one length.

    Args:
        tokenizer: with a chat template, unless `template` is given.
        messages: each with 'role' and 'content'.
        template: used instead of the tokenizer's own.

    Returns:
        The row; labels are -100 outside the template's `{% generation %}` blocks.

    Raises:
        ValueError: if the template is missing, has no markers, does not compile or rejects
            the messages.

    Example:
        >>> row = encode_chat(tokenizer, messages)  # doctest: +SKIP
    """
    from jinja2 import TemplateError, TemplateSyntaxError

    template = template or (tokenizer.get_chat_template() if tokenizer.chat_template else "")
    if "endgeneration" not in template:
        lacks = "has no {% generation %} markers" if template else "is missing"
        raise ValueError(
            f"the chat template {lacks}, so nothing says what the assistant says: set "
            "tokenizer.chat_template = chat.chatml_template(), or what TRL's "
            "get_training_chat_template(tokenizer) returns."
        )
    try:
        row: Any = tokenizer.apply_chat_template(
            list(map(dict, messages)),
            chat_template=template,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
    except TemplateSyntaxError as error:
        message = f"the template does not compile: {error.message} (line {error.lineno})"
        raise ValueError(message) from error
    except (TemplateError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f"the template rejects these messages: {error}. Each message needs 'role' and "
            "'content', and the roles and their order must be ones the template knows."
        ) from error
    said = zip(row["input_ids"], row["assistant_masks"], strict=True)
    labels = [token if kept else -100 for token, kept in said]
    return {"input_ids": list(row["input_ids"]), "labels": labels}
