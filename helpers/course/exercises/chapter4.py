"""Exercises of Chapter 4: templates, masks, padding and packing."""

import functools

from helpers.course.exercises import Exercise, Wrong

MESSAGES = [
    {"role": "user", "content": "Park your gun and come here."},
    {"role": "assistant", "content": "Park your gun, you must, and come here."},
]


@functools.cache
def _tokenizer():
    from helpers import chat, models

    tokenizer = chat.prepare_tokenizer(models.load_tokenizer(models.EMBEDDED))
    tokenizer.chat_template = chat.chatml_template()
    return tokenizer


def _row():
    from helpers import chat

    return chat.encode_chat(_tokenizer(), MESSAGES)


def _integers(answer, name):
    answer = answer.tolist() if hasattr(answer, "tolist") else list(answer)
    if answer and isinstance(answer[0], list):
        raise Wrong(f"{name}: one flat list is wanted, one number per token.")
    return [int(number) for number in answer]


# 4.1 ---------------------------------------------------------------------------------
def _check_labels(answer):
    row = _row()
    labels = _integers(answer, "labels")
    ids = row["input_ids"]
    if len(labels) != len(ids):
        raise Wrong(f"{len(labels)} labels for {len(ids)} tokens: each token needs one.")
    if labels == ids:
        raise Wrong("These labels train the question too. What should the model learn to say?")
    if all(label == -100 for label in labels):
        raise Wrong("Every token is ignored: nothing is learned from this row.")
    if set(labels) <= {0, 1}:
        raise Wrong("That is a mask of zeros and ones. Labels hold the ids, and -100 elsewhere.")
    if labels[:-1] == row["labels"][1:]:
        raise Wrong("Shifted by one already: the model does that itself.")
    end = _tokenizer().eos_token_id
    if [x for x in labels if x != -100] == [x for x in row["labels"] if x not in (-100, end)]:
        raise Wrong("The answer is trained, but not the token that ends it.")
    trailing = [*row["labels"][:-1], ids[-1]]
    if labels not in (row["labels"], trailing):
        raise Wrong("Close: compare your trained tokens with the answer, token by token.")
    return "The answer and its end, nothing else. `{% generation %}` markers do it for you."


def _given_labels():
    return {"tokenizer": _tokenizer(), "input_ids": _row()["input_ids"]}


# 4.2 ---------------------------------------------------------------------------------
def _check_padding_share(answer):
    share = float(answer)
    if abs(share - 54 / 108) < 1e-6:
        return "Half of the batch is padding, and is computed like everything else."
    if abs(share - 54) < 1e-6:
        raise Wrong("That is the number of padding tokens: what share of the batch is it?")
    if abs(share - 1.0) < 1e-6:
        raise Wrong("You divided by the real tokens. The batch holds the padding as well.")
    raise Wrong("All rows become as long as the longest one. How many tokens is that in all?")


# 4.3 ---------------------------------------------------------------------------------
def _check_pad(answer):
    tokenizer = _tokenizer()
    token = str(answer)
    if isinstance(answer, int):
        raise Wrong("Give the token itself, as text, not its id.")
    if token not in tokenizer.get_vocab():
        raise Wrong(f"{token!r} is not in the vocabulary: the embedding would have to grow.")
    if token == tokenizer.eos_token:
        raise Wrong("That is EOS. Mask the padding, and the end of every answer goes with it.")
    if token in {"<|im_start|>"}:
        raise Wrong("The template writes that token at the start of every turn.")
    index = tokenizer.get_vocab()[token]
    if index not in tokenizer.added_tokens_decoder:
        raise Wrong("That is an ordinary word: it appears in texts, where it is no padding.")
    return "A special token that no chat contains: safe to ignore wherever it appears."


# 4.4 ---------------------------------------------------------------------------------
def _check_positions(answer):
    positions = _integers(answer, "position_ids")
    if positions == list(range(9)):
        raise Wrong("These count on across the samples: the model sees one text of 9 tokens.")
    if positions and positions[0] == 1:
        raise Wrong("Positions start at 0.")
    if len(positions) != 9:
        raise Wrong(f"{len(positions)} positions for 4 + 2 + 3 tokens.")
    if positions == [0] * 4 + [1] * 2 + [2] * 3:
        raise Wrong("That numbers the samples. Positions number the tokens within each one.")
    if positions != [0, 1, 2, 3, 0, 1, 0, 1, 2]:
        raise Wrong("Each sample counts its own tokens.")
    return "Each restart at 0 is a wall for attention, if nobody passes a mask of ones."


# 4.5 ---------------------------------------------------------------------------------
def _check_template(answer):
    from helpers import chat

    if not isinstance(answer, str):
        raise Wrong("The answer is the template's text, a str.")
    try:
        row = chat.encode_chat(_tokenizer(), MESSAGES * 2, template=answer)
    except ValueError as error:
        raise Wrong(f"It does not work yet: {error}") from error
    if not any(label != -100 for label in row["labels"]):
        raise Wrong("The markers are there, but nothing is between them.")
    view = chat.mask_view(_tokenizer(), row, template=answer)
    if view.problems:
        raise Wrong(f"The X-ray says {view.problems[0]}")
    text = _tokenizer().apply_chat_template(MESSAGES, tokenize=False, chat_template=answer)
    if not all(message["content"] in text for message in MESSAGES):
        raise Wrong("A content is missing from the text.")
    return "Your markers end after the end of the turn: the model will answer, and stop."


def _given_template():
    from helpers import chat

    return chat.chatml_template().replace(
        "{{- message['content'] + '<|im_end|>' }}\n{%- endgeneration %}",
        "{{- message['content'] }}\n{%- endgeneration %}\n{{- '<|im_end|>' }}",
    )


# 4.6 ---------------------------------------------------------------------------------
def _given_mystery():
    """A row whose tokenizer put a BOS of its own before the template's."""
    row = _row()
    bos = _tokenizer().bos_token_id
    return {
        "tokenizer": _tokenizer(),
        "input_ids": [bos, *row["input_ids"]],
        "labels": [-100, *row["labels"]],
    }


def _check_mystery(answer):
    answer = str(answer).strip()
    if answer == "double_bos":
        return "One call says it; the loss would only have been a little worse, forever."
    if answer in {"prompt_trained", "nothing_trained", "eos_not_trained"}:
        raise Wrong("The trained tokens are right. Look at the very beginning of the row.")
    if answer == "labels_differ":
        raise Wrong("True, but a consequence. Which token should not be there?")
    raise Wrong("Give the code of the problem, as `.problems` lists it.")


# 4.7 ---------------------------------------------------------------------------------
def _check_find_answer(answer):
    if not callable(answer):
        raise Wrong("The answer is a function of (input_ids, header).")
    for ids, header, start in (
        ([9, 1, 2, 3, 7, 8], [1, 2], 3),
        ([1, 2, 5, 5, 1, 2, 6], [1, 2], 6),
        ([4, 1, 1, 2, 6], [1, 2], 4),
    ):
        found = answer(list(ids), list(header))
        if found == start - len(header):
            raise Wrong("That is where the header starts: the answer begins after it.")
        if start == 6 and found == 2:
            raise Wrong("In several turns the last header counts here; you return the first.")
        if found != start:
            raise Wrong(f"For {ids} and header {header} the answer starts at {start}, not {found}.")
    if answer([5, 6, 7], [1, 2]) is not None:
        raise Wrong("Where there is no header, return None: a wrong place trains the prompt.")
    return "On ids, not on text: that is why the header must be the same tokens everywhere."


# 4.8 ---------------------------------------------------------------------------------
def _check_loss(answer):
    value = float(answer)
    if abs(value - 1.25) < 1e-3:
        return "-100 tokens are in neither the sum nor the count."
    if abs(value - 0.5) < 1e-3:
        raise Wrong("You divided by all five tokens. Ignored ones do not count.")
    if abs(value - 2.5) < 1e-3:
        raise Wrong(
            "That is the sum of the right two, and the mean of the wrong two. Each loss "
            "has its own label, and what counts is a mean."
        )
    if abs(value - 1.8) < 1e-3:
        raise Wrong("That is the mean over all tokens, ignored ones included.")
    raise Wrong("Take the losses where the label is not -100, and average those.")


# 4.9 ---------------------------------------------------------------------------------
def _check_wrapped(answer):
    count = int(answer)
    if count == 3:
        return "Three of five samples torn, and their halves share rows with strangers."
    if count == 2:
        raise Wrong("Two samples span a border each, but look at the last one again.")
    if count == 4:
        raise Wrong("Four rows come out; how many samples lie across one of the borders?")
    raise Wrong("Lay the samples end to end and mark every 64 tokens.")


EXERCISES = [
    Exercise("4.1", "Labels by hand", _check_labels, given=_given_labels,
        hints=("Everything up to the end of `assistant` and its line break is prompt.",
            "Find the last `<|im_start|>`; the answer starts three or four tokens later. "
            "Decode a few slices to see."),
        solution="tokenizer, ids = given['tokenizer'], given['input_ids']\n"
        "start = len(ids) - 1 - ids[::-1].index(tokenizer.bos_token_id)\n"
        "header = tokenizer('<|im_start|>assistant\\n')['input_ids']\n"
        "stop = ids.index(tokenizer.eos_token_id, start) + 1\n"
        "answer = [token if start + len(header) <= i < stop else -100 "
        "for i, token in enumerate(ids)]\n"),
    Exercise("4.2", "The price of padding", _check_padding_share,
        hints=("The batch is a rectangle.", "3 rows of 36; how many of them are real?"),
        solution="lengths = [36, 10, 8]\nanswer = 1 - sum(lengths) / (3 * max(lengths))\n"),
    Exercise("4.3", "A padding token", _check_pad,
        hints=("Look among `tokenizer.added_tokens_decoder`.",
            "Which of them does the chat template never write?"),
        solution="answer = '<file_sep>'\n"),
    Exercise("4.4", "Positions of a pack", _check_positions,
        hints=("What position would each token have in a row of its own?",
            "`range(4)`, then `range(2)`, then ..."),
        solution="answer = [*range(4), *range(2), *range(3)]\n"),
    Exercise("4.5", "Mend a template", _check_template, given=_given_template,
        hints=("Ask the X-ray what is wrong with a row it makes.",
            "Move `<|im_end|>` in front of `endgeneration`."),
        solution="answer = given.replace(\n"
        "    \"{{- message['content'] }}\\n{%- endgeneration %}\\n{{- '<|im_end|>' }}\",\n"
        "    \"{{- message['content'] + '<|im_end|>' }}\\n{%- endgeneration %}\",\n)\n"),
    Exercise("4.6", "Diagnose a row", _check_mystery, given=_given_mystery,
        hints=("`chat.mask_view(**given)`", "`.problems[0].code`"),
        solution="from helpers import chat\n"
        "answer = chat.mask_view(**given).problems[0].code\n"),
    Exercise("4.7", "Find the answer by its header", _check_find_answer,
        hints=("Compare slices `ids[i : i + len(header)]` with the header.",
            "Search from the end, and return where the header ends."),
        solution="def answer(input_ids, header):\n"
        "    for i in range(len(input_ids) - len(header), -1, -1):\n"
        "        if input_ids[i : i + len(header)] == header:\n"
        "            return i + len(header)\n"
        "    return None\n"),
    Exercise("4.8", "A loss with holes", _check_loss,
        hints=("Which tokens have a label?", "Mean of the second and the fourth."),
        solution="losses, labels = [3.0, 1.5, 2.0, 1.0, 1.5], [-100, 7, -100, 9, -100]\n"
        "kept = [x for x, y in zip(losses, labels) if y != -100]\n"
        "answer = sum(kept) / len(kept)\n"),
    Exercise("4.9", "Torn by wrapping", _check_wrapped,
        hints=("Add the lengths up: 20, 83, 92, ...",
            "Borders are at 64, 128 and 192: which samples have one inside?"),
        solution="lengths, start, answer = [20, 63, 9, 90, 31], 0, 0\n"
        "for length in lengths:\n"
        "    answer += start // 64 != (start + length - 1) // 64\n"
        "    start += length\n"),
]  # fmt: skip
