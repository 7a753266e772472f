"""Compiles a run for slices of growing size and writes the table of docs/scaling.md.

    python scripts/scaling_table.py OUT.json [--chip v5e] [--sizes 8 16 32 64 128 256]

Weak scaling: four prompts of eight completions per batch shard. A result that OUT.json has already
is kept, so that the command can be stopped and run again.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import time
from pathlib import Path

PROMPTS = 4
"""Per shard of the batch."""
MODEL_AXIS = {"1.5b": 1, "7b": 4}
"""Chips that share a copy of the sampler's weights: 7B does not fit one v5e chip."""


def measure(size: str, chips: int, chip: str) -> dict:
    """One model on one slice."""
    from jaxgrpo.ahead.chips import CHIPS, smallest_topology
    from jaxgrpo.ahead.devices import shapes_of, slice_devices
    from jaxgrpo.ahead.estimate import estimate
    from jaxgrpo.ahead.programs import replace_mesh
    from jaxgrpo.config_files import load_config
    from jaxgrpo.mesh import make_mesh

    topology = smallest_topology(CHIPS[chip], chips)
    assert topology is not None and topology.chips == chips, (chip, chips)
    part = MODEL_AXIS[size]
    shards = chips // part
    fsdp = min(4, shards) if part > 1 else 1
    root = Path(__file__).resolve().parent.parent
    path = root / "tpu" / ("v5e-16_1.5b.yaml" if size == "1.5b" else "v5e-64_7b.yaml")
    config = replace_mesh(load_config([path]), shards // fsdp, fsdp, part)
    grpo = dataclasses.replace(config.grpo, prompts_per_step=PROMPTS * shards)
    config = dataclasses.replace(config, grpo=grpo)
    model, plan = shapes_of(config, topology)
    start = time.monotonic()
    found = estimate(config, model, plan, make_mesh(config.mesh, slice_devices(topology)),
                     topology.chip)  # fmt: skip
    programs = {
        name: {
            "seconds": program.seconds,
            "communication": program.communication,
            "flops": program.counts.flops,
            "bytes": program.counts.bytes,
            "collectives": [
                {"kind": kind, "devices": devices, "count": c.count, "bytes": c.bytes}
                for (kind, devices), c in sorted(program.counts.collectives.items())
                if devices > 1
            ],
        }
        for name, program in found.programs.items()
    }
    return {
        "model": size,
        "topology": str(topology),
        "chips": chips,
        "mesh": found.mesh,
        "prompts": grpo.prompts_per_step,
        "fits": not found.shortfall,
        "gib": max(found.phases.values()) / 2**30,
        "of_gib": topology.chip.hbm_bytes / 2**30,
        "step_s": found.step_seconds,
        "tokens_per_s": found.tokens_per_second,
        "resharded_gib": found.resharded / 2**30,
        "programs": programs,
        "compiled_in_s": time.monotonic() - start,
    }


def row(found: dict) -> str:
    """One line of the table."""
    mesh = "x".join(str(n) for n in found["mesh"].values())
    every = [c for p in found["programs"].values() for c in p["collectives"]]
    sent = sum(c["bytes"] for c in every) / 1e9
    talking = sum(p["communication"] for p in found["programs"].values())
    return (
        f"| {found['model'].upper()} | {found['topology']} | {mesh} | {found['prompts']} | "
        f"{found['gib']:.1f} of {found['of_gib']:.2f} | {found['step_s']:.2f} | {talking:.2f} | "
        f"{sum(c['count'] for c in every):,.0f} | {sent:.1f} | {found['tokens_per_s']:,.0f} | "
        f"{found['tokens_per_s'] / found['chips']:,.0f} |"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--chip", default="v5e")
    parser.add_argument("--models", nargs="+", default=list(MODEL_AXIS))
    parser.add_argument("--sizes", nargs="+", type=int, default=[8, 16, 32, 64, 128, 256])
    args = parser.parse_args()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    from jaxgrpo.run import quiet_libtpu

    quiet_libtpu()
    known = json.loads(args.out.read_text()) if args.out.exists() else {}
    for chips in args.sizes:
        for size in args.models:
            name = f"{args.chip}-{chips}-{size}"
            if name not in known:
                known[name] = measure(size, chips, args.chip)
                args.out.write_text(json.dumps(known, indent=1) + "\n")
            print(row(known[name]), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
