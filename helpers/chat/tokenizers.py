"""Special tokens: a tokenizer and a model that agree before training starts (Chapter 4)."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

from helpers.chat._messages import REJECTIONS

if TYPE_CHECKING:
    from peft import PeftModel
    from tokenizers import AddedToken
    from transformers import PreTrainedModel
    from transformers import PreTrainedTokenizerBase as Tokenizer

    Text: TypeAlias = str | AddedToken
    Model = TypeVar("Model", bound=PreTrainedModel | PeftModel)

# Where a padding token may come from, best first, matched against names of special
# tokens the chat does not use: made for padding, kept in reserve, or left over from
# pre-training on code, where they stood between files and never inside a chat.
_SPARE_NAMES = (
    r"^(?!.*(image|video|audio|vision)).*pad",
    r"reserved|unused|extra_id|placeholder|dummy",
    r"^<empty_output>$",
    r"repo_?name|file_?(name|sep)|gh_stars|issue_|jupyter_|commit_",
)
_COMMON_PADS = ("<pad>", "[PAD]", "<|pad|>", "<|padding|>")


def prepare_tokenizer(
    tokenizer: Tokenizer,
    *,
    bos: Text | None = None,
    pad: Text | None = None,
    unk: Text | None = None,
    special_tokens: Iterable[Text] = (),
    tokens: Iterable[Text] = (),
) -> Tokenizer:
    """Make a tokenizer safe to train with, in place and return it; twice equals once.

    Tokens missing from the vocabulary are added: run `prepare_model` afterwards.

    Args:
        tokenizer: any tokenizer; its chat template, if it has one, is asked which tokens
            carry meaning in a chat.
        bos: replaces the BOS token; by default it stays, even where it is EOS too.
        pad: the padding token; by default the present one, if it is neither EOS nor in
            the template, else a spare special token, the unknown token, or a new `<|pad|>`.
        unk: replaces the unknown token; by default it stays.
        special_tokens: further tokens, which decoding may skip.
        tokens: further ordinary words.

    Raises:
        ValueError: if `pad` is the EOS token or plays a part in the template.
        TypeError: for a token that is no text, or a text where a list is wanted.

    Example:
        >>> from tokenizers import Tokenizer, models
        >>> from transformers import PreTrainedTokenizerFast
        >>> words = Tokenizer(models.WordLevel({"</s>": 0, "<pad>": 1}, unk_token="</s>"))
        >>> tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>")
        >>> prepare_tokenizer(tokenizer).pad_token
        '<pad>'
    """
    for name, several in (("special_tokens", special_tokens), ("tokens", tokens)):
        if isinstance(several, str):
            raise TypeError(f"{name} must be a list of tokens, e.g. [{several!r}]")
    for role, token in (("bos_token", bos), ("unk_token", unk)):
        if token is not None and _text(token):
            tokenizer.add_special_tokens({role: token})
    known = tokenizer.get_added_vocab()
    if extra := [token for token in special_tokens if _text(token) not in known]:
        tokenizer.add_special_tokens(
            {"extra_special_tokens": extra}, replace_extra_special_tokens=False
        )
    if words := [token for token in tokens if _text(token) not in known]:
        tokenizer.add_tokens(words)

    spoken = _spoken_by_template(tokenizer)
    if pad is None:
        if tokenizer.pad_token in {None, tokenizer.eos_token} or tokenizer.pad_token_id in spoken:
            pad = _find_pad(tokenizer, spoken)
    elif _text(pad) == tokenizer.eos_token:
        raise ValueError(
            f"pad={_text(pad)!r} is the EOS token: with padding, the end of every answer "
            "would be masked, and the model never learns to stop. Leave pad out, or name another."
        )
    elif tokenizer.get_vocab().get(_text(pad)) in spoken:
        raise ValueError(
            f"pad={_text(pad)!r} is written by the chat template, so it is part of every "
            "conversation. Leave pad out, or name a token that no chat contains."
        )
    if pad is not None:
        tokenizer.add_special_tokens({"pad_token": pad})
    return tokenizer


def _text(token: Text) -> str:
    text = getattr(token, "content", token)
    if isinstance(text, str) and text:
        return text
    raise TypeError(f"a token must be a non-empty string or an AddedToken, not {token!r}")


def _spoken_by_template(tokenizer: Any) -> set[int]:
    """Ids that the chat template itself writes: they carry meaning in a chat."""
    if not tokenizer.chat_template:
        return set()
    roles = ("system", "user", "assistant", "user", "assistant", "tool", "assistant")
    talk = [{"role": role, "content": role[0]} for role in roles]
    ids: set[int] = set()
    # Many templates refuse a role or an order; each probe may fail on its own.
    for messages in (talk[1:3], talk[1:5], talk[:3], talk[3:]):
        for prompt in (False, True):
            try:
                ids |= set(
                    tokenizer.apply_chat_template(
                        messages, add_generation_prompt=prompt, return_dict=False
                    )
                )
            except REJECTIONS:
                continue
    return ids


def _find_pad(tokenizer: Any, spoken: set[int]) -> str:
    """A token that can pad without ever meaning something, or a new name for one."""
    named = {tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token}
    spare = [
        token.content
        for index, token in sorted(tokenizer.added_tokens_decoder.items())
        if token.special and token.content not in named and index not in spoken
    ]
    vocabulary = tokenizer.get_vocab()
    spare += [t for t in _COMMON_PADS if t in vocabulary and vocabulary[t] not in spoken]
    for pattern in _SPARE_NAMES:
        for token in spare:
            if re.search(pattern, token, re.IGNORECASE):
                return token
    unk = tokenizer.unk_token
    if unk in {None, tokenizer.eos_token, tokenizer.bos_token} or vocabulary.get(unk) in spoken:
        return "<|pad|>"
    return unk


def prepare_model(model: Model, tokenizer: Tokenizer, *, multiple_of: int = 64) -> Model:
    """Make a model agree with its tokenizer, in place and return it; twice equals once.

    The embedding grows if a token has no row, and never shrinks: spare rows are free. Tied
    heads stay tied. PAD, BOS and EOS ids go into `config` and `generation_config`. Where the
    chat template ends an answer with another token than EOS, the model stops there too; where
    the configs list several stop tokens, these join the list.

    Args:
        model: a causal language model, with or without an adapter.
        tokenizer: as `prepare_tokenizer` left it.
        multiple_of: rows of a grown embedding; multiples of 64 suit the kernels.

    Raises:
        ValueError: if the tokenizer lacks EOS, or PAD is missing or equal to it.

    Example:
        >>> model = prepare_model(model, prepare_tokenizer(tokenizer))  # doctest: +SKIP
    """
    pad, eos = tokenizer.pad_token_id, tokenizer.eos_token_id
    if eos is None or pad is None or pad == eos:
        raise ValueError(
            f"tokenizer has pad_token_id={pad} and eos_token_id={eos}; training needs both, and "
            "different: set tokenizer.eos_token, then run chat.prepare_tokenizer(tokenizer) first."
        )
    needed = max(tokenizer.get_vocab().values()) + 1
    embedding: Any = model.get_input_embeddings()
    first = getattr(embedding, "new_tokens", range(len(embedding.weight), 0)).start
    if needed > len(embedding.weight):
        model.resize_token_embeddings(needed, pad_to_multiple_of=multiple_of)
        embedding = model.get_input_embeddings()
    if needed > first:  # a note for `lora.check_training`: rows that somebody has to train
        embedding.new_tokens = range(first, needed)
    # An embedding gives its padding row no gradient. Built with pad == eos, it would
    # freeze the input side of the very token that ends an answer.
    if getattr(embedding, "padding_idx", None) is not None:
        embedding.padding_idx = pad
    ends = _ends_of_turn(tokenizer)
    configs: list[Any] = [model.config.get_text_config(), getattr(model, "generation_config", None)]
    for config in filter(None, configs):
        stops = config.eos_token_id
        several = isinstance(stops, list | tuple)
        ids = list(dict.fromkeys([eos, *ends, *(stops if several else ())]))
        config.eos_token_id = ids if several or ends else eos
        config.pad_token_id = pad
        if tokenizer.bos_token_id is not None:
            config.bos_token_id = tokenizer.bos_token_id
    return model


def _ends_of_turn(tokenizer: Tokenizer) -> list[int]:
    """The token that ends the template's answers, if EOS does not."""
    from helpers.chat._format import read_format

    if not tokenizer.chat_template:
        return []
    try:
        words = read_format(tokenizer).stop_words
    except ValueError:  # no plain chat can be rendered: nothing ends an answer
        return []
    known = tokenizer.get_added_vocab()
    if not words or any(str(tokenizer.eos_token) in word for word in words):
        return []
    return [known[words[-1]]] if words[-1] in known else []
