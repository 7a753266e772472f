"""A process that compares one pair of mathematical answers after another, for `math_boxed.py`.

Run as a script, with the processor seconds that one comparison may take: a line of JSON
``[gold, answer]`` in, a line ``true`` or ``false`` out. It may hang, crash or eat memory; it is
killed then, and nothing else is harmed. It imports nothing of this package.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import resource
import signal
import sys

MAX_MEMORY_BYTES = 4 * 2**30


def equal(gold: str, answer: str) -> bool:
    """Whether two LaTeX answers are the same mathematical object; what cannot be read is not."""
    # Imported here, so that this module itself can be looked at without the package.
    from math_verify import LatexExtractionConfig, parse, verify

    def read(text: str) -> list:
        return parse(
            rf"\boxed{{{text}}}",
            extraction_config=[LatexExtractionConfig(boxed_match_priority=0)],
            fallback_mode="no_fallback",
            extraction_mode="first_match",
            # This process has an alarm of its own, which interrupts C code too.
            parsing_timeout=None,  # pyright: ignore[reportArgumentType]
        )

    expected, given = read(gold), read(answer)
    return bool(expected and given and verify(expected, given, timeout_seconds=None))


def main() -> None:
    limit_s = float(sys.argv[1])
    # What libraries print must not mix with the answers.
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    logging.disable(logging.CRITICAL)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    equal("1", "1")  # what is imported late is imported now, outside anybody's time
    print("ready", file=out)
    for line in sys.stdin:
        gold, answer = json.loads(line)
        # Of processor time, so that a busy machine makes no answer wrong. Left at its default the
        # alarm kills, also when whoever asked is gone.
        signal.setitimer(signal.ITIMER_PROF, limit_s)
        try:
            same = equal(gold, answer)
        except Exception:  # it is a stranger's text in a stranger's parser: anything is raised
            same = False
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps(same), file=out)


if __name__ == "__main__":
    main()
