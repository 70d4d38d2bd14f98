"""LoRA from scratch against PEFT, target modules on eight architectures, and the alarms."""

import copy
import functools
import math
import tempfile
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import Linear as PeftLinear
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

from helpers import lora
from helpers.lora import LoRALinear, check_training, count_trainable, find_target_modules

TINY = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ARCHITECTURES = {
    "llama": {"num_key_value_heads": 1},
    "phi3": {},
    "opt": {"ffn_dim": 32, "word_embed_proj_dim": 8, "max_position_embeddings": 64},
    "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64},
    "gpt_neox": {},
    "falcon": {},
    "gemma": {"head_dim": 8},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
}
ATTENTION = {
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "phi3": ["o_proj", "qkv_proj"],
    "opt": ["k_proj", "v_proj", "q_proj", "out_proj"],
    "gpt2": ["c_attn", "attn.c_proj"],
    "gpt_neox": ["query_key_value", "dense"],
    "falcon": ["query_key_value", "dense"],
    "gemma": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "qwen2": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "qwen3": ["q_proj", "k_proj", "v_proj", "o_proj"],
}


def tiny(kind="llama", **changes):
    settings = {} if kind == "gpt2" else dict(TINY)
    settings |= {"vocab_size": 64, **ARCHITECTURES[kind], **changes}
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings))


def adapted(model):
    """The names of the layers PEFT has wrapped."""
    return {n for n, m in model.named_modules() if isinstance(m, LoraLayer)}


# ── LoRALinear ───────────────────────────────────────────────────────────────────────────
@st.composite
def layers(draw):
    inputs, outputs = draw(st.integers(1, 24)), draw(st.integers(1, 24))
    return {
        "inputs": inputs,
        "outputs": outputs,
        "rank": draw(st.integers(1, min(inputs, outputs))),
        "alpha": draw(st.sampled_from([1, 8, 16, 0.5])),
        "bias": draw(st.booleans()),
        "dropout": draw(st.sampled_from([0.0, 0.05, 0.5])),
        "rslora": draw(st.booleans()),
        "shape": draw(st.sampled_from([(), (3,), (2, 5)])),
        "seed": draw(st.integers(0, 2**16)),
    }


def make_pair(inputs, outputs, rank, alpha, bias, dropout, rslora, shape, seed):
    """Ours and PEFT's layer with the same base, A and (nonzero) B, and one input."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        base = nn.Linear(inputs, outputs, bias=bias)
        ours = LoRALinear(copy.deepcopy(base), rank, alpha, dropout, rslora=rslora)
        config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, use_rslora=rslora)
        theirs = PeftLinear(base, "default", config=config, r=rank, lora_alpha=alpha)
        ours.lora_B.weight.data.normal_()
        theirs.lora_A["default"].weight.data.copy_(ours.lora_A.weight)
        theirs.lora_B["default"].weight.data.copy_(ours.lora_B.weight)
        return ours, theirs, torch.randn(*shape, inputs)


@settings(max_examples=60, deadline=None)
@given(layers(), st.booleans())
def test_layer_equals_peft_in_output_and_gradients(layer, training):
    ours, theirs, x = make_pair(**layer)
    inputs, outputs = [x.clone().requires_grad_() for _ in range(2)], []
    for module, tensor in zip((ours, theirs), inputs, strict=True):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)  # the same dropout mask for both
            outputs.append(module.train(training)(tensor))
        # The mean keeps gradients near 1, so that 1e-6 is a fair absolute tolerance.
        outputs[-1].square().mean().div(1 + x.square().mean() * layer["alpha"]).backward()
    torch.testing.assert_close(*outputs, atol=1e-6, rtol=1e-5)
    pairs = [
        (ours.lora_A.weight.grad, theirs.lora_A["default"].weight.grad),
        (ours.lora_B.weight.grad, theirs.lora_B["default"].weight.grad),
        (inputs[0].grad, inputs[1].grad),
    ]
    for mine, reference in pairs:
        torch.testing.assert_close(mine, reference, atol=1e-6, rtol=1e-5)
    assert ours.base.weight.grad is None


@settings(max_examples=60, deadline=None)
@given(layers())
def test_merged_equals_unmerged_and_merge_can_be_undone(layer):
    ours, theirs, x = make_pair(**layer)
    ours.eval(), theirs.eval()
    before, weight = ours(x), ours.base.weight.clone()
    assert ours.merge() is ours and ours.merged
    scale = max(1.0, float(before.detach().abs().max()))
    assert (ours(x) - before).abs().max() <= 1e-5 * scale
    theirs.merge()
    torch.testing.assert_close(ours.base.weight, theirs.base_layer.weight)
    ours.unmerge()
    largest = float(weight.abs().max() + ours.delta().detach().abs().max())
    assert (ours.base.weight - weight).abs().max() <= 4e-7 * largest
    torch.testing.assert_close(ours(x), before)


def test_first_output_is_the_base_and_only_the_detour_trains():
    base = nn.Linear(7, 5)
    layer, x = LoRALinear(base, rank=3, alpha=6), torch.randn(2, 7)
    assert torch.equal(layer(x), base(x))
    assert layer.scaling == 2 and layer.delta().shape == (5, 7)
    trained = {name for name, p in layer.named_parameters() if p.requires_grad}
    assert trained == {"lora_A.weight", "lora_B.weight"}
    assert LoRALinear(nn.Linear(9, 9), 4, 8, rslora=True).scaling == 4
    assert "scaling=2" in repr(layer)


def test_initial_a_is_distributed_like_pefts():
    a = LoRALinear(nn.Linear(400, 300), rank=64).lora_A.weight.detach()
    assert a.abs().max() <= 1 / math.sqrt(400)
    assert a.std() == pytest.approx(1 / math.sqrt(3 * 400), rel=0.05)


def test_merging_twice_changes_nothing_and_merged_layers_give_no_gradient():
    layer = LoRALinear(nn.Linear(4, 4), rank=2)
    layer.lora_B.weight.data.normal_()
    once = layer.merge().base.weight.clone()
    assert torch.equal(layer.merge().base.weight, once)
    assert not layer(torch.randn(1, 4)).requires_grad
    layer.unmerge()
    unmerged = layer.base.weight.clone()
    assert torch.equal(layer.unmerge().base.weight, unmerged)


def test_half_precision_base_keeps_its_dtype_and_a_float32_adapter():
    layer = LoRALinear(nn.Linear(8, 8).bfloat16(), rank=2)
    layer.lora_B.weight.data.normal_()
    assert layer.lora_A.weight.dtype == torch.float32
    assert layer(torch.randn(3, 8).bfloat16()).dtype == torch.bfloat16
    assert layer.merge().base.weight.dtype == torch.bfloat16


def test_quantized_base_runs_trains_and_refuses_to_merge():
    import bitsandbytes as bnb

    base = bnb.nn.Linear4bit(64, 64, quant_type="nf4", compute_dtype=torch.float32)
    layer = LoRALinear(base.to("cpu"), rank=2)
    x = torch.randn(3, 64)
    assert torch.equal(layer(x), base(x))
    layer(x).sum().backward()
    assert layer.lora_B.weight.grad.abs().sum() > 0
    with pytest.raises(TypeError, match="dequantize"):
        layer.merge()
    assert not layer.merged


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"base": nn.Conv1d(3, 3, 1)}, TypeError, "base must be an nn.Linear, not Conv1d"),
        ({"rank": 0}, ValueError, "rank must be"),
        ({"rank": 2.5}, TypeError, "rank must be"),
        ({"rank": True}, TypeError, "rank must be"),
        ({"alpha": 0}, ValueError, "alpha must be"),
        ({"alpha": math.nan}, ValueError, "alpha must be"),
        ({"dropout": 1.0}, ValueError, "dropout must be"),
    ],
)
def test_impossible_layers_are_refused(arguments, error, words):
    with pytest.raises(error, match=words):
        LoRALinear(**{"base": nn.Linear(3, 3), **arguments})


# ── find_target_modules ──────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_targets_are_what_all_linear_adapts(kind):
    reference = adapted(get_peft_model(tiny(kind), LoraConfig(target_modules="all-linear")))
    targets = find_target_modules(tiny(kind))
    mine = adapted(get_peft_model(tiny(kind), LoraConfig(target_modules=targets)))
    assert mine == reference and mine
    assert not any(name.endswith(("lm_head", "embed_out")) for name in mine)
    assert all(target.count(".") == 0 for target in targets)  # short names suffice here


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_attention_only_adapts_every_attention_layer_and_nothing_else(kind):
    targets = find_target_modules(tiny(kind), attention_only=True)
    assert sorted(targets) == sorted(ATTENTION[kind])
    mine = adapted(get_peft_model(tiny(kind), LoraConfig(target_modules=targets)))
    everything = adapted(get_peft_model(tiny(kind), LoraConfig(target_modules="all-linear")))
    inside = {name for name in everything if "attn" in name or "attention" in name}
    assert mine == inside and mine < everything


def test_names_grow_until_they_match_nothing_else():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.mixer = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
            self.norm = nn.Sequential(nn.LayerNorm(4))

    model = nn.ModuleDict({"one": Block(), "two": Block()})
    # '0' alone would also match norm.0, which LoRA cannot adapt; '2' is unambiguous.
    assert find_target_modules(model) == ["mixer.0", "2"]
    reference = adapted(
        get_peft_model(copy.deepcopy(model), LoraConfig(target_modules="all-linear"))
    )
    assert adapted(get_peft_model(model, LoraConfig(target_modules=["mixer.0", "2"]))) == reference


def test_targets_of_quantized_meta_and_already_adapted_models():
    expected = find_target_modules(tiny())
    with torch.device("meta"):
        assert find_target_modules(tiny()) == expected
    model = get_peft_model(tiny(), LoraConfig(target_modules=["q_proj", "lm_head"]))
    assert find_target_modules(model) == expected
    assert find_target_modules(quantized_tiny()) == expected


def test_models_without_anything_to_adapt_are_refused_clearly():
    with pytest.raises(TypeError, match=r"model must be a torch module.*LlamaConfig"):
        find_target_modules(tiny().config)
    with pytest.raises(TypeError, match="not str"):
        find_target_modules("llama")
    with pytest.raises(ValueError, match=r"no linear layers.*holds nothing"):
        find_target_modules(nn.Module())
    with pytest.raises(ValueError, match="Conv2d × 2"):
        find_target_modules(nn.Sequential(nn.Conv2d(1, 1, 1), nn.Conv2d(1, 1, 1)))
    with pytest.raises(ValueError, match="leave attention_only off"):
        find_target_modules(nn.Sequential(nn.Linear(2, 2)), attention_only=True)


# ── count_trainable ──────────────────────────────────────────────────────────────────────
CONFIGS = {
    "default": {},
    "rank 16, q and v": {"r": 16, "target_modules": ["q_proj", "v_proj"]},
    "all-linear": {"target_modules": "all-linear"},
    "regex": {"target_modules": r".*\.mlp\.(up|down)_proj"},
    "excluded": {"target_modules": "all-linear", "exclude_modules": ["down_proj"]},
    "one layer": {"target_modules": ["q_proj"], "layers_to_transform": [1]},
    "rank pattern": {"target_modules": "all-linear", "rank_pattern": {"down_proj": 2}},
    "rslora": {"use_rslora": True, "r": 4},
    "dora": {"use_dora": True, "target_modules": "all-linear"},
    "biases": {"bias": "all", "target_modules": ["q_proj"]},
    "biases of adapted layers": {"bias": "lora_only", "target_modules": ["q_proj"]},
    "embedding adapted": {"target_modules": ["q_proj", "embed_tokens"]},
    "embedding and head saved": {
        "target_modules": "all-linear",
        "modules_to_save": ["embed_tokens", "lm_head"],
    },
    "input norms saved": {"modules_to_save": ["input_layernorm"]},
    "every norm saved": {"modules_to_save": ["norm"]},  # matches all '...norm'
    "head adapted": {"target_modules": ["q_proj", "lm_head"]},
    "three tokens": {"trainable_token_indices": [1, 2, 5]},
    "tokens of one embedding": {"trainable_token_indices": {"embed_tokens": [1, 5]}},
    "a bias in B": {"lora_bias": True},
    "layers twice": {"layer_replication": [(0, 2), (1, 2)]},
}


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("name", CONFIGS)
def test_counts_equal_pefts(name, tied):
    kind = "qwen2" if "biases" in name else "llama"  # Qwen2 has biases on q, k, v
    config = LoraConfig(**CONFIGS[name])
    predicted = count_trainable(tiny(kind, tie_word_embeddings=tied), config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's advice about tied embeddings
        model = get_peft_model(tiny(kind, tie_word_embeddings=tied), config)
    assert predicted == model.get_nb_trainable_parameters()[0]
    assert lora.parameter_report(model).trainable == predicted


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_counts_equal_pefts_on_every_architecture(kind):
    for settings_ in (
        {"target_modules": "all-linear"},
        {"target_modules": ATTENTION[kind]},
    ):
        config = LoraConfig(r=3, **settings_)
        with torch.device("meta"):
            predicted = count_trainable(tiny(kind), config)
        assert config.target_modules == LoraConfig(r=3, **settings_).target_modules
        model = get_peft_model(tiny(kind), config)
        assert predicted == model.get_nb_trainable_parameters()[0]


def test_counts_on_a_quantized_model():
    config = LoraConfig(target_modules="all-linear", modules_to_save=["lm_head"])
    predicted = count_trainable(quantized_tiny(), config)
    model = get_peft_model(prepared(quantized_tiny()), config)
    assert predicted == model.get_nb_trainable_parameters()[0]


def test_counting_leaves_the_model_and_the_config_alone():
    model, config = tiny(tie_word_embeddings=True), LoraConfig(target_modules="all-linear")
    before = {name: (id(p), p.device, p.requires_grad) for name, p in model.named_parameters()}
    fields = copy.deepcopy(config.to_dict())
    count_trainable(model, config)
    assert config.to_dict() == fields
    assert before == {n: (id(p), p.device, p.requires_grad) for n, p in model.named_parameters()}
    assert not adapted(model)


def test_targets_that_match_nothing_are_refused_by_name():
    with pytest.raises(ValueError, match="target_modules"):
        count_trainable(tiny("phi3"), LoraConfig())  # PEFT knows no default for it
    with pytest.raises(ValueError, match=r"[Tt]arget modules .*query.* not found"):
        count_trainable(tiny(), LoraConfig(target_modules=["query"]))
    with pytest.raises(ValueError, match=r"(?s)LlamaMLP.* not supported"):
        count_trainable(tiny(), LoraConfig(target_modules=["mlp"]))


# ── parameter_report ─────────────────────────────────────────────────────────────────────
def test_report_counts_each_parameter_once_and_fits_a_screen():
    model = tiny(tie_word_embeddings=True)
    report = lora.parameter_report(model)
    assert report.parameters == report.trainable == model.num_parameters()
    assert report.bytes == 4 * model.num_parameters()
    assert list(report.table().index) == ["embedding", "attention", "feed-forward", "norm"]
    model = get_peft_model(model, LoraConfig(target_modules="all-linear"))
    for name in "BCDEFGHIJKLM":
        model.add_adapter(name, LoraConfig(target_modules="all-linear"))
    report = lora.parameter_report(model)
    assert len(report.table()) == 20 and "all other kinds" in str(report)
    assert report.parameters == sum(p.numel() for p in model.parameters())
    assert "<table" in report._repr_html_()
    with pytest.raises(TypeError, match="model must be"):
        lora.parameter_report({})


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_report_knows_the_kinds_of_every_architecture(kind):
    kinds = list(lora.parameter_report(tiny(kind, tie_word_embeddings=False)).table().index)
    expected = ["embedding", "attention", "feed-forward", "norm", "output head"]
    assert sorted(kinds) == sorted(expected + ["other"] * (kind == "opt"))


def test_report_sees_through_the_packing_of_4_bit_weights():
    model = quantized_tiny()
    report = lora.parameter_report(model)
    assert report.parameters == tiny("llama", **QUANTIZABLE).num_parameters()
    assert report.table().loc["attention", "dtypes"] == "nf4 (in uint8)"
    attention = report.table().loc["attention"]
    assert attention["bytes"] * 2 == attention["parameters"]
    head = model.get_output_embeddings().weight
    assert report.table().loc["output head", "bytes"] == head.numel() * 4


# ── merge_error ──────────────────────────────────────────────────────────────────────────
def trained(model, std=0.02):
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=std)
    return model


def test_merge_error_is_the_error_of_a_real_merge():
    model = trained(
        get_peft_model(prepared(quantized_tiny()), LoraConfig(r=4, target_modules=["q_proj"]))
    )
    table = lora.merge_error(model, into=("nf4", "float32"))
    from peft.utils.integrations import dequantize_module_weight

    exact, update = [], []
    layers = [m for m in model.modules() if isinstance(m, LoraLayer)]
    for layer in layers:
        update.append(layer.get_delta_weight("default").detach())
        exact.append(dequantize_module_weight(layer.base_layer).float() + update[-1])
    assert table.loc["q_proj", "layers"] == len(layers)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT warns of just this rounding
        model.merge_adapter()
    stored = [dequantize_module_weight(layer.base_layer).float() for layer in layers]
    lost = math.sqrt(sum(float((s - e).square().sum()) for s, e in zip(stored, exact, strict=True)))
    length = math.sqrt(sum(float(u.square().sum()) for u in update))
    assert table.loc["all layers", "nf4"] == pytest.approx(lost / length, rel=1e-4)
    assert table.loc["all layers", "float32"] < 1e-5 < table.loc["all layers", "nf4"]
    with pytest.raises(ValueError, match="merged already"):
        lora.merge_error(model)


def test_merge_error_leaves_the_model_alone_and_ranks_the_destinations():
    model = trained(get_peft_model(tiny(), LoraConfig(target_modules="all-linear")))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    row = lora.merge_error(model, into=("nf4", "bfloat16", "float16", "float32")).iloc[-1]
    assert row["nf4"] > row["bfloat16"] > row["float16"] > row["float32"]
    assert all(torch.equal(before[name], now) for name, now in model.state_dict().items())


def test_merge_error_refuses_what_it_cannot_measure():
    with pytest.raises(ValueError, match="no trained LoRA layers"):
        lora.merge_error(tiny())
    with pytest.raises(ValueError, match="no trained LoRA layers"):
        lora.merge_error(get_peft_model(tiny(), LoraConfig()))
    with pytest.raises(ValueError, match="variant such as DoRA"):
        lora.merge_error(get_peft_model(tiny(), LoraConfig(use_dora=True)))
    with pytest.raises(ValueError, match=r"into must name.*'int3'"):
        lora.merge_error(trained(get_peft_model(tiny(), LoraConfig())), into=("int3",))


# ── check_training ───────────────────────────────────────────────────────────────────────
QUANTIZABLE = {"hidden_size": 64, "intermediate_size": 64}


@functools.cache
def saved_tiny():
    """A folder to load from, which is when transformers quantizes; gone at exit."""
    folder = tempfile.TemporaryDirectory()
    tiny("llama", **QUANTIZABLE).save_pretrained(folder.name)
    return folder


def quantized_tiny(dtype=torch.float32, bits=4):
    four = {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
    }
    quantization = four if bits == 4 else {"load_in_8bit": True}
    return AutoModelForCausalLM.from_pretrained(
        saved_tiny().name,
        dtype=dtype,
        device_map={"": "cpu"},
        quantization_config=BitsAndBytesConfig(**quantization),
    )


def prepared(model):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT calls a method transformers is renaming
        return prepare_model_for_kbit_training(model)


def attached(model=None, **fields):
    return get_peft_model(tiny() if model is None else model, LoraConfig(**fields))


def two_adapters():
    model = attached()
    model.add_adapter("second", LoraConfig())
    model.set_adapter("second")
    return model


def from_scratch():
    model = tiny()
    model.requires_grad_(False)
    for block in model.model.layers:
        block.self_attn.q_proj = LoRALinear(block.self_attn.q_proj)
    return model


def continued(tmp_path, **settings):
    attached().save_pretrained(tmp_path / "adapter")
    return PeftModel.from_pretrained(tiny(), tmp_path / "adapter", **settings)


CORRECT = {
    "full fine-tuning": tiny,
    "plain LoRA": attached,
    "all-linear with DoRA": lambda: attached(target_modules="all-linear", use_dora=True),
    "embeddings saved": lambda: attached(modules_to_save=["embed_tokens", "lm_head"]),
    "norms saved": lambda: attached(modules_to_save=["input_layernorm"]),
    "a few tokens": lambda: attached(trainable_token_indices=[1, 2]),
    "a tied embedding saved": lambda: attached(
        tiny(tie_word_embeddings=True), modules_to_save=["embed_tokens"], ensure_weight_tying=True
    ),
    "rsLoRA": lambda: attached(use_rslora=True, lora_dropout=0.1),
    "PiSSA": lambda: attached(init_lora_weights="pissa"),
    "OLoRA": lambda: attached(init_lora_weights="olora"),
    "patterns": lambda: attached(rank_pattern={"q_proj": 2}, alpha_pattern={r"1\..*v_proj": 4}),
    "excluded": lambda: attached(target_modules=["q_proj", "o_proj"], exclude_modules=["o_proj"]),
    "one layer": lambda: attached(layers_to_transform=[1]),
    "an adapted embedding": lambda: attached(target_modules=["embed_tokens", "q_proj"]),
    "biases": lambda: attached(tiny("qwen2"), bias="all", target_modules=["q_proj"]),
    "the second of two adapters": two_adapters,
    "4 bit, prepared": lambda: attached(prepared(quantized_tiny())),
    "8 bit, prepared": lambda: attached(prepared(quantized_tiny(bits=8))),
    "4 bit, its norms in bfloat16 (as TRL leaves them)": lambda: attached(
        quantized_tiny(torch.bfloat16).requires_grad_(False)
    ),
    "4 bit from bfloat16, prepared": lambda: attached(prepared(quantized_tiny(torch.bfloat16))),
    "GPT-2": lambda: attached(tiny("gpt2"), fan_in_fan_out=True),
    "this module's layer": from_scratch,
}


@pytest.mark.parametrize("name", CORRECT)
def test_check_is_quiet_on_correct_set_ups(name):
    check = check_training(CORRECT[name]())
    assert check.ok, str(check)
    assert "ready to train" in str(check) and "ready to train" in check._repr_html_()


def test_check_is_quiet_on_an_adapter_loaded_to_be_trained(tmp_path):
    assert check_training(continued(tmp_path, is_trainable=True)).ok


def broken(name):
    if name == "everything frozen":
        return tiny().requires_grad_(False)
    if name == "quantized without adapter":
        return prepared(quantized_tiny())
    if name == "unprepared 4 bit without adapter":
        return quantized_tiny()
    model = two_adapters() if "inactive" in name else attached()
    if name == "adapter frozen":
        model.base_model.set_adapter("default", inference_mode=True)
    elif name == "one layer of the adapter frozen":
        next(p for n, p in model.named_parameters() if "lora_B" in n).requires_grad_(False)
    elif name == "adapter inactive":
        for module in model.modules():  # what set_adapter("default") does, less the flags
            if isinstance(module, LoraLayer):
                module._active_adapter = ["default"]
    elif name == "adapters disabled":
        model.disable_adapter_layers()
    elif name == "adapters disabled, flags forced":
        model.disable_adapter_layers()
        for n, p in model.named_parameters():
            p.requires_grad_("lora_" in n)
    elif name == "adapter merged":
        model.merge_adapter()
    elif name == "base unfrozen":
        for parameter in model.parameters():
            parameter.requires_grad_(True)
    elif name == "one norm unfrozen":
        model.get_submodule("base_model.model.model.norm").requires_grad_(True)
    return model


@pytest.mark.parametrize(
    ("name", "codes", "words"),
    [
        ("everything frozen", ["nothing_trainable"], "all 21 tensors are frozen"),
        ("quantized without adapter", ["nothing_trainable"], "attach an adapter"),
        ("unprepared 4 bit without adapter", ["base_trainable"], "embed_tokens"),
        ("adapter frozen", ["nothing_trainable", "adapter_frozen"], "is_trainable=True"),
        ("one layer of the adapter frozen", ["adapter_frozen"], "1 of the 8 tensors"),
        (
            "adapter inactive",
            ["adapter_inactive", "adapter_frozen"],
            "'second' is attached",
        ),
        ("adapters disabled", ["nothing_trainable", "adapter_inactive"], "enable_adapter"),
        (
            "adapters disabled, flags forced",
            ["adapter_inactive"],
            "enable_adapter_layers()",
        ),
        ("adapter merged", ["adapter_merged"], "unmerge_adapter"),
        ("base unfrozen", ["base_trainable"], "21 tensors of the base"),
        ("one norm unfrozen", ["base_trainable"], "modules_to_save"),
    ],
)
def test_check_catches(name, codes, words):
    check = check_training(broken(name))
    assert check.codes == codes
    assert words in str(check) and not check.ok
    assert codes[0] in check._repr_html_()


def test_what_the_check_catches_really_does_not_learn(tmp_path):
    """The alarm is right: after a step the output is the same; after the cure it is not."""
    ids = torch.arange(1, 9).reshape(1, -1)

    def change(model):
        before = model(input_ids=ids).logits.detach()
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        loss = model(input_ids=ids, labels=ids).loss
        if loss.requires_grad:
            loss.backward()
        optimizer.step()
        return float((model(input_ids=ids).logits - before).detach().abs().max())

    loaded = continued(tmp_path)
    assert "adapter_frozen" in check_training(loaded).codes and change(loaded) == 0
    loaded.set_adapter("default")
    assert check_training(loaded).ok and change(loaded) > 1e-4
    idle = broken("adapter inactive")
    assert change(idle) == 0
    idle.set_adapter("second")
    assert check_training(idle).ok and change(idle) > 1e-4


def test_check_sees_4_bit_layers_repacked_for_inference():
    """bitsandbytes does it at the first eval-mode forward on CPUs with AVX512-BF16."""
    model, ids = attached(prepared(quantized_tiny())), torch.arange(1, 9).reshape(1, -1)
    layers = [m for m in model.modules() if type(m).__name__ == "Linear4bit"]
    layers = [layer for layer in layers if hasattr(layer, "support_avx512bf16_for_cpu")]
    with torch.no_grad():
        model.train()(input_ids=ids)
    assert check_training(model).ok
    with torch.no_grad():
        model.eval()(input_ids=ids)
    if layers[0].support_avx512bf16_for_cpu:
        model.train()(input_ids=ids, labels=ids).loss.backward()
        first = next(p for n, p in model.named_parameters() if "lora_B" in n)
        assert first.grad is None or not first.grad.any()  # the alarm is right
    else:
        layers[0].weight.quant_state.packing_format_for_cpu = True
    assert check_training(model).codes == ["no_gradient_path"]
    with pytest.raises(ValueError, match="repacked for CPU inference"):
        lora.merge_error(model)


def test_check_compares_the_optimizer():
    model = tiny()
    early = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model = attached(model)
    assert check_training(model).ok
    assert check_training(model, early).codes == ["optimizer_misses"]
    late = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-3)
    assert check_training(model, late).ok


def test_check_wants_a_model():
    with pytest.raises(TypeError, match="model must be a torch module"):
        check_training("my-model")
