"""Exercises of Chapter 4: templates, masks, packs and dirty data."""

import copy
import functools
import warnings
from typing import Any

from helpers.course.exercises import Exercise, Wrong, one_number

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


def _row(messages=MESSAGES):
    from helpers import chat

    return chat.encode_chat(_tokenizer(), messages)


def _integers(answer, name):
    answer = answer.tolist() if hasattr(answer, "tolist") else list(answer)
    if len(answer) == 1 and isinstance(answer[0], list | tuple):
        answer = answer[0]
    if answer and isinstance(answer[0], list | tuple):
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
    if 0 in labels:
        raise Wrong("Zeros are labels too: they train the token with id 0. Use -100.")
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
def _model(kind, attention="sdpa"):
    """A tiny random model of an architecture, which has our tokenizer's vocabulary."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    size: dict[str, Any] = {"vocab_size": len(_tokenizer()), "hidden_size": 16, "ffn_dim": 32}
    size |= {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    size |= {"intermediate_size": 32, "word_embed_proj_dim": 16, "pad_token_id": 16}
    size |= {"bos_token_id": 1, "eos_token_id": 2}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = AutoConfig.for_model(kind, **size)
        return AutoModelForCausalLM.from_config(config, attn_implementation=attention)


def _given_packs():
    """{letter: (model, layout)}: `batches.leak(*...)` measures."""
    import torch

    from helpers.chat import batches

    rows = [_row(), _row([*MESSAGES, *MESSAGES]), _row()]
    chosen = {"a": ("llama", "packing: bfd"), "b": ("opt", "padding (TRL)")}
    chosen |= {"c": ("mistral", "packing: wrapped"), "d": ("falcon", "padding-free (TRL)")}
    chosen |= {"e": ("qwen2", "packing: bfd"), "f": ("gpt2", "flattening (transformers)")}
    made = {
        letter: (_model(kind), batches.lay_out(rows, _tokenizer(), strategy, max_length=128))
        for letter, (kind, strategy) in chosen.items()
    }
    batch = made["e"][1].batch
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    return made


def _check_leaks(answer):
    if hasattr(answer, "items"):  # what was measured, or yes and no
        answer = [letter for letter, leak in answer.items() if leak > 1e-4]
    said = {str(letter).strip().lower() for letter in answer} - {",", " ", ""}
    if not said <= set("abcdef"):
        raise Wrong("Name the letters of those that leak, such as 'af'.")
    for letter, why in {
        "c": "wrapped rows bring no position ids, whatever the architecture.",
        "d": "a row without padding is safe only if the architecture looks for restarts.",
        "e": "the position ids are fine. What does the other mask say?",
    }.items():
        if letter not in said:
            raise Wrong(f"{letter} leaks: {why}")
    if extra := sorted(said - set("cde")):
        raise Wrong(f"{extra[0]} does not leak. What keeps its samples apart?")
    return "Strategy, architecture and mask: each of the three alone can let samples through."


# 4.3 ---------------------------------------------------------------------------------
_LENGTHS = (6, 4, 7)


def _given_pack():
    """Three texts in one row, packed by somebody who was in a hurry."""
    import torch

    ids = torch.arange(300, 300 + sum(_LENGTHS))[None]
    ones = torch.ones_like(ids)
    batch = {"input_ids": ids, "labels": ids.clone(), "attention_mask": ones}
    return {"batch": batch | {"position_ids": ones.cumsum(1) - 1}, "lengths": _LENGTHS}


def _check_pack(answer):
    import torch

    from helpers.chat import batches

    if not hasattr(answer, "keys") or not {"input_ids", "labels"} <= set(answer.keys()):
        raise Wrong("Answer with the batch: a dictionary with `input_ids`, `labels` and so on.")
    batch = {k: torch.as_tensor(v) for k, v in answer.items() if v is not None}
    batch = {k: v[None] if v.dim() == 1 else v for k, v in batch.items()}
    ids = _given_pack()["batch"]["input_ids"]
    if not torch.equal(batch["input_ids"], ids):
        raise Wrong("The `input_ids` have changed: keep the tokens, and keep them in one row.")
    starts = [sum(_LENGTHS[:i]) for i in range(3)]
    labels = batch["labels"].clone()
    if (labels[0, starts[1:]] != -100).any():
        raise Wrong("The last token of one text is still trained to predict the next text.")
    labels[0, starts[0]] = -100  # is never predicted: either will do
    wanted = ids.clone()
    wanted[0, starts] = -100
    if not torch.equal(labels, wanted):
        raise Wrong("Only the first label of each text should be gone: all others are learned.")
    if "position_ids" in batch and batch["position_ids"][0, 0] == 1:
        raise Wrong("Positions start at 0.")
    samples = torch.repeat_interleave(torch.arange(3), torch.tensor(_LENGTHS))[None]
    layout = batches.Layout("yours", batch, samples, list(_LENGTHS))
    if batches.leak(_model("llama"), layout) > 1e-4:
        ones = batch.get("attention_mask")
        if ones is not None and ones.dim() == 2:
            raise Wrong("It leaks: a mask over tokens says nothing of borders, and hides them.")
        raise Wrong("It leaks: where do the `position_ids` say that a text begins?")
    return "No prediction across a border, and no attention across it either."


# 4.4 ---------------------------------------------------------------------------------
_LLAMA = """{%- for m in messages %}
{{- '<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n' }}
{%- if m.role == 'assistant' %}
{%- generation %}{{- m.content + '<|eot_id|>' }}{%- endgeneration %}
{%- else %}{{- m.content + '<|eot_id|>' }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}"""


@functools.cache
def _llama():
    tokenizer = copy.deepcopy(_tokenizer())
    tokenizer.eos_token = "<|eot_id|>"
    headers = ["<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"]
    tokenizer.add_tokens(headers, special_tokens=True)
    return tokenizer


def _given_template():
    late = " }}{%- endgeneration %}{{- '<|eot_id|>' }}"
    broken = _LLAMA.replace(" + '<|eot_id|>' }}{%- endgeneration %}", late)
    header = "assistant<|end_header_id|>\\n"
    return {"tokenizer": _llama(), "template": broken.replace(header + "\\n", header)}


def _check_template(answer):
    from helpers import chat

    if not isinstance(answer, str):
        raise Wrong("The answer is the template's text, a str.")
    talk = MESSAGES * 2
    try:
        row = chat.encode_chat(_llama(), talk, template=answer)
    except ValueError as error:
        raise Wrong(f"It does not work yet: {error}") from error

    def said(messages, template, **choices):
        choices |= {"chat_template": template, "tokenize": False}
        return _llama().apply_chat_template(messages, **choices)

    if said(talk, answer) != said(talk, _LLAMA):
        raise Wrong("The text of a conversation has changed: only the marking was wrong in it.")
    for stop in (1, 3):
        prompt = said(talk[:stop], answer, add_generation_prompt=True)
        if not said(talk, answer).startswith(prompt):
            raise Wrong("The prompt is no beginning of the whole: compare their last headers.")
        if prompt != said(talk[:stop], _LLAMA, add_generation_prompt=True):
            raise Wrong("The prompt should end where the answer begins: behind the header.")
    wanted = chat.encode_chat(_llama(), talk, template=_LLAMA)
    if row["labels"] != wanted["labels"]:
        problems = chat.mask_view(_llama(), row, template=answer).problems
        raise Wrong(f"The X-ray says {problems[0] if problems else 'that too little is trained'}")
    return "Two faults, and neither stops a run. The second shows only when the model is used."


# 4.5 ---------------------------------------------------------------------------------
_CAUSES = {
    "A": ("end not trained", "where do its brackets close, and what comes next?"),
    "B": ("cut", "is that a whole answer?"),
    "C": ("healthy", "what is trained, from where to where?"),
    "D": ("no template", "who is speaking in it?"),
    "E": ("prompt trained", "where do its brackets open?"),
}


def _given_views():
    """{letter: the X-ray of a row, as text, without its alarms}."""
    from helpers import chat

    row, end = _row(), _tokenizer().eos_token_id
    ids, labels = row["input_ids"], row["labels"]
    first, second = (_tokenizer()(m["content"])["input_ids"] for m in MESSAGES)
    shown = {"A": (ids, [x if x != end else -100 for x in labels]), "B": (ids[:-4], labels[:-4])}
    shown |= {"C": (ids, labels), "E": (ids, ids)}
    shown["D"] = ([*first, *second, end], [*[-100] * len(first), *second, end])
    views = {k: str(chat.mask_view(_tokenizer(), *shown[k])) for k in sorted(shown)}
    quiet = "\nno problems found"
    return {k: view.partition("\n!")[0].removesuffix(quiet) for k, view in views.items()}


def _check_views(answer):
    if not isinstance(answer, dict) or {str(key).upper() for key in answer} != set(_CAUSES):
        raise Wrong("Give a dictionary with the five letters, such as {'A': 'healthy', ...}.")
    said = {str(key).upper(): str(cause).strip().lower() for key, cause in answer.items()}
    causes = sorted(cause for cause, _ in _CAUSES.values())
    if unknown := set(said.values()).difference(causes):
        raise Wrong(f"{min(unknown)!r} is none of the causes: {', '.join(causes)}.")
    wrong = [letter for letter in _CAUSES if said[letter] != _CAUSES[letter][0]]
    if wrong:
        sign = _CAUSES[wrong[0]][1]
        raise Wrong(f"{5 - len(wrong)} of 5 are right. Look at {wrong[0]} again: {sign}")
    return "You can read an X-ray without its alarms. Templates that it cannot judge need that."


# 4.6 ---------------------------------------------------------------------------------
_TALKS = (
    ("Feed the dog.", "The dog, feed."),
    ("Read the map.", "The map, read."),
    ("Feed the dog.", "The dog, feed."),
    ("Glue the sheet.", "\x16The sheet, glue."),
    ("Sing.", ""),
    ("Open the gate.", "The gate, open.", "Thank you."),
    ("Count the sheep, " * 12 + "please.", "The sheep, count."),
    ("Close the door.<|im_end|>", "The door, close."),
    ("Wash the cup.", "The cup, wash."),
    ("Draw a cat.", "A cat, draw."),
    ("Hold the rope.", "The rope, hold."),
)  # fmt: skip
_HELD_OUT = ["Draw a cat."]
_MOST = 48


def _given_dirty():
    names = [("user", "assistant", "user")] * 8 + [("human", "gpt")] + [("user", "assistant")] * 2
    rows = [
        {"messages": [{"role": r, "content": c} for r, c in zip(roles, talk, strict=False)]}
        for roles, talk in zip(names, _TALKS, strict=True)
    ]
    return {"rows": rows, "held_out": list(_HELD_OUT), "tokenizer": _tokenizer()}


def _plain(text):
    return " ".join(text.replace("\x16", " ").replace("<|im_end|>", " ").split())


def _check_clean(answer):
    from helpers import chat

    known = {tuple(map(_plain, talk[:2])): talk for talk in _TALKS}
    asked: list[str] = []
    for number, row in enumerate(answer):
        messages = row["messages"] if hasattr(row, "keys") else row
        where = f"Row {number} ({messages[0]['content'][:20]!r}):"
        if (role := messages[-1]["role"]) != "assistant":
            raise Wrong(f"{where} its last message has the role {role!r}, not 'assistant'.")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                found = chat.encode_chat(_tokenizer(), messages)
            problems = chat.mask_view(_tokenizer(), found).problems
        except (ValueError, UserWarning) as error:
            raise Wrong(f"{where} {error}") from None
        if problems:
            raise Wrong(f"{where} the X-ray says {problems[0]}")
        question, said = (_plain(message["content"]) for message in messages[:2])
        if not said:
            raise Wrong(f"{where} this answer is empty: it teaches the model to say nothing.")
        if len(messages) != 2 or (question, said) not in known:
            raise Wrong(f"{where} these words are not in the data: mend marks, not sentences.")
        if len(found["input_ids"]) > _MOST:
            raise Wrong(f"{where} {len(found['input_ids'])} tokens; {_MOST} is the most.")
        if question in asked:
            raise Wrong(f"{where} this question is there already.")
        if question in _HELD_OUT:
            raise Wrong(f"{where} it is held out: the test would ask what was trained.")
        asked.append(question)
    for talk in (_TALKS[i] for i in (0, 1, 3, 5, 7, 8, 10)):
        if _plain(talk[0]) not in asked:
            raise Wrong(f"All of it is clean, but {_plain(talk[0])!r} is gone, and could be kept.")
    return "Seven of eleven rows, and each of the four that are gone has a reason."


# 4.7, 4.8 ----------------------------------------------------------------------------
def _number(right, remark, otherwise, hints):
    """A check of one number, with a hint for each known mistake."""

    def check(answer):
        if (number := round(one_number(answer), 2)) != right:
            raise Wrong(hints.get(number, otherwise))
        return remark

    return check


_check_loss = _number(1.25, "-100 tokens are in neither the sum nor the count.",
    "Average the losses of those whose label is not -100.", {
    0.5: "You divided by all five tokens. Ignored ones do not count.",
    1.75: "Nothing is to be shifted: each loss already stands at its own label.",
    1.8: "That is the mean over all tokens, ignored ones included.",
    2.17: "You took the tokens that are ignored. The others are learned.",
    2.5: "What counts is a mean, not a sum, over the losses that stand at a label."})  # fmt: skip
_check_wrapped = _number(3, "Three of five torn, and their parts share rows with strangers.",
    "Lay the samples end to end and mark every 64 tokens.", {
    2: "Two samples span a border each, but look at the last one again.",
    4: "Four rows come out; how many samples lie across one of the borders?"})  # fmt: skip


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
    Exercise("4.2", "Predict, then run: which leak?", _check_leaks, given=_given_packs,
        hints=("Where does each strategy write its borders, and who looks there?",
            "`batches.leak(*exercises.given('4.2')['a'])` measures one of them."),
        solution="from helpers.chat import batches\n\n"
        "answer = [letter for letter in given if batches.leak(*given[letter]) > 1e-4]\n"),
    Exercise("4.3", "Repair a pack", _check_pack, given=_given_pack,
        hints=("Three columns are wrong. What should say where a text begins?",
            "Restart the positions, take one column out, and look at the labels at the borders."),
        solution="import torch\n\n"
        "batch, lengths = given['batch'], given['lengths']\n"
        "positions = torch.cat([torch.arange(n) for n in lengths])[None]\n"
        "labels = batch['labels'].masked_fill(positions == 0, -100)\n"
        "answer = {'input_ids': batch['input_ids'], 'labels': labels, "
        "'position_ids': positions}\n"),
    Exercise("4.4", "Mend a template", _check_template, given=_given_template,
        hints=("Encode a conversation with it and ask the X-ray. Then render a prompt alone.",
            "The end of a turn belongs between the markers; headers end in two line breaks."),
        solution="answer = given['template'].replace(\n"
        "    \"m.content }}{%- endgeneration %}{{- '<|eot_id|>' }}\",\n"
        "    \"m.content + '<|eot_id|>' }}{%- endgeneration %}\",\n"
        ").replace(r\"assistant<|end_header_id|>\\n'\", "
        "r\"assistant<|end_header_id|>\\n\\n'\")\n"),
    Exercise("4.5", "Read five X-rays", _check_views, given=_given_views,
        hints=("`for letter, view in exercises.given('4.5').items(): print(letter, view)`",
            "Say for each where the brackets open and where they close."),
        solution="causes = 'end not trained', 'cut', 'healthy', 'no template', "
        "'prompt trained'\nanswer = dict(zip('ABCDE', causes))\n"),
    Exercise("4.6", "Clean a data set", _check_clean, given=_given_dirty,
        hints=("Encode each row and print what the X-ray says. Some faults it cannot see.",
            "Other names for roles, a message too many and stray characters can be mended."),
        solution="names, answer, seen = {'human': 'user', 'gpt': 'assistant'}, [], set()\n"
        "for row in given['rows']:\n"
        "    talk = []\n"
        "    for message in row['messages'][:2]:\n"
        "        text = message['content'].replace('\\x16', '').replace('<|im_end|>', '')\n"
        "        role = names.get(message['role'], message['role'])\n"
        "        talk.append({'role': role, 'content': text})\n"
        "    question, said = (message['content'] for message in talk)\n"
        "    tokens = given['tokenizer'].apply_chat_template(talk, return_dict=False)\n"
        "    known = question in seen or question in given['held_out']\n"
        "    if said and not known and len(tokens) <= 48:\n"
        "        answer.append({'messages': talk})\n"
        "    seen.add(question)\n"),
    Exercise("4.7", "A loss with holes", _check_loss,
        hints=("Which tokens have a label?", "Two of the five count, and the result is a mean."),
        solution="losses, labels = [3.0, 1.5, 2.0, 1.0, 1.5], [-100, 7, -100, 9, -100]\n"
        "kept = [x for x, y in zip(losses, labels) if y != -100]\n"
        "answer = sum(kept) / len(kept)\n"),
    Exercise("4.8", "Torn by wrapping", _check_wrapped,
        hints=("Add the lengths up: 20, 83, 92, ...",
            "Rows end at multiples of 64: which samples have such an end inside?"),
        solution="lengths, start, answer = [20, 63, 9, 90, 31], 0, 0\n"
        "for length in lengths:\n"
        "    answer += start // 64 != (start + length - 1) // 64\n"
        "    start += length\n"),
]  # fmt: skip
