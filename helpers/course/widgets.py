"""Explorers of the chapters: change a choice and see the picture move."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from helpers._report import card
from helpers.course._explorer import explore, show

if TYPE_CHECKING:
    import torch
    from ipywidgets import DOMWidget
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from helpers.floats import Bits
    from helpers.heads import Heads


def attention_heads(heads: Heads, *, layer: int = 0, head: int = 0) -> None:
    """Leaf through the heads of a real model (Chapter 1).

    Args:
        heads: what `heads.read_heads` found.
        layer: shown to begin with.
        head: shown to begin with.

    Example:
        >>> attention_heads(heads.read_heads(model, tokenizer, text))  # doctest: +SKIP
    """
    layers, per_layer = heads.weights.shape[:2]
    explore(heads.plot, layer=(0, layers - 1, 1, layer), head=(0, per_layer - 1, 1, head))


def moving_query(
    keys: Sequence,
    values: Sequence,
    labels: Sequence[str],
    *,
    unit: str = "",
    angle: int = 45,
    length: float = 3.0,
) -> None:
    """Turn and stretch a query among 2-D keys and watch what it takes (Chapter 1).

    Args:
        keys: as `heads.plot_lookup` takes them, like the next three.
        values: one for each key.
        labels: one for each key.
        unit: of the values.
        angle: in degrees, counter-clockwise from the first feature's axis.
        length: of the query.

    Example:
        >>> moving_query([[1, 0], [0, 1]], [0, 10], ["east", "north"])  # doctest: +SKIP
    """
    from helpers.heads import plot_lookup

    def draw(angle: float, length: float) -> Any:
        turned = math.radians(angle)
        query = [length * math.cos(turned), length * math.sin(turned)]
        return plot_lookup(query, keys, values, labels, unit=unit)

    explore(draw, angle=(0, 360, 5, angle), length=(0.0, 10.0, 0.5, length))


def explore_quantization(weights: torch.Tensor) -> None:
    """Bits, scheme and grouping of linear quantization (Chapter 2).

    Args:
        weights: any matrix.

    Example:
        >>> explore_quantization(torch.randn(64, 64))  # doctest: +SKIP
    """
    from helpers import quantization

    def draw(bits: int, scheme: str, per: str) -> Any:
        quantized = quantization.quantize_linear(weights, bits, scheme=scheme, per=per)
        return quantization.error_report(weights, quantized).plot()

    schemes, groups = list(quantization.SCHEMES), list(quantization.GROUPS)
    explore(draw, bits=(2, 8, 1, 4), scheme=schemes, per=groups)


def adapter_price(model: PreTrainedModel, targets: dict[str, str | list[str]]) -> None:
    """Rank, alpha and target modules against parameters, file size and scaling (Chapter 3).

    Args:
        model: before adapters, also on the meta device.
        targets: {label: target_modules}.

    Example:
        >>> adapter_price(model, {"attention": ["q_proj", "v_proj"]})  # doctest: +SKIP
    """
    from peft import LoraConfig

    from helpers import lora, plots

    @functools.cache  # a second each: a slider must not wait for it
    def per_rank(target: str) -> int:
        return lora.count_trainable(model, LoraConfig(r=1, target_modules=targets[target]))

    def draw(target: str, rank: int, alpha: int, rslora: bool) -> Any:
        each = per_rank(target)
        fig, ax = plots.figure(width=7, height=2.6)
        ranks = [2**power for power in range(9)]
        ax.plot(ranks, [r * each / 1e6 for r in ranks], color=plots.COLORS["gray"])
        ax.plot(rank, rank * each / 1e6, "o", color=plots.COLORS["blue"], markersize=9)
        ax.set(xlabel="rank", ylabel="parameters (millions)")
        scaling = alpha / (rank**0.5 if rslora else rank)
        megabytes = 4 * rank * each / 1e6  # float32
        choice = f"{target} · rank {rank} · alpha {alpha}{' · rsLoRA' if rslora else ''}"
        result = f"{rank * each:,} parameters · {megabytes:.1f} MB · scaling {scaling:.2f}"
        ax.set_title(f"{choice}\n{result}")
        return fig

    ranks, alphas = (1, 256, 1, 16), (1, 512, 1, 32)
    explore(draw, target=list(targets), rank=ranks, alpha=alphas, rslora=False)


def template_playground(
    tokenizer: PreTrainedTokenizerBase,
    *,
    messages: str | None = None,
    template: str | None = None,
) -> None:
    """Edit messages and template; see text, tokens and mask live (Chapter 4).

    Args:
        tokenizer: whose tokens are shown.
        messages: one per line, `role: content`; default: a short conversation.
        template: Jinja with generation markers; default: `chat.chatml_template()`.

    Example:
        >>> template_playground(tokenizer)  # doctest: +SKIP
    """
    from helpers import chat

    def draw(messages: str, template: str) -> Any:
        turns = []
        for line in filter(str.strip, messages.splitlines()):
            role, colon, content = line.partition(":")
            if not colon:
                raise ValueError(f"write each message as `role: content`, not {line!r}")
            turns.append({"role": role.strip(), "content": content.strip()})
        row = chat.encode_chat(tokenizer, turns, template=template)
        return chat.mask_view(tokenizer, row, template=template)

    messages = messages or (
        "system: You are Yoda.\nuser: The birch canoe slid on the smooth planks.\n"
        "assistant: On the smooth planks, the birch canoe slid."
    )
    explore(draw, messages=messages, template=template or chat.chatml_template())


def memory_planner(
    models: Sequence[str] = ("SmolLM2-135M-Instruct", "Llama-3.1-8B"),
) -> None:
    """Change a choice of a training run and see the predicted bar move (Chapter 5).

    Args:
        models: catalog names or Hub ids; the first is shown to begin with.

    Example:
        >>> memory_planner(["Llama-3.1-8B"])  # doctest: +SKIP
    """
    from peft import LoraConfig

    from helpers import memory

    def draw(quantization: str, rank: int, checkpointing: bool, card: str, **choices: Any) -> Any:
        estimate = memory.estimate_training(
            choices.pop("model"),
            quantization=None if quantization == "none" else quantization,
            lora=LoraConfig(r=rank, target_modules="all-linear") if rank else None,
            gradient_checkpointing=checkpointing,
            gpu=card,
            **choices,
        )
        return estimate.plot(card)

    explore(
        draw,
        model=list(models),
        quantization=["nf4", "int8", "none"],
        rank=(0, 128, 8, 16),
        sequence_length=(128, 4096, 128, 1024),
        batch_size=(1, 16, 1),
        checkpointing=True,
        card=list(memory.GPUS),
    )


def bit_explorer(number: float = 0.1, kind: str = "fp16") -> None:
    """Toggle a bit, see the number; change the format, see what survives (Appendix B).

    Args:
        number: shown to begin with.
        kind: one of `floats.FORMATS`.

    Example:
        >>> bit_explorer(0.1, "bf16")  # doctest: +SKIP
    """
    from helpers import floats

    start = floats.encode(number, kind)
    show(start, lambda: _bit_panel(start))


def _bit_panel(start: Bits) -> DOMWidget:
    """A format, a number, one button per bit, and the picture that follows all three."""
    import ipywidgets

    from helpers import floats

    kind = ipywidgets.Dropdown(options=list(floats.FORMATS), value=start.kind)
    number = ipywidgets.Text(value=str(start.value), continuous_update=False)
    buttons = ipywidgets.HBox(layout=ipywidgets.Layout(flex_flow="row wrap"))
    picture = ipywidgets.HTML()
    styles = {"sign": "", "exponent": "warning", "mantissa": "info", "value": "info"}

    def button(digit: str, field: str) -> Any:
        narrow = ipywidgets.Layout(width="24px", padding="0", margin="1px")
        made = ipywidgets.ToggleButton(value=digit == "1", description=digit, layout=narrow)
        made.button_style = styles[field]
        made.observe(toggled, names="value")
        return made

    def spell(bits: Bits) -> None:
        buttons.children = [
            button(digit, field) for field, text in bits.groups.items() for digit in text
        ]
        picture.value = bits._repr_html_()

    def toggled(_: object) -> None:
        for one in buttons.children:
            one.description = str(int(one.value))
        digits = "".join(one.description for one in buttons.children)
        picture.value = floats.decode(digits, kind.value)._repr_html_()
        number.unobserve(typed, names="value")  # the bits speak now: do not round again
        number.value = str(floats.decode(digits, kind.value).value)
        number.observe(typed, names="value")

    def typed(_: object) -> None:
        try:
            spell(floats.encode(float(number.value), kind.value))
        except ValueError as error:  # a half-typed number, or a NaN that fp4 cannot hold
            buttons.children = ()
            picture.value = card(str(error), "bad")

    kind.observe(typed, names="value")
    number.observe(typed, names="value")
    spell(start)
    return ipywidgets.VBox([ipywidgets.HBox([kind, number]), buttons, picture])
