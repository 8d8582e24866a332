"""Make texts of users, models and files safe to show (stored texts are not changed), and write numbers of things."""

from __future__ import annotations

import re

LONGEST = 2000
"""At most this many characters of a question or an answer are shown, because a very long one would fill the page."""
_UNSHOWABLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff"
    "\U000e0000-\U000e007f]"
)
"""Control characters except tab and newline, because terminals act on them and HTML forbids them. Also characters that
reverse the direction of text or are invisible, and halves of surrogate pairs, which UTF-8 cannot encode."""


def plural(n: int, noun: str) -> str:
    """A number with its noun: ``1 control``, ``1,200 controls``."""
    return f"{n:,} {noun}{'' if n == 1 else 's'}"


def readable(text: str, longest: int | None = None) -> str:
    """The text with U+FFFD for each character that must not be shown, cut to `longest` characters if that is given.

    A cut text ends with the number of characters that were cut off.
    """
    text = _UNSHOWABLE.sub("\N{REPLACEMENT CHARACTER}", text.replace("\r\n", "\n"))
    if longest is None or len(text) <= longest:
        return text
    return f"{text[:longest]}… ({len(text) - longest:,} more characters)"
