"""Does this llama.cpp compute on this processor? One tiny file tells (Chapter 6).

Cloud machines were seen whose processor lists AMX and refuses it: every program of
llama.cpp that multiplies with Q8_0, Q4_0 or the K types was killed by SIGILL there, and
float16 ran. The flags of the system cannot be asked, so the program is: it reads a model
of a few megabytes with a layer of each type.
"""

import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

TYPES = (
    *("F16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"),
    *("Q6_K", "Q5_K", "Q4_K", "Q3_K", "Q2_K"),
)
WIDTH = 256  # one super-block of the K types
CONTEXT = 32  # tokens: enough for the kernels that take several rows at once
SECONDS = 120
ILLEGAL = "was killed by SIGILL"


@dataclass(frozen=True)
class Trial:
    """What came of it: `options` a program needs, or that it is `refused`.

    As text, a sentence about what is unusual; '' where nothing is. A trial that failed for
    another reason (no memory, a busy machine) refuses nothing and says what it was.
    """

    options: list
    refused: bool = False
    said: str = ""

    def __str__(self):
        return self.said


def run(program):
    """Let `llama-perplexity` compute on the tiny file, in its fastest way, then plainly.

    program: its path; where there is none, nothing can be tried and nothing is unusual.
    Returns a `Trial`.
    """
    if not Path(program).is_file():
        return Trial([])
    with tempfile.TemporaryDirectory(prefix="llama-trial-") as scratch:
        model, text = Path(scratch, "tiny.gguf"), Path(scratch, "text.txt")
        write_tiny_model(model)
        text.write_text("a" * 3 * CONTEXT, encoding="utf-8")
        command = [program, "-m", model, "-f", text, "-c", CONTEXT, "-b", CONTEXT]
        first = _end_of(command, scratch)
        if first is None:
            return Trial([])
        if not first.startswith(ILLEGAL):
            return Trial([], said=f"llama.cpp did not compute on a tiny file: it {first}.")
        plain = _end_of([*command, "--no-repack"], scratch)
    if plain is None:
        return Trial(
            ["--no-repack"],
            said=f"llama.cpp's fastest kernels do not run on this processor (it {first}), "
            "so its programs are started with --no-repack.",
        )
    return Trial([], True, f"llama.cpp does not compute on this machine: it {first}.")


def _end_of(command, folder):
    """None when the command did well, else how it ended, in words.

    It runs in `folder`, where a core file is no harm.
    """
    from helpers.serving.llamacpp import how_it_ended

    command = [str(part) for part in [*command, "--threads", 1]]
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True,
            errors="replace", timeout=SECONDS, cwd=folder,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return f"did not end within {SECONDS} seconds"
    except OSError as error:
        return f"could not be started ({error.strerror})"
    if done.returncode == 0:
        return None
    lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    last = f": {lines[-1][:200]}" if lines and done.returncode > 0 else ""
    return how_it_ended(done.returncode) + last


def write_tiny_model(path):
    """A GGUF file of a Llama with one layer for each of `TYPES`, all its weights zero."""
    import gguf
    import numpy as np

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(2 * CONTEXT)
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
        kind = gguf.GGMLQuantizationType[kind]
        weights, size = gguf.GGML_QUANT_SIZES[kind]
        zeros = np.zeros((rows, WIDTH // weights * size), dtype=np.uint8)
        writer.add_tensor(f"{name}.weight", zeros, raw_dtype=kind)

    def norm(name):
        writer.add_tensor(f"{name}.weight", np.ones(WIDTH, dtype=np.float32))

    matrix("token_embd", len(tokens), "F16")
    norm("output_norm")
    for block, kind in enumerate(TYPES):
        norm(f"blk.{block}.attn_norm")
        norm(f"blk.{block}.ffn_norm")
        for part in ("attn_q", "attn_k", "attn_v", "attn_output"):
            matrix(f"blk.{block}.{part}", WIDTH, kind)
        for part in ("ffn_gate", "ffn_up", "ffn_down"):
            matrix(f"blk.{block}.{part}", WIDTH, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
