"""The alarms of the mask view: is every trained run an answer, from its start to its end?"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import accumulate, groupby, pairwise
from typing import TYPE_CHECKING

from helpers.chat._tokens import Token, fence, shared_start, squeeze, unfence

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

    from helpers.chat._format import ChatFormat

# What to mend first, first.
CODES = (
    "message_lost",
    "control_in_text",
    "rows_dropped",
    "no_template",
    "nothing_trained",
    "labels_differ",
    "double_bos",
    "prompt_trained",
    "start_not_trained",
    "end_of_turn_not_trained",
    "eos_not_trained",
    "end_of_turn_not_stop",
    "truncated",
    "padding_trained",
)
Alarms = Iterator[tuple[str, str]]  # code and message
# An EOS that ends turns: of a chat model, which may stop at more than its tokenizer tells.
_ENDS_TURNS = re.compile(r"im_end|eot|turn|utterance|^<\|end\|>$", re.IGNORECASE)


def check_labels(row: Sequence[Token]) -> Alarms:
    """The alarms that need no template."""
    if padding := sum(token.padding and token.trained for token in row):
        yield "padding_trained", f"trains {padding} padding tokens: their labels must be -100."
    if wrong := sum(token.trained and token.label != token.id for token in row):
        ahead = sum(t.trained and t.id != t.label == after.id for t, after in pairwise(row))
        cause = "labels[i] must be input_ids[i] or -100"
        if ahead > wrong / 2:
            cause = "they are shifted by one. The model shifts labels itself: labels[i] is "
            cause += "input_ids[i]"
        yield "labels_differ", f"has {wrong} labels that are not their own token: {cause}."


def trained_runs(tokens: Sequence[Token]) -> Iterator[tuple[int, int]]:
    """(start, stop) of each run of trained tokens."""
    for trained, group in groupby(range(len(tokens)), key=lambda i: tokens[i].trained):
        if trained:
            run = list(group)
            yield run[0], run[-1] + 1


class Sample:
    """One sample of a batch, without padding, held against the format of its chat."""

    def __init__(
        self,
        format: ChatFormat,
        tokenizer: Tokenizer,
        tokens: list[Token],
        pieces: list[bytes],
        stops: Sequence[str] | None = None,
    ) -> None:
        self.format, self.tokenizer, self.tokens, self.stops = format, tokenizer, tokens, stops
        said = [pieces[token.index] for token in tokens]
        said = said if format.spaces else [squeeze(piece) for piece in said]
        self.edges = list(accumulate(map(len, said), initial=0))  # of tokens, in the text
        self.text = b"".join(said)
        ends = (format.turn_end, format.last_end, format.call_end)
        self.ends = [end for end in dict.fromkeys(ends) if end]
        self.headers = [mark for mark in (format.header, format.question) if mark]
        shared = tokenizer.pad_token_id == tokenizer.eos_token_id
        self.why = " pad_token is eos_token: whoever masked padding masked it too." * shared

    def alarms(self) -> Alarms:
        """All alarms, in the order of the text."""
        tokenizer, tokens = self.tokenizer, self.tokens
        first = next((i for i, token in enumerate(tokens) if token.trained), 0)
        led = self.text[: self.edges[first]].removeprefix(fence(tokenizer.bos_token)).rstrip()
        if self._double_bos():
            yield (
                "double_bos",
                f"starts with one {tokenizer.bos_token!r} too many: the template wrote it, "
                "and the tokenizer added another. Tokenize with add_special_tokens=False.",
            )
        if not any(token.trained for token in tokens):
            yield "nothing_trained", "has no label at all: it teaches nothing."
        elif any(mark in self.text for mark in self.headers):
            for start, stop in self._runs():
                yield from self._check_run(start, stop)
            yield from self._check_stop()
        elif self.headers and not self.format.header.endswith(led):  # nor cut inside one
            yield (
                "no_template",
                "trains a part of a text without roles, though the tokenizer has a chat template: "
                "it was not applied. Give the trainer messages (role and content), not strings.",
            )
        elif tokens[-1].id != tokenizer.eos_token_id:
            yield "eos_not_trained", f"is plain text, and no EOS at its end.{self.why}"
        elif not tokens[-1].trained:
            yield "eos_not_trained", f"is plain text, and its EOS is not trained.{self.why}"

    def _runs(self) -> list[tuple[int, int]]:
        """The trained runs; one that stops inside a character goes on behind it.

        Where the markers meet behind an emoji, transformers leaves out its last bytes.
        """
        runs: list[tuple[int, int]] = []
        for start, stop in trained_runs(self.tokens):
            hole = self.text[self.edges[runs[-1][1]] : self.edges[start]] if runs else b""
            if hole and all(0x80 <= byte < 0xC0 for byte in hole):
                start = runs.pop()[0]
            runs.append((start, stop))
        return runs

    def _double_bos(self) -> bool:
        bos, mark, own = self.tokenizer.bos_token_id, fence(self.tokenizer.bos_token), 1
        while self.format.opening.startswith(mark * (own + 1)):
            own += 1
        first = [token.id for token in self.tokens[: own + 1]]
        return bos is not None and first == [bos] * (own + 1)

    def _check_run(self, start: int, stop: int) -> Alarms:
        """Does a trained run begin where the template lets an answer start?"""
        begin, second, finish = self.edges[start], self.edges[start + 1], self.edges[stop]
        said = self.text[begin:finish]
        token = f"token {self.tokens[start].index} ({self.tokens[start].text!r})"
        if self._answer_starts(begin, second):
            if other := self._between_answers(said):
                yield "prompt_trained", f"trains {other}."
        elif start == 0 and not any(mark in said for mark in self.headers):
            yield "truncated", "starts in the middle of an answer."
        elif self._inside_answer(begin) and not self._answer_starts(second, finish):
            message = f"trains an answer only from {token} on: the mask begins late."
            yield "start_not_trained", message
        else:
            message = f"trains the prompt from {token} on: the model learns to write questions."
            yield "prompt_trained", message
            if not self._answer_starts(begin, finish):
                return  # no answer in it that could end badly
        if self.ends:
            yield from self._check_end(start, stop)

    def _between_answers(self, said: bytes) -> str:
        """What a run that begins with an answer trains before another one; "" if nothing."""
        format = self.format
        if format.tool and format.tool != format.between and format.tool in said:
            return "a tool's result, which is for the model to read, not to write"
        _, found, rest = said.partition(format.between)
        if found and format.between and format.header in rest:
            return "a question between two answers"
        # Any other role (a system message, an observation): a turn that is not an answer's.
        opening = shared_start(format.header, format.question)
        answers = tuple(before.lstrip() for before, _ in format.starts if before)
        while format.turn_end and format.turn_end in said:
            said = said.split(format.turn_end, 1)[1]
            turn = said.lstrip()
            if turn.startswith(opening) and not turn.startswith(answers) and format.header in turn:
                return "another role's turn between two answers"
        return ""

    def _check_stop(self) -> Alarms:
        """Does generation stop where the template ends an answer?"""
        ends, eos = self.format.stop_words, self.tokenizer.eos_token
        if not ends:
            yield (
                "end_of_turn_not_stop",
                "is of a template that writes nothing where an answer ends: the model will not "
                "learn to stop. Put eos_token behind the content, before `{% endgeneration %}`.",
            )
        elif self.stops is None and _ENDS_TURNS.search(eos or ""):
            return  # only the model could tell
        elif not any(stop in end for stop in self.stops or [eos or "\0"] for end in ends):
            known = ends[-1] in self.tokenizer.get_added_vocab()
            unless = "" if self.stops else ", unless its generation_config lists it"
            cure = f"Set tokenizer.eos_token = {ends[-1]!r}, then run chat.prepare_model"
            yield (
                "end_of_turn_not_stop",
                f"ends its answers with {ends[-1]!r}, which is no stop token (EOS is {eos!r}): the "
                f"model will talk on{unless}. "
                f"{cure if known else 'Take chat.choose_template(tokenizer)'}.",
            )

    def _answer_starts(self, begin: int, end: int) -> bool:
        """True if the template lets an answer start at `begin`, or after it but before `end`.

        The first token may begin in the header and reach into the content: `>` + newline.
        """
        return any(
            self.text.endswith(before, 0, cut) and self.text.startswith(after, cut)
            for cut in (begin, *range(begin + 1, end))
            for before, after in self.format.starts
        )

    def _inside_answer(self, begin: int) -> bool:
        """True if `begin` lies behind an answer's header and before its end."""
        header = self.text.rfind(self.format.header, 0, begin)
        since = self.text[header + len(self.format.header) : begin]
        return header >= 0 and not any(end in since for end in self.ends)

    def _check_end(self, start: int, stop: int) -> Alarms:
        """Does a trained run stop where the template ends an answer?"""
        middle, last, finish = self.format.turn_end, self.format.last_end, self.edges[stop]
        final, eos = self.tokens[stop - 1], fence(self.tokenizer.eos_token)
        rest = self.text[finish:].lstrip()
        # The last token may end the turn and reach into what follows: "><".
        for cut in range(finish, self.edges[stop - 1], -1):
            done = self.text[:cut].rstrip()
            if done.endswith(tuple(self.ends)):
                # Some templates close the last turn twice: `<|end|>` and then EOS.
                twice = last.startswith(middle) and eos in last[len(middle) :]
                if twice and done.endswith(middle) and rest.startswith(eos):
                    yield "eos_not_trained", f"leaves the final EOS out of the loss.{self.why}"
                return
        for end in self.ends:
            _, closed, beyond = self.text[self.edges[start] : finish].rpartition(end)
            if closed and beyond.strip() and self.format.question.startswith(beyond.strip()):
                yield "prompt_trained", "trains on past the end of an answer."
                return
        missing = next((end for end in self.ends if rest.startswith(end)), self.ends[0])
        if rest or stop < len(self.tokens):
            yield (
                "end_of_turn_not_trained",
                f"trains an answer up to token {final.index} ({final.text!r}) but not the "
                f"{unfence(missing)!r} that ends it: the model will not learn to stop.",
            )
            if eos in missing:
                message = f"never trains EOS {self.tokenizer.eos_token!r}.{self.why}"
                yield "eos_not_trained", message
        elif last:
            yield (
                "truncated",
                f"ends inside an answer, before its {unfence(last)!r}: raise max_length or "
                "drop the sample, or the model learns to stop in mid-sentence.",
            )
