"""Texts of users, models and files, made safe to show; what is stored stays as it is."""

from __future__ import annotations

import re

LONGEST = 2000
"""Characters of a question or an answer that are shown. One of a megabyte would fill a page of a hundred."""
_UNSHOWABLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff"
    "\U000e0000-\U000e007f]"
)
"""Control characters except tab and newline, since a terminal acts on them and HTML forbids them. Also characters that
turn the direction of text around or cannot be seen, and halves of characters, which UTF-8 cannot hold."""


def readable(text: str, longest: int | None = None) -> str:
    """The text with U+FFFD for each character that must not be shown, cut to `longest` characters if that is given.

    A cut text ends with the number of characters that it lacks.
    """
    text = _UNSHOWABLE.sub("\N{REPLACEMENT CHARACTER}", text.replace("\r\n", "\n"))
    if longest is None or len(text) <= longest:
        return text
    return f"{text[:longest]}… ({len(text) - longest:,} more characters)"
