"""What a chat model is trained on: special tokens, templates, masks, batches (Chapter 4)."""

from helpers.chat.mask import MaskView, Problem, mask_view
from helpers.chat.tokenizers import (
    chatml_template,
    choose_template,
    encode_chat,
    prepare_model,
    prepare_tokenizer,
)

__all__ = [
    "MaskView",
    "Problem",
    "chatml_template",
    "choose_template",
    "encode_chat",
    "mask_view",
    "prepare_model",
    "prepare_tokenizer",
]
