"""Ids as tokens: what each says, which are padding, where a packed sample begins."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, takewhile
from typing import TYPE_CHECKING, AnyStr

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer


@dataclass(frozen=True)
class Token:
    """One token of a batch: where it stands, what it says, whether it is trained."""

    row: int
    index: int
    id: int
    label: int
    text: str
    padding: bool
    position: int
    sample: int

    @property
    def trained(self) -> bool:
        """True if the token is a label, so that the model learns to say it."""
        return self.label != -100

    @property
    def kind(self) -> str:
        """'padding', 'trained' or 'ignored'."""
        return "padding" if self.padding else "trained" if self.trained else "ignored"


def read_row(tokenizer: Tokenizer, row: int, columns: Mapping[str, Sequence[int]]) -> list[Token]:
    """The tokens of one row; a position of 0 behind another token begins a new sample."""
    ids, positions = columns["input_ids"], columns.get("position_ids")
    texts = [data.decode(errors="backslashreplace") for data in token_bytes(tokenizer, ids)]
    padding = _pad_flags(tokenizer, ids, columns.get("attention_mask"))
    before = list(accumulate((not pad for pad in padding), initial=0))  # real tokens before each
    tokens, sample = [], 0
    for i, (index, label) in enumerate(zip(ids, columns["labels"], strict=True)):
        position = positions[i] if positions else before[i]
        sample += position == 0 < before[i] and not padding[i]
        tokens.append(Token(row, i, index, label, texts[i], padding[i], position, sample))
    return tokens


def _pad_flags(
    tokenizer: Tokenizer, ids: Sequence[int], attention: Sequence[int] | None
) -> list[bool]:
    """True where a token is padding: by attention mask, or by runs of PAD at the edges."""
    pad, count = tokenizer.pad_token_id, len(ids)
    if pad is None or (attention and not all(attention)):
        return [not seen for seen in attention or [1] * count]
    tail = count - len(list(takewhile(pad.__eq__, reversed(ids))))
    head = len(list(takewhile(pad.__eq__, ids[:tail])))
    if pad == tokenizer.bos_token_id:
        head = 0
    if pad == tokenizer.eos_token_id:
        tail += 1  # the first of a run at the end is the end itself
    return [i < head or i >= tail for i in range(count)]


def token_bytes(tokenizer: Tokenizer, ids: Sequence[int], fenced: bool = False) -> list[bytes]:
    """The bytes of each token. Fenced: special tokens stand between bytes no text has,
    so that a text which merely spells `<|im_end|>` is not taken for the token."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    byte_of = {char: byte for byte, char in bytes_to_unicode().items()}
    byte_level = tokenizer.convert_tokens_to_ids("Ġ") not in {None, tokenizer.unk_token_id}
    pieces = []
    for index, token in zip(ids, tokenizer.convert_ids_to_tokens(list(ids)), strict=True):
        if added := tokenizer.added_tokens_decoder.get(index):
            fences = fenced and added.special
            pieces.append(fence(added.content) if fences else added.content.encode())
        elif token is None:
            raise ValueError(f"input_ids holds {index}, which must come from another tokenizer")
        elif byte_level:
            pieces.append(bytes(byte_of[char] for char in token if char in byte_of))
        elif match := re.fullmatch(r"<0x([0-9A-F]{2})>", token):
            pieces.append(bytes.fromhex(match[1]))
        else:
            pieces.append(token.replace("▁", " ").encode())
    return pieces


def fence(token: str | None) -> bytes:
    """A special token as no text can spell it."""
    return b"\xfe" + str(token).encode() + b"\xff"


def unfence(data: bytes) -> str:
    """Readable text of fenced bytes."""
    return data.replace(b"\xfe", b"").replace(b"\xff", b"").decode(errors="replace")


def shared_start(one: AnyStr, other: AnyStr) -> AnyStr:
    """The beginning that two texts share."""
    pairs = enumerate(zip(one, other, strict=False))
    return one[: next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))]


def squeeze(data: bytes) -> bytes:
    """Bytes without their white space."""
    return b"".join(data.split())
