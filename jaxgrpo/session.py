"""Everything a run needs, built and checked from a Config before anything is written."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
from rich.console import Console

from jaxgrpo.config import Config, ConfigError, LoraConfig
from jaxgrpo.devices import check_gpu_is_used, default_platform, device_of
from jaxgrpo.mesh import (
    Purpose,
    batch_shards,
    fold_key,
    keep_compiled_programs,
    make_mesh,
    replicate,
    sharding,
)
from jaxgrpo.model.adapters import StackedAdapter, stack_adapter
from jaxgrpo.model.api import (
    QwenConfig,
    describe_base,
    device_plan,
    init_lora,
    lora_logical_axes,
)
from jaxgrpo.model.peft_files import read_peft
from jaxgrpo.model.weights import (
    check_tensor_names,
    load_model,
    read_eos_token_ids,
    read_qwen_config,
    resolve_model_dir,
    weights_sha256,
)
from jaxgrpo.rank_plan import RankPlan, make_rank_plan
from jaxgrpo.records.tracking import check_wandb
from jaxgrpo.rollout.engine import make_generate
from jaxgrpo.rollout.stop import StopRules, end_token_ids, make_stop_rules
from jaxgrpo.start_phases import phase_done
from jaxgrpo.tasks.data import PromptSource, read_prompts
from jaxgrpo.tasks.rewards import load_reward
from jaxgrpo.tasks.texts import load_tokenizer
from jaxgrpo.types import Adapters, LoraPlan, Tree


@dataclass(frozen=True)
class Session:
    """What a configuration resolves to; nothing in it changes during a run.

    Attributes:
        base: the frozen weights, sharded over the mesh; before `load` their description.
        plan: ranks on the host; `device_plan` is the same as arrays.
        adapter: what training starts from, if not from fresh adapters.
        train_prompts, eval_prompts: where prompts come from.
        rewards: name -> function, in the configuration's order.
        eval_reward: what says which completions are right.
        stop: what ends a completion.
        reference: adapters of the policy that KL is measured to; None: the base model.
    """

    config: Config
    mesh: Mesh
    model_dir: Path
    model_config: QwenConfig
    base: Tree
    plan: RankPlan
    device_plan: LoraPlan
    tokenizer: Any
    train_prompts: PromptSource
    eval_prompts: PromptSource
    rewards: dict[str, Callable]
    eval_reward: Callable
    stop: StopRules
    adapter: StackedAdapter | None = None
    reference: Adapters | None = None

    @property
    def prompt_hashes(self) -> dict[str, str]:
        """Of the prompts that training draws from, and of those that evaluation takes."""
        count = self.config.eval.problems
        return {"train": self.train_prompts.sha256(), "eval": self.eval_prompts.sha256(count)}

    @property
    def inputs(self) -> dict[str, str]:
        """Hashes of what a run reads besides its settings: it may go on only from the same."""
        found = {
            "model": weights_sha256(self.model_dir),
            "train_prompts": self.train_prompts.sha256(),
        }
        return found if self.adapter is None else found | {"adapter": self.adapter.sha256()}

    def with_config(self, config: Config) -> Session:
        """The same model, data and mesh under another configuration: seed, plan, scale rule, steps.

        The sections model, data, rollout, rewards and mesh, and eval.reward, must be the same.
        """
        plan, adapter = resolve_plan(config.lora, self.model_config)
        return dataclasses.replace(self, config=config, adapter=adapter).with_plan(plan)

    def with_plan(self, plan: RankPlan) -> Session:
        """The same run with other ranks."""
        on_device = replicate(self.mesh, device_plan(plan))
        return dataclasses.replace(self, plan=plan, device_plan=on_device)

    def load(self, console: Console | None = None) -> Session:
        """The same session with its weights.

        Raises:
            ConfigError: a tensor is misshaped or truncated; it is named.
        """
        dtype = self.model_config.dtype
        _, base = load_model(self.model_dir, dtype, self.mesh, console)
        phase_done("weights")
        return dataclasses.replace(self, base=base)

    def init_lora(self) -> Tree:
        """Fresh adapters for this seed, or those of `lora.adapter`, sharded."""
        lora = init_lora(
            self.model_config, self.plan, fold_key(self.config.seed, 0, Purpose.LORA_INIT)
        )
        if self.adapter is not None:
            lora = self.adapter.start(lora, self.plan)
        return self.place_lora(lora)

    def adapters(self, lora: Tree) -> Adapters:
        """`lora` under the plan."""
        return Adapters(lora, self.device_plan)

    def place_lora(self, lora: Tree) -> Tree:
        """Adapters of this plan, sharded over the mesh."""
        return place_lora(self.mesh, lora)

    def make_generate(self, *, evaluation: bool, greedy: bool = False) -> Callable:
        """The jitted sampler, as training or as evaluation wants it; `greedy` for also_greedy."""
        config = self.config
        if not evaluation:
            return make_generate(
                self.model_config, config.rollout, self.stop, config.grpo.group_size
            )
        # Evaluation measures the policy itself: no truncated sampling unless training has it too.
        rollout = dataclasses.replace(
            config.rollout,
            temperature=0.0 if greedy else config.eval.temperature,
            max_completion_tokens=config.eval_max_completion_tokens,
        )
        samples = 1 if greedy else config.eval.samples
        return make_generate(self.model_config, rollout, self.stop, samples)


@dataclass(frozen=True)
class OpenModel:
    """What a configuration says of the model alone, checked; the weights are not loaded yet."""

    mesh: Mesh
    model_dir: Path
    model_config: QwenConfig
    plan: RankPlan
    adapter: StackedAdapter | None
    tokenizer: Any
    stop: StopRules

    def load(self, console: Console | None = None) -> tuple[QwenConfig, Tree]:
        """Shapes and weights, sharded; the console shows the progress."""
        _, base = load_model(self.model_dir, self.model_config.dtype, self.mesh, console)
        return self.model_config, base


def open_model(config: Config) -> OpenModel:
    """Mesh, plan, tokenizer and stop rules.

    Raises:
        ConfigError: anything about the model that the user has to mend.
    """
    with tokenizer_beside(config) as (model_dir, loading, _):
        return _open_model(config, model_dir, loading)


@contextmanager
def tokenizer_beside(config: Config) -> Iterator[tuple[Path, Future, ThreadPoolExecutor]]:
    """The model's directory, its tokenizer, and the thread that loads it and may be given more that
    needs no device: devices take as long to be reached, and ask nothing of Python meanwhile."""
    model_dir = resolve_model_dir(config.model.path, config.model.revision)
    beside = ThreadPoolExecutor(1, thread_name_prefix="beside")
    loading = beside.submit(load_tokenizer, model_dir)
    try:
        yield model_dir, loading, beside
    finally:
        beside.shutdown(wait=False, cancel_futures=True)
        # Of two threads that import transformers at once, one fails.
        if not loading.cancelled():
            loading.exception()


def _open_model(config: Config, model_dir: Path, loading: Future) -> OpenModel:
    """`open_model`, of a tokenizer that is being loaded."""
    check_gpu_is_used()
    keep_compiled_programs()
    mesh = make_mesh(config.mesh)
    phase_done("devices")
    check_divisible(config, mesh)
    model_config = read_qwen_config(model_dir, resolve_dtype(config.model.dtype))
    model_config = dataclasses.replace(model_config, device=device_of(mesh))
    check_model_axis(model_config, mesh)
    plan, adapter = resolve_plan(config.lora, model_config)
    check_tensor_names(model_dir, model_config)
    tokenizer = loading.result()
    check_vocabulary(tokenizer, model_config)
    declared = read_eos_token_ids(model_dir)
    stop_ids = end_token_ids(tokenizer, declared, config.rollout.stop_token_ids)
    stop = make_stop_rules(
        tokenizer, stop_ids, config.rollout.stop_strings, model_config.vocab_size
    )
    return OpenModel(mesh, model_dir, model_config, plan, adapter, tokenizer, stop)


def open_session(config: Config, console: Console | None = None) -> Session:
    """`describe_session`, and its weights; the console shows the progress."""
    return describe_session(config).load(console)


def describe_session(config: Config) -> Session:
    """Resolves paths and checks every cross-field rule; the weights are described, not loaded.

    Raises:
        ConfigError: anything the user has to mend. Cheap checks come before slow ones, and nothing
            has been written when one fails.
    """
    rewards = {name: _reward("rewards", name) for name in config.rewards}
    eval_reward = _reward("eval.reward", config.eval.reward)
    check_wandb(config.wandb_project)
    with tokenizer_beside(config) as (model_dir, loading, beside):
        reading = beside.submit(lambda: read_prompts(config, loading.result()))
        model = _open_model(config, model_dir, loading)
        with jax.set_mesh(model.mesh):
            base = describe_base(model.model_config, model.mesh)
        train_prompts, eval_prompts = reading.result()
    session = Session(
        config=config,
        mesh=model.mesh,
        model_dir=model.model_dir,
        model_config=model.model_config,
        base=base,
        plan=model.plan,
        device_plan=replicate(model.mesh, device_plan(model.plan)),
        tokenizer=model.tokenizer,
        train_prompts=train_prompts,
        eval_prompts=eval_prompts,
        rewards=rewards,
        eval_reward=eval_reward,
        stop=model.stop,
        adapter=model.adapter,
    )
    if model.adapter is None or config.grpo.kl_coef == 0:
        return session
    # As TRL's: what training starts from, and not the model under it.
    return dataclasses.replace(session, reference=session.adapters(session.init_lora()))


def place_lora(mesh: Mesh, lora: Tree) -> Tree:
    """Adapters sharded over the mesh."""
    return jax.tree.map(
        lambda axes, x: jax.device_put(x, sharding(mesh, axes)),
        lora_logical_axes(tuple(lora)),
        lora,
        is_leaf=lambda x: isinstance(x, tuple),
    )


def resolve_plan(config: LoraConfig, model: QwenConfig) -> tuple[RankPlan, StackedAdapter | None]:
    """The ranks that the settings ask for, and the adapter to start from if they name one."""
    if config.adapter is None:
        return make_rank_plan(config, model.num_layers), None
    where = f"lora.adapter {config.adapter}"
    adapter = stack_adapter(read_peft(Path(config.adapter).expanduser()), model, where)
    return make_rank_plan(config, model.num_layers, adapter.ranks), adapter


def warn_user(config: Config, session: Session, console: Console) -> None:
    """Says what is allowed but may not be meant."""
    if config.rollout.biases_ratios():
        console.print(
            "[yellow]warning:[/] rollout.top_p, top_k or min_p cut the sampler's distribution; its "
            "log-probs are over the whole vocabulary, so the policy ratios are biased by the kept "
            "mass. Leave them off to train unbiased."
        )
    for source in (session.train_prompts, session.eval_prompts):
        for line in source.left_out:
            console.print(f"[yellow]warning:[/] {line}")


def resolve_dtype(dtype: str) -> str:
    """`auto` is float32 on CPU, where bfloat16 is emulated, and bfloat16 elsewhere."""
    if dtype != "auto":
        return dtype
    return "float32" if default_platform() == "cpu" else "bfloat16"


def check_divisible(config: Config, mesh: Mesh, *, evaluates: bool = True) -> None:
    """Batches must split evenly over the mesh's batch axes."""
    shards = batch_shards(mesh)
    counts = {"grpo.prompts_per_step": config.grpo.prompts_per_step}
    if evaluates:
        counts["eval.batch_prompts"] = config.eval.batch_prompts
    for name, count in counts.items():
        if count % shards:
            raise ConfigError(
                f"{name}={count} does not divide over the mesh: data x fsdp = {shards}; "
                f"the nearest that does is {max(shards, round(count / shards) * shards)}"
            )


def check_model_axis(model: QwenConfig, mesh: Mesh) -> None:
    """The `model` and `fsdp` axes must divide the dimensions they split."""
    for axis, dimensions in (
        ("model", {"query heads": model.num_heads, "mlp": model.intermediate_size}),
        ("model", {"vocabulary": model.vocab_size}),
        ("fsdp", {"hidden size": model.hidden_size}),
    ):
        for name, size in dimensions.items():
            if size % mesh.shape[axis]:
                raise ConfigError(
                    f"mesh.{axis}={mesh.shape[axis]} does not divide the model's {name} {size}"
                )


def check_vocabulary(tokenizer: Any, model: QwenConfig) -> None:
    """A token id beyond the embedding table would be read as another token, silently."""
    largest = max(tokenizer.get_vocab().values())
    if largest >= model.vocab_size:
        raise ConfigError(
            f"the tokenizer has ids up to {largest}, the model's vocabulary ends at "
            f"{model.vocab_size - 1}: they do not belong together"
        )


def _reward(setting: str, name: str) -> Callable:
    try:
        return load_reward(name)
    except ValueError as error:
        raise ConfigError(f"{setting}: {error}") from None
