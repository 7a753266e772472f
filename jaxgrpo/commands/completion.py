"""`completion`: a script that lets bash or zsh complete commands, settings and files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from rich.console import Console

from jaxgrpo.commands.command import Command, setting_names
from jaxgrpo.config import ConfigError

SHELLS = ("bash", "zsh")

_SCRIPT = """\
_jaxgrpo() {{
    local current="${{COMP_WORDS[COMP_CWORD]}}" words
    case "${{COMP_WORDS[1]}}" in
{cases}
        *) words="{default}" ;;
    esac
    if [ "$COMP_CWORD" -eq 1 ]; then words="{commands} $words"; fi
    COMPREPLY=($(compgen -W "$words" -- "$current") $(compgen -f -- "$current"))
    if [ "${{#COMPREPLY[@]}}" -eq 1 ] && [[ "${{COMPREPLY[0]}}" == *= ]]; then
        compopt -o nospace 2>/dev/null
    fi
}}
complete -o filenames -F _jaxgrpo jaxgrpo
"""


@dataclass(frozen=True)
class CompletionSettings:
    """Which shell."""

    shell: str = ""

    def __post_init__(self) -> None:
        if self.shell not in SHELLS:
            raise ConfigError(f"completion knows {' and '.join(SHELLS)}, not '{self.shell}'")


def completion_script(shell: str, commands: Mapping[str, Command]) -> str:
    """The script; bash's own, which zsh runs too."""

    def words(command: Command) -> str:
        found = [f"{name}=" for name in setting_names(command.config)]
        return " ".join([*found, *(["--dry-run"] if command.dry_run else []), "--help"])

    cases = "\n".join(f'        {name}) words="{words(c)}" ;;' for name, c in commands.items())
    script = _SCRIPT.format(
        cases=cases, default=words(commands["train"]), commands=" ".join(commands)
    )
    return script if shell == "bash" else f"autoload -U +X bashcompinit && bashcompinit\n{script}"


def make_completion(commands: Mapping[str, Command]) -> Command:
    """The command, which knows all the others."""

    def run(settings: CompletionSettings, console: Console) -> int:
        print(completion_script(settings.shell, commands), end="")
        return 0

    return Command(
        run,
        "print a script that completes words in bash or zsh",
        "It completes the `jaxgrpo` program, which is what the package installs and the\n"
        "same as python -m jaxgrpo.run. To have it in every shell, put it in a file:\n\n"
        "  jaxgrpo completion bash > ~/.local/share/bash-completion/completions/jaxgrpo",
        "completion bash",
        config=CompletionSettings,
        positional="shell",
    )
