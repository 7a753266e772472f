"""Orbax checkpoints: adapters, optimizer state, counters, and what they belong to.

Random keys and data order follow from (seed, step), so the step is the whole of their state; the
configuration, the plan and hashes of what was read are saved to refuse a resume that would not be
one. A manifest beside the state holds the sha256 of every array and of itself: what was not written
is never resumed from.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import logging
import os
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from jaxgrpo.config import Config, ConfigError
from jaxgrpo.config_files import encode_config
from jaxgrpo.identity import decode_recorded, first_difference, identity
from jaxgrpo.mesh import to_host
from jaxgrpo.rank_plan import RankPlan
from jaxgrpo.records.run_directory import hash_inputs
from jaxgrpo.types import TrainState, Tree


@dataclass(frozen=True)
class SavedAdapter:
    """What a checkpoint holds for everything but training: the adapters and their plan."""

    step: int
    config: Config
    plan: RankPlan
    lora: Tree


class Checkpoints:
    """The checkpoints of one run.

    Args:
        inputs: name -> hash of what the run reads, see `Session.inputs`.
    """

    def __init__(self, path: Path, keep: int, inputs: Mapping[str, str] | None = None) -> None:
        # Orbax logs every save and restore through absl, over the progress bar.
        logging.getLogger("absl").setLevel(logging.CRITICAL)
        self._path = path
        self._inputs = dict(inputs or {})
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, enable_async_checkpointing=False, create=True
        )
        self._manager = ocp.CheckpointManager(path.absolute(), options=options)

    def save(self, step: int, state: TrainState, config: Config, plan: RankPlan) -> None:
        """Writes the state after `step` steps; returns when it is on disk.

        Raises:
            OSError: the disk is full or the directory not writable.
        """
        if step in self._manager.all_steps():
            return
        manifest = {
            "next_step": step,
            "config": encode_config(config),
            "plan": plan.to_json(),
            "inputs": self._inputs,
            "arrays": array_hashes(to_host(state)),
        }
        manifest["sha256"] = hash_inputs(manifest)
        try:
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(state), manifest=ocp.args.JsonSave(manifest)
                ),
            )
            self._manager.wait_until_finished()
        except (OSError, ValueError) as error:
            # tensorstore reports a full disk as a ValueError.
            reason = (str(error).splitlines() or ["unknown"])[0]
            raise OSError(
                f"cannot write the checkpoint {self._path / str(step)}: {reason}"
            ) from error

    def check_resumable(self, config: Config, plan: RankPlan | None) -> None:
        """Raises what `restore_latest` would of another run's checkpoint, from its manifest alone:
        before weights are loaded."""
        for step in numbered(self._path):
            try:
                self._read_own(step, config, plan)
            except Exception as error:
                # Raises it, unless the checkpoint is damaged: then the next one counts.
                reason_of(error)
            else:
                return

    def _read_own(self, step: int, config: Config, plan: RankPlan | None) -> dict[str, Any]:
        """The manifest of a step, if it is of this very run."""
        manifest = read_manifest(self._path / str(step))
        check_same_run(manifest, config, plan, self._path.parent)
        check_same_inputs(manifest, self._inputs, config, self._path.parent)
        return manifest

    def restore_latest(
        self, fresh: TrainState, config: Config, plan: RankPlan | None
    ) -> tuple[TrainState, int, RankPlan] | None:
        """The newest whole state, its step and its plan, on the devices where `fresh` is.

        `plan` is what the plan must be; None: it moved during training and any will do.

        A checkpoint that is not what was written (a killed writer, a damaged disk) is named in a
        warning, set aside, and the one before it is taken.

        Raises:
            ConfigError: the run was made with another configuration or plan.
        """
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, fresh)
        for step in numbered(self._path):
            check_readable(self._path / str(step))
            try:
                manifest = self._read_own(step, config, plan)
                check_same_state(manifest["arrays"], abstract, self._path / str(step))
                args = ocp.args.Composite(state=ocp.args.StandardRestore(abstract))
                state = self._manager.restore(step, args=args)["state"]
                check_arrays(to_host(state), manifest["arrays"])
            except Exception as error:  # every layer of orbax and tensorstore raises its own
                self._set_aside(step, reason_of(error))
                continue
            return state, int(manifest["next_step"]), RankPlan.from_json(manifest["plan"])
        return None

    def _set_aside(self, step: int, reason: str) -> None:
        """Moves a damaged checkpoint away, so that its step can be saved again."""
        warnings.warn(
            f"checkpoint {self._path / str(step)} is damaged and was set aside: {reason}",
            stacklevel=3,
        )
        target = self._path.parent / f"damaged_checkpoint_{step}"
        if jax.process_index() == 0:
            with contextlib.suppress(OSError):
                shutil.rmtree(target, ignore_errors=True)
                (self._path / str(step)).rename(target)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("a damaged checkpoint is out of the way")
        self._manager.reload()


def read_adapter(path: Path) -> SavedAdapter | None:
    """The adapters of the newest whole checkpoint in a folder, on the host; changes nothing there.

    A damaged one is named in a warning and the one before it is taken.
    """
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    for step in numbered(path):
        check_readable(path / str(step))
        try:
            manifest = read_manifest(path / str(step))
            saved = ocp.PyTreeCheckpointer()
            folder = (path / str(step) / "state").absolute()
            metadata = saved.metadata(folder).item_metadata
            if metadata is None:
                raise DamagedError("its arrays are not described")
            # As numpy arrays: the devices that wrote it need not be here.
            args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), metadata.tree)
            lora = saved.restore(folder, restore_args=args)["lora"]
            recorded = manifest["arrays"]
            check_arrays(
                {"lora": lora}, {k: v for k, v in recorded.items() if k.startswith("lora/")}
            )
            plan = RankPlan.from_json(manifest["plan"])
            config = decode_recorded(manifest["config"], path / str(step))
        except Exception as error:  # as above
            reason = reason_of(error)
            warnings.warn(f"checkpoint {path / str(step)} is damaged: {reason}", stacklevel=2)
            continue
        return SavedAdapter(int(manifest["next_step"]), config, plan, lora)
    return None


def numbered(path: Path) -> list[int]:
    """The steps that have a folder, newest first, whether orbax takes them for finished or not."""
    if not path.is_dir():
        return []
    found = [
        int(f.name)
        for f in path.iterdir()
        if f.is_dir() and f.name.isascii() and f.name.isdecimal()
    ]
    return sorted(found, reverse=True)


def check_readable(folder: Path) -> None:
    """Raises PermissionError on the first file that may not be read: it is whole all the same."""
    for path in sorted(folder.rglob("*")):
        if not os.access(path, os.R_OK):
            raise PermissionError(errno.EACCES, f"no permission to read {path}")


class DamagedError(Exception):
    """A checkpoint is not what was written."""


def reason_of(error: Exception) -> str:
    """One line on why a checkpoint could not be read; what is not its fault is raised again."""
    if isinstance(error, ConfigError | MemoryError | jax.errors.JaxRuntimeError):
        raise error
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def array_hashes(tree: Any) -> dict[str, str]:
    """Path of every array on the host -> sha256 of its type, shape and values."""
    hashes = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        array = np.ascontiguousarray(leaf)
        digest = hashlib.sha256(f"{array.dtype.name}{np.shape(leaf)}".encode())
        digest.update(array.tobytes())
        hashes[jax.tree_util.keystr(path, simple=True, separator="/")] = digest.hexdigest()
    return hashes


def check_same_state(recorded: Mapping[str, str], fresh: TrainState, where: Path) -> None:
    """Raises ConfigError if a checkpoint holds other arrays than this run has."""
    names = {
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, _ in jax.tree_util.tree_leaves_with_path(fresh)
    }
    different = sorted(names ^ recorded.keys())
    if different:
        has = "has" if different[0] in recorded else "lacks"
        raise ConfigError(f"{where} {has} {different[0]}: it is of another kind of run or version")


def check_arrays(tree: Any, recorded: Mapping[str, str]) -> None:
    """Raises DamagedError naming the first array that is not the one recorded."""
    found = array_hashes(tree)
    for name in sorted(found.keys() | recorded.keys()):
        if found.get(name) != recorded.get(name):
            raise DamagedError(f"the array {name} is not the one that was written")


def read_manifest(folder: Path) -> dict[str, Any]:
    """What `save` wrote beside the state.

    Raises:
        DamagedError: it is not whole, or not what was written.
    """
    handler = ocp.Checkpointer(ocp.JsonCheckpointHandler())
    manifest = handler.restore((folder / "manifest").absolute())
    if not isinstance(manifest, dict):
        raise DamagedError("its manifest is not whole")
    body = {key: value for key, value in manifest.items() if key != "sha256"}
    if manifest.get("sha256") != hash_inputs(body):
        raise DamagedError("its manifest is not what was written")
    return body


def check_same_policy(saved: Config, config: Config, run_dir: Path) -> None:
    """Raises ConfigError unless a checkpoint's adapters are what these settings mean."""
    for name in ("path", "revision"):
        was, now = getattr(saved.model, name), getattr(config.model, name)
        if difference := first_difference(was, now, f"model.{name}"):
            raise ConfigError(f"{run_dir} was made with another model: {difference}")
    adapter = config.lora.adapter
    if adapter is not None and adapter != saved.lora.adapter:
        raise ConfigError(
            f"lora.adapter={adapter} cannot take effect: {run_dir} holds a checkpoint of its own; "
            "give another run_dir"
        )


def check_same_run(meta: dict, config: Config, plan: RankPlan | None, run_dir: Path) -> None:
    """Raises ConfigError naming the first setting in which a checkpoint differs from `config`."""
    # The plan itself, which says more than the path of its file.
    difference = plan and first_difference(meta["plan"], plan.to_json(), "plan")
    free = ["eval", "lora.plan"]
    if config.optim.schedule == "constant":
        free.append("steps")  # otherwise the learning rate of every step depends on it
    if "adapter" in meta.get("inputs", {}) and config.lora.adapter is not None:
        free.append("lora.adapter")  # known by its content, and so wherever it lies
    saved = decode_recorded(meta["config"], run_dir)
    difference = difference or first_difference(identity(saved, *free), identity(config, *free))
    if difference:
        raise ConfigError(
            f"{run_dir} was made with another configuration: {difference}; {_ANOTHER_PLACE}"
        )


def check_same_inputs(meta: dict, inputs: Mapping[str, str], config: Config, run_dir: Path) -> None:
    """Raises ConfigError if a checkpoint was made from other files than are there now.

    A checkpoint that recorded none says nothing about them.
    """
    where = {
        "model": f"model.path {config.model.path}",
        "train_prompts": f"data.path {config.data.path}",
        "adapter": config.lora.adapter,
    }
    for name, recorded in meta.get("inputs", {}).items():
        if recorded != inputs.get(name, recorded):
            raise ConfigError(
                f"{where.get(name, name)} holds other {_HELD[name]} than {run_dir} was made with; "
                f"{_ANOTHER_PLACE}"
            )


_HELD = {
    "model": "weights",
    "train_prompts": "training rows (or the tokenizer another template)",
    "adapter": "weights",
}
_ANOTHER_PLACE = "choose another run_dir, or remove this one to start over"
