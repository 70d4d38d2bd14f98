"""What a chat model is trained on: special tokens, templates, masks, batches (Chapter 4)."""

from helpers.chat.mask import MaskView, mask_view, trainer_mask_view
from helpers.chat.templates import chatml_template, choose_template, encode_chat
from helpers.chat.tokenizers import prepare_model, prepare_tokenizer

__all__ = [
    "MaskView",
    "chatml_template",
    "choose_template",
    "encode_chat",
    "mask_view",
    "prepare_model",
    "prepare_tokenizer",
    "trainer_mask_view",
]
