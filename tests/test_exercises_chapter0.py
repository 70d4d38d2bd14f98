"""Chapter 0's exercises refuse typical wrong answers and say what is off."""

import pytest

from helpers import data
from helpers.course import exercises
from helpers.course.exercises import chapter0

TOKENIZER = chapter0._tokenizer()
QUESTION = chapter0.MESSAGES[:1]
PROMPT = TOKENIZER.apply_chat_template(QUESTION, tokenize=False, add_generation_prompt=True)


def edits_in_place(input_ids, attention_mask):
    input_ids[attention_mask == 0] = -100
    return input_ids


WRONG = [
    ("0.1", 7 * 4.127 / 8, "quantizes everything"),
    ("0.1", 3.5, "scales of their blocks"),
    ("0.1", 14, "before quantization"),
    ("0.1", 6.5 * 4.127 + 8, "gigabits"),
    ("0.1", 4.353e9, "In GB"),
    ("0.1", 28, "Two piles"),
    ("0.1", 4.054, "GiB"),
    ("0.1", "four", "one number"),
    ("0.1", True, "one number"),
    ("0.1", [4.3, 1.0], "one number"),
    ("0.2", 32, "one epoch"),
    ("0.2", 375, "Those are batches"),
    ("0.2", 93, "not carried over"),
    ("0.2", 94, "not carried over"),
    ("0.2", 3000, "How many batches"),
    ("0.3", 3, "a function"),
    ("0.3", lambda ids, mask: ids, "Nothing is masked"),
    ("0.3", lambda ids, mask: ids.masked_fill(ids == 2, -100), "never stop talking"),
    ("0.3", lambda ids, mask: ids.masked_fill(mask == 0, 0), "0 is a token"),
    ("0.3", lambda ids, mask: ids * mask, "0 is a token"),
    ("0.3", lambda ids, mask: ids[0], "shape of input_ids"),
    ("0.3", edits_in_place, "changed input_ids"),
    ("0.3", lambda ids, mask: ids.masked_fill(mask == 1, -100), "-100 where it is 0"),
    ("0.4", QUESTION[0]["content"], "without its template"),
    ("0.4", TOKENIZER.apply_chat_template(QUESTION, tokenize=False), "one argument"),
    (
        "0.4",
        TOKENIZER.apply_chat_template(chapter0.MESSAGES, tokenize=False),
        "nothing to say",
    ),
    ("0.4", "<|im_start|>system\nYou are kind.<|im_end|>\n" + PROMPT, "system message"),
    ("0.4", PROMPT.rstrip(), "blank space"),
    ("0.4", "assistant:", "end where the answer begins"),
    ("0.4", [1, 2], "a str"),
    ("0.5", ["prompt_trained"], "three codes"),
    ("0.5", chapter0.FAULTS[::-1], "another order"),
    ("0.5", ["double_bos", *chapter0.FAULTS[1:]], "row 0"),
    ("0.6", True, "a function"),
    ("0.6", lambda s, a: sorted(data.words(s)) == sorted(data.words(a)), "must change"),
    ("0.6", lambda s, a: set(data.words(s)) == set(data.words(a)), "says two words twice"),
    ("0.6", lambda s, a: len(data.words(s)) == len(data.words(a)) and a != s, "lost or"),
    ("0.6", lambda s, a: a == "Cold, the coffee is.", "that is allowed"),
]


@pytest.mark.parametrize(("number", "answer", "feedback"), WRONG)
def test_wrong_answers_get_their_own_feedback(number, answer, feedback):
    result = exercises.check(number, answer)
    assert not result.passed
    assert feedback in result.message, result.message


def test_each_row_of_0_5_has_exactly_the_fault_it_should_have():
    from helpers import chat

    given = exercises.given("0.5")
    for row, fault in zip(given["rows"], chapter0.FAULTS, strict=True):
        view = chat.mask_view(given["tokenizer"], row["input_ids"], row["labels"])
        codes = {problem.code for problem in view.problems} - {"eos_not_trained"}
        assert codes == {fault}
    assert exercises.check("0.5", ["eos_not_trained", *chapter0.FAULTS[1:]]).passed


def test_steps_are_what_the_trainer_would_do(tmp_path):
    import torch
    from transformers import Trainer, TrainingArguments

    args = TrainingArguments(
        str(tmp_path),
        per_device_train_batch_size=8,
        gradient_accumulation_steps=4,
        num_train_epochs=3,
        use_cpu=True,
    )
    trainer = Trainer(torch.nn.Linear(1, 1), args, train_dataset=list(range(1000)))
    loader = trainer.get_train_dataloader()
    assert trainer.set_initial_training_values(args, loader)[-1] == 96
