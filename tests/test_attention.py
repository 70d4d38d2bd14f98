"""Attention from scratch against PyTorch."""

import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from helpers import attention
from helpers.attention import (
    MultiHeadAttention,
    attention_weights,
    causal_mask,
    merge_heads,
    padding_mask,
    rotate,
    split_heads,
    tiled_attention,
)

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
    output = attention_weights(query, key, scale=0.5) @ value
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


def test_sizes_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="hidden_size=10 is not a multiple of heads=3"):
        MultiHeadAttention(10, 3)


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
