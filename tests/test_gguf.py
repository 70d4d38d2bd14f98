"""GGUF files: whole or not at all, readable inside, and honest about what they hold."""

import json
import re
import shutil
import struct

import numpy as np
import pytest
import torch
from trial_model import llama, tokenizer

from helpers.serving import _fidelity, gguf, llamacpp

TALK = [
    {"role": "user", "content": "The old key opened a hidden door."},
    {"role": "assistant", "content": "A hidden door, the old key opened."},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model and its tokenizer, saved as transformers saves them."""
    path = tmp_path_factory.mktemp("gguf") / "model"
    llama().save_pretrained(path)
    tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def f16(folder):
    return gguf.convert_model(folder, folder.parent / "tiny-f16.gguf")


def adapter(path, base=None, **settings):
    """A LoRA adapter with weights that are not zero, saved."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    settings = {"r": 4, "target_modules": ["q_proj", "down_proj"]} | settings
    model = get_peft_model(llama() if base is None else base, LoraConfig(**settings))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    model.save_pretrained(path)
    return path


def leftovers(path):
    return [p.name for p in path.iterdir() if p.name.startswith(".")]


# ── converting ───────────────────────────────────────────────────────────────────────────
def test_the_file_holds_model_tokenizer_and_template(f16):
    found = gguf.inspect(f16)
    assert found.kind == "F16"
    assert found.metadata["general.architecture"] == "llama"
    assert found.metadata["llama.embedding_length"] == 256
    assert found.metadata["tokenizer.ggml.eos_token_id"] == tokenizer().eos_token_id
    assert "generation %}" in found.metadata["tokenizer.chat_template"], "markers and all"
    assert found.metadata["tokenizer.ggml.tokens"] == "300 values"
    weights = sum(p.numel() for p in llama().parameters())
    assert found.tensors["weights"].sum() == weights
    assert found.tensors["bytes"].sum() < found.bytes
    assert 16 <= found.bits_per_weight < 16.1, "norms stay in float32"
    assert "tiny-f16.gguf: F16" in str(found) and "<table>" in found._repr_html_()


def test_weights_arrive_rounded_once(f16):
    from gguf import GGUFReader

    stored = next(t for t in GGUFReader(f16).tensors if t.name == "blk.0.ffn_up.weight")
    ours = llama().model.layers[0].mlp.up_proj.weight.detach().half()
    assert torch.equal(torch.tensor(stored.data.copy()), ours)


def test_an_existing_file_is_kept_unless_told(folder, tmp_path):
    out = tmp_path / "model.gguf"
    out.write_text("precious")
    with pytest.raises(ValueError, match="exists: pass overwrite=True"):
        gguf.convert_model(folder, out)
    assert out.read_text() == "precious"


@pytest.mark.parametrize("missing", ["config.json", "tokenizer.json"])
def test_a_missing_file_is_named(folder, tmp_path, missing):
    shutil.copytree(folder, tmp_path / "model")
    (tmp_path / "model" / missing).unlink()
    with pytest.raises(ValueError, match=missing):
        gguf.convert_model(tmp_path / "model", tmp_path / "out.gguf")
    assert not (tmp_path / "out.gguf").exists()


def test_bad_arguments_are_named(folder, tmp_path):
    with pytest.raises(ValueError, match="dtype must be one of 'f32', 'f16', 'bf16', 'q8_0'"):
        gguf.convert_model(folder, tmp_path / "out.gguf", dtype="q4")
    with pytest.raises(ValueError, match=r"out must end in \.gguf"):
        gguf.convert_model(folder, tmp_path / "out.bin")
    with pytest.raises(ValueError, match="is not a folder"):
        gguf.convert_model(tmp_path / "nowhere", tmp_path / "out.gguf")


def test_an_adapter_or_a_quantized_model_is_sent_elsewhere(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "a")
    (tmp_path / "a" / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="convert_adapter"):
        gguf.convert_model(tmp_path / "a", tmp_path / "out.gguf")
    shutil.copytree(folder, tmp_path / "q")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"load_in_4bit": True}
    (tmp_path / "q" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="quantized model"):
        gguf.convert_model(tmp_path / "q", tmp_path / "out.gguf")


@pytest.mark.slow  # the fast ones of tests/field put a script in the converter's place
def test_a_failing_converter_is_quoted_and_leaves_nothing(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text()) | {"num_hidden_layers": "one"}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"convert_hf_to_gguf\.py ended with status"):
        gguf.convert_model(tmp_path / "model", tmp_path / "out.gguf")
    assert not (tmp_path / "out.gguf").exists()
    assert not leftovers(tmp_path)


# ── adapters ─────────────────────────────────────────────────────────────────────────────
def test_an_adapter_becomes_a_small_file(folder, tmp_path):
    saved = adapter(tmp_path / "adapter")
    found = gguf.inspect(gguf.convert_adapter(saved, folder, tmp_path / "adapter.gguf"))
    assert found.metadata["general.type"] == "adapter" and found.kind == "F16"
    assert found.metadata["adapter.lora.alpha"] == 8
    assert sorted(found.tensors.index) == [
        f"blk.0.{layer}.weight.lora_{side}" for layer in ("attn_q", "ffn_down") for side in "ab"
    ]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"modules_to_save": ["lm_head"]}, "no low-rank pair.*Merge it instead"),
        ({"use_dora": True}, "DoRA"),
        ({"use_rslora": True}, r"alpha/r instead of alpha/sqrt\(r\)"),
        ({"alpha_pattern": {"q_proj": 3}}, "one alpha"),
    ],
)
def test_what_llamacpp_cannot_apply_is_refused(folder, tmp_path, settings, words):
    saved = adapter(tmp_path / "adapter", **settings)
    with pytest.raises(ValueError, match=words):
        gguf.convert_adapter(saved, folder, tmp_path / "adapter.gguf")
    assert not (tmp_path / "adapter.gguf").exists()


def test_an_adapter_for_another_base_is_refused(folder, tmp_path):
    saved = adapter(tmp_path / "adapter", base=llama(width=128))
    with pytest.raises(ValueError, match=r"another model than.*has 256 features there"):
        gguf.convert_adapter(saved, folder, tmp_path / "adapter.gguf")


def test_an_adapter_without_weights_is_named(folder, tmp_path):
    saved = adapter(tmp_path / "adapter")
    (saved / "adapter_model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"no adapter_model\.safetensors"):
        gguf.convert_adapter(saved, folder, tmp_path / "adapter.gguf")


# ── damaged files ────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("share", [0.0001, 0.01, 0.5, 0.999])
def test_a_truncated_file_is_refused(f16, tmp_path, share):
    short = tmp_path / "short.gguf"
    short.write_bytes(f16.read_bytes()[: max(8, int(f16.stat().st_size * share))])
    with pytest.raises(ValueError, match=r"cut short or damaged.*download it again"):
        gguf.inspect(short)


def test_a_renamed_file_is_refused(tmp_path):
    other = tmp_path / "weights.gguf"
    other.write_bytes(b"PK\x03\x04 a zip archive")
    with pytest.raises(ValueError, match="no GGUF file"):
        gguf.inspect(other)
    with pytest.raises(FileNotFoundError, match="is not a file"):
        gguf.inspect(tmp_path)


def test_a_corrupted_header_is_refused(f16, tmp_path):
    data = bytearray(f16.read_bytes()[:4096])
    data[8:16] = struct.pack("<Q", 2**40)  # the number of tensors
    (tmp_path / "bad.gguf").write_bytes(data)
    with pytest.raises(ValueError, match="cut short or damaged"):
        gguf.inspect(tmp_path / "bad.gguf")


# ── quantizing (llama.cpp's programs) ────────────────────────────────────────────────────
@pytest.mark.parametrize("kind", ["Q9_K", "f16", "", None])
def test_an_unknown_kind_lists_the_known_ones(f16, tmp_path, kind):
    with pytest.raises(ValueError, match="kind must be one of 'Q8_0', 'Q6_K'"):
        gguf.quantize(f16, tmp_path / "out.gguf", kind)


PROGRAMS = pytest.mark.skipif(
    llamacpp.find("llama-quantize") is None,
    reason="llama.cpp has not been built yet; the slow tests build it",
)


@PROGRAMS
def test_bits_are_counted_and_the_rows_that_fallback_tensors_are_named(f16, tmp_path):
    found = gguf.inspect(gguf.quantize(f16, tmp_path / "q4.gguf", "q4_k_m"))
    assert found.kind == "Q4_K_M"
    assert "Q4_K" in found.types, "rows of 256 divide"
    assert list(found.fallback_tensors.index) == ["blk.0.ffn_down.weight"], "rows of 320 do not"
    assert found.tensors.loc["blk.0.ffn_down.weight", "bits per weight"] > 5
    assert "1 fell back" in str(found)
    assert not len(gguf.inspect(f16).fallback_tensors)


@PROGRAMS
def test_q8_0_is_eight_and_a_half_bits(f16, tmp_path):
    found = gguf.inspect(gguf.quantize(f16, tmp_path / "q8.gguf", "Q8_0"))
    matrices = found.tensors[found.tensors["type"] == "Q8_0"]
    assert set(matrices["bits per weight"]) == {8.5}
    with pytest.raises(ValueError, match="is Q8_0 already"):
        gguf.quantize(tmp_path / "q8.gguf", tmp_path / "again.gguf", "Q4_0")
    assert not (tmp_path / "again.gguf").exists() and not leftovers(tmp_path)


@PROGRAMS
def test_a_damaged_source_is_refused_and_nothing_is_lost(f16, tmp_path):
    short = tmp_path / "short.gguf"
    short.write_bytes(f16.read_bytes()[:100_000])
    (tmp_path / "out.gguf").write_text("precious")
    with pytest.raises(ValueError, match="cut short"):
        gguf.quantize(short, tmp_path / "out.gguf", "Q8_0", overwrite=True)
    assert (tmp_path / "out.gguf").read_text() == "precious"


@PROGRAMS
def test_llamacpps_word_on_tensors_that_fell_back_is_passed_on(f16, tmp_path, capsys):
    gguf.quantize(f16, tmp_path / "q4.gguf", "Q4_K_M")
    said = capsys.readouterr().out
    assert said.startswith("Q4_K_M: 1 of 11 tensors fell back, such as blk.0.ffn_down.weight - ")
    assert "ncols 320 not divisible by 256" in said
    two = gguf.inspect(gguf.quantize(f16, tmp_path / "q2.gguf", "Q2_0"))
    assert capsys.readouterr().out == "", "rows of 320 are five blocks of 64"
    assert (
        two.kind == "Q2_0" and two.tensors.loc["blk.0.ffn_down.weight", "bits per weight"] == 2.25
    )


# ── fidelity: each answer token, by its id ───────────────────────────────────────────────
ROWS = [
    {"prompt": TALK[:1], "completion": TALK[1:]},
    {"messages": [*TALK, {"role": "user", "content": "Hm?"}, {**TALK[1], "content": "Yes 🙂é."}]},
    {"sentence": "The tea is hot.", "translation": "Hot, the tea is."},
]


def losses(folder, ids, tokens):
    """What PyTorch finds for the last `tokens` of a row, each."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0, -tokens - 1 : -1]
    return torch.nn.functional.cross_entropy(logits, torch.tensor(ids[-tokens:]))


@PROGRAMS
def test_the_perplexity_of_answers_is_pytorchs_on_the_same_tokens(folder, f16):
    table = gguf.fidelity(f16, {"same": f16}, ROWS)
    made, found = tokenizer(), table.attrs
    scored = [made.decode(i[-n:]) for i, n in zip(found["ids"], found["tokens"], strict=True)]
    assert scored == [
        "A hidden door, the old key opened.<|im_end|>",
        "Yes 🙂é.<|im_end|>",
        "Hot, the tea is.<|im_end|>",
    ]
    theirs = [losses(folder, *row) for row in zip(found["ids"], found["tokens"], strict=True)]
    assert found["losses"]["F16"] == pytest.approx([float(x) for x in theirs], rel=2e-3)
    mean = np.average(theirs, weights=found["tokens"])
    assert table.loc["F16", "perplexity"] == pytest.approx(np.exp(mean), rel=2e-3)
    assert table.loc["same", "mean KL"] == pytest.approx(0, abs=1e-4)
    trained = gguf.fidelity(f16, {"same": f16}, ROWS[:1], tokenizer=made).attrs["ids"][0]
    assert trained == made.apply_chat_template(TALK, return_dict=False)[: len(trained)]
    assert trained != found["ids"][0], "here, llama.cpp adds BOS, and spaces behind the markers"


@PROGRAMS
def test_fewer_bits_lose_more_and_a_text_is_scored_whole(f16, tmp_path):
    few = gguf.quantize(f16, tmp_path / "q2.gguf", "Q2_K")
    text = tokenizer().apply_chat_template(TALK, tokenize=False) * 2
    files = {"F16": f16, "Q2_K": few}
    table = gguf.fidelity(f16, files, text, context=64, tokenizer=tokenizer())
    assert list(table.index) == ["F16, original", "F16", "Q2_K"]
    ids = tokenizer().encode(text, add_special_tokens=False)
    assert sum(table.attrs["tokens"]) == len(ids) - 8, "each token once, but the first eight"
    assert table.loc["Q2_K", "mean KL"] > 10 * abs(table.loc["F16", "mean KL"])
    assert table.loc["Q2_K", "MB"] < table.loc["F16", "MB"]
    assert re.fullmatch(r"[+-][\d.]+ \(-?[\d.]+ to -?[\d.]+\)", table.loc["Q2_K", "added loss"])
    low, high = map(float, table.loc["Q2_K", "95 %"].split(" to "))
    assert low < table.loc["Q2_K", "perplexity"] < high


@pytest.mark.parametrize(
    ("quantized", "text", "words"),
    [
        ({}, "x", "quantized is empty"),
        ({"same": None}, "Short.", "too short: it has 6 tokens"),
        ({"same": None}, [], "no rows"),
        ({"same": None}, [ROWS[0], {"messages": TALK[:1]}], "row 1: .*question and one answer"),
    ],
)
@PROGRAMS
def test_what_cannot_be_scored_is_named(f16, quantized, text, words):
    with pytest.raises(ValueError, match=words):
        gguf.fidelity(f16, dict.fromkeys(quantized, f16), text, tokenizer=tokenizer())


def test_divergence_is_exact_where_all_is_told_and_never_more():
    generator = np.random.default_rng(0)
    p, q = (generator.dirichlet(np.ones(20) / 3) + 1e-9 for _ in "pq")
    p, q = p / p.sum(), q / q.sum()
    exact = float((p * np.log(p / q)).sum())
    most = [{n: float(np.log(x[n])) for n in np.argsort(-x)[:k]} for k in (20, 8) for x in (p, q)]
    assert _fidelity.divergence(*most[:2]) == pytest.approx(exact, abs=1e-4)
    assert 0 < _fidelity.divergence(*most[2:]) < exact


# ── importance matrices ──────────────────────────────────────────────────────────────────
def test_the_smallest_kinds_ask_for_an_importance_matrix(f16, tmp_path):
    with pytest.raises(ValueError, match=r"'IQ2_M' is so small that it demands imatrix="):
        gguf.quantize(f16, tmp_path / "out.gguf", "iq2_m")


@pytest.mark.skipif(llamacpp.find("llama-imatrix") is None, reason="not built yet")
def test_an_importance_matrix_is_measured_on_rows_and_used(folder, f16, tmp_path):
    with pytest.raises(ValueError, match="too short: with this context it needs 1024 tokens"):
        gguf.imatrix(f16, tmp_path / "im.gguf", ROWS)
    made = gguf.imatrix(f16, tmp_path / "im.gguf", ROWS, context=64)
    inside = gguf.inspect(made)
    assert inside.metadata["general.type"] == "imatrix"
    assert inside.tensors.loc["blk.0.ffn_down.weight.in_sum2", "row"] == 320
    plain = gguf.quantize(f16, tmp_path / "plain.gguf", "Q2_K")
    guided = gguf.quantize(f16, tmp_path / "guided.gguf", "Q2_K", imatrix=made)
    assert plain.read_bytes()[-50_000:] != guided.read_bytes()[-50_000:]
    small = gguf.quantize(f16, tmp_path / "iq.gguf", "IQ2_XXS", imatrix=made)
    assert "IQ2_XXS" in gguf.inspect(small).types
