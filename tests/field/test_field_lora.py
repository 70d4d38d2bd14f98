"""Adapters as people make them: merged where they cannot be, or trained where nothing moves."""

import copy
import math
import warnings

import pytest
import torch
from peft import (
    IA3Config,
    LoraConfig,
    PromptTuningConfig,
    get_peft_model,
    prepare_model_for_kbit_training,
)
from peft.tuners.lora import LoraLayer
from test_lora import attached, quantized_tiny, tiny, two_adapters
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from helpers import chat, lora
from helpers.lora import LoRALinear, check_training, merge_error
from helpers.quantization import nf4_code_book, quantize_nf4

IDS = torch.arange(1, 9).reshape(1, -1)


def adapted(base, **settings):
    """`base` with a trained-looking adapter: no part of it is zero."""
    with warnings.catch_warnings(action="ignore"):  # PEFT's advice about tied weights
        model = get_peft_model(base, LoraConfig(**settings)).eval()
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += torch.randn_like(parameter) / 50
    return model


def moved_by_merging(model):
    """The largest change of a logit when the adapter is merged in float32."""
    with torch.no_grad(), warnings.catch_warnings(action="ignore"):
        before = model(input_ids=IDS).logits
        return float((model.merge_and_unload()(input_ids=IDS).logits - before).abs().max())


# ── merging ──────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("ensured", [False, True], ids=["", "ensure_weight_tying"])
@pytest.mark.parametrize("targets", ["lm_head", "embed_tokens", "embed_tokens lm_head"])
@pytest.mark.field("peft#2018, peft#2777, transformers#45127", "LoRA on a tied head or embedding")
def test_refused_merging_of_lora_on_tied_weights(targets, ensured):
    settings = {"target_modules": ["q_proj", *targets.split()], "ensure_weight_tying": ensured}
    model = adapted(tiny(tie_word_embeddings=True), **settings)
    with pytest.raises(ValueError, match=r"shares its weight with .*trainable_token_indices"):
        merge_error(model)
    assert moved_by_merging(model) > 0.01  # the refusal is right: this is another model


@pytest.mark.field("own", "one base layer under several adapters (layer_replication)")
def test_refused_merging_of_replicated_layers():
    model = adapted(tiny(), layer_replication=[(0, 2), (1, 2)])
    with pytest.raises(ValueError, match=r"layers.1.* shares its weight with .*layers.2"):
        merge_error(model)
    assert moved_by_merging(model) > 0.01


@pytest.mark.field("own", "a tied head that shares storage, not the parameter")
def test_refused_merging_of_weights_that_share_storage():
    base = tiny()
    base.lm_head.weight = nn.Parameter(base.model.embed_tokens.weight.data)
    with pytest.raises(ValueError, match=r"shares its weight with .*embed_tokens"):
        merge_error(adapted(base, target_modules=["lm_head"]))


@pytest.mark.field("own", "lora_bias on a base without biases")
def test_refused_merging_of_a_bias_that_has_no_place():
    model = adapted(tiny(), lora_bias=True)
    with pytest.raises(ValueError, match="lora_bias, on a base without a bias"):
        merge_error(model)
    with pytest.raises(RuntimeError, match="Impossible to merge"):
        moved_by_merging(model)


@pytest.mark.field("own", "NaN in one of several adapted layers, merged")
def test_each_layer_with_nan_stops_the_table():
    model = adapted(tiny())
    pairs(model)[-1].lora_A["default"].weight.data[0] = math.nan
    with pytest.raises(ValueError, match=r"layers\.1\.self_attn\.v_proj holds NaN"):
        merge_error(model)


@pytest.mark.field("peft#2777", "LoRA on an untied embedding")
def test_each_adapted_embedding_is_in_the_table():
    model = adapted(tiny(), target_modules=["q_proj", "embed_tokens"])
    layer = model.base_model.model.model.embed_tokens
    weight = layer.get_base_layer().weight.detach()
    delta = layer.get_delta_weight("default").detach()
    table = merge_error(model, into=["bfloat16"])
    row = table.loc["embed_tokens"]
    assert row["layers"] == 1
    assert row["update"] == pytest.approx(float(delta.norm() / weight.norm()), rel=1e-5)
    lost = ((weight + delta).bfloat16().float() - (weight + delta)).norm() / delta.norm()
    assert row["bfloat16"] == pytest.approx(float(lost), rel=1e-4)
    assert moved_by_merging(model) < 1e-6


@pytest.mark.field("own", "LoRA on the experts of a mixture (target_parameters)")
def test_each_adapted_expert_is_in_the_table():
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "vocab_size": 64}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 4}
    base = AutoModelForCausalLM.from_config(AutoConfig.for_model("mixtral", **size, **heads))
    both = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    model = adapted(base, target_modules=["q_proj"], target_parameters=both)
    table = merge_error(model, into=["nf4", "float32"])
    assert table.loc["all layers", "layers"] == 3
    assert table["float32"].max() < 1e-6 < table["nf4"].min()
    assert check_training(model).ok


@pytest.mark.parametrize(
    "settings",
    [
        {"modules_to_save": ["lm_head"]},
        {"modules_to_save": ["embed_tokens"]},
        {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
        {"trainable_token_indices": [3]},
        {"modules_to_save": ["lm_head"], "target_modules": ["q_proj", "embed_tokens"]},
    ],
)
@pytest.mark.field("peft#2018, peft#2777", "a tied base, trained as our refusal advises")
def test_kept_what_merges_exactly_on_a_tied_base(settings):
    model = adapted(tiny(tie_word_embeddings=True), **settings)
    assert merge_error(model, into=["float32"]).loc["all layers", "float32"] < 1e-6
    assert moved_by_merging(model) < 1e-6


def pairs(model):
    return [m for m in model.modules() if isinstance(m, LoraLayer)]


def rows_restart(codes, state):
    """As the AVX512 kernel of bitsandbytes 0.50 does it: blocks begin anew at every row."""
    rows, columns = math.prod(state.shape[:-1]), state.shape[-1]
    absmax = state.absmax
    if state.nested:
        import bitsandbytes.functional as bnb

        absmax = bnb.dequantize_blockwise(absmax, state.state2) + state.offset
    at = torch.arange(columns) // state.blocksize
    if columns % 16 == 0:
        at = torch.arange(rows)[:, None] * (columns // state.blocksize) + at
    else:
        at = torch.arange(rows * columns).reshape(rows, columns) // state.blocksize
    levels = torch.stack([codes.flatten() >> 4, codes.flatten() & 15], 1).flatten()
    values = nf4_code_book()[levels[: rows * columns].int()].reshape(rows, columns)
    return (values * absmax[at.clamp(max=len(absmax) - 1)]).reshape(state.shape)


@pytest.mark.parametrize("quantized", [False, True], ids=["float32 base", "4-bit base"])
@pytest.mark.field("own", "bitsandbytes on AVX512: 80 columns, blocks of 64")
def test_each_block_is_read_with_its_own_scale(monkeypatch, quantized):
    import bitsandbytes as bnb

    base = nn.Sequential(nn.Linear(80, 48))
    base[0].weight.data *= torch.logspace(-1, 1, 48)[:, None]
    weight = base[0].weight.data
    if quantized:
        base[0] = bnb.nn.Linear4bit(80, 48, compute_dtype=torch.float32, quant_type="nf4")
        base[0].weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4")
        base.to("cpu").is_loaded_in_4bit = True
        weight = quantize_nf4(weight, double_quantize=True).dequantize()
    model = adapted(base, target_modules=["0"], r=4)
    update = pairs(model)[0].get_delta_weight("default").detach()
    stored = quantize_nf4(weight + update, double_quantize=True).dequantize()
    monkeypatch.setattr(bnb.functional, "dequantize_4bit", rows_restart)
    row = merge_error(model, into=["nf4"]).iloc[-1]
    assert row["update"] == pytest.approx(float(update.norm() / weight.norm()), rel=1e-4)
    lost = (stored - weight - update).norm() / update.norm()
    assert row["nf4"] == pytest.approx(float(lost), rel=1e-4)


# ── check_training: what trains nothing ──────────────────────────────────────────────────
def change_after_steps(model, optimizer=None):
    """What two training steps do to the logits: the alarms' witness."""
    learned = [p for p in model.parameters() if p.requires_grad]
    optimizer = optimizer or torch.optim.SGD(learned, lr=1.0)
    before = model.eval()(input_ids=IDS).logits.detach()
    for _ in range(2):
        model.train()(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return float((model.eval()(input_ids=IDS).logits - before).detach().abs().max())


def zeroed(model, which=slice(None)):
    for layer in pairs(model)[which]:
        for part in (layer.lora_A, layer.lora_B, layer.lora_embedding_A, layer.lora_embedding_B):
            for item in part.values():
                getattr(item, "weight", item).data.zero_()
    return model


@pytest.mark.parametrize(
    "settings",
    [{}, {"use_rslora": True}, {"alpha_pattern": {"q_proj": 0, "v_proj": 0}, "lora_alpha": 16}],
    ids=["alpha", "rsLoRA", "alpha_pattern"],
)
@pytest.mark.field("own", "lora_alpha=0")
def test_each_scaling_of_zero_is_an_alarm(settings):
    model = attached(**{"lora_alpha": 0} | settings)
    check = check_training(model)
    assert check.codes == ["alpha_zero"] and "in 4 layers" in str(check)
    assert change_after_steps(model) == 0
    model = attached(alpha_pattern={r"0\.self_attn\.q_proj": 0})  # one layer of four
    assert "in 1 layers, such as base_model.model.model.layers.0" in str(check_training(model))


@pytest.mark.field("own", "negative lora_alpha, which trains as the positive one does")
def test_kept_a_negative_alpha_is_no_alarm():
    gaps = []
    for alpha in (-8, 8):
        torch.manual_seed(0)
        model = attached(lora_alpha=alpha)
        assert check_training(model).ok
        gaps.append(change_after_steps(model))
    assert gaps[0] == pytest.approx(gaps[1], rel=1e-4) and gaps[0] > 1e-4


@pytest.mark.field("own", "A and B both zero")
def test_each_dead_pair_is_an_alarm():
    model = zeroed(attached())
    check = check_training(model)
    assert check.codes == ["adapter_dead"] and "in 4 layers" in str(check)
    assert change_after_steps(model) == 0
    one = zeroed(attached(target_modules=["q_proj", "embed_tokens"]), slice(1))
    assert "in 1 layers, such as base_model.model.model.embed_tokens" in str(check_training(one))
    idle = two_adapters()  # the first one is not in use, and may be anything
    for layer in pairs(idle):
        layer.lora_A["default"].weight.data.zero_()
    assert check_training(idle).ok
    scratch = nn.Sequential(LoRALinear(nn.Linear(4, 4), rank=2))
    assert check_training(scratch).ok
    scratch[0].lora_A.weight.data.zero_()
    assert check_training(scratch).codes == ["adapter_dead"]
    scratch[0].scaling = 0
    assert "alpha_zero" in check_training(scratch).codes


@pytest.mark.field("own", "lora_dropout=1.0")
def test_each_dropout_of_one_is_an_alarm():
    model = attached(lora_dropout=1.0)
    assert check_training(model).codes == ["dropout_one"]
    assert change_after_steps(model) == 0
    assert check_training(attached(lora_dropout=0.5)).ok


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    "where", ["lora_A", "lora_B", "q_proj.base_layer", "norm.weight", "modules_to_save.default"]
)
@pytest.mark.field("own", "NaN or infinity in A, B, the base, a norm or a saved module")
def test_each_number_must_be_finite(where, value):
    model = attached(modules_to_save=["lm_head"])
    name, parameter = next((n, p) for n, p in model.named_parameters() if where in n)
    parameter.data.flatten()[-1] = value
    check = check_training(model)
    assert check.codes == [
        "not_finite"
    ] and f"1 tensors or numbers are NaN or infinite, such as {name}" in str(check)


@pytest.mark.field("own", "NaN in full fine-tuning, in 16 bits and in an infinite alpha")
def test_each_model_must_be_finite():
    model = tiny().bfloat16()
    assert check_training(model).ok
    model.lm_head.weight.data[3, 3] = math.nan
    assert check_training(model).codes == ["not_finite"]
    assert "q_proj.scaling" in str(check_training(attached(lora_alpha=math.nan)))
    assert check_training(attached(lora_alpha=math.inf)).codes == ["not_finite"]
    model = tiny()
    for rate in (math.inf, math.nan):
        optimizer = torch.optim.SGD([{"params": list(model.parameters()), "lr": rate}])
        assert "such as the learning rate" in str(check_training(model, optimizer))
    with torch.device("meta"):
        assert check_training(tiny()).ok  # nothing to look at


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.field("own", "a base that was quantized from NaN")
def test_each_scale_of_a_quantized_base_must_be_finite(bits):
    with warnings.catch_warnings(action="ignore"):
        model = attached(prepare_model_for_kbit_training(quantized_tiny(bits=bits)))
    assert check_training(model).ok
    weight = model.base_model.model.model.layers[1].mlp.up_proj.weight
    scales = weight.quant_state.offset if bits == 4 else weight.SCB
    scales.fill_(math.nan)
    check = check_training(model)
    assert check.codes == ["not_finite"] and "layers.1.mlp.up_proj.weight" in str(check)


@pytest.mark.field("own", "an optimizer with lr=0, whole or one of its groups")
def test_each_learning_rate_of_zero_is_an_alarm():
    model = attached()
    learned = [p for p in model.parameters() if p.requires_grad]
    for rate in (0.0, torch.tensor(0.0)):
        optimizer = torch.optim.AdamW(learned, lr=rate)
        check = check_training(model, optimizer)
        assert check.codes == ["learning_rate_zero"] and "8 of 8 trainable" in str(check)
    assert change_after_steps(model, optimizer) == 0
    groups = [{"params": learned[:2], "lr": 0.0}, {"params": learned[2:]}]
    check = check_training(model, torch.optim.AdamW(groups, lr=1e-3))
    assert check.codes == ["learning_rate_zero"] and "2 of 8 trainable" in str(check)


@pytest.mark.field("own", "a warm-up, whose first step and last step have lr=0")
def test_kept_a_schedule_that_passes_zero_is_no_alarm():
    from transformers import Adafactor, get_scheduler

    model = attached()
    learned = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=1e-3)
    schedule = get_scheduler("linear", optimizer, 2, 4)
    assert optimizer.param_groups[0]["lr"] == 0 and check_training(model, optimizer).ok
    for _ in range(4):
        optimizer.step()
        schedule.step()
    assert optimizer.param_groups[0]["lr"] == 0 and check_training(model, optimizer).ok
    assert check_training(model, Adafactor(learned)).ok  # its lr is None: relative steps


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"rank_pattern": {"q_prj": 2}}, "rank_pattern: q_prj"),
        ({"alpha_pattern": {r"^layers\.0\.q_proj": 2}}, r"alpha_pattern: ^layers\\.0\\.q_proj"),
        ({"target_modules": ["q_proj", "v_prj"]}, "target_modules: v_prj"),
        ({"modules_to_save": ["lm_hed"]}, "modules_to_save: lm_hed"),
        ({"layers_to_transform": [1, 2]}, "layers_to_transform: 2"),
    ],
)
@pytest.mark.field("own", "a name in LoraConfig that fits no layer")
def test_each_name_that_fits_nothing_is_an_alarm(settings, named):
    check = check_training(attached(**settings))
    assert check.codes == ["names_unmatched"] and named in str(check)


@pytest.mark.field("own", "a saved module that is frozen")
def test_kept_a_frozen_saved_module_is_an_alarm():
    model = attached(modules_to_save=["lm_head"])
    model.base_model.model.lm_head.modules_to_save.requires_grad_(False)
    assert check_training(model).codes == ["adapter_frozen"]


@pytest.mark.parametrize(
    "config",
    [
        IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
        PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    ],
    ids=["IA3", "prompt tuning"],
)
@pytest.mark.parametrize("quantized", [False, True], ids=["plain", "4 bit"])
@pytest.mark.field("own", "adapters whose config has no bias (IA3, prompt tuning)")
def test_each_kind_of_adapter_can_be_checked(config, quantized):
    base = tiny()
    if quantized:
        with warnings.catch_warnings(action="ignore"):
            base = prepare_model_for_kbit_training(quantized_tiny())
    assert check_training(get_peft_model(base, copy.deepcopy(config))).ok


# ── check_training: rows of new tokens ───────────────────────────────────────────────────
NEW = ["<think>", "</think>", "<yoda>"]


def grown(tokenizer, *, tied=True, dtype=torch.float32, special_tokens=tuple(NEW), pad=None):
    """A small model of the embedded one's vocabulary, made ready for new tokens."""
    rows = len(tokenizer)
    chat.prepare_tokenizer(tokenizer, special_tokens=special_tokens, pad=pad)
    model = tiny(vocab_size=rows, tie_word_embeddings=tied).to(dtype)
    return chat.prepare_model(model, tokenizer), list(range(rows, len(tokenizer)))


@pytest.mark.parametrize(
    ("tied", "dtype"),
    [(True, torch.float32), (False, torch.bfloat16), (True, torch.float16)],
    ids=["tied", "untied, bfloat16", "tied, float16"],
)
@pytest.mark.field("LlamaFactory#6749, LlamaFactory#6446, peft#2669", "new tokens and plain LoRA")
def test_each_row_of_a_new_token_must_train(tokenizer, tied, dtype):
    model, new = grown(tokenizer, tied=tied, dtype=dtype)
    with warnings.catch_warnings(action="ignore"):
        plain = get_peft_model(copy.deepcopy(model), LoraConfig())
        assert check_training(plain).codes == ["new_tokens_untrained"]
        check = check_training(plain, tokenizer=tokenizer)
        assert check.codes == ["new_tokens_untrained"]
        assert any(
            f"such as {token} of base_model.model.model.embed_tokens" in str(check) for token in NEW
        )
        names = ["embed_tokens"] if tied else ["embed_tokens", "lm_head"]
        for settings in (
            {"trainable_token_indices": {name: new for name in names}},
            {"modules_to_save": names, "ensure_weight_tying": tied},
            {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
        ):
            right = get_peft_model(copy.deepcopy(model), LoraConfig(**settings))
            assert check_training(right).ok and check_training(right, tokenizer=tokenizer).ok
        assert check_training(model, tokenizer=tokenizer).ok  # full fine-tuning


@pytest.mark.field("peft#2669", "new tokens trained on one side only, or only some of them")
def test_each_side_and_each_new_token_counts(tokenizer):
    model, new = grown(tokenizer, tied=False)
    for settings, where in (
        ({"modules_to_save": ["embed_tokens"]}, "lm_head"),
        ({"modules_to_save": ["lm_head"]}, "model.embed_tokens"),
        ({"trainable_token_indices": {"embed_tokens": new, "lm_head": new[1:]}}, "lm_head"),
    ):
        adapted = get_peft_model(copy.deepcopy(model), LoraConfig(**settings))
        check = check_training(adapted, tokenizer=tokenizer)
        assert check.codes == ["new_tokens_untrained"]
        assert f" of base_model.model.{where}," in str(check)


@pytest.mark.field("transformers#29279, own", "rows that no token needs to learn")
def test_kept_spare_rows_and_a_padding_token_are_no_alarm(tokenizer):
    assert check_training(get_peft_model(grown(tokenizer, special_tokens=())[0], LoraConfig())).ok
    model, new = grown(tokenizer, special_tokens=(), pad="<|filler|>")  # grows by 64 rows for one
    assert len(new) == 1 and len(model.get_input_embeddings().weight) == new[0] + 64
    model = get_peft_model(model, LoraConfig())
    assert check_training(model).ok and check_training(model, tokenizer=tokenizer).ok
    rounded = tiny(vocab_size=100)
    rounded.resize_token_embeddings(100, pad_to_multiple_of=64)
    assert check_training(get_peft_model(rounded, LoraConfig())).ok
    trained, _ = grown(tokenizer)  # a second adapter, after the rows have been trained
    trained.get_input_embeddings().weight.data[-64:] += torch.randn(64, 16) / 100
    assert check_training(get_peft_model(trained, LoraConfig())).ok


@pytest.mark.field("peft#2669", "resize_token_embeddings by hand, without a tokenizer at hand")
def test_each_way_of_growing_is_noticed():
    model = tiny(vocab_size=100)
    model.resize_token_embeddings(103)
    model = get_peft_model(model, LoraConfig())
    check = check_training(model)
    assert check.codes == ["new_tokens_untrained"] and "row 100 of" in str(check)
    assert len(lora._tokens.untrained_rows(model, None)) == 6  # three rows, in and out
    padded = tiny(vocab_size=100)  # 28 rows more: what they are for, only a note can tell
    padded.resize_token_embeddings(103, pad_to_multiple_of=64)
    padded.get_input_embeddings().new_tokens = range(100, 103)
    assert "row 100 of" in str(check_training(get_peft_model(padded, LoraConfig())))


@pytest.mark.field("own", "a new padding token, and a new end of turn that pads as well")
def test_each_padding_is_looked_up_in_the_tokenizer(tokenizer):
    for names, codes in ((["pad"], []), (["pad", "eos"], ["new_tokens_untrained"])):
        made = copy.deepcopy(tokenizer)
        made.add_special_tokens({f"{name}_token": "<|new|>" for name in names})
        model = tiny(vocab_size=len(tokenizer))
        model.resize_token_embeddings(len(made))
        model = get_peft_model(model, LoraConfig())
        assert check_training(model, tokenizer=made).codes == codes


@pytest.mark.field("own", "a compiled model with a pattern; a model with a prompt encoder")
def test_kept_compiled_models_and_prompt_encoders():
    pattern = {"^model.layers.0.self_attn.q_proj": 4}
    model = get_peft_model(tiny(), LoraConfig(rank_pattern=pattern))
    assert check_training(torch.compile(model)).ok
    sam = nn.ModuleDict({"head": nn.Linear(2, 2)})
    sam.prompt_encoder = nn.Linear(2, 2)
    assert check_training(sam).ok


@pytest.mark.field("own", "models that are no language models of transformers")
def test_kept_other_models_can_be_checked():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.config = {"pad_token_id": 0}
            self.wave = nn.Parameter(torch.ones(3, dtype=torch.complex64))

        def get_input_embeddings(self):
            raise NotImplementedError

    assert check_training(Odd()).ok
    vision = AutoConfig.for_model(
        "vit", hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    from transformers import AutoModel

    assert check_training(AutoModel.from_config(vision)).ok
