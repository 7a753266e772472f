"""A result is known by what made it: another input makes another result or is refused."""

from __future__ import annotations

import json
import shutil

import pytest
from safetensors.numpy import load_file, save_file

from jaxgrpo.model.weights import EMBEDDED_DIR
from jaxgrpo.records.run_directory import read_jsonl
from jaxgrpo.run import main
from jaxgrpo.tasks.problems import make_problems
from tests.e2e.conftest import SMALL

RUN = [*SMALL, "lora.rank=4", "steps=2"]


def write_rows(path, start):
    rows = make_problems("train", start + 64)[start:]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A finished run on a data file of its own, at a learning rate of 0: nothing moves."""
    root = tmp_path_factory.mktemp("provenance")
    write_rows(root / "rows.jsonl", 0)
    words = [*RUN, f"data.path={root / 'rows.jsonl'}", "optim.learning_rate=0"]
    assert main([*words, f"run_dir={root / 'run'}"]) == 0
    return root, words


@pytest.fixture
def again(done, tmp_path):
    """A copy of it, and the words that made it."""
    root, words = done
    shutil.copytree(root / "run", tmp_path / "run")
    return tmp_path / "run", [*words, f"run_dir={tmp_path / 'run'}"]


def files(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def accuracies(run):
    summary = json.loads((run / "summary.json").read_text())
    return [summary[f"eval_{when}"]["eval/accuracy"] for when in ("before", "after")]


def test_before_and_after_are_made_with_the_same_settings(again):
    """A run that learns nothing has one accuracy, whatever its evaluation was before."""
    run, words = again
    before, after = accuracies(run)
    assert before == after
    assert main([*words, "eval.max_completion_tokens=4", "steps=3"]) == 0
    before, after = accuracies(run)
    assert before == after
    made = [json.loads((run / "eval" / f"step_00000{n}.json").read_text()) for n in (0, 3)]
    made = [record["made_with"] for record in made]
    assert made[0]["decoding"]["max_completion_tokens"] == 4
    first, last = (record.pop("policy") for record in made)
    assert first.startswith("the base model (sha256 ") and last == "step 3"
    assert made[0] == made[1]


def test_the_card_of_an_export_shows_the_settings_that_its_scores_are_of(again, tmp_path):
    """The checkpoint is of before the second evaluation, and so are its settings."""
    run, words = again
    assert main([*words, "eval.max_completion_tokens=4", "eval.problems=4"]) == 0
    assert main(["export", str(run), f"out={tmp_path / 'out'}"]) == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert "max_completion_tokens: 4" in card and "problems: 4" in card
    assert "problems: 8" not in card


def test_a_run_does_not_show_more_steps_than_it_was_asked_for(again, capsys):
    _, words = again
    assert main([*words, "steps=1"]) == 2
    assert "is after step 2, further than steps=1" in capsys.readouterr().err


def test_other_weights_in_the_same_place_are_another_model(tmp_path, capsys):
    model = tmp_path / "model"
    shutil.copytree(EMBEDDED_DIR, model)
    words = [*RUN, "steps=1", f"model.path={model}", f"run_dir={tmp_path / 'run'}"]
    words += ["eval.before_training=false", "eval.after_training=false"]
    assert main(words) == 0
    tensors = load_file(model / "model.safetensors")
    tensors["model.norm.weight"] = 2 * tensors["model.norm.weight"]
    save_file(tensors, model / "model.safetensors")
    capsys.readouterr()
    assert main(words) == 2
    assert f"model.path {model} holds other weights than" in capsys.readouterr().err


def test_what_was_evaluated_alike_is_not_evaluated_again(again, capsys):
    run, words = again
    kept = (run / "eval" / "step_000000.json").stat().st_mtime_ns
    assert main(words) == 0
    assert (run / "eval" / "step_000000.json").stat().st_mtime_ns == kept


def test_an_evaluation_by_hand_leaves_the_runs_own_alone(again, capsys):
    run, _ = again
    own = files(run / "eval") | files(run / "adapter")
    metrics = (run / "metrics.jsonl").read_bytes()
    for problems in (4, 8):
        assert main(["eval", str(run), f"eval.problems={problems}"]) == 0
    assert files(run / "eval") | files(run / "adapter") == own
    assert (run / "metrics.jsonl").read_bytes() == metrics
    made = sorted(run.glob("evaluations/*/step_000002.jsonl"))
    assert sorted(len(read_jsonl(path)) for path in made) == [4, 8]
    assert str(made[0].parent) in capsys.readouterr().out.replace("\n", "")


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("lora.adapter={run}/adapter", "lora.adapter was None, is {run}/adapter"),
        ("optim.learning_rate=0.5", "optim.learning_rate was 0.0, is 0.5"),
        ("lora={rank: 9}", "lora.rank was 4, is 9"),
        ("rewards.format=1", "rewards.gsm8k_answer was 1.0, is None"),
    ],
)
@pytest.mark.parametrize("command", ["eval", "chat"])
def test_a_setting_that_a_checkpoint_has_settled_is_refused(again, capsys, command, setting, said):
    run, _ = again
    words = [command, str(run), setting.replace("{run}", str(run))]
    assert main(words) == 2
    error = capsys.readouterr().err
    assert said.replace("{run}", str(run)) in error and "cannot take effect" in error
    assert error.count("\n") == 1


def test_an_adapter_named_in_a_file_is_refused_beside_a_checkpoint(again, capsys, tmp_path):
    run, _ = again
    (tmp_path / "c.yaml").write_text(f"lora: {{adapter: {run}/adapter}}\n")
    assert main(["eval", str(tmp_path / "c.yaml"), f"run_dir={run}", "eval.problems=8"]) == 2
    assert "lora.adapter" in capsys.readouterr().err


def test_settings_of_the_checkpoint_itself_may_be_given(again):
    assert main(["eval", *again[1]]) == 0


def test_other_rows_in_the_data_file_are_refused(again, done, tmp_path, capsys):
    write_rows(tmp_path / "rows.jsonl", 0)
    words = [w for w in again[1] if not w.startswith("data.path")]
    # The same rows elsewhere: another path is another setting, and said so.
    assert main([*words, f"data.path={tmp_path / 'rows.jsonl'}", "steps=3"]) == 2
    assert "data.path was" in capsys.readouterr().err
    rows = (done[0] / "rows.jsonl").read_text()
    try:
        write_rows(done[0] / "rows.jsonl", 64)
        assert main([*again[1], "steps=3"]) == 2
    finally:
        (done[0] / "rows.jsonl").write_text(rows)
    error = capsys.readouterr().err
    assert "holds other training rows" in error and "another run_dir" in error


@pytest.mark.parametrize("word", ["data.path=x", "model.path=x", "run_dir=x"])
def test_bench_refuses_what_it_has_no_use_for(word, capsys):
    assert main(["bench", word]) == 2
    assert f"{word.split('=')[0]} cannot take effect: bench" in capsys.readouterr().err


def test_a_study_from_an_adapter_is_refused(capsys):
    for command in ("study", "sweep"):
        code = main([command, "lora.adapter=x", "--dry-run"])
        assert code == 2
        assert "an adapter has its own ranks" in capsys.readouterr().err


def test_kl_is_to_what_training_starts_from(tmp_path):
    """As in TRL 1.16, which copies a given adapter as its reference: 0 at the first step, to the
    rounding of two programs, though the adapter is far from the base model; then it grows."""
    # Groups large enough that on any processor's roundings some have unequal rewards in step 1.
    start = [*RUN, "grpo.group_size=16", "optim.learning_rate=0.02", "eval.before_training=false"]
    assert (
        main([*start, f"run_dir={tmp_path / 'far'}", "steps=4", "eval.after_training=false"]) == 0
    )
    words = [*start, f"lora.adapter={tmp_path / 'far' / 'adapter'}", "grpo.kl_coef=0.05"]
    assert main([*words, f"run_dir={tmp_path / 'on'}"]) == 0
    kl = [r["kl"] for r in read_jsonl(tmp_path / "on" / "metrics.jsonl") if "kl" in r]
    assert abs(kl[0]) < 1e-6 and kl[1] > 1e-5
    # Resumed, the reference is still where it started and not where it was stopped.
    assert main([*words, f"run_dir={tmp_path / 'on'}", "steps=3"]) == 0
    longer = [r["kl"] for r in read_jsonl(tmp_path / "on" / "metrics.jsonl") if "kl" in r]
    assert longer[:2] == kl and longer[2] > 1e-5
