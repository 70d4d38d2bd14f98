"""Padding, flattening and packing, looked at (helpers.chat.batches)."""

import functools
from dataclasses import replace

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


@functools.cache
def _layouts(max_length):
    return {
        s: batches.lay_out(rows(), tokenizer(), s, max_length=max_length)
        for s in batches.STRATEGIES
    }


def layouts(max_length=64):
    """Made once; each with a batch of its own, which a test may change."""
    made = _layouts(max_length)
    return {name: replace(layout, batch=dict(layout.batch)) for name, layout in made.items()}


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
        "flattening (transformers)": ((1, 213), 0, 0),
        "padding-free (TRL)": ((1, 213), 0, 0),
        "packing: wrapped": ((4, 64), 0, 3),
        "packing: bfd": ((1, 187), 26, 1),
        "packing: bfd_split": ((1, 213), 0, 1),
    }
    assert layouts()["padding (TRL)"].padding == pytest.approx(1 - 187 / 320)
    assert layouts()["padding-free (TRL)"].padding == 0


def test_the_transformers_collator_stops_at_our_labels_or_replaces_them():
    """Chapter 4, section 6: loud with different lengths, silent with equal ones."""
    from transformers import DataCollatorForLanguageModeling

    theirs = DataCollatorForLanguageModeling(tokenizer(), mlm=False)
    with pytest.raises(ValueError, match="Unable to create tensor"):
        theirs([dict(row) for row in rows()[:2]])
    batch = theirs([dict(rows()[0]), dict(rows()[0])])
    assert -100 in rows()[0]["labels"] and torch.equal(batch["labels"], batch["input_ids"])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_only_wrapped_packing_lets_samples_see_each_other(attention):
    for strategy, layout in layouts().items():
        change = batches.leak(model(attention), layout)
        if strategy == "packing: wrapped":
            assert change > 1e-2
        else:
            assert change < 1e-5, strategy


@pytest.mark.parametrize(
    ("kind", "safe"),
    [(kind, False) for kind in ("opt", "falcon", "mpt", "bloom")]
    + [(kind, True) for kind in ("phi3", "llama", "qwen2", "qwen3", "mistral", "gemma")]
    + [(kind, True) for kind in ("gemma3_text", "gpt2", "gpt_neox")],
)
def test_which_architectures_look_for_restarts(kind, safe):
    """Chapter 4's table. A change here is news for readers: change the chapter's words too."""
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"vocab_size": 200, "hidden_size": 16, "intermediate_size": 32, "ffn_dim": 32}
    sizes |= {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    sizes |= {"word_embed_proj_dim": 16, "max_position_embeddings": 256, "pad_token_id": 16}
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **sizes, bos_token_id=1, eos_token_id=2)
    asked, made = AutoModelForCausalLM.from_config(config), layouts()
    assert batches.leak(asked, made["padding (TRL)"]) < 1e-6
    assert batches.leak(asked, made["packing: wrapped"]) > 1e-4
    assert (batches.leak(asked, made["packing: bfd"]) < 1e-6) == safe


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
    assert table["crosses samples"].tolist() == ["no"] * 3 + ["yes", "no", "no"]
    assert table.loc["packing: wrapped", "boundaries in"] == "nowhere"
    assert "crosses samples" not in batches.compare(rows(), tokenizer())
    fig = batches.plot([*layouts().values(), layouts()["packing: bfd"]])
    assert isinstance(fig, Figure)
    free = fig.axes[list(layouts()).index("padding-free (TRL)")]
    assert [text.get_text() for text in free.texts] == list("01234")
    image = free.images[0]
    assert image.get_interpolation() == "nearest", "or neighboring rows run into each other"
    assert image.cmap.N > 9, "nine samples in nine colors"
    shown = free.get_xlim()[1] - free.get_xlim()[0]
    assert shown == sum(LENGTHS), "a narrower picture below would cut the long rows off"


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
