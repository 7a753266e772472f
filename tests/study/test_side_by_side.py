"""Arms trained side by side give the study that arms trained one after another give."""

import dataclasses
import json
import re
import shutil

import numpy as np
import pytest
import yaml
from rich.console import Console

from jaxgrpo.ahead.memory import fitting_arms, foretell
from jaxgrpo.ahead.shapes import remat_of_run
from jaxgrpo.checkpoint import read_adapter
from jaxgrpo.config import Config, GrpoConfig, RolloutConfig
from jaxgrpo.config_files import load_config
from jaxgrpo.devices import Device
from jaxgrpo.model.presets import PRESETS
from jaxgrpo.rank_plan import make_rank_plan
from jaxgrpo.records.run_directory import RunDirectory, read_jsonl
from jaxgrpo.run import main
from jaxgrpo.study.arms import Runner
from jaxgrpo.study.config import StudyConfig, list_arms
from jaxgrpo.study.runs import arm_configs, share_programs
from tests.gradients import assert_close_in_size

pytestmark = pytest.mark.usefixtures("one_device")
SETTINGS = {
    "steps": 2,
    "log_completions_every_steps": 0,
    "lora": {"rank": 2, "alpha": 4},
    "rollout": {"max_completion_tokens": 16},
    "grpo": {"prompts_per_step": 8, "group_size": 4},
    "eval": {"problems": 16, "batch_prompts": 16},
    # As in test_train_arms: an update that goes with the gradient's size.
    "optim": {"eps": 1e-3},
    "study": {
        "profile": {"objectives": ["grpo"], "steps": 4},
        "allocation": {"min_rank": 1, "max_rank": 4},
        "probe": {"scale_rules": [], "draws": 2, "layer_draws": 0},
        "arms": {
            "plans": ["uniform", "proportional", "adaptive"],
            "scale_rules": ["constant"],
            "seeds": [0, 1],
        },
    },
}


@pytest.fixture(scope="module")
def studies(tmp_path_factory):
    """The same study, its arms one by one and three at a time, with one profile."""
    place = tmp_path_factory.mktemp("together")
    (place / "study.yaml").write_text(yaml.safe_dump(SETTINGS))
    found = []
    for name, words in (("one", []), ("three", ["study.together=3"])):
        words = [str(place / "study.yaml"), f"run_dir={place / name}", *words]
        if found:
            shutil.copytree(found[0] / "profiles", place / name / "profiles")
        assert main(["study", *words]) == 0
        found.append(place / name)
    return found


def test_the_study_is_the_same(studies):
    one, three = (json.loads((path / "results.json").read_text()) for path in studies)
    assert [arm["name"] for arm in one["arms"]] == [arm["name"] for arm in three["arms"]]
    for mine, theirs in zip(three["arms"], one["arms"], strict=True):
        assert mine["accuracy"] == theirs["accuracy"]
        assert mine["ranks"] == theirs["ranks"]


def test_arms_have_the_runs_that_they_would_have_alone(studies):
    one, three = (sorted((path / "arms").iterdir()) for path in studies)
    assert [path.name for path in one] == [path.name for path in three] and len(one) == 6
    for alone, together in zip(one, three, strict=True):
        mine, theirs = (
            [m for m in read_jsonl(path / "metrics.jsonl") if "loss" in m]
            for path in (together, alone)
        )
        assert len(mine) == 2
        for a, b in zip(mine, theirs, strict=True):
            assert a["loss"] == pytest.approx(b["loss"], rel=1e-5, abs=1e-6)
            assert a["reward"] == b["reward"]
        # All that a step needs is compiled before it or in the first one.
        assert mine[1]["time/programs_compiled"] == 0
        names = sorted(path.name for path in alone.iterdir())
        assert sorted(path.name for path in together.iterdir()) == names


def test_ranks_move_side_by_side_as_they_do_alone(studies, tmp_path):
    """AdaLoRA's, PARA's and its control's, beside a uniform arm; and what they end with."""
    settings = SETTINGS | {"steps": 4, "eval": {"after_training": False, "problems": 16}}
    plans = ["uniform", "adalora", "para", "uniform_cut"]
    arms = {"plans": plans, "scale_rules": ["constant"], "seeds": [0, 1]}
    settings["study"] = SETTINGS["study"] | {"arms": arms}
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(settings))
    asked = ["uniform-r2-s0", "para-constant-r2-s0", "uniform_cut-constant-r2-s0"]
    asked += [f"adalora-constant-r2-s{seed}" for seed in (0, 1)]
    for name, together in (("one", 1), ("some", 3)):
        shutil.copytree(studies[0] / "profiles", tmp_path / name / "profiles")
        words = [str(tmp_path / "study.yaml"), f"run_dir={tmp_path / name}"]
        only = ",".join(["prepare", *asked])
        assert main(["study", *words, f"study.together={together}", f"study.only=[{only}]"]) == 0
    one, some = (sorted((tmp_path / name / "arms").iterdir()) for name in ("one", "some"))
    assert [path.name for path in one] == [path.name for path in some] and len(one) == 5
    for alone, together in zip(one, some, strict=True):
        plans = [
            json.loads((path / "summary.json").read_text())["plan"] for path in (alone, together)
        ]
        assert plans[0] == plans[1]
        saved = [read_adapter(RunDirectory(path).checkpoints) for path in (alone, together)]
        assert_close_in_size(saved[1].lora, saved[0].lora)


def test_probes_have_the_norms_that_they_would_have_alone(studies, tmp_path):
    found = {}
    # Two draws at once, each a run at its ranks and, of the second, one at uniform ranks; then the
    # draws by name, alone.
    for name, together, parts in (("three", 3, ["probes"]), ("one", 1, ["probe2", "probe1"])):
        shutil.copytree(studies[0] / "profiles", tmp_path / name / "profiles")
        words = [str(studies[0].parent / "study.yaml"), f"run_dir={tmp_path / name}"]
        words += ["study.probe.scale_rules=[constant]", f"study.together={together}"]
        for part in ("prepare", *parts):
            assert main(["study", *words, f"study.only=[{part}]"]) == 0
        runs = sorted((tmp_path / name / "probes").iterdir())
        found[name] = {run.name: read_jsonl(run / "layer_grad_norms.jsonl") for run in runs}
    assert list(found["one"]) == ["0-constant", "1-constant", "1-uniform"]
    assert list(found["three"]) == list(found["one"])
    for run, alone in found["one"].items():
        assert len(alone) == 4
        for mine, theirs in zip(found["three"][run], alone, strict=True):
            assert mine.keys() == theirs.keys() and "weight" in mine
            for view in mine.keys() - {"step"}:
                for module, matrices in mine[view].items():
                    for matrix, norms in matrices.items():
                        np.testing.assert_allclose(
                            norms, theirs[view][module][matrix], rtol=1e-4, atol=1e-7
                        )


def test_what_may_share_programs(tmp_path):
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(SETTINGS))
    config = load_config([tmp_path / "study.yaml"], [], StudyConfig)
    first, *others = arm_configs(config)
    assert all(share_programs(first, other) for other in others)
    assert share_programs(first, dataclasses.replace(first, seed=9, run_dir="elsewhere"))
    longer = dataclasses.replace(first, steps=3)
    wider = dataclasses.replace(first, lora=dataclasses.replace(first.lora, max_rank=8))
    supervised = dataclasses.replace(first, objective="sft")
    assert not any(share_programs(first, other) for other in (longer, wider, supervised))


@pytest.mark.parametrize(
    ("together", "fit", "places", "sizes"),
    [
        (1, 16, 1, [1] * 8),
        # adalora's two, which keep statistics, by themselves.
        (3, 16, 1, [3, 3, 2]),
        # Even rounds, which the same programs train.
        (4, 16, 1, [3, 3, 2]),
        (None, 16, 1, [6, 2]),
        (None, 5, 1, [3, 3, 2]),
        # Every worker of a cluster has some, unless the user says how many go together.
        (None, 16, 2, [3, 3, 1, 1]),
        (None, 16, 4, [2, 2, 2, 1, 1]),
        (None, 16, 9, [1] * 8),
        (6, 16, 9, [6, 2]),
    ],
)
def test_the_rounds_of_a_study(tmp_path, monkeypatch, together, fit, places, sizes):
    monkeypatch.setattr("jaxgrpo.study.lab.Lab.together", lambda self, config, most: min(fit, most))
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(SETTINGS))
    words = [f"run_dir={tmp_path}", "study.arms.plans=[uniform,proportional,adaptive,adalora]"]
    words += [] if together is None else [f"study.together={together}"]
    config = load_config([tmp_path / "study.yaml"], words, StudyConfig)
    rounds = Runner(config, Console(quiet=True)).rounds(range(8), places)
    assert sorted(len(group.numbers) for group in rounds) == sizes[::-1]
    assert sorted(number for group in rounds for number in group.numbers) == list(range(8))
    arms, slots = list_arms(config), {}
    for group in rounds:
        (measured,) = {arms[n].plan == "adalora" for n in group.numbers}
        slots.setdefault(measured, set()).add(group.slots)
    # Rounds of a kind have one program.
    assert slots == {False: {sizes[0]}, True: {sizes[-1]}}


def test_a_dry_run_tells_the_rounds(monkeypatch, capsys):
    study = ["study.arms.plans=[uniform,adaptive,adalora]", "study.arms.seeds=[0,1,2]"]

    def told(*words):
        assert main(["sweep", "mesh.data=1", *study, *words, "--dry-run"]) == 0
        return " ".join(capsys.readouterr().out.split("rounds", 1)[1].split())

    def rows(*shown):
        return [
            rf" {number} {fit} {slots} {128 * slots} [0-9.]+ {count} "
            for number, fit, slots, count in shown
        ]

    said = told("study.together=4")
    for row in rows((6, "unknown", 3, 2), (3, "unknown", 3, 1)):
        assert re.search(row, said), said
    assert "3 rounds of 40 steps" in said and "warning" not in said
    monkeypatch.setattr("jaxgrpo.devices._memory", lambda device, name: 150 * 2**20)
    said = told()
    for row in rows((6, 3, 3, 2), (3, 3, 3, 1)):
        assert re.search(row, said), said
    assert "warning" not in said
    said = told("study.together=6")
    assert re.search(rows((6, 3, 6, 1))[0], said), said
    assert "warning: a round takes" in said and "lower study.together" in said


def test_as_many_arms_as_memory_allows():
    config = Config(
        grpo=GrpoConfig(prompts_per_step=4, group_size=4),
        rollout=RolloutConfig(max_completion_tokens=512),
    )
    model, sizes = PRESETS["qwen2.5-1.5b"], {"data": 1, "fsdp": 1, "model": 1}
    plan = make_rank_plan(config.lora, model.num_layers)

    def room(gib, most=16):
        device = Device("gpu", "some", memory=gib * 2**30, capability="9.0")
        of_device = dataclasses.replace(model, device=device)
        return fitting_arms(config, of_device, plan, sizes, most), of_device

    counts = [room(gib)[0] for gib in (4, 12, 16, 24, 80)]
    assert counts == sorted(counts) and counts[0] == 1 and counts[-1] == 16
    assert room(80, most=3)[0] == 3
    assert fitting_arms(config, model, plan, sizes, 16) == 1
    arms, of_device = room(16)
    remat = remat_of_run(config, of_device)
    peaks = [foretell(config, of_device, plan, sizes, remat, n).peak for n in (arms, arms + 1)]
    assert peaks[0] <= 16 * 2**30 < peaks[1]


def test_devices_that_share_the_arms_have_room_for_more():
    config = Config(grpo=GrpoConfig(prompts_per_step=4, group_size=4))
    plan = make_rank_plan(config.lora, PRESETS["qwen2.5-1.5b"].num_layers)
    one = Device("gpu", "some", memory=16 * 2**30, capability="9.0")
    four = dataclasses.replace(one, count=4, batch_shards=4)
    fit = []
    for device in (one, four):
        sizes = {"data": device.count, "fsdp": 1, "model": 1}
        model = dataclasses.replace(PRESETS["qwen2.5-1.5b"], device=device)
        fit.append(fitting_arms(config, model, plan, sizes, 64))
    assert fit[0] < fit[1] and fit[1] % 4 == 0

    def memory(arms):
        return foretell(config, model, plan, sizes, remat_of_run(config, model, arms), arms)

    # Room is made on all of them.
    assert memory(5) == memory(8) != memory(9)
    # Fewer than devices, or of weights that are split, are split themselves.
    assert [four.arm_slots(arms) for arms in (1, 3, 4, 5)] == [1, 3, 4, 8]
    assert dataclasses.replace(four, weight_shards=2).arm_slots(5) == 5
