"""Will it fit? Predict the peak GPU memory of a fine-tuning run, without a GPU and without weights (Chapter 5).

`estimate_training` traces one real training step of the real model on tensors that have shapes but no data;
`measure` counts the bytes of a real run the same way; `napkin` is the formula a reader derives, to see what it misses.
"""

import copy
import functools
import json
import math
import re
from dataclasses import dataclass, fields
from importlib import resources
from pathlib import Path

GIB = 2**30
GPUS = {
    "T4": 15 * GIB,  # of 16, what the driver leaves
    "RTX 3060": 12 * GIB,
    "RTX 4090": 24 * GIB,
    "A100 40GB": 40 * GIB,
    "A100 80GB": 80 * GIB,
    "H100 80GB": 80 * GIB,
}
CONTEXT = (
    0.25e9,
    0.5e9,
)  # the CUDA context on recent stacks, outside every allocator counter
QUANTIZATIONS = (None, "int8", "fp4", "nf4")
DTYPES = ("bfloat16", "float16", "float32")
ATTENTIONS = ("eager", "sdpa", "flash_attention_2")


def estimate_training(
    model,
    *,
    quantization=None,
    dtype="bfloat16",
    lora=None,
    optimizer="adamw_torch_fused",
    batch_size=1,
    sequence_length=512,
    gradient_checkpointing=True,
    attention="sdpa",
    mixed_precision=None,
    gradient_accumulation=False,
    packing=False,
    stack="current",
    double_quantization=True,
    prepare_kbit=None,
):
    """Predict what `torch.cuda.max_memory_allocated` would say of a training run (Chapter 5).

    model: a config, a name from `catalogue()`, a path, or a Hub id. quantization: None, 'int8', 'fp4', 'nf4'.
    dtype: of the weights. lora: None (full fine-tuning), a rank (PEFT's usual targets), or a LoraConfig.
    optimizer: 'adamw_torch_fused', 'adamw_torch', 'sgd', 'adamw_8bit', 'paged_adamw_8bit', 'paged_adamw_32bit'.
    attention: 'eager', 'sdpa', 'flash_attention_2'. mixed_precision: None, 'bf16' or 'fp16' (autocast, as accelerate).
    gradient_accumulation: gradients of earlier micro-batches are alive. packing: rows joined into one (trl's 'bfd').
    stack: 'current' is a step in steady state of the installed versions with SFTTrainer's fused head; 'book' the first
    step of trl 0.12's time in a plain loop, whose accumulating runs never reach the optimizer.
    prepare_kbit: whether `prepare_model_for_kbit_training` ran; None: as the stack's trainer does (book yes, current no).

    Returns a MemoryEstimate. Raises ValueError or TypeError for arguments outside these, and ValueError for models
    that cannot be traced honestly (encoder-decoders, mixtures of experts, recurrent layers). No GPU, no weights.
    """
    import torch

    from helpers import memory_profiles, memory_step

    _one_of("quantization", quantization, QUANTIZATIONS)
    _one_of("attention", attention, ATTENTIONS)
    _one_of("optimizer", optimizer, sorted(memory_profiles.OPTIMIZERS))
    _one_of("stack", stack, ("current", "book"))
    dtype = str(dtype).removeprefix("torch.")
    dtype = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}.get(dtype, dtype)
    _one_of("dtype", dtype, DTYPES)
    _one_of("mixed_precision", mixed_precision, (None, "no", "bf16", "fp16"))
    for name, value in (("batch_size", batch_size), ("sequence_length", sequence_length)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be a whole number of at least 1, not {value!r}")
    if isinstance(lora, bool) or not (
        lora is None or isinstance(lora, int) or hasattr(lora, "peft_type")
    ):
        raise TypeError(f"lora must be None, a rank or a LoraConfig, not {lora!r}")
    if isinstance(lora, int) and lora < 1:
        raise ValueError(f"lora must be a rank of at least 1, not {lora}")
    if quantization and lora is None:
        raise ValueError(
            f"quantization={quantization!r} needs lora: a quantized model cannot be trained by itself; "
            "pass lora=16, or quantization=None for full fine-tuning"
        )
    if (
        attention == "flash_attention_2"
        and dtype == "float32"
        and mixed_precision in (None, "no")
    ):
        raise ValueError(
            "attention='flash_attention_2' has no float32 kernels; use dtype='bfloat16' or mixed_precision='bf16'"
        )
    config = load_config(model)
    memory_step.refuse(config)
    if sequence_length > (limit := _longest(config)):
        raise ValueError(
            f"sequence_length={sequence_length} is more than the {limit} positions this model has"
        )
    recipe = memory_step.Recipe(
        quantization=quantization,
        double_quantization=double_quantization,
        dtype=getattr(torch, dtype),
        lora=lora,
        optimizer=optimizer,
        batch_size=batch_size,
        sequence_length=sequence_length,
        gradient_checkpointing=gradient_checkpointing,
        attention=attention,
        mixed_precision={"bf16": torch.bfloat16, "fp16": torch.float16}.get(
            mixed_precision
        ),
        gradient_accumulation=gradient_accumulation,
        packing=packing,
        stack=stack,
        prepare_kbit=stack == "book" if prepare_kbit is None else prepare_kbit,
        loss="logits" if stack == "book" else "fused",
    )
    name = (
        model
        if isinstance(model, str)
        else getattr(config, "name_or_path", "") or config.model_type
    )
    return _estimate(str(name), config, recipe)


def _one_of(name, value, choices):
    if value not in choices:
        raise ValueError(
            f"{name} must be one of {', '.join(map(repr, choices))}, not {value!r}"
        )


def _longest(config):
    learned = getattr(config, "model_type", "") in ("opt", "gpt2")
    return config.max_position_embeddings if learned else math.inf


# ------------------------------------------------------------------ configs
@functools.cache
def _catalog():
    text = resources.files("helpers").joinpath("memory_catalog.json").read_text("utf-8")
    return json.loads(text)


def catalogue():
    """The models whose configs ship with the course, as a table: name, layers, width, where the numbers are from."""
    import pandas as pd

    rows = []
    for name, entry in _catalog().items():
        config = load_config(name)
        shape = (config.num_hidden_layers, config.hidden_size, config.vocab_size)
        rows.append((name, config.model_type, *shape, entry["source"]))
    columns = ["model", "type", "layers", "width", "vocabulary", "source"]
    return pd.DataFrame(rows, columns=columns).set_index("model")


def load_config(model):
    """A transformers config from a config, a dict, a catalogue name, a path, or a Hub id.

    Raises ValueError when the name is none of these, or the Hub cannot be reached, with the nearest known names.
    """
    from transformers import AutoConfig, PretrainedConfig

    if isinstance(model, PretrainedConfig):
        return model
    if hasattr(model, "config") and isinstance(model.config, PretrainedConfig):
        return model.config
    if isinstance(model, dict):
        return AutoConfig.for_model(**model)
    if not isinstance(model, str | Path):
        raise TypeError(
            f"model must be a config, a name, a path or a Hub id, not {type(model).__name__}"
        )
    wanted = str(model).lower()
    for name, entry in _catalog().items():
        if wanted in (name.lower(), name.split("/")[-1].lower()):
            return AutoConfig.for_model(**copy.deepcopy(entry["config"]))
    path = Path(model)
    if path.suffix == ".json" and path.is_file():
        return AutoConfig.for_model(**json.loads(path.read_text("utf-8")))
    try:
        return AutoConfig.from_pretrained(model)
    except (OSError, ValueError) as error:
        import difflib

        names = {name.split("/")[-1].lower(): name for name in _catalog()}
        close = difflib.get_close_matches(wanted.split("/")[-1], names, 3, 0.3)
        hint = ", ".join(names[name] for name in close) or ", ".join(list(_catalog())[:6])
        raise ValueError(
            f"model={str(model)!r} is not in the catalogue and no config was found at that path or on the Hub; "
            f"known names like it: {hint} (memory.catalogue() lists all)"
        ) from error


# ------------------------------------------------------------------ the estimate
_CACHE = {}


def _estimate(name, config, recipe):
    from helpers import memory_step

    lora = recipe.lora.to_dict() if hasattr(recipe.lora, "to_dict") else recipe.lora
    choices = [
        lora if f.name == "lora" else getattr(recipe, f.name) for f in fields(recipe)
    ]
    key = config.to_json_string(use_diff=False) + repr(choices)
    if key not in _CACHE:
        if len(_CACHE) > 64:
            _CACHE.clear()
        short = None if _irregular(config, recipe.lora) else memory_step.SHORT
        try:
            _CACHE[key] = memory_step.step_log(config, recipe, short)
        except (
            RuntimeError,
            TypeError,
            AttributeError,
            KeyError,
            NotImplementedError,
        ) as error:
            raise ValueError(
                f"model: {config.model_type!r} broke while being traced, so there is no honest number to give "
                f"({type(error).__name__}: {error})"
            ) from error
    trace, reserved = _CACHE[key]
    peak, parts, instant, instants = trace.peak()
    instants = {k: v for k, v in instants.items() if k in PHASES}
    return MemoryEstimate(name, peak, parts, instant, instants, reserved, trace, recipe)


def _irregular(config, lora):
    """Whether layers may differ, so that only a full trace is honest."""
    for value in config.to_dict().values():
        if isinstance(value, list | tuple) and len(value) == config.num_hidden_layers:
            if len(set(map(str, value))) > 1:
                return True
    names = (
        "layers_to_transform",
        "layers_pattern",
        "rank_pattern",
        "alpha_pattern",
        "layer_replication",
    )
    return any(getattr(lora, name, None) for name in names)


PHASES = ("forward", "loss", "backward", "optimizer")


def parse_size(size):
    """Bytes from a number, a text like '16GiB' or '24GB', or the name of a card in `GPUS`."""
    if isinstance(size, bool) or not isinstance(size, int | float | str):
        raise TypeError(
            f"gpu must be a card's name, a size like '16GiB', or bytes, not {size!r}"
        )
    if not isinstance(size, str):
        return int(size)
    wanted = re.sub(r"[^a-z0-9]", "", size.lower())
    for name, capacity in GPUS.items():
        known = re.sub(r"[^a-z0-9]", "", name.lower())
        if wanted in (known, known.removesuffix("gb"), known.removeprefix("rtx")):
            return capacity
    found = re.fullmatch(r"\s*([\d.]+)\s*([kmgt]?)(i?)b?\s*", size.lower())
    if not found or not found[1].strip("."):
        raise ValueError(
            f"gpu={size!r} is neither a size like '16GiB' nor one of {', '.join(GPUS)}"
        )
    base = 1024 if found[3] else 1000
    return int(float(found[1]) * base ** " kmgt".index(found[2] or " "))


@dataclass(frozen=True)
class MemoryEstimate:
    """A predicted training step: how many bytes at the peak, when, and what they are (Chapter 5).

    peak_bytes: what `max_memory_allocated` would say. parts: {category: bytes} at that moment, adding up to it.
    peak_instant: 'forward', 'loss', 'backward' or 'optimizer'; instants: the peak of each. reserved_bytes: what the
    caching allocator holds. margin: (low, high) bytes on top of the peak for that and the CUDA context.
    """

    name: str
    peak_bytes: int
    parts: dict
    peak_instant: str
    instants: dict
    reserved_bytes: int
    trace: object
    recipe: object

    @property
    def margin(self):
        """(low, high) bytes beyond the peak: CUDA context, and blocks the allocator holds but nobody uses."""
        slack = max(0, self.reserved_bytes - self.peak_bytes)
        return int(CONTEXT[0] + slack / 2), int(CONTEXT[1] + slack)

    def fits(self, gpu):
        """Whether the peak and the whole margin fit a card ('T4', 'A100 80GB', '16GiB', or bytes)."""
        return self.peak_bytes + self.margin[1] + _hopper(gpu) <= parse_size(gpu)

    def verdict(self, gpu):
        """'fits', 'tight' (only with a small context and no fragmentation) or 'no'."""
        if self.fits(gpu):
            return "fits"
        return (
            "tight"
            if self.peak_bytes + self.margin[0] + _hopper(gpu) <= parse_size(gpu)
            else "no"
        )

    def table(self):
        """The parts as a table: MB (1e6 bytes) and share of the peak, largest first."""
        import pandas as pd

        parts = sorted(self.parts.items(), key=lambda item: -item[1])
        rows = [(name, size / 1e6, size / self.peak_bytes) for name, size in parts]
        return pd.DataFrame(rows, columns=["part", "MB", "share"]).set_index("part")

    def __str__(self):
        lines = [
            f"{self.name}: peak {self.peak_bytes / GIB:.2f} GiB in the {self.peak_instant} pass"
            if self.peak_instant in ("forward", "backward")
            else f"{self.name}: peak {self.peak_bytes / GIB:.2f} GiB at the {self.peak_instant}",
            f"margin for CUDA context and fragmentation: {_span(self.margin)}",
        ]
        lines += [
            f"  {n:<12} {r.MB:>10,.1f} MB  {r.share:>6.1%}"
            for n, r in self.table().iterrows()
        ]
        lines.append("  ".join(f"{gpu}: {self.verdict(gpu)}" for gpu in GPUS))
        return "\n".join(lines)

    def _repr_html_(self):
        colors = _colors()
        bars = "".join(
            f'<span title="{name}: {row.MB:,.0f} MB" style="display:inline-block;height:18px;'
            f'width:{100 * row.share:.2f}%;background:{colors[name]}"></span>'
            for name, row in self.table().iterrows()
        )
        rows = "".join(
            f'<tr><td><span style="color:{colors[name]}">&#9632;</span> {name}</td>'
            f"<td>{row.MB:,.1f}</td><td>{row.share:.1%}</td></tr>"
            for name, row in self.table().iterrows()
        )
        signs = {"fits": "&#10003; fits", "tight": "&#8776; tight", "no": "&#10007; no"}
        cards = "".join(
            f"<tr><td>{gpu}</td><td>{signs[self.verdict(gpu)]}</td></tr>" for gpu in GPUS
        )
        return (
            f"<b>{self.name}</b>: peak <b>{self.peak_bytes / GIB:.2f} GiB</b> ({self.peak_instant}), plus "
            f'{_span(self.margin)} for the CUDA context and fragmentation<div style="max-width:640px">{bars}</div>'
            '<div style="display:flex;gap:2em"><table><tr><th>part</th><th>MB</th><th>share</th></tr>'
            f"{rows}</table><table><tr><th>card</th><th></th></tr>{cards}</table></div>"
        )

    def plot(self, gpu=None):
        """Draw the parts as one stacked bar and the step's timeline, against a card's line; returns the Figure."""
        from helpers import plots

        fig, (left, right) = plots.figure(
            1, 2, width=9.5, height=3.6, width_ratios=[1, 2.2], sharey=True
        )
        bottom, colors = 0, _colors()
        for name, row in self.table().iterrows():
            height = row.MB * 1e6 / GIB
            left.bar([0], [height], 0.6, bottom=bottom, color=colors[name], label=name)
            bottom += height
        left.set(
            xticks=[], xlim=(-0.5, 1.9), ylabel="GiB (2**30 bytes)", title="at the peak"
        )
        handles, labels = left.get_legend_handles_labels()
        left.legend(handles[::-1], labels[::-1], loc="lower right", fontsize=8)
        samples = self.trace.timeline()
        x, y = zip(*samples, strict=True)
        right.fill_between(
            x, [v / GIB for v in y], step="post", color=plots.COLORS["sky"], alpha=0.7
        )
        marks = [(position, name) for position, name in self.trace.marks if name in PHASES]
        for position, name in marks:
            right.axvline(
                position, color=plots.COLORS["gray"], linewidth=0.8, linestyle=":"
            )
            right.annotate(
                name,
                (position, 0),
                (2, 4),
                textcoords="offset points",
                fontsize=8,
                rotation=90,
            )
        right.set(xlabel="allocations and frees, in order", title="one training step")
        right.set_xlim(
            max(0, marks[0][0] - len(self.trace.events) // 20) if marks else 0,
            len(self.trace.events),
        )
        if gpu is not None:
            capacity = parse_size(gpu) / GIB
            for axis in (left, right):
                axis.axhline(capacity, color=plots.COLORS["red"], linewidth=1.5)
            label = gpu if isinstance(gpu, str) else f"{capacity:.1f} GiB"
            right.annotate(label, (1, capacity), (-4, -12), xycoords=("axes fraction", "data"),
                           textcoords="offset points", ha="right", color=plots.COLORS["red"])  # fmt: skip
        return fig


def _span(margin):
    return f"{margin[0] / GIB:.2f} to {margin[1] / GIB:.2f} GiB"


def _hopper(gpu):
    from helpers.memory_profiles import CUBLAS_WORKSPACE, CUBLAS_WORKSPACE_HOPPER

    hopper = isinstance(gpu, str) and gpu.lower().startswith("h100")
    return 2 * (CUBLAS_WORKSPACE_HOPPER - CUBLAS_WORKSPACE) if hopper else 0


def _colors():
    from helpers.plots import COLORS

    order = {
        "weights": "gray",
        "adapters": "blue",
        "gradients": "orange",
        "optimizer": "purple",
    }
    order |= {
        "activations": "sky",
        "logits": "green",
        "temporaries": "red",
        "workspace": "yellow",
    }
    return {name: COLORS[color] for name, color in order.items()}
