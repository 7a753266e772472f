"""What results.json holds, as types. All differences and accuracies are fractions: 0.01 is a point.

`collect_results` makes it, the report reads it; a key that either spells wrong is a type error.
"""

from __future__ import annotations

from typing import Literal, TypedDict

from jaxgrpo.study.gradient_types import Amplification, Landscape, Profile, Range, Spread

RESULTS_FORMAT = 4

Verdict = Literal["better", "worse", "equivalent", "open"]
"""open: neither told apart from 0 nor shown to lie within the margin."""
Family = Literal["primary", "second"]
"""primary: the one contrast tested at the full 5 %; second: the others, under Holm."""
Decoding = Literal["greedy", "sampled"]
Answer = Literal["reward", "strict", "flexible"]
"""Which rule says right: eval.reward's own, or lm-eval's strict or flexible one."""


class FixedModels(TypedDict):
    """A difference over other items, were these trained models all there are ("these models").

    p is the exact sign flip over items. Neither says anything about another run of the same arm.
    """

    p: float
    low: float
    high: float


class Contrast(TypedDict):
    """A difference between arms, with the run as its unit.

    low and high are at `confidence`, which is 0.95 for the primary contrast and larger for the
    second family, so that they exclude 0 exactly where p_holm is at most 0.05. They, p and df are
    null with one seed, where nothing is known of another run. `per_seed` pairs runs of one seed.
    """

    name: str
    arm: str
    """The reference, as in ArmResult.name; of an effect over several arms, its other side."""
    family: Family
    difference: float
    standard_error: float | None
    df: float | None
    confidence: float
    low: float | None
    high: float | None
    p: float | None
    p_holm: float | None
    p_equivalent: float | None
    """Of a difference of the margin or more, the larger of two one-sided p; the contrast is
    equivalent if it is at most `equivalent_at`."""
    equivalent_at: float | None
    margin: float
    verdict: Verdict
    detectable: float | None
    """What this contrast finds with 80 % power at its first level."""
    per_seed: list[float]
    fixed_models: FixedModels


class Measure(TypedDict):
    """One way to measure accuracy; per seed, in the arm's order."""

    decoding: Decoding
    answer: Answer
    per_seed: list[float]
    clipped_ratio: list[float]
    """Share of completions that were cut at the token limit."""
    mean_length: list[float]
    """Tokens."""


class Curve(TypedDict, total=False):
    steps: list[int]
    mean: list[float]
    low: list[float]
    high: list[float]


class ArmResult(TypedDict):
    """One plan under one rule at one mean rank, or one cell of a factorial; over its seeds.

    accuracy, low, high, per_seed and n_items are of the study's outcome (`settings`); `measures`
    has that and the other ways to measure. Null and empty until every seed has finished.
    """

    name: str
    plan: str
    scale_rule: str
    mean_rank: int
    seeds: list[int]
    learning_rates: list[float]
    accuracy: float | None
    low: float | None
    high: float | None
    per_seed: list[float]
    n_items: int
    measures: list[Measure]
    reward_last_quarter: list[float]
    """Mean training reward over the last quarter of the steps, per seed."""
    reward_difference: Range | None
    """Its mean less the first arm's, the run being the unit; null for that one, and with one seed.
    """
    kl_last_quarter: list[float]
    """KL to the base model there, where it was measured."""
    gradient_clipped: list[float]
    """Share of steps whose gradient was longer than optim.max_grad_norm, per seed."""
    speed: float | None
    """First-order: sum s_i r_i g_i over s r sum g_i, g the profile's ||dL/dW||; uniform is 1."""
    trainable_parameters: int | None
    total_rank: int | None
    rank_min: int | None
    rank_max: int | None
    ranks: dict[str, list[int]]
    layer_ranks: list[float]
    reward: Curve
    drift: Curve
    seconds: float | None
    tokens: int | None
    tokens_per_s: float | None
    versus: Contrast | None
    """Against uniform ranks of the same mean; null for the reference itself."""


class CutResult(TypedDict):
    """A uniform arm's adapters after PARA's cut: evaluated, not trained on.

    Per seed. Not one of the runs: a cut adapter shares its run with the uncut one, so it says
    nothing of how much runs differ.
    """

    name: str
    arm: str
    """The uncut one, as in ArmResult.name."""
    criterion: str
    share: float
    accuracy: list[float]
    difference: list[float]
    """Cut - uncut, of the same run."""
    parameters: list[int]


class Residual(TypedDict):
    """What is left of the runs' accuracies after arm and seed: how much a run moves by itself."""

    sd: float
    df: int
    low: float
    high: float


class Detectable(TypedDict):
    """Smallest true difference that the primary contrast finds with 80 % power at 5 %.

    low and high: the same if the residual sd is off by its own 95 % interval.
    """

    value: float
    low: float
    high: float


class Later(TypedDict):
    """What an ordinary study compares that its first report did not, or no longer compares."""

    seeds: list[int]
    """Added to arms that the first report had."""
    arms: list[str]
    """Added with all their seeds, as in ArmResult.name."""
    left_out: list[str]
    """Runs that an earlier report compared."""
    reports: int
    """How many reports of different runs there are, this one included."""


class Trend(TypedDict):
    """A slope on log2: of the uniform arms' accuracy on their rank."""

    slope: float
    low: float
    high: float
    p: float
    df: float


class Interaction(Trend):
    """A contrast's slope on log2 of the learning rate."""

    name: str


class LookResult(TypedDict):
    """A planned look of a factorial study and what it decided."""

    blocks: int
    finished: int
    """Blocks of it whose runs are all there."""
    differs_at: float
    """The two-sided p at or below which a contrast is said to differ."""
    equivalent_at: float
    decided: bool | None
    """null: not all runs are there."""


class DesignResult(TypedDict):
    """The plan of a factorial study, as written to design.json before its first arm."""

    sha256: str
    looks: list[LookResult]
    look: int | None
    """How many blocks the printed analysis uses."""
    cells: dict[str, str]
    """Cell -> what it is, in a line."""
    interactions: list[Interaction]
    """Contrast x log learning rate, per doubling: the sensitivity analysis."""


class PaperRow(TypedDict):
    quantity: str
    paper: str
    ours: str
    note: str


class Allocation(TypedDict):
    plan: str
    layer_ranks: list[float]
    note: str


class Base(TypedDict):
    accuracy: float
    low: float
    high: float
    n: int


class Results(TypedDict):
    """The whole file."""

    format: int
    title: str
    question: str
    verdict: list[str]
    convergence: str
    """Whether the reward had stopped rising when training ended; empty where too short to tell."""
    settings: dict[str, str]
    """Name -> value, in the order to print: model, data, items and their split, prompt, decoding,
    rewards and weights, loss, KL, clipping, learning rates, budget, scale rule, seeds."""
    versions: dict[str, str]
    base: Base | None
    arms: list[ArmResult]
    cuts: list[CutResult]
    """Of the uniform arms whose seeds have all been cut and evaluated."""
    contrasts: list[Contrast]
    """Every contrast, the primary one first; ArmResult.versus is one of these."""
    residual: Residual | None
    detectable: Detectable | None
    rank_trend: Trend | None
    later: Later | None
    design: DesignResult | None
    profiles: list[Profile]
    amplification: list[Amplification]
    amplification_verdict: list[str]
    spread: list[Spread]
    landscape: list[Landscape]
    paper: list[PaperRow]
    allocations: list[Allocation]
