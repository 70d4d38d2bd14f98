"""Chapter 6: sizes, padding, merging, prompts that differ, and a Modelfile to mend."""

import shutil

from helpers.course.exercises import Exercise, Wrong, near, one_number


# ── 6.1 ──────────────────────────────────────────────────────────────────────────────────
def _check_size(answer):
    number = one_number(answer)
    if near(number, 3.8 * 8.5 / 8, 5e-3):
        return "Bits per weight times weights, divided by eight. The metadata is small change."
    if near(number, 3.8 * 8.5):
        raise Wrong("Those are gigabits. A byte has eight bits.")
    if near(number, 3.8 * 8.5 / 8 * 1e9 / 2**30, 5e-3):
        raise Wrong("That is in GiB (2**30 bytes); GB of 1e9 bytes were asked for.")
    if near(number, 3.8):
        raise Wrong("Eight bits would give that. The block scales take half a bit more.")
    raise Wrong("Weights times bits per weight gives bits; then make bytes of them.")


# ── 6.2 ──────────────────────────────────────────────────────────────────────────────────
ROWS = (576, 768, 896, 2048, 3072, 4864)


def _check_rows(answer):
    try:
        chosen = sorted({int(number) for number in answer})
    except (TypeError, ValueError):
        raise Wrong("Answer with a list of row lengths, such as [576, 768].") from None
    if strangers := [number for number in chosen if number not in ROWS]:
        raise Wrong(f"{strangers[0]} was not among the lengths.")
    for number in ROWS:
        if number in chosen and number % 256:
            raise Wrong(
                f"{number} / 256 = {number / 256:g}: the last super-block of a row would "
                "be incomplete."
            )
    if missing := [n for n in ROWS if n not in chosen and n % 256 == 0]:
        raise Wrong(f"None of yours falls back, but there is at least one more ({len(missing)}).")
    return "Width matters: 896 is Qwen2.5-0.5B's, and its files fall back like ours."


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
def _check_merge(answer):
    import torch

    if not callable(answer):
        raise Wrong("The answer should be a function of (W, A, B, alpha).")
    draw = torch.Generator().manual_seed(6)
    for out, inputs, rank, alpha in ((5, 7, 2, 4), (6, 6, 3, 16), (4, 9, 1, 1)):
        shapes = ((out, inputs), (rank, inputs), (out, rank))
        W, A, B = (torch.randn(*shape, generator=draw) for shape in shapes)
        kept = W.clone()
        made = answer(W, A, B, alpha)
        if not isinstance(made, torch.Tensor) or made.shape != kept.shape:
            raise Wrong(f"Return a tensor of the shape of W, {tuple(kept.shape)} here.")
        if torch.allclose(made, kept + B @ A, atol=1e-5) and alpha != rank:
            raise Wrong("The adapter speaks at alpha / rank of its volume; yours at full.")
        if torch.allclose(made, kept + alpha * B @ A, atol=1e-5) and rank > 1:
            raise Wrong("You scale by alpha alone; divide it by the rank.")
        if not torch.allclose(made, kept + alpha / rank * B @ A, atol=1e-5):
            raise Wrong("x @ merged.T should equal x @ W.T + alpha / rank * x @ A.T @ B.T.")
        if not torch.equal(W, kept):
            raise Wrong("Right, but you changed W in place: merging twice would add twice.")
    return "One matrix, the same answers, and no detour while serving."


# ── 6.5 ──────────────────────────────────────────────────────────────────────────────────
CAUSES = ("double_bos", "missing_generation_prompt", "trailing_newline", "different_text")


def _prompt_pairs():
    question = "<|user|>\nThe moon is full.<|end|>\n"
    trained = f"<s>{question}<|assistant|>\n"
    return [
        (trained, f"<s>{question}"),
        (trained, f"<s>{trained}"),
        (trained, trained.removesuffix("\n")),
    ]


def _check_causes(answer):
    right = ["missing_generation_prompt", "double_bos", "trailing_newline"]
    if not isinstance(answer, list | tuple) or len(answer) != len(right):
        raise Wrong("Answer with a list of three names, one for each pair.")
    for name in answer:
        if name not in CAUSES:
            raise Wrong(f"{name!r} is none of {', '.join(CAUSES)}.")
    wrong = [i for i, (a, b) in enumerate(zip(answer, right, strict=True)) if a != b]
    if wrong:
        raise Wrong(
            f"Look at pair {wrong[0] + 1} once more, with repr(): which characters does "
            "one have and the other not?"
        )
    return "Invisible on a screen, plain in a repr, and each enough to spoil the answers."


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
        "How large is the file?",
        _check_size,
        hints=("Weights times bits per weight are bits.", "3.8e9 * 8.5 / 8 bytes."),
        solution="answer = 3.8e9 * 8.5 / 8 / 1e9\n",
    ),
    Exercise(
        "6.2",
        "Which rows fall back?",
        _check_rows,
        hints=("A row is cut into super-blocks of 256.", "Try `n % 256` on each."),
        solution=f"answer = [n for n in {list(ROWS)} if n % 256 == 0]\n",
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
        "Merge by hand",
        _check_merge,
        hints=("W has the shape (out, in), like B @ A.", "The scale is alpha / rank."),
        solution=("def answer(W, A, B, alpha):\n    return W + alpha / A.shape[0] * (B @ A)\n"),
    ),
    Exercise(
        "6.5",
        "Three prompts that differ",
        _check_causes,
        hints=(
            "Print both with `repr`.",
            "A start twice, an opening that is not there, a line break that is not there.",
        ),
        solution=('answer = ["missing_generation_prompt", "double_bos", "trailing_newline"]\n'),
        given=_prompt_pairs,
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
