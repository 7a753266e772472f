"""What a completion says its answer is, and lm-evaluation-harness' GSM8K rules beside ours.

Floor 0: text in, exact rationals out, no jax. `extract_answer` is our rule; the `lm_eval_*`
functions are that harness' own, for evaluation numbers that compare with published ones.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from fractions import Fraction

# -------------------------------------------------------------------------------------------------
# One short fragment -> an exact rational

# Dashes that stand for a minus; the em dash does not, it separates.
_CHARACTERS = str.maketrans(
    dict.fromkeys("\u2010\u2011\u2012\u2013\u2212\ufe63\uff0d", "-")
    | dict.fromkeys("\u00a0\u2009\u202f\u2007\u200b\t", " ")
    | dict.fromkeys("\u00d7\u22c5\u00b7", "*")
    | dict.fromkeys("\u2248~", "=")
    | dict.fromkeys("\u20ac\u00a3\u00a5\uffe5\uff04", "$")
    | {"\u2014": ";", "\u00b0": " ", "\uff05": "%", "\uff0c": ","}
    | {chr(0xFF10 + digit): str(digit) for digit in range(10)}
    | {"\u00bd": " 1/2", "\u00bc": " 1/4", "\u00be": " 3/4", "\u2153": " 1/3", "\u2154": " 2/3"}
)
_REWRITES = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"</?[A-Za-z_]+>", " "),
        (r"\{,\}|\\!", lambda match: "," if match[0] == "{,}" else ""),
        (r"\\[dtc]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}", r" \1/\2"),
        (r"\\[dtc]?frac\s*([0-9])\s*([0-9])", r" \1/\2"),
        (r"\\(?:times|cdot)(?![A-Za-z])", "*"),
        (r"\\approx(?![A-Za-z])", "="),
        (r"\\(?:text[a-z]*|math[a-z]+|mbox|f?boxed|left|right|d?quad|qquad)(?![A-Za-z])", " "),
        (r"\^\s*\{?\s*\\circ", " "),
        (r"\\([$%])", r"\1"),
        (r"\\[][(),;: ]", " "),
        (r"\*\*|__|[`{}]", ""),
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
_OPEN_TAIL = re.compile(
    r"\s*(?:[+*^]|-(?![A-Za-z])|/(?!\s*[A-Za-z])|[xyzn]\b)|:[0-9]|[^\\<>]*[\\<>]"
)

# Longer fragments are prose, not answers; the bounds also keep the regexes cheap on hostile text.
_MAX_FRAGMENT = 400
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
    if scale := _SCALE_WORD.match(rest):
        value *= 10 ** _SCALE[(scale[1] or "k").lower()]
        rest = rest[scale.end() :]
    return (-value if sign == "-" else value), rest


def parse_number(fragment: str, any_prefix: bool = False) -> Fraction | None:
    r"""Reads a fragment that states one quantity, like ``**-$1,234.50**.`` or ``\frac{1}{2} cup``.

    Units, currency and markup are dropped; ``a = b`` reads as b; a percent sign is a unit, so "50%"
    is 50 as in GSM8K's own answers. Two quantities ("18 or 7", "5 feet 6 inches"), an unfinished
    sum ("10+x") and an ambiguous comma ("1,23") are not an answer.

    Args:
        fragment: the text after an answer marker.
        any_prefix: allow any words before the number ("she makes $18"), not only fillers.
    """
    text = fragment.strip()
    if len(text) > _MAX_FRAGMENT:
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
    if _OPEN_TAIL.match(tail):
        return None
    return None if re.search(r"[0-9]", _TAIL_DETAIL.split(tail, maxsplit=1)[0]) else value


# -------------------------------------------------------------------------------------------------
# A completion -> the fragment that states its answer

STOP_MARK = re.compile(r"<\|(?:im_end|im_start|endoftext|eot_id)\|>|</s>|<eos>")
_NEXT_QUESTION = re.compile(
    r"^[ \t*#>]{0,8}(?:Question|Q|Human|User)[ \t]?[0-9]{0,3}[*]{0,2}:", re.MULTILINE
)
_CALCULATOR = re.compile(r"<<[^<>\n]*>>")
_EXPLICIT = re.compile(
    r"#{4,}(?:[ *]{0,3}(?:final )?answer[*:]{0,3})?|\\f?boxed\s{0,4}\{|<answer>", re.IGNORECASE
)
_BOXED = re.compile(r"\\boxed\s{0,4}\{")
_ANSWER_CLOSE = re.compile("</answer>", re.IGNORECASE)
_PROSE = re.compile(
    r"\banswer\b[^\n.!?:=]{0,60}?(?:\b(?:is|was|be|are|equals)\b|[:=])[:*]{0,4}", re.IGNORECASE
)
_LAST_LINE_ANSWER = re.compile(r"\s*\**A\**:(.*)")
_NUMBERED_HEADING = re.compile(r"\s*[0-9]+[.):]\s+\**[A-Za-z]")
# Only the last markers are looked at, so that a text of nothing but markers stays cheap.
_MAX_MARKERS = 50


def _cut(text: str) -> str:
    """Ends the text at the first stop token, or where the model asks itself a next question."""
    if stop := STOP_MARK.search(text):
        text = text[: stop.start()]
    for question in _NEXT_QUESTION.finditer(text):
        # A restated question at the very start is not a next one.
        if text[: question.start()].strip():
            return text[: question.start()]
    return text


def _line_after(text: str, position: int) -> tuple[str, int]:
    """The first non-blank line from `position` and its end; a later line loses its bullet."""
    start = position
    while start < len(text) and text[start].isspace():
        start += 1
    end = text.find("\n", start)
    end = len(text) if end < 0 else end
    line = text[start : min(end, start + _MAX_FRAGMENT)]
    return (re.sub(r"^[-*\u2022]\s+", "", line) if "\n" in text[position:start] else line), end


def _braced(text: str, position: int) -> str | None:
    """The text from just after an opening brace to its partner, or None without one nearby."""
    depth = 1
    for index in range(position, min(len(text), position + _MAX_FRAGMENT)):
        depth += {"{": 1, "}": -1}.get(text[index], 0)
        if depth == 0:
            return text[position:index]
    return None


def _explicit_readings(text: str) -> Iterator[Fraction | None]:
    """What each explicit marker states, the last marker first."""
    for marker in reversed(list(_EXPLICIT.finditer(text))[-_MAX_MARKERS:]):
        if marker[0].startswith("#"):
            line, end = _line_after(text, marker.end())
            # "#### 1. Add the eggs" is a heading unless nothing follows it.
            heading = _NUMBERED_HEADING.match(line) and text[end:].strip()
            yield None if heading else parse_number(line)
        elif marker[0].startswith("\\"):
            content = _braced(text, marker.end())
            yield None if content is None else parse_number(content, any_prefix=True)
        else:
            close = _ANSWER_CLOSE.search(text, marker.end())
            content = text[marker.end() : close.start()] if close else None
            yield None if content is None else parse_number(content, any_prefix=True)


def extract_answer(text: str) -> Fraction | None:
    r"""The number a completion gives as its final answer, or None when it gives none.

    The text is cut at the first stop token or next "Question:". The last of ``####``, ``\boxed{}``
    (braces matched) and ``<answer></answer>`` that holds a number wins; without one, the last
    "answer is" / "answer:"; then a final line "A: N"; then a text that is nothing but a number. An
    unmarked number inside prose is never taken: a reward for it would pay for rambling.
    """
    text = _CALCULATOR.sub("", _cut(text))
    for value in _explicit_readings(text):
        if value is not None:
            return value
    for marker in reversed(list(_PROSE.finditer(text))[-_MAX_MARKERS:]):
        if (value := parse_number(_line_after(text, marker.end())[0], any_prefix=True)) is not None:
            return value
    last_line = text.rstrip().rpartition("\n")[2]
    if final := _LAST_LINE_ANSWER.fullmatch(last_line):
        return parse_number(final[1])
    return parse_number(text) if "\n" not in text.strip() else None


def boxed_answer(text: str) -> str | None:
    r"""The text in the last whole ``\boxed{}`` before the first stop token, if it is not blank.

    At most a few hundred characters, braces matched; ``\fbox{}`` and ``\boxed 5`` are not read.
    """
    text = _cut(text)
    for marker in reversed(list(_BOXED.finditer(text))[-_MAX_MARKERS:]):
        content = _braced(text, marker.end())
        if content is not None and content.strip():
            return content.strip()
    return None


def gold_answer(answer: str) -> Fraction:
    """The number of a gold answer: after its last ``####``, on a final "A: N" line, or all of it.

    Raises:
        ValueError: there is no such number, so nothing could ever be right.
    """
    _, marker, after = answer.rpartition("####")
    value = parse_number(after) if marker else extract_answer(answer)
    if value is None:
        raise ValueError(f"gold answer holds no number to compare with: {answer[-80:]!r}")
    return value


# -------------------------------------------------------------------------------------------------
# lm-evaluation-harness, task gsm8k version 3 (lm_eval/tasks/gsm8k/gsm8k.yaml): its exact rules,
# quirks included

_LM_EVAL_STRICT = re.compile(r"#### (\-?[0-9\.\,]+)")
_LM_EVAL_FLEXIBLE = re.compile(r"(-?[$0-9.,]{2,})|(-?[0-9]+)")
_LM_EVAL_UNTIL = ("Question:", "</s>", "<|im_end|>")
LM_EVAL_INVALID = "[invalid]"


def _lm_eval_cut(completion: str) -> str:
    for stop in _LM_EVAL_UNTIL:
        completion = completion.split(stop, 1)[0]
    return completion


def lm_eval_strict(completion: str) -> str:
    """The string lm-eval's "strict-match" filter extracts: the first ``#### N``."""
    match = _LM_EVAL_STRICT.search(_lm_eval_cut(completion))
    return match[1] if match else LM_EVAL_INVALID


def lm_eval_flexible(completion: str) -> str:
    """The string lm-eval's "flexible-extract" filter extracts: the last run of digits and $.,"""
    matches = [match[0] for match in _LM_EVAL_FLEXIBLE.finditer(_lm_eval_cut(completion))]
    return matches[-1] if matches else LM_EVAL_INVALID


def _lm_eval_normal(text: str) -> str:
    text = text.replace(",", "").replace("$", "").rpartition("#### ")[2]
    return re.sub(r"\.$", "", text).lower()


def match_lm_eval_strict(completion: str, gold: str) -> bool:
    """lm-eval's exact_match,strict-match against a GSM8K answer text or bare number."""
    return _lm_eval_normal(lm_eval_strict(completion)) == _lm_eval_normal(gold)


def match_lm_eval_flexible(completion: str, gold: str) -> bool:
    """lm-eval's exact_match,flexible-extract against a GSM8K answer text or bare number."""
    return _lm_eval_normal(lm_eval_flexible(completion)) == _lm_eval_normal(gold)
