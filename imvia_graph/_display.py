"""Labels and values as readable text; a graph's labels may hold any characters."""

from __future__ import annotations

import reprlib
import unicodedata
from collections.abc import Sequence
from typing import Any

from rapidfuzz import fuzz, process

#: Maximum letters of a shown label.
LONGEST = 120


def shown(label: str, longest: int = LONGEST) -> str:
    r"""Return a label as one line of printable text of at most ``longest`` letters.

    Control characters become their pictures (``\x00`` is ``␀``), other unprintable characters, such
    as those that change the direction of writing, become ``�``, runs of white space become one
    space, and ``…`` replaces the end of longer labels.

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
    # Make a label of white space visible.
    return "".join(map(_letter, " ".join(label.split()))) or ("␠" if label else "")


def printable(text: str) -> str:
    r"""Return a text with all characters printable except line ends and tabs.

    >>> from imvia_graph._display import printable
    >>> printable("\x1b[2Jgone\x9b1m")
    '␛[2Jgone�1m'
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(letter if letter in "\n\t" else _letter(letter) for letter in text)


def _letter(letter: str) -> str:
    if letter.isprintable() or letter == "\u200d":  # joins the parts of an emoji
        return letter
    if ord(letter) < 0x20:
        return chr(0x2400 + ord(letter))
    if letter == "\x7f":
        return "␡"
    return " " if unicodedata.category(letter) == "Zs" else "\ufffd"


#: Number of names up to which case and accents are ignored, which takes a second per million.
_MAX_FOLDED = 300_000
#: Minimum similarity, of 100, of a suggested name.
_MIN_SIMILARITY = 60


def nearest(name: str, known: Sequence[str], limit: int = 5) -> list[str]:
    """Return known names that are similar to a name, the most similar first.

    >>> from imvia_graph._display import nearest
    >>> nearest("FRANCE", ["Ewe", "Franc", "France", "Peru"])
    ['France', 'Franc']
    """
    processor = folded if len(known) <= _MAX_FOLDED else None
    found = process.extract(
        name,
        known,
        scorer=fuzz.WRatio,
        processor=processor,
        limit=2 * limit + 2,
        score_cutoff=_MIN_SIMILARITY,
    )
    return list(dict.fromkeys(match for match, *_ in found))[:limit]


def folded(name: str) -> str:
    """Return a name without case and accents, for comparison.

    >>> from imvia_graph._display import folded
    >>> folded("São Tomé")
    'sao tome'
    """
    if name.isascii():
        return name.casefold()
    letters = unicodedata.normalize("NFKD", name.casefold())
    return "".join(letter for letter in letters if not unicodedata.combining(letter))


def shorten(text: str, length: int = 80) -> str:
    """Return the text, cut to a length that fits a message."""
    return text if len(text) <= length else text[: length - 1] + "…"


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message; the name of its class if it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def bounded(value: Any) -> str:
    """Return the repr of a value of any size and depth, cut to a length that fits a message."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = short.maxlong = 80
    return shorten(short.repr(value))
