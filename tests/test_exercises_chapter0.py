"""Chapter 0's exercises refuse what is wrong and say what is off; they take what is right."""

from decimal import Decimal
from functools import partial

import numpy as np
import pytest
import torch

from helpers import data
from helpers.course import exercises
from helpers.course.exercises import chapter0

SETTINGS = {
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 4,
    "num_train_epochs": 3,
    "warmup_steps": 20,
}
FOUND = {run: name for run, (name, _) in chapter0.DIAGNOSES.items()}
PAD = 2


def swapped(one, other):
    """The right diagnoses but for two runs, which change places."""
    return FOUND | {one: FOUND[other], other: FOUND[one]}


# ── 0.3: functions of input_ids and attention_mask ───────────────────────────────────────
def edits_in_place(input_ids, attention_mask):
    input_ids[attention_mask == 0] = -100
    return input_ids


def returns_nothing(input_ids, attention_mask):
    input_ids.masked_fill(attention_mask == 0, -100)


def keeps_the_first_end(input_ids, attention_mask):
    """Of the padding at a row's end, the first is taken for the end of the answer."""
    labels = input_ids.clone()
    for row in labels:
        last = len(row)
        while last > 1 and row[last - 1] == PAD and row[last - 2] == PAD:
            last -= 1
        row[last:] = -100
    return labels


def in_a_loop(input_ids, attention_mask):
    labels = input_ids.tolist()
    for row, mask in zip(labels, attention_mask.tolist(), strict=True):
        for place, real in enumerate(mask):
            if not real:
                row[place] = -100
    return labels


def in_numpy(input_ids, attention_mask):
    return np.where(attention_mask.numpy() == 1, input_ids.numpy(), -100)


def by_index(ids, mask):
    labels = ids.clone()
    labels[~mask.bool()] = -100
    return labels


# ── 0.6: functions of a sentence ─────────────────────────────────────────────────────────
VERBS = {"is", "are", "was", "were", "am", "will", "can", "must", "may", "should", "could"}
VERBS |= {"has", "have", "had"}


def cut(sentence, at):
    words = sentence.rstrip(".?").split()
    return f"{' '.join(words[at:])}, {' '.join(words[:at])}{sentence[-1]}"


def behind(verbs, sentence, negated=True):
    """Cut behind the first of these verbs, else before the last word."""
    words = sentence.rstrip(".?").split()
    found = [i + 1 for i, word in enumerate(words) if i and word in verbs]
    place = found[0] if found else len(words) - 1
    return cut(sentence, place + (negated and words[place] == "not"))


class Yoda:
    """A program need not be a function, and Yoda may hum."""

    def __call__(self, sentence):
        return "Hmm, " + behind(VERBS, sentence).upper()


def looked_up(sentence):
    rows = data.load_yoda("train", form="columns").to_pandas()
    known = dict(zip(rows["sentence"], rows["translation"], strict=True))
    return known.get(sentence, sentence)


WRONG = [
    ("0.1", 7 * 4.127 / 8, "quantizes everything"),
    ("0.1", 6.5 * 4.127 / 8, "leaves out"),
    ("0.1", 3.5, "scales of their blocks"),
    ("0.1", 6.5 * 4 / 8 + 1, "scales of their blocks"),
    ("0.1", 14, "before quantization"),
    ("0.1", 28, "before quantization"),
    ("0.1", 6.5 * 4.127 + 8, "gigabits"),
    ("0.1", 4.353e9, "In GB"),
    ("0.1", 4353, "In GB"),
    ("0.1", 4.054, "GiB"),
    ("0.1", 7, "Two piles"),
    ("0.1", 6.5 * 4.127 / 8 + 8, "Two piles"),
    ("0.1", 0, "Two piles"),
    ("0.1", -4.353, "Two piles"),
    ("0.1", "four", "one number"),
    ("0.1", True, "one number"),
    ("0.1", [4.3, 1.0], "one number"),
    ("0.1", None, "one number"),
    ("0.2", SETTINGS | {"per_device_train_batch_size": 16}, "16 rows at once do not fit"),
    ("0.2", SETTINGS | {"per_device_train_batch_size": 8}, "8 rows at once do not fit"),
    ("0.2", SETTINGS | {"gradient_accumulation_steps": 1}, "4 x 1 = 4 rows"),
    ("0.2", SETTINGS | {"gradient_accumulation_steps": 16}, "4 x 16 = 64 rows"),
    ("0.2", SETTINGS | {"per_device_train_batch_size": 3}, "3 x 4 = 12 rows"),
    ("0.2", SETTINGS | {"per_device_train_batch_size": 2}, "2 x 4 = 8 rows"),
    ("0.2", SETTINGS | {"gradient_accumulation_steps": 0}, "4 x 0 = 0 rows"),
    ("0.2", SETTINGS | {"num_train_epochs": 1}, "82 updates"),
    ("0.2", SETTINGS | {"num_train_epochs": 2}, "164 updates"),
    ("0.2", SETTINGS | {"num_train_epochs": 4}, "328 updates"),
    ("0.2", SETTINGS | {"max_steps": 100}, "100 updates"),
    ("0.2", SETTINGS | {"warmup_steps": 0}, "0 of 246"),
    ("0.2", SETTINGS | {"warmup_steps": 10}, "4% of them"),
    ("0.2", SETTINGS | {"warmup_steps": 100}, "41% of them"),
    ("0.2", SETTINGS | {"packing": True}, "glued together"),
    ("0.2", {}, "8 rows at once do not fit"),
    ("0.2", SETTINGS | {"batch_size": 4}, "unexpected keyword argument"),
    ("0.2", [4, 4, 3, 20], "dict of keywords"),
    ("0.2", 246, "dict of keywords"),
    ("0.3", 3, "a function"),
    ("0.3", torch.tensor(chapter0.MASK), "a function"),
    ("0.3", lambda ids, mask: ids, "Nothing is masked"),
    ("0.3", lambda ids, mask: ids.masked_fill(ids == PAD, -100), "never stop talking"),
    ("0.3", lambda ids, mask: ids.masked_fill(mask == 0, 0), "Other numbers are tokens"),
    ("0.3", lambda ids, mask: ids * mask, "Other numbers are tokens"),
    ("0.3", lambda ids, mask: ids.masked_fill(mask == 0, -1), "Other numbers are tokens"),
    ("0.3", lambda ids, mask: mask, "Other numbers are tokens"),
    ("0.3", lambda ids, mask: ids[0], "shape of input_ids"),
    ("0.3", lambda ids, mask: ids[mask == 1], "shape of input_ids"),
    ("0.3", lambda ids, mask: -100, "shape of input_ids"),
    ("0.3", lambda ids: ids, "takes 1 positional argument"),
    ("0.3", edits_in_place, "changed input_ids"),
    ("0.3", returns_nothing, "returns nothing"),
    ("0.3", keeps_the_first_end, "cut off before its end"),
    ("0.3", lambda ids, mask: ids.masked_fill(mask == 1, -100), "never stop|real tokens"),
    ("0.3", lambda ids, mask: torch.full_like(ids, -100), "never stop|real tokens"),
    ("0.3", lambda ids, mask: ids.masked_fill((mask == 0) | (ids == 5), -100), "real tokens"),
    ("0.4", list(FOUND.values())[::-1], "Look at run A again"),
    ("0.4", swapped("A", "D"), "Look at run A again"),
    ("0.4", swapped("B", "E"), "Look at run B again"),
    ("0.4", swapped("C", "D"), "Look at run C again"),
    ("0.4", swapped("C", "E"), "Look at run C again"),
    ("0.4", swapped("A", "B"), "Look at run A again"),
    ("0.4", swapped("D", "E"), "Look at run D again"),
    ("0.4", FOUND | {"B": "steps too small"}, "one of them twice"),
    ("0.4", dict.fromkeys(FOUND, "goes well"), "one of them twice"),
    ("0.4", FOUND | {"A": "overfitting"}, "none of the five"),
    ("0.4", "goes well", "for each of the five"),
    ("0.4", list(FOUND.values())[:4], "for each of the five"),
    ("0.4", 5, "for each of the five"),
    ("0.4", {f"run {run}": name for run, name in FOUND.items()}, "runs are called"),
    ("0.5", ["prompt_trained"], "three codes"),
    ("0.5", "prompt_trained", "three codes"),
    ("0.5", 3, "three codes"),
    ("0.5", None, "three codes"),
    ("0.5", chapter0.FAULTS[::-1], "another order"),
    ("0.5", [chapter0.FAULTS[1], chapter0.FAULTS[0], chapter0.FAULTS[2]], "another order"),
    ("0.5", ["double_bos", *chapter0.FAULTS[1:]], "row 0"),
    ("0.5", [chapter0.FAULTS[0], "nothing_trained", "nothing_trained"], "row 1"),
    ("0.5", [*chapter0.FAULTS[:2], "padding_trained"], "row 2"),
    ("0.5", [[], [], []], "row 0"),
    ("0.6", "Cold, the blorp is.", "a function"),
    ("0.6", chapter0._last_word("The tea is hot."), "a function"),
    ("0.6", lambda sentence: sentence, "Exact match 0.0 %"),
    ("0.6", looked_up, "Exact match 0.0 %"),
    ("0.6", lambda sentence: "", "you say ''"),
    ("0.6", chapter0._last_word, "a gain of 0.0"),
    ("0.6", partial(behind, {"will"}), "a gain of 3.0 (1.3 to 5.0) points: the interval"),
    ("0.6", partial(behind, {"not"}, negated=False), "should begin above 10"),
    ("0.6", partial(behind, VERBS, negated=False), "should begin above 10"),
    ("0.6", lambda sentence: cut(sentence, 1), "a gain of -"),
    ("0.6", lambda sentence: cut(sentence, -2), "a gain of -"),
    ("0.6", lambda sentence: data.words(sentence), "not a text"),
    ("0.6", lambda sentence: None, "not a text"),
    ("0.6", print, "not a text"),
    ("0.6", lambda: "", "takes 0 positional arguments"),
]
RIGHT = [
    ("0.1", (6.5e9 * 4.127 / 8 + 0.5e9 * 16 / 8) / 1e9),
    ("0.1", 4.35),
    ("0.1", 4.4),
    ("0.1", "4.35"),
    ("0.1", np.float32(4.353)),
    ("0.1", torch.tensor([4.353])),
    ("0.1", Decimal("4.353")),
    ("0.2", SETTINGS),
    ("0.2", SETTINGS | {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 8}),
    ("0.2", SETTINGS | {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 16}),
    ("0.2", SETTINGS | {"num_train_epochs": 2.5, "warmup_steps": 15}),
    ("0.2", SETTINGS | {"max_steps": 240}),
    ("0.2", SETTINGS | {"warmup_steps": 0.08}),
    ("0.2", SETTINGS | {"per_device_train_batch_size": np.int64(4)}),
    ("0.2", SETTINGS | {"learning_rate": 1e-3, "output_dir": "outputs/mine"}),
    ("0.3", lambda ids, mask: ids.masked_fill(mask == 0, -100)),
    ("0.3", lambda ids, mask: torch.where(mask.bool(), ids, -100)),
    (
        "0.3",
        lambda input_ids, attention_mask: input_ids * attention_mask - 100 * (1 - attention_mask),
    ),
    ("0.3", in_a_loop),
    ("0.3", in_numpy),
    ("0.3", by_index),
    ("0.4", FOUND),
    ("0.4", list(FOUND.values())),
    ("0.4", tuple(FOUND.values())),
    ("0.4", np.array(list(FOUND.values()))),
    ("0.4", {run.lower(): name.upper() for run, name in FOUND.items()}),
    ("0.4", dict(reversed(FOUND.items()))),
    ("0.5", chapter0.FAULTS),
    ("0.5", tuple(chapter0.FAULTS)),
    ("0.5", np.array(chapter0.FAULTS)),
    ("0.5", ["eos_not_trained", *chapter0.FAULTS[1:]]),
    ("0.6", partial(behind, VERBS)),
    ("0.6", lambda sentence: behind(VERBS - {"am"}, sentence).rstrip(".?")),
    ("0.6", Yoda()),
]


@pytest.mark.parametrize(("number", "answer", "feedback"), WRONG)
def test_wrong_answers_get_their_own_feedback(number, answer, feedback):
    result = exercises.check(number, answer)
    assert not result.passed
    assert any(one in result.message for one in feedback.split("|")), result.message


@pytest.mark.parametrize(("number", "answer"), RIGHT)
def test_right_answers_of_another_kind_are_taken(number, answer):
    result = exercises.check(number, answer)
    assert result.passed, result.message


def test_an_sftconfig_is_an_answer_too():
    from trl import SFTConfig

    machine = {"use_cpu": True, "bf16": False, "activation_checkpointing": False}
    assert exercises.check("0.2", SFTConfig("outputs/none", **machine, **SETTINGS)).passed


def test_the_curves_of_0_4_show_what_their_diagnoses_say():
    held = {run: curve for run, (_, curve) in chapter0.CURVES.items()}
    mine = {run: curve for run, (curve, _) in chapter0.CURVES.items()}
    assert held["A"][-1] > held["A"][0] and mine["A"][-1] < 0.1
    assert len(set(held["B"])) == 1 < len(set(held["E"]))
    assert held["E"] == sorted(held["E"], reverse=True) and held["E"][-1] > 4.8
    assert max(mine["C"]) > 3 * mine["C"][0]
    assert held["D"] == sorted(held["D"], reverse=True) and held["D"][-1] < 2.5


def test_each_row_of_0_5_has_exactly_the_fault_it_should_have():
    from helpers import chat

    given = exercises.given("0.5")
    for row, fault in zip(given["rows"], chapter0.FAULTS, strict=True):
        view = chat.mask_view(given["tokenizer"], row["input_ids"], row["labels"])
        codes = {problem.code for problem in view.problems} - {"eos_not_trained"}
        assert codes == {fault}


def test_nobody_can_look_the_sentences_of_0_6_up():
    known = set(data.load_yoda("train", form="columns")["sentence"])
    fresh = chapter0._fresh_rows()
    assert len(fresh) == 300 and not known & {sentence for sentence, _ in fresh}
    for sentence, translation in fresh:
        assert sentence.lower().count("blorp") == translation.lower().count("blorp") > 0
    assert {"baseline", "sentences"} == exercises.given("0.6").keys()


def test_updates_are_what_the_trainer_would_make(tmp_path):
    from transformers import Trainer, TrainingArguments

    args = TrainingArguments(str(tmp_path), use_cpu=True, **SETTINGS)
    trainer = Trainer(torch.nn.Linear(1, 1), args, train_dataset=list(range(1300)))
    loader = trainer.get_train_dataloader()
    assert trainer.set_initial_training_values(args, loader)[-1] == 246
    assert "246 updates" in exercises.check("0.2", SETTINGS).message
