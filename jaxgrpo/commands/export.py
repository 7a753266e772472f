"""`export`: a run's adapter, or any PEFT adapter, for PEFT, for one-rank servers, or merged."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from jaxgrpo.commands.command import PROGRAM, Command
from jaxgrpo.config import ConfigError
from jaxgrpo.records.model_card import CardFacts, scores_of, write_card


@dataclass(frozen=True)
class ExportSettings:
    """What to export, and as what."""

    source: str = ""
    """A run directory (its newest checkpoint) or a directory with a PEFT adapter."""
    out: str = ""
    """The directory to write, which must not hold anything yet."""
    form: Literal["peft", "uniform_rank", "merged"] = "peft"
    """peft: ranks and alphas per module; uniform_rank: padded with zeros to one rank; merged: a
    whole model."""
    model: str | None = None
    """The base model, if it is not the one that the run or the adapter names."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of a merged model; auto: what the run computed in."""

    def __post_init__(self) -> None:
        check_places("export", self.source, self.out)


def check_places(name: str, source: str, out: str) -> None:
    """Raises ConfigError unless there is something to read and a free place to write."""
    if not source:
        raise ConfigError(f"{name} needs a DIRECTORY: a run's or a PEFT adapter's")
    if not out:
        raise ConfigError(f"{name} needs out=DIRECTORY to write to")
    if not Path(source).is_dir():
        raise ConfigError(f"{source} is not a directory")
    if Path(out).exists() and (not Path(out).is_dir() or any(Path(out).iterdir())):
        raise ConfigError(f"out: {out} is there already; choose another place or remove it")


def run(settings: ExportSettings, console: Console) -> int:
    from jaxgrpo.model.merged import save_merged
    from jaxgrpo.model.peft_files import write_peft
    from jaxgrpo.model.weights import read_qwen_config, resolve_model_dir
    from jaxgrpo.session import resolve_dtype

    adapter, facts, config = read_source(Path(settings.source), settings.model)
    out = Path(settings.out)
    if settings.form == "merged":
        if not adapter.base_model:
            raise ConfigError("the adapter names no base model; give model=DIRECTORY or a hub id")
        model_dir = resolve_model_dir(adapter.base_model, config.get("revision"))
        wanted = config.get("dtype", "auto") if settings.dtype == "auto" else settings.dtype
        model = read_qwen_config(model_dir, resolve_dtype(wanted))
        save_merged(out, adapter, model_dir, model)
    else:
        write_peft(out, adapter, uniform_rank=settings.form == "uniform_rank")
    words = [f"{PROGRAM} export {settings.source} out={settings.out} form={settings.form}"]
    words += [f"model={settings.model}"] if settings.model else []
    kind = "merged" if settings.form == "merged" else "peft"
    write_card(out, CardFacts(kind, adapter.base_model, " ".join(words), **facts))
    console.print(
        f"{out}: {adapter.parameters:,} adapter parameters, ranks up to {adapter.max_rank}, "
        f"form {settings.form}",
        highlight=False,
    )
    return 0


def read_source(source: Path, model: str | None) -> tuple[Any, dict, Mapping[str, Any]]:
    """The adapter of a run or of a PEFT directory, what a card can say of it, and the run's section
    `model`, empty for a PEFT directory."""
    import dataclasses

    from jaxgrpo.checkpoint import read_adapter
    from jaxgrpo.config_files import encode_config, load_config
    from jaxgrpo.evaluate import comparable, read_eval
    from jaxgrpo.model.adapters import adapter_from_lora
    from jaxgrpo.model.peft_files import CONFIG_FILE, read_peft
    from jaxgrpo.records.run_directory import RunDirectory

    if (source / CONFIG_FILE).exists():
        adapter = read_peft(source)
        if model:
            adapter = dataclasses.replace(adapter, base_model=model)
        return adapter, {"parameters": adapter.parameters}, {}
    files = RunDirectory(source)
    saved = read_adapter(files.checkpoints)
    if saved is None:
        raise ConfigError(f"{source} holds neither {CONFIG_FILE} nor a whole checkpoint of a run")
    adapter = adapter_from_lora(saved.lora, saved.plan, model or saved.config.model.path)
    before, after = (read_eval(files.eval, step) for step in (0, saved.step))
    if before and after and not comparable(before, after):
        before = None
    scores = {"before": before, "after": after}
    shown = saved.config
    if files.config.is_file():
        # A finished run may have been evaluated anew: these settings belong to its scores.
        now = load_config([files.config])
        shown = dataclasses.replace(shown, eval=now.eval, data=now.data)
    facts = {
        "config": encode_config(shown),
        "step": saved.step,
        "plan": saved.plan,
        "parameters": adapter.parameters,
        "scores": scores_of({name: r and r.metrics for name, r in scores.items()}),
    }
    return adapter, facts, facts["config"]["model"]


EXPORT = Command(
    run,
    "write an adapter for PEFT, with one rank, or merged in its model",
    "DIRECTORY is a run's (its newest checkpoint is taken) or a PEFT adapter's.\n\n"
    "  out=DIRECTORY   where to write; a README.md (model card) comes with it\n"
    "  form=           peft (default), uniform_rank (zero-padded, no patterns) or\n"
    "                  merged (a whole Hugging Face model directory)\n"
    "  model=          the base model, if not the one that is named inside\n"
    "  dtype=          of a merged model: float32 or bfloat16 (default: the run's)\n\n"
    "PEFT and vLLM read the same weights from form=peft, whatever the ranks.",
    "export runs/try out=runs/merged form=merged",
    config=ExportSettings,
    positional="source",
)
