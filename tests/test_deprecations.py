"""No call of ours causes a deprecation warning while it runs."""

import warnings

import deprecations
import pytest
import torch

from helpers import chat, data, generation, lora, memory, models, runtime, training


@pytest.fixture(scope="module")
def plain():
    """A tiny model."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    size = len(models.load_tokenizer(models.EMBEDDED))
    return LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=2, vocab_size=size))


def typical(plain, folder):
    """From loading to a merged model, on tiny sizes: the calls that all chapters make."""
    from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
    from transformers import LlamaConfig
    from trl import SFTConfig

    tokenizer = models.load_tokenizer(models.EMBEDDED)
    tokenizer.chat_template = chat.chatml_template()
    tokenizer = chat.prepare_tokenizer(tokenizer)
    plain.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    model = models.load_model(str(folder / "base"), quantization="nf4", device="cpu")
    model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    model = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear"))
    settings = SFTConfig(
        str(folder / "run"),
        max_steps=1,
        max_length=32,
        save_strategy="no",
        **training.machine_settings(runtime.detect()),
    )
    trainer = training.LeanSFTTrainer(
        model=chat.prepare_model(model, tokenizer),
        args=settings,
        train_dataset=data.load_yoda("train").select(range(8)),
        processing_class=tokenizer,
    )
    trainer.train()
    generation.generate(model, tokenizer, ["Hello"], max_new_tokens=2)
    model.save_pretrained(folder / "adapter")
    base = models.load_model(str(folder / "base"), dtype="float32", device="cpu")
    adapted = PeftModel.from_pretrained(base, folder / "adapter")
    lora.parameter_report(adapted)
    merged = adapted.merge_and_unload()
    merged.save_pretrained(folder / "merged")
    shape = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
    config = LlamaConfig(**shape, num_attention_heads=2, vocab_size=64)
    memory.estimate_training(config, lora=LoraConfig(r=2), sequence_length=16)


@pytest.mark.skipif(torch.cuda.is_available(), reason="written for the CPU's settings")
def test_our_calls_cause_no_deprecation(plain, tmp_path, monkeypatch):
    found = deprecations.watch(monkeypatch)
    typical(plain, tmp_path)
    assert found == []


def test_deprecations_of_our_calls_are_noticed_and_those_of_others_are_not(
    plain, tmp_path, monkeypatch
):
    from peft import prepare_model_for_kbit_training
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig
    from trl import SFTConfig

    found = deprecations.watch(monkeypatch)
    plain.save_pretrained(tmp_path)
    assert found == []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a filter does not hide them
        plain.gradient_checkpointing_enable()
    assert "activation_checkpointing_enable" in found.pop()
    SFTConfig(
        str(tmp_path), gradient_checkpointing=False, use_cpu=True, bf16=False
    )  # handed on by trl
    assert "gradient_checkpointing" in found.pop()
    AutoModelForCausalLM.from_pretrained(tmp_path, torch_dtype="float32")  # in the log
    assert "dtype" in found.pop()
    assert found == []
    four_bits = AutoModelForCausalLM.from_pretrained(
        tmp_path,
        device_map="cpu",
        quantization_config=BitsAndBytesConfig(load_in_4bit=True),
    )
    prepare_model_for_kbit_training(four_bits)  # peft's own call
    assert found == []
