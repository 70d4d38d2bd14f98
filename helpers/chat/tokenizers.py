"""Special tokens, chat templates and the model behind them (Chapter 4).

`prepare_tokenizer` and `prepare_model` make a tokenizer and a model agree before
training; `chatml_template` is a template that marks what the assistant says, and
`choose_template` finds one that fits a tokenizer; `mask_view` (in `helpers.xray`) shows
what a batch really trains.
"""

import re

# Where a padding token may come from, best first, matched against names of special
# tokens the chat does not use: made for padding, kept in reserve, or left over from
# pre-training on code, where they stood between files and never inside a chat.
_SPARE_NAMES = (
    r"^(?!.*(image|video|audio|vision)).*pad",
    r"reserved|unused|extra_id|placeholder|dummy",
    r"^<empty_output>$",
    r"repo_?name|file_?(name|sep)|gh_stars|issue_|jupyter_|commit_",
)
_NEW_PAD = "<|pad|>"


def _text(token):
    """The text of one marker token, as `str` or `AddedToken`."""
    if isinstance(token, str) and token:
        return token
    if hasattr(token, "content"):
        return token.content
    raise TypeError(
        f"a token must be a non-empty string or an AddedToken, not {token!r}; "
        "for several tokens pass a list"
    )


def _spoken_by_template(tokenizer):
    """Ids that the chat template itself writes: they carry meaning in a chat."""
    if not tokenizer.chat_template:
        return set()
    from jinja2 import TemplateError

    user, reply = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
    system, tool = {"role": "system", "content": "c"}, {"role": "tool", "content": "d"}
    chats = ([user, reply], [user, reply, user, reply], [system, user, reply])
    ids = set()
    # Many templates refuse a role or an order; each probe may fail on its own.
    for messages in (*chats, [user, reply, tool, reply]):
        for prompt in (False, True):
            try:
                ids |= set(
                    tokenizer.apply_chat_template(
                        messages, add_generation_prompt=prompt, return_dict=False
                    )
                )
            except (TemplateError, TypeError, KeyError):
                continue
    return ids


def _find_pad(tokenizer):
    """A token that can pad without ever meaning something, or a new name for one."""
    named = {tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token}
    spoken = _spoken_by_template(tokenizer)
    spare = [
        token.content
        for index, token in sorted(tokenizer.added_tokens_decoder.items())
        if token.special and token.content not in named and index not in spoken
    ]
    vocabulary = tokenizer.get_vocab()
    common = ("<pad>", "[PAD]", "<|pad|>", "<|padding|>")
    spare += [t for t in common if vocabulary.get(t, -1) not in {-1, *spoken}]
    for pattern in _SPARE_NAMES:
        for token in spare:
            if re.search(pattern, token, re.IGNORECASE):
                return token
    unk = tokenizer.unk_token
    taken = {None, tokenizer.eos_token, tokenizer.bos_token}
    if unk not in taken and vocabulary.get(unk) not in spoken:
        return unk
    return _NEW_PAD


def prepare_tokenizer(tokenizer, *, bos=None, pad=None, unk=None, special_tokens=(), tokens=()):
    """Make a tokenizer safe to train with, in place, and return it (Chapter 4).

    pad: the padding token; by default the present one, if it is neither EOS nor a
    token the chat template writes, else a spare special token, else the unknown token,
    else a new `<|pad|>`. bos, unk: replace these tokens (what they are is otherwise
    left alone, even where bos == eos or unk == eos: the model knows them so).
    special_tokens: extra tokens that decoding may skip. tokens: extra ordinary words.
    Tokens missing from the vocabulary are added; pass the model through
    `prepare_model` afterwards. Doing it twice equals doing it once.
    Raises ValueError if `pad` is the EOS token, or plays a part in the template.
    """
    for name, several in (("special_tokens", special_tokens), ("tokens", tokens)):
        if isinstance(several, str):
            raise TypeError(f"{name} must be a list of tokens, e.g. [{several!r}]")
    named = {"bos_token": bos, "unk_token": unk}
    named = {role: token for role, token in named.items() if token is not None}
    for token in named.values():
        _text(token)
    if named:
        tokenizer.add_special_tokens(named)
    known = tokenizer.get_added_vocab()
    if extra := [token for token in special_tokens if _text(token) not in known]:
        tokenizer.add_special_tokens(
            {"extra_special_tokens": extra}, replace_extra_special_tokens=False
        )
    if words := [token for token in tokens if _text(token) not in known]:
        tokenizer.add_tokens(words)

    eos = tokenizer.eos_token
    if pad is not None:
        index = tokenizer.get_vocab().get(_text(pad))
        if _text(pad) == eos:
            raise ValueError(
                f"pad={_text(pad)!r} is the EOS token: whoever masks padding then masks "
                "the end of every answer and the model never learns to stop. Leave pad "
                "out to have a spare token chosen, or name another one."
            )
        if index is not None and index in _spoken_by_template(tokenizer):
            raise ValueError(
                f"pad={_text(pad)!r} is written by the chat template, so it is part of "
                "every conversation. Leave pad out, or name a token no chat contains."
            )
        tokenizer.add_special_tokens({"pad_token": pad})
    elif tokenizer.pad_token in {
        None,
        eos,
    } or tokenizer.pad_token_id in _spoken_by_template(tokenizer):
        tokenizer.add_special_tokens({"pad_token": _find_pad(tokenizer)})
    return tokenizer


def _stop_ids(current, eos):
    """EOS ids for a config: a list of several stop tokens keeps them, one is replaced."""
    if not isinstance(current, list | tuple):
        return eos
    return [eos, *(index for index in current if index != eos)]


def prepare_model(model, tokenizer, *, multiple_of=64):
    """Make a model agree with its tokenizer, in place, and return it (Chapter 4).

    The embedding grows to a multiple of `multiple_of` rows if a token has no row, and
    is never shrunk: spare rows are free, and other tokens may use them. Tied heads stay
    tied. PAD, BOS and EOS ids go into `config` and `generation_config`; where these
    list several stop tokens, EOS joins the list. Doing it twice equals doing it once.
    Raises ValueError if the tokenizer lacks EOS, or PAD is missing or equal to it.
    """
    pad, eos = tokenizer.pad_token_id, tokenizer.eos_token_id
    if eos is None or pad is None or pad == eos:
        raise ValueError(
            f"tokenizer has pad_token_id={pad} and eos_token_id={eos}; training needs "
            "both, and different: run chat.prepare_tokenizer(tokenizer) first (and set "
            "tokenizer.eos_token if there is none)."
        )
    needed = max(tokenizer.get_vocab().values()) + 1
    embedding = model.get_input_embeddings()
    if needed > embedding.weight.shape[0]:
        model.resize_token_embeddings(needed, pad_to_multiple_of=multiple_of)
        embedding = model.get_input_embeddings()
    # An embedding gives its padding row no gradient. Built with pad == eos, it would
    # freeze the input side of the very token that ends an answer.
    if getattr(embedding, "padding_idx", None) is not None:
        embedding.padding_idx = pad
    generation = getattr(model, "generation_config", None)
    for config in (model.config.get_text_config(), generation):
        if config is None:
            continue
        config.pad_token_id = pad
        config.eos_token_id = _stop_ids(config.eos_token_id, eos)
        if tokenizer.bos_token_id is not None:
            config.bos_token_id = tokenizer.bos_token_id
    return model


def chatml_template(*, system=None):
    """A ChatML chat template that marks what the assistant says (Chapter 4).

    Each turn reads `<|im_start|>role`, newline, content, `<|im_end|>`, newline. The
    content and the `<|im_end|>` of assistant turns lie between `{% generation %}` and
    `{% endgeneration %}`, so assistant-only loss learns to answer and to stop. A prompt
    rendered with `add_generation_prompt=True` is a prefix of the whole conversation.
    system: text of a system turn for conversations that bring none; None adds nothing.
    """
    if system is not None and not isinstance(system, str):
        raise TypeError(f"system must be a string or None, not {system!r}")
    lines = []
    if system is not None:
        # repr() is a valid Jinja literal: quotes and newlines in the text are safe.
        lines += [
            "{%- if messages[0]['role'] != 'system' %}",
            f"{{{{- '<|im_start|>system\\n' + {system!r} + '<|im_end|>\\n' }}}}",
            "{%- endif %}",
        ]
    lines += [
        "{%- for message in messages %}",
        "{{- '<|im_start|>' + message['role'] + '\\n' }}",
        "{%- if message['role'] == 'assistant' %}",
        "{%- generation %}",
        "{{- message['content'] + '<|im_end|>' }}",
        "{%- endgeneration %}",
        "{%- else %}",
        "{{- message['content'] + '<|im_end|>' }}",
        "{%- endif %}",
        "{{- '\\n' }}",
        "{%- endfor %}",
        "{%- if add_generation_prompt %}",
        "{{- '<|im_start|>assistant\\n' }}",
        "{%- endif %}",
    ]
    return "\n".join(lines)


# For a base model without a template: words it can read, and the one marker it knows.
_PLAIN_TEMPLATE = "\n".join(
    [
        "{{- bos_token | default('', true) }}",
        "{%- for message in messages %}",
        "{{- '### ' + (message['role'] | capitalize) + '\\n' }}",
        "{%- if message['role'] == 'assistant' %}",
        "{%- generation %}",
        "{{- message['content'] + eos_token }}",
        "{%- endgeneration %}",
        "{%- else %}",
        "{{- message['content'] }}",
        "{%- endif %}",
        "{{- '\\n' }}",
        "{%- endfor %}",
        "{%- if add_generation_prompt %}",
        "{{- '### Assistant\\n' }}",
        "{%- endif %}",
    ]
)


def choose_template(tokenizer):
    """A chat template whose end of turn is one token of `tokenizer` (Chapters 0, 5, 6).

    That is `chatml_template()` where the vocabulary has ChatML's markers (SmolLM2, Qwen's
    chat models); else the template the tokenizer came with (Phi-3); else, for a base model
    without one (OPT), the roles in plain words and EOS behind what the assistant says. A
    marker that is no token is spelled in scraps, and the model never stops at it.
    Raises ValueError where there is neither a template nor an EOS token.
    """
    vocabulary = tokenizer.get_vocab()
    if "<|im_start|>" in vocabulary and "<|im_end|>" in vocabulary:
        return chatml_template()
    if tokenizer.chat_template:
        return tokenizer.chat_template
    if tokenizer.eos_token is None:
        raise ValueError(
            "tokenizer has neither a chat template nor an EOS token, so no answer could "
            "end; set tokenizer.eos_token first"
        )
    return _PLAIN_TEMPLATE


def encode_chat(tokenizer, messages, *, template=None):
    """A conversation as a training row: `input_ids` and `labels` (Chapter 4).

    messages: dictionaries with 'role' and 'content'. template: instead of the tokenizer's.
    Labels are -100 outside `{% generation %}` blocks.
    Raises ValueError if there is no template, if it does not compile, if it rejects the
    messages, or if it has no markers.
    """
    from jinja2 import TemplateError, TemplateSyntaxError

    template = template or (tokenizer.chat_template and tokenizer.get_chat_template())
    if not template:
        raise ValueError(
            "tokenizer has no chat template: set tokenizer.chat_template = "
            "chat.chatml_template(), or pass template=..."
        )
    if "endgeneration" not in template:
        raise ValueError(
            "the template has no {% generation %} markers, so it does not say what the "
            "assistant says: use chat.chatml_template(), or the twin that "
            "trl.chat_template_utils.get_training_chat_template knows for many models."
        )
    try:
        row = tokenizer.apply_chat_template(
            messages,
            chat_template=template,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
    except TemplateSyntaxError as error:
        raise ValueError(
            f"the template does not compile: {error.message} (line {error.lineno})"
        ) from error
    except (TemplateError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f"the template rejects these messages: {error}. Each message needs 'role' and "
            "'content', and the roles and their order must be ones the template knows."
        ) from error
    said = zip(row["input_ids"], row["assistant_masks"], strict=True)
    return {
        "input_ids": list(row["input_ids"]),
        "labels": [token if kept else -100 for token, kept in said],
    }
