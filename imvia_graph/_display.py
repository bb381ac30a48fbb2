"""Labels and values for people to read: what a graph calls its entities may be anything at all."""

from __future__ import annotations

import reprlib
import unicodedata
from collections.abc import Sequence
from typing import Any

from rapidfuzz import fuzz, process

#: Letters of a label that are shown.
LONGEST = 120


def shown(label: str, longest: int = LONGEST) -> str:
    r"""A label as one line of printable text of bounded length.

    Control characters become their pictures (``\x00`` is ``␀``), what turns the direction of
    writing, joins lines or is no letter at all becomes ``�``, white space one space, and what is
    beyond ``longest`` letters ``…``.

    Examples
    --------
    >>> from imvia_graph._display import shown
    >>> shown("a\x00b\tc"), shown("x" * 10_000, longest=4)
    ('a␀b c', 'xxx…')
    """
    if len(label) > longest:
        label = label[: longest - 1] + "…"
    if label.isascii() and label.isprintable() and not label.isspace():
        return label
    # A label of nothing but white space would not be seen.
    return "".join(map(_letter, " ".join(label.split()))) or ("␠" if label else "")


def printable(text: str) -> str:
    r"""A text of any length that a terminal shows and does not obey; line ends and tabs stay.

    >>> from imvia_graph._display import printable
    >>> printable("\x1b[2Jgone\x9b1m")
    '␛[2Jgone�1m'
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(letter if letter in "\n\t" else _letter(letter) for letter in text)


def _letter(letter: str) -> str:
    if letter.isprintable() or letter == "\u200d":  # that joins the parts of an emoji
        return letter
    if ord(letter) < 0x20:
        return chr(0x2400 + ord(letter))
    if letter == "\x7f":
        return "␡"
    return " " if unicodedata.category(letter) == "Zs" else "\ufffd"


#: Names up to which they are compared without case and accents, which takes a second a million.
_FOLDED = 300_000
#: Likeness, of 100, from which a name is worth showing.
_ALIKE = 60


def nearest(name: str, known: Sequence[str], limit: int = 5) -> list[str]:
    """Names that are written like one, the most alike first; none where none is.

    >>> from imvia_graph._display import nearest
    >>> nearest("FRANCE", ["Ewe", "Franc", "France", "Peru"])
    ['France', 'Franc']
    """
    processor = folded if len(known) <= _FOLDED else None
    found = process.extract(
        name,
        known,
        scorer=fuzz.WRatio,
        processor=processor,
        limit=2 * limit + 2,
        score_cutoff=_ALIKE,
    )
    return list(dict.fromkeys(match for match, *_ in found))[:limit]


def folded(name: str) -> str:
    """A name without case and accents, for looking it up.

    >>> from imvia_graph._display import folded
    >>> folded("São Tomé")
    'sao tome'
    """
    if name.isascii():
        return name.casefold()
    letters = unicodedata.normalize("NFKD", name.casefold())
    return "".join(letter for letter in letters if not unicodedata.combining(letter))


def shorten(text: str, length: int = 80) -> str:
    """Text cut to a length that fits a message."""
    return text if len(text) <= length else text[: length - 1] + "…"


def bounded(value: Any, length: int = 80) -> str:
    """What a value is, in a message: of any size and depth."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = short.maxlong = length
    return shorten(short.repr(value), length)
