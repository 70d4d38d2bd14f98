"""What a chat template writes around the contents, learned by rendering it (Chapter 4).

The mask X-ray (`helpers.xray`) reasons from this: where an answer may start, what ends
it, what opens a question. Nothing here knows a template by name.
"""

import re
from dataclasses import dataclass
from functools import cache


@dataclass(frozen=True)
class Anatomy:
    """What a template writes around contents, as bytes in which specials are fenced."""

    starts: frozenset  # (before, after): where training an answer may start
    header: bytes  # opens an answer
    question: bytes  # opens a question
    between: bytes  # all that stands between an answer and the next question
    ends: tuple  # end of turn, in mid-conversation and in the last turn
    opening: bytes  # the beginning of every conversation
    spaces: bool  # False: the tokenizer drops spaces, so they are not compared


def _render(tokenizer, template, messages, prompt=False):
    """Text of a conversation and the (start, end) of what its template marks as said."""
    from transformers.utils.chat_template_utils import render_jinja_template

    texts, spans = render_jinja_template(
        conversations=[messages],
        chat_template=template,
        return_assistant_tokens_mask="endgeneration" in template,
        add_generation_prompt=prompt,
        **tokenizer.special_tokens_map,
    )
    return texts[0], (spans[0] if spans else [])


def pick_template(tokenizer, template):
    """The template to reason from: the given one, or TRL's marked twin of a known one."""
    if template is None and not tokenizer.chat_template:
        raise ValueError(
            "tokenizer has no chat template, so nothing says where an answer starts or "
            "ends: set tokenizer.chat_template = chat.chatml_template(), or the one your "
            "data was formatted with."
        )
    template = template or tokenizer.get_chat_template()
    if "endgeneration" not in template:
        from trl.chat_template_utils import get_training_chat_template

        try:
            template = get_training_chat_template(tokenizer) or template
        except ValueError:  # a template TRL does not know: read its structure instead
            return template
    return template


def read_template(tokenizer, template):
    """Learn the anatomy of a template from what it makes of a two-turn conversation."""
    from jinja2 import TemplateError, TemplateSyntaxError

    names = ("Zebrafink", "Wolfsmilch", "Quittenbaum", "Kranichfeder")
    roles = ("user", "assistant") * 2
    # Vision templates take content as a list of parts.
    for form in (lambda text: text, lambda text: [{"type": "text", "text": text}]):
        chat = [
            {"role": role, "content": form(name)} for role, name in zip(roles, names, strict=True)
        ]
        try:
            full, spans = _render(tokenizer, template, chat)
            alone, _ = _render(tokenizer, template, chat[:1])
            prompt, _ = _render(tokenizer, template, chat[:1], prompt=True)
        except TemplateSyntaxError as error:
            raise ValueError(
                f"tokenizer.chat_template does not compile: {error.message} (line "
                f"{error.lineno}). Mend that line, or use chat.chatml_template()."
            ) from error
        except (TemplateError, TypeError, KeyError) as error:
            failure = f"fails with {type(error).__name__}: {error}"
            continue
        if all(name in full for name in names):
            break
        failure = "leaves contents out of its text"
    else:
        raise ValueError(
            "tokenizer.chat_template must render plain chats of the roles 'user' and "
            f"'assistant' but {failure}. Use a template that does, for example "
            "chat.chatml_template()."
        )
    at = [full.index(name) for name in names]
    end = [start + len(name) for start, name in zip(at, names, strict=True)]
    between, tail = full[end[1] : at[2]], full[end[3] :]

    said = []  # adjacent generation blocks are one
    for start, stop in spans:
        if said and said[-1][1] == start:
            start = said.pop()[0]
        said.append((start, stop))
    block = [next((b for b in said if b[0] <= at[i] < b[1]), None) for i in (1, 3)]

    # How a turn ends. The markers say it; without them (or with markers that forget it)
    # the structure does: what closes the last answer, or what is left of the text
    # between two turns after the opening of the next, or what closes a question.
    closing = [full[end[i] : b[1]].strip() if b else "" for i, b in zip((1, 3), block, strict=True)]
    asked = alone[end[0] :].strip() if full.startswith(alone) else ""
    opening = _shared_start(full[: at[0]][::-1], between[::-1])[::-1]
    guesses = (closing[0], tail.strip(), between.removesuffix(opening).strip(), asked)
    middle = next((g for g in guesses if g and between.lstrip().startswith(g)), "")
    last = closing[1] or tail.strip()

    # How an answer opens, in both turns: training may start at the block's start, at
    # the end of the generation prompt, or right at the content.
    if full.startswith(alone):
        first = len(alone)
    else:
        first = end[0] + len(_lead(full[end[0] :], middle))
    if not full[first : at[1]].strip():  # "[/INST]" both closes a question and opens an answer
        first = end[0]
    prompted = min(len(_shared_start(prompt, full)), at[1])
    lead = prompted - first if prompted > first else at[1] - first
    starts = set()
    for turn, begun in ((0, first), (1, end[2] + first - end[0])):
        content = at[2 * turn + 1]
        points = {begun + lead, content, block[turn][0] if block[turn] else content}
        for point in points:
            before = full[begun:point] if point > begun else ""
            after = "" if before.strip() else full[point : begun + lead]
            if (before + after).strip():
                starts.add((before, after))

    def fence(text):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        return b"".join(token_bytes(tokenizer, ids, fenced=True))

    plain = tokenizer(full, add_special_tokens=False)["input_ids"]
    spaces = b"".join(token_bytes(tokenizer, plain)) == full.encode()
    tidy = fence if spaces else lambda text: squeeze(fence(text))
    return Anatomy(
        starts=frozenset((tidy(before), tidy(after)) for before, after in starts),
        header=tidy(full[first : first + lead].strip()),
        question=tidy(between.lstrip().removeprefix(middle).strip()),
        between=tidy(between.strip()),
        ends=(tidy(middle), tidy(last)),
        opening=tidy(full[: at[0]].strip()),
        spaces=spaces,
    )


def _lead(text, closing):
    """The part of `text` up to the end of `closing` and the white space after it."""
    match = re.match(r"\s*" + re.escape(closing) + r"\s*", text) if closing else None
    return match.group() if match else ""


def _shared_start(one, other):
    """The longest text that both begin with."""
    length = next((i for i, (a, b) in enumerate(zip(one, other)) if a != b), None)  # noqa: B905
    return one[: min(len(one), len(other)) if length is None else length]


def squeeze(data):
    """Bytes without their white space."""
    return b"".join(data.split())


@cache
def _alphabet():
    """The characters that byte-level tokenizers write for bytes."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return {char: byte for byte, char in bytes_to_unicode().items()}


def token_bytes(tokenizer, ids, fenced=False):
    """The bytes of each token. Fenced: special tokens stand between bytes no text has,
    so that a text which merely spells `<|im_end|>` is not taken for the token."""
    added = tokenizer.added_tokens_decoder
    byte_of = _alphabet()
    byte_level = tokenizer.convert_tokens_to_ids("Ġ") not in {None, tokenizer.unk_token_id}
    pieces = []
    for index, token in zip(ids, tokenizer.convert_ids_to_tokens(ids), strict=True):
        if index in added:
            data = added[index].content.encode()
            fence = fenced and added[index].special
            pieces.append(b"\xfe" + data + b"\xff" if fence else data)
        elif token is None:
            raise ValueError(
                f"input_ids holds {index}, but the tokenizer has no such token: these ids "
                "come from another tokenizer."
            )
        elif byte_level:
            pieces.append(bytes(byte_of[c] for c in token if c in byte_of))
        elif match := re.fullmatch(r"<0x([0-9A-F]{2})>", token):
            pieces.append(bytes.fromhex(match[1]))
        else:
            pieces.append(token.replace("▁", " ").encode())
    return pieces


def unfence(data):
    """Readable text of fenced bytes."""
    return data.replace(b"\xfe", b"").replace(b"\xff", b"").decode(errors="replace")
