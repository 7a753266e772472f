"""Rewards: how much a completion is worth.

A reward function has the signature ``(completions, answers, **context) -> list[float | None]``.
`context` holds `prompts`, `completion_lengths`, `max_completion_tokens` and `finish_reasons`; None
means "does not apply to this completion". `load_reward` finds one by name or as
``module:function``; `combine_rewards` runs and adds several. Floor 0: no jax.
"""

from __future__ import annotations

import difflib
import importlib
import math
import re
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import cast

from jaxgrpo.tasks.answers import STOP_MARK, extract_answer, gold_answer
from jaxgrpo.tasks.math_boxed import check_math_verify, math_boxed_reward
from jaxgrpo.tasks.time_limit import TimeLimitExceeded, time_limit

RewardFunction = Callable[..., Sequence[float | None]]


def gsm8k_answer_reward(
    completions: Sequence[str], answers: Sequence[str], **context: object
) -> list[float | None]:
    """1.0 where the completion's answer equals the gold answer as a rational number, else 0.0."""
    return [
        float(extract_answer(completion) == gold_answer(answer))
        for completion, answer in zip(completions, answers, strict=True)
    ]


_STRUCTURE_TAGS = ("<reasoning>", "</reasoning>", "<answer>", "</answer>")
_STRUCTURE = re.compile(r"<reasoning>(.*?)</reasoning>\s*<answer>(.*?)</answer>", re.DOTALL)


def format_reward(
    completions: Sequence[str], answers: Sequence[str], **context: object
) -> list[float | None]:
    """1.0 where all is ``<reasoning>...</reasoning><answer>...</answer>``, else 0.0.

    Each tag stands exactly once, neither part is blank, and only white space lies around and
    between them. This is the structured XML output of https://arxiv.org/abs/2605.07366, whose exact
    prompt and rule are not published.
    """

    def follows(completion: str) -> bool:
        stop = STOP_MARK.search(completion)
        text = (completion[: stop.start()] if stop else completion).strip()
        # Counting first also keeps the lazy pattern linear: it has one place each to end.
        if any(text.count(tag) != 1 for tag in _STRUCTURE_TAGS):
            return False
        match = _STRUCTURE.fullmatch(text)
        return match is not None and bool(match[1].strip() and match[2].strip())

    return [float(follows(completion)) for completion in completions]


def soft_overlong_penalty(length: int, max_length: int, cache: int) -> float:
    """DAPO's soft overlong punishment (https://arxiv.org/abs/2503.14476, equation 13), in [-1, 0].

    0 up to ``max_length - cache`` tokens, then linear down to -1 at `max_length`, and -1 beyond.
    """
    if cache <= 0:
        return 0.0 if length <= max_length else -1.0
    return max(-1.0, min(0.0, (max_length - cache - length) / cache))


# DAPO's own ratio: a margin of 4,096 tokens before a cap of 20,480.
LENGTH_CACHE_FRACTION = 0.2


def length_reward(
    completions: Sequence[str],
    answers: Sequence[str],
    *,
    completion_lengths: Sequence[int],
    max_completion_tokens: int,
    **context: object,
) -> list[float | None]:
    """The soft overlong penalty, its margin the last fifth of `max_completion_tokens`."""
    cache = round(LENGTH_CACHE_FRACTION * max_completion_tokens)
    return [
        soft_overlong_penalty(int(length), max_completion_tokens, cache)
        for length in completion_lengths
    ]


REWARDS: dict[str, RewardFunction] = {
    "gsm8k_answer": gsm8k_answer_reward,
    "math_boxed": math_boxed_reward,
    "format": format_reward,
    "length": length_reward,
}


def load_reward(spec: str) -> RewardFunction:
    """Finds a reward function by its name in `REWARDS` or as ``module:function`` of the user's own.

    Raises:
        ValueError: no such name, module or function, a package that it needs is missing, or it
            cannot be called; one line, for the user.
    """
    if spec == "math_boxed":
        check_math_verify()
    if ":" not in spec:
        if spec in REWARDS:
            return REWARDS[spec]
        nearest = difflib.get_close_matches(spec, REWARDS, n=1, cutoff=0.0)[0]
        raise ValueError(
            f"unknown reward {spec!r}; did you mean {nearest!r}? Valid: {', '.join(REWARDS)}, "
            "or module:function for your own"
        )
    module_name, _, function_name = spec.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        # Missing itself, or missing something that it imports: two different things to mend.
        if error.name and (module_name + ".").startswith(error.name + "."):
            raise ValueError(
                f"reward {spec!r}: there is no module {error.name!r} on the Python path"
            ) from error
        raise ValueError(f"reward {spec!r}: importing {module_name!r} failed: {error}") from error
    except Exception as error:  # user code may raise anything while it is imported
        raise ValueError(f"reward {spec!r}: importing {module_name!r} failed: {error!r}") from error
    function: object = getattr(module, function_name, None)
    if function is None:
        public = [name for name in dir(module) if not name.startswith("_")]
        near = difflib.get_close_matches(function_name, public, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"reward {spec!r}: module {module_name!r} has no {function_name!r}{hint}")
    if not callable(function):
        raise ValueError(
            f"reward {spec!r}: {function_name!r} is a {type(function).__name__}, not a function"
        )
    return cast(RewardFunction, function)


class _BadRewardError(ValueError):
    """A reward function came back with something that is no list of rewards."""


def _checked_rewards(name: str, result: object, completions: Sequence[str]) -> list[float | None]:
    """The result of one reward function as floats and Nones; an error names a bad one."""
    count = len(completions)
    try:
        values = list(result)  # pyright: ignore[reportArgumentType]
    except TypeError:
        raise _BadRewardError(
            f"reward {name!r} returned a {type(result).__name__}, not a list"
        ) from None
    if len(values) != count:
        raise _BadRewardError(
            f"reward {name!r} returned {len(values)} values for {count} completions"
        )
    checked: list[float | None] = []
    for index, value in enumerate(values):
        try:
            number = None if value is None else float(value)
        except (TypeError, ValueError, OverflowError):
            raise _BadRewardError(
                f"reward {name!r} returned {value!r:.80} for completion {index}, not a number: "
                f"{completions[index]!r:.300}"
            ) from None
        if number is not None and not math.isfinite(number):
            raise _BadRewardError(
                f"reward {name!r} returned {number} for completion {index}; "
                f"None is the way to say 'does not apply': {completions[index]!r:.300}"
            )
        checked.append(number)
    return checked


def _run_reward(
    name: str,
    function: RewardFunction,
    completions: Sequence[str],
    answers: Sequence[str],
    context: Mapping[str, object],
    timeout_s: float,
) -> list[float | None]:
    try:
        with time_limit(timeout_s):
            result = function(completions, answers, **context)
            return _checked_rewards(name, result, completions)
    except TimeLimitExceeded:
        trouble = f"did not finish {len(completions)} completions in {timeout_s:g} s"
    except _BadRewardError as error:
        raise ValueError(str(error)) from None
    except Exception as error:  # user code may raise anything
        frames = traceback.extract_tb(error.__traceback__)
        where = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "unknown"
        trouble = f"raised {error!r:.200} at {where}"
    culprit = _find_culprit(function, completions, answers, context, timeout_s)
    raise ValueError(
        f"reward {name!r} {trouble}; "
        + ("no completion does this alone" if culprit is None else culprit)
    )


def _find_culprit(
    function: RewardFunction,
    completions: Sequence[str],
    answers: Sequence[str],
    context: Mapping[str, object],
    timeout_s: float,
) -> str | None:
    """The first completion for which the function fails by itself, shown for a person."""
    count = len(completions)
    # One of a whole batch that takes a tenth of the batch's time is to blame for most of it.
    alone_s = max(timeout_s / 10, 0.5)
    ends = time.monotonic() + max(timeout_s, 10.0)
    for row in range(count):
        single = {
            key: value[row : row + 1] if isinstance(value, list) and len(value) == count else value
            for key, value in context.items()
        }
        try:
            with time_limit(alone_s):
                function(completions[row : row + 1], answers[row : row + 1], **single)
        except (Exception, TimeLimitExceeded):
            return f"completion {row} does: {completions[row]!r:.300}"
        if time.monotonic() > ends:
            return None
    return None


def combine_rewards(
    functions: Mapping[str, RewardFunction],
    weights: Sequence[float],
    completions: Sequence[str],
    answers: Sequence[str],
    *,
    timeout_s: float = 0.0,
    **context: object,
) -> tuple[list[float], dict[str, list[float | None]]]:
    """Runs every reward function and adds them up, weighted.

    As in TRL, a None is left out of the sum; a completion for which every function says None gets
    nan.

    Args:
        timeout_s: what one function may take for all completions together; 0 means no limit.

    Returns:
        The total per completion, and per function name its own unweighted values.

    Raises:
        ValueError: the counts differ, or a function raised, took too long, or returned something
        that is not a finite number or None; the completion it was about is named.
    """
    if len(weights) != len(functions):
        raise ValueError(f"{len(functions)} reward functions but {len(weights)} weights")
    if len(answers) != len(completions):
        raise ValueError(f"{len(completions)} completions but {len(answers)} answers")
    by_name = {
        name: _run_reward(name, function, completions, answers, context, timeout_s)
        for name, function in functions.items()
    }
    totals = []
    for row in range(len(completions)):
        terms = [
            weight * value
            for weight, values in zip(weights, by_name.values(), strict=True)
            if (value := values[row]) is not None
        ]
        totals.append(math.fsum(terms) if terms else math.nan)
    return totals, by_name
