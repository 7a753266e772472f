"""`chat`: what the model says to a prompt, without and with the adapter."""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.panel import Panel
from rich.text import Text

from jaxgrpo.commands.command import Command
from jaxgrpo.commands.training import OF_TRAINING
from jaxgrpo.config import Config, ConfigError


@dataclass(frozen=True)
class ChatSettings(Config):
    """A run's settings, and what to say."""

    prompt: str | None = None
    """Default: prompts are read line by line."""


def run(settings: ChatSettings, console: Console) -> int:
    chat = Chat(settings)
    if settings.prompt is not None:
        chat.say(settings.prompt, console)
        return 0
    if sys.stdin.isatty():
        console.print("a prompt a line; an empty line ends")
    while True:
        try:
            prompt = input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return 0
        if not prompt.strip():
            return 0
        chat.say(prompt, console)


class Chat:
    """A loaded model with the adapters to compare."""

    def __init__(self, config: Config) -> None:
        import jax

        from jaxgrpo.checkpoint import check_same_policy, read_adapter
        from jaxgrpo.mesh import replicate
        from jaxgrpo.model.api import device_plan, make_decode_weights
        from jaxgrpo.records.run_directory import RunDirectory
        from jaxgrpo.rollout.engine import make_generate
        from jaxgrpo.session import open_model
        from jaxgrpo.types import Adapters

        # A prompt of a chat may be longer than those of a run.
        data = dataclasses.replace(config.data, max_prompt_tokens=2**15)
        self._config = dataclasses.replace(config, data=data)
        self._model = open_model(config)
        model_config, base = self._model.load()
        run = RunDirectory(config.run_dir)  # type: ignore[arg-type]
        saved = read_adapter(run.checkpoints)
        lora, plan, name = None, self._model.plan, ""
        if saved is not None:
            check_same_policy(saved.config, config, run.root)
            lora, plan, name = saved.lora, saved.plan, f"{config.run_dir} after step {saved.step}"
        elif self._model.adapter is not None:
            from jaxgrpo.model.api import init_lora

            fresh = init_lora(model_config, plan, jax.random.key(0))
            lora, name = self._model.adapter.start(fresh, plan), str(config.lora.adapter)
        rollout = dataclasses.replace(
            config.rollout,
            temperature=config.eval.temperature,
            max_completion_tokens=config.eval_max_completion_tokens,
        )
        with jax.set_mesh(self._model.mesh):
            self._generate = make_generate(model_config, rollout, self._model.stop, 1)
            self._policies = {"base model": make_decode_weights(model_config, base, None)}
            if lora is not None:
                adapters = replicate(self._model.mesh, Adapters(lora, device_plan(plan)))
                self._policies[name] = make_decode_weights(model_config, base, adapters)

    def say(self, prompt: str, console: Console) -> None:
        """Prints every policy's completion."""
        for name, text in self.complete(prompt).items():
            console.print(Panel(Text(text), title=name, title_align="left"))
        if len(self._policies) == 1:
            console.print("there is no adapter: give a RUN_DIR or lora.adapter=DIRECTORY")

    def complete(self, prompt: str) -> dict[str, str]:
        """Policy -> completion."""
        import jax

        from jaxgrpo.mesh import Purpose, batch_shards, fold_key, shard_rows, to_host
        from jaxgrpo.tasks.data import PromptSource
        from jaxgrpo.tasks.data_sets import Problem
        from jaxgrpo.tasks.texts import completion_texts

        if not prompt.strip():
            raise ConfigError("prompt is empty")
        source = PromptSource([Problem(prompt, "", 0)], self._model.tokenizer, self._config.data)
        # Rows must divide over the mesh; the prompt fills them all.
        batch, _ = source.sequential(0, batch_shards(self._model.mesh), 1)
        key = fold_key(self._config.seed, 0, Purpose.EVAL)
        completions: dict[str, Any] = {}
        with jax.set_mesh(self._model.mesh):
            tokens, mask = shard_rows(self._model.mesh, (batch.tokens, batch.mask))
            for name, weights in self._policies.items():
                rollout = to_host(self._generate(weights, tokens, mask, key))
                stops = self._config.rollout.stop_strings
                texts = completion_texts(self._model.tokenizer, rollout, stops)
                completions[name] = texts[0]  # the others are copies of it
        return completions


CHAT = Command(
    run,
    "what the model says to a prompt, without and with the adapter",
    "A RUN_DIR gives the settings and the newest checkpoint; or name a PEFT adapter\n"
    "with lora.adapter=DIRECTORY. Without prompt= it reads prompts line by line.\n\n"
    '  prompt="..."           one prompt, then it ends\n'
    "  eval.temperature=0.7   sample; the default, 0, is greedy\n"
    "  eval.max_completion_tokens=100",
    'chat runs/try prompt="Tom has 3 apples and buys 4. Sum?"',
    config=ChatSettings,
    fixed=OF_TRAINING,
)
