"""One `generate` for one prompt or many (Chapters 0 and 6)."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from helpers._checks import whole_number
from helpers._report import counted, shorten
from helpers.models import dequantized_once

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedTokenizerBase

Messages = list[dict[str, Any]]


def chat_prompt(tokenizer: PreTrainedTokenizerBase, message: str | Messages) -> str:
    """The text a chat model continues: the conversation, then the start of its own turn.

    Args:
        tokenizer: with a chat template (Chapter 4 makes one).
        message: what the user says, or a list of messages ('role' and 'content').

    Raises:
        ValueError: there is no template, it rejects the conversation, or it leaves a
            message out; the message is named.

    Example:
        >>> chat_prompt(tokenizer, "Hi").split()[-1]  # doctest: +SKIP
        '<|im_start|>assistant'
    """
    from jinja2 import TemplateError

    if isinstance(message, str):
        message = [{"role": "user", "content": message}]
    if not tokenizer.chat_template:
        raise ValueError(
            "tokenizer has no chat template; set one, for example "
            "tokenizer.chat_template = chat.chatml_template()"
        )
    check_conversation(message)
    try:
        text = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    except (TemplateError, TypeError, KeyError, AttributeError, IndexError) as error:
        raise ValueError(f"the chat template rejects the conversation: {error}") from error
    for number, one in enumerate(message):
        if (left_out := _left_out(one, str(text))) is not None:
            raise ValueError(
                f"the chat template leaves out {shorten(left_out, 60)!r}, of message {number} "
                f"(role {one['role']!r}): say it in a message of a role that the template knows"
            )
    return str(text)


def check_conversation(messages: Any) -> None:
    """Raise ValueError, naming the message, unless each has a role and a text.

    Args:
        messages: an assistant's with 'tool_calls' may lack its text.

    Example:
        >>> check_conversation([{"role": "user", "content": "Hi"}])
    """
    for number, message in enumerate(messages):
        if not isinstance(message, Mapping):
            lacks = "is no dictionary with 'role' and 'content'"
        elif not isinstance(message.get("role"), str):
            lacks = "has no 'role', such as 'user'"
        elif not isinstance(message.get("content", ""), str | None) or (
            message.get("content") is None and not message.get("tool_calls")
        ):
            lacks = "has no text in 'content'"
        else:
            continue
        raise ValueError(f"message {number} {lacks}: {shorten(message, 80)}")


def _left_out(message: Mapping[str, Any], text: str) -> str | None:
    """What a message says and a rendered conversation does not, thoughts aside."""
    calls = message.get("tool_calls") or ()
    wanted = [str(call.get("function", call).get("name", "")) for call in calls]
    # Templates drop what was thought in earlier turns, on purpose.
    wanted.append((message.get("content") or "").rpartition("</think>")[2])
    said = " ".join(text.split())
    for words in map(str.strip, wanted):
        quoted = json.dumps(words, ensure_ascii=False)[1:-1]  # as a tool's result may be
        if not any(" ".join(way.split()) in said for way in (words, quoted)):
            return words
    return None


def generate(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: str | Messages | Iterable[str | Messages],
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
            by itself: it gets what the tokenizer puts in front (BOS) unless it begins so.
        max_new_tokens: where to stop when the model does not.
        response_only: leave out the prompt, and the white space around the answer.
        skip_special_tokens: leave these out too.
        batch_size: how many go through the model together, padded on the *left*, so that
            the last token of every row is the one to be continued.

    Returns:
        A text for one prompt, a list of texts in the same order for a list.

    Raises:
        TypeError: prompts or numbers of another kind.
        ValueError: an empty text, a number below 1, a conversation without a template, or
            more tokens than the model has positions.

    Example:
        >>> generate(model, tokenizer, "One, two,", max_new_tokens=2)  # doctest: +SKIP
        'three,'
    """
    if isinstance(prompts, Mapping | bytes) or not isinstance(prompts, Iterable):
        kind = type(prompts).__name__
        raise TypeError(f"prompts must be a text, a conversation or a list of these, not {kind}")
    whole_number("max_new_tokens", max_new_tokens)
    whole_number("batch_size", batch_size)
    given: list[Any] = [prompts] if isinstance(prompts, str) else list(prompts)
    if single := isinstance(prompts, str) or _is_conversation(given):
        given = [prompts]
    rows = []
    for number, prompt in enumerate(given):
        try:
            rows.append(_ids(tokenizer, _text(tokenizer, prompt)))
        except (TypeError, ValueError) as error:
            raise type(error)(f"prompts, number {number}: {error}") from error
    _check_positions(model, rows, max_new_tokens)
    settings = _greedy(model, tokenizer, int(max_new_tokens))
    answers = [""] * len(rows)
    # Similar lengths share a batch, so that little is padded.
    order = sorted(range(len(rows)), key=lambda index: len(rows[index]))
    with _evaluation_mode(model), _unpacked_on_cpu(model), _whole_before_the_head(model):
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            inputs = _padded([rows[index] for index in chosen], settings.pad_token_id or 0)
            width = inputs["input_ids"].shape[1]
            inputs = {name: tensor.to(model.device) for name, tensor in inputs.items()}
            made = model.generate(**inputs, generation_config=settings)
            for index, row in zip(chosen, made[:, width:].tolist(), strict=True):
                # Behind its end, a row is padded until the longest one ends.
                ends = (at for at, token in enumerate(row, 1) if token in settings.eos_token_id)
                row = row[: next(ends, None)]
                if not response_only:
                    row = rows[index] + row
                text = str(tokenizer.decode(row, skip_special_tokens=skip_special_tokens))
                answers[index] = text.strip() if response_only else text
    return answers[0] if single else answers


def _is_conversation(prompts: object) -> bool:
    return isinstance(prompts, list | tuple) and any(isinstance(one, Mapping) for one in prompts)


def _text(tokenizer: PreTrainedTokenizerBase, prompt: Any) -> str:
    if _is_conversation(prompt):
        return chat_prompt(tokenizer, list(prompt))
    if not isinstance(prompt, str):
        raise TypeError(f"it must be a text or a conversation, not {shorten(repr(prompt))}")
    if not prompt:
        raise ValueError("it is an empty text: there is nothing to continue")
    return prompt


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """A text's tokens behind those that the tokenizer puts in front, which stand there once."""
    plain = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    whole = list(tokenizer(text)["input_ids"])
    spare = range(len(whole) - len(plain) + 1)
    front = next((whole[:n] for n in spare if whole[n : n + len(plain)] == plain), [])
    # A template already wrote it. What a tokenizer puts behind (EOS) would end the text.
    return plain if plain[: len(front)] == front else front + plain


def _padded(rows: Sequence[list[int]], pad: int) -> dict[str, torch.Tensor]:
    """Token ids and attention mask, padded on the left, where no answer begins."""
    spare = [max(map(len, rows)) - len(row) for row in rows]
    pairs = list(zip(spare, rows, strict=True))
    return {
        "input_ids": torch.tensor([[pad] * n + row for n, row in pairs]),
        "attention_mask": torch.tensor([[0] * n + [1] * len(row) for n, row in pairs]),
    }


def _check_positions(model: Any, rows: Sequence[list[int]], max_new_tokens: int) -> None:
    room = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    longest = max(map(len, rows), default=0)
    needed = longest + max_new_tokens - 1  # nothing follows the last one
    if rows and isinstance(room, int) and 0 < room < needed:
        raise ValueError(
            f"prompts holds one of {counted(longest, 'token')}, which with max_new_tokens="
            f"{max_new_tokens} needs {needed:,} positions: the model has {room:,}. Shorten the "
            "prompt, or ask for fewer"
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
    """Dropout off and no gradients; every module's training mode comes back after."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        for module, training in modes:
            module.training = training


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
