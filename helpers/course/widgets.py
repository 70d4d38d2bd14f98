"""Explorers: change a choice and see the picture move, with a still one as fall-back.

`explore` puts two things into one output: a live widget for a running kernel, and the
picture of the starting values. Where widgets do not live (GitHub, a printout, a stored
notebook) the picture is what remains.
"""

import html


def explore(draw, **controls):
    """Show `draw(**values)` under a control for each value (all chapters).

    draw: returns a matplotlib Figure or an object with `_repr_html_`.
    controls: by name, a bool (checkbox), a list (drop-down), a text (text area), or
        `(low, high, step)` / `(low, high, step, start)` (slider). Without a start value a
        slider begins at `low` and a list at its first entry.
    Displays itself and returns nothing. Raises TypeError for any other kind of control.
    """
    from IPython.display import display

    values = {name: _start(name, control) for name, control in controls.items()}
    bundle = _still(draw(**values))
    live = _live(draw, controls)
    if live is not None:
        bundle["application/vnd.jupyter.widget-view+json"] = {
            "version_major": 2,
            "version_minor": 0,
            "model_id": live.model_id,
        }
    display(bundle, raw=True)


def _start(name, control):
    if isinstance(control, bool | str):
        return control
    if isinstance(control, list) and control:
        return control[0]
    if isinstance(control, tuple) and len(control) in (3, 4):
        return control[3] if len(control) == 4 else control[0]
    raise TypeError(
        f"{name} must be a bool, a text, a list of choices, or (low, high, step[, start]), "
        f"not {control!r}"
    )


def _still(drawing):
    """The MIME bundle of one drawing, without widgets."""
    # A matplotlib Figure has the method too, and answers None: it is drawn instead.
    markup = drawing._repr_html_() if hasattr(drawing, "_repr_html_") else None
    if markup is not None:
        return {"text/plain": str(drawing), "text/html": markup}
    import base64

    png = base64.b64encode(_png(drawing)).decode()
    return {"text/plain": "(a figure)", "image/png": png}


def _png(figure):
    import io

    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", bbox_inches="tight")
    return buffer.getvalue()


def _live(draw, controls):
    """The widget, or None where there is no ipywidgets or no kernel to keep it alive."""
    try:
        import ipywidgets
        from IPython import get_ipython
    except ImportError:
        return None
    if get_ipython() is None or not hasattr(get_ipython(), "kernel"):
        return None
    made = {name: _control(ipywidgets, name, control) for name, control in controls.items()}
    picture = ipywidgets.HTML()

    def redraw(_=None):
        try:
            bundle = _still(draw(**{name: control.value for name, control in made.items()}))
        except ValueError as error:  # a half-typed text or an impossible combination
            picture.value = f"<p style='color:#D55E00'>{html.escape(str(error))}</p>"
            return
        image = bundle.get("image/png")
        picture.value = bundle.get("text/html") or f"<img src='data:image/png;base64,{image}'>"

    for control in made.values():
        control.observe(redraw, names="value")
    redraw()
    return ipywidgets.VBox([*made.values(), picture])


def _control(ipywidgets, name, control):
    label = name.replace("_", " ")
    style = {"description_width": "140px"}
    wide = ipywidgets.Layout(width="480px")
    start = _start(name, control)
    if isinstance(control, bool):
        return ipywidgets.Checkbox(value=start, description=label)
    if isinstance(control, str):
        area = ipywidgets.Layout(width="98%", height="120px")
        return ipywidgets.Textarea(value=start, description=label, style=style, layout=area)
    if isinstance(control, list):
        return ipywidgets.Dropdown(
            options=control, value=start, description=label, style=style, layout=wide
        )
    low, high, step = control[:3]
    whole = all(isinstance(number, int) for number in (low, high, step))
    slider = ipywidgets.IntSlider if whole else ipywidgets.FloatSlider
    return slider(
        value=start,
        min=low,
        max=high,
        step=step,
        description=label,
        continuous_update=False,
        style=style,
        layout=wide,
    )


def attention_heads(heads, *, layer=0, head=0):
    """Leaf through the heads that `attention.read_heads` found (Chapter 1)."""
    layers, per_layer = heads.weights.shape[:2]

    def draw(layer, head):
        return heads.plot(layer, head)

    explore(draw, layer=(0, layers - 1, 1, layer), head=(0, per_layer - 1, 1, head))


def moving_query(keys, values, labels, *, unit="", angle=45, length=3.0):
    """Turn and stretch a query among 2-D keys and watch what it takes (Chapter 1).

    keys, values, labels: as `attention.plot_lookup` takes them; angle in degrees,
    counter-clockwise from the first feature's axis.
    """
    import math

    from helpers.attention import plot_lookup

    def draw(angle, length):
        turned = math.radians(angle)
        query = [length * math.cos(turned), length * math.sin(turned)]
        return plot_lookup(query, keys, values, labels, unit=unit)

    explore(draw, angle=(0, 360, 5, angle), length=(0.0, 10.0, 0.5, length))


def bit_explorer(number=0.1, kind="fp16"):
    """Toggle a bit, see the number; change the format, see what survives (Appendix B)."""
    from IPython.display import display

    from helpers import floats

    start = floats.encode(number, kind)
    bundle = _still(start)
    if _live(lambda: start, {}) is not None:
        bundle["application/vnd.jupyter.widget-view+json"] = {
            "version_major": 2,
            "version_minor": 0,
            "model_id": _bit_panel(floats, start).model_id,
        }
    display(bundle, raw=True)


def _bit_panel(floats, start):
    """A format, a number, one button per bit, and the picture that follows all three."""
    import ipywidgets

    kind = ipywidgets.Dropdown(options=list(floats.FORMATS), value=start.kind)
    number = ipywidgets.Text(value=str(start.value), continuous_update=False)
    buttons = ipywidgets.HBox(layout=ipywidgets.Layout(flex_flow="row wrap"))
    picture = ipywidgets.HTML()
    styles = {"sign": "", "exponent": "warning", "mantissa": "info", "value": "info"}

    def button(digit, field):
        narrow = ipywidgets.Layout(width="24px", padding="0", margin="1px")
        made = ipywidgets.ToggleButton(value=digit == "1", description=digit, layout=narrow)
        made.button_style = styles[field]
        made.observe(toggled, names="value")
        return made

    def spell(bits):
        buttons.children = [
            button(digit, field) for field, text in bits.groups.items() for digit in text
        ]
        picture.value = bits._repr_html_()

    def toggled(_):
        for one in buttons.children:
            one.description = str(int(one.value))
        digits = "".join(one.description for one in buttons.children)
        picture.value = floats.decode(digits, kind.value)._repr_html_()
        number.unobserve(typed, names="value")  # the bits speak now: do not round again
        number.value = str(floats.decode(digits, kind.value).value)
        number.observe(typed, names="value")

    def typed(_):
        try:
            spell(floats.encode(float(number.value), kind.value))
        except ValueError as error:  # a half-typed number, or a NaN that fp4 cannot hold
            buttons.children = ()
            picture.value = f"<p style='color:#D55E00'>{html.escape(str(error))}</p>"

    kind.observe(typed, names="value")
    number.observe(typed, names="value")
    spell(start)
    return ipywidgets.VBox([ipywidgets.HBox([kind, number]), buttons, picture])


def explore_quantization(weights):
    """Bits, scheme and grouping of linear quantization, on any weights (Chapter 2)."""
    from helpers import quantization

    def draw(bits, scheme, per):
        quantized = quantization.quantize_linear(weights, bits, scheme=scheme, per=per)
        return quantization.error_report(weights, quantized).plot()

    schemes, groups = list(quantization.SCHEMES), list(quantization.GROUPS)
    explore(draw, bits=(2, 8, 1, 4), scheme=schemes, per=groups)


def adapter_price(model, targets):
    """Rank, alpha and target modules against parameters, file size and scaling (Chapter 3).

    model: before adapters, also on the meta device. targets: {label: target_modules}.
    """
    from peft import LoraConfig

    from helpers import lora, plots

    def draw(target, rank, alpha, rslora):
        each = lora.count_trainable(model, LoraConfig(r=1, target_modules=targets[target]))
        fig, ax = plots.figure(width=7, height=2.4)
        ranks = [2**power for power in range(9)]
        ax.plot(ranks, [r * each / 1e6 for r in ranks], color=plots.COLORS["gray"])
        ax.plot(rank, rank * each / 1e6, "o", color=plots.COLORS["blue"], markersize=9)
        ax.set(xlabel="rank", ylabel="parameters (millions)")
        scaling = alpha / (rank**0.5 if rslora else rank)
        megabytes = 4 * rank * each / 1e6  # float32
        ax.set_title(f"{rank * each:,} parameters · {megabytes:.1f} MB · scaling {scaling:.2f}")
        return fig

    ranks, alphas = (1, 256, 1, 16), (1, 512, 1, 32)
    explore(draw, target=list(targets), rank=ranks, alpha=alphas, rslora=False)


def template_playground(tokenizer, *, messages=None, template=None):
    """Edit messages and template; see text, tokens and mask live (Chapter 4).

    messages: one per line, `role: content`. template: Jinja with generation markers.
    """
    from helpers import chat

    def draw(messages, template):
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


def memory_planner(models=("SmolLM2-135M-Instruct", "Llama-3.1-8B")):
    """Change a choice of a training run and see the predicted bar move (Chapter 5).

    models: catalogue names or Hub ids; the first is shown to begin with.
    """
    from helpers import memory

    def draw(model, quantization, rank, sequence_length, batch_size, checkpointing, card):
        estimate = memory.estimate_training(
            model,
            quantization=None if quantization == "none" else quantization,
            lora=rank or None,
            sequence_length=sequence_length,
            batch_size=batch_size,
            gradient_checkpointing=checkpointing,
            gpu=card,
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
