"""`compress`: PARA's global cut of singular values on any PEFT LoRA adapter."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from rich.table import Table

from jaxgrpo.commands.command import PROGRAM, Command
from jaxgrpo.commands.export import check_places
from jaxgrpo.config import ConfigError

if TYPE_CHECKING:
    from jaxgrpo.model.peft_files import PeftAdapter


@dataclass(frozen=True)
class CompressSettings:
    """Which adapter, and how much of it to keep."""

    source: str = ""
    """A directory with a PEFT adapter, or a run directory."""
    out: str = ""
    energy: float | None = None
    """Keep the fewest singular values whose squares are this share of all."""
    rank_budget: int | None = None
    """Keep this many singular values."""
    parameters: float | None = None
    """Keep as many as fit into this share of the parameters."""

    def __post_init__(self) -> None:
        check_places("compress", self.source, self.out)
        if len(self.amount) != 1:
            raise ConfigError(
                "compress needs one of energy=SHARE, rank_budget=RANKS and parameters=SHARE"
            )

    @property
    def amount(self) -> dict[str, Any]:
        """Which criterion is given, and its value."""
        given = {name: getattr(self, name) for name in ("energy", "rank_budget", "parameters")}
        return {name: value for name, value in given.items() if value is not None}


def run(settings: CompressSettings, console: Console) -> int:
    from jaxgrpo.commands.export import read_source
    from jaxgrpo.model.peft_files import LoraModule, PeftAdapter, write_peft
    from jaxgrpo.records.model_card import CardFacts, write_card
    from jaxgrpo.study.compress import compress

    adapter, _, _ = read_source(Path(settings.source), None)
    used = {name: module for name, module in adapter.modules.items() if module.rank}
    # Every module of its own: an adapter from elsewhere need not have layers of one shape.
    found = compress(
        {name: module.a.T[None] for name, module in used.items()},
        {name: module.b.T[None] for name, module in used.items()},
        {name: np.array([module.rank]) for name, module in used.items()},
        {name: np.array([module.scale]) for name, module in used.items()},
        **settings.amount,
    )
    modules = {}
    for name, module in used.items():
        rank = int(found.ranks[name][0])
        a, b = found.a[name][0][:, :rank].T, found.b[name][0][:rank].T
        modules[name] = LoraModule(a.astype(np.float32), b.astype(np.float32), module.scale)
    small = PeftAdapter(adapter.base_model, modules)
    out = Path(settings.out)
    write_peft(out, small)
    share = small.parameters / adapter.parameters
    note = (
        f"Compressed from `{settings.source}` by one global cut of its singular values (PARA, "
        f"arXiv 2604.27796): {found.energy:.2%} of the energy in {share:.1%} of the parameters "
        f"({small.parameters:,} of {adapter.parameters:,})."
    )
    ((name, value),) = settings.amount.items()
    command = f"{PROGRAM} compress {settings.source} out={settings.out} {name}={value}"
    facts = CardFacts(
        "peft", adapter.base_model, command, parameters=small.parameters, notes=(note,)
    )
    write_card(out, facts)
    print_result(adapter, small, found.energy, out, console)
    return 0


def print_result(
    adapter: PeftAdapter, small: PeftAdapter, energy: float, out: Path, console: Console
) -> None:
    ranks = {"before": adapter, "after": small}
    table = Table(box=None, pad_edge=False)
    for heading in ("", "parameters", "ranks", "largest", "modules"):
        table.add_column(heading, justify="right" if heading else "left")
    for name, one in ranks.items():
        each = [module.rank for module in one.modules.values() if module.rank]
        table.add_row(name, f"{one.parameters:,}", str(sum(each)), str(max(each)), str(len(each)))
    console.print(table)
    saved = 1 - small.parameters / adapter.parameters
    console.print(
        f"{saved:.1%} fewer parameters, {energy:.2%} of the energy kept: {out}", highlight=False
    )


COMPRESS = Command(
    run,
    "cut an adapter's smallest singular values, all at once (PARA)",
    "DIRECTORY is any PEFT LoRA adapter, trained here or elsewhere, or a run's.\n"
    "Needs no data and no training; the result is a PEFT adapter of other ranks.\n\n"
    "  out=DIRECTORY    where to write it, with a README.md (model card)\n"
    "  energy=0.99      keep the fewest values that hold this share of the energy\n"
    "  rank_budget=64   or: keep this many values\n"
    "  parameters=0.25  or: keep as many as fit into this share of the parameters\n\n"
    "What it costs in accuracy: eval lora.adapter=OUT run_dir=runs/compressed",
    "compress runs/try/adapter out=runs/small energy=0.9",
    config=CompressSettings,
    positional="source",
)
