"""A chat template taken apart, and said in Go's template language (Chapter 6).

The tokenizer's own template is rendered on probe conversations, taken apart, written down
again in Go, and put together once more to be compared. What does not come out equal is
refused. `ollama` makes a Modelfile of it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import astuple, dataclass, replace
from typing import TYPE_CHECKING

from helpers.serving._rest import Messages

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

RAW_MODE = (
    "Way out: leave TEMPLATE alone and send prompts that you rendered yourself, "
    '`{"raw": true, "prompt": tokenizer.apply_chat_template(...)}`'
)
TALK, ORDER = ("first question", "first answer", "second question"), "standing order"
DATED = (
    "so prompts of training and of serving differ with the day. Before you train, put a fixed "
    "text there: tokenizer.chat_template = re.sub(r'strftime_now\\([^)]*\\)', "
    "'\"26 Jul 2024\"', tokenizer.chat_template)"
)
HARD = "quotes \" ' ``` braces {{ .X }} {% y %} back\\slash\n<think>é</think> 汉字 🙂"


def collate(messages: Messages) -> Messages:
    """Messages as Ollama hands them to a TEMPLATE: neighbors of one role become one."""
    merged: Messages = []
    for message in messages:
        role, content = message["role"], message.get("content") or ""
        if merged and merged[-1]["role"] == role != "tool":
            merged[-1]["content"] += f"\n\n{content}"
        else:
            merged.append({"role": role, "content": content})
    return merged


@dataclass(frozen=True)
class GoTemplate:
    """A chat template taken apart: the fixed texts around the contents of a conversation.

    user, again: before the first and before a later question. assistant: before an answer;
    prompt: what opens the answer that the model shall write. after_user, after_assistant:
    what closes a turn. system: before the system message (None without a place for it);
    system_user: between it and the first question. default: a system message that the
    template adds when there is none. empty: whether an empty system message counts as one.
    opening: what the model itself writes before the words of an answer; mostly nothing.

    Example:
        >>> turns = {"user": "Q:", "again": "Q:", "after_user": ";"}
        >>> turns |= {"assistant": "A:", "after_assistant": ";", "prompt": "A:"}
        >>> GoTemplate(**turns).render([{"role": "user", "content": "Hello"}])
        'Q:Hello;A:'
    """

    user: str
    again: str
    after_user: str
    assistant: str
    after_assistant: str
    prompt: str
    system: str | None = None
    system_user: str = ""
    default: str | None = None
    empty: bool = True
    opening: str = ""

    def render(self, messages: Messages) -> str:
        """The prompt for `messages`, as Ollama builds it from `text()`.

        As there, tool messages and system messages after the first are dropped.
        """
        messages = collate(messages)
        leading = bool(messages) and messages[0]["role"] == "system"
        first, text = self.user, ""
        if leading and self.system is not None and (self.empty or messages[0]["content"]):
            first = self.system + messages[0]["content"] + self.system_user
        for number, message in enumerate(messages):
            if message["role"] == "assistant":
                text += self.assistant + message["content"] + self.after_assistant
            elif message["role"] == "user":
                before = first if number <= leading else self.again
                text += before + message["content"] + self.after_user
        return text + self.prompt

    def text(self) -> str:
        """The same in Go's template language, with Ollama's variables."""
        first, leading = self.user, '(eq $s.Role "system")'
        if self.system is not None:
            order = f"{self.system}{{{{ $s.Content }}}}{self.system_user}"
            said = leading if self.empty else f"and {leading} $s.Content"
            first = f"{{{{ if {said} }}}}{order}{{{{ else }}}}{self.user}{{{{ end }}}}"
        if self.system is not None or self.again != self.user:
            # With a system message, the first question is the second message.
            shift = f"{{{{ if or (eq $i 0) (and {leading} (eq $i 1)) }}}}"
            first = f"{shift}{first}{{{{ else }}}}{self.again}{{{{ end }}}}"
        return (
            "{{ range $i, $m := .Messages }}{{ $s := index $.Messages 0 }}"
            '{{ if eq $m.Role "user" }}'
            f"{first}{{{{ $m.Content }}}}{self.after_user}"
            '{{ else if eq $m.Role "assistant" }}'
            f"{self.assistant}{{{{ $m.Content }}}}{self.after_assistant}"
            f"{{{{ end }}}}{{{{ end }}}}{self.prompt}"
        )


def parse_template(tokenizer: PreTrainedTokenizerBase) -> GoTemplate:
    """Take a tokenizer's chat template apart, without a BOS that the server adds itself.

    ValueError for a template that does more than put fixed texts around contents.
    """
    found = take_apart(tokenizer)
    for text in filter(None, (found.text(), found.default)):
        quoted("tokenizer: its chat template", text, RAW_MODE)
    if any("{{" in f"{text}{{" for text in astuple(found)):
        raise ValueError(f"tokenizer: its chat template writes {{{{, which Go reads. {RAW_MODE}")
    if writes_date(tokenizer):
        raise ValueError(f"tokenizer: its chat template writes today's date, {DATED}")
    with contextlib.suppress(Exception):  # it may refuse an empty system message
        found = replace(found, empty=_render(tokenizer, TALK, "") != _render(tokenizer, TALK))
    _check(found, tokenizer)
    return found


def take_apart(tokenizer: PreTrainedTokenizerBase) -> GoTemplate:
    """As `parse_template`, but the result is not yet compared with the template."""
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(f"tokenizer has no chat template. {RAW_MODE}")
    try:
        head, between, again, tail = _split(_render(tokenizer, TALK), *TALK)
        # What ends a turn also when nothing follows; some templates add more at the very end.
        after_user = _split(_render(tokenizer, TALK[:1], prompt=False), *TALK[:1])[-1]
        after_user *= between.startswith(after_user) and tail.startswith(after_user)
        after = _split(_render(tokenizer, TALK[:2], prompt=False), *TALK[:2])[-1]
        after *= again.startswith(after)
    except Exception as error:  # a template may raise anything, on purpose too
        raise ValueError(
            f"tokenizer: its chat template cannot be read ({error}). {RAW_MODE}"
        ) from error
    system, system_user, default = None, "", None
    # No place for a system message is a fact, not a fault.
    with contextlib.suppress(Exception):
        system, system_user, _ = _split(_render(tokenizer, TALK[:1], ORDER), ORDER, TALK[0])
    if system is not None and head.startswith(system) and head != system:
        rest = head.removeprefix(system)
        default = rest.removesuffix(system_user) if rest.endswith(system_user) else None
    assistant, prompt = between.removeprefix(after_user), tail.removeprefix(after_user)
    begins = [assistant]
    with contextlib.suppress(Exception):  # an answer with thoughts before it
        talk = _talk(TALK[:2], None)
        talk[-1]["reasoning_content"] = ORDER
        text = str(tokenizer.apply_chat_template(talk, tokenize=False))
        begins.append(_split(text, *TALK[:2])[1].removeprefix(after_user).replace(ORDER, ""))
    return GoTemplate(
        user=head,
        again=again.removeprefix(after),
        after_user=after_user,
        assistant=assistant,
        after_assistant=after,
        prompt=prompt,
        system=system,
        system_user=system_user,
        default=default,
        opening=max((text[_shared(text, prompt) :] for text in begins), key=len),
    )


def _check(template: GoTemplate, tokenizer: PreTrainedTokenizerBase) -> None:
    # Whatever a template looks for inside a message stands in it, in quotes.
    words = _literals(tokenizer)
    odd = [HARD, " ".join(words), *(f"{word} so {word} it {word}" for word in words)]
    talks = [TALK[:1], TALK, *((each, each, "And?") for each in odd), (TALK[0], "", "And?")]
    for system in (None, ORDER, HARD, "") if template.system is not None else (None,):
        for talk in talks:
            try:
                expected = _render(tokenizer, talk, system)
            except Exception:  # what it refuses stands in no row of training
                continue
            got = template.render(_talk(talk, system))
            if expected != got:
                at = max(0, _shared(expected, got) - 20)
                raise ValueError(
                    "tokenizer: its chat template does more than put fixed texts around the "
                    "messages (a thinking one strips the thoughts of earlier answers), so Go's "
                    f"would differ: …{expected[at : at + 60]!r} against …{got[at : at + 60]!r}. "
                    f"{RAW_MODE}"
                )


def _literals(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    import jinja2

    lexer = jinja2.Environment().lexer
    found = (token for token in lexer.tokenize(tokenizer.get_chat_template()))
    texts = (str(token.value).strip() for token in found if token.type == "string")
    return list(dict.fromkeys(filter(None, texts)))


def writes_date(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the chat template writes the date of the day into prompts."""
    return "strftime_now(" in tokenizer.get_chat_template()


def stop_words(tokenizer: PreTrainedTokenizerBase, template: GoTemplate | None = None) -> list[str]:
    """The special tokens that end an answer: EOS, and those around the next question."""
    template = template or take_apart(tokenizer)
    between = template.after_assistant + template.again
    special = {t.content for t in tokenizer.added_tokens_decoder.values() if t.special}
    # A stop word that an answer itself begins with would cut every answer to nothing.
    fit = (t for t in special if t in between and t not in template.opening)
    found = sorted(fit, key=between.find)
    eos = tokenizer.eos_token
    return found if eos in found or not eos else [str(eos), *found]


def adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer, and so a GGUF made of it, puts BOS before every text."""
    return tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id]


def _render(tokenizer, contents, system=None, prompt=True, **options):
    options |= {"tokenize": False, "add_generation_prompt": prompt}
    text = tokenizer.apply_chat_template(_talk(contents, system), **options)
    # The server adds BOS on its own; a second one in the template spoils the answers.
    return text.removeprefix(tokenizer.bos_token) if adds_bos(tokenizer) else text


def _talk(contents: Sequence[str], system: str | None) -> list[dict[str, str]]:
    turns = [(("user", "assistant")[n % 2], content) for n, content in enumerate(contents)]
    turns = turns if system is None else [("system", system), *turns]
    return [{"role": role, "content": content} for role, content in turns]


def _shared(one: str, other: str) -> int:
    """How many characters two texts have in common at their beginning."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((n for n, (a, b) in pairs if a != b), min(len(one), len(other)))


def _split(text: str, *contents: str) -> list[str]:
    parts = []
    for content in contents:
        before, found, text = text.partition(content)
        if not found:
            raise ValueError(f"it drops or changes the message {content!r}")
        parts.append(before)
    return [*parts, text]


def quoted(name: str, text: str, cure: str = "") -> str:
    """A text in quotes, as Ollama's parser reads it: no escapes, nothing unprintable."""
    readable = all(each.isprintable() or each in "\n\t" for each in text)
    if not text or not readable or '"""' in text or text.endswith('"'):
        raise ValueError(
            f'{name} cannot stand in a Modelfile, where """ and a final quote end a text and '
            f"invisible characters are dropped: {text!r}. {cure}"
        )
    return f'"""{text}"""' if "\n" in text or text.startswith('"') else f'"{text}"'
