import copy
import math
import os

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from transformers import LlamaConfig, LlamaForCausalLM
from trl import SFTConfig, SFTTrainer

from helpers import chat, data, models, runtime, training
from helpers.training import trainer as trainer_module


@pytest.fixture
def prepared(tokenizer):
    tokenizer.chat_template = chat.chatml_template()
    return chat.prepare_tokenizer(tokenizer)


@pytest.fixture
def rows():
    return data.load_yoda("train").select(range(8))


def tiny(**changes):
    """A small random model with the embedded model's vocabulary."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49_152,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        **changes,
    )
    return LlamaForCausalLM(config)


def settings(folder, **changes):
    basics = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "max_steps": 2,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
    }
    machine = training.machine_settings(runtime.detect())
    cpu_only = {"use_cpu": True, "activation_checkpointing": False, "bf16": False}
    return SFTConfig(**{**machine, **basics, **cpu_only, "fp16": False, **changes})


def losses(trainer):
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_lean_loss_is_the_stock_loss(tmp_path, prepared, rows, accumulation):
    logged = []
    for kind in (SFTTrainer, training.LeanSFTTrainer):
        trainer = kind(
            model=tiny(),
            args=settings(tmp_path, gradient_accumulation_steps=accumulation),
            train_dataset=rows,
            processing_class=prepared,
        )
        logged.append(losses(trainer))
    assert logged[0] == pytest.approx(logged[1], abs=1e-4)
    assert logged[0][1] < logged[0][0]


def test_the_lean_gradients_are_the_stock_gradients(tmp_path, prepared, rows):
    gradients = []
    for kind in (SFTTrainer, training.LeanSFTTrainer):
        trainer = kind(
            model=tiny(),
            args=settings(tmp_path),
            train_dataset=rows,
            processing_class=prepared,
        )
        batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
        trainer.model.train()
        trainer.compute_loss(trainer.model, batch).backward()
        gradients.append([p.grad.clone() for p in trainer.model.parameters()])
    for stock, lean in zip(*gradients, strict=True):
        assert torch.allclose(stock, lean, atol=1e-6)


def test_scores_are_computed_for_trained_tokens_only(tmp_path, prepared, rows):
    model = tiny()
    seen = []
    model.lm_head.register_forward_hook(lambda _, __, output: seen.append(output.shape))
    trainer = training.LeanSFTTrainer(
        model=model, args=settings(tmp_path), train_dataset=rows, processing_class=prepared
    )
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
    trainer.compute_loss(model, batch)
    assert seen == [((batch["labels"] != -100).sum().item(), 49_152)]
    assert not model.lm_head._forward_pre_hooks  # the narrowing is gone again


def lean(tmp_path, prepared, rows, **changes):
    return training.LeanSFTTrainer(
        model=tiny(),
        args=settings(tmp_path, **changes),
        train_dataset=rows,
        processing_class=prepared,
    )


def test_a_batch_that_trains_nothing_has_no_number_for_a_loss(tmp_path, prepared, rows):
    trainer = lean(tmp_path, prepared, rows)
    collate = trainer.data_collator

    def masked(examples):
        batch = collate(examples)
        batch["labels"][:] = -100
        return batch

    batch = masked([trainer.train_dataset[0]])
    model_says = tiny()(batch["input_ids"], labels=batch["labels"]).loss
    for tokens in (None, torch.tensor(0)):
        loss = trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=tokens)
        assert torch.isnan(loss) and torch.isnan(model_says)
    before = [p.detach().clone() for p in trainer.model.parameters()]
    trainer.data_collator = masked
    assert all(math.isnan(loss) for loss in losses(trainer)), "and the log shows it"
    after = list(trainer.model.parameters())
    assert all(map(torch.equal, before, after)), "no nan reaches a weight"


def test_many_scores_go_through_the_tiles_of_trl(tmp_path, prepared, rows, monkeypatch):
    short = torch.full((8, 64), -100)
    short[:, -20:] = 5
    long = torch.full((8, 1024), 5)
    assert not trainer_module._tiles_save_memory("cuda", short, 49_152)
    assert trainer_module._tiles_save_memory("cuda", long, 49_152)
    assert not trainer_module._tiles_save_memory("cpu", long, 49_152)
    one_tile = torch.full((1, 4096), 5)
    assert not trainer_module._tiles_save_memory("cuda", one_tile, 32_768)
    assert trainer_module._tiles_save_memory("cuda", one_tile, 32_769)

    trainer = lean(tmp_path, prepared, rows)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
    ours = trainer.compute_loss(trainer.model, dict(batch))
    assert not trainer._metrics["train"]
    monkeypatch.setattr(trainer_module, "_tiles_save_memory", lambda *_: True)
    theirs = trainer.compute_loss(trainer.model, dict(batch))
    assert trainer._metrics["train"]["entropy"], "TRL's own loss, metrics included"
    assert theirs.item() == pytest.approx(ours.item(), abs=1e-4)


def test_where_two_cards_are_visible_one_is_used(tmp_path, prepared, rows):
    args = settings(tmp_path)
    args._n_gpu = 2  # what transformers counts in a notebook with two cards
    common = {"train_dataset": rows, "processing_class": prepared}
    with pytest.raises(ValueError, match=r"nn\.DataParallel"):
        SFTTrainer(tiny(), args=copy.copy(args), **common)
    trainer = training.LeanSFTTrainer(tiny(), args=args, **common)
    assert trainer._train_batch_size == args.per_device_train_batch_size
    assert len(losses(trainer)) == 2


def test_evaluation_inside_the_trainer_still_works(tmp_path, prepared, rows):
    live = training.LiveLoss()
    trainer = training.LeanSFTTrainer(
        model=tiny(),
        args=settings(tmp_path, eval_strategy="steps", eval_steps=1),
        train_dataset=rows,
        eval_dataset=rows,
        processing_class=prepared,
        callbacks=[live],
    )
    trainer.train()
    table = live.table()
    assert list(table.index) == [1, 2]
    assert table[["loss", "held-out loss"]].notna().all().all()
    ax = live.plot().axes[0]
    assert [line.get_label() for line in ax.lines] == ["loss", "held-out loss"]
    ax.set_ylim(0.024, 0.06)  # less than a factor of ten: numbers, not powers of ten
    ax.figure.canvas.draw()
    ticks = [label.get_text() for label in ax.get_yticklabels(minor=True)]
    assert "0.03" in ticks and "0.05" in ticks


@pytest.fixture(scope="module")
def quantized():
    return models.load_model(models.EMBEDDED, quantization="nf4", device="cpu")


def test_dequantized_once_changes_nothing_but_the_work(quantized):
    inputs = torch.tensor([[1, 4093, 198, 57]])
    quantized.eval()
    with torch.no_grad():
        before = quantized(inputs).logits
        with models.dequantized_once(quantized):
            inside = quantized(inputs).logits
        after = quantized(inputs).logits
    assert torch.allclose(before, inside, atol=1e-4)
    assert torch.equal(before, after)


def test_dequantized_once_ends_with_an_exception_too(quantized):
    layer = quantized.model.layers[0].self_attn.q_proj
    with pytest.raises(KeyError):
        with models.dequantized_once(quantized):
            assert "forward" in vars(layer)
            raise KeyError
    assert "forward" not in vars(layer)


def test_match_dtypes_leaves_one_dtype_and_the_codes_alone(quantized):
    model = prepare_model_for_kbit_training(
        copy.deepcopy(quantized), use_gradient_checkpointing=False
    )
    model = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear"))
    for name, parameter in model.named_parameters():
        if "lora" in name:
            parameter.data = parameter.data.bfloat16()
    codes = model.get_submodule("base_model.model.model.layers.0.mlp.up_proj").weight.clone()
    training.match_dtypes(model)
    kinds = {p.dtype for p in model.parameters()}
    assert kinds == {torch.float32, torch.uint8}
    after = model.get_submodule("base_model.model.model.layers.0.mlp.up_proj").weight
    assert torch.equal(codes, after)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_match_dtypes_keeps_an_int8_model_in_the_dtype_it_computes_in(dtype):
    model = models.load_model(models.EMBEDDED, quantization="int8", dtype=dtype, device="cpu")
    model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    assert {p.dtype for p in model.parameters()} >= {torch.int8, torch.float32}
    training.match_dtypes(model)
    assert {p.dtype for p in model.parameters()} == {torch.int8, dtype}


def test_a_short_qlora_run_learns_and_its_adapter_comes_back(tmp_path, prepared, rows, quantized):
    # After an evaluation on purpose: a 4-bit layer must still pass gradients then.
    quantized.eval()
    with torch.no_grad():
        quantized(torch.tensor([[1, 2, 3]]))
    quantized.train()
    trainer = training.LeanSFTTrainer(
        model=chat.prepare_model(quantized, prepared),
        args=settings(tmp_path, max_steps=4, num_train_epochs=2, learning_rate=2e-3),
        train_dataset=rows,
        processing_class=prepared,
        peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"]),
    )
    logged = losses(trainer)
    first, second = logged[:2], logged[2:]  # two epochs over the same two batches
    assert sum(second) < sum(first) - 0.2
    trainer.model.save_pretrained(tmp_path / "adapter")

    batch = trainer.data_collator([trainer.train_dataset[0]])
    inputs = batch["input_ids"]
    trainer.model.eval()
    with torch.no_grad():
        expected = trainer.model(inputs).logits
        fresh = models.load_model(models.EMBEDDED, quantization="nf4", device="cpu")
        fresh = PeftModel.from_pretrained(fresh, tmp_path / "adapter").eval()
        assert torch.allclose(fresh(inputs).logits, expected, atol=1e-3)


def test_fp16_trains_float32_adapters_which_the_gradient_scaler_needs(tmp_path, prepared, rows):
    # TRL makes the adapters of quantized models bfloat16, for which PyTorch's scaler has no
    # kernel on CUDA: a T4, which needs fp16, would stop at the first step.
    base = models.load_model(models.EMBEDDED, quantization="nf4", device="cpu")
    dtypes = {}
    for kind in (SFTTrainer, training.LeanSFTTrainer):
        trainer = kind(
            model=chat.prepare_model(copy.deepcopy(base), prepared),
            args=settings(tmp_path, fp16=True),
            train_dataset=rows,
            processing_class=prepared,
            peft_config=LoraConfig(r=2, target_modules=["q_proj"]),
        )
        trained = [p for p in trainer.model.parameters() if p.requires_grad]
        dtypes[kind.__name__] = {p.dtype for p in trained}
    assert dtypes == {"SFTTrainer": {torch.bfloat16}, "LeanSFTTrainer": {torch.float32}}
    frozen = {p.dtype for p in trainer.model.parameters() if not p.requires_grad}
    assert frozen == {torch.float32, torch.uint8}

    optimizer = torch.optim.AdamW(trained)
    scaler = torch.amp.GradScaler("cpu")
    batch = next(iter(trainer.get_train_dataloader()))
    loss = trainer.compute_loss(trainer.model, batch)
    before = [p.clone() for p in trained]
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    assert any(not torch.equal(a, b) for a, b in zip(before, trained, strict=True))


def test_machine_settings_are_accepted_and_follow_the_machine(tmp_path):
    here = runtime.detect()
    for device, dtype, expected in [
        ("cpu", torch.bfloat16, (True, False, False, False)),
        ("cuda", torch.bfloat16, (False, True, False, True)),
        ("cuda", torch.float16, (False, False, True, True)),
    ]:
        made = runtime.Runtime(**{**vars(here), "device": device, "compute_dtype": dtype})
        found = training.machine_settings(made)
        names = ("use_cpu", "bf16", "fp16", "activation_checkpointing")
        assert tuple(found[name] for name in names) == expected
    SFTConfig(str(tmp_path), **training.machine_settings(here))


def test_live_loss_prints_in_a_terminal(tmp_path, prepared, rows, capsys):
    trainer = training.LeanSFTTrainer(
        model=tiny(),
        args=settings(tmp_path),
        train_dataset=Dataset.from_list(list(rows)),
        processing_class=prepared,
        callbacks=[training.LiveLoss()],
    )
    trainer.train()
    assert "step 1" in capsys.readouterr().out
    assert os.listdir(tmp_path) == []


def test_an_evaluation_before_training_is_step_0_of_the_curve(tmp_path, prepared, rows):
    live = training.LiveLoss()
    trainer = training.LeanSFTTrainer(
        model=tiny(),
        args=settings(tmp_path),
        train_dataset=rows,
        eval_dataset=rows,
        processing_class=prepared,
        callbacks=[live],
    )
    base = trainer.evaluate()["eval_loss"]
    assert list(live.table().index) == [0]
    trainer.train()
    table = live.table()
    assert list(table.index) == [0, 1, 2]
    assert table.loc[0, "held-out loss"] == base and table.loc[0, "seconds"] == 0
    assert table.loc[1:, "loss"].notna().all()
    trainer.train()
    assert list(live.table().index) == [1, 2], "a second run starts a new curve"


def test_a_curve_without_a_point_says_what_is_missing(tmp_path, prepared, rows):
    live = training.LiveLoss()
    for ask in (live.table, live.plot):
        with pytest.raises(ValueError, match="no log yet: give it to a trainer"):
            ask()


# ── the loop in plain PyTorch ────────────────────────────────────────────────────────────
def ten_steps(tmp_path, prepared, kind=SFTTrainer, accumulation=1, **changes):
    """A trainer for ten updates in the order of the rows, and the batches it will see."""
    trainer = kind(
        model=chat.prepare_model(tiny(), prepared),
        args=settings(
            tmp_path,
            max_steps=10,
            gradient_accumulation_steps=accumulation,
            train_sampling_strategy="sequential",
            lr_scheduler_type="cosine",
            warmup_steps=3,
            adam_beta2=0.999,
            weight_decay=0.0,
            **changes,
        ),
        train_dataset=data.load_yoda("train").select(range(40 * accumulation)),
        processing_class=copy.deepcopy(prepared),
    )
    return trainer, list(trainer.get_train_dataloader())


@pytest.mark.parametrize("kind", [SFTTrainer, training.LeanSFTTrainer])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_plain_loop_has_the_trainers_losses(tmp_path, prepared, kind, accumulation):
    trainer, batches = ten_steps(tmp_path, prepared, kind, accumulation)
    assert len(batches) == 10 * accumulation
    ours = training.simple_loop(
        chat.prepare_model(tiny(), prepared),
        batches,
        lr=1e-2,
        gradient_accumulation_steps=accumulation,
        lr_scheduler_type="cosine",
        warmup_steps=3,
    )
    theirs = losses(trainer)
    assert len(theirs) == len(ours) == 10
    assert ours == pytest.approx(theirs, abs=1e-5)
    assert ours[-1] < ours[0] - 0.3, "and it learns"


def test_accumulation_and_a_larger_batch_give_the_same_update(tmp_path, prepared):
    _, batches = ten_steps(tmp_path, prepared)
    rows = [{name: tensor[i : i + 1] for name, tensor in batches[0].items()} for i in range(4)]
    lengths = [int((row["labels"] != -100).sum()) for row in rows]
    assert len(set(lengths)) > 1, "unequal rows, or a mean of means would pass too"
    updates = []
    for given, accumulation in (([batches[0]], 1), (rows, 4)):
        model = tiny()
        loss = training.simple_loop(model, given, lr=1e-3, gradient_accumulation_steps=accumulation)
        updates.append((loss[0], torch.cat([p.flatten() for p in model.parameters()])))
    (loss_one, one), (loss_four, four) = updates
    assert loss_one == pytest.approx(loss_four, abs=1e-5)
    assert (one - four).abs().max() < 2e-4, "an AdamW step of 1e-3 would show"
    assert (one - four).abs().mean() < 1e-7


def test_the_plain_loop_refuses_float16_which_wants_a_scaler():
    for model in (tiny().half(), get_peft_model(tiny().half(), LoraConfig(r=2))):
        with pytest.raises(ValueError, match="float16 weights, which need a gradient scaler"):
            training.simple_loop(model, [], lr=1e-3)
    assert training.simple_loop(tiny().bfloat16(), [], lr=1e-3) == []
