"""Attention from scratch against PyTorch, and read heads against the models' own."""

import math

import pytest
import torch
from helpers import attention, models
from helpers.attention import (
    MultiHeadAttention,
    attention_weights,
    causal_mask,
    merge_heads,
    padding_mask,
    read_heads,
    rotate,
    split_heads,
    tiled_attention,
)
from helpers.course import widgets
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AutoConfig, AutoModelForCausalLM

CLOSE = {"atol": 1e-5, "rtol": 0}


def qkv(heads=6, kv_heads=6, queries=37, keys=37, head_dim=16, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(2, *shape, generator=generator).to(dtype)

    query = draw(heads, queries, head_dim)
    return query, draw(kv_heads, keys, head_dim), draw(kv_heads, keys, head_dim)


# ── masks ────────────────────────────────────────────────────────────────────────────────
def test_causal_mask_square():
    expected = [[True, False, False], [True, True, False], [True, True, True]]
    assert causal_mask(3).tolist() == expected


def test_causal_mask_with_a_cache_puts_queries_last():
    assert causal_mask(2, 4).tolist() == [[True, True, True, False], [True] * 4]
    assert causal_mask(1, 5).all()


@pytest.mark.parametrize("sizes", [(3, 2), (0, 0), (0, 4)])
def test_causal_mask_refuses_blind_queries(sizes):
    with pytest.raises(ValueError, match=f"queries={sizes[0]} and keys={sizes[1]}"):
        causal_mask(*sizes)


def test_padding_mask():
    mask = padding_mask(torch.tensor([[0, 1, 1], [1, 1, 1]]))
    assert mask.shape == (2, 1, 1, 3)
    assert mask[0].flatten().tolist() == [False, True, True]
    with pytest.raises(ValueError, match=r"\(batch, keys\)"):
        padding_mask(torch.ones(3))


# ── against PyTorch ──────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("kv_heads", [6, 3, 2, 1])
@pytest.mark.parametrize("causal", [False, True])
def test_equals_sdpa(kv_heads, causal):
    query, key, value = qkv(kv_heads=kv_heads)
    output, weights = attention.attention(query, key, value, causal=causal)
    expected = scaled_dot_product_attention(query, key, value, is_causal=causal, enable_gqa=True)
    torch.testing.assert_close(output, expected, **CLOSE)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 6, 37))
    if causal:
        assert weights.triu(1).eq(0).all()


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kv_heads", [6, 2])
def test_equals_sdpa_with_padding(side, causal, kv_heads):
    query, key, value = qkv(kv_heads=kv_heads, queries=9, keys=9)
    real = torch.ones(2, 9, dtype=torch.long)
    real[0, slice(0, 4) if side == "left" else slice(5, None)] = 0
    mask = padding_mask(real)
    full_mask = mask & causal_mask(9) if causal else mask
    output, weights = attention.attention(query, key, value, mask=mask, causal=causal)
    expected = scaled_dot_product_attention(query, key, value, attn_mask=full_mask, enable_gqa=True)
    torch.testing.assert_close(output, expected, **CLOSE)
    assert weights[0, ..., real[0] == 0].eq(0).all()


def test_scale_can_be_chosen():
    query, key, value = qkv()
    output, _ = attention.attention(query, key, value, scale=0.5)
    expected = scaled_dot_product_attention(query, key, value, scale=0.5)
    torch.testing.assert_close(output, expected, **CLOSE)
    assert not torch.allclose(output, attention.attention(query, key, value)[0], atol=1e-3)


def test_one_query_from_a_cache():
    query, key, value = qkv(queries=1)
    output, _ = attention.attention(query, key, value, causal=True)
    torch.testing.assert_close(output, scaled_dot_product_attention(query, key, value), **CLOSE)


def test_query_that_may_look_nowhere_gets_zeros_and_finite_gradients():
    query, key, value = (tensor.requires_grad_() for tensor in qkv(queries=4, keys=4))
    mask = padding_mask(torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]]))
    output, weights = attention.attention(query, key, value, mask=mask, causal=True)
    assert output[0, :, :2].eq(0).all()
    assert weights[0, :, :2].eq(0).all()
    output.sum().backward()
    assert all(tensor.grad.isfinite().all() for tensor in (query, key, value))


def test_gradients_equal_sdpa():
    ours = [tensor.requires_grad_() for tensor in qkv(kv_heads=2)]
    theirs = [tensor.detach().clone().requires_grad_() for tensor in ours]
    attention.attention(*ours, causal=True)[0].square().sum().backward()
    expected = scaled_dot_product_attention(*theirs, is_causal=True, enable_gqa=True)
    expected.square().sum().backward()
    for mine, reference in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.grad, reference.grad, atol=1e-4, rtol=1e-5)


def test_plain_matrices_without_heads():
    query, key, value = (tensor[0, 0] for tensor in qkv())
    output, weights = attention.attention(query, key, value)
    torch.testing.assert_close(output, scaled_dot_product_attention(query, key, value))
    assert weights.shape == (37, 37)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_output_keeps_the_dtype(dtype):
    query, key, value = qkv(dtype=dtype)
    output, weights = attention.attention(query, key, value, causal=True)
    assert output.dtype == weights.dtype == dtype
    exact, _ = attention.attention(query.double(), key.double(), value.double(), causal=True)
    assert (output.double() - exact).abs().max() < 8 * torch.finfo(dtype).eps


def test_wrong_input_is_named():
    query, key, value = qkv(heads=6, kv_heads=4)
    with pytest.raises(ValueError, match="6 query heads cannot share 4"):
        attention.attention(query, key, value)
    with pytest.raises(ValueError, match="same number of dimensions"):
        attention_weights(query, key[0])
    with pytest.raises(TypeError, match="padding_mask"):
        attention_weights(query, query, mask=torch.ones(2, 1, 1, 37))


# ── tiles ────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("block_size", [1, 8, 16, 37, 64])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kv_heads", [6, 2])
def test_tiled_equals_sdpa(block_size, causal, kv_heads):
    query, key, value = qkv(kv_heads=kv_heads)
    output = tiled_attention(query, key, value, causal=causal, block_size=block_size)
    expected = scaled_dot_product_attention(query, key, value, is_causal=causal, enable_gqa=True)
    torch.testing.assert_close(output, expected, **CLOSE)


@pytest.mark.parametrize("queries", [1, 5, 16, 33])
def test_tiled_with_a_cache(queries):
    query, key, value = qkv(queries=queries, keys=33)
    output = tiled_attention(query, key, value, causal=True, block_size=8)
    mask = causal_mask(queries, 33)
    expected = scaled_dot_product_attention(query, key, value, attn_mask=mask)
    torch.testing.assert_close(output, expected, **CLOSE)


def test_tiled_survives_scores_that_overflow_a_naive_softmax():
    query, key, value = qkv()
    output = tiled_attention(query * 100, key * 100, value, causal=True, block_size=8)
    expected = scaled_dot_product_attention(query * 100, key * 100, value, is_causal=True)
    assert (query * 100 @ key.transpose(-2, -1) * 100 / 4).max() > 88  # exp() would be inf
    torch.testing.assert_close(output, expected, atol=1e-4, rtol=0)


def test_tiled_has_gradients():
    ours = [tensor.requires_grad_() for tensor in qkv(kv_heads=2)]
    theirs = [tensor.detach().clone().requires_grad_() for tensor in ours]
    tiled_attention(*ours, causal=True, block_size=8).square().sum().backward()
    expected = scaled_dot_product_attention(*theirs, is_causal=True, enable_gqa=True)
    expected.square().sum().backward()
    for mine, reference in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.grad, reference.grad, atol=1e-4, rtol=1e-5)


def test_tiled_never_makes_a_matrix_of_all_scores(monkeypatch):
    largest = 0
    plain = torch.Tensor.__matmul__

    def watched(left, right):
        nonlocal largest
        product = plain(left, right)
        largest = max(largest, product.shape[-2] * product.shape[-1])
        return product

    monkeypatch.setattr(torch.Tensor, "__matmul__", watched)
    tiled_attention(*qkv(queries=256, keys=256), block_size=32)
    assert 0 < largest <= 32 * 32


def test_tiled_refuses():
    query, key, value = qkv(queries=5, keys=3)
    with pytest.raises(ValueError, match="queries=5 and keys=3"):
        tiled_attention(query, key, value, causal=True)
    with pytest.raises(ValueError, match="block_size"):
        tiled_attention(query, key, value, block_size=0)


# ── heads ────────────────────────────────────────────────────────────────────────────────
def test_split_and_merge_are_each_others_way_back():
    hidden = torch.arange(2 * 3 * 12.0).reshape(2, 3, 12)
    parts = split_heads(hidden, 4)
    assert parts.shape == (2, 4, 3, 3)
    assert parts[0, 1, 0].tolist() == hidden[0, 0, 3:6].tolist()
    assert merge_heads(parts).equal(hidden)
    with pytest.raises(ValueError, match="5 heads"):
        split_heads(hidden, 5)


def test_multi_head_equals_torch():
    torch.manual_seed(0)
    ours = MultiHeadAttention(24, 4, bias=True)
    theirs = nn.MultiheadAttention(24, 4, batch_first=True)
    with torch.no_grad():
        for part, projection in zip(
            theirs.in_proj_weight.chunk(3),
            (ours.q_proj, ours.k_proj, ours.v_proj),
            strict=True,
        ):
            projection.weight.copy_(part)
            projection.bias.zero_()
        theirs.in_proj_bias.zero_()
        ours.o_proj.load_state_dict(theirs.out_proj.state_dict())
    hidden = torch.randn(2, 7, 24)
    output, weights = ours(hidden)
    expected, expected_weights = theirs(
        hidden, hidden, hidden, attn_mask=~causal_mask(7), average_attn_weights=False
    )
    torch.testing.assert_close(output, expected, **CLOSE)
    torch.testing.assert_close(weights, expected_weights, **CLOSE)


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


@pytest.mark.parametrize("family", attention.FAMILIES)
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
    with pytest.raises(ValueError, match=r"llama.*not of 'gpt2'.*output_attentions"):
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


def test_rotate_keeps_lengths_and_depends_on_distance_only():
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 1, 1, 1, 8, generator=generator)
    frequency = 0.3 ** torch.arange(4)

    def at(vector, position):
        angle = (position * frequency).repeat(2)[None, None]
        return rotate(vector, angle.cos(), angle.sin())

    torch.testing.assert_close(at(query, 5).norm(), query.norm())
    near = (at(query, 7) * at(key, 4)).sum()
    torch.testing.assert_close((at(query, 103) * at(key, 100)).sum(), near, **CLOSE)
    assert not torch.allclose((at(query, 7) * at(key, 2)).sum(), near, atol=1e-3)


# ── pictures ─────────────────────────────────────────────────────────────────────────────
def title(ax):
    return ax.get_title("left") or ax.get_title()


@pytest.fixture
def heads():
    weights = torch.rand(3, 2, 4, 4, generator=torch.Generator().manual_seed(0)).tril()
    weights = weights / weights.sum(-1, keepdim=True)
    return attention.Heads(["The", " old", " door", "\n"], weights)


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
    fig = heads.gallery({(0, 0): "a", (1, 1): "b", (2, 0): "c", (2, 1): "d"})
    assert [title(ax) for ax in fig.axes[:4]] == ["a", "b", "c", "d"]
    with pytest.raises(ValueError, match=r"no layer 3, head 0.*0 to 2.*0 to 1"):
        heads.plot(3, 0)


def test_plot_lookup_shows_the_blend():
    keys = [[0.0, 1.0], [1.0, 0.0], [0.0, -1.0]]
    fig = attention.plot_lookup([0.0, 50.0], keys, [5, 12, 25], "NES", unit="°")
    _, bars = fig.axes
    assert title(bars) == "answer: 5.0°"  # a long query takes one value
    fig = attention.plot_lookup([0.0, 0.0], keys, [5, 12, 25], "NES")
    assert title(fig.axes[1]) == "answer: 14.0"  # no direction: the mean
    widths = [bar.get_width() for bar in fig.axes[1].patches]
    assert widths == pytest.approx([1 / 3] * 3)
    with pytest.raises(ValueError, match=r"\(3, 2\)"):
        attention.plot_lookup([0.0, 0.0], keys[:2], [5, 12, 25], "NES")


def test_explorers_make_pictures(monkeypatch, heads):
    shown = []
    monkeypatch.setattr(widgets, "explore", lambda draw, **controls: shown.append((draw, controls)))
    widgets.attention_heads(heads, layer=2, head=1)
    widgets.moving_query([[1.0, 0.0], [0.0, 1.0]], [12, 5], ["east", "north"], unit=" °C")
    assert shown[0][1] == {"layer": (0, 2, 1, 2), "head": (0, 1, 1, 1)}
    assert set(shown[1][1]) == {"angle", "length"}
    for draw, controls in shown:
        still = widgets._still(draw(**{name: control[3] for name, control in controls.items()}))
        assert len(still["image/png"]) > 1000
        assert still.get("text/html", "") is not None  # a None here breaks the notebook
