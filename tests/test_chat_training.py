"""Chapter 4's promise on real trainers: what is masked, and what a model then does."""

import copy

import nbformat
import pytest
import torch
from datasets import Dataset
from transformers import DataCollatorForLanguageModeling, LlamaConfig, LlamaForCausalLM
from trl import SFTConfig, SFTTrainer

from helpers import chat, generation
from helpers.course import notebooks

SENTENCES = [
    ("Glue the sheet.", "The sheet, glue."),
    ("Open the gate.", "The gate, open."),
    ("Feed the dog.", "The dog, feed."),
    ("Read the map.", "The map, read."),
]
CHATS = [
    {"messages": [{"role": "user", "content": a}, {"role": "assistant", "content": b}]}
    for a, b in SENTENCES
]
FIT = {"max_steps": 70, "learning_rate": 1e-2, "lr_scheduler_type": "constant"}


@pytest.fixture
def original(tokenizer):
    """The tokenizer as shipped (pad = eos), with our template."""
    tokenizer.chat_template = chat.chatml_template()
    return tokenizer


def make(tmp_path, rows, tokenizer, collator=None, formatting_func=None, **choices):
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            num_hidden_layers=2,
            hidden_size=64,
            intermediate_size=128,
            num_attention_heads=4,
            tie_word_embeddings=True,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    settings = {
        "output_dir": str(tmp_path),
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "save_strategy": "no",
        "disable_tqdm": True,
        "activation_checkpointing": False,
        "per_device_train_batch_size": 4,
        "logging_strategy": "no",
    }
    return SFTTrainer(
        model,
        args=SFTConfig(**settings | choices),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        data_collator=collator,
        formatting_func=formatting_func,
    )


def ask(trainer):
    question = [{"role": "user", "content": "Feed the dog."}]
    return generation.generate(
        trainer.model,
        trainer.processing_class,
        question,
        max_new_tokens=24,
        skip_special_tokens=False,
    )


def test_assistant_only_loss_trains_the_answers_and_their_ends(tmp_path, original):
    tokenizer = chat.prepare_tokenizer(original)
    several = {"messages": CHATS[0]["messages"] + CHATS[1]["messages"]}
    trainer = make(tmp_path, [*CHATS[2:], several], tokenizer, assistant_only_loss=True)
    seen = set()
    for batch in trainer.get_train_dataloader():
        for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
            trained = labels != -100
            assert torch.equal(labels[trained], ids[trained])
            seen.add(tokenizer.decode(ids[trained]))
    end = "<|im_end|>"
    expected = {f"{answer}{end}" for _, answer in SENTENCES[2:]}
    assert seen == expected | {f"{SENTENCES[0][1]}{end}{SENTENCES[1][1]}{end}"}
    assert chat.trainer_mask_view(trainer).problems == []


TALK = [
    {"role": "user", "content": "Feed the dog."},
    {"role": "assistant", "content": "The dog, feed.", "reasoning_content": "Object first."},
    {"role": "user", "content": "Open the gate."},
    {"role": "assistant", "content": "The gate, open.", "reasoning_content": "Again."},
]


def learned(tmp_path, tokenizer, row, **choices):
    view = chat.trainer_mask_view(make(tmp_path, [row], tokenizer, **choices))
    return view.learned[0], [problem.code for problem in view.problems]


def test_the_thinking_templates_of_chapter_4(tmp_path, original):
    """What the chapter says of them, on its own templates: thoughts lost, kept, switched off."""
    cells = nbformat.read(notebooks.root() / "Chapter4.ipynb", as_version=4).cells
    made = {"tokenizer": chat.prepare_tokenizer(original), "copy": copy, "chat": chat}
    exec(next(c.source for c in cells if c.source.startswith("THINKING = ")), made)
    thinker, all_turns = made["thinker"], {"assistant_only_loss": True}

    def thought(text, answer):
        return f"<think>\n{text}\n</think>\n{answer}<|im_end|>"

    second = thought("Again.", "The gate, open.")
    thinker.chat_template = made["THINKING"]
    lost = learned(tmp_path, thinker, {"messages": TALK}, **all_turns)
    assert lost == (["The dog, feed.<|im_end|>", second], ["message_lost"])
    last, _ = learned(tmp_path, thinker, {"prompt": TALK[:3], "completion": TALK[3:]})
    assert last == [second + "\n"]
    thinker.chat_template = made["KEEPING"]
    kept = learned(tmp_path, thinker, {"messages": TALK}, **all_turns)
    assert kept == ([thought("Object first.", "The dog, feed."), second], [])
    off = {"prompt": TALK[:1], "completion": [{"role": "assistant", "content": "The dog, feed."}]}
    assert learned(tmp_path, thinker, off)[0] == [thought("", "The dog, feed.") + "\n"]
    off["chat_template_kwargs"] = {"enable_thinking": False}
    assert learned(tmp_path, thinker, off) == (["The dog, feed.<|im_end|>\n"], [])


def test_a_formatting_function_beside_prompts_is_ignored(tmp_path, original):
    """Chapter 4, case 16: fails, or is ignored, and the EOS is lost with its text."""
    tokenizer = chat.prepare_tokenizer(original)
    row = {"prompt": "Feed the dog.", "completion": "The dog, feed."}
    choices = {"formatting_func": lambda row: f"### {row['prompt']} {row['completion']}"}
    with pytest.raises(ValueError, match="A formatting function was provided"):
        learned(tmp_path, tokenizer, row, **choices)
    found = learned(tmp_path, tokenizer, row, completion_only_loss=False, **choices)
    assert found == (["Feed the dog.The dog, feed."], ["eos_not_trained"])


@pytest.mark.slow
def test_the_staged_pad_equals_eos_run_does_not_stop(tmp_path, original):
    trap = copy.deepcopy(original)
    assert trap.pad_token == trap.eos_token
    rows = [
        {"input_ids": trap.apply_chat_template(c["messages"], return_dict=False)} for c in CHATS
    ]
    trainer = make(
        tmp_path,
        rows,
        trap,
        collator=DataCollatorForLanguageModeling(trap, mlm=False),
        dataset_kwargs={"skip_prepare_dataset": True},
        **FIT,
    )
    found = {problem.code for problem in chat.trainer_mask_view(trainer).problems}
    assert {"eos_not_trained", "end_of_turn_not_trained"} <= found
    trainer.train()
    assert "<|im_end|>" not in ask(trainer)
