"""Chapter 4's exercises refuse typical wrong answers and say what is off."""

import copy

import numpy as np
import pytest
import torch

from helpers import chat
from helpers.course import exercises
from helpers.course.exercises import chapter4

ROW = chapter4._row()
IDS, LABELS = ROW["input_ids"], ROW["labels"]
END = chapter4._tokenizer().eos_token_id

# ── a pack ───────────────────────────────────────────────────────────────────────────────
BROKEN = chapter4._given_pack()["batch"]
PACK_IDS, STARTS = BROKEN["input_ids"], (0, 6, 10)
PLACES = torch.cat([torch.arange(n) for n in chapter4._LENGTHS])[None]
BORDERS = PACK_IDS.masked_fill(PLACES == 0, -100)
PACK = {"input_ids": PACK_IDS, "labels": BORDERS, "position_ids": PLACES}
ROWS_APART = torch.nn.utils.rnn.pad_sequence(list(PACK_IDS[0].split(chapter4._LENGTHS)), True)

# ── a template ───────────────────────────────────────────────────────────────────────────
GIVEN = chapter4._given_template()["template"]
ENDS_LATE = chapter4._LLAMA.replace(
    "{%- generation %}{{- m.content + '<|eot_id|>' }}{%- endgeneration %}",
    "{%- generation %}{{- m.content }}{%- endgeneration %}{{- '<|eot_id|>' }}",
)
SHORT_PROMPT = chapter4._LLAMA.replace(
    r"assistant<|end_header_id|>\n\n", r"assistant<|end_header_id|>\n"
)
OTHER_PROMPT = chapter4._LLAMA.replace("assistant<|end", "model<|end")
NO_PROMPT = chapter4._LLAMA.split("{%- if add_generation_prompt")[0]
ALL_MARKED = chapter4._LLAMA.replace("{%- if m.role == 'assistant' %}", "{%- if true %}")
OTHER_LOOP = chapter4._LLAMA.replace("m.", "turn.").replace("for m in", "for turn in")

# ── dirty data ───────────────────────────────────────────────────────────────────────────
DIRTY = chapter4._given_dirty()["rows"]


def solved(number):
    exercise = exercises.catalog()[number]
    names = {"given": exercise.given()} if exercise.given else {}
    exec(exercise.solution, names)
    return names["answer"]


CLEAN = solved("4.6")


def talk(question, answer):
    roles = ("user", "assistant")
    said = zip(roles, (question, answer), strict=True)
    return {"messages": [{"role": role, "content": text} for role, text in said]}


RIGHT_VIEWS = {letter: cause for letter, (cause, _) in chapter4._CAUSES.items()}

WRONG = [
    ("4.1", IDS, "train the question"),
    ("4.1", [-100] * len(IDS), "nothing is learned"),
    ("4.1", LABELS[:-1], "each token needs one"),
    ("4.1", [*LABELS[1:], -100], "Shifted by one"),
    ("4.1", [x if x != END else -100 for x in LABELS], "not the token that ends"),
    ("4.1", [int(x != -100) for x in LABELS], "zeros and ones"),
    ("4.1", [max(x, 0) for x in LABELS], "Zeros are labels"),
    ("4.1", [*IDS[:3], *LABELS[3:]], "token by token"),
    ("4.2", "", "c leaks"),
    ("4.2", "abcdef", "a does not leak"),
    ("4.2", "c", "looks for restarts"),
    ("4.2", "cd", "the other mask"),
    ("4.2", "ce", "d leaks"),
    ("4.2", ["d", "e"], "wrapped rows"),
    ("4.2", "bcde", "b does not leak"),
    ("4.2", {"c", "d", "e", "f"}, "f does not leak"),
    ("4.2", "xyz", "Name the letters"),
    ("4.3", BROKEN, "predict the next text"),
    ("4.3", BROKEN | {"labels": BORDERS}, "It leaks: a mask over tokens"),
    ("4.3", {"input_ids": PACK_IDS, "labels": BORDERS}, "where do the"),
    ("4.3", PACK | {"attention_mask": torch.ones_like(PACK_IDS)}, "It leaks: a mask"),
    ("4.3", PACK | {"position_ids": PLACES + 1}, "start at 0"),
    ("4.3", PACK | {"position_ids": BROKEN["position_ids"]}, "where do the"),
    ("4.3", PACK | {"labels": PACK_IDS}, "predict the next text"),
    ("4.3", PACK | {"labels": torch.full_like(PACK_IDS, -100)}, "all others are learned"),
    ("4.3", PACK | {"input_ids": ROWS_APART}, "keep them in one row"),
    ("4.3", [PACK_IDS], "Answer with the batch"),
    ("4.4", GIVEN, "end where the answer begins"),
    ("4.4", ENDS_LATE, "end_of_turn_not_trained"),
    ("4.4", SHORT_PROMPT, "end where the answer begins"),
    ("4.4", OTHER_PROMPT, "no beginning of the whole"),
    ("4.4", NO_PROMPT, "end where the answer begins"),
    ("4.4", ALL_MARKED, "prompt_trained"),
    ("4.4", chat.chatml_template(), "text of a conversation has changed"),
    ("4.4", "{% generation %}{% for %}{% endgeneration %}", "does not compile"),
    ("4.4", "hello", "no {% generation %} markers"),
    ("4.4", 7, "a str"),
    ("4.5", RIGHT_VIEWS | {"A": "healthy"}, "Look at A again"),
    ("4.5", RIGHT_VIEWS | {"B": "end not trained"}, "a whole answer"),
    ("4.5", RIGHT_VIEWS | {"C": "prompt trained"}, "Look at C"),
    ("4.5", RIGHT_VIEWS | {"D": "healthy"}, "who is speaking"),
    ("4.5", RIGHT_VIEWS | {"E": "healthy"}, "brackets open"),
    ("4.5", RIGHT_VIEWS | {"E": "double BOS"}, "none of the causes"),
    ("4.5", dict.fromkeys("ABCDE", "healthy"), "1 of 5"),
    ("4.5", {"A": "healthy"}, "five letters"),
    ("4.5", "ABCDE", "five letters"),
    ("4.6", DIRTY, "there already"),
    ("4.6", [], "is gone, and could be kept"),
    ("4.6", CLEAN[:-1], "'Hold the rope.' is gone"),
    ("4.6", [*CLEAN, DIRTY[9]], "held out"),
    ("4.6", [*CLEAN, DIRTY[3]], "nothing_trained"),
    ("4.6", [*CLEAN, DIRTY[4]], "empty"),
    ("4.6", [*CLEAN, DIRTY[5]], "role 'user'"),
    ("4.6", [*CLEAN, DIRTY[6]], "48 is the most"),
    ("4.6", [*CLEAN, DIRTY[7]], "<|im_end|>"),
    ("4.6", [*CLEAN, DIRTY[8]], "role 'gpt'"),
    ("4.6", [*CLEAN, talk("Count the sheep, please.", "The sheep, count.")], "not in the data"),
    ("4.6", [*CLEAN, CLEAN[0]], "there already"),
    ("4.7", 0.5, "divided by all five"),
    ("4.7", 2.5, "not a sum"),
    ("4.7", 1.75, "to be shifted"),
    ("4.7", 1.8, "ignored ones included"),
    ("4.7", 6.5 / 3, "that are ignored"),
    ("4.7", 9.0, "Average the losses"),
    ("4.7", [1.5, 1.0], "one number"),
    ("4.8", 2, "last one again"),
    ("4.8", 4, "Four rows"),
    ("4.8", 1, "end to end"),
    ("4.8", "three", "one number"),
]

RIGHT = [
    ("4.1", torch.tensor([LABELS])),
    ("4.1", np.array(LABELS)),
    ("4.1", tuple(LABELS)),
    ("4.1", [*LABELS[:-1], IDS[-1]]),
    ("4.2", "EDC"),
    ("4.2", ("c", "d", "e")),
    ("4.2", "c, d, e"),
    ("4.2", {"a": 0.0, "b": 0.0, "c": 0.1, "d": True, "e": 0.2, "f": False}),
    ("4.3", {name: column[0].tolist() for name, column in PACK.items()}),
    ("4.3", {name: column.numpy() for name, column in PACK.items()}),
    ("4.3", PACK | {"attention_mask": None}),
    ("4.3", PACK | {"labels": BORDERS.index_fill(1, torch.tensor([0]), 300)}),
    ("4.4", OTHER_LOOP),
    ("4.5", {letter.lower(): cause.upper() for letter, cause in RIGHT_VIEWS.items()}),
    ("4.6", tuple(reversed(CLEAN))),
    ("4.6", [row["messages"] for row in CLEAN]),
    ("4.7", torch.tensor(1.25)),
    ("4.8", np.int64(3)),
]


@pytest.mark.parametrize(("number", "answer", "feedback"), WRONG)
def test_wrong_answers_get_their_own_feedback(number, answer, feedback):
    result = exercises.check(number, copy.deepcopy(answer))
    assert not result.passed
    assert feedback in result.message, result.message


@pytest.mark.parametrize(("number", "answer"), RIGHT)
def test_other_right_answers_pass(number, answer):
    result = exercises.check(number, answer)
    assert result.passed, result.message


@pytest.mark.parametrize("exercise", chapter4.EXERCISES, ids=lambda e: e.number)
def test_solutions_pass_and_hints_exist(exercise):
    assert exercises.check(exercise.number, solved(exercise.number)).passed
    assert len(exercise.hints) >= 2


def test_the_broken_template_reads_as_it_should():
    tokenizer, broken = chapter4._llama(), chapter4._given_template()["template"]
    texts = [
        tokenizer.apply_chat_template(chapter4.MESSAGES, tokenize=False, chat_template=template)
        for template in (broken, chapter4._LLAMA)
    ]
    assert texts[0] == texts[1] and broken != chapter4._LLAMA


def test_the_x_rays_to_read_have_no_alarms():
    views = exercises.given("4.5")
    assert list(views) == list("ABCDE") and not any(
        "!" in v or "found" in v for v in views.values()
    )
