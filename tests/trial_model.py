"""The tiny model of `helpers.serving._trial`; run with PYTHONPATH=. it writes the file.

And a folder as transformers saves one, with a tokenizer of bytes, which becomes GGUF fast.
"""

import gzip
import tempfile
from pathlib import Path

import gguf
import numpy as np

from helpers.serving import _trial

TYPES = (
    *("F16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"),
    *("Q6_K", "Q5_K", "Q4_K", "Q3_K", "Q2_K"),
)
WIDTH = 256  # one super-block of the K types


def write(path):
    """A GGUF file of a Llama with one layer for each of `TYPES`, all its weights zero."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(2 * _trial.CONTEXT)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(len(TYPES))
    writer.add_feed_forward_length(WIDTH)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_rope_dimension_count(WIDTH // 2)
    writer.add_layer_norm_rms_eps(1e-5)
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    kinds = gguf.TokenType
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * len(tokens))
    writer.add_token_types([kinds.UNKNOWN, *[kinds.CONTROL] * 2, *[kinds.BYTE] * 256])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)

    def matrix(name, rows, kind):
        weights, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
        zeros = np.zeros((rows, WIDTH // weights * size), dtype=np.uint8)
        raw = gguf.GGMLQuantizationType[kind]
        writer.add_tensor(f"{name}.weight", zeros, raw_dtype=raw)

    def norm(name):
        writer.add_tensor(f"{name}.weight", np.ones(WIDTH, dtype=np.float32))

    matrix("token_embd", len(tokens), "F16")
    norm("output_norm")
    for block, kind in enumerate(TYPES):
        for part in ("attn_norm", "ffn_norm"):
            norm(f"blk.{block}.{part}")
        for part in ("q", "k", "v", "output"):
            matrix(f"blk.{block}.attn_{part}", WIDTH, kind)
        for part in ("gate", "up", "down"):
            matrix(f"blk.{block}.ffn_{part}", WIDTH, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def tokenizer():
    """ChatML over single bytes and letters: 300 tokens, and nothing to merge."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    from helpers import chat

    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁"]
    words += [chr(97 + n) for n in range(26)] + list(".,?!'ABCDEFG")
    bare = Tokenizer(
        models.BPE(
            {word: n for n, word in enumerate(words)}, [], unk_token="<unk>", byte_fallback=True
        )
    )
    bare.normalizer = normalizers.Replace(" ", "▁")
    bare.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    made = PreTrainedTokenizerFast(
        tokenizer_object=bare, bos_token="<s>", eos_token="<|im_end|>", unk_token="<unk>"
    )
    made.add_tokens([AddedToken("<|im_start|>", special=True)], special_tokens=True)
    made.chat_template = chat.chatml_template()
    return chat.prepare_tokenizer(made)


def llama(width=256, ffn=320, seed=0, **settings):
    """One random layer; its width divides into super-blocks of 256, its ffn does not."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    shape = {"hidden_size": width, "intermediate_size": ffn, "num_hidden_layers": 1}
    shape |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 300}
    shape |= {"tie_word_embeddings": True, "bos_token_id": 1, "eos_token_id": 2} | settings
    return LlamaForCausalLM(LlamaConfig(**shape)).eval()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        write(path := Path(scratch, "tiny.gguf"))
        _trial.MODEL.write_bytes(gzip.compress(path.read_bytes(), 9, mtime=0))
