"""One short text that states a quantity, as an exact rational: ``-$1,234.50`` or ``1/2 cup``.

Floor 0: no jax.
"""

from __future__ import annotations

import re
from fractions import Fraction

# Dashes that stand for a minus; the em dash does not, it separates.
_CHARACTERS = str.maketrans(
    dict.fromkeys("\u2010\u2011\u2012\u2013\u2212\ufe63\uff0d", "-")
    | dict.fromkeys("\u00a0\u2009\u202f\u2007\u200b\t", " ")
    | dict.fromkeys("\u00d7\u22c5\u00b7", "*")
    | {"\u2248": "="}
    | dict.fromkeys("\u20ac\u00a3\u00a5\uffe5\uff04", "$")
    | {"\u2014": ";", "\u00b0": " ", "\uff05": "%", "\uff0c": ","}
    | {chr(0xFF10 + digit): str(digit) for digit in range(10)}
    | {"\u00b2": "^2", "\u00b3": "^3"}
    | {"\u00bd": " 1/2", "\u00bc": " 1/4", "\u00be": " 3/4", "\u2153": " 1/3", "\u2154": " 2/3"}
)
# Letters that scale an amount of money; "$18m$" is mathematics and has metres.
_MONEY = r"(\$\s*-?[0-9][0-9,.]{0,30})\s?(?:%s)(?![A-Za-z0-9&'^$])"
# What may be squared or cubed as a unit; "3x^2" and "3ab^2" are not quantities.
_UNIT = (
    r"(?<![A-Za-z\\])((?:[ckd]?m|mm|ft|in|inch|inches|feet|foot|yd|mi|sec|unit|units|[A-Za-z]{4,})"
    r"\.?|/\s*[sm])"
)
_REWRITES = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"</?[A-Za-z_]+>", " "),
        # TeX's tie after something, "about" elsewhere.
        (r"(?<=[A-Za-z0-9.}])~", " "),
        (r"~", "="),
        (r"\{,\}|\\!", lambda match: "," if match[0] == "{,}" else ""),
        (r"\\[dtc]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}", r" \1/\2"),
        (r"\\[dtc]?frac\s*([0-9])\s*([0-9])", r" \1/\2"),
        (r"\\(?:times|cdot)(?![A-Za-z])", "*"),
        (r"\\approx(?![A-Za-z])", "="),
        (r"\\(?:text[a-z]*|math[a-z]+|mbox|f?boxed|left|right|d?quad|qquad)(?![A-Za-z])", " "),
        (r"\^\s*\{?\s*\\circ", " "),
        (r"\\([$%])", r"\1"),
        (r"\\[][(),;: ]", " "),
        (r"(?<=[0-9])\s*\*\*\s*(?=-?[0-9])", "^"),
        (r"\*\*|__|[`{}]", ""),
        (r"(?<=[0-9])\s*\^\s*(?:st|nd|rd|th)\b", " "),
        (_UNIT + r"\s*\^\s*-?[1-9](?![0-9.])", r"\1"),
        (r"(?<![A-Za-z])([ckd]?m|mm|ft)[23]\b", r"\1"),
        (_MONEY % "[mM][mM]?|mn|mln", r"\1 million"),
        (_MONEY % "[bB]n?", r"\1 billion"),
        (_MONEY % "[tT]n?", r"\1 trillion"),
        (r"(?<=[0-9])M\b(?!['&^])", " million"),
        (r"(?<=[0-9])B\b(?!['&^])", " billion"),
        (r"([-+])\s*\$", r"\1"),
        (r"\$", " "),
        (r"(?i)\bapprox\.", "approximately"),
    )
]

_INTEGER = r"(?:[0-9]{1,3}(?:,[0-9]{2,3})*,[0-9]{3}|[0-9]{1,3}(?: [0-9]{3})+(?![0-9])|[0-9]+)"
_DECIMAL = rf"(?:{_INTEGER}(?:\.[0-9]+)?|\.[0-9]+)"
# A comma that groups neither by thousands nor the Indian way ("1,23") might be a decimal comma:
# unreadable, no guess.
_NUMBER_END = r"(?![0-9]|,[0-9])"
_MIXED = re.compile(r"([-+]?)\s*([0-9]+)\s+(?:and\s+)?([0-9]+)\s*/\s*([0-9]+)" + _NUMBER_END)
_NUMBER = re.compile(
    rf"([-+]?)\s*({_DECIMAL})"
    r"(?:[eE]([-+]?[0-9]+)|\s*[*xX]\s*10\s*\^\s*([-+]?[0-9]+)"
    rf"|\s*/\s*({_DECIMAL}))?{_NUMBER_END}"
)
_NUMBER_START = re.compile(r"(?<![A-Za-z0-9.])(?:[-+]\s*)?\.?[0-9]")
_POWER = re.compile(r"\s*\^\s*(?:([-+]?[0-9]{1,3})|\(\s*([-+]?[0-9]{1,3})\s*\))(?!\.?[0-9])")
_SCALE = {"hundred": 2, "thousand": 3, "k": 3, "million": 6, "billion": 9, "trillion": 12}
_SCALE_WORD = re.compile(
    r"\s*(hundred|thousand|million|billion|trillion)s?\b|[kK]\b", re.IGNORECASE
)

_PLAIN_PREFIX = re.compile(
    r"(?:(?:the|final|answer|total|is|about|approximately|around|usd|us)\b|[\s:='\"(\[*])*",
    re.IGNORECASE,
)
_SPOILED_PREFIX = re.compile(
    r"\\|[.!?;](?:\s|$)|[-+*/^]\s*$|[<>\u2264\u2265\u2260]|\bnot\b|n't\b", re.IGNORECASE
)
_SENTENCE_END = re.compile(r"(?<=[0-9A-Za-z%)*'\"])\s*[.!?]+(?=[\s)'\"*]|$)|;(?!\s*[-+$]?\s*[0-9])")
_REASON = re.compile(r"\b(?:since|because|which|where|as|if|when|so|after)\b", re.IGNORECASE)
_ASIDE = re.compile(r"(?<=[0-9A-Za-z%])\s*\((?!\s*or\b)[^()]*\)", re.IGNORECASE)
_TAIL_DETAIL = re.compile(
    r"\b(?:per|for|in|of|at|from|with|on|by|each|every|during|than|left)\b|/\s*[A-Za-z]",
    re.IGNORECASE,
)
_SHARE_OF = re.compile(r"\s*(%|percent\b)?\s*of\s+[0-9]", re.IGNORECASE)
_OPEN_TAIL = re.compile(
    r"\s*(?:[+*^]|-(?![A-Za-z])|/(?!\s*[A-Za-z])|[xyzn]\b)|:[0-9]|[^\\<>]*[\\<>]"
)

# Longer fragments are prose, not answers; the bounds also keep the regexes cheap on hostile text.
MAX_FRAGMENT = 400
"""Characters."""
_MAX_PREFIX = 120
_MAX_DIGITS = 200
_MAX_EXPONENT = 100


def _plain_number(text: str) -> Fraction:
    return Fraction(text.replace(",", "").replace(" ", ""))


def _read_number(text: str) -> tuple[Fraction, str] | None:
    """Reads the number `text` starts with; returns it and the rest, or None."""
    mixed = _MIXED.match(text)
    if mixed and len(mixed[0]) <= _MAX_DIGITS and int(mixed[3]) < int(mixed[4]):
        value = int(mixed[2]) + Fraction(int(mixed[3]), int(mixed[4]))
        return (-value if mixed[1] == "-" else value), text[mixed.end() :]
    match = _NUMBER.match(text)
    if match is None or len(match[0]) > _MAX_DIGITS:
        return None
    sign, digits, exponent, power_of_ten, denominator = match.groups()
    value = _plain_number(digits)
    power = int(exponent or power_of_ten or 0)
    if abs(power) > _MAX_EXPONENT:
        return None
    value *= Fraction(10) ** power
    if denominator:
        if not _plain_number(denominator):
            return None
        value /= _plain_number(denominator)
    rest = text[match.end() :]
    if raised := _POWER.match(rest):
        power = int(raised[1] or raised[2])
        size = len(digits) * abs(power)
        if (
            exponent
            or power_of_ten
            or denominator
            or size > _MAX_DIGITS
            or (power < 0 and not value)
        ):
            return None
        value, rest = value**power, rest[raised.end() :]
    if scale := _SCALE_WORD.match(rest):
        value *= 10 ** _SCALE[(scale[1] or "k").lower()]
        rest = rest[scale.end() :]
    return (-value if sign == "-" else value), rest


def parse_number(fragment: str, any_prefix: bool = False) -> Fraction | None:
    r"""Reads a fragment that states one quantity, like ``**-$1,234.50**.`` or ``\frac{1}{2} cup``.

    Units, currency and markup are dropped; ``a = b`` reads as b; a percent sign is a unit, so "50%"
    is 50 as in GSM8K's own answers. A power of integers is worked out, a scale word or letter
    ("$5M") multiplies, an ordinal is its number. Two quantities ("18 or 7", "5 feet 6 inches"), an
    unfinished sum ("10+x", "20% of 30") and an ambiguous comma ("1,23") are not an answer.

    Args:
        fragment: the text after an answer marker.
        any_prefix: allow any words before the number ("she makes $18"), not only fillers.
    """
    text = fragment.strip()
    if len(text) > MAX_FRAGMENT:
        return None
    text = text.translate(_CHARACTERS)
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    text = text.strip(" *_'\"")
    start = _NUMBER_START.search(text)
    if start is None:
        return None
    for stop in (_SENTENCE_END, _REASON):
        if end := stop.search(text, start.end()):
            text = text[: end.start()]
    text = _ASIDE.sub("", text).rsplit("=", 1)[-1].lstrip()
    start = _NUMBER_START.search(text)
    if start is None:
        return None
    prefix = text[: start.start()]
    if (
        len(prefix) > _MAX_PREFIX
        or _SPOILED_PREFIX.search(prefix)
        or not (any_prefix or _PLAIN_PREFIX.fullmatch(prefix))
    ):
        return None
    reading = _read_number(text[start.start() :])
    if reading is None:
        return None
    value, tail = reading
    share = _SHARE_OF.match(tail)
    if _OPEN_TAIL.match(tail) or (share and (share[1] or value.denominator > 1)):
        return None
    return None if re.search(r"[0-9]", _TAIL_DETAIL.split(tail, maxsplit=1)[0]) else value


_SENTENCE_BREAK = re.compile(r"[.!?;:]\s+\S")
_NOT_A_UNIT = re.compile(
    r"\b(?:is|are|was|were|be|has|have|had|so|then|and|or|of|makes?|gives?|equals?)\b",
    re.IGNORECASE,
)
_WORD = re.compile(r"[A-Za-z]{2,}")
_MAX_BARE_WORDS = 4


def parse_bare_number(text: str) -> Fraction | None:
    """Reads a text that is nothing but one quantity: "18 duck eggs", "9 * 2 = 18", "**$18**.".

    Prose is None even where it holds but one number: who pays for that pays for rambling.
    """
    text = text.strip()
    if "\n" in text or len(text) > MAX_FRAGMENT or text.count("=") > 1:
        return None
    if _SENTENCE_BREAK.search(text) or _NOT_A_UNIT.search(text):
        return None
    return parse_number(text) if len(_WORD.findall(text)) <= _MAX_BARE_WORDS else None
