"""Exercises of Chapter 0: sizes, settings, masks, curves and judging."""

import functools
import math
import re
from typing import Any

from helpers.course.exercises import Exercise, Wrong, near, one_number

MESSAGES = [
    {"role": "user", "content": "The coffee is cold."},
    {"role": "assistant", "content": "Cold, the coffee is."},
]


@functools.cache
def _tokenizer():
    from helpers import chat, models

    tokenizer = chat.prepare_tokenizer(models.load_tokenizer(models.EMBEDDED))
    tokenizer.chat_template = chat.chatml_template()
    return tokenizer


# 0.1 ---------------------------------------------------------------------------------
def _check_size(answer):
    size, codes, rest = one_number(answer), 6.5 * 4.127 / 8, 0.5 * 2
    if near(size, codes + rest, 0.012):
        return "A quarter of the bytes are in the few tensors that were not quantized."
    if size > 1000:
        raise Wrong("In GB, please: divide bytes by 1e9.")
    if near(size, (codes + rest) * 1e9 / 2**30, 0.005):
        raise Wrong("That is in GiB (2**30 bytes); GB of 1e9 bytes were asked for.")
    if near(size, 7 * 4.127 / 8, 0.005):
        raise Wrong("That quantizes everything. Half a billion weights stay in 16 bits.")
    if near(size, codes, 0.005):
        raise Wrong("That leaves out the half a billion weights that stay in 16 bits.")
    if near(size, 6.5 * 4 / 8 + rest, 0.005) or near(size, 3.5, 0.005):
        raise Wrong("The codes take 4 bits; the scales of their blocks take the rest.")
    if near(size, 8 * (codes + rest), 0.005):
        raise Wrong("Those are gigabits. How many bits has a byte?")
    if near(size, 14, 0.005) or near(size, 28, 0.005):
        raise Wrong("That is the model before quantization.")
    raise Wrong("Two piles: count the weights of each, times their bits, over 8.")


# 0.2 ---------------------------------------------------------------------------------
def _check_settings(answer):
    from transformers import TrainingArguments
    from trl import SFTConfig

    args = answer
    if isinstance(answer, dict):
        machine: dict[str, Any] = {
            "use_cpu": True,
            "bf16": False,
            "activation_checkpointing": False,
        }
        args = SFTConfig(**{"output_dir": "outputs/none", "report_to": "none"} | machine | answer)
    elif not isinstance(answer, TrainingArguments):
        raise Wrong("The answer is a dict of keywords of `SFTConfig`, or an `SFTConfig`.")
    fit, pieces = args.per_device_train_batch_size, args.gradient_accumulation_steps
    if fit > 4:
        raise Wrong(f"{fit} rows at once do not fit: no more than 4 do.")
    if fit * pieces != 16:
        raise Wrong(
            f"An update rests on {fit} x {pieces} = {fit * pieces} rows, not on 16. "
            "Several batches can make one update: which keyword says how many?"
        )
    if args.packing:
        raise Wrong("Packed rows are glued together: 16 of them are many more sentences.")
    updates = math.ceil(args.num_train_epochs * math.ceil(math.ceil(1300 / fit) / pieces))
    updates = args.max_steps if args.max_steps > 0 else updates
    if not 200 <= updates <= 260:
        raise Wrong(f"That makes {updates} updates; 200 to 260 were asked for.")
    warm = args.get_warmup_steps(updates)
    if not 0.05 * updates <= warm <= 0.1 * updates:
        raise Wrong(
            f"The steps grow over {warm} of {updates} updates, {warm / updates:.0%} of them. "
            "5 to 10 % were asked for."
        )
    return f"{updates} updates of 16 rows each, {fit} at a time; the first {warm} warm up."


# 0.3 ---------------------------------------------------------------------------------
# Padding and end of sequence are both 2. The rows: one that ends and is filled up; two
# answers, each with its end; one that was cut off; one that is filled up at the left.
IDS = [[5, 6, 2, 2, 2], [7, 2, 8, 9, 2], [5, 6, 7, 2, 2], [2, 2, 5, 6, 2]]
MASK = [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [0, 0, 1, 1, 1]]


def _check_labels(answer):
    import torch

    if not callable(answer):
        raise Wrong("The answer is a function of input_ids and attention_mask.")
    input_ids, attention_mask = torch.tensor(IDS), torch.tensor(MASK)
    before = input_ids.clone()
    labels = answer(input_ids, attention_mask)
    if labels is None:
        raise Wrong("Your function returns nothing: does it end in `return labels`?")
    labels = torch.as_tensor(labels)
    if labels.shape != before.shape:
        raise Wrong("Return a tensor of the shape of input_ids.")
    if not torch.equal(input_ids, before):
        raise Wrong("Your function changed input_ids: the model still has to read them.")
    right = before.masked_fill(attention_mask == 0, -100)
    if torch.equal(labels, right):
        return "The attention mask still knows what the ids no longer tell."
    if torch.equal(labels, before):
        raise Wrong("Nothing is masked: the padding is learned.")
    if not ((labels == before) | (labels == -100)).all():
        raise Wrong("A label is the token itself, or -100. Other numbers are tokens, too.")
    kept, real = labels != -100, attention_mask == 1
    if not (kept & (before == 2)).any():
        raise Wrong(
            "You masked every 2, and the real ends went with the padding: this model "
            "would never stop talking. Which of the two tensors can tell them apart?"
        )
    if not (kept & real).any() or (real & ~kept & (before != 2)).any():
        raise Wrong("Some real tokens are masked now: compare your labels with the mask.")
    if torch.equal(labels[:2], right[:2]):
        raise Wrong(
            "Right for rows that end and are filled up at the right. Try a row that was cut "
            "off before its end, and one that is filled up at the left."
        )
    raise Wrong("Compare with the mask: -100 where it is 0, the ids elsewhere.")


# 0.4 ---------------------------------------------------------------------------------
# Recorded every 40 updates: a small model guesses the next letter of our translations. Loss
# of the last 40 batches and of 500 held-out letters; A learns 300 letters at a rate of 3e-3,
# the others 8,036 at 0, 1, 3e-3 and 1e-5.
CURVES = {
    "A": ([4.89, 3.05, 1.23, 0.40, 0.13, 0.06, 0.03], [4.90, 3.18, 3.62, 4.23, 4.73, 5.06, 5.29]),
    "B": ([4.90, 4.89, 4.89, 4.90, 4.89, 4.89, 4.89], [4.90, 4.90, 4.90, 4.90, 4.90, 4.90, 4.90]),
    "C": ([4.90, 16.6, 3.18, 3.17, 3.19, 3.16, 3.21], [4.90, 3.23, 3.26, 3.16, 3.15, 3.26, 3.29]),
    "D": ([4.90, 3.54, 2.66, 2.49, 2.36, 2.24, 2.17], [4.90, 2.89, 2.68, 2.60, 2.50, 2.45, 2.43]),
    "E": ([4.90, 4.89, 4.88, 4.88, 4.85, 4.85, 4.84], [4.90, 4.90, 4.89, 4.88, 4.87, 4.86, 4.85]),
}
DIAGNOSES = {  # of each run, and where to look
    "A": ("learned by heart", "One of its curves turns round. What does each of them measure?"),
    "B": ("nothing is trained", "Batches differ, so one curve trembles. Does the other move?"),
    "C": ("steps too large", "It gets worse before it gets better, and ends above run D."),
    "D": ("goes well", "Both of its curves fall, and neither has turned."),
    "E": ("steps too small", "Both curves move in one direction. How far do they get?"),
}
NAMES = sorted(name for name, _ in DIAGNOSES.values())


def _given_curves():
    runs = {run: {"training": mine, "held-out": held} for run, (mine, held) in CURVES.items()}
    return {"runs": runs, "diagnoses": NAMES}


def _check_curves(answer):
    if isinstance(answer, str) or not hasattr(answer, "__len__") or len(answer) != len(CURVES):
        raise Wrong("One diagnosis for each of the five runs: a dict, or a list in their order.")
    pairs = answer.items() if isinstance(answer, dict) else zip(CURVES, answer, strict=True)
    said = {str(run).upper(): str(found).strip().lower() for run, found in pairs}
    if said.keys() != CURVES.keys():
        raise Wrong(f"The runs are called {', '.join(CURVES)}.")
    if unknown := set(said.values()) - set(NAMES):
        raise Wrong(f"{min(unknown)!r} is none of the five: {', '.join(NAMES)}.")
    if len(set(said.values())) < len(CURVES):
        raise Wrong("Each diagnosis fits one run, and you gave one of them twice.")
    for run, (diagnosis, look) in DIAGNOSES.items():
        if said[run] != diagnosis:
            raise Wrong(f"Look at run {run} again. {look}")
    return "Without the held-out curves, A would look best, and B much like E."


# 0.5 ---------------------------------------------------------------------------------
FAULTS = ["end_of_turn_not_trained", "prompt_trained", "nothing_trained"]


def _given_batches():
    from helpers import chat

    row = chat.encode_chat(_tokenizer(), MESSAGES)
    ids, labels = row["input_ids"], row["labels"]
    end = _tokenizer().eos_token_id
    broken = [[-100 if x == end else x for x in labels], list(ids), [-100] * len(ids)]
    return {
        "tokenizer": _tokenizer(),
        "rows": [{"input_ids": ids, "labels": faulty} for faulty in broken],
    }


def _check_batches(answer):
    if isinstance(answer, str) or not hasattr(answer, "__len__") or len(answer) != 3:
        raise Wrong("A list of three codes, one for each row.")
    codes = [str(getattr(code, "code", code)) for code in answer]
    if codes[0] == "eos_not_trained":  # in this template EOS is the end of a turn
        codes[0] = FAULTS[0]
    wrong = [row for row in range(3) if codes[row] != FAULTS[row]]
    if not wrong:
        return "One that never stops, one that learns to ask, one that learns nothing."
    if sorted(codes) == sorted(FAULTS):
        raise Wrong("The right three, in another order.")
    raise Wrong(
        f"Look again at row {wrong[0]}: what does `chat.mask_view` say about it, and what "
        "is a Problem's `code`?"
    )


# 0.6 ---------------------------------------------------------------------------------
def _last_word(sentence):
    *front, last = sentence.rstrip(".?").split()
    return f"{last}, {' '.join(front)}{sentence[-1]}"


@functools.cache
def _fresh_rows():
    """300 training rows with a word exchanged, so that nobody looks their answers up."""
    from helpers import data

    fresh = []
    for row in data.load_yoda("train", form="columns").shuffle(seed=7):
        if word := re.search(r"\b(?:the|a|my) (\w{4,})\b", row["sentence"], re.IGNORECASE):
            swap = functools.partial(re.sub, rf"\b{word[1]}\b", "blorp", flags=re.IGNORECASE)
            fresh.append((swap(row["sentence"]), swap(row["translation"])))
    return fresh[:300]


def _check_rules(answer):
    from helpers import evaluation

    if not callable(answer):
        raise Wrong("The answer is a function that takes a sentence and returns a text.")
    asked, wanted = zip(*_fresh_rows(), strict=True)
    answers = list(map(answer, asked))
    if odd := [text for text in answers if not isinstance(text, str)]:
        raise Wrong(f"Your function returned {odd[0]!r}, not a text.")
    base = evaluation.judge(asked, wanted, list(map(_last_word, asked)))
    report = evaluation.judge(asked, wanted, answers)
    gain = report.interval(over=base)
    score = f"Exact match {report.exact_match:.1f} %, a gain of {gain} points"
    if gain.low > 10:
        return f"{score}. How far is it from the fine-tuned model?"
    missed = next(example for example in report.examples if not example.exact)
    raise Wrong(
        f"{score}: the interval should begin above 10. For {missed.sentence!r} you say "
        f"{missed.answer!r}; right is {missed.reference!r}."
    )


EXERCISES = [
    Exercise(
        "0.1",
        "What does a model of seven billion weights take in four bits?",
        _check_size,
        (
            "Two piles: 6.5 billion weights at 4.127 bits, 0.5 billion at 16 bits.",
            "Bits over 8 are bytes; bytes over 1e9 are GB.",
        ),
        "answer = (6.5e9 * 4.127 / 8 + 0.5e9 * 16 / 8) / 1e9",
    ),
    Exercise(
        "0.2",
        "Choose the settings",
        _check_settings,
        (
            "First the two numbers whose product is 16, then how many updates an epoch has.",
            "1,300 rows in updates of 16: a little over 80 updates an epoch.",
        ),
        "answer = dict(per_device_train_batch_size=4, gradient_accumulation_steps=4)\n"
        "answer |= dict(num_train_epochs=3, warmup_steps=20)",
    ),
    Exercise(
        "0.3",
        "Mask the padding, not the end",
        _check_labels,
        (
            "Two tokens with the same number: only the attention mask tells them apart.",
            "`input_ids.masked_fill(condition, value)` returns a changed copy.",
        ),
        "def answer(input_ids, attention_mask):\n"
        "    return input_ids.masked_fill(attention_mask == 0, -100)",
    ),
    Exercise(
        "0.4",
        "What went wrong in these runs?",
        _check_curves,
        (
            "Ask of each run: does the training loss fall? Does the held-out loss follow?",
            "Of the two that hardly move, one does not move at all on held-out letters.",
        ),
        f"answer = { {run: name for run, (name, _) in DIAGNOSES.items()} }",
        _given_curves,
    ),
    Exercise(
        "0.5",
        "Three rows, one fault each",
        _check_batches,
        (
            "`chat.mask_view(tokenizer, row['input_ids'], row['labels'])` for each row.",
            "Its `.problems` is a list; every problem has a `.code`.",
        ),
        "from helpers import chat\n\n"
        "answer = [\n"
        '    chat.mask_view(given["tokenizer"], row["input_ids"], row["labels"])\n'
        "    .problems[0].code\n"
        '    for row in given["rows"]\n'
        "]",
        _given_batches,
    ),
    Exercise(
        "0.6",
        "Rules against the baseline",
        _check_rules,
        (
            "Where would you cut 'The blorp is cold.'? And 'She will open the gate.'?",
            "Cut behind the first auxiliary (is, was, will, can, must, ...) and its 'not'; "
            "where there is none, the last word is a fair guess.",
        ),
        "VERBS = 'is are was were am will can must may should could has have had'.split()\n\n\n"
        "def answer(sentence):\n"
        "    words = sentence.rstrip('.?').split()\n"
        "    found = [i + 1 for i, word in enumerate(words) if i and word in VERBS]\n"
        "    cut = found[0] if found else len(words) - 1\n"
        "    cut += words[cut] == 'not'\n"
        "    return f\"{' '.join(words[cut:])}, {' '.join(words[:cut])}\"",
        lambda: {"baseline": _last_word, "sentences": [row[0] for row in _fresh_rows()[:20]]},
    ),
]
