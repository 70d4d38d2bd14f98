import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers.rounding import BFloat16AdamW, stochastic_round


def neighbors(value):
    """The bfloat16 numbers on both sides of a float32."""
    exact = torch.tensor(value, dtype=torch.float32)
    toward_zero = (exact.view(torch.int32) >> 16 << 16).view(torch.float32)
    away = ((exact.view(torch.int32) >> 16) + 1 << 16).view(torch.float32)
    return toward_zero.item(), away.item()


@given(st.floats(-(2.0**126), 2.0**126, width=32))
def test_only_the_two_neighbors_are_drawn(value):
    drawn = set(stochastic_round(torch.full((64,), value)).float().tolist())
    exact = torch.tensor(value, dtype=torch.float32)
    if exact.to(torch.bfloat16).float() == exact:
        assert drawn == {exact.item()}
    else:
        assert drawn <= set(neighbors(value))


@pytest.mark.parametrize("value", [1.001, -1.001, 3e-5, -2.7e30, 0.1, 1e-39])
def test_it_is_right_on_average(value):
    low, high = neighbors(value)
    exact = torch.tensor(value, dtype=torch.float32).item()
    generator = torch.Generator().manual_seed(0)
    drawn = stochastic_round(torch.full((200_000,), value), generator=generator).double()
    share = (drawn == high).double().mean().item()
    assert share == pytest.approx((exact - low) / (high - low), abs=0.006)


def test_special_values_stay():
    special = torch.tensor([float("inf"), -float("inf"), float("nan"), 0.0, -0.0, 1.0])
    rounded = stochastic_round(special)
    assert rounded.dtype == torch.bfloat16
    assert torch.equal(rounded.float().nan_to_num(7), special.nan_to_num(7))
    assert rounded[4].signbit()


def test_shapes_strides_and_the_generator():
    values = torch.randn(8, 6).T
    one, two = (stochastic_round(values, generator=torch.Generator().manual_seed(3)) for _ in "ab")
    assert one.shape == (6, 8) and torch.equal(one, two)
    state = torch.get_rng_state()
    stochastic_round(values, generator=torch.Generator())
    assert torch.equal(state, torch.get_rng_state())
    assert stochastic_round(torch.tensor(2.5)).shape == ()
    assert stochastic_round(torch.ones(3, dtype=torch.float64)).tolist() == [1, 1, 1]


def test_the_optimizer_repeats_itself_and_leaves_the_global_draws_alone():
    def trained():
        weight = torch.nn.Parameter(torch.ones(1000, dtype=torch.bfloat16))
        optimizer = BFloat16AdamW([weight], lr=1e-3)
        weight.grad = torch.ones_like(weight)
        optimizer.step()
        return weight.detach()

    state = torch.get_rng_state()
    one, two = trained(), trained()
    assert torch.equal(one, two) and len(one.unique()) == 2
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("bad", [1.5, torch.ones(2, dtype=torch.int64)])
def test_bad_input_is_named(bad):
    with pytest.raises(TypeError, match="values"):
        stochastic_round(bad)
    with pytest.raises(ValueError, match="rounding"):
        BFloat16AdamW([torch.nn.Parameter(torch.ones(1))], rounding="up")


def train(dtype, optimizer, steps=300):
    """A small regression, from far away, with small steps; the distance that is left."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(256, 32, generator=generator)
    wanted = torch.randn(32, 8, generator=generator)
    weight = torch.nn.Parameter(torch.ones(32, 8, dtype=dtype))
    optimizer = optimizer([weight])
    for _ in range(steps):
        loss = ((inputs @ weight.float() - inputs @ wanted) ** 2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item()


def test_small_updates_survive_only_with_stochastic_rounding():
    lr = 1.5e-3  # less than half the distance of bfloat16 numbers around one
    exact = train(torch.float32, lambda p: torch.optim.AdamW(p, lr, weight_decay=0))
    stuck = train(torch.bfloat16, lambda p: BFloat16AdamW(p, lr, rounding="nearest"))
    alive = train(torch.bfloat16, lambda p: BFloat16AdamW(p, lr))
    start = train(torch.float32, lambda p: torch.optim.AdamW(p, lr), steps=1)
    assert exact < 0.8 * start
    assert alive == pytest.approx(exact, rel=0.1)
    assert stuck > exact + 0.25 * (start - exact)


def test_the_arithmetic_is_adamws():
    torch.manual_seed(0)
    exact = torch.nn.Parameter(torch.randn(64))
    rough = torch.nn.Parameter(exact.detach().to(torch.bfloat16))
    ours = BFloat16AdamW([rough], lr=0.05, weight_decay=0.1, rounding="nearest")
    theirs = torch.optim.AdamW([exact], lr=0.05, weight_decay=0.1)
    for _ in range(20):
        for weight, optimizer in ((rough, ours), (exact, theirs)):
            optimizer.zero_grad()
            (weight.float() ** 2).sum().backward()
            optimizer.step()
    assert torch.allclose(rough.float(), exact, atol=0.03)


def test_a_closure_is_called():
    weight = torch.nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
    optimizer = BFloat16AdamW([weight], lr=0.5)

    def closure():
        loss = (weight.float() ** 2).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 2
    assert (weight < 1).any()
