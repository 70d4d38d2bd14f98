"""Exercises of Chapter 0: sizes, steps, masks, prompts and judging."""

import functools

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


def _near(value, target):
    return near(value, target, 0.005)


# 0.1 ---------------------------------------------------------------------------------
def _check_size(answer):
    size = one_number(answer)
    if size > 1e6:
        raise Wrong("In GB, please: divide bytes by 1e9.")
    if _near(size, 6.5 * 4.127 / 8 + 0.5 * 2):
        return "A quarter of the bytes are in the few tensors that were not quantized."
    if _near(size, (6.5 * 4.127 / 8 + 0.5 * 2) * 1e9 / 2**30):
        raise Wrong("That is in GiB (2**30 bytes); GB of 1e9 bytes were asked for.")
    if _near(size, 7 * 4.127 / 8):
        raise Wrong("That quantizes everything. Half a billion weights stay in 16 bits.")
    if _near(size, 6.5 * 4 / 8 + 0.5 * 2) or _near(size, 3.5):
        raise Wrong("The codes take 4 bits; the scales of their blocks take the rest.")
    if _near(size, 6.5 * 4.127 + 0.5 * 16):
        raise Wrong("Those are gigabits. How many bits has a byte?")
    if _near(size, 14):
        raise Wrong("That is the model before quantization.")
    raise Wrong("Two piles: count the weights of each, times their bits, over 8.")


# 0.2 ---------------------------------------------------------------------------------
def _check_steps(answer):
    steps = one_number(answer)
    if steps == 96:
        return "125 batches an epoch, 32 updates (the last from one batch only), 3 epochs."
    if steps == 32:
        raise Wrong("That is one epoch.")
    if steps == 375:
        raise Wrong("Those are batches. Four of them make one update.")
    if 93 <= steps <= 94:
        raise Wrong(
            "An epoch ends with an update of its own: the last batches are not carried "
            "over into the next one."
        )
    raise Wrong("How many batches has an epoch? How many updates are made of them?")


# 0.3 ---------------------------------------------------------------------------------
def _check_labels(answer):
    import torch

    if not callable(answer):
        raise Wrong("The answer is a function of input_ids and attention_mask.")
    # Padding and end of sequence are both 2; row 0 ends for real, then is filled up.
    input_ids = torch.tensor([[5, 6, 2, 2, 2], [7, 2, 8, 9, 2]])
    attention_mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    before = input_ids.clone()
    labels = answer(input_ids, attention_mask)
    if not torch.is_tensor(labels) or labels.shape != before.shape:
        raise Wrong("Return a tensor of the shape of input_ids.")
    if not torch.equal(input_ids, before):
        raise Wrong("Your function changed input_ids: the model still has to read them.")
    if torch.equal(labels, before):
        raise Wrong("Nothing is masked: the padding is learned.")
    if torch.equal(labels, before.masked_fill(before == 2, -100)):
        raise Wrong(
            "You masked every 2, and the real ends went with the padding: this model "
            "would never stop talking. Which of the two tensors can tell them apart?"
        )
    if torch.equal(labels, before.masked_fill(attention_mask == 0, 0)):
        raise Wrong("Masked is right, but 0 is a token. The loss leaves out -100.")
    if not torch.equal(labels, before.masked_fill(attention_mask == 0, -100)):
        raise Wrong("Compare with the mask: -100 where it is 0, the ids elsewhere.")
    return "The attention mask knows what the ids have forgotten."


# 0.4 ---------------------------------------------------------------------------------
def _check_prompt(answer):
    tokenizer = _tokenizer()
    if not isinstance(answer, str):
        raise Wrong("The answer is the text of the prompt, a str (`tokenize=False`).")
    question = MESSAGES[:1]
    if answer == MESSAGES[0]["content"]:
        raise Wrong("A sentence without its template: the model has to guess who speaks.")
    if answer == tokenizer.apply_chat_template(question, tokenize=False):
        raise Wrong(
            "It ends with the user's turn. The model would have to open the assistant's "
            "turn itself: one argument of `apply_chat_template` does that for it."
        )
    if "Cold, the coffee" in answer:
        raise Wrong("The answer is in there already: the model would have nothing to say.")
    wanted = tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
    if answer != wanted and "system" in answer:
        raise Wrong("There is a system message in it, which training never showed.")
    if answer != wanted and answer.strip() == wanted.strip():
        raise Wrong("Very close: the blank space at the end is not the template's.")
    if answer != wanted:
        raise Wrong(f"The prompt should end where the answer begins; yours is {answer!r}.")
    return "To the letter what every training row had before its answer."


def _given_prompt():
    return {"tokenizer": _tokenizer(), "sentence": MESSAGES[0]["content"]}


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
    if not isinstance(answer, list | tuple) or len(answer) != 3:
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
SENTENCE = "The coffee is cold."
VERDICTS = {
    "Cold, the coffee is.": True,
    "Cold the coffee is": True,
    "The coffee, cold is.": True,
    "Cold, the tea is.": False,
    "Cold, the coffee is, the coffee is.": False,
    "Cold, coffee is.": False,
    "The coffee is cold.": False,
}


def _check_order(answer):
    if not callable(answer):
        raise Wrong("The answer is a function of sentence and answer.")
    for text, wanted in VERDICTS.items():
        if bool(answer(SENTENCE, text)) == wanted:
            continue
        if text == SENTENCE:
            raise Wrong("Repeating the sentence is no translation: the order must change.")
        if wanted:
            raise Wrong(f"{text!r} has the same words in another order: that is allowed.")
        if text.count("coffee") == 2:
            raise Wrong(f"{text!r} says two words twice; a set of words cannot see that.")
        raise Wrong(f"{text!r} lost or changed a word, and your function lets it pass.")
    return "Every word once, in another order. `evaluation.valid_order` does the same."


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
        "How many times is the adapter updated?",
        _check_steps,
        (
            "1,000 rows in batches of 8: how many batches in an epoch?",
            "Four batches make an update, and what is left at the end makes one more.",
        ),
        "import math\n\nanswer = 3 * math.ceil(math.ceil(1000 / 8) / 4)",
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
        "The prompt that the model was trained on",
        _check_prompt,
        (
            "`apply_chat_template` wants a list with one message, of role 'user'.",
            "`add_generation_prompt=True` opens the assistant's turn.",
        ),
        'messages = [{"role": "user", "content": given["sentence"]}]\n'
        'answer = given["tokenizer"].apply_chat_template(\n'
        "    messages, tokenize=False, add_generation_prompt=True\n"
        ")",
        _given_prompt,
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
        "Write the judge yourself",
        _check_order,
        (
            "`data.words(text)` gives the words, without capitals and punctuation.",
            "The same words, each as often (sort them, or count them), in another order.",
        ),
        "from helpers import data\n\n\n"
        "def answer(sentence, answer):\n"
        "    before, after = data.words(sentence), data.words(answer)\n"
        "    return sorted(before) == sorted(after) and before != after",
    ),
]
