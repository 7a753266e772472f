"""What a study's numbers are turned into: verdicts, comparisons, the amplification test."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import yaml

from jaxgrpo.config import ConfigError, EvalConfig
from jaxgrpo.config_files import decode_config, dump_config
from jaxgrpo.records.run_directory import RunDirectory
from jaxgrpo.study.config import Arm, StudyConfig, StudyFiles, list_arms, scaled_lora
from jaxgrpo.study.history import note_report
from jaxgrpo.study.results import collect_results
from jaxgrpo.study.runs import check_same_study
from jaxgrpo.study.slopes import MECHANICAL_SLOPES

ITEMS = 200
LAYERS = 8


def make_config(root, **arms):
    raw = {"run_dir": str(root), "steps": 5, "lora": {"rank": 8, "alpha": 16.0}}
    raw["study"] = {
        "margin": 0.05,
        "profile": {"objectives": arms.get("objectives", ["grpo"]), "steps": 6},
        "allocation": {"min_rank": 2, "max_rank": 16},
        "probe": {"scale_rules": list(MECHANICAL_SLOPES), "draws": 2, "layer_draws": 0},
        "arms": {"plans": ["uniform", "proportional", "random"], "seeds": [0, 1]} | arms,
    }
    return decode_config(raw, StudyConfig)


def write_arm(config, arm, correct):
    folder = StudyFiles(config.run_dir).arm(arm)
    (folder / "eval").mkdir(parents=True)
    correct = np.asarray(correct, bool).reshape(len(correct), -1)
    records = [
        {
            "index": i,
            "prompt": f"question {i}",
            "answer": str(i),
            "correct": row.tolist(),
            "tokens": [9],
            "finish_reasons": ["length"],
        }
        for i, row in enumerate(correct)
    ]
    lines = "\n".join(json.dumps(r) for r in records) + "\n"
    (folder / "eval" / "step_000005.jsonl").write_text(lines)
    ranks = {"q_proj": [8] * LAYERS}
    summary = {
        "plan": {"ranks": ranks, "max_rank": 8, "alpha": 16.0}
        | {"scale_rule": "constant", "reference_rank": 8},
        "trainable_parameters": 100,
        "model": {"parameters": 1, "layers": LAYERS},
        "versions": {"jax": "0"},
    }
    (folder / "summary.json").write_text(json.dumps(summary))
    metrics = [
        {"step": s, "step_time": 1.0, "num_tokens": 10.0, "reward": 0.1 * s} for s in range(1, 6)
    ]
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, metrics)) + "\n")


def make_study(root, accuracy, seed=0):
    """Arms whose items are right with the given probabilities, items shared."""
    config = make_config(root)
    rng = np.random.default_rng(seed)
    difficulty = rng.uniform(size=ITEMS)
    for arm in list_arms(config):
        write_arm(config, arm, difficulty < accuracy[arm.plan])
    return config


def write_norms(path, ranks, exponent, steps=6, noise=0.02, seed=1):
    """Raw norms share ~ g * rank^exponent, the weight's ~ g, with a little noise per step."""
    rng = np.random.default_rng(seed)
    g = rng.uniform(1, 2, LAYERS)
    path.mkdir(parents=True)
    lines = []
    for step in range(1, steps + 1):
        jitter = np.exp(noise * rng.normal(size=(2, LAYERS)))
        raw = (g * np.asarray(ranks) ** exponent * jitter[0]).tolist()
        weight = (g * jitter[1]).tolist()
        lines.append(
            {
                "step": step,
                "l2": {"q_proj": {"a": raw, "b": raw}},
                "rms": {"q_proj": {"a": raw, "b": raw}},
                "rank_free": {"q_proj": {"a": weight, "b": weight}},
                "weight": {"q_proj": {"w": weight}},
            }
        )
    (path / "layer_grad_norms.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")


def test_nothing_measured_yet_is_a_result(tmp_path):
    results = collect_results(make_config(tmp_path))
    assert results["verdict"] == ["No arm is finished together with its uniform reference yet."]
    assert all(arm["accuracy"] is None for arm in results["arms"])
    assert results["profiles"] == [] and results["amplification"] == []
    json.dumps(results, allow_nan=False)


@pytest.mark.parametrize(
    ("proportional", "head", "said"),
    [
        (0.60, "No plan beats uniform ranks by 5.0 points", "equivalent"),
        (0.75, "Yes, here it helps: proportional - uniform is +1", "better"),
        (0.45, "No plan beats uniform ranks by 5.0 points", "worse"),
    ],
)
def test_the_verdict_follows_the_runs(tmp_path, proportional, head, said):
    accuracy = {"uniform": 0.60, "proportional": proportional, "random": 0.60}
    results = collect_results(make_study(tmp_path, accuracy))
    assert results["verdict"][0].startswith(head), results["verdict"]
    arm = next(a for a in results["arms"] if a["plan"] == "proportional")
    assert arm["versus"]["difference"] == pytest.approx(
        arm["accuracy"] - results["arms"][0]["accuracy"]
    )
    assert arm["versus"]["verdict"] == said and arm["versus"]["family"] == "primary"
    assert arm["versus"] is results["contrasts"][0]
    # One primary contrast, unadjusted; one in the second family, so not adjusted either.
    assert all(c["p_holm"] == c["p"] for c in results["contrasts"])
    assert all((c["low"] <= 0 <= c["high"]) == (c["p_holm"] > 0.05) for c in results["contrasts"])
    within = [c["p_equivalent"] <= c["equivalent_at"] for c in results["contrasts"]]
    assert [c["verdict"] == "equivalent" for c in results["contrasts"]] == within
    p = f"of 5 or more either way, p = {arm['versus']['p_equivalent']:.2g}"
    assert (p in " ".join(results["verdict"])) == (said == "equivalent")


def moving_study(root, shifts, **arms):
    """Arms whose seeds move apart: plan -> shift of each seed, in items of 200."""
    config = make_config(root, seeds=list(range(len(shifts["uniform"]))), **arms)
    for arm in list_arms(config):
        right = 120 + shifts[arm.plan][arm.seed]
        write_arm(config, arm, np.arange(ITEMS) < right)
    return config


def test_runs_of_several_devices_are_told(tmp_path):
    config = make_study(tmp_path, {"uniform": 0.6, "proportional": 0.6, "random": 0.6})
    for number, arm in enumerate(list_arms(config)):
        path = StudyFiles(config.run_dir).arm(arm) / "summary.json"
        versions = {"jax": "0.11.2", "device": "A" if number else "B"}
        path.write_text(json.dumps(json.loads(path.read_text()) | {"versions": versions}))
    found, others = collect_results(config)["versions"], len(list_arms(config)) - 1
    assert found == {"jax": "0.11.2", "device": f"B (1 of the runs), A ({others} of the runs)"}


def test_runs_that_move_leave_it_open(tmp_path):
    """README's case: the items alone say p = 0.0003, another run of the same arm says otherwise."""
    shifts = {"uniform": [0, 6], "proportional": [-10, 2], "random": [4, -5]}
    results = collect_results(moving_study(tmp_path, shifts))
    versus = results["contrasts"][0]
    assert versus["fixed_models"]["p"] < 0.01 and versus["p"] > 0.05
    assert versus["verdict"] == "open"
    assert results["verdict"][0] == "Open: no plan is shown to be better, worse or equivalent."
    assert results["residual"]["df"] == 2 and results["residual"]["sd"] > 0.01
    np.testing.assert_allclose(versus["per_seed"], [-0.05, -0.02])
    assert "80 % power" in results["verdict"][-1]


def test_no_is_not_said_while_one_plan_may_be_better(tmp_path):
    """One arm surely worse, one whose interval reaches beyond the margin."""
    shifts = {"uniform": [0, 4, 2], "proportional": [-40, -36, -38], "random": [13, 6, 6]}
    results = collect_results(moving_study(tmp_path, shifts))
    verdicts = {c["name"]: c["verdict"] for c in results["contrasts"]}
    assert verdicts == {"proportional - uniform": "worse", "random - uniform": "open"}
    assert results["contrasts"][1]["high"] > results["contrasts"][1]["margin"]
    said = "Open: no plan is shown to be better; proportional worse, random open."
    assert results["verdict"][0] == said


def test_of_many_plans_the_headline_tells_how_many(tmp_path):
    shifts = {"uniform": [0, 4, 2], "proportional": [-40, -36, -38]}
    others = ("inverse", "random", "reduced", "top_k", "equalised")
    shifts |= {plan: [13, 6, 6] for plan in others}
    results = collect_results(moving_study(tmp_path, shifts, plans=list(shifts)))
    said = "Open: no plan is shown to be better; proportional worse, 5 open."
    assert results["verdict"][0] == said


def test_runs_that_were_added_after_a_report_are_told(tmp_path):
    """Seeds, whole arms, and what is left out; a first report, and the same one again, say nothing
    of it."""
    shifts = {p: [0, 4, 3, -2] for p in ("uniform", "proportional", "random")}
    config = moving_study(tmp_path, shifts)
    fewer = {"plans": ["uniform", "proportional"], "seeds": [0, 1]}
    for _ in range(2):
        note_report(make_config(tmp_path, **fewer))
        assert collect_results(make_config(tmp_path, **fewer))["later"] is None
    note_report(config)
    results = collect_results(config)
    expected = {"seeds": [2, 3], "arms": ["random"], "left_out": [], "reports": 2}
    assert results["later"] == expected
    assert results["verdict"][0] == "Exploratory: seeds 2, 3 were added after a first report."
    assert "with 2 looks in up to 10 %" in results["verdict"][1]
    assert results["verdict"][2].startswith("Exploratory: random came after a first report")
    best = make_config(tmp_path, plans=["uniform", "proportional"], seeds=[0, 2])
    results = collect_results(best)
    assert results["later"]["reports"] == 3
    assert "proportional-constant-r8-s1" in results["verdict"][2]
    assert "Left out here" in results["verdict"][2]


def test_runs_that_are_all_alike_have_no_range_of_what_is_detectable(tmp_path):
    """The sd is 0, and so are its limits; the arms' own items are not."""
    config = make_config(tmp_path, seeds=[0, 1, 2])
    for arm in list_arms(config):
        half = np.arange(ITEMS) % 2 == (arm.plan == "random")
        write_arm(config, arm, half if arm.plan != "proportional" else np.arange(ITEMS) < 100)
    results = collect_results(config)
    found = results["detectable"]
    assert results["residual"]["sd"] == 0 and found["value"] > 0.05
    assert found["low"] == found["high"] == found["value"]
    assert results["verdict"][-1].endswith("80 % power.")


def test_one_seed_gives_no_p(tmp_path):
    shifts = {"uniform": [0], "proportional": [-40], "random": [0]}
    results = collect_results(moving_study(tmp_path, shifts))
    assert results["residual"] is None and results["detectable"] is None
    assert (
        {c["p"] for c in results["contrasts"]} == {c["low"] for c in results["contrasts"]} == {None}
    )
    assert len(results["verdict"]) == 1 and "nothing is tested" in results["verdict"][0]


def test_several_samples_a_problem_are_reported(tmp_path):
    config = dataclasses.replace(make_config(tmp_path), eval=EvalConfig(samples=4, temperature=1.0))
    rng = np.random.default_rng(3)
    for arm in list_arms(config):
        write_arm(config, arm, rng.random((ITEMS, 4)) < 0.6)
    results = collect_results(config)
    versus = results["contrasts"][0]
    assert 0 <= versus["fixed_models"]["p"] <= 1 and 0 <= versus["p"] <= 1
    assert results["arms"][0]["measures"][0]["decoding"] == "sampled"
    assert results["arms"][0]["per_seed"] == results["arms"][0]["measures"][0]["per_seed"]


def test_a_family_is_as_large_as_it_was_planned(tmp_path):
    """An arm that has not finished counts in Holm's correction: looking early gains nothing."""
    shifts = {p: [0, 4, 3] for p in ("uniform", "proportional", "random")}
    shifts["inverse"] = [-9, -2, -8]
    plans = ["uniform", "proportional", "inverse", "random"]
    config = moving_study(tmp_path, shifts, plans=plans)
    whole = {c["name"]: c for c in collect_results(config)["contrasts"]}
    for arm in list_arms(config):
        if arm.plan == "random":
            (StudyFiles(config.run_dir).arm(arm) / "summary.json").unlink()
    early = {c["name"]: c for c in collect_results(config)["contrasts"]}
    assert set(early) == {"proportional - uniform", "inverse - uniform"}
    for found in (whole, early):
        c = found["inverse - uniform"]
        assert c["p_holm"] == pytest.approx(2 * c["p"])
        assert c["confidence"] == pytest.approx(0.975)


def test_a_rank_sweep_compares_its_uniform_arms(tmp_path):
    """Against the widest, and as a slope on log2 of the rank: one point for each doubling."""
    plans = {"plans": ["uniform"], "mean_ranks": [2, 4, 8], "scale_rules": ["rslora"]}
    config = make_config(tmp_path, seeds=[0, 1, 2], **plans)
    for arm in list_arms(config):
        right = 120 + 2 * int(np.log2(arm.mean_rank)) + [0, 3, 1][arm.seed] + (arm.mean_rank == 4)
        write_arm(config, arm, np.arange(ITEMS) < right)
    results = collect_results(config)
    names = [c["name"] for c in results["contrasts"]]
    assert names == ["uniform, rank 2 - uniform, rank 8", "uniform, rank 4 - uniform, rank 8"]
    assert [c["difference"] for c in results["contrasts"]] == pytest.approx([-0.02, -0.005])
    assert results["rank_trend"]["slope"] == pytest.approx(0.01)
    assert results["rank_trend"]["low"] < 0.01 < results["rank_trend"]["high"]
    assert "does accuracy depend on the rank" in results["question"]
    assert results["verdict"][0].startswith("Accuracy changes by +1.0 points per doubling")


def test_a_missing_seed_leaves_its_arm_out(tmp_path):
    config = make_config(tmp_path)
    arms = list_arms(config)
    for arm in arms[:-1]:
        write_arm(config, arm, np.ones(ITEMS, bool))
    results = collect_results(config)
    measured = {a["plan"]: a["accuracy"] for a in results["arms"]}
    assert measured == {"uniform": 1.0, "proportional": 1.0, "random": None}
    assert "random" not in " ".join(results["verdict"])


def test_costs_and_curves_add_up(tmp_path):
    results = collect_results(
        make_study(tmp_path, dict.fromkeys(("uniform", "proportional", "random"), 0.5))
    )
    arm = results["arms"][0]
    assert arm["seconds"] == 10.0 and arm["tokens"] == 100 and arm["tokens_per_s"] == 10.0
    assert arm["reward"]["steps"] == [1, 2, 3, 4, 5]
    np.testing.assert_allclose(arm["reward"]["mean"], [0.1, 0.2, 0.3, 0.4, 0.5])


def write_probes(config):
    """Two draws, under whose seeds layers differ otherwise, each beside its own uniform run."""
    files = StudyFiles(config.run_dir)
    ranks = [2, 16, 4, 8, 8, 4, 2, 16]
    files.plans.mkdir()
    for draw, levels in enumerate((ranks, ranks[::-1])):
        write_norms(files.uniform(draw), [8] * LAYERS, 0.0, noise=0.002, seed=draw + 1)
        for rule, exponent in MECHANICAL_SLOPES.items():
            where = files.probe(rule, draw)
            write_norms(where, levels, exponent, noise=0.002, seed=draw + 1)
        files.plan(f"probe-{draw}").write_text(json.dumps({"ranks": {"q_proj": levels}}))


def test_amplification_recovers_the_exponents(tmp_path):
    """Against the profile alone the second draw's layers would be off by up to a factor of 2."""
    config = make_config(tmp_path)
    write_probes(config)
    results = collect_results(config)
    slopes = {(a["scale_rule"], a["view"]): a for a in results["amplification"]}
    for rule, exponent in (("constant", 0.5), ("rslora", 0.0), ("alpha_over_r", -0.5)):
        assert slopes[rule, "l2"]["slope"] == pytest.approx(exponent, abs=0.03)
        assert slopes[rule, "l2"]["predicted"] == exponent
        assert slopes[rule, "weight"]["slope"] == pytest.approx(0, abs=0.03)
    assert "parameterisation alone" in results["amplification_verdict"][0]


def test_uniform_arms_are_run_once_for_all_rules(tmp_path):
    config = make_config(tmp_path, scale_rules=["constant", "rslora"], mean_ranks=[4, 8])
    names = [arm.group for arm in list_arms(config) if arm.plan == "uniform"]
    assert names == ["uniform-constant-r4"] * 2 + ["uniform-rslora-r4"] * 2 + ["uniform-r8"] * 2


def test_scale_rules_agree_at_the_anchor(tmp_path):
    """At lora.rank every rule gives alpha / rank, so uniform arms are one and the same."""
    config = make_config(tmp_path)
    for rule, exponent in (("constant", 0), ("rslora", -0.5), ("alpha_over_r", -1)):
        settings = scaled_lora(config, rule, 8)
        for rank in (2, 8, 16):
            scale = {
                "constant": settings["alpha"] / settings["rank"],
                "rslora": settings["alpha"] / rank**0.5,
                "alpha_over_r": settings["alpha"] / rank,
            }[rule]
            assert scale == pytest.approx(2 * (rank / 8) ** exponent)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arms": {"plans": ["proportional"]}}, "must hold uniform"),
        ({"arms": {"plans": ["uniform", "proportionate"]}}, "did you mean 'proportional'?"),
        ({"arms": {"plans": ["uniform", "uniform"]}}, "holds a value twice"),
        ({"arms": {"seeds": []}}, "study.arms.seeds is empty"),
        ({"arms": {"seeds": [-1]}}, "must be >= 0"),
        ({"arms": {"mean_ranks": [0]}}, "must be >= 1"),
        ({"arms": {"scale_rules": ["rslorra"]}}, "one of: constant, rslora, alpha_over_r"),
        ({"arms": {"plan": ["uniform"]}}, "did you mean 'plans'?"),
        (
            {"arms": {"plans": ["uniform", "equalised"], "scale_rules": ["rslora"]}},
            "does not depend on rank",
        ),
        ({"profile": {"steps": 3}}, "at least 4"),
        ({"profile": {"objectives": ["sft"]}}, "must hold grpo"),
        ({"allocation": {"objective": "sft"}, "profile": {"objectives": ["grpo"]}}, "not profiled"),
        ({"allocation": {"min_rank": 9, "max_rank": 12}}, "outside study.allocation's bounds"),
        ({"allocation": {"min_rank": 4, "max_rank": 2}}, "at least min_rank=4"),
        ({"allocation": {"reduced_fraction": 1.0}}, "must lie in (0, 1)"),
        ({"allocation": {"view": "l1"}}, "study.allocation.view"),
        ({"probe": {"draws": 1}}, "two ranks to compare"),
        ({"probe": {"layer_draws": -1}}, "must be >= 0"),
        ({"margin": 0.0}, "must lie in (0, 1)"),
        ({"outcome": {"decoding": "sampled"}}, "gives greedy completions"),
    ],
)
def test_mistakes_in_a_study_are_told(changes, message):
    with pytest.raises(ConfigError) as error:
        decode_config({"lora": {"rank": 8}, "study": changes}, StudyConfig)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("lora", {"plan": "x.json"}, "leave lora.plan out"),
        ("lora", {"max_rank": 9}, "leave it out"),
        ("objective", "sft", "study.arms.objectives"),
    ],
)
def test_what_a_study_sets_itself_may_not_be_given(key, value, message):
    with pytest.raises(ConfigError, match=message):
        decode_config({key: value}, StudyConfig)


def test_a_study_of_an_older_format_opens_or_is_refused_with_what_to_run(tmp_path):
    """What its `study` held is no part of its runs; what its runs share is."""
    config = make_config(tmp_path)
    raw = yaml.safe_load(dump_config(config))
    raw["study"] |= {"probe": {"draws": 1}, "older": 3}
    path = RunDirectory(tmp_path).config
    path.write_text(yaml.safe_dump(raw))
    check_same_study(config)
    path.write_text(yaml.safe_dump(raw | {"steps": 7}))
    with pytest.raises(ConfigError, match="steps was 7, is 5; choose another run_dir"):
        check_same_study(config)
    with pytest.raises(ConfigError, match=r"goes on with study\.probe\.draws=4"):
        decode_config({"study": {"probe": {"draws": 1}}}, StudyConfig)


def test_names_of_arms_are_file_names():
    arm = Arm("top_k", "alpha_over_r", 8, 1)
    assert arm.name == "top_k-alpha_over_r-r8-s1"


def test_arms_are_paired_by_question_and_not_by_place(tmp_path):
    accuracy = dict.fromkeys(("uniform", "proportional", "random"), 0.6)
    config = make_study(tmp_path, accuracy)
    expected = collect_results(config)
    # The same verdicts in another order, under other numbers: nothing changes.
    path = StudyFiles(tmp_path).arm(list_arms(config)[2]) / "eval" / "step_000005.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    shuffled = [records[i] | {"index": n} for n, i in enumerate(reversed(range(len(records))))]
    path.write_text("".join(json.dumps(record) + "\n" for record in shuffled))
    assert collect_results(config) == expected
    # One other question, and there is no pair.
    shuffled[0]["prompt"] = "another question"
    path.write_text("".join(json.dumps(record) + "\n" for record in shuffled))
    with pytest.raises(ConfigError, match=r"uniform-r8-s0 and .* not evaluated alike \(other ques"):
        collect_results(config)


def test_arms_that_were_decoded_otherwise_are_not_compared(tmp_path):
    config = make_study(tmp_path, dict.fromkeys(("uniform", "proportional", "random"), 0.6))
    for arm, temperature in zip(list_arms(config)[:2], (0.0, 0.7), strict=True):
        made_with = {"policy": arm.name, "decoding": {"temperature": temperature}}
        path = StudyFiles(tmp_path).arm(arm) / "eval" / "step_000005.json"
        path.write_text(json.dumps({"eval/accuracy": 0.5, "made_with": made_with}))
    with pytest.raises(ConfigError, match=r"decoding\.temperature was 0\.0, is 0\.7"):
        collect_results(config)
