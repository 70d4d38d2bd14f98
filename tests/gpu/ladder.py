"""Predicted peaks against measured ones: real architectures, random weights, two steps.

The rungs are ordered so that an early end still leaves one of every kind.
"""

import json
import time
from unittest import mock

from stages import DEVICE, free, last_words

BASE = {"quantization": None, "dtype": None, "lora": None, "attention": "sdpa",
        "gradient_checkpointing": True, "optimizer": "adamw_torch_fused"}  # fmt: skip
# Model, choices of the build (dtype None: the card's own), rows x tokens, padded too?
RUNGS = [
    ("Llama-3.1-8B", {"quantization": "nf4", "lora": 16},
     [(2, 2048), (1, 1024), (1, 8192)], True),
    ("Phi-3-mini-4k-instruct", {"quantization": "nf4", "lora": 16},
     [(1, 512), (4, 1024)], True),
    ("opt-350m", {}, [(1, 500), (4, 1024)], True),
    ("opt-350m", {"lora": 16, "attention": "eager", "gradient_checkpointing": False},
     [(1, 500), (2, 1024)], False),
    ("Llama-3.1-8B", {"quantization": "int8", "lora": 16}, [(2, 2048)], False),
    ("Llama-3.1-8B", {"lora": 16, "attention": "flash_attention_2"},
     [(1, 2048), (1, 8192)], False),
    ("Llama-3.1-8B", {"quantization": "nf4", "lora": 16, "gradient_checkpointing": False},
     [(1, 1024), (1, 2048)], False),
    ("Phi-3-mini-4k-instruct", {"lora": 16, "attention": "eager"}, [(1, 2048)], False),
    ("SmolLM2-135M-Instruct", {"dtype": "float32", "gradient_checkpointing": False},
     [(2, 128), (8, 512)], False),
    ("opt-350m", {"optimizer": "adamw_8bit"}, [(1, 500)], False),
    ("opt-350m", {"optimizer": "paged_adamw_8bit"}, [(1, 500)], False),
    ("opt-350m", {"optimizer": "adamw_torch"}, [(1, 500)], False),
    ("opt-350m", {"dtype": "float16", "lora": 16}, [(1, 500)], False),
    ("Llama-3.1-8B", {"lora": 16}, [(1, 2048)], False),
    ("gemma-2-2b", {"quantization": "nf4", "lora": 16, "attention": "eager"},
     [(1, 1024)], False),
    ("Qwen2.5-7B-Instruct", {"quantization": "nf4", "lora": 16}, [(1, 2048)], False),
    # Added after the first card had shown what was wrong: none of these had been seen.
    ("Mistral-7B-v0.3", {"quantization": "nf4", "lora": 16}, [(2, 1024)], False),
    ("Qwen2.5-1.5B-Instruct", {}, [(2, 1024)], True),
    ("Llama-3.2-1B",
     {"lora": 16, "attention": "eager", "gradient_checkpointing": False},
     [(2, 1024)], False),
    ("Qwen3-0.6B", {"optimizer": "adamw_8bit"}, [(4, 512)], False),
    ("SmolLM2-360M-Instruct", {"dtype": "float32", "gradient_checkpointing": False},
     [(4, 256)], False),
    ("Llama-3.2-3B", {"quantization": "int8", "lora": 16}, [(1, 2048)], False),
    ("openai-community/gpt2", {"attention": "eager", "gradient_checkpointing": False},
     [(4, 512)], False),
    ("gemma-3-1b-it", {"lora": 16}, [(1, 2048)], False),
    ("opt-1.3b", {"lora": 16, "gradient_checkpointing": False}, [(2, 1024)], False),
    ("Phi-3-mini-4k-instruct", {"lora": 16, "gradient_checkpointing": False},
     [(1, 2048)], False),
]  # fmt: skip
CPU_RUNGS = [  # to see on a CPU that the ladder itself stands
    ("SmolLM2-135M-Instruct", {"dtype": "float32", "gradient_checkpointing": False},
     [(1, 32)], False),
    ("SmolLM2-135M-Instruct", {"dtype": "float32", "quantization": "nf4", "lora": 8},
     [(2, 32)], True),
]  # fmt: skip


def runs(rungs, dtype):
    """Every run as a dict: id, build (choices of the model), run (its batch), padded."""
    found = []
    for name, choices, sizes, padded_too in rungs:
        build = {"model": name, **BASE, **choices}
        build["dtype"] = build["dtype"] or dtype
        label = " ".join([name, *(str(value) for value in choices.values())])
        for number, (rows, length) in enumerate(sizes):
            size = {"batch_size": rows, "sequence_length": length}
            entry = {"build": build, "run": size, "padded": False}
            found.append(entry | {"id": f"{label} {rows}x{length}"})
            if padded_too and number == 0:
                found.append(entry | {"id": f"{label} {rows}x{length} padded",
                                      "padded": True})  # fmt: skip
    return found


def predict(entry, card):
    """What the course's predictor says of a run on a Card (None: on none in particular).

    Raises ValueError for a run the predictor knows the card cannot do.
    """
    from helpers import memory

    options = {key: value for key, value in entry["build"].items() if key != "model"}
    found = memory.estimate_training(
        entry["build"]["model"], **options, **entry["run"], gpu=card, padded=entry["padded"]
    )
    return {"peak_bytes": found.peak_bytes, "instant": found.peak_instant,
            "reserved_predicted": found.reserved_bytes, "parts": found.parts}  # fmt: skip


def card_of(head):
    """The Card of a report's head, with the memory and the kernels it really has."""
    from helpers.memory import cards

    if not head["capability"]:
        return None
    return cards.Card(head["card"], head["memory_bytes"], tuple(head["capability"]))


def plan(card):
    """Every run with its prediction, made elsewhere: no time on a card goes into it."""
    from helpers.memory import cards

    found, dtype = [], cards.half_dtype(card.capability)
    for entry in runs(RUNGS, dtype):
        try:
            found.append(entry | {"predicted": predict(entry, card)})
        except ValueError as error:
            found.append(entry | {"refused": str(error)})
    return {"capability": card.capability, "dtype": dtype, "runs": found}


def planned(path, head):
    """The runs of this machine: those of a plan made for such a card, or bare ones."""
    if DEVICE != "cuda":
        return runs(CPU_RUNGS, head["dtype"])
    if path is not None and path.is_file():
        made = json.loads(path.read_text(encoding="utf-8"))
        if made["capability"] == head["capability"] and made["dtype"] == head["dtype"]:
            return made["runs"]
    return runs(RUNGS, head["dtype"])


def why_not(entry, head, free_bytes):
    """Why a run is not tried on this card, or None; adds the prediction it may lack."""
    flash = entry["build"]["attention"] == "flash_attention_2"
    if flash and head["capability"] and head["capability"] < [8, 0]:
        return "flash attention needs a card of compute capability 8.0"
    if "refused" in entry:
        return entry["refused"]
    if "predicted" not in entry:
        try:
            entry["predicted"] = predict(entry, card_of(head))
        except ValueError as error:
            return str(error)
    needed = max(entry["predicted"]["peak_bytes"], entry["predicted"]["reserved_predicted"])
    if needed > free_bytes:
        return f"needs {needed / 2**30:.1f} GiB, and {free_bytes / 2**30:.1f} GiB are free"
    return None


def climb(save, limit, head, path):
    """Run every rung that fits, those of one model after one another."""
    until = time.monotonic() + limit - 8
    flash_as_attention()
    groups = {}
    for entry in planned(path, head):
        groups.setdefault(json.dumps(entry["build"], sort_keys=True), []).append(entry)
    for entries in groups.values():
        fitting = []
        for entry in entries:
            late = "no time was left" if time.monotonic() > until else None
            if reason := late or why_not(entry, head, free_bytes()):
                save("skipped", what=entry["id"], why=reason)
            else:
                fitting.append(entry)
        if fitting:
            climb_one(save, fitting, until)
        free()


def climb_one(save, entries, until):
    """The runs of one model, built once."""
    try:
        model, optimizer = build(entries[0]["build"])
        for entry in entries:
            if time.monotonic() > until:
                save("skipped", what=entry["id"], why="no time was left")
            else:
                one_run(save, entry, model, optimizer)
    except Exception:
        save("error", what=entries[0]["id"], text=last_words())


def free_bytes():
    """What a run may take here."""
    if DEVICE == "cuda":
        import torch

        return torch.cuda.mem_get_info()[0]
    import psutil

    return psutil.virtual_memory().available


# ── the model ────────────────────────────────────────────────────────────────────────────
def flash_as_attention():
    """What flash attention 2 would do, with PyTorch's own kernel: no mask, heads shared.

    (Its name must not hold the word "flash": transformers would look for the package.)
    """
    from torch.nn import functional
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from transformers import AttentionInterface, AttentionMaskInterface

    def flash(module, query, key, value, attention_mask, dropout=0.0, scaling=None, **_):
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            out = functional.scaled_dot_product_attention(
                query, key, value, dropout_p=dropout, scale=scaling, is_causal=True,
                enable_gqa=query.shape[1] != key.shape[1],
            )  # fmt: skip
        return out.transpose(1, 2), None

    AttentionInterface.register("shared_heads", flash)
    AttentionMaskInterface.register("shared_heads", lambda *_, **__: None)


def build(choices):
    """The model as `helpers.memory._model.build` imagines it, real, and its optimizer."""
    import peft
    import torch
    from trl.trainer.utils import add_fused_lm_head

    from helpers import memory

    config = memory.load_config(choices["model"])
    if hasattr(config, "layerdrop"):
        config.layerdrop = 0.0
    model = with_random_weights(config, choices)
    model.train()
    add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
    if choices["lora"]:
        known = peft.utils.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
        targets = None if config.model_type in known else "all-linear"
        lora = peft.LoraConfig(r=choices["lora"], target_modules=targets)
        model = peft.get_peft_model(model, lora)
    trained = [p for p in model.parameters() if p.requires_grad]
    if choices["quantization"]:  # as trl does
        for parameter in trained:
            parameter.data = parameter.data.to(torch.bfloat16)
    if choices["gradient_checkpointing"]:
        model.activation_checkpointing_enable({"use_reentrant": False})
        if choices["lora"]:
            model.enable_input_require_grads()
    return model, make_optimizer(choices["optimizer"], trained)


def with_random_weights(config, choices):
    """The model on the device; layers to be quantized are made and quantized one by one.

    So an 8B model in four bits never needs the room of its sixteen-bit self.
    """
    import torch
    import transformers

    class Later(torch.nn.Linear):  # a linear layer whose weights are made when needed
        def __init__(self, *args, **options):
            super().__init__(*args, **options | {"device": "meta"})

    attention = choices["attention"].replace("flash_attention_2", "shared_heads")
    dtype = getattr(torch, choices["dtype"])
    with torch.device(DEVICE), mock.patch.object(torch.nn, "Linear", Later):
        model = transformers.AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation=attention
        )
    kept = quantizable_not(model) if choices["quantization"] else None
    for name, module in list(model.named_modules()):
        if not isinstance(module, Later):
            continue
        module.__class__ = torch.nn.Linear
        if module.weight.is_meta:  # the head may share the embedding's
            module.to_empty(device=DEVICE)
            # Small enough that no input of a layer reaches 6: int8 keeps a copy of every
            # such column, and in a random model they would be nearly all.
            torch.nn.init.normal_(module.weight, std=0.005)
            if module.bias is not None:
                torch.nn.init.zeros_(module.bias)
        if kept is not None and name not in kept:
            model.set_submodule(name, quantized(module, choices["quantization"], dtype))
    if kept is not None:
        model.is_loaded_in_8bit = choices["quantization"] == "int8"
        model.is_loaded_in_4bit = not model.is_loaded_in_8bit
        model.requires_grad_(False)
    return model


def quantizable_not(model):
    """Names of the layers that transformers leaves as they are."""
    from transformers.quantizers.base import get_keys_to_not_convert

    return set(get_keys_to_not_convert(model))


def quantized(linear, kind, dtype):
    """bitsandbytes' layer with the weights of a plain one."""
    from bitsandbytes import nn as bits

    size, bias = (linear.in_features, linear.out_features), linear.bias
    options = {"bias": bias is not None, "device": "meta"}
    data = linear.weight.data
    if kind == "int8":
        new = bits.Linear8bitLt(*size, has_fp16_weights=False, threshold=6.0, **options)
        new.weight = bits.Int8Params(data, requires_grad=False)
    else:
        new = bits.Linear4bit(*size, compute_dtype=dtype, quant_type=kind, **options)
        new.weight = bits.Params4bit(data, requires_grad=False, quant_type=kind, module=new)
    new.weight._quantize(DEVICE)
    new.bias = bias
    return new


def make_optimizer(name, trained):
    import torch

    if name.startswith("adamw_torch"):
        # As transformers' trainer: without a word, PyTorch takes its loop over lists.
        return torch.optim.AdamW(trained, fused=name.endswith("fused") or None)
    from bitsandbytes import optim

    paged = name.startswith("paged")
    return optim.AdamW(trained, optim_bits=8 if "8bit" in name else 32, is_paged=paged)


# ── the run ──────────────────────────────────────────────────────────────────────────────
def one_run(save, entry, model, optimizer):
    """Predicted against measured, or the news that the memory did not suffice."""
    import torch

    from helpers import memory

    batch, predicted = make_batch(entry), entry["predicted"]
    line = {"id": entry["id"], "dtype": entry["build"]["dtype"], **predicted}
    full = None
    try:
        with memory.measure(DEVICE) as found:
            loss, seconds = two_steps(model, batch, optimizer)
    except torch.OutOfMemoryError as error:
        full = str(error)[:300]
    if full:  # outside of `except`, whose traceback keeps all activations alive
        optimizer.zero_grad()
        free()
        save("run", **line, error=full, error_percent=None)
        return
    # Predictions are of a card: a CPU's kernels keep other tensors.
    error = 100 * (predicted["peak_bytes"] / found.peak_bytes - 1)
    save(
        "run", **line, measured=found.peak_bytes, reserved=found.reserved_bytes,
        error_percent=round(error, 2) if DEVICE == "cuda" else None,
        driver=found.driver_bytes, seconds=seconds, loss=loss,
        tokens_per_second=round(batch["input_ids"].numel() / seconds[-1]),
    )  # fmt: skip


def two_steps(model, batch, optimizer):
    """The second, with the optimizer's states there, is the one that was predicted."""
    seconds = []
    for _ in range(2):
        started = time.perf_counter()
        loss = model(**batch, fused_lm_head=True).loss
        loss.backward()
        value = loss.item()
        del loss
        optimizer.step()
        optimizer.zero_grad()
        if DEVICE == "cuda":
            import torch

            torch.cuda.synchronize()
        seconds.append(round(time.perf_counter() - started, 3))
    return value, seconds


def make_batch(entry):
    """Random rows; a padded batch is what a collator makes of rows of unequal length."""
    import torch

    rows, length = entry["run"]["batch_size"], entry["run"]["sequence_length"]
    ids = torch.randint(3, 10_000, (rows, length), device=DEVICE)
    batch = {"input_ids": ids, "labels": ids.clone()}
    if entry["padded"]:
        mask = torch.ones_like(ids)
        mask[0, length // 2 :] = 0
        batch["labels"][mask == 0] = -100
        batch["attention_mask"] = mask
    return batch
