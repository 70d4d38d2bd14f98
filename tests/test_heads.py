"""Read heads against the models' own weights, and the pictures of them."""

import math

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from helpers import models
from helpers.attention import MultiHeadAttention, causal_mask
from helpers.course import _explorer, widgets
from helpers.heads import FAMILIES, Heads, plot_lookup, read_heads

CLOSE = {"atol": 1e-5, "rtol": 0}


def tiny_model(family, seed=0, **settings):
    small = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 48,
        "vocab_size": 64,
        "max_position_embeddings": 128,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    if family == "opt":
        small |= {"ffn_dim": 48, "word_embed_proj_dim": 32}
    if family == "qwen3":
        small["head_dim"] = 12  # heads wider than hidden_size / heads, as Qwen 3 has them
    if family == "phi3":
        small["partial_rotary_factor"] = 0.5
    torch.manual_seed(seed)
    config = AutoConfig.for_model(family, **small | settings, attn_implementation="eager")
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():  # initial projections are so small that every weight is 1/n
        for name, parameter in model.named_parameters():
            if any(part in name for part in ("q_proj", "k_proj", "qkv_proj")):
                parameter.copy_(torch.randn_like(parameter) * 0.3)
    return model


class Words:
    """A stand-in for a tokenizer: one number per word."""

    def __call__(self, text, return_tensors):
        from transformers import BatchEncoding

        ids = torch.tensor([[int(word) for word in text.split()]], dtype=torch.long)
        return BatchEncoding({"input_ids": ids, "attention_mask": torch.ones_like(ids)})

    def decode(self, ids):
        return " ".join(map(str, ids))


TEXT = "3 14 15 9 26 5 35 8 9 7"


@pytest.mark.parametrize("family", FAMILIES)
def test_read_heads_equals_the_models_own_weights(family):
    model = tiny_model(family)
    heads = read_heads(model, Words(), TEXT)
    ids = torch.tensor([[int(word) for word in TEXT.split()]])
    own = torch.cat(model(input_ids=ids, output_attentions=True).attentions)
    assert heads.tokens == TEXT.split()
    assert heads.weights.shape == own.shape == (2, 4, 10, 10)
    torch.testing.assert_close(heads.weights, own, **CLOSE)
    assert heads.weights.std() > 0.05  # not a comparison of two uniform distributions


def test_read_heads_of_the_embedded_model():
    settings = {"dtype": "float32", "attention": "eager", "device": "cpu"}
    model = models.load_model(models.EMBEDDED, **settings).eval()
    tokenizer = models.load_tokenizer(models.EMBEDDED)
    text = "The birch canoe slid on the smooth planks."
    heads = read_heads(model, tokenizer, text)
    with torch.no_grad():
        inputs = tokenizer(text, return_tensors="pt")
        own = torch.cat(model(**inputs, output_attentions=True).attentions)
    assert heads.weights.shape == (30, 9, 10, 10)
    assert heads.tokens[:2] == ["The", " birch"]
    torch.testing.assert_close(heads.weights, own, **CLOSE)


def test_read_heads_needs_no_eager_kernel_and_leaves_no_hooks():
    model = tiny_model("llama")
    expected = read_heads(model, Words(), TEXT).weights
    model.set_attn_implementation("sdpa")
    torch.testing.assert_close(read_heads(model, Words(), TEXT).weights, expected, **CLOSE)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_read_heads_refuses_what_it_does_not_know():
    with pytest.raises(ValueError, match=r"llama.*not 'gpt2'.*output_attentions"):
        read_heads(
            AutoModelForCausalLM.from_config(
                AutoConfig.for_model("gpt2", n_embd=8, n_layer=1, n_head=2, vocab_size=64)
            ),
            Words(),
            TEXT,
        )
    with pytest.raises(ValueError, match="1 to 128 tokens"):
        read_heads(tiny_model("llama"), Words(), "")
    with pytest.raises(ValueError, match="1 to 4 tokens"):
        read_heads(tiny_model("mistral", sliding_window=4), Words(), TEXT)


def test_a_real_layers_state_dict_loads_and_gives_its_output():
    model = tiny_model("llama")
    layer = model.model.layers[1].self_attn
    ours = MultiHeadAttention(32, 4, kv_heads=2)
    ours.load_state_dict(layer.state_dict())
    hidden = torch.randn(2, 6, 32, generator=torch.Generator().manual_seed(1))
    rotary = model.model.rotary_emb(hidden, torch.arange(6).expand(2, 6))
    mask = torch.zeros(6, 6).masked_fill(~causal_mask(6), -math.inf)[None, None]
    with torch.no_grad():
        expected, own_weights = layer(hidden, position_embeddings=rotary, attention_mask=mask)
        output, weights = ours(hidden, rotary=rotary)
    torch.testing.assert_close(output, expected, **CLOSE)
    torch.testing.assert_close(weights, own_weights, **CLOSE)


# ── pictures ─────────────────────────────────────────────────────────────────────────────
def title(ax):
    return ax.get_title("left") or ax.get_title()


@pytest.fixture
def heads():
    weights = torch.rand(3, 2, 4, 4, generator=torch.Generator().manual_seed(0)).tril()
    weights = weights / weights.sum(-1, keepdim=True)
    return Heads(["The", " old", " door", "\n"], weights)


def test_plot_shows_the_weights_and_the_tokens(heads):
    fig = heads.plot(2, 1)
    ax, _ = fig.axes
    shown = ax.images[0].get_array()
    expected = heads.weights[2, 1]
    assert shown.mask.tolist() == (~causal_mask(4)).tolist()
    torch.testing.assert_close(torch.as_tensor(shown.filled(0)), expected)
    words = [label.get_text() for label in ax.get_yticklabels()]
    assert words == ["The", "old", "door", "\\n"]
    assert title(ax) == "layer 2, head 1"


def test_gallery_and_its_limits(heads):
    fig = heads.plot_gallery({(0, 0): "a", (1, 1): "b", (2, 0): "c", (2, 1): "d"})
    assert [title(ax) for ax in fig.axes[:4]] == ["a", "b", "c", "d"]
    assert not fig.axes[4].axison  # the last of two rows of three
    with pytest.raises(ValueError, match="layer must be from 0 to 2, not 3"):
        heads.plot(3, 0)
    with pytest.raises(ValueError, match="head must be from 0 to 1, not 2"):
        heads.plot(0, 2)
    with pytest.raises(ValueError, match="titles must name at least one"):
        heads.plot_gallery({})


def test_plot_lookup_shows_the_blend():
    keys = [[0.0, 1.0], [1.0, 0.0], [0.0, -1.0]]
    fig = plot_lookup([0.0, 50.0], keys, [5, 12, 25], "NES", unit="°")
    _, bars = fig.axes
    assert title(bars) == "answer: 5.0°"  # a long query takes one value
    fig = plot_lookup([0.0, 0.0], keys, [5, 12, 25], "NES")
    assert title(fig.axes[1]) == "answer: 14.0"  # no direction: the mean
    widths = [bar.get_width() for bar in fig.axes[1].patches]
    assert widths == pytest.approx([1 / 3] * 3)
    with pytest.raises(ValueError, match=r"\(3, 2\)"):
        plot_lookup([0.0, 0.0], keys[:2], [5, 12, 25], "NES")


def test_explorers_make_pictures(monkeypatch, heads):
    shown = []
    monkeypatch.setattr(widgets, "explore", lambda draw, **controls: shown.append((draw, controls)))
    widgets.attention_heads(heads, layer=2, head=1)
    widgets.moving_query([[1.0, 0.0], [0.0, 1.0]], [12, 5], ["east", "north"], unit=" °C")
    assert shown[0][1] == {"layer": (0, 2, 1, 2), "head": (0, 1, 1, 1)}
    assert set(shown[1][1]) == {"angle", "length"}
    for draw, controls in shown:
        drawing = draw(**{name: control[3] for name, control in controls.items()})
        still, told = _explorer.still(drawing)
        assert len(still["image/png"]) > 1000 and len(told["image/png"]["alt"]) > 20
        assert still.get("text/html", "") is not None  # a None here breaks the notebook
