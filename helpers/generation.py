"""One `generate` for one prompt or many (Chapters 0 and 6)."""

import contextlib
from numbers import Integral

import torch

from helpers.models import dequantized_once


def chat_prompt(tokenizer, message):
    """The text a chat model continues: the conversation, then the start of its own turn.

    message: what the user says, or a list of messages (dicts with 'role' and 'content').
    Raises ValueError when the tokenizer has no chat template (Chapter 4 makes one).
    """
    if isinstance(message, str):
        message = [{"role": "user", "content": message}]
    if not tokenizer.chat_template:
        raise ValueError(
            "tokenizer has no chat template; set one, for example "
            "tokenizer.chat_template = chat.chatml_template()"
        )
    return tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)


def generate(
    model,
    tokenizer,
    prompts,
    *,
    max_new_tokens=64,
    response_only=True,
    skip_special_tokens=True,
    batch_size=80,
):
    """Continue one prompt or many, greedily (Chapters 0 and 6).

    prompts: a text, continued exactly as it stands (`chat_prompt` writes one), or a
        conversation (a list of messages), which gets the chat template; or a list of these.
        Each is tokenized by itself: it gets the tokenizer's BOS unless it begins with it.
    response_only: leave the prompt out of what is returned, and the white space around it.
    batch_size: how many go through the model together. They are padded on the *left*,
        so that the last token of every row is the one to be continued.
    Returns a str for one prompt, a list of str in the same order for a list.
    Leaves the model's training mode and the tokenizer's settings as they were.
    """
    if not isinstance(prompts, str | list | tuple):
        raise TypeError(
            "prompts must be a text, a conversation or a list of these, not "
            f"{type(prompts).__name__}"
        )
    single = isinstance(prompts, str) or _is_conversation(prompts)
    texts = _texts(tokenizer, [prompts] if single else prompts)
    for name, value in (("max_new_tokens", max_new_tokens), ("batch_size", batch_size)):
        whole = isinstance(value, Integral) and not isinstance(value, bool)
        if not whole or value < 1:
            raise ValueError(f"{name} must be a positive int, not {value!r}")

    answers = [None] * len(texts)
    # Similar lengths share a batch, so that little is padded.
    order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
    with evaluation_mode(model), _unpacked_on_cpu(model), _whole_before_the_head(model):
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            batch = [texts[index] for index in chosen]
            produced = _generate_batch(model, tokenizer, batch, max_new_tokens, response_only)
            decoded = tokenizer.batch_decode(produced, skip_special_tokens=skip_special_tokens)
            for index, answer in zip(chosen, decoded, strict=True):
                answers[index] = answer.strip() if response_only else answer
    return answers[0] if single else answers


def _unpacked_on_cpu(model):
    # Unpacking 4-bit weights anew for every token is most of the work on a CPU.
    on_cpu = model.device.type == "cpu"
    return dequantized_once(model) if on_cpu else contextlib.nullcontext()


@contextlib.contextmanager
def _whole_before_the_head(model):
    # The head is asked for the last position only, a slice of the hidden states. On a CPU
    # PyTorch 2.13 multiplies such a slice by a copy of the head for every row (its issue
    # 151934): in bfloat16, 80 rows took 4.5 GB and 6.7 s instead of 10 MB and 0.02 s.
    head = model.get_output_embeddings()
    hook = head.register_forward_pre_hook(lambda _, args: (args[0].contiguous(), *args[1:]))
    try:
        yield
    finally:
        hook.remove()


def _is_conversation(prompts):
    return isinstance(prompts, list) and bool(prompts) and isinstance(prompts[0], dict)


def _texts(tokenizer, prompts):
    texts = []
    for prompt in prompts:
        if _is_conversation(prompt):
            prompt = chat_prompt(tokenizer, prompt)
        if not isinstance(prompt, str):
            raise TypeError(
                "prompts must be a text, a conversation (list of messages) or a list of "
                f"these, but holds {type(prompt).__name__}"
            )
        if not prompt:
            raise ValueError("prompts holds an empty text: there is nothing to continue")
        texts.append(prompt)
    return texts


def _inputs(tokenizer, texts):
    """Token ids and attention mask of texts, padded on the left, one BOS each at most."""
    ids = []
    for text in texts:
        # A template already wrote the special tokens; to add them would double the BOS.
        written = bool(tokenizer.bos_token) and text.startswith(tokenizer.bos_token)
        ids.append(tokenizer(text, add_special_tokens=not written)["input_ids"])
    return tokenizer.pad(
        {"input_ids": ids},
        padding=len(texts) > 1,
        padding_side="left",
        return_attention_mask=True,
        return_tensors="pt",
    )


def _generate_batch(model, tokenizer, texts, max_new_tokens, response_only):
    inputs = _inputs(tokenizer, texts).to(model.device)
    output = model.generate(
        **inputs,
        generation_config=_greedy(model, tokenizer, max_new_tokens),
    )
    rows = output[:, inputs.input_ids.shape[1] :] if response_only else output
    return [_without_padding(row, tokenizer) for row in rows]


def _greedy(model, tokenizer, max_new_tokens):
    from transformers import GenerationConfig

    own = model.generation_config
    stops = own.eos_token_id if isinstance(own.eos_token_id, list) else [own.eos_token_id]
    stops = {*stops, tokenizer.eos_token_id} - {None}
    pad = tokenizer.pad_token_id
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        bos_token_id=own.bos_token_id,
        eos_token_id=sorted(stops),
        pad_token_id=pad if pad is not None else tokenizer.eos_token_id,
    )


def _without_padding(row, tokenizer):
    # Matters when special tokens are shown: padding is not part of the answer.
    pad = tokenizer.pad_token_id
    if pad is None or pad == tokenizer.eos_token_id:
        return row
    return row[row != pad]


@contextlib.contextmanager
def evaluation_mode(model):
    """Dropout off and no gradients inside the block; the training mode comes back after."""
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        model.train(was_training)
