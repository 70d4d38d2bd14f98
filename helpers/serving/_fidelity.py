"""What quantizing cost the answers, token by token (Chapter 6; public as `gguf.fidelity`).

llama.cpp's server is asked once for each token of each answer: how probable was it, after all
that stands before it? A bias makes the server write just that token; the log-probabilities
that it reports are those before the bias, as far down the ranks as the token may be.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import TYPE_CHECKING, Any

from helpers import evaluation
from helpers._checks import whole_number
from helpers.serving import _rows, server
from helpers.serving._inspection import GGUFFile, inspect

if TYPE_CHECKING:
    import pandas as pd
    from transformers import PreTrainedTokenizerBase

TOP = 256  # of the vocabulary, the tokens whose probabilities are compared one by one
REST = 1e-6  # less than this for all other tokens together is the rounding of float32
SLOTS, ROOM = 24, 16_384  # requests at once, and tokens of context in all: both cost memory
LEAST = -104.0  # the log-probability of what float32 calls impossible
Logs = dict[int, float]  # {token id: log-probability}


def fidelity(
    float_gguf: str | Path,
    quantized: Mapping[str, str | Path],
    text: str | Iterable[Mapping[str, Any]],
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    context: int = 256,
) -> pd.DataFrame:
    """How far quantized files are from their float original, on the answers of held-out rows.

    Args:
        float_gguf: the original.
        quantized: {name: path}.
        text: rows as `evaluation.evaluate` takes them; scored is the assistant's last message,
            with the token that ends it, after all that stands before it. Or one text, of
            which all tokens but the first eight are scored.
        tokenizer: renders and cuts the rows as in training; None: the GGUF's own template
            and vocabulary do, as in serving.
        context: a text is cut into pieces of so many tokens.

    Returns:
        One row each, the original's first: MB (1e6 bytes), bits per weight, perplexity
        (exponential of the mean loss per token) with its 95 % interval, the loss added to the
        original's (nats per token; paired, with its 95 % interval), and mean KL (Kullback-Leibler
        divergence of the next-token distribution from the original's, in nats; a lower bound:
        the tokens that are not among the 256 likeliest of both count as one). `.attrs` has
        "losses" {name: mean loss of each row}, "tokens" (how many of a row's last ones are
        scored) and "ids" (all of a row's).

    Raises:
        ValueError: for damaged files, one without a template or with another vocabulary, rows
            that are no question and answer, and a text that is too short.

    Example:
        >>> fidelity("yoda-f16.gguf", {"Q8_0": "yoda-Q8_0.gguf"}, test)  # doctest: +SKIP
    """
    import pandas as pd

    if not quantized:
        raise ValueError("quantized is empty: pass a dict such as {'Q8_0': path}")
    original, key = inspect(float_gguf), "tokenizer.ggml.tokens"
    mine = original.kind if original.kind not in quantized else f"{original.kind}, original"
    files = {mine: original} | {name: inspect(path) for name, path in quantized.items()}
    for name, found in files.items():
        if found.metadata.get(key) != original.metadata.get(key):
            raise ValueError(f"quantized[{name!r}] has another vocabulary than float_gguf")
    ends = {original.metadata.get(f"tokenizer.ggml.{end}_token_id") for end in ("eos", "eot")}
    with _rows.reader(original, tokenizer) as reader:
        rows = reader.rows(text, ends, whole_number("context", context, 2 * _rows.HEAD))
    tokens = [len(row.ids) - row.begin for row in rows]
    losses, table = {}, {}
    first: list[list[tuple[float, Logs]]] = []
    for name, found in files.items():
        logs = _score(found, rows)
        first = first or logs
        pairs = [pair for both in zip(first, logs, strict=True) for pair in zip(*both, strict=True)]
        losses[name] = [-sum(log for log, _ in row) / len(row) for row in logs]
        loss = evaluation.interval(losses[name], weights=tokens)
        added = evaluation.interval(losses[name], over=losses[mine], weights=tokens)
        table[name] = {
            "MB": found.bytes / 1e6,
            "bits per weight": found.bits_per_weight,
            "perplexity": math.exp(loss.mean),
            "95 %": f"{math.exp(loss.low):.3f} to {math.exp(loss.high):.3f}",
            "added loss": f"{added:+.4f}" if name != mine else "",
            "mean KL": sum(divergence(a, b) for (_, a), (_, b) in pairs) / len(pairs),
        }
    frame = pd.DataFrame.from_dict(table, orient="index").rename_axis("variant")
    frame.attrs = {"losses": losses, "tokens": tokens, "ids": [row.ids for row in rows]}
    return frame


def divergence(original: Logs, other: Logs) -> float:
    """Kullback-Leibler divergence in nats; the tokens that one of the two lacks are one.

    Example:
        >>> round(divergence({1: math.log(0.5)}, {1: math.log(0.25)}), 3)
        0.144
    """
    both = original.keys() & other.keys()
    rests = [max(REST, 1 - sum(math.exp(logs[t]) for t in both)) for logs in (original, other)]
    told = sum(math.exp(original[t]) * (original[t] - other[t]) for t in both)
    return told + rests[0] * math.log(rests[0] / rests[1])


def _score(found: GGUFFile, rows: list[_rows.Row]) -> list[list[tuple[float, Logs]]]:
    """For each answer token of each row: its log-probability, and those of the likeliest."""
    context = max(len(row.ids) for row in rows) + 1
    slots = max(1, min(SLOTS, ROOM // context, len(rows)))
    # Rows of like length side by side, the longest first.
    left = iter(sorted(range(len(rows)), key=lambda number: -len(rows[number].ids)))
    done: list[Any] = [None] * len(rows)
    with (
        server.LlamaServer(found.path, context=context, slots=slots) as served,
        ThreadPoolExecutor(slots) as pool,
    ):

        def work(slot: int) -> None:
            for number in left:
                row = rows[number]
                done[number] = [
                    _ask(served, found, row.ids[:at], row.ids[at], slot)
                    for at in range(row.begin, len(row.ids))
                ]

        try:
            for ended in as_completed([pool.submit(work, slot) for slot in range(slots)]):
                ended.result()
        finally:
            list(left)  # after a failure nobody begins another row
    return done


def _ask(
    served: server.LlamaServer, found: GGUFFile, prompt: list[int], token: int, slot: int
) -> tuple[float, Logs]:
    asked = {"prompt": prompt, "n_predict": 1, "cache_prompt": True, "id_slot": slot}
    asked |= {"samplers": ["top_k"], "top_k": 1, "response_fields": ["completion_probabilities"]}
    # Of half a character the server says nothing: then the whole vocabulary is listed.
    for forced, top in (token, TOP), (found.metadata.get("tokenizer.ggml.eos_token_id", 0), 2**20):
        bias = {"n_probs": top, "logit_bias": [[forced, 1e4]]}
        if told := served.post("/completion", asked | bias).get("completion_probabilities"):
            break
    logs = {each["id"]: each["logprob"] for each in (*told[0]["top_logprobs"], told[0])}
    if None in logs.values() or token not in logs:
        raise ValueError(
            f"{found.path.name} holds weights that are no numbers (NaN): its perplexity is none "
            "either. Look at the training's loss"
        )
    logs = {each: max(LEAST, log) for each, log in logs.items()}
    return logs[token], logs
