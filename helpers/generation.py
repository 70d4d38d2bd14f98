"""One `generate` for one prompt or many (Chapters 0 and 6)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

from helpers._checks import whole_number
from helpers.models import dequantized_once

if TYPE_CHECKING:
    from transformers import BatchEncoding, GenerationConfig, PreTrainedTokenizerBase

Messages = list[dict[str, Any]]


def chat_prompt(tokenizer: PreTrainedTokenizerBase, message: str | Messages) -> str:
    """The text a chat model continues: the conversation, then the start of its own turn.

    Args:
        tokenizer: with a chat template (Chapter 4 makes one); ValueError without.
        message: what the user says, or a list of messages ('role' and 'content').

    Example:
        >>> chat_prompt(tokenizer, "Hi").split()[-1]  # doctest: +SKIP
        '<|im_start|>assistant'
    """
    if isinstance(message, str):
        message = [{"role": "user", "content": message}]
    if not tokenizer.chat_template:
        raise ValueError(
            "tokenizer has no chat template; set one, for example "
            "tokenizer.chat_template = chat.chatml_template()"
        )
    return str(tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True))


def generate(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: str | Messages | Sequence[str | Messages],
    *,
    max_new_tokens: int = 64,
    response_only: bool = True,
    skip_special_tokens: bool = True,
    batch_size: int = 80,
) -> Any:
    """Continue one prompt or many, greedily (Chapters 0 and 6).

    Args:
        model: a causal language model; its training mode is left as it was.
        tokenizer: the model's; its settings are left as they were.
        prompts: a text, continued exactly as it stands (`chat_prompt` writes one), or a
            conversation, which gets the chat template; or a list of these. Each is tokenized
            by itself: it gets the tokenizer's BOS unless it begins with it.
        max_new_tokens: where to stop when the model does not.
        response_only: leave out the prompt, and the white space around the answer.
        skip_special_tokens: leave these out too.
        batch_size: how many go through the model together, padded on the *left*, so that
            the last token of every row is the one to be continued.

    Returns:
        A text for one prompt, a list of texts in the same order for a list.

    Raises:
        TypeError: prompts or numbers of another kind.
        ValueError: an empty text, a number below 1, a conversation without a template.

    Example:
        >>> generate(model, tokenizer, "One, two,", max_new_tokens=2)  # doctest: +SKIP
        'three,'
    """
    if not isinstance(prompts, str | list | tuple):
        kind = type(prompts).__name__
        raise TypeError(f"prompts must be a text, a conversation or a list of these, not {kind}")
    whole_number("max_new_tokens", max_new_tokens)
    whole_number("batch_size", batch_size)
    single = isinstance(prompts, str) or _is_conversation(prompts)
    texts = [_text(tokenizer, prompt) for prompt in ([prompts] if single else prompts)]
    settings = _greedy(model, tokenizer, int(max_new_tokens))
    answers = [""] * len(texts)
    # Similar lengths share a batch, so that little is padded.
    order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
    with _evaluation_mode(model), _unpacked_on_cpu(model), _whole_before_the_head(model):
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            inputs = _inputs(tokenizer, [texts[index] for index in chosen]).to(model.device)
            rows = model.generate(**inputs, generation_config=settings)
            for index, row in zip(chosen, rows, strict=True):
                if response_only:
                    row = row[inputs["input_ids"].shape[1] :]
                if tokenizer.pad_token_id not in (None, tokenizer.eos_token_id):
                    row = row[row != tokenizer.pad_token_id]  # when special tokens are shown
                text = str(tokenizer.decode(row, skip_special_tokens=skip_special_tokens))
                answers[index] = text.strip() if response_only else text
    return answers[0] if single else answers


def _is_conversation(prompts: object) -> bool:
    return isinstance(prompts, list) and bool(prompts) and isinstance(prompts[0], dict)


def _text(tokenizer: PreTrainedTokenizerBase, prompt: Any) -> str:
    if _is_conversation(prompt):
        prompt = chat_prompt(tokenizer, prompt)
    if not isinstance(prompt, str):
        kind = type(prompt).__name__
        raise TypeError(f"prompts must be texts or conversations, but holds {kind}")
    if not prompt:
        raise ValueError("prompts holds an empty text: there is nothing to continue")
    return prompt


def _inputs(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> BatchEncoding:
    """Token ids and attention mask of texts, padded on the left, one BOS each at most."""
    ids = []
    for text in texts:
        # A template already wrote the special tokens; to add them would double the BOS.
        written = bool(tokenizer.bos_token) and text.startswith(str(tokenizer.bos_token))
        ids.append(tokenizer(text, add_special_tokens=not written)["input_ids"])
    return tokenizer.pad(
        {"input_ids": ids},
        padding=len(texts) > 1,
        padding_side="left",
        return_attention_mask=True,
        return_tensors="pt",
    )


def _greedy(
    model: Any, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int
) -> GenerationConfig:
    from transformers import GenerationConfig

    own = model.generation_config
    stops = own.eos_token_id if isinstance(own.eos_token_id, list) else [own.eos_token_id]
    pad = tokenizer.pad_token_id
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        bos_token_id=own.bos_token_id,
        eos_token_id=sorted({*stops, tokenizer.eos_token_id} - {None}),
        pad_token_id=pad if pad is not None else tokenizer.eos_token_id,
    )


@contextlib.contextmanager
def _evaluation_mode(model: torch.nn.Module) -> Iterator[None]:
    """Dropout off and no gradients; the training mode comes back after."""
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        model.train(was_training)


def _unpacked_on_cpu(model: Any) -> contextlib.AbstractContextManager:
    # Unpacking 4-bit weights anew for every token is most of the work on a CPU.
    on_cpu = model.device.type == "cpu"
    return dequantized_once(model) if on_cpu else contextlib.nullcontext()


@contextlib.contextmanager
def _whole_before_the_head(model: Any) -> Iterator[None]:
    # The head is asked for the last position only, a slice of the hidden states. On a CPU
    # PyTorch 2.13 multiplies such a slice by a copy of the head for every row (its issue
    # 151934): in bfloat16, 80 rows took 4.5 GB and 6.7 s instead of 10 MB and 0.02 s.
    head = model.get_output_embeddings()
    hook = head.register_forward_pre_hook(lambda _, args: (args[0].contiguous(), *args[1:]))
    try:
        yield
    finally:
        hook.remove()
