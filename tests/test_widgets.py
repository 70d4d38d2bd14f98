"""The explorers: what a page keeps, what a reader's change does, what is refused."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from helpers import plots
from helpers.course import _explorer, widgets


@pytest.fixture
def shown(monkeypatch):
    """The one output that an explorer leaves where there is no kernel."""
    outputs = []
    monkeypatch.setattr("IPython.display.display", lambda data, **_: outputs.append(data))

    def show(explorer, *arguments):
        explorer(*arguments)
        (data,) = outputs
        assert "application/vnd.jupyter.widget-view+json" not in data
        return data

    return show


def draw(power, low=False, name="x", text="y"):
    if text == "half-typed":
        raise ValueError("<not> yet")
    fig, ax = plots.figure(width=2, height=1)
    ax.plot([int(low), power], label=f"{name}{text}")
    return fig


@pytest.mark.parametrize("control", [3, None, (1, 2), [], {"a": 1}])
def test_another_control_is_refused(control):
    with pytest.raises(TypeError, match=r"power must be a bool, a text, a list"):
        widgets.explore(draw, power=control)


def test_a_change_is_drawn_and_a_half_typed_one_is_said():
    controls = {"power": (1, 3, 1, 2), "low": True, "name": ["a", "b"], "text": "t"}
    *made, picture = _explorer.panel(draw, controls).children
    kinds = [type(control).__name__ for control in made]
    assert kinds == ["IntSlider", "Checkbox", "Dropdown", "Textarea"]
    assert [control.value for control in made] == [2, True, "a", "t"]
    before = picture.value
    made[0].value = 3
    assert picture.value != before and "data:image/png;base64," in picture.value
    made[3].value = "half-typed"
    assert "&lt;not&gt; yet" in picture.value and "<not>" not in picture.value


def test_fractions_make_a_slider_of_fractions():
    (slider, _) = _explorer.panel(draw, {"power": (0.0, 1.0, 0.25)}).children
    assert type(slider).__name__ == "FloatSlider" and slider.value == 0.0


def test_the_playground_shows_a_conversation_and_its_mask(shown, tokenizer):
    still = shown(widgets.template_playground, tokenizer)
    assert "birch" in still["text/plain"] and "<" in still["text/html"]


def test_the_price_of_an_adapter_is_drawn(shown):
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(hidden_size=64, num_hidden_layers=2))
    still = shown(widgets.adapter_price, model, {"all": "all-linear"})
    assert still["image/png"] and "all · rank 16 · alpha 32" in still["text/plain"]


def test_the_planner_draws_a_bar(shown):
    assert shown(widgets.memory_planner, ["SmolLM2-135M-Instruct"])["image/png"]
