"""One output for two readers: a live widget, and a still picture where widgets do not live.

GitHub, a printout and a stored notebook show the picture of the starting values.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from helpers._report import card, escape

if TYPE_CHECKING:
    from ipywidgets import DOMWidget

Control = bool | str | list | tuple


def explore(draw: Callable[..., Any], **controls: Control) -> None:
    """Show `draw(**values)` under a control for each value (all chapters).

    Args:
        draw: returns a figure of `plots` or an object with `_repr_html_`.
        controls: by name, a bool (checkbox), a list (drop-down), a text (text area), or
            `(low, high, step)` / `(low, high, step, start)` (slider). Without a start value
            a slider begins at `low` and a list at its first entry.

    Raises:
        TypeError: any other kind of control.

    Example:
        >>> explore(lambda rank: f"{2 * rank} numbers", rank=[4, 8])  # doctest: +SKIP
    """
    still = draw(**{name: _start(name, control) for name, control in controls.items()})
    show(still, lambda: panel(draw, controls))


def _start(name: str, control: Control) -> Any:
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


def show(drawing: Any, make_live: Callable[[], DOMWidget]) -> None:
    """One output: the still picture, and the widget where a kernel keeps it alive."""
    from IPython.core.getipython import get_ipython
    from IPython.display import display

    bundle, metadata = still(drawing)
    if hasattr(get_ipython(), "kernel"):
        try:
            model = make_live().model_id
        except ImportError:  # no ipywidgets
            return display(bundle, metadata=metadata, raw=True)
        view = {"version_major": 2, "version_minor": 0, "model_id": model}
        bundle["application/vnd.jupyter.widget-view+json"] = view
    display(bundle, metadata=metadata, raw=True)


def still(drawing: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """The MIME bundle of one drawing and its metadata, without widgets."""
    if hasattr(drawing, "_repr_mimebundle_"):  # a figure of `plots`, with its words
        return drawing._repr_mimebundle_()
    return {"text/plain": str(drawing), "text/html": drawing._repr_html_()}, {}


def panel(draw: Callable[..., Any], controls: dict[str, Control]) -> DOMWidget:
    """A control for each value, and the picture that follows them."""
    import ipywidgets

    made = {name: _control(name, control) for name, control in controls.items()}
    picture = ipywidgets.HTML()

    def redraw(_: object = None) -> None:
        try:
            bundle, _ = still(draw(**{name: control.value for name, control in made.items()}))
        except ValueError as error:  # a half-typed text or an impossible combination
            picture.value = card(str(error), "bad")
            return
        image, alt = bundle.get("image/png"), escape(bundle["text/plain"])
        drawn = f"<img alt='{alt}' src='data:image/png;base64,{image}'>"
        picture.value = bundle.get("text/html") or drawn

    for control in made.values():
        control.observe(redraw, names="value")
    redraw()
    return ipywidgets.VBox([*made.values(), picture])


def _control(name: str, control: Control) -> Any:
    import ipywidgets

    start = _start(name, control)
    shared = {"value": start, "description": name.replace("_", " ")}
    if isinstance(control, bool):
        return ipywidgets.Checkbox(**shared)
    shared["style"] = {"description_width": "140px"}
    if isinstance(control, str):
        area = ipywidgets.Layout(width="98%", height="120px")
        return ipywidgets.Textarea(layout=area, **shared)
    shared["layout"] = ipywidgets.Layout(width="480px")
    if isinstance(control, list):
        return ipywidgets.Dropdown(options=control, **shared)
    low, high, step = control[:3]
    whole = all(isinstance(number, int) for number in (low, high, step))
    slider = ipywidgets.IntSlider if whole else ipywidgets.FloatSlider
    return slider(min=low, max=high, step=step, continuous_update=False, **shared)
