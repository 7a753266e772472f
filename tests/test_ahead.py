"""Ahead of time: counts of compiled programs, topologies, what fits, and the slices in tpu/."""

import dataclasses
import json
import math
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgrpo.ahead.chips import CHIPS, Topology, parse_topology, slice_shapes
from jaxgrpo.ahead.devices import shapes_of
from jaxgrpo.ahead.estimate import Program, needed_bytes
from jaxgrpo.ahead.flops import rollout_flops, train_hardware_flops
from jaxgrpo.ahead.hlo import count
from jaxgrpo.ahead.programs import Lowered
from jaxgrpo.ahead.report import uncounted_lines
from jaxgrpo.ahead.suggest import candidates, describe
from jaxgrpo.config import ConfigError, MeshConfig
from jaxgrpo.config_files import load_config
from jaxgrpo.devices import Device, device_of
from jaxgrpo.mesh import make_mesh, sharding
from jaxgrpo.model.api import QwenConfig, base_logical_axes, bin_logprobs, init_base
from jaxgrpo.model.bins import take_bin
from jaxgrpo.model.hf_config import config_fields
from jaxgrpo.model.presets import PRESETS
from jaxgrpo.rollout import engine
from jaxgrpo.run import EMBEDDED_CONFIG, main
from jaxgrpo.train_batches import shard_batch
from tests.rows import random_rows, train_batch
from tests.test_layout import ROOT

SLICES = sorted((ROOT / "tpu").glob("v*.yaml"))
IN_CI = ("v5e-8_0.5b", "v5e-16_1.5b")


def topology_of(path: Path) -> str:
    return re.search(r"--topology (\S+)", path.read_text())[1]  # type: ignore[index]


def test_loops_count_as_often_as_they_run():
    def program(x, ws):
        def layer(x, w):
            y, _ = jax.lax.scan(lambda y, _: (jnp.tanh(y @ w), None), x, length=3)
            return y, None

        return jax.lax.scan(layer, x, ws)[0]

    x, ws = jnp.ones((16, 32)), jnp.ones((5, 32, 32))
    counts = count(jax.jit(program).lower(x, ws).compile().as_text())
    assert counts.flops == 5 * 3 * 2 * 16 * 32 * 32
    assert counts.unbounded_loops == 0 and not counts.collectives
    # Every product reads a matrix and a vector and writes one; what else is moved is small here.
    least = 5 * 3 * 4 * (32 * 32 + 2 * 16 * 32)
    assert least <= counts.bytes < 4 * least


def test_a_loop_that_may_end_early_counts_as_if_it_did_not():
    def program(x):
        def unfinished(carry):
            return (carry[0] < 11) & (jnp.sum(carry[1]) < 1e9)

        return jax.lax.while_loop(unfinished, lambda c: (c[0] + 1, c[1] @ c[1]), (start, x))

    for start in (0, 1):
        counts = count(jax.jit(program).lower(jnp.ones((8, 8))).compile().as_text())
        assert counts.flops == (11 - start) * 2 * 8**3
        jax.clear_caches()


def test_a_loop_that_goes_on_where_another_stopped_has_nothing_left():
    def run(carry, enough):
        def unfinished(carry):
            return (carry[0] < 11) & (jnp.sum(carry[1]) < enough)

        return jax.lax.while_loop(unfinished, lambda c: (c[0] + 1, c[1] @ c[1]), carry)

    def program(x):
        number, x = run((0, x), 1e6)
        return run((number, x[:4, :4]), 1e9)

    counts = count(jax.jit(program).lower(jnp.ones((8, 8))).compile().as_text())
    assert counts.flops == 11 * 2 * 8**3


def test_kernels_that_hide_their_operations_are_named():
    target = 'custom_call_target="mosaic_gpu_v2"'
    text = (
        "ENTRY %main (x: f32[8]) -> f32[8] {\n  %x = f32[8]{0} parameter(0)\n"
        f"  ROOT %r = f32[8]{{0}} custom-call(%x), {target}\n}}"
    )
    assert count(text).kernels == {"mosaic_gpu_v2"}
    assert not count(text.replace("mosaic_gpu_v2", "TopK")).kernels


UNKNOWN = """HloModule unknown

%unread (carry: (f32[512,1024])) -> pred[] {
  %carry = (f32[512,1024]) parameter(0)
  ROOT %go = pred[] constant(true)
}

%body (carry: (f32[512,1024])) -> (f32[512,1024]) {
  %carry = (f32[512,1024]) parameter(0)
  %x = f32[512,1024]{1,0} get-tuple-element(%carry), index=0
  %y = f32[512,1024]{1,0} swizzle(%x)
  %small = f32[8]{0} swizzle(%tiny)
  %z = f32[512,1024]{1,0} custom-call(%y), custom_call_target="somebody$elses"
  ROOT %again = (f32[512,1024]) tuple(%z)
}

ENTRY %main (x: f32[512,1024]) -> f32[512,1024] {
  %x = f32[512,1024]{1,0} parameter(0)
  %start = (f32[512,1024]) tuple(%x)
  %loop = (f32[512,1024]) while(%start), condition=%unread, body=%body
  ROOT %r = f32[512,1024]{1,0} get-tuple-element(%loop), index=0
}
"""


def test_what_cannot_be_counted_is_said():
    """Large instructions of unknown kinds by name, and loops of which no trip count is known."""
    counts = count(UNKNOWN)
    assert counts.unbounded_loops == 1
    assert counts.unknown == {"swizzle": 1, "custom-call to somebody$elses": 1}
    lines = " ".join(uncounted_lines(Program("train", counts, 0)))
    assert "swizzle (1 x)" in lines and "1 loops have no trip count" in lines
    assert not uncounted_lines(Program("train", count(NESTED), 0))


def test_collectives_are_counted_by_kind_group_and_size():
    mesh = make_mesh(MeshConfig(4, 1, 2))
    x = jax.ShapeDtypeStruct((8, 16), jnp.float32, sharding=sharding(mesh, ("act_batch", "mlp")))
    w = jax.ShapeDtypeStruct((16, 32), jnp.float32, sharding=sharding(mesh, ("mlp", "embed")))
    out = sharding(mesh, ("act_batch", None))
    compiled = jax.jit(lambda x, w: x @ w, out_shardings=out).lower(x, w).compile()
    counts = count(compiled.as_text(), 8)
    assert counts.flops == 2 * 2 * 8 * 32  # a quarter of the rows, half of what is summed over
    (((kind, size), found),) = counts.collectives.items()
    assert (kind, size, found.count, found.bytes) == ("all-reduce", 2, 1, 2 * 32 * 4)


NESTED = """HloModule nested

%slice (stack: f32[28,8,16], i: s32[]) -> f32[8,16] {
  %stack = f32[28,8,16]{2,1,0} parameter(0)
  %i = s32[] parameter(1)
  %zero = s32[] constant(0)
  %cut = f32[1,8,16]{2,1,0} dynamic-slice(%stack, %i, %zero, %zero), dynamic_slice_sizes={1,8,16}
  ROOT %flat = f32[8,16]{1,0} bitcast(%cut)
}

%product (stack: f32[28,8,16], i: s32[], x: f32[4,8], kept: f32[28,4,16]) -> f32[28,4,16] {
  %stack = f32[28,8,16]{2,1,0} parameter(0)
  %i = s32[] parameter(1)
  %x = f32[4,8]{1,0} parameter(2)
  %kept = f32[28,4,16]{2,1,0} parameter(3)
  %zero = s32[] constant(0)
  %w = f32[8,16]{1,0} fusion(%stack, %i), kind=kLoop, calls=%slice
  %y = f32[4,16]{1,0} dot(%x, %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %row = f32[1,4,16]{2,1,0} bitcast(%y)
  ROOT %put = f32[28,4,16]{2,1,0} dynamic-update-slice(%kept, %row, %i, %zero, %zero)
}

ENTRY %main (stack: f32[28,8,16], i: s32[], x: f32[4,8], kept: f32[28,4,16]) -> f32[28,4,16] {
  %stack = f32[28,8,16]{2,1,0} parameter(0)
  %i = s32[] parameter(1)
  %x = f32[4,8]{1,0} parameter(2)
  %kept = f32[28,4,16]{2,1,0} parameter(3)
  ROOT %all = f32[28,4,16]{2,1,0} fusion(%stack, %i, %x, %kept), kind=kOutput, calls=%product
}
"""


STARTED = """HloModule started

%start (part: bf16[8,16]) -> (bf16[8,16], bf16[32,16], u32[]) {
  %part = bf16[8,16]{1,0} parameter(0)
  %all-gather.1 = bf16[32,16]{1,0} all-gather(%part), channel_id=3, replica_groups=[2,4]<=[8], dimensions={0}
  ROOT %begin = (bf16[8,16]{1,0}, bf16[32,16]{1,0}, u32[]) custom-call(%all-gather.1), custom_call_target="AsyncCollectiveStart"
}

%meanwhile (part: bf16[8,16], all: bf16[32,16], flag: u32[], x: f32[4,4]) -> (f32[4,4], bf16[8,16], bf16[32,16], bf16[32,16], u32[]) {
  %part = bf16[8,16]{1,0} parameter(0)
  %all = bf16[32,16]{1,0} parameter(1)
  %flag = u32[] parameter(2)
  %x = f32[4,4]{1,0} parameter(3)
  %y = f32[4,4]{1,0} negate(%x)
  %all-gather.2 = bf16[32,16]{1,0} all-gather(%part), channel_id=3, replica_groups=[2,4]<=[8], dimensions={0}
  ROOT %results = (f32[4,4]{1,0}, bf16[8,16]{1,0}, bf16[32,16]{1,0}, bf16[32,16]{1,0}, u32[]) tuple(%y, %part, %all, %all-gather.2, %flag)
}

%done (part: bf16[8,16], all: bf16[32,16], flag: u32[]) -> bf16[32,16] {
  %part = bf16[8,16]{1,0} parameter(0)
  %all = bf16[32,16]{1,0} parameter(1)
  %all-gather.3 = bf16[32,16]{1,0} all-gather(%part), channel_id=3, replica_groups=[2,4]<=[8], dimensions={0}
  %flag = u32[] parameter(2)
  ROOT %end = bf16[32,16]{1,0} custom-call(%part, %all, %all-gather.3, %flag), custom_call_target="AsyncCollectiveDone"
}

ENTRY %main (part: bf16[8,16], x: f32[4,4]) -> (f32[4,4], bf16[32,16]) {
  %part = bf16[8,16]{1,0} parameter(0)
  %x = f32[4,4]{1,0} parameter(1)
  %first = (bf16[8,16]{1,0}, bf16[32,16]{1,0}, u32[]) fusion(%part), kind=kCustom, calls=%start
  %p1 = bf16[8,16]{1,0} get-tuple-element(%first), index=0
  %a1 = bf16[32,16]{1,0} get-tuple-element(%first), index=1
  %f1 = u32[] get-tuple-element(%first), index=2
  %beside = (f32[4,4]{1,0}, bf16[8,16]{1,0}, bf16[32,16]{1,0}, bf16[32,16]{1,0}, u32[]) fusion(%p1, %a1, %f1, %x), kind=kOutput, calls=%meanwhile
  %y = f32[4,4]{1,0} get-tuple-element(%beside), index=0
  %p2 = bf16[8,16]{1,0} get-tuple-element(%beside), index=1
  %a2 = bf16[32,16]{1,0} get-tuple-element(%beside), index=2
  %f2 = u32[] get-tuple-element(%beside), index=4
  %all = bf16[32,16]{1,0} fusion(%p2, %a2, %f2), kind=kCustom, calls=%done
  ROOT %both = (f32[4,4]{1,0}, bf16[32,16]{1,0}) tuple(%y, %all)
}
"""  # noqa: E501


def test_a_collective_that_runs_beside_fusions_counts_once_and_not_as_their_memory():
    counts = count(STARTED)
    (((kind, size), found),) = counts.collectives.items()
    assert (kind, size, found.count, found.bytes) == ("all-gather", 4, 1, 32 * 16 * 2)
    assert counts.bytes == 2 * 4 * 4 * 4  # what is computed meanwhile


def test_groups_written_as_axes_of_a_mesh_have_their_size():
    line = "%r = f32[8]{0} all-reduce(%x), replica_groups=mesh['a'=1,'b'=4,'c'=2]"
    body = "ENTRY %main (x: f32[8]) -> f32[8] {\n  %x = f32[8]{0} parameter(0)\n  ROOT "
    for order in ("", ", device_ids=([2,4]T(1,0))"):
        counts = count(f"{body}{line}{order} {{'b'}}, to_apply=%add\n}}")
        assert list(counts.collectives) == [("all-reduce", 4)]


def test_of_a_stack_that_a_fusion_inside_a_fusion_slices_the_slice_is_read():
    counts = count(NESTED)
    assert counts.flops == 2 * 4 * 8 * 16
    index, update = 4, 4 * 4 * 16
    assert counts.bytes == 4 * 8 * 16 + index + 4 * 4 * 8 + 2 * update


def test_more_devices_take_more_places_in_chunks_as_long_as_before():
    """The head's table is read once a chunk: shorter ones would read it more often."""
    model = QwenConfig(64, 48, 80, 2, 4, 2, 12, tie_word_embeddings=False)
    whole = init_base(model, jax.random.key(0))
    chunk = 8
    for sizes in ((1, 1, 1), (2, 4, 1)):
        devices = math.prod(sizes)
        rows = random_rows(np.random.default_rng(0), 64, 2 * devices, 1, 5, 28)
        batch = train_batch(rows, shards=devices, advantages=np.ones(2 * devices))

        mesh = make_mesh(MeshConfig(*sizes), jax.devices()[:devices])
        model = dataclasses.replace(model, device=device_of(mesh))

        def loss(base, packing, model=model):
            found = bin_logprobs(
                model, base, None, take_bin(packing, jnp.int32(0)),
                temperature=1.0, chunk_tokens=chunk, remat="full",
            )  # fmt: skip
            return jnp.sum(found[0])

        with jax.set_mesh(mesh):
            base = jax.tree.map(
                lambda names, x, mesh=mesh: jax.device_put(x, sharding(mesh, names)),
                base_logical_axes(model),
                whole,
                is_leaf=lambda x: isinstance(x, tuple),
            )
            packing = shard_batch(mesh, batch).packing
            counts = count(jax.jit(loss).lower(base, packing).compile().as_text(), devices)
        # Two rows a device, of up to 4 + 28 places each: one bin of 64.
        assert packing.tokens.shape == (devices, 2, 64)
        assert max(times for _, _, times in counts.pieces) == 64 / chunk


def test_the_compilers_own_complaint_is_read():
    tail = "exceeds available HBM (15.75G). HLO module: jit_train_step."
    assert needed_bytes(f"the total memory required for HLO temporaries (20.5G) {tail}") == int(
        20.5 * 2**30
    )
    assert needed_bytes("Ran out of memory. Used 16.5G of 15.75G hbm.") == int(16.5 * 2**30)
    assert needed_bytes("something else") is None


def test_topologies():
    assert parse_topology("v5e:4x4") == Topology(CHIPS["v5e"], (4, 4))
    assert parse_topology("v5p:2x2x4").chips == 16
    assert [parse_topology(t).hosts for t in ("v5e:2x4", "v5e:4x4", "v5p:2x2x1")] == [1, 4, 1]
    for chip in CHIPS.values():
        for shape in slice_shapes(chip):
            assert str(parse_topology(str(Topology(chip, shape)))).startswith(chip.name)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--topology", "v5e:3x5"], "there is no such slice; v5e:4x4 is one"),
        (["--topology", "v7x:4x4"], "unknown chip 'v7x'"),
        (["--topology", "v5e:2x2x1"], "v5e slices have 2 dimensions"),
        (["--topology", "16"], "is not written as CHIP:AxB"),
        (["--topology"], "--topology needs a value"),
        (["--devices", "8", "--quick"], "it goes with --topology"),
        (["--arms", "4"], "it goes with --topology or --devices"),
        (["--devices", "1", "--arms", "x"], "--arms 'x' is no number from 1 to 4096"),
        (["--devices", "0"], "no number from 1 to 4096"),
        (["--devices=8", "--topology=v5e:4x4"], "give one of them"),
        (["--devices", "8", "mesh.data=3"], "needs 3 devices, there are 8"),
        (["--devices", "8", "mesh.fsdp=8", "grpo.prompts_per_step=4"], "does not divide over"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(words, message, capsys):
    assert main(["check", *words]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error and len(error.splitlines()) == 1


def test_compiled_operations_agree_with_the_formulas_on_a_simulated_mesh(capsys):
    small = ["rollout.max_completion_tokens=16", "grpo.micro_batches=2", "eval.batch_prompts=16"]
    assert main(["check", "--devices", "8", "mesh.fsdp=2", "mesh.model=2", *small]) == 0
    text = capsys.readouterr().out
    assert "weights laid out for sampling: each device receives" in text
    assert re.search(r"train: [0-9,]+ all-reduce over", text)
    for name in ("rollout", "train"):
        counted, formula = map(float, re.search(rf"{name} +([0-9.]+) +([0-9.]+)", text).groups())  # type: ignore[union-attr]
        assert counted == pytest.approx(formula, abs=0.002)


QK_NORM = {"head_dim": 64, "qkv_bias": False, "qk_norm": True}
"""As Qwen3 has it: heads that are more than the hidden size, and norms of their own."""


@pytest.mark.parametrize(
    ("program", "remat", "changes", "within"),
    [
        ("rollout", "full", {}, 0.05),
        ("train", "full", {}, 0.05),
        ("train", "products", {}, 0.05),
        ("train", "none", {}, 0.05),
        # Queries and keys computed again, because a norm follows them, would be 4 %.
        ("train", "products", QK_NORM, 0.01),
    ],
)
def test_operations_agree_within_five_percent(program, remat, changes, within):
    settings = ["rollout.max_completion_tokens=32", "grpo.micro_batches=2"]
    config = load_config([EMBEDDED_CONFIG], settings)
    model, plan = shapes_of(config, None)
    model = dataclasses.replace(model, **changes)
    mesh = make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])
    formulas = {
        "rollout": rollout_flops(config, model, plan),
        "train": train_hardware_flops(config, model, plan, remat),
    }
    counts = count(Lowered(config, model, plan, mesh, remat).compile(program).as_text())
    assert counts.flops == pytest.approx(formulas[program], rel=within)


def test_batches_that_may_shrink_count_as_if_they_did_not(monkeypatch):
    config = load_config([EMBEDDED_CONFIG], ["rollout.max_completion_tokens=32"])
    monkeypatch.setattr(engine, "MIN_BATCH", 17)
    model, plan = shapes_of(config, None)
    # What a GPU would run, of a vocabulary for which there is no kernel.
    model = dataclasses.replace(model, vocab_size=639, device=Device("gpu"))
    assert len(engine.batch_sizes(config.grpo.rows_per_step, model.device)) == 3
    mesh = make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])
    counts = count(Lowered(config, model, plan, mesh, "full").compile("rollout").as_text())
    assert counts.flops == pytest.approx(rollout_flops(config, model, plan), rel=0.05)


def test_what_does_not_fit_is_offered_the_least_change_first():
    path = ROOT / "tpu" / "v5e-64_7b.yaml"
    topology = parse_topology("v5e:8x8")
    words = ["mesh.data=64", "mesh.fsdp=1", "mesh.model=1"]
    config = load_config([path], words)
    model, plan = shapes_of(config, topology)
    offered = list(candidates(config, model, plan, topology))
    assert offered, "7B must fit on 64 chips in some way"
    first, where = offered[0]
    assert where == topology
    assert first.grpo.prompts_per_step == config.grpo.prompts_per_step
    said = describe(config, first, topology, where)
    changed = load_config([path], [*words, *said])
    assert changed == first
    with pytest.raises(ConfigError):
        parse_topology("v5e:")


@pytest.mark.parametrize(
    ("path", "quick"),
    [
        *(pytest.param(p, True, id=f"{p.stem}-quick") for p in SLICES if p.stem in IN_CI),
        *(pytest.param(p, False, marks=pytest.mark.slow, id=p.stem) for p in SLICES),
    ],
)
def test_every_slice_configuration_fits_its_slice(path, quick, capsys):
    pytest.importorskip("libtpu")
    words = ["--quick"] if quick else []
    assert main(["check", str(path), "--topology", topology_of(path), *words]) == 0
    check_operations(capsys.readouterr().out)


def check_operations(text):
    """A slice's time is told, and its operations agree with the formulas."""
    assert "completion tokens/s" in " ".join(text.split())
    for name in ("rollout", "train"):
        counted, formula = map(float, re.search(rf"{name} +([0-9.]+) +([0-9.]+)", text).groups())  # type: ignore[union-attr]
        assert counted == pytest.approx(formula, rel=0.05), name


@pytest.mark.parametrize("name", ["Qwen/Qwen3-0.6B", "Qwen/Qwen3-0.6B-Base"])
def test_a_published_size_is_known_by_its_name(name):
    config = load_config([EMBEDDED_CONFIG], [f"model.path={name}"])
    model, plan = shapes_of(config, parse_topology("v5e:2x4"))
    assert model == dataclasses.replace(PRESETS["qwen3-0.6b"], dtype="bfloat16")
    assert plan.layers == 28


def test_a_slice_of_qwen3_compiles(tmp_path, capsys):
    """Two of the 28 layers, on the mesh that the 0.5B trains on."""
    pytest.importorskip("libtpu")
    shapes = dataclasses.replace(PRESETS["qwen3-0.6b"], num_layers=2)
    (tmp_path / "config.json").write_text(json.dumps(config_fields(shapes)))
    path = ROOT / "tpu" / "v5e-8_0.5b.yaml"
    words = [f"model.path={tmp_path}", "--topology", topology_of(path), "--quick"]
    assert main(["check", str(path), *words]) == 0
    check_operations(capsys.readouterr().out)


@pytest.mark.slow
def test_a_suggestion_fits_when_it_is_taken(capsys):
    pytest.importorskip("libtpu")
    path = str(ROOT / "tpu" / "v5e-8_0.5b.yaml")
    large = ["grpo.micro_batches=1", "grpo.prompts_per_step=160", "--topology", "v5e:2x4"]
    assert main(["check", path, *large]) == 1
    text = " ".join(capsys.readouterr().out.split())
    assert re.search(r"does not fit: [0-9.]+ GiB short per chip", text)
    words = re.search(r"GiB per chip: (.*)$", text)[1].split()  # type: ignore[index]
    assert main(["check", path, *large, *words]) == 0


def test_slices_cover_chips_and_sizes():
    names = {path.stem.split("_")[0] for path in SLICES}
    assert names == {"v5e-8", "v5e-16", "v5e-64", "v5p-8", "v5p-32", "v6e-8", "v6e-64"}
    assert {path.stem.split("_")[1] for path in SLICES} == {"0.5b", "1.5b", "3b", "7b"}
    for path in SLICES:
        config = load_config([path])
        topology = parse_topology(topology_of(path))
        mesh = config.mesh
        assert mesh.data * mesh.fsdp * mesh.model == topology.chips, path
