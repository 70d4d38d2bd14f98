"""Chapter 6: a file for a card, an imatrix, padding, Modelfiles and serving chains to mend."""

import functools
import shutil
from typing import Any

from helpers.course.exercises import Exercise, Wrong, near, one_number


# ── 6.1 ──────────────────────────────────────────────────────────────────────────────────
def _card() -> dict[str, Any]:
    """An 8B model's files, in GB of 1e9 bytes, and a card for two users."""
    files = {"Q8_0": (8.54, 0.001), "Q6_K": (6.60, 0.003), "Q5_K_M": (5.73, 0.009)}
    files |= {"Q4_K_M": (4.92, 0.024), "Q4_K_M + imatrix": (4.92, 0.017)}
    files |= {"Q3_K_M": (4.02, 0.080), "IQ2_M + imatrix": (2.95, 0.250)}
    card = {"card_GiB": 8, "reserved_GiB": 0.8, "slots": 2, "context": 8192}
    card |= {"layers": 32, "kv_heads": 8, "head_dim": 128}
    return {**card, "files": {k: {"GB": size, "KL": kl} for k, (size, kl) in files.items()}}


def _check_choice(answer):
    files = _card()["files"]
    answer = tuple(answer.values()) if isinstance(answer, dict) else answer
    if not isinstance(answer, list | tuple) or len(answer) != 2 or answer[0] not in files:
        raise Wrong("Give two things: the name of a file, and the GiB that serving it takes.")
    size, said = files[answer[0]]["GB"], one_number(answer[1])
    cache = 2.0  # 2 slots * 8192 tokens * 2 * 32 layers * 8 heads * 128 numbers * 2 bytes
    needed = size * 1e9 / 2**30 + cache + 0.8
    for slip, why in {
        cache: "The cache is missing: keys and values lie beside the weights.",
        cache / 2: "That is half of the cache. Two users, and keys *and* values.",
        0.8: "What the card keeps for itself is missing.",
        needed - size - cache - 0.8: "The files are in GB (1e9 bytes), the card in GiB (2**30).",
    }.items():
        if near(said, needed - slip, 5e-3):
            raise Wrong(why)
    if not near(said, needed, 5e-3):
        raise Wrong("Add up the file, the cache of all slots, and what the card keeps, in GiB.")
    if needed > 8:
        raise Wrong(f"Counted rightly, and {needed:.2f} GiB do not fit into 8.")
    if answer[0] != "Q4_K_M + imatrix":
        raise Wrong("It fits, and so does one that is closer to the float16 model.")
    return f"{needed:.2f} of 8 GiB. With one slot, Q5_K_M would fit: what is that worth to you?"


# ── 6.2 ──────────────────────────────────────────────────────────────────────────────────
@functools.cache
def _layers() -> list[Any]:
    """Two layers: weights (outputs, inputs), inputs seen on your data, and unseen ones."""
    import torch

    draw, made = torch.Generator().manual_seed(62), list[Any]()
    for outputs, inputs in ((48, 64), (32, 96)):
        loud = torch.exp(1.5 * torch.randn(inputs, generator=draw))
        shapes = ((outputs, inputs), (512, inputs), (512, inputs))
        weights, seen, unseen = (torch.randn(*shape, generator=draw) for shape in shapes)
        made.append((weights, loud * seen, loud * unseen))
    return made


def _example() -> dict[str, Any]:
    weights, inputs, _ = _layers()[0]
    return {"weights": weights.clone(), "inputs": inputs.clone()}


def _plain(weights):
    """Two bits: -2, -1, 0 or 1 times a scale that the largest of 32 weights decides."""
    blocks = weights.reshape(-1, 32)
    scale = blocks.abs().amax(1, keepdim=True) / 2
    return (scale * (blocks / scale).round().clamp(-2, 1)).reshape(weights.shape)


def _check_rounding(answer):
    import torch

    if not callable(answer):
        raise Wrong("The answer should be a function of (weights, inputs).")
    worst, blind = 0.0, True
    for weights, inputs, unseen in _layers():
        made = torch.as_tensor(answer(weights.clone(), inputs.clone())).float()
        if made.shape != weights.shape:
            raise Wrong(f"Return rounded weights of the same shape, {tuple(weights.shape)} here.")
        if not made.isfinite().all():
            raise Wrong("Some of your weights are no numbers. Did you divide by a scale of 0?")
        other = torch.as_tensor(answer(weights.clone(), torch.ones_like(inputs))).float()
        blind &= torch.equal(made, other)
        for block in made.double().reshape(-1, 32):
            steps = torch.unique(block.round(decimals=4)).diff()
            if len(steps) > 3 or (len(steps) and steps.sum() > 3.1 * steps.min()):
                raise Wrong("A block of 32 may hold four evenly spaced values: two bits, a scale.")
        missed = [((w - weights) @ unseen.T).square().mean() for w in (made, _plain(weights))]
        worst = max(worst, float(missed[0] / missed[1]))
    said = f"On unseen inputs your error is {worst:.0%} of plain rounding's"
    if worst > 0.97:
        raise Wrong(f"{said}: nothing is won. Try several scales for each block.")
    if worst > 0.6 or blind:  # the same weights for other inputs
        raise Wrong(f"{said}. Weigh each weight's error by the mean square of its input.")
    return f"{said}. This is what an imatrix does: no bit more, and better where it matters."


# ── 6.3 ──────────────────────────────────────────────────────────────────────────────────
def _check_left_padding(answer):
    if not callable(answer):
        raise Wrong("The answer should be a function of (rows, pad_id).")
    for rows, pad_id in (([[5, 6, 7], [8]], 0), ([[9], [1, 0, 2, 3]], 0), ([[4, 4]], 9)):
        given = [list(row) for row in rows]
        made = answer(given, pad_id)
        if not isinstance(made, tuple | list) or len(made) != 2:
            raise Wrong("Return two things: input_ids and attention_mask.")
        try:
            ids, mask = ([list(map(int, row)) for row in part] for part in made)
        except TypeError:
            raise Wrong(
                "input_ids and attention_mask should each be a list of rows of numbers."
            ) from None
        longest = max(map(len, rows))
        if any(len(row) != longest for row in [*ids, *mask]):
            raise Wrong(f"All rows must be {longest} long here, and the masks as well.")
        gaps = [longest - len(row) for row in rows]
        left = [[pad_id] * gap + row for gap, row in zip(gaps, rows, strict=True)]
        right = [row + [pad_id] * gap for gap, row in zip(gaps, rows, strict=True)]
        if ids == right and ids != left:
            raise Wrong("That is right padding: generation would continue the padding.")
        if ids != left:
            raise Wrong(f"For rows {rows} the ids should be {left}, not {ids}.")
        if mask == [[int(token != pad_id) for token in row] for row in ids] and any(
            pad_id in row for row in rows
        ):
            raise Wrong(
                "The mask hides real tokens that happen to have the padding's id. Count "
                "positions instead of comparing ids."
            )
        if mask != [[0] * gap + [1] * (longest - gap) for gap in gaps]:
            raise Wrong("The mask is 0 on padding and 1 on every token of the prompt.")
    return "The last position of every row is now the end of its prompt."


# ── 6.4 ──────────────────────────────────────────────────────────────────────────────────
def _pairs() -> dict[str, dict[Any, str]]:
    """Chat templates by letter, and Modelfiles by number, three of them wrong."""
    header, after = "<|start_header_id|>ROLE<|end_header_id|>\n", "<|eot_id|>"
    chatml, phi = ("<|im_start|>ROLE\n", "<|im_end|>\n"), ("<|ROLE|>\n", "<|end|>\n")
    llama, zephyr = (header + "\n", after), ("<|ROLE|>\n", "</s>\n")
    templates, modelfiles = dict[Any, str](), dict[Any, str]()
    for letter, (before, after) in zip("ABCD", (chatml, phi, llama, zephyr), strict=True):
        turn = before.replace("ROLE", "{{ m['role'] }}") + "{{ m['content'] }}" + after
        opened = before.replace("ROLE", "assistant")
        templates[letter] = f"{{% for m in messages %}}{turn}{{% endfor %}}"
        templates[letter] += f"{{% if add_generation_prompt %}}{opened}{{% endif %}}"
    wrong = [(header, "<|eot_id|>", ""), (*chatml, "<|endoftext|>"), ("<|ROLE|>", "</s>\n", "")]
    order = [wrong[0], (*zephyr, ""), (*llama, ""), wrong[1], (*phi, ""), (*chatml, ""), wrong[2]]
    for number, (before, after, stop) in enumerate(order, 1):
        turn = before.replace("ROLE", "{{ .Role }}") + "{{ .Content }}" + after
        text = f"{{{{ range .Messages }}}}{turn}{{{{ end }}}}{before.replace('ROLE', 'assistant')}"
        modelfiles[number] = f'FROM ./model.gguf\nTEMPLATE """{text}"""\n'
        modelfiles[number] += f'PARAMETER stop "{stop or after.strip()}"\n'
    return {"templates": templates, "modelfiles": modelfiles}


def _check_pairs(answer):
    right = {"A": 6, "B": 5, "C": 3, "D": 2}
    if not isinstance(answer, dict) or {str(key).upper() for key in answer} != set(right):
        raise Wrong("Give a dictionary with the four letters, such as {'A': 1, 'B': 2, ...}.")
    said = {str(letter).upper(): int(one_number(n)) for letter, n in answer.items()}
    kept = sum(said[letter] == right[letter] for letter in right)
    for letter in right:
        why = {
            ("A", 4): "4 writes A's prompts. How do its answers end?",
            ("C", 1): "count the line breaks after the header, with repr().",
            ("D", 7): "what stands between the role and the message?",
        }.get((letter, said[letter]), "which words stand before and after a message?")
        if said[letter] != right[letter]:
            raise Wrong(f"{kept} of 4 are right. Look at {letter} again: {why}")
    return "The three left over answer, and are wrong. Only comparing prompts shows it."


# ── 6.5 ──────────────────────────────────────────────────────────────────────────────────
def _check_request(answer):
    if not callable(answer):
        raise Wrong("The answer should be a function that returns a dictionary.")
    tokenizer, ask = _tokenizer(), {"role": "user", "content": "Who?"}
    plain = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}<|im_end|>{% endfor %}"
    plain += "{% if add_generation_prompt %}[assistant]{% endif %}"
    tokenizer.bos_token = bos = "<jupyter_start>"
    for eos, head, adds_bos in (("<|im_end|>", bos, True), ("<|endoftext|>", bos, False)):
        tokenizer.eos_token, tokenizer.chat_template = eos, head + plain
        for talk in ([ask], [ask, {"role": "assistant", "content": "I."}, ask]):
            made = answer(tokenizer, [dict(message) for message in talk], "<|im_end|>", adds_bos)
            if not isinstance(made, dict) or not isinstance(made.get("prompt"), str):
                raise Wrong("It should still return a dictionary with a text as its 'prompt'.")
            want = tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
            got, stops = bos * adds_bos + made["prompt"], made.get("stop") or []
            if got != want:
                whys = {bos + want: "BOS twice", want.removeprefix(bos): "No BOS at all"}
                opened = got.endswith("[assistant]")
                why = (
                    whys.get(got, f"Trained was {want!r}") if opened else "Nothing opens the answer"
                )
                raise Wrong(f"{why}. With adds_bos={adds_bos} the server reads {got!r}.")
            if "<|im_end|>" not in ([stops] if isinstance(stops, str) else list(stops)):
                raise Wrong(f"With EOS {eos!r} it never stops at the end of a turn: {stops!r}.")
            if made.get("temperature") != 0 and made.get("top_k") != 1:
                raise Wrong("The prompt is right, and the answer is drawn by chance.")
    return "What is asked, what ends it, how it is drawn: look at these in every serving chain."


# ── 6.6 ──────────────────────────────────────────────────────────────────────────────────
def _check_kl(answer):
    import torch

    if not callable(answer):
        raise Wrong("The answer should be a function of two tensors of logits.")
    draw = torch.Generator().manual_seed(66)
    for _ in range(2):
        p, q = (2 * torch.randn(4, 9, generator=draw) for _ in range(2))
        log_p, log_q = p.log_softmax(-1), q.log_softmax(-1)
        each = (log_p.exp() * (log_p - log_q)).sum(-1)
        back = (log_q.exp() * (log_q - log_p)).sum(-1)
        try:
            mine = float(answer(p.clone(), q.clone()))
        except (TypeError, ValueError, RuntimeError) as error:
            raise Wrong(f"It should return one number, and raised: {error}") from None
        if near(mine, each.mean().item()):
            continue
        if near(mine, back.mean().item()):
            raise Wrong("That is p's divergence from q. Weigh with the probabilities of p.")
        if near(mine, each.sum().item()):
            raise Wrong("That is the sum over the tokens; asked for is the mean.")
        if near(mine, each.sum().item() / p.numel()):
            raise Wrong("You also averaged over the vocabulary: sum there, then average.")
        if near(mine, each.mean().item() / 0.6931472):
            raise Wrong("That is in bits; nats use the natural logarithm.")
        raise Wrong("Make log-probabilities of both first: `log_softmax(-1)`.")
    return "0 for the same model, and never negative. llama.cpp computes the very same."


# ── 6.7 ──────────────────────────────────────────────────────────────────────────────────
def _tokenizer():
    from helpers import chat, models

    tokenizer = models.load_tokenizer(models.EMBEDDED)
    tokenizer.chat_template = chat.chatml_template()
    return chat.prepare_tokenizer(tokenizer)


def _broken_modelfile():
    return (
        "FROM ./yoda-Q8_0.gguf\n"
        'TEMPLATE """{{ range .Messages }}{{ if ne .Role "system" }}'
        "<|im_start|>{{ .Role }}\n"
        "{{ .Content }}<|im_end|>\n"
        "{{ end }}{{ end }}<|im_start|>assistant\n"
        '"""\n'
        "PARAMETER temperature 0\n"
    )


def _check_modelfile(answer):
    from helpers.serving import parity

    if not isinstance(answer, str):
        raise Wrong("Answer with the text of the Modelfile.")
    for instruction in ("FROM", "TEMPLATE"):
        if not any(line.startswith(instruction) for line in answer.splitlines()):
            raise Wrong(f"It has no {instruction} any more.")
    tokenizer = _tokenizer()
    talks = [
        [{"role": "user", "content": "Who is there?"}],
        [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Who is there?"},
            {"role": "assistant", "content": "I am."},
            {"role": "user", "content": "And who else?"},
        ],
    ]
    report = parity.template_parity(tokenizer, talks, modelfile=answer)
    if "missing_stop" in report.codes:
        raise Wrong(
            "It still never stops: no PARAMETER stop names the token that ends a turn, "
            f"{tokenizer.eos_token}."
        )
    if not shutil.which("go"):  # without the engine, read the template
        if "<|im_start|>system" not in answer and 'ne .Role "system"' in answer:
            raise Wrong("The system message still goes nowhere.")
        return "The stop word is there. (Without Go, the template was only read.)"
    if report.differences:
        first = report.differences[0]
        if "Be brief." in first.expected and "Be brief." not in first.got:
            raise Wrong("It stops now, and the system message still goes nowhere.")
        raise Wrong(
            f"It stops now, but the prompts differ from training's: {first.expected!r} "
            f"became {first.got!r}."
        )
    return "Go's engine writes what the tokenizer writes, and the model knows when to stop."


EXERCISES = [
    Exercise(
        "6.1",
        "A file for a card",
        _check_choice,
        hints=(
            "Each token keeps a key and a value per layer and KV head, 2 bytes a number.",
            "The cache of two slots is 2 GiB. Which files are below 5.2 GiB?",
        ),
        solution="""size = 2 * given["layers"] * given["kv_heads"] * given["head_dim"] * 2
cache = size * given["context"] * given["slots"] / 2**30
fits = {}
for name, file in given["files"].items():
    needed = file["GB"] * 1e9 / 2**30 + cache + given["reserved_GiB"]
    if needed <= given["card_GiB"]:
        fits[name] = needed
best = min(fits, key=lambda name: given["files"][name]["KL"])
answer = best, fits[best]
""",
        given=_card,
    ),
    Exercise(
        "6.2",
        "Your own imatrix",
        _check_rounding,
        hints=(
            "Try thirty scales for each block of 32; keep the one with the least error.",
            "The error that counts: (rounded - weight)**2 times the input's mean square.",
        ),
        solution="""import torch


def answer(weights, inputs):
    matters = inputs.square().mean(0).expand_as(weights).reshape(-1, 32)
    blocks, best, least = weights.reshape(-1, 32), None, None
    largest = blocks.abs().amax(1, keepdim=True)
    for share in torch.linspace(-1, 1, 80):
        scale = largest * share
        made = scale * torch.clamp(torch.round(blocks / scale), -2, 1)
        error = ((made - blocks) ** 2 * matters).sum(1, keepdim=True)
        if best is None:
            best, least = made, error
        best = torch.where(error < least, made, best)
        least = torch.minimum(error, least)
    return best.reshape(weights.shape)
""",
        given=_example,
    ),
    Exercise(
        "6.3",
        "Padding for generation",
        _check_left_padding,
        hints=(
            "How many are missing in a row? `longest - len(row)`.",
            "Build the mask from that number, not from the ids.",
        ),
        solution=(
            "def answer(rows, pad_id):\n"
            "    longest = max(len(row) for row in rows)\n"
            "    gaps = [longest - len(row) for row in rows]\n"
            "    ids = [[pad_id] * gap + row for gap, row in zip(gaps, rows)]\n"
            "    mask = [[0] * gap + [1] * len(row) for gap, row in zip(gaps, rows)]\n"
            "    return ids, mask\n"
        ),
    ),
    Exercise(
        "6.4",
        "Pair the Modelfiles",
        _check_pairs,
        hints=(
            "Print them with repr(): line breaks count.",
            "Three Modelfiles are almost right: one stop word, one line break, one role.",
        ),
        solution='answer = {"A": 6, "B": 5, "C": 3, "D": 2}\n',
        given=_pairs,
    ),
    Exercise(
        "6.5",
        "Four bugs in a serving chain",
        _check_request,
        hints=(
            "Print what the server would read: its own BOS, if it adds one, and your prompt.",
            "Who opens the answer? Who writes BOS? What ends a turn? What draws a token?",
        ),
        solution="""def answer(tokenizer, messages, end_of_turn, adds_bos):
    prompt = tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True
    )
    if adds_bos:
        prompt = prompt.removeprefix(tokenizer.bos_token)
    stop = [end_of_turn, tokenizer.eos_token]
    return {"prompt": prompt, "n_predict": 40, "temperature": 0, "stop": stop}
""",
    ),
    Exercise(
        "6.6",
        "How much has a model changed?",
        _check_kl,
        hints=(
            "`log_softmax(-1)` turns logits into log-probabilities.",
            "Sum p * (log p - log q) over the vocabulary, average over the tokens.",
        ),
        solution=(
            "def answer(p, q):\n"
            "    p, q = p.log_softmax(-1), q.log_softmax(-1)\n"
            "    return (p.exp() * (p - q)).sum(-1).mean()\n"
        ),
    ),
    Exercise(
        "6.7",
        "A Modelfile to mend",
        _check_modelfile,
        hints=(
            "Which token ends an answer? Ollama must know it: `PARAMETER stop`.",
            "The template leaves out every message whose role is system. Why should it?",
        ),
        solution=(
            'answer = given.replace(\'{{ if ne .Role "system" }}\', "")\n'
            'answer = answer.replace("{{ end }}{{ end }}", "{{ end }}")\n'
            "answer += 'PARAMETER stop \"<|im_end|>\"\\n'\n"
        ),
        given=_broken_modelfile,
    ),
]
