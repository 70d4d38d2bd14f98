"""Predicted against measured on a real card.

`python -m pytest -m gpu -s tests/test_memory_gpu.py` prints every cell and holds it to 7 %.
The models have random weights, built from a config, so nothing is downloaded.
"""

import gc
import itertools

import pytest
import torch
import transformers

from helpers import memory
from helpers.memory import cards

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA card on this machine"),
]
CONFIG = dict(
    hidden_size=1024, intermediate_size=2816, num_hidden_layers=8, num_attention_heads=16,
    num_key_value_heads=8, vocab_size=32000,
)  # fmt: skip
CELLS = list(itertools.product(["sdpa", "eager"], [False, True], [None, 16], [None, "nf4", "int8"]))


def measured_step(config, choices):
    """Two real steps with trl's fused head, as SFTTrainer computes its loss."""
    import peft
    from trl.trainer.utils import add_fused_lm_head

    model = transformers.AutoModelForCausalLM.from_config(
        config, dtype=torch.bfloat16, attn_implementation=choices["attention"]
    )
    if choices["quantization"]:
        from bitsandbytes import nn as bnb

        for name, module in list(model.named_modules()):
            if isinstance(module, torch.nn.Linear) and "lm_head" not in name:
                size = (module.in_features, module.out_features)
                if choices["quantization"] == "int8":
                    new = bnb.Linear8bitLt(*size, bias=False, has_fp16_weights=False, threshold=6)
                else:
                    new = bnb.Linear4bit(
                        *size, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4"
                    )
                new.load_state_dict(module.state_dict())
                model.set_submodule(name, new)
        model.is_loaded_in_8bit = choices["quantization"] == "int8"
        model.is_loaded_in_4bit = not model.is_loaded_in_8bit
        model.requires_grad_(False)
    model = model.to("cuda").train()
    add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
    if choices["lora"]:
        model = peft.get_peft_model(model, peft.LoraConfig(r=choices["lora"]))
        if choices["quantization"]:
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.data = parameter.data.to(torch.bfloat16)
        model.enable_input_require_grads()
    if choices["gradient_checkpointing"]:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, fused=True)
    shape = (choices["batch_size"], choices["sequence_length"])
    ids = torch.randint(0, config.vocab_size, shape, device="cuda")
    with memory.measure("cuda") as measured:
        for _ in range(2):
            loss = model(input_ids=ids, labels=ids, fused_lm_head=True).loss
            loss.backward()
            del loss
            optimizer.step()
            optimizer.zero_grad()
    del model, optimizer, trained, ids
    gc.collect()
    torch.cuda.empty_cache()
    return measured


@pytest.mark.parametrize(("attention", "checkpointing", "lora", "quantization"), CELLS)
def test_predicted_against_measured(attention, checkpointing, lora, quantization):
    if quantization and lora is None:
        pytest.skip("a quantized model needs adapters")
    choices = dict(
        attention=attention, gradient_checkpointing=checkpointing, lora=lora,
        quantization=quantization, batch_size=4, sequence_length=1024,
    )  # fmt: skip
    config = transformers.LlamaConfig(**CONFIG)
    card = cards.of_this_machine()
    predicted = memory.estimate_training(config, gpu=card, **choices)
    measured = measured_step(config, choices)
    error = predicted.peak_bytes / measured.peak_bytes - 1
    mega = [
        f"{value / 1e6:,.0f} MB"
        for run in (predicted, measured)
        for value in (run.peak_bytes, run.reserved_bytes)
    ]
    print(f"{card}, compute capability {card.capability}, {card.memory / 2**20:,.0f} MiB:")
    print(f"{attention:6} checkpointing={checkpointing!s:5} lora={lora} {quantization}:")
    print(f"  predicted {mega[0]}, measured {mega[2]} ({error:+.1%})")
    print(f"  reserved: predicted {mega[1]}, measured {mega[3]}")
    assert abs(error) < 0.07
