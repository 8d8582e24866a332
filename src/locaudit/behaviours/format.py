r"""Prompts: how a question and its answers become text.

There are three kinds of text in each style. In style ``qa`` (source: the ITI and TruthfulQA reference code):

    scoring   primer, then  Q: {question}\nA: {answer}
    training  the same, by default without the primer
    probing   Q: {question} A: {answer}   [ Q: {another question} ]

In style ``chat`` the tokenizer's chat template writes them (<role> stands for its markup of a message):

    scoring   <system> {primer} <user> {question} <assistant> {answer}
    training  the same, by default without the primer
    probing   <user> {question} <assistant> {answer}   [ <user> {another question} ]

In style ``completion`` the answer goes on from the question, which is the beginning of a text:

    scoring   primer, then  {question} {answer}
    training  the same, by default without the primer
    probing   {question} {answer}   [ \n\n{another question} ]

In style ``chat``, the text between prompt and answer, such as the space before an answer in Llama 2, also comes from
the template. What a template renders can depend on its variables, such as ``enable_thinking``, and on the date. Both
are fixed, by `Prompt.template` and `Prompt.date`.

Probes read activations at the last token of the probing text: the last token of the answer or of the other question.
A generated answer ends at one of the model's end tokens. It also ends at the next ``Q:`` in ``qa``, at a paragraph
break in ``completion``, and in ``chat`` at the special token that the template puts after an answer.
"""

from __future__ import annotations

import re
import string
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import date, datetime
from functools import cache
from importlib import resources
from os.path import commonprefix
from pathlib import Path
from typing import Any

from locaudit.behaviours.behaviour import Style
from locaudit.config.choices import Frozen
from locaudit.errors import DataError

Message = tuple[str, str]
"""A message of a chat: (role, text)."""

_PARTS: Mapping[Style, tuple[str, str, str, str]] = {
    "qa": ("Q: ", "\nA:", " A:", " Q: "),
    "completion": ("", "", "", "\n\n"),
}
"""Four texts for each style without a template: the text before a question, after it in scoring, after it in probing,
and before the question that follows an answer."""
_ENDS: Mapping[Style, re.Pattern[str]] = {"qa": re.compile(r"(?<!\w)Q:"), "completion": re.compile("\n\n")}
"""What ends an answer besides end tokens. ``Q:`` at the end of a word, such as ``FAQ:``, does not match."""
_CUT = re.compile(r"\n\s*Q\s*$")
"""The start of the next question, ``Q``, at the end of a text whose token limit cut off the colon."""
_END = "\ue000"
"""A private-use character that no real text contains. Appended to a message, it shows where the message ends in the
rendered template."""
_SWITCHES = ("enable_thinking", "thinking")
"""Variables with which templates turn reasoning on and off. They are False unless `Prompt.template` sets them."""
_THINK = re.compile(r"[<\[]/?[\w:|]*think\w*\|?[>\]]", re.IGNORECASE)
"""Mark at the beginning or end of a model's reasoning: ``<think>``, ``</think>``, ``[THINK]``, ``<seed:think>``."""
_CLOCK = (
    "{% macro strftime_now(format) %}{% set text = namespace(now=format) %}"
    "{% for code, value in locaudit_clock.items() %}{% set text.now = text.now.replace(code, value) %}{% endfor %}"
    "{{ text.now }}{% endmacro %}\n"
)
"""Text put before a template. It replaces transformers' clock for templates. Jinja drops its line break."""


@dataclass(frozen=True)
class Prompt:
    """Turns a question into the text that comes before its answer."""

    style: Style = "qa"
    primer: str = ""
    """Instruction and example questions with answers, put before the question. Empty: none."""
    template: Mapping[str, Any] = field(default_factory=Frozen)
    """Values of variables of the chat template, such as ``{"enable_thinking": False}``."""
    date: str = ""
    """The date, like ``2026-01-31``, that a chat template is given; the time is midnight. Empty: today."""

    def render(self, question: str, tokenizer: Any) -> str:
        """The text of the prompt: everything before a generated answer.

        In ``chat``, reasoning is turned off if the template has a variable for this. Raises `DataError` if the template
        fails, or if the model would still reason before it answers.
        """
        return self.answered(question, (), tokenizer)[0]

    def answered(self, question: str, answers: Sequence[str], tokenizer: Any) -> tuple[str, list[str]]:
        """The prompt of a question (`render`), and the text that follows it for each answer.

        In ``qa`` and ``completion``, that text is a space and the answer. In ``chat``, the answer is rendered as the
        next message; the text is what the template writes after the prompt, up to the answer's last character. Raises
        `DataError` if the template writes anything but white space between prompt and answer, or changes the prompt.
        """
        if self.style in _PARTS:
            before, behind, *_ = _PARTS[self.style]
            primer = f"{self.primer}\n\n" if self.primer else ""
            return f"{primer}{before}{question}{behind}", [f" {answer}" for answer in answers]
        asked, prompt = self._ask(question, tokenizer)
        texts = [self._split(tokenizer, *asked, ("assistant", answer))[0] for answer in answers]
        for answer, text in zip(answers, texts, strict=True):
            if not text.startswith(prompt) or text.removeprefix(prompt).strip() != answer.strip():
                n = len(commonprefix([prompt, text]))
                raise DataError(
                    got=f"a chat template that ends a prompt with {prompt[-40:]!r}, but writes {text[n:][:60]!r} "
                    f"after {text[:n][-40:]!r} in a conversation with the answer {answer[:40]!r}",
                    expected="a prompt that the answer follows, with nothing but white space between them",
                    remedy=_ANOTHER_FORM,
                )
        return prompt, [text.removeprefix(prompt) for text in texts]

    def uses_clock(self, tokenizer: Any) -> bool:
        """Whether the date is part of the text. It is in ``chat`` if the template asks for it, else never."""
        return self.style == "chat" and "strftime_now" in tokenizer.get_chat_template()

    @property
    def adds_special_tokens(self) -> bool:
        """Whether the tokenizer must add special tokens (BOS). In ``chat`` the template has written them already."""
        return self.style != "chat"

    def probe(self, question: str, endings: Sequence[tuple[str, str | None]], tokenizer: Any) -> tuple[str, list[str]]:
        """The probing texts of a question: (the beginning that they share, the rest of each text).

        Activations are read at each text's last token. `endings` holds pairs of an answer and the question that follows
        it (None if no question follows). The primer is left out.
        """
        if self.style in _PARTS:
            before, _, behind, between = _PARTS[self.style]
            said = [f" {answer}" + ("" if then is None else between + then) for answer, then in endings]
            return f"{before}{question}{behind}", said
        bare = replace(self, primer="")
        prompt, said = bare.answered(question, [answer for answer, _ in endings], tokenizer)
        texts = [
            prompt + text
            if then is None
            else self._split(tokenizer, ("user", question), ("assistant", answer), ("user", then))[0]
            for text, (answer, then) in zip(said, endings, strict=True)
        ]
        # A template may render a past answer differently from the last one (it may leave out an empty reasoning block).
        shared = commonprefix([prompt, *texts])
        return shared, [text.removeprefix(shared) for text in texts]

    @property
    def marker(self) -> str:
        """Text that ends a generated answer, unless it is part of a word. Empty in ``chat``, where no text does."""
        return {"qa": "Q:", "completion": "\n\n"}.get(self.style, "")

    def has_ended(self, text: str) -> bool:
        """Whether the answer in a generated text has ended."""
        return self.style in _ENDS and _ENDS[self.style].search(text) is not None

    def answer(self, text: str) -> str:
        """The answer in a generated text: everything before the text that ends it, stripped."""
        said = _ENDS[self.style].split(text, maxsplit=1)[0] if self.style in _ENDS else text
        return (_CUT.sub("", said) if self.style == "qa" else said).strip()

    def end_tokens(self, tokenizer: Any) -> frozenset[int]:
        """Tokens that end an answer besides the model's own end tokens.

        In ``chat``: the special token that the template puts after an answer. In the other styles: none.
        """
        if self.style != "chat":
            return frozenset()
        behind = self._split(tokenizer, ("user", "Why?"), ("assistant", "So."))[1].lstrip()
        first, known = tokenizer(behind, add_special_tokens=False)["input_ids"][:1], tokenizer.added_tokens_decoder
        return frozenset(token for token in first if token in known and known[token].special)

    def _ask(self, question: str, tokenizer: Any) -> tuple[list[Message], str]:
        """The messages that ask a question, and their text up to where the answer begins."""
        asked, text = [("user", f"{self.primer}\n\n{question}" if self.primer else question)], ""
        if self.primer:
            with suppress(DataError):  # Some templates refuse system messages, or leave them out.
                apart = [("system", self.primer), ("user", question)]
                text = self._chat(tokenizer, *apart)
                asked = apart if self.primer.strip() in text else asked
        text = text if len(asked) == 2 else self._chat(tokenizer, *asked)
        self._check_thinking(tokenizer)
        return asked, text

    def _check_thinking(self, tokenizer: Any) -> None:
        """Raise `DataError` if, according to the template, the model would reason after the prompt.

        This is assumed if the template has marks of reasoning, such as ``<think>``. There are two exceptions: the
        prompt ends with a mark that closes the reasoning, or a variable turns it off. If the user has set such a
        variable, nothing is checked.
        """
        source, asked = tokenizer.get_chat_template(), ("user", "Why?")
        if any(name in self.template for name in _SWITCHES) or not (mark := _THINK.search(source)):
            return
        prompt, marks = self._chat(tokenizer, asked), _THINK.findall(self._split(tokenizer, asked)[1])
        on = replace(self, template=Frozen({**self.template, **dict.fromkeys(_SWITCHES, True)}))
        if marks[-1][1] == "/" if marks else on._chat(tokenizer, asked) != prompt:
            return
        raise DataError(
            got=f"a chat template with reasoning ({mark[0]}), whose prompt ends with {prompt[-40:]!r} for all "
            f"values of {' and '.join(_SWITCHES)}",
            expected="a prompt after which the model answers at once",
            remedy=_ANOTHER_FORM
            # Not offered if the prompt itself opens the reasoning: the model would then reason in any case.
            + ("" if marks else ". If the model does not reason, set prompt.template to {enable_thinking: false}"),
        )

    def _chat(self, tokenizer: Any, *messages: Message) -> str:
        """The chat template applied to messages.

        If the last message is the user's, the text ends where the model's answer begins.
        """
        if not getattr(tokenizer, "chat_template", None):
            raise DataError(
                got="prompt style 'chat' with a tokenizer that has no chat template",
                expected="the tokenizer of an instruct model",
                remedy="set prompt.style to qa, or choose an instruct model",
            )
        turns = [{"role": role, "content": words} for role, words in messages]
        variables = {**dict.fromkeys(_SWITCHES, False), **self.template}
        try:
            source = tokenizer.get_chat_template()
            unread = {*self.template}.difference(_SWITCHES, re.findall(r"\w+", source))
            if unread:
                raise DataError(
                    got=f"prompt.template with {', '.join(sorted(unread))}, which the chat template does not read",
                    expected="names of variables in the model's chat template",
                    remedy="correct the name, or leave it out of prompt.template",
                )
            if self.uses_clock(tokenizer):
                source = _CLOCK + source
                variables["locaudit_clock"] = _clock(self.date or date.today().isoformat())
            return tokenizer.apply_chat_template(
                turns,
                chat_template=source,
                add_generation_prompt=messages[-1][0] == "user",
                tokenize=False,
                **variables,
            )
        except DataError:
            raise
        except Exception as error:  # templates raise whatever they like
            raise DataError(
                got=f"a chat template that fails ({type(error).__name__}: {' '.join(str(error).split())})",
                expected=f"a template that renders {' and '.join(dict(messages))} messages",
                remedy="set prompt.style to qa, or choose another model",
            ) from error

    def _split(self, tokenizer: Any, *messages: Message) -> tuple[str, str]:
        """The text of `_chat` in two parts: up to the end of the last message's own words, and the rest."""
        *before, (role, words) = messages
        text, found, behind = self._chat(tokenizer, *before, (role, words + _END)).partition(_END)
        if not found:
            raise DataError(
                got=f"a chat template that leaves out the last message (role {role})",
                expected="a template that renders user and assistant messages",
                remedy="set prompt.style to qa, or choose another model",
            )
        return text, behind


_ANOTHER_FORM = (
    "if the template has a variable that changes this, such as one that turns reasoning off, set it in "
    "prompt.template; otherwise set prompt.style to qa, or choose another model"
)


@cache
def _clock(day: str) -> dict[str, str]:
    """What each code of ``strftime``, such as ``%d``, stands for at midnight of a day."""
    time = datetime.fromisoformat(day)
    codes = [f"%{flag}{letter}" for flag in ("-", "") for letter in string.ascii_letters]
    return {"%%": "\0", **{code: time.strftime(code) for code in codes}, "\0": "%"}


@cache
def truthful_primer() -> str:
    """The bundled primer: an instruction to answer truthfully and six example questions with answers.

    It was written for this project.
    """
    return resources.files("locaudit.behaviours").joinpath("primer.txt").read_text(encoding="utf-8").strip()


def load_primer(primer: str, own: str = "") -> str:
    """The text of a primer, given by name or as the path of a text file.

    ``auto`` gives `own`, the primer of the behaviour. ``none`` gives an empty text. ``truthful`` gives the bundled
    primer. Raises `DataError` if the file is missing, empty or not UTF-8.
    """
    if primer in ("auto", "none", "truthful"):
        return {"auto": own, "none": "", "truthful": truthful_primer()}[primer]
    path = Path(primer)
    if not path.is_file():
        raise DataError(
            got=f"primer {primer!r}, which is not a file",
            expected="'auto', 'none', 'truthful' or a text file",
            remedy="correct prompt.primer",
        )
    try:
        text = path.read_text(encoding="utf-8").strip()
    except UnicodeDecodeError:
        raise DataError(
            got=f"{path}, which is not UTF-8 text", expected="a text file", remedy="save it as UTF-8"
        ) from None
    if not text:
        raise DataError(
            got=f"the empty primer file {path}",
            expected="text",
            remedy="write the primer into it, or set prompt.primer to none",
        )
    return text
