"""Memory: configs and runs of all kinds end in a number or in one sentence."""

import argparse
import copy
import json
import warnings

import peft
import pytest
import torch
import transformers

from helpers import memory
from helpers.memory import _cli, _configs, _kernels, _model, _quantized, _step
from helpers.memory._trace import Ledger

MIB = 2**20
ENDS = dict(bos_token_id=1, eos_token_id=2, pad_token_id=0)
SMALL = dict(
    hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, vocab_size=128, **ENDS,
)  # fmt: skip
MIXED = ["sliding_attention", "full_attention"]
FULL = ["full_attention"] * 2
RUN = dict(lora=4, sequence_length=1024)
LLAMA = transformers.LlamaConfig(**SMALL)
TIED = transformers.LlamaConfig(**SMALL, tie_word_embeddings=True)


def peak(model, **choices):
    return memory.estimate_training(model, **RUN | choices).peak_bytes


def plan(*words):
    parser = argparse.ArgumentParser()
    _cli.add_arguments(parser)
    return _cli.main(parser.parse_args(words))


# ------------------------------------------------------------------ flash attention's masks
def windowed(kind):
    """(A config with a sliding window of 128 tokens, the same without one)."""
    made = transformers.CONFIG_MAPPING[kind]
    if kind in ("gemma3_text", "gemma2"):
        shared = dict(**SMALL, head_dim=16, sliding_window=128)
        return made(**shared, layer_types=MIXED), made(**shared, layer_types=FULL)
    if kind == "qwen2":
        window = dict(use_sliding_window=True, max_window_layers=1)
        return made(**SMALL, sliding_window=128, **window), made(**SMALL)
    return made(**SMALL, sliding_window=128), made(**SMALL, sliding_window=None)


@pytest.mark.field(
    "unsloth#2366, LlamaFactory#7628, ollama#9987", "flash_attention_2 on sliding windows"
)
@pytest.mark.parametrize("kind", ["gemma3_text", "mistral", "phi3", "qwen2"])
def test_each_flash_attention_sees_no_mask(kind):
    window, full = windowed(kind)
    flash = dict(attention="flash_attention_2")
    tables = 2 * 2 * 1024 * 16 + 1024 if kind == "gemma3_text" else 0  # rotary, of two kinds
    assert peak(window, **flash) - peak(full, **flash) == tables
    mask = 1024 * 1024 * (1 + 2)  # of SDPA: bool, and 16-bit in the kernel
    assert peak(window) > peak(full) and peak(window) - peak(window, **flash) < 2 * mask
    if kind != "mistral":
        return
    # Without a mask a run grows by so much a token, not with the square.
    first, second, third = (peak(window, **flash, sequence_length=n) for n in (1024, 2048, 3072))
    assert third - second == pytest.approx(second - first, rel=0.01)


@pytest.mark.field("unsloth#2366", "Gemma 3 1B, 8,192 tokens: full attention's MiB, two tables")
def test_each_layer_of_gemma_3_by_its_own_attention():
    run = dict(lora=16, sequence_length=8192, attention="flash_attention_2")
    found = memory.estimate_training("gemma-3-1b-it", **run)
    assert round(found.peak_bytes / MIB) == 3395 + 8  # 8: cosines and sines of the windows


@pytest.mark.field("own", "flash_attention_2 where SDPA is not offered or repeats heads")
def test_each_model_takes_flash_attention_by_its_own_code():
    """Softcapped (Gemma 2), of its own class (GPT-J), with one key for all heads (Falcon)."""
    flash = dict(attention="flash_attention_2")
    window, full = windowed("gemma2")
    assert peak(window, **flash) == peak(full, **flash) < peak(full, attention="eager")
    gptj = transformers.GPTJConfig(n_embd=64, n_layer=2, n_head=4, vocab_size=128, rotary_dim=8)
    assert peak(gptj, **flash) < peak(gptj, attention="eager")
    shape = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=128)
    falcon = transformers.FalconConfig(**shape, multi_query=True)
    scores = 4 * 1024 * 1024 * 2
    assert peak(falcon, gradient_checkpointing=False) - scores > peak(
        falcon, gradient_checkpointing=False, **flash
    )


GEMMA4 = dict(**SMALL, head_dim=16, sliding_window=128, layer_types=MIXED)


@pytest.mark.field("own", "flash_attention_2 with heads of 512, ALiBi, or no support")
def test_refused_flash_attention_that_transformers_or_the_kernel_has_not():
    flash = dict(attention="flash_attention_2")
    wide = transformers.Gemma4TextConfig(
        **GEMMA4, global_head_dim=512, hidden_size_per_layer_input=0
    )
    with pytest.raises(ValueError, match=r"at most 256 numbers.*512; attention='sdpa' works"):
        peak(wide, **flash)
    assert peak(wide) > 0
    bloom = transformers.BloomConfig(hidden_size=64, n_layer=2, n_head=4, vocab_size=128)
    with pytest.raises(ValueError, match=r"'flash_attention_2' is not offered .* for 'bloom'"):
        peak(bloom, **flash)
    shape = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=128)
    with pytest.raises(ValueError, match=r"'flash_attention_2' is not offered .*alibi"):
        peak(transformers.FalconConfig(**shape, alibi=True), **flash)


@pytest.mark.field("own", "values narrower than queries (MiniCPM3's latent attention)")
def test_each_head_size_has_a_kernel():
    """PyTorch's flash kernel takes one size for all; the efficient one also narrower values."""
    q = torch.empty(1, 4, 64, 32, device="meta", dtype=torch.bfloat16, requires_grad=True)
    v = torch.empty(1, 4, 64, 16, device="meta", dtype=torch.bfloat16, requires_grad=True)
    out = _kernels.cuda_attention(q, q, v, is_causal=True)
    assert out.shape == v.shape and "Efficient" in type(out.grad_fn).__name__


# ------------------------------------------------------------------ models with other parts
TEXT = dict(vocab_size=128, **{k: v for k, v in SMALL.items() if k != "vocab_size"})
EYES = dict(
    hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
    image_size=28, patch_size=14,
)  # fmt: skip
WRAPPERS = {  # type of the whole: the text part's type, its entries
    "gemma3": ("gemma3_text", dict(head_dim=16, sliding_window=128, layer_types=MIXED)),
    "gemma4": ("gemma4_text", dict(head_dim=16, layer_types=MIXED)),
    "mistral3": ("mistral", dict(head_dim=16)),
    "llava": ("llama", {}),
    "internvl": ("qwen2", {}),
    "smolvlm": ("llama", {}),
    "paligemma": ("gemma", dict(head_dim=16)),
    "aya_vision": ("cohere2", dict(layer_types=MIXED)),
}


def whole(kind, text, entries):
    return {"model_type": kind, "text_config": {"model_type": text, **SMALL, **entries}}


@pytest.mark.field("own", "wrapper configs: Gemma 3 4B and the like")
@pytest.mark.parametrize("kind", WRAPPERS)
def test_each_model_with_eyes_is_its_text_part(kind):
    text, entries = WRAPPERS[kind]
    config = whole(kind, text, entries)
    alone = transformers.CONFIG_MAPPING[text](**SMALL, **entries)
    found = memory.estimate_training(config, **RUN)
    assert found.peak_bytes == peak(alone)
    for page in (str(found), found._repr_html_()):
        assert f"{kind}, only its text part counted" in page
    assert memory.napkin(config) == memory.napkin(alone)


@pytest.mark.field("own", "plan --model gemma-3-4b.json, --fit too")
def test_each_way_into_the_plan_takes_the_text_part(tmp_path, capsys):
    path = tmp_path / "gemma-3-4b.json"
    path.write_text(json.dumps(whole("gemma3", *WRAPPERS["gemma3"])), encoding="utf-8")
    words = ["--model", str(path), "--rank", "4"]
    assert plan(*words, "--quantization", "nf4", "--sequence-length", "64") == 0
    assert "gemma-3-4b.json, only its text part counted: peak" in capsys.readouterr().out
    config = memory.load_config(path)
    config.text_config.max_position_embeddings = 256
    config.save_pretrained(tmp_path / "whole")
    assert plan("--model", str(tmp_path / "whole"), "--rank", "4", "--fit", "T4") == 0
    assert "largest sequence_length is 256" in capsys.readouterr().out


@pytest.mark.field("own", "wrappers whose text part cannot be traced")
@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("llama4", "'llama4_text', the text part of 'llama4': it is a mixture of experts"),
        ("qwen3_5", "'qwen3_5_text', the text part of 'qwen3_5': its recurrent layers"),
        ("qwen2_5_vl", "'qwen2_5_vl_text', the text part of 'qwen2_5_vl': transformers has no"),
        ("mllama", "text part of 'mllama': transformers has no causal"),
        ("clip", "text part of 'clip': transformers has no causal"),
        ("musicgen", "'musicgen': it is an encoder-decoder"),
    ],
)
def test_refused_text_parts_name_the_whole(kind, reason):
    config = transformers.CONFIG_MAPPING[kind]()
    for call in (peak, memory.napkin, lambda c: memory.find_largest(c, "T4", lora=4)):
        with pytest.raises(ValueError, match=f"model: cannot predict .*{reason}"):
            call(config)


# ------------------------------------------------------------------ what is no dense decoder
NO_DECODERS = {
    "t5": "encoder-decoder",
    "mamba2": "recurrent",
    "rwkv": "recurrent",
    "xlstm": "recurrent",
    "dbrx": "mixture of experts",
    "jetmoe": "mixture of experts",
    "bert": "encoder",
    "camembert": "encoder",
    "xlm-roberta": "encoder",
    "modernbert": "no causal language model",
}


@pytest.mark.field("own", "RWKV, Mamba 2, T5, DBRX, encoders, in every function")
@pytest.mark.parametrize("kind", NO_DECODERS)
def test_refused_models_are_named_before_anything_breaks(kind):
    config = transformers.CONFIG_MAPPING[kind]()
    for call in (
        lambda c: peak(c, attention="eager"),
        memory.napkin,
        lambda c: memory.find_largest(c, "T4", lora=4, attention="eager"),
        lambda c: memory.compare_formulas([(c, {}, 1)]),
    ):
        with pytest.raises(ValueError, match=f"cannot predict '{kind}': .*{NO_DECODERS[kind]}"):
            call(config)


@pytest.mark.field("own", "Bloom and MPT: find_largest without max_position_embeddings")
def test_each_model_has_an_end_of_the_search():
    shape = dict(hidden_size=64, n_layer=2, n_head=4, vocab_size=128)
    mpt = transformers.MptConfig(d_model=64, n_layers=2, n_heads=4, vocab_size=128, max_seq_len=192)
    run = dict(lora=4, attention="eager")
    assert memory.find_largest(mpt, "T4", **run).choices.sequence_length == 192
    bloom = transformers.BloomConfig(**shape)
    found = memory.find_largest(bloom, "600MB", **run).choices.sequence_length
    assert found % 64 == 0 and found > 64
    assert memory.napkin(bloom)["total"] > 0
    assert _configs.positions(bloom) is None


@pytest.mark.field("own", "positions learned, sinusoidal or of a table: GPT-Neo, BioGPT, GPT-J")
@pytest.mark.parametrize(
    ("kind", "choices"),
    [
        ("gpt_neo", dict(num_layers=2, num_heads=4, attention_types=[[["global"], 2]])),
        ("biogpt", dict(num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)),
        ("gptj", dict(n_layer=2, n_head=4, rotary_dim=8)),
        ("gpt_bigcode", dict(n_layer=2, n_head=4)),
    ],
)
def test_refused_sequences_longer_than_a_table_of_positions(kind, choices):
    config = transformers.CONFIG_MAPPING[kind](
        hidden_size=64, vocab_size=100, max_position_embeddings=96, **choices
    )
    assert peak(config, sequence_length=96, attention="eager") > 0
    with pytest.raises(ValueError, match="sequence_length=160 is more than this model's 96"):
        peak(config, sequence_length=160, attention="eager")


@pytest.mark.field("own", "rotary positions, longer than the config's")
def test_kept_rotary_positions_have_no_end():
    config = copy.deepcopy(LLAMA)
    config.max_position_embeddings = 96
    assert peak(config, sequence_length=160) > 0


# ------------------------------------------------------------------ files, dicts, names
@pytest.mark.field("own", "config files and dicts that make no config")
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is no JSON"),
        ("\udce9", "is no JSON"),
        ("[1]", "model_type=None"),
        ('{"hidden_size": 64}', "model_type=None"),
        ('{"model_type": "llama_of_tomorrow"}', "model_type='llama_of_tomorrow'"),
        ('{"model_type": "llama", "hidden_size": "wide"}', "makes no config of it"),
        ('{"model_type": "llama", "hidden_size": 64, "num_attention_heads": 0}', "model"),
        ('{"model_type": "llama", "hidden_size": 64, "num_attention_heads": 7}', "model"),
    ],
)
def test_refused_config_files_are_one_sentence(tmp_path, capsys, text, message):
    path = tmp_path / "config.json"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    for model in (path, tmp_path):
        for more in ([], ["--fit", "T4"]):
            assert plan("--model", str(model), "--rank", "4", *more) == 1
            said = capsys.readouterr().err
            assert "model" in said and len(said.splitlines()) == 1, said
    plan("--model", str(path), "--rank", "4")
    assert message in capsys.readouterr().err


@pytest.mark.field("own", "a config file with a byte-order mark (Windows)")
def test_each_config_file_with_a_byte_order_mark(tmp_path):
    path = tmp_path / "windows.json"
    path.write_text(json.dumps(LLAMA.to_dict()), encoding="utf-8-sig")
    assert peak(path) == peak(LLAMA)


@pytest.mark.field("own", "a folder whose model brings its own code")
def test_refused_own_code_is_not_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    entries = {"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig"}}
    (tmp_path / "config.json").write_text(json.dumps(entries), encoding="utf-8")
    with pytest.raises(ValueError, match="makes no config of it"):
        memory.load_config(tmp_path)


@pytest.mark.field("own", "llama-3-8b and other spellings of a catalog name")
@pytest.mark.parametrize(
    ("written", "first"),
    [
        ("llama-3-8b", "meta-llama/Meta-Llama-3-8B"),
        ("Llama 3 8B", "meta-llama/Meta-Llama-3-8B"),
        ("llama3.1-8b", "meta-llama/Llama-3.1-8B"),
        ("unsloth/llama-2-13b", "meta-llama/Llama-2-13b-hf"),
        ("gemma3-1b", "google/gemma-3-1b-it"),
        ("qwen2.5 7b", "Qwen/Qwen2.5-7B-Instruct"),
        ("mistral-7b-v0.1-instruct", "mistralai/Mistral-7B-v0.1"),
        ("smollm2 360m", "HuggingFaceTB/SmolLM2-360M-Instruct"),
    ],
)
def test_pasted_names_are_answered_by_the_nearest(written, first):
    with pytest.raises(ValueError, match=rf"known names like it: {first}"):
        memory.load_config(written)


@pytest.mark.field("own", "configs of weights that are stored quantized")
@pytest.mark.parametrize(
    ("stored", "quantization"),
    [
        ({"quant_method": "gptq", "bits": 4}, None),
        ({"quant_method": "fp8"}, "nf4"),
        ({"quant_method": "mxfp4"}, None),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, None),
    ],
)
def test_refused_weights_that_are_stored_quantized(stored, quantization):
    config = transformers.LlamaConfig(**SMALL, quantization_config=stored)
    with pytest.raises(ValueError, match=f"stored quantized .{stored['quant_method']}.*pass"):
        peak(config, quantization=quantization)
    # As a file says it, and as a model holds it that was loaded so.
    said = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    for mine in (said, transformers.BitsAndBytesConfig(load_in_4bit=True)):
        config = transformers.LlamaConfig(**SMALL, quantization_config=mine)
        assert peak(config, quantization="nf4") == peak(LLAMA, quantization="nf4")


# ------------------------------------------------------------------ adapters
@pytest.mark.field("own", "QLoRA and DoRA together")
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_each_quantized_layer_is_dequantized_for_dora(kind):
    dora = peft.LoraConfig(r=4, use_dora=True)
    plain = peak(LLAMA, quantization=kind)
    found = peak(LLAMA, quantization=kind, lora=dora)
    assert found > plain + LLAMA.num_hidden_layers * 2 * 64 * 2  # magnitudes of q and v


@pytest.mark.field("own", "what DoRA on 4 bits keeps, beside bitsandbytes' layer")
def test_each_tensor_that_dora_keeps_is_bitsandbytes():
    import bitsandbytes as bnb

    def kept(base):
        model = torch.nn.Sequential(base)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the model that has no config
            config = peft.LoraConfig(r=4, use_dora=True, target_modules=["0"])
            layer = peft.get_peft_model(model, config).base_model.model[0]
        if isinstance(base, _quantized.FakeQuantizedLinear):
            layer.forward = _quantized.quantized_lora_forward.__get__(layer)
        x = torch.randn(8, 160, requires_grad=True)
        ledger = Ledger()
        state = getattr(base.weight, "quant_state", None)
        known = [state.absmax, state.code, state.offset] if state else []
        known += [state.state2.absmax, state.state2.code] if state else []
        for tensor in [x, *layer.parameters(), *layer.buffers(), *known]:
            ledger.register(tensor, "held")
        before = ledger.current
        with ledger:
            y = layer(x)
        return ledger.current - before, y.shape

    real = bnb.nn.Linear4bit(
        160, 96, bias=False, quant_type="nf4", compress_statistics=True,
        compute_dtype=torch.float32,
    ).to("cpu")  # fmt: skip
    linear = torch.nn.Linear(160, 96, bias=False)
    fake = _quantized.FakeQuantizedLinear(linear, "nf4", True, torch.float32, "current")
    assert kept(fake) == kept(real)


@pytest.mark.field("own", "trainable_token_indices on a tied model, to the byte")
@pytest.mark.parametrize("quantization", [None, "nf4"])
def test_each_trained_row_of_a_tied_model_is_counted(quantization):
    rows = peft.LoraConfig(r=4, trainable_token_indices=[1, 2])
    assert peak(TIED, lora=rows, quantization=quantization) > peak(TIED, quantization=quantization)
    if quantization:
        return
    # the same model, step and loop with real tensors
    run = _step.Choices(
        lora=_model.Same("rows", rows), dtype=torch.float32, batch_size=2, sequence_length=24,
        loss="logits", kernels="cpu", attention="eager", gradient_checkpointing=False,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(
        TIED, dtype=torch.float32, attn_implementation="eager"
    )
    model = peft.get_peft_model(model, copy.deepcopy(rows)).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, fused=True)
    ids, labels, mask = (torch.ones(2, 24, dtype=torch.long) for _ in range(3))
    ledger = Ledger()
    for tensor in [*model.parameters(), *model.buffers(), ids, labels, mask]:
        ledger.register(tensor, "held")
    with ledger:
        for _ in range(2):
            model(input_ids=ids, labels=labels, use_cache=False).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    assert _step.trace(TIED, run).peak()[0] == ledger.peak


@pytest.mark.field("own", "LoraConfigs that PEFT or SFTTrainer refuses")
@pytest.mark.parametrize(
    ("choices", "message"),
    [
        (dict(target_modules=["q_proj", "lm_head"]), "lora: its target_modules name the head"),
        (dict(target_modules=["nothing"]), "lora: PEFT refuses it for 'llama'.*nothing"),
        (dict(init_lora_weights="corda"), "lora: PEFT refuses it for 'llama'"),
    ],
)
def test_refused_adapters_name_lora(choices, message):
    with pytest.raises(ValueError, match=message):
        peak(LLAMA, lora=peft.LoraConfig(r=4, **choices))


@pytest.mark.field("own", "targets that name one layer's module, beyond the fifth layer")
@pytest.mark.parametrize("target", [r".*layers\.6\..*q_proj", ["layers.6.self_attn.q_proj"]])
def test_each_layer_that_a_target_names_is_traced(target):
    config = transformers.LlamaConfig(**SMALL | {"num_hidden_layers": 7})
    lora = peft.LoraConfig(r=4, target_modules=target)
    found = memory.estimate_training(config, lora=lora, sequence_length=64)
    full = _step.trace(config, found.choices).with_allocator()[0].peak()
    assert (found.peak_bytes, found.parts) == full[:2]


@pytest.mark.field("own", "gradient checkpointing on a model that has none (CTRL)")
def test_refused_checkpointing_says_what_works():
    ctrl = transformers.CTRLConfig(n_embd=64, n_layer=2, n_head=4, vocab_size=128, dff=64)
    with pytest.raises(ValueError, match="'ctrl'; use gradient_checkpointing=False"):
        peak(ctrl, attention="eager", lora=None, sequence_length=64)
    choices = dict(attention="eager", lora=None, sequence_length=64)
    assert peak(ctrl, gradient_checkpointing=False, **choices) > 0


# ------------------------------------------------------------------ all that transformers has
@pytest.mark.slow
@pytest.mark.field("own", "every config class of transformers: a number or one sentence")
def test_each_config_of_transformers_ends_in_a_number_or_a_sentence():
    numbers, sentences = [], {}
    for kind in transformers.CONFIG_MAPPING:
        try:
            config = transformers.CONFIG_MAPPING[kind]()
        except Exception:  # a few have no defaults
            continue
        text = config if config.is_encoder_decoder else config.get_text_config(decoder=True)
        if isinstance(layers := getattr(text, "num_hidden_layers", None), int) and layers > 8:
            try:
                text = _configs.config_with(text, 8)
            except Exception:  # an entry forbids it: take the model as it is
                text = config
            config = text
        for choices in (
            dict(attention="sdpa"),
            dict(attention="eager"),
            dict(attention="flash_attention_2", quantization="nf4"),
        ):
            try:
                found = memory.estimate_training(config, lora=4, sequence_length=64, **choices)
            except ValueError as error:
                sentences[kind] = str(error)
                assert "\n" not in str(error), (kind, error)
                continue
            assert found.peak_bytes > 0
            numbers.append(kind)
            if kind in numbers[:-1]:
                continue  # one full trace of a kind is enough
            full = _step.trace(found.config, found.choices).with_allocator()[0]
            assert found.peak_bytes == full.peak()[0], (kind, choices)
        try:
            memory.napkin(config)
        except ValueError as error:
            assert "\n" not in str(error), (kind, error)
    assert len(set(numbers)) > 60 and len(sentences) > 300
    assert {"llama", "gemma3_text", "qwen3", "opt", "gpt2", "gemma4_text"} <= set(numbers)
