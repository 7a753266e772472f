"""`check`: whether a run can be: everything loaded here, or compiled for devices elsewhere."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from typing import Any

from rich.console import Console

from jaxgrpo.commands.command import Command
from jaxgrpo.config import Config, ConfigError

EXIT_TOO_LARGE = 1


@dataclass(frozen=True)
class CheckSettings(Config):
    """A run's settings, and what to compile them for."""

    topology: str | None = None
    """A TPU slice, written --topology v5e:4x4."""
    devices: int | None = None
    """So many devices of this machine, written --devices 8; without an accelerator they are
    simulated."""
    arms: int | None = None
    """Compile for so many arms side by side, written --arms 4."""
    quick: bool = False
    """Compile with less effort, written --quick."""

    def plain(self) -> Config:
        """The run's own settings."""
        return Config(**{f.name: getattr(self, f.name) for f in dataclasses.fields(Config)})


def take_options(words: list[str]) -> tuple[list[str], dict[str, Any]]:
    """Splits --topology, --devices, --arms and --quick off."""
    rest, found = [], {}
    pending = list(words)
    while pending:
        name, equals, value = pending.pop(0).partition("=")
        if name == "--quick" and not equals:
            found["quick"] = True
            continue
        if name not in ("--topology", "--devices", "--arms"):
            rest.append(name + equals + value)
            continue
        if not equals:
            if not pending:
                raise ConfigError(f"{name} needs a value, for instance --topology v5e:4x4")
            value = pending.pop(0)
        found[name[2:]] = value
    if "topology" in found and "devices" in found:
        raise ConfigError("--topology and --devices both say where; give one of them")
    if "quick" in found and "topology" not in found:
        raise ConfigError("--quick is about compiling for TPUs; it goes with --topology")
    if "arms" in found and not found.keys() & {"topology", "devices"}:
        raise ConfigError("--arms is about compiling; it goes with --topology or --devices")
    for name in found.keys() & {"devices", "arms"}:
        if not found[name].isdecimal() or not 1 <= int(found[name]) <= 4096:
            raise ConfigError(f"--{name} {found[name]!r:.20} is no number from 1 to 4096")
        found[name] = int(found[name])
    return rest, found


def run(settings: CheckSettings, console: Console) -> int:
    if settings.topology is None and settings.devices is None:
        return load_all(settings.plain(), console)
    return compile_for(settings, console)


def load_all(config: Config, console: Console) -> int:
    """Reads model, data, plan and rewards as training does."""
    import jax

    from jaxgrpo.commands.plan import print_plan
    from jaxgrpo.session import open_session

    session = open_session(config, console)
    print_plan(session.plan, session.model_config, console)
    model = session.model_config
    console.print(
        f"model {session.model_dir}: {model.num_parameters:,} parameters, {model.num_layers} "
        f"layers, {model.dtype}\n"
        f"data: {len(session.train_prompts):,} training and {len(session.eval_prompts):,} "
        f"evaluation prompts\n"
        f"mesh {dict(session.mesh.shape)} on {jax.devices()[0].device_kind}"
    )
    return 0


def compile_for(settings: CheckSettings, console: Console) -> int:
    """Compiles the rollout and the train step for a slice or a simulated mesh."""
    from jaxgrpo.ahead.chips import parse_topology

    topology = None if settings.topology is None else parse_topology(settings.topology)
    if topology is None:
        _simulate(int(settings.devices or 1))
    else:
        # Nothing here is a TPU, and libtpu shall not look for one.
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
    from jaxgrpo.ahead.devices import shapes_of, slice_devices
    from jaxgrpo.ahead.report import print_estimate
    from jaxgrpo.ahead.suggest import suggest

    config = settings.plain()
    model, plan = shapes_of(config, topology)
    if topology is None:
        devices, chip = local_devices(int(settings.devices or 1)), None
    else:
        devices, chip = slice_devices(topology), topology.chip

    def examine(config: Config, devices: Any) -> Any:
        from jaxgrpo.ahead.estimate import estimate
        from jaxgrpo.mesh import make_mesh
        from jaxgrpo.session import check_divisible, check_model_axis

        mesh = make_mesh(config.mesh, devices)
        check_divisible(config, mesh)
        check_model_axis(model, mesh)
        return estimate(config, model, plan, mesh, chip, settings.quick, settings.arms or 1)

    found = examine(config, devices)
    where = str(topology) if topology else f"{len(devices)} x {devices[0].device_kind}"
    print_estimate(found, plan, where, chip, console)
    if not found.shortfall:
        return 0
    short = ", ".join(sorted(found.short_phases))
    console.print(
        f"does not fit: {found.shortfall / 2**30:.2f} GiB short per chip ({short})", highlight=False
    )
    if topology is None or chip is None:
        return EXIT_TOO_LARGE
    console.print("looking for a change that fits")
    better = suggest(
        config, model, plan, topology, lambda changed, t: examine(changed, slice_devices(t))
    )
    if better is None:
        console.print("none was found among meshes, micro-batches, batches and larger slices")
        return EXIT_TOO_LARGE
    words, fits = better
    console.print(
        f"this fits, with {max(fits.phases.values()) / 2**30:.2f} of {chip.hbm_bytes / 2**30:.2f} "
        f"GiB per chip: {' '.join(words)}",
        highlight=False,
        soft_wrap=True,
    )
    return EXIT_TOO_LARGE


def _simulate(count: int) -> None:
    """Makes jax show that many CPU devices, if it has not started yet."""
    import jax

    if os.environ.get("JAX_PLATFORMS", "cpu") == "cpu" and count > 1:
        try:
            jax.config.update("jax_num_cpu_devices", count)
        except RuntimeError:
            return  # it has; what there is, is counted below


def local_devices(count: int) -> list[Any]:
    """The first `count` devices of this machine.

    Raises:
        ConfigError: there are not so many.
    """
    import jax

    devices = jax.devices()
    if len(devices) < count:
        raise ConfigError(
            f"--devices {count}: there are {len(devices)} of kind {devices[0].device_kind}; on a "
            "machine with an accelerator JAX_PLATFORMS=cpu simulates them"
        )
    return devices[:count]


CHECK = Command(
    run,
    "load everything, or compile for a TPU slice that is not here",
    "Reads model, data, plan and rewards as train does and writes nothing. --dry-run\n"
    "reads even less: the model's config.json, and no weights.\n\n"
    "  --topology v5e:4x4   compile the run's own programs for that slice, here:\n"
    "                       does it fit, operations, traffic, time, tokens/s, and\n"
    "                       what to change if it does not fit (needs libtpu)\n"
    "  --quick              that in a third of the time: fit, operations and traffic\n"
    "                       as above, but more bytes, and steps up to 40 % longer\n"
    "  --devices 8          the same for a mesh of simulated CPU devices\n"
    "  --arms 4             the same of four arms that a study trains side by side\n\n"
    "A run that does not fit ends with 1.",
    "check lora.rank=4",
    config=CheckSettings,
    collects=take_options,
    dry_run=True,
)
