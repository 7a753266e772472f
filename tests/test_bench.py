"""`bench` at a tiny size, on the mesh that its settings name."""

import json

import pytest

from jaxgrpo.run import main

TINY = [
    "bench.preset=embedded",
    "bench.num_layers=1",
    "bench.prompt_tokens=8",
    "bench.repeats=1",
    "lora.rank=2",
    "rollout.max_completion_tokens=8",
    "grpo.prompts_per_step=4",
    "grpo.group_size=2",
    "grpo.micro_batches=1",
]


def test_a_step_is_measured_on_the_mesh_that_is_named(tmp_path, capsys):
    out = tmp_path / "figures.json"
    mesh = ["mesh.data=2", "mesh.fsdp=2", "mesh.model=2"]
    assert main(["bench", "step", *TINY, *mesh, f"bench.out={out}", "bench.breakdown=true"]) == 0
    found = json.loads(out.read_text())
    parts = ("step_s", "rollout_s", "host_s", "train_s", "prefill_s", "forward_backward_s")
    assert all(found[name] > 0 for name in parts), found
    assert found["mesh"] == {"data": 2, "fsdp": 2, "model": 2}
    assert "step_s" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("word", "message"),
    [("mesh.data=3", "needs 3 devices"), ("grpo.prompts_per_step=3", "does not divide")],
)
def test_a_mesh_that_cannot_be_is_refused_as_training_refuses_it(capsys, word, message):
    words = [word, "mesh.fsdp=1", "mesh.model=1"]
    assert main(["bench", "train", *TINY, *words]) == 2
    assert message in capsys.readouterr().err
