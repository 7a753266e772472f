"""What a completion says its answer is, and lm-evaluation-harness' GSM8K rules beside ours.

Floor 0: text in, exact rationals out, no jax. `extract_answer` is our rule; the `lm_eval_*`
functions are that harness' own, for evaluation numbers that compare with published ones.
"""

from __future__ import annotations

import itertools
import re
from fractions import Fraction

from jaxgrpo.tasks.quantities import MAX_FRAGMENT, parse_bare_number, parse_number

# -------------------------------------------------------------------------------------------------
# A completion -> the fragment that states its answer

STOP_MARK = re.compile(r"<\|(?:im_end|im_start|endoftext|eot_id)\|>|</s>|<eos>")
_LABEL = re.compile(
    r"^[ \t*#>]{0,8}(Question|Q|Human|User)[ \t]?([0-9]{0,3})[*]{0,2}:", re.MULTILINE
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
_ANSWER_LINE = re.compile(r"^[ \t]*\**A\**:(.*)", re.MULTILINE)
_WORD = re.compile(r"[^\W\d_]{2,}")
_NUMBERED_HEADING = re.compile(r"\s*[0-9]+[.):]\s+\**[A-Za-z]")
# Only the last markers are looked at, so that a text of nothing but markers stays cheap.
_MAX_MARKERS = 50


def _cut(text: str) -> str:
    """Ends the text at the first stop token, or where the model asks itself a next question.

    A line labelled "Question:", "Q2:" or "User 2:" is a next question only after an answer was
    given, only if it asks something (a question mark or three words; "Q2: 200" does not), and only
    if it does not go on a numbering that the solution itself began with "Question 1:".
    """
    if stop := STOP_MARK.search(text):
        text = text[: stop.start()]
    labels = list(_LABEL.finditer(text))
    answered = _first_answer(text, labels[0].start()) if labels else None
    if answered is None:
        return text
    previous = None
    for label in labels:
        number = int(label[2] or 0)
        goes_on = number > 1 and previous == (label[1], number - 1)
        if label.start() >= answered and not goes_on and _asks(text, label.end()):
            return text[: label.start()]
        previous = label[1], number
    return text


def _asks(text: str, position: int) -> bool:
    line = _line_after(text, position)[0]
    return not line or "?" in line or len(_WORD.findall(line)) >= 3


def _first_answer(text: str, first_label: int) -> int | None:
    """Where the first statement of an answer begins, or None without one.

    Args:
        first_label: a text of nothing but a number is an answer as far as the first label.
    """
    found = []
    if parse_bare_number(text[:first_label]) is not None:
        found.append(0)
    for marker in itertools.islice(_EXPLICIT.finditer(text), _MAX_MARKERS):
        if _states_answer(text, marker):
            found.append(marker.start())
            break
    for marker in itertools.islice(_PROSE.finditer(text), _MAX_MARKERS):
        if parse_number(_line_after(text, marker.end())[0], any_prefix=True) is not None:
            found.append(marker.start())
            break
    for line in itertools.islice(_ANSWER_LINE.finditer(text), _MAX_MARKERS):
        if parse_number(line[1]) is not None:
            found.append(line.start())
            break
    return min(found, default=None)


def _states_answer(text: str, marker: re.Match[str]) -> bool:
    """Whether something stands at an explicit marker: a number after ####, anything in a box."""
    if marker[0].startswith("\\"):
        return bool((_braced(text, marker.end()) or "").strip())
    return _explicit_reading(text, marker) is not None


def _line_after(text: str, position: int) -> tuple[str, int]:
    """The first non-blank line from `position` and its end; a later line loses its bullet."""
    start = position
    while start < len(text) and text[start].isspace():
        start += 1
    end = text.find("\n", start)
    end = len(text) if end < 0 else end
    line = text[start : min(end, start + MAX_FRAGMENT)]
    return (re.sub(r"^[-*\u2022]\s+", "", line) if "\n" in text[position:start] else line), end


def _braced(text: str, position: int) -> str | None:
    """The text from just after an opening brace to its partner, or None without one nearby."""
    depth = 1
    for index in range(position, min(len(text), position + MAX_FRAGMENT)):
        depth += {"{": 1, "}": -1}.get(text[index], 0)
        if depth == 0:
            return text[position:index]
    return None


def _explicit_reading(text: str, marker: re.Match[str]) -> Fraction | None:
    """The number that an explicit marker states."""
    if marker[0].startswith("#"):
        line, end = _line_after(text, marker.end())
        # "#### 1. Add the eggs" is a heading unless nothing follows it.
        heading = _NUMBERED_HEADING.match(line) and text[end:].strip()
        return None if heading else parse_number(line)
    if marker[0].startswith("\\"):
        content = _braced(text, marker.end())
    else:
        close = _ANSWER_CLOSE.search(text, marker.end())
        content = text[marker.end() : close.start()] if close else None
    return None if content is None else parse_number(content, any_prefix=True)


def extract_answer(text: str) -> Fraction | None:
    r"""The number a completion gives as its final answer, or None when it gives none.

    The text is cut at the first stop token or next "Question:". The last of ``####``, ``\boxed{}``
    (braces matched) and ``<answer></answer>`` that holds a number wins; without one, the last
    "answer is" / "answer:"; then a final line "A: N"; then a text that is nothing but a number. An
    unmarked number inside prose is never taken: a reward for it would pay for rambling.
    """
    return _read_answer(_cut(text))


def _read_answer(text: str) -> Fraction | None:
    text = _CALCULATOR.sub("", text)
    for marker in reversed(list(_EXPLICIT.finditer(text))[-_MAX_MARKERS:]):
        if (value := _explicit_reading(text, marker)) is not None:
            return value
    for marker in reversed(list(_PROSE.finditer(text))[-_MAX_MARKERS:]):
        if (value := parse_number(_line_after(text, marker.end())[0], any_prefix=True)) is not None:
            return value
    last_line = text.rstrip().rpartition("\n")[2]
    if final := _ANSWER_LINE.fullmatch(last_line):
        return parse_number(final[1])
    return parse_bare_number(text)


def boxed_answer(text: str) -> str | None:
    r"""The text in a completion's last whole ``\boxed{}``, if it is not blank.

    The text is cut as for `extract_answer`. At most a few hundred characters, braces matched;
    ``\fbox{}`` and ``\boxed 5`` are not read.
    """
    return last_box(_cut(text))


def last_box(text: str) -> str | None:
    r"""As `boxed_answer`, for a text that is an answer from its beginning to its end."""
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
    value = parse_number(after) if marker else _read_answer(answer)
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
