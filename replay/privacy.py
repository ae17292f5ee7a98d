"""Who somebody is does not belong into weights: addresses and numbers give way to typed placeholders, `<EMAIL_1>`.

Pure, by patterns and check digits: no language model. The same value gets the same placeholder throughout one example, so
that a reply may still refer to what was asked. Names of people are not found: that needs a model of the language. The
door to `phonenumbers` and `stdnum`.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Collection, Iterator, Sequence

import phonenumbers
from stdnum import iban, luhn
from stdnum.us import ssn

from replay.hygiene import rewritten
from replay.records import Message

Finder = Callable[[str], Iterator[tuple[int, int]]]

_DIGITS_OF_A_PHONE = 7
"""A text with fewer digits has no telephone number: most need no look at it."""


def redact(
    messages: Sequence[Message], reply: str, *, region: str = "US", keep: Collection[str] = ()
) -> tuple[tuple[Message, ...], str]:
    """The messages and the reply with placeholders for what identifies somebody.

    `region` is the country (ISO 3166) whose telephone numbers may be written without `+`; `keep` are values that stay,
    such as the house's own number: compared without blanks, dashes and case.
    """
    known: dict[tuple[str, str], str] = {}
    kept = frozenset(map(_bare, keep))

    def change(text: str) -> str:
        for kind, find in _finders(region):
            text = _replaced(text, kind, find, known, kept)
        return text

    return rewritten(messages, change), change(reply)


def _finders(region: str) -> tuple[tuple[str, Finder], ...]:
    """What is looked for, the surest first: what one has replaced the next cannot take for its own."""
    return (
        ("EMAIL", _pattern(r"[\w.+-]+@[\w-]+(?:\.[\w-]+)*\.[A-Za-z]{2,24}\b", lambda _: True)),
        ("IBAN", _pattern(r"\b[A-Z]{2}\d{2}(?: ?[A-Z0-9]{2,4}){3,8}\b", iban.is_valid)),
        ("CARD", _pattern(r"(?<![\d.-])\d(?:[ -]?\d){12,18}(?![\d.-])", lambda text: luhn.is_valid(_bare(text)))),
        ("SSN", _pattern(r"(?<![\d-])\d{3}-\d{2}-\d{4}(?![\d-])", ssn.is_valid)),
        ("IP", _pattern(r"(?<![\w.:])(?:\d{1,3}(?:\.\d{1,3}){3}|[0-9A-Fa-f:]*::?[0-9A-Fa-f:]+)(?![\w.:])", _is_address)),
        ("PHONE", lambda text: _phones(text, region)),
    )


def _replaced(text: str, kind: str, find: Finder, known: dict[tuple[str, str], str], kept: Collection[str]) -> str:
    parts, end = [], 0
    for start, stop in find(text):
        bare = _bare(text[start:stop])
        if bare in kept:
            continue
        of_kind = sum(name == kind for name, _ in known)
        parts += [text[end:start], known.setdefault((kind, bare), f"<{kind}_{of_kind + 1}>")]
        end = stop
    return "".join([*parts, text[end:]])


def _pattern(pattern: str, is_valid: Callable[[str], bool]) -> Finder:
    compiled = re.compile(pattern)
    return lambda text: (found.span() for found in compiled.finditer(text) if is_valid(found[0]))


def _phones(text: str, region: str) -> Iterator[tuple[int, int]]:
    if sum(character.isdigit() for character in text) >= _DIGITS_OF_A_PHONE:
        for found in phonenumbers.PhoneNumberMatcher(text, region):
            yield found.start, found.end


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return "." in text or text.count(":") > 1


def _bare(text: str) -> str:
    return re.sub(r"[\s()-]", "", text).casefold()
