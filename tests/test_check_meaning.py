"""What `check` calls silent: seen to happen with the installed libraries, one by one.

The 8-bit layers under checkpointing, strings without a template and the function that nobody
calls have their proofs in test_memory, test_chat_training and test_doctor.
"""

import copy
import logging

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, processors
from tokenizers.models import WordLevel
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaTokenizerFast,
    TrainingArguments,
)
from trl import SFTConfig, SFTTrainer

from helpers import chat, models
from helpers.course import doctor

TALK = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = models.load_tokenizer(models.EMBEDDED)
    tokenizer.chat_template = chat.chatml_template()
    return chat.prepare_tokenizer(tokenizer)


@pytest.fixture
def model(tokenizer):
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    return LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=2, vocab_size=len(tokenizer)))


def trained(model, tokenizer, rows, folder, **more):
    """The texts that a trainer makes of rows."""
    settings = SFTConfig(str(folder), use_cpu=True, bf16=False, report_to="none", **more)
    rows = Dataset.from_list(rows)
    trainer = SFTTrainer(model, args=settings, train_dataset=rows, processing_class=tokenizer)
    return [tokenizer.decode(row["input_ids"]) for row in trainer.train_dataset]


def test_default_dtype(model, tmp_path):
    model.half().save_pretrained(tmp_path)
    assert AutoModelForCausalLM.from_pretrained(tmp_path).dtype is torch.float16


def test_sft_defaults(tmp_path):
    ours, plain = SFTConfig(str(tmp_path), use_cpu=True), TrainingArguments(str(tmp_path))
    assert (ours.bf16, plain.bf16) == (True, False)
    assert (ours.gradient_checkpointing, plain.gradient_checkpointing) == (True, False)
    assert (ours.logging_steps, plain.logging_steps) == (10, 500)


def test_packing_changed(model, tokenizer, tmp_path):
    rows = [{"text": "a b c d e f g"}] * 5  # seven tokens and an end
    more = {"packing": True, "max_length": 20}
    whole = trained(model, tokenizer, rows, tmp_path, **more)
    cut = trained(model, tokenizer, rows, tmp_path, packing_strategy="wrapped", **more)
    assert [text.count("a b c d e f g") for text in whole] == [2, 2, 1]
    assert [text.count("a b c d e f g") for text in cut] == [2, 2]  # and two that are cut
    assert "".join(cut) == "".join(whole)


def test_second_end(model, tokenizer, tmp_path):
    end = tokenizer.eos_token
    text = tokenizer.apply_chat_template(TALK, tokenize=False)
    (templated,) = trained(model, tokenizer, [{"text": text}], tmp_path, dataset_text_field="text")
    (talk,) = trained(model, tokenizer, [{"messages": TALK}], tmp_path)
    assert templated == text + end
    assert text.endswith(end + "\n") and talk == text


def test_base_model_is_adapted(model):
    ids = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        before = model(ids).logits
        adapted = get_peft_model(model, LoraConfig(init_lora_weights=False)).eval()
        assert torch.equal(adapted.base_model(ids).logits, adapted(ids).logits)
        assert not torch.allclose(adapted(ids).logits, before)
        with adapted.disable_adapter():
            assert torch.allclose(adapted(ids).logits, before)


def test_no_attentions(model, tmp_path):
    ids = torch.tensor([[1, 2, 3]])
    assert not model(ids, output_attentions=True).attentions
    model.save_pretrained(tmp_path)
    cured = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    assert cured(ids, output_attentions=True).attentions[0].shape == (1, 2, 3, 3)


def test_report_to_none(tmp_path):
    assert TrainingArguments(str(tmp_path)).report_to == []


def test_setting_ignored(caplog):
    with caplog.at_level(logging.WARNING):
        settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_type="nf4")
    assert settings.bnb_4bit_quant_type == "fp4"
    assert not caplog.records


def test_pad_to_max_length(tokenizer):
    old = tokenizer("a b", pad_to_max_length=True, max_length=9, truncation=True)
    today = tokenizer("a b", padding="max_length", max_length=9, truncation=True)
    assert (len(old.input_ids), len(today.input_ids)) == (2, 9)


def test_always_safetensors(model, tmp_path):
    model.save_pretrained(tmp_path, safe_serialization=False)
    assert (tmp_path / "model.safetensors").is_file()
    assert not list(tmp_path.glob("*.bin"))


def test_special_tokens_map(tokenizer):
    own = copy.deepcopy(tokenizer)
    own.add_special_tokens({"additional_special_tokens": ["<|note|>"]})
    assert "<|note|>" not in str(own.special_tokens_map)
    assert "<|note|>" in own.extra_special_tokens


def test_adapter_bfloat16(model, tokenizer, tmp_path):
    model.save_pretrained(tmp_path)
    four_bits = AutoModelForCausalLM.from_pretrained(
        tmp_path,
        device_map="cpu",
        quantization_config=BitsAndBytesConfig(load_in_4bit=True),
    )
    settings = SFTConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none")
    trainer = SFTTrainer(
        four_bits,
        args=settings,
        train_dataset=Dataset.from_list([{"text": "a"}]),
        processing_class=tokenizer,
        peft_config=LoraConfig(),
    )
    adapter = [p for p in trainer.model.parameters() if p.requires_grad]
    assert {p.dtype for p in adapter} == {torch.bfloat16}


def test_add_eos_token(tmp_path):
    words = {"<s>": 0, "</s>": 1, "a": 2}
    made = Tokenizer(WordLevel(words, unk_token="<s>"))
    frame = {"single": "<s> $A", "special_tokens": [("<s>", 0)]}
    made.post_processor = processors.TemplateProcessing(**frame)
    ends = {"bos_token": "<s>", "eos_token": "</s>"}
    own = LlamaTokenizerFast(tokenizer_object=made, **ends)
    own.save_pretrained(tmp_path)
    plain = AutoTokenizer.from_pretrained(tmp_path)
    ended = AutoTokenizer.from_pretrained(tmp_path, add_eos_token=True)
    assert plain("a").input_ids == [0, 2]
    assert ended("a").input_ids == [2, 1]


def test_bin_files(model, tmp_path):
    get_peft_model(model, LoraConfig()).save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").is_file()
    assert not list(tmp_path.glob("*.bin"))


def test_template_returns_dict(tokenizer):
    assert len(tokenizer.apply_chat_template(TALK)) == 2  # keys
    assert len(tokenizer.apply_chat_template(TALK, return_dict=False)) > 9


def test_each_meaning_has_its_proof():
    proved = {name.removeprefix("test_") for name in globals() if name.startswith("test_")}
    assert {s.name for s in doctor.SECTIONS["Calls that still run and mean something else"]} <= (
        proved
    )
