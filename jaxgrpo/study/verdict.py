"""A study's question and its answer, in sentences."""

from __future__ import annotations

from jaxgrpo.study.config import StudyConfig


def question(config: StudyConfig) -> str:
    plans = [p for p in config.study.arms.plans if p != "uniform"]
    return (
        f"At one budget of {config.lora.rank} ranks per adapter on average: does giving layers "
        f"different ranks ({', '.join(plans)}) beat the same rank everywhere, and does a layer's "
        "rank draw gradient to it?"
    )


def verdict(arms: list[dict], detectable: float | None) -> list[str]:
    compared = [arm for arm in arms if arm["versus"] is not None]
    if not compared:
        return ["No arm is finished together with its uniform reference yet."]
    sure = [arm for arm in compared if arm["versus"]["p_holm"] < 0.05]
    better = [arm for arm in sure if arm["versus"]["difference"] > 0]
    worse = [arm for arm in sure if arm["versus"]["difference"] < 0]
    if better:
        head = f"Yes, here it helps. Against uniform ranks: {_differences(better)}."
    elif worse:
        head = "No: no plan beats uniform ranks."
    else:
        head = "No difference found: no plan is reliably better or worse than uniform ranks."
    sentences = [head]
    if worse:
        sentences.append(f"Worse: {_differences(worse)}.")
    rest = [arm for arm in compared if arm not in sure]
    if rest:
        sentences.append(f"Not told apart from uniform: {_brief(rest)}.")
    if detectable is not None:
        sentences.append(
            f"A true difference below about {100 * detectable:.1f} points would go unseen at this "
            "size."
        )
    return sentences


def _brief(arms: list[dict]) -> str:
    """Each arm's difference, or of many only the range: the table has the rest."""
    if len(arms) <= 4:
        return _differences(arms)
    ordered = sorted(arms, key=lambda arm: arm["versus"]["difference"])
    return f"{len(arms)} plans, from {_differences(ordered[:1])} to {_differences(ordered[-1:])}"


def _differences(arms: list[dict]) -> str:
    return "; ".join(
        f"{arm['name']} is {100 * v['difference']:+.1f} points "
        f"({100 * v['low']:+.1f} to {100 * v['high']:+.1f}, p = {v['p_holm']:.2g})"
        for arm in arms
        if (v := arm["versus"])
    )
