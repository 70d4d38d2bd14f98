"""Padding, flattening and packing, looked at (helpers.chat.batches)."""

import functools

import pytest
import torch

from helpers import chat, models
from helpers.chat import batches

LENGTHS = (20, 63, 9, 90, 31)


@functools.cache
def tokenizer():
    prepared = chat.prepare_tokenizer(models.load_tokenizer(models.EMBEDDED))
    prepared.chat_template = chat.chatml_template()
    return prepared


@functools.cache
def model(attention="sdpa"):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=200,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        attn_implementation=attention,
    )
    return LlamaForCausalLM(config)


def rows():
    """Rows of known lengths; the prompt's first half is not trained."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for length in LENGTHS:
        ids = torch.randint(20, 200, (length,), generator=generator).tolist()
        made.append({"input_ids": ids, "labels": [-100] * (length // 2) + ids[length // 2 :]})
    return made


def layouts(max_length=64):
    return {
        s: batches.lay_out(rows(), tokenizer(), s, max_length=max_length)
        for s in batches.STRATEGIES
    }


@pytest.mark.parametrize("strategy", batches.STRATEGIES)
def test_every_token_is_traced_to_its_sample(strategy):
    layout = layouts()[strategy]
    ids = layout.batch["input_ids"]
    assert ids.shape == layout.samples.shape
    for number, row in enumerate(rows()):
        mine = ids[layout.samples == number].tolist()
        assert mine == row["input_ids"][: len(mine)] or strategy == "packing: bfd_split"
        assert sorted(mine) == sorted(row["input_ids"][: len(mine)])
    assert (ids[layout.samples == batches.PADDING] == tokenizer().pad_token_id).all()
    assert (layout.batch["labels"][layout.samples == batches.PADDING] == -100).all()
    assert layout.lost == sum(LENGTHS) - int((layout.samples >= 0).sum())


def test_what_each_strategy_costs():
    found = {s: (tuple(x.samples.shape), x.lost, x.cut) for s, x in layouts().items()}
    assert found == {
        "padding (TRL)": ((5, 64), 26, 1),
        "padding (transformers, mlm=False)": ((5, 64), 26, 1),
        "flattening (transformers)": ((1, 213), 0, 0),
        "padding-free (TRL)": ((1, 213), 0, 0),
        "packing: wrapped": ((4, 64), 0, 3),
        "packing: bfd": ((1, 187), 26, 1),
        "packing: bfd_split": ((1, 213), 0, 1),
    }
    assert layouts()["padding (TRL)"].padding == pytest.approx(1 - 187 / 320)
    assert layouts()["padding-free (TRL)"].padding == 0


def test_the_transformers_collator_drops_our_labels():
    """Why completion-only loss needs another collator: it trains every prompt."""
    ours, theirs = (layouts()[f"padding ({name})"] for name in ("TRL", "transformers, mlm=False"))
    real = ours.samples != batches.PADDING
    assert (theirs.batch["labels"] == theirs.batch["input_ids"])[real].all()
    assert (ours.batch["labels"] == -100)[real].any()


def test_left_padding_is_traced_too():
    import copy

    left = copy.deepcopy(tokenizer())
    left.padding_side = "left"
    layout = batches.lay_out(rows(), left, "padding (transformers, mlm=False)")
    assert layout.samples[0].tolist() == [batches.PADDING] * 44 + [0] * 20
    assert layout.batch["attention_mask"][0].tolist() == [0] * 44 + [1] * 20


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_only_wrapped_packing_lets_samples_see_each_other(attention):
    for strategy, layout in layouts().items():
        change = batches.leak(model(attention), layout)
        if strategy == "packing: wrapped":
            assert change > 1e-2
        else:
            assert change < 1e-5, strategy


@pytest.mark.parametrize("strategy", ["flattening (transformers)", "packing: bfd"])
def test_without_position_ids_packing_leaks(strategy):
    layout = layouts()[strategy]
    del layout.batch["position_ids"]
    assert batches.leak(model(), layout) > 1e-2


def test_an_attention_mask_of_ones_switches_the_separation_off():
    layout = layouts()["packing: bfd"]
    layout.batch["attention_mask"] = torch.ones_like(layout.batch["input_ids"])
    assert batches.leak(model(), layout) > 1e-2


def test_the_probe_leaves_the_model_as_it_was():
    probed = model().train()
    batches.leak(probed, layouts()["padding (TRL)"])
    assert probed.training and all(p.grad is None for p in probed.parameters())
    probed.eval()


def test_the_table_and_the_picture():
    from matplotlib.figure import Figure

    table = batches.compare(rows(), tokenizer(), model=model())
    assert list(table.index) == list(batches.STRATEGIES)
    assert table["crosses samples"].tolist() == ["no"] * 4 + ["yes", "no", "no"]
    assert table.loc["packing: wrapped", "boundaries in"] == "nowhere"
    assert "crosses samples" not in batches.compare(rows(), tokenizer())
    assert isinstance(batches.plot(list(layouts().values())), Figure)


def test_wrong_input_says_what_to_do():
    import copy

    with pytest.raises(ValueError, match="strategy must be one of 'padding"):
        batches.lay_out(rows(), tokenizer(), "magic")
    with pytest.raises(ValueError, match="no row may be empty"):
        batches.lay_out([{"input_ids": []}], tokenizer(), "padding (TRL)")
    with pytest.raises(ValueError, match="at least two rows"):
        batches.leak(model(), batches.lay_out(rows()[:1], tokenizer(), "padding (TRL)"))
    bare = copy.deepcopy(tokenizer())
    bare.pad_token = None
    with pytest.raises(ValueError, match="prepare_tokenizer"):
        batches.lay_out(rows(), bare, "padding (TRL)")
