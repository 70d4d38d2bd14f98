"""The largest batch: the right answer under a budget that is known, and nothing touched."""

import copy
import random

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from trl import SFTConfig, SFTTrainer

from helpers import chat, data, largest_batch, memory, models, training


@pytest.fixture(scope="module")
def tokenizer():
    made = models.load_tokenizer(models.EMBEDDED)
    made.chat_template = chat.chatml_template()
    return chat.prepare_tokenizer(made)


@pytest.fixture
def trainer(tokenizer, tmp_path):
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    config = LlamaConfig(**shape, num_attention_heads=4, vocab_size=len(tokenizer))
    settings = {"use_cpu": True, "bf16": False, "report_to": "none", "disable_tqdm": True}
    settings |= {"activation_checkpointing": False, "per_device_train_batch_size": 3}
    return SFTTrainer(
        LlamaForCausalLM(config),
        args=SFTConfig(str(tmp_path), **settings),
        train_dataset=data.load_yoda("train").select(range(24)),
        processing_class=copy.deepcopy(tokenizer),
    )


def peak(trainer, size):
    """What one step with `size` of the longest rows really takes, measured apart."""
    twin = copy.deepcopy(trainer.model).train()
    rows = sorted(trainer.train_dataset, key=lambda row: -len(row["input_ids"]))[:size]
    with memory.measure("cpu") as found:
        optimizer = torch.optim.AdamW(twin.parameters(), lr=1e-3, fused=True)
        batch = trainer.data_collator(rows)
        twin_trainer = copy.copy(trainer)
        twin_trainer.model = twin
        twin_trainer.compute_loss(twin, batch).backward()
        optimizer.step()
    return found.peak_bytes


@pytest.mark.parametrize("answer", [1, 2, 5])
def test_the_known_answer_is_found_from_any_start(trainer, answer):
    budget = (peak(trainer, answer) + peak(trainer, answer + 1)) // 2
    for start in (None, 8):
        found = training.find_max_batch_size(trainer, start, memory_budget=budget)
        assert found == answer, start


def test_it_never_says_more_than_there_are_rows(trainer):
    assert training.find_max_batch_size(trainer, memory_budget=10**12) == 24


def test_sizes_that_would_not_fit_are_not_tried(trainer, monkeypatch):
    tried = []
    real = largest_batch._peak

    def watched(trainer, rows, size):
        tried.append(size)
        return real(trainer, rows, size)

    monkeypatch.setattr(largest_batch, "_peak", watched)
    budget = (peak(trainer, 4) + peak(trainer, 5)) // 2
    assert training.find_max_batch_size(trainer, 24, memory_budget=budget) == 4
    # The line through 1 and 2 may be a little low, since rows get shorter: never by much.
    assert max(tried) <= 6, "a CPU that runs out of memory takes the kernel along"


def test_memory_that_really_runs_out_is_survived(trainer, monkeypatch):
    real = trainer.compute_loss

    def small_card(model, inputs, **more):
        if len(inputs["input_ids"]) > 6:
            raise torch.OutOfMemoryError("CUDA out of memory (as a card would say)")
        return real(model, inputs, **more)

    monkeypatch.setattr(trainer, "compute_loss", small_card)
    assert training.find_max_batch_size(trainer, 16, memory_budget=10**12) == 6
    assert all(p.grad is None for p in trainer.model.parameters())


def state(trainer):
    return {
        "weights": [p.detach().clone() for p in trainer.model.parameters()],
        "arguments": trainer.args.to_dict(),
        "random": (random.getstate(), np.random.get_state()[1].tolist()),
        "torch": torch.get_rng_state(),
        "mode": trainer.model.training,
        "metrics": copy.deepcopy(dict(trainer._metrics)),
        "optimizer": trainer.optimizer,
        "frozen": [p.requires_grad for p in trainer.model.parameters()],
    }


def same(one, two):
    if isinstance(one, torch.Tensor):
        return torch.equal(one, two)
    if isinstance(one, list | tuple):
        return len(one) == len(two) and all(map(same, one, two))
    return one == two


@pytest.mark.parametrize("mode", [True, False])
def test_everything_is_left_as_it_was(trainer, mode):
    trainer.model.train(mode)
    first = next(trainer.model.parameters())
    budget = peak(trainer, 3)
    first.grad = torch.ones_like(first)
    before = state(trainer)
    training.find_max_batch_size(trainer, memory_budget=budget)
    after = state(trainer)
    for name in before:
        assert same(before[name], after[name]), name
    assert torch.equal(first.grad, torch.ones_like(first)), "your gradient is still there"


def test_training_goes_on_as_if_nothing_had_happened(trainer, tokenizer, tmp_path):
    twin = copy.deepcopy(trainer.model)
    training.find_max_batch_size(trainer, memory_budget=peak(trainer, 4))
    other = SFTTrainer(
        twin,
        args=trainer.args,
        train_dataset=data.load_yoda("train").select(range(24)),
        processing_class=copy.deepcopy(tokenizer),
    )
    for each in (trainer, other):
        each.args.max_steps = 2
        each.train()
    assert same(list(trainer.model.parameters()), list(twin.parameters()))


def test_not_even_one_row_is_an_error_with_ways_out(trainer):
    with pytest.raises(ValueError, match=r"not even one row of .* tokens fits") as error:
        training.find_max_batch_size(trainer, memory_budget=1000)
    for way in ("max_length", "activation_checkpointing", "quantize"):
        assert way in str(error.value)


@pytest.mark.parametrize("bad", [0, -1, 2.5, "8", True])
def test_bad_arguments_are_named(trainer, bad):
    with pytest.raises((ValueError, TypeError), match="start"):
        training.find_max_batch_size(trainer, bad)
    with pytest.raises((ValueError, TypeError), match="memory_budget"):
        training.find_max_batch_size(trainer, memory_budget=bad)


def test_a_trainer_without_data_is_named(trainer):
    trainer.train_dataset = None
    with pytest.raises(ValueError, match="no train_dataset"):
        training.find_max_batch_size(trainer)
