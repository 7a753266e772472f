"""A study's runs in small: nothing that its analysis reads is missing."""

import json
import tarfile

from jaxgrpo.records.run_directory import read_jsonl
from scripts import pack_study


def make_run(root, name, verdict):
    run = root / name
    (run / "eval").mkdir(parents=True)
    (run / "checkpoints").mkdir()
    (run / "checkpoints" / "weights").write_bytes(b"\0" * 1000)
    (run / ".lock").write_text("host")
    (run / "summary.json").write_text("{}")
    record = {
        "prompt": "1 + 1 = ?",
        "answer": "#### 2",
        "completions": ["long"],
        "extracted": ["2"],
    }
    (run / "eval" / "step_000001.jsonl").write_text(json.dumps(record | {"correct": [verdict]}))
    norms = {view: {"q_proj": {"a": [0.123456789]}} for view in ("l2", "rms")} | {"step": 1}
    (run / "layer_grad_norms.jsonl").write_text(json.dumps(norms) + "\n")


def pack(root, out, monkeypatch):
    monkeypatch.setattr("sys.argv", ["pack_study.py", str(root), str(out)])
    return pack_study.main()


def test_verdicts_and_norms_are_kept_and_texts_and_weights_are_not(tmp_path, monkeypatch, capsys):
    root = tmp_path / "study"
    for name in ("arms/uniform-r4-s1", "profiles/grpo", "probes/uniform-1"):
        make_run(root, name, True)
    (root / "config.yaml").write_text("steps: 1\n")
    assert pack(root, tmp_path / "one.tar.xz", monkeypatch) == 0
    assert capsys.readouterr().out.split() == sorted(
        ["arms/uniform-r4-s1", "profiles/grpo", "probes/uniform-1"]
    )
    with tarfile.open(tmp_path / "one.tar.xz") as archive:
        archive.extractall(tmp_path / "again", filter="data")
    again = tmp_path / "again"
    assert not list(again.rglob("weights")) and not list(again.rglob(".lock"))
    (record,) = read_jsonl(again / "arms/uniform-r4-s1/eval/step_000001.jsonl")
    assert record == {"prompt": "1 + 1 = ?", "answer": "#### 2", "correct": [True]}

    def norms(name):
        return read_jsonl(again / name / "layer_grad_norms.jsonl")[0]

    assert norms("profiles/grpo")["l2"]["q_proj"]["a"] == [0.123456789]
    assert norms("profiles/grpo")["rms"]["q_proj"]["a"] == [0.1235]
    assert norms("probes/uniform-1")["l2"]["q_proj"]["a"] == [0.1235]
    assert "rms" in norms("probes/uniform-1") and set(norms("arms/uniform-r4-s1")) == {"step", "l2"}
    # The same runs, packed from another place, are the same bytes.
    assert pack(again, tmp_path / "two.tar.xz", monkeypatch) == 0
    assert (tmp_path / "one.tar.xz").read_bytes() == (tmp_path / "two.tar.xz").read_bytes()


def test_what_is_no_study_is_refused_in_one_line(tmp_path, monkeypatch, capsys):
    assert pack(tmp_path, tmp_path / "x.tar.xz", monkeypatch) == 2
    assert capsys.readouterr().err == f"error: {tmp_path} holds no study: it has no config.yaml\n"
