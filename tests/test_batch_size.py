"""The largest batch: the right answer under a budget that is known, and nothing touched."""

import copy
import random

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import LlamaConfig, LlamaForCausalLM
from trl import SFTConfig, SFTTrainer

from helpers import chat, memory, models, runtime, training
from helpers.training import batch_size


@pytest.fixture(scope="module")
def tokenizer():
    return chat.prepare_tokenizer(models.load_tokenizer(models.EMBEDDED))


VOCABULARY = 2_000
SHAPE = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 3}
SHAPE |= {"num_attention_heads": 4, "vocab_size": VOCABULARY}


def rows():
    """Twelve rows of 80, 79, ... tokens, each with a prompt of ten."""
    made = []
    for number in range(12):
        ids = list(range(17, 97 - number))
        made.append({"input_ids": ids, "labels": [-100] * 10 + ids[10:]})
    return Dataset.from_list(made)


SETTINGS = {"use_cpu": True, "bf16": False, "report_to": "none", "disable_tqdm": True}
SETTINGS |= {"activation_checkpointing": False, "per_device_train_batch_size": 3}
SETTINGS |= {"train_sampling_strategy": "sequential", "save_strategy": "no"}


@pytest.fixture
def make(tokenizer, tmp_path):
    def made(kind=SFTTrainer, lora=None, **changes):
        torch.manual_seed(0)
        return kind(
            LlamaForCausalLM(LlamaConfig(**SHAPE)),
            args=SFTConfig(str(tmp_path), **SETTINGS | changes),
            train_dataset=rows(),
            processing_class=copy.deepcopy(tokenizer),
            peft_config=lora,
        )

    return made


@pytest.fixture
def trainer(make):
    return make()


@pytest.fixture(scope="session")
def known():
    return {}


@pytest.fixture
def peak(make, known):
    """What a real run on so many of the longest rows takes, two updates long."""

    def measured(size, kind=SFTTrainer, **changes):
        key = (size, kind, str(changes))
        if key not in known:
            twin = make(kind, per_device_train_batch_size=size, max_steps=2, **changes)
            times = 2 * twin.args.gradient_accumulation_steps
            twin.train_dataset = twin.train_dataset.select(list(range(size)) * times)
            with memory.measure("cpu") as found:
                twin.train()
            known[key] = found.peak_bytes
        return known[key]

    return measured


RUNS = {
    "plain": {},
    "mixed precision, checkpointing": {"bf16": True, "activation_checkpointing": True},
    "accumulation": {"gradient_accumulation_steps": 2},
    "LoRA": {"lora": LoraConfig(r=8, target_modules="all-linear")},
}


@pytest.mark.parametrize("kind", [SFTTrainer, training.LeanSFTTrainer])
@pytest.mark.parametrize("run", RUNS)
def test_a_try_takes_what_the_run_that_follows_takes(make, peak, kind, run):
    real = peak(4, kind, **RUNS[run])
    found = training.measure_step(make(kind, **RUNS[run]), 4)
    assert found == pytest.approx(real, rel=0.01)


@pytest.mark.parametrize("lora", [None, RUNS["LoRA"]["lora"]])
def test_a_try_has_the_autocast_and_the_checkpointing_of_the_run(make, lora):
    seen = set()

    def look(layer, *_):
        seen.add((torch.is_autocast_enabled("cpu"), layer.gradient_checkpointing))

    for settings, expected in (
        (RUNS["mixed precision, checkpointing"], {(True, True)}),
        ({}, {(False, False)}),
    ):
        trainer = make(lora=lora, per_device_train_batch_size=2, **settings)
        [layers] = [m.layers for m in trainer.model.modules() if hasattr(m, "layers")]
        layers[0].register_forward_hook(look)
        seen.clear()
        training.measure_step(trainer, 2)
        assert seen == expected
        seen.clear()
        trainer.args.max_steps = 1
        trainer.train()
        assert seen == expected, "and the run itself says the same"


def test_a_try_goes_through_the_gradient_scaler_and_leaves_it_alone(make, peak, monkeypatch):
    trainer = make()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    trainer.accelerator.scaler = scaler
    before = scaler.state_dict()
    losses = []
    real = torch.amp.GradScaler.scale
    monkeypatch.setattr(torch.amp.GradScaler, "scale", lambda *a: losses.append(a[1]) or real(*a))
    training.find_max_batch_size(trainer, memory_budget=peak(2))
    assert len(losses) >= 2, "every try scaled its loss"
    assert trainer.accelerator.scaler is scaler and scaler.state_dict() == before


@pytest.mark.parametrize("answer", [1, 2, 5])
def test_the_known_answer_is_found_from_any_start(trainer, peak, answer):
    budget = (peak(answer) + peak(answer + 1)) // 2
    for start in (None, 8):
        found = training.find_max_batch_size(trainer, start, memory_budget=budget)
        assert found == answer, start


def test_it_never_says_more_than_there_are_rows(trainer):
    assert training.find_max_batch_size(trainer, memory_budget=10**12) == 12


def test_sizes_that_would_not_fit_are_not_tried(trainer, peak, monkeypatch):
    tried = []
    real = trainer.training_step

    def watched(model, inputs, *more):
        tried.append(len(inputs["input_ids"]))
        return real(model, inputs, *more)

    monkeypatch.setattr(trainer, "training_step", watched)
    budget = (peak(4) + peak(5)) // 2
    assert training.find_max_batch_size(trainer, 12, memory_budget=budget) == 4
    # The line through 1 and 2 may be a little low, since rows get shorter: never by much.
    assert max(tried) <= 6, "a CPU that runs out of memory takes the kernel along"


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
        RuntimeError("CUDA error: out of memory\nSearch for `cudaErrorMemoryAllocation'"),
        MemoryError("Unable to allocate 2.00 GiB for an array"),
    ],
)
def test_memory_that_really_runs_out_is_survived(trainer, monkeypatch, error):
    real = trainer.compute_loss

    def small_card(model, inputs, **more):
        if len(inputs["input_ids"]) > 6:
            raise error
        return real(model, inputs, **more)

    monkeypatch.setattr(trainer, "compute_loss", small_card)
    assert training.find_max_batch_size(trainer, 16, memory_budget=10**12) == 6
    assert all(p.grad is None for p in trainer.model.parameters())


def test_another_error_is_not_taken_for_a_full_card(trainer, monkeypatch):
    def broken(model, inputs, **more):
        raise RuntimeError("a real mistake")

    monkeypatch.setattr(trainer, "compute_loss", broken)
    with pytest.raises(RuntimeError, match="a real mistake"):
        training.find_max_batch_size(trainer, memory_budget=10**12)


def test_the_memory_of_a_container_is_the_budget(trainer, peak, monkeypatch):
    few = (peak(2) + peak(3)) // 2
    monkeypatch.setattr(runtime, "available_memory_bytes", lambda: few)
    assert training.find_max_batch_size(trainer) == 2


class Card:
    """A model of 100 bytes on a card of `size` bytes, with `others` of other processes.

    held: bytes of ours that are handed out; reserved: with the allocator's reserve.
    """

    def __init__(self, monkeypatch, size, others, held, reserved, parameters=()):
        free = size - others - reserved
        for name, value in (
            ("mem_get_info", (free, size)),
            ("memory_reserved", reserved),
            ("memory_allocated", held),
        ):
            monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
        self.device = torch.device("cuda")
        self.parameters = lambda: iter(parameters)

    def get_memory_footprint(self):
        return 100


def test_the_scales_of_four_bit_weights_are_the_models_own(monkeypatch):
    from bitsandbytes.nn import LinearNF4

    weight = LinearNF4(256, 256, bias=False).to("cpu").weight
    scales = weight.quant_state.absmax.nbytes  # one byte a block: quantized twice
    assert scales == 256 * 256 // 64
    model = Card(monkeypatch, 10_000, 0, held=5000, reserved=5000, parameters=[weight])
    assert batch_size._foreign(model) <= 5000 - 100 - scales


def test_other_models_on_the_card_are_neither_budget_nor_peak(monkeypatch):
    # 1,000 on the card, 200 of other processes; of our 350 (450 with the allocator's
    # reserve) 100 are this model's. So 550 are free for its run, itself included.
    model = Card(monkeypatch, 1000, others=200, held=350, reserved=450)
    assert batch_size._foreign(model) == 250
    assert batch_size._available(model) == 550
    alone = Card(monkeypatch, 1000, others=0, held=100, reserved=100)
    assert batch_size._available(alone) == 1000


def test_a_budget_of_one_row_and_a_half(trainer, peak):
    one = training.measure_step(trainer)
    assert one == pytest.approx(peak(1), rel=0.01)
    found = training.find_max_batch_size(trainer, memory_budget=1.5 * one)
    assert peak(found) <= 1.5 * one < peak(found + 1)


@pytest.mark.parametrize("bad", [0, 2.5, True, 13])
def test_a_step_of_an_impossible_size_is_named(trainer, bad):
    with pytest.raises((TypeError, ValueError), match=f"batch_size must be .*{bad}"):
        training.measure_step(trainer, bad)


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
        "modules": [{**vars(m), "hooks": list(m._forward_hooks)} for m in trainer.model.modules()],
        "prepared": list(trainer.accelerator._models),
    }


def same(one, two):
    if isinstance(one, torch.Tensor):
        return torch.equal(one, two)
    if isinstance(one, list | tuple):
        return len(one) == len(two) and all(map(same, one, two))
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(same(one[k], two[k]) for k in one)
    return one == two


@pytest.mark.parametrize("mode", [True, False])
@pytest.mark.parametrize("run", RUNS)
def test_everything_is_left_as_it_was(make, peak, mode, run):
    trainer = make(**RUNS[run])
    trainer.model.train(mode)
    first = next(p for p in trainer.model.parameters() if p.requires_grad)
    budget = peak(3, **RUNS[run])
    first.grad = torch.ones_like(first)
    before = state(trainer)
    assert training.find_max_batch_size(trainer, memory_budget=budget * 1.01) >= 3
    after = state(trainer)
    for name in before:
        assert same(before[name], after[name]), name
    assert torch.equal(first.grad, torch.ones_like(first)), "your gradient is still there"


def test_training_goes_on_as_if_nothing_had_happened(trainer, peak, tokenizer, tmp_path):
    twin = copy.deepcopy(trainer.model)
    training.find_max_batch_size(trainer, memory_budget=peak(4))
    other = SFTTrainer(
        twin,
        args=trainer.args,
        train_dataset=rows(),
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
def test_bad_starts_are_named(trainer, bad):
    with pytest.raises((TypeError, ValueError), match=f"start must be .*{bad}"):
        training.find_max_batch_size(trainer, bad)


@pytest.mark.parametrize("bad", [0, -1, float("nan"), "8", True])
def test_bad_budgets_are_named(trainer, bad):
    with pytest.raises(ValueError, match="memory_budget must be a number of bytes"):
        training.find_max_batch_size(trainer, memory_budget=bad)


def test_a_trainer_without_data_is_named(trainer):
    trainer.train_dataset = None
    with pytest.raises(ValueError, match="no train_dataset"):
        training.find_max_batch_size(trainer)
