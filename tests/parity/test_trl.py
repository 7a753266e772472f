"""TRL's own GRPOTrainer code and ours on the same tensors: losses, gradients, metrics, advantages.

A real GRPOTrainer (a tiny random Qwen2) runs its scoring and its loss; only its two sources of
tensors are replaced: which completions were sampled, and what their log-probs are. Tolerance 1e-5
relative and 1e-7 absolute in float32 for losses and gradients, 1e-5 for advantages and metrics.
"""

from __future__ import annotations

import dataclasses
import itertools
import types
import typing
import warnings

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgrpo.config import Correction, GrpoConfig, LossName
from jaxgrpo.grpo.advantages import compared_rewards, compute_advantages, reward_metrics
from jaxgrpo.grpo.loss import loss_metrics, token_losses, token_weights
from jaxgrpo.types import TrainBatch

torch = pytest.importorskip("torch")
pytest.importorskip("trl")
pytestmark = pytest.mark.filterwarnings("ignore")

PROMPTS, GROUP, WIDTH = 3, 4, 6
ROWS = PROMPTS * GROUP
EOS, PAD = 1, 0


@dataclasses.dataclass(frozen=True)
class Given:
    """The tensors that both sides see."""

    completions: list[list[int]]
    mask: np.ndarray
    rewards: np.ndarray
    logprobs: np.ndarray
    old: np.ndarray
    ref: np.ndarray
    sampler: np.ndarray
    entropy: np.ndarray


@pytest.fixture(scope="module")
def given() -> Given:
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, WIDTH + 1, ROWS)
    lengths[:2] = (WIDTH, 1)
    completions = [[*rng.integers(2, 9, n - 1).tolist(), EOS] for n in lengths]
    completions[5][-1] = 7  # truncated: no end token
    logprobs = -rng.exponential(1.0, (ROWS, WIDTH)).astype(np.float32)

    def near(spread: float) -> np.ndarray:
        return (logprobs + spread * rng.normal(size=logprobs.shape)).astype(np.float32)

    rewards = rng.integers(0, 3, ROWS).astype(np.float64)
    rewards[4:8] = 1.0
    rewards[9] = np.nan
    return Given(
        completions=completions,
        mask=(np.arange(WIDTH) < lengths[:, None]).astype(np.float32),
        rewards=rewards,
        logprobs=logprobs,
        old=near(0.3),
        ref=near(0.5),
        sampler=near(0.5),
        entropy=rng.exponential(1.0, (ROWS, WIDTH)).astype(np.float32),
    )


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return _make_trainer(str(tmp_path_factory.mktemp("trl")))


def _make_trainer(output_dir: str):
    from datasets import Dataset
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
    from trl.trainer.grpo_config import GRPOConfig
    from trl.trainer.grpo_trainer import GRPOTrainer

    class TrainerOnTensors(GRPOTrainer):
        """GRPOTrainer, given its completions and their log-probs."""

        given: typing.Any
        current: typing.Any

        def _generate(self, prompts):
            given = self.given
            sampled = [
                row[: len(ids)].tolist()
                for row, ids in zip(given.sampler, given.completions, strict=True)
            ]
            return ([[2]] * ROWS, given.completions, None, [""] * ROWS, sampled, {}, None, None)

        def _get_per_token_logps_and_entropies(
            self, model, *_args, compute_entropy=False, **_kwargs
        ):
            if compute_entropy:
                return self.current, torch.tensor(self.given.entropy), None
            of = self.given.ref if model is self.ref_model else self.given.old
            return torch.tensor(of), None, None

    words = {word: index for index, word in enumerate(["<pad>", "</s>", *"abcdefg"])}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="a")),
        eos_token="</s>",
        pad_token="<pad>",
    )
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=len(words),
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=1,
            num_key_value_heads=1,
        )
    )
    trainer = TrainerOnTensors(
        model=model,
        reward_funcs=[lambda completions, **_: [0.0] * len(completions)],
        args=GRPOConfig(
            output_dir=output_dir,
            report_to=[],
            use_cpu=True,
            bf16=False,
            per_device_train_batch_size=ROWS,
            num_generations=GROUP,
            max_completion_length=WIDTH,
        ),
        train_dataset=Dataset.from_dict({"prompt": ["a"] * ROWS}),
        processing_class=tokenizer,
    )
    model.train()
    trainer.current_gradient_accumulation_steps = 1
    trainer.ref_model = object()
    return trainer


def _configure(trainer, config: GrpoConfig, given: Given, with_old: bool) -> None:
    """Our configuration in TRL's words."""
    if not with_old:
        given = dataclasses.replace(given, old=given.logprobs)
    trainer.given = given
    trainer.reward_funcs = [
        lambda completions, **_: [None if np.isnan(r) else r for r in given.rewards]
    ]
    sequence = config.loss == "gspo"
    trainer.loss_type = "grpo" if sequence else config.loss
    trainer.importance_sampling_level = "sequence" if sequence else "token"
    trainer.scale_rewards = config.scale_rewards
    trainer.epsilon_low = config.clip_eps_low
    trainer.epsilon_high = config.clip_eps_high or config.clip_eps_low
    trainer.args.delta = config.delta
    trainer.beta = config.kl_coef
    # Ours is GRPO's plain k3; TRL can, and by default does, multiply it by the ratio.
    trainer.args.use_bias_correction_kl = False
    trainer.mask_truncated_completions = config.mask_truncated_completions
    trainer.use_vllm = config.importance_correction != "none"
    trainer.vllm_importance_sampling_correction = trainer.use_vllm
    trainer.vllm_importance_sampling_mode = config.importance_correction
    trainer.vllm_importance_sampling_clip_min = None
    trainer.vllm_importance_sampling_clip_max = config.importance_cap
    # TRL asks for old log-probs by itself when the update is not the first after sampling.
    trainer.num_iterations = 2 if with_old else 1
    trainer._metrics["train"].clear()


def _trl(trainer, config: GrpoConfig, given: Given, with_old: bool):
    """loss, gradient, metrics, the scored batch: all from TRL's code."""
    _configure(trainer, config, given, with_old)
    scored = trainer._generate_and_score_completions([{"prompt": "a"}] * ROWS)
    trainer.current = torch.tensor(given.logprobs, requires_grad=True)
    loss = trainer._compute_loss(trainer.model, scored)
    loss.backward()
    metrics = {name: values[-1] for name, values in trainer._metrics["train"].items()}
    return loss.item(), trainer.current.grad.numpy(), metrics, scored


def _ours(config: GrpoConfig, given: Given, with_old: bool, scored):
    batch = TrainBatch(
        loss_mask=jnp.asarray(scored["completion_mask"].numpy(), jnp.float32),
        advantages=jnp.asarray(scored["advantages"].numpy()),
        sampler_logprobs=jnp.asarray(given.sampler * given.mask),
        trained=jnp.ones(ROWS, bool),
        packing=None,  # type: ignore[arg-type]  # what tokens the rows have is nothing to a loss
        old_logprobs=jnp.asarray(given.old) if with_old else None,
        ref_logprobs=jnp.asarray(given.ref) if config.kl_coef else None,
    )
    weights = token_weights(config.loss, batch.loss_mask, WIDTH)
    logprobs = jnp.asarray(given.logprobs)
    loss, gradient = jax.value_and_grad(
        lambda current: jnp.sum(weights * token_losses(config, current, batch))
    )(logprobs)
    return (loss, gradient, loss_metrics(config, logprobs, jnp.asarray(given.entropy), batch))


def _compare(trainer, config: GrpoConfig, given: Given, with_old: bool) -> None:
    loss, gradient, metrics, scored = _trl(trainer, config, given, with_old)
    our_loss, our_gradient, our_metrics = _ours(config, given, with_old, scored)
    assert np.abs(gradient).max() > 1e-3, "nothing is tested by a gradient of 0"
    case = f"{config} old={with_old}"
    chex.assert_trees_all_close(
        {"loss": np.asarray(our_loss), "gradient": np.asarray(our_gradient)},
        {"loss": np.float32(loss), "gradient": gradient},
        rtol=1e-5,
        atol=1e-7,
        custom_message=case,
    )
    if config.importance_correction == "none":  # TRL reports the drift only when it corrects it
        our_metrics = {k: v for k, v in our_metrics.items() if not k.startswith("sampling/")}
    ours = {name: np.asarray(value) for name, value in our_metrics.items()}
    theirs = {name: np.float32(metrics[name]) for name in ours}
    chex.assert_trees_all_close(ours, theirs, rtol=1e-5, atol=1e-5, custom_message=case)
    prefixes = ("clip_ratio", "cispo", "sampling/", "kl", "entropy")
    assert {name for name in metrics if name.startswith(prefixes)} == set(ours), case


@pytest.mark.parametrize("correction", typing.get_args(Correction))
@pytest.mark.parametrize("loss", typing.get_args(LossName))
def test_loss_gradient_and_metrics_are_trls(loss, correction, trainer, given):
    options = itertools.product((0.0, 0.1), (None, 1.15), (False, True))
    for kl_coef, delta, with_old in options:
        config = GrpoConfig(
            loss=loss,
            importance_correction=correction,
            importance_cap=1.3,
            kl_coef=kl_coef,
            delta=delta,
            clip_eps_low=0.1,
            clip_eps_high=1.1 if loss == "cispo" else 0.25,
        )
        _compare(trainer, config, given, with_old)


@pytest.mark.parametrize("loss", typing.get_args(LossName))
def test_default_clips_and_masked_truncated_rows_are_trls(loss, trainer, given):
    for masked, eps in itertools.product((False, True), (0.2, 0.0)):
        config = GrpoConfig(
            loss=loss,
            mask_truncated_completions=masked,
            clip_eps_low=eps,
            clip_eps_high=2.0 if loss == "cispo" else None,  # which has no default
        )
        # The first update after sampling: the ratio is 1, on the bound when the clip is 0.
        _compare(trainer, config, given, with_old=False)
        _compare(trainer, config, given, with_old=eps > 0)


REWARDS = types.MappingProxyType(
    {
        "varied": np.random.default_rng(1).normal(size=ROWS),
        "binary": np.array([0, 1, 0, 0, 1, 1, 1, 1, 0, 0, 0, 0], np.float64),
        "some unjudged": np.array([0, 1, np.nan, 0, 2, np.nan, np.nan, np.nan] + [np.nan] * 4),
        "all unjudged": np.full(ROWS, np.nan),
    }
)


@pytest.mark.parametrize("name", REWARDS)
@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_advantages_and_reward_metrics_are_trls(scale, name, trainer, given):
    rewards = REWARDS[name]
    config = GrpoConfig(scale_rewards=scale)
    _configure(trainer, config, dataclasses.replace(given, rewards=rewards), with_old=False)
    scored = trainer._generate_and_score_completions([{"prompt": "a"}] * ROWS)
    chex.assert_trees_all_close(
        compute_advantages(rewards, GROUP, scale), scored["advantages"].numpy(), atol=1e-5
    )
    metrics = trainer._metrics["train"]
    ours = reward_metrics(rewards, GROUP, scale, {trainer.reward_func_names[0]: rewards})
    theirs = {key: metrics[key][-1] for key in ours}
    chex.assert_trees_all_close(ours, theirs, atol=1e-5)


SEVERAL = types.MappingProxyType(
    {
        "two": [REWARDS["varied"], 100 * REWARDS["binary"]],
        "some unjudged by one": [REWARDS["some unjudged"], REWARDS["binary"]],
        "some unjudged by all": [REWARDS["some unjudged"], REWARDS["some unjudged"][::-1].copy()],
        "equal in every group": [np.repeat([0.0, 1.0, 2.0], GROUP), np.ones(ROWS)],
        "all unjudged": [np.full(ROWS, np.nan)] * 2,
        "one": [REWARDS["varied"]],
    }
)


@pytest.mark.parametrize("name", SEVERAL)
@pytest.mark.parametrize("aggregation", ["sum_then_normalize", "normalize_then_sum"])
def test_advantages_and_metrics_of_several_rewards_are_trls(aggregation, name, trainer, given):
    rewards, weights = SEVERAL[name], [2.0, 0.5][: len(SEVERAL[name])]
    config = GrpoConfig(multi_objective_aggregation=aggregation, group_size=GROUP)
    _configure(trainer, config, given, with_old=False)
    kept = {key: getattr(trainer, key) for key in MANY}
    try:
        trainer.reward_funcs = [_returns(values) for values in rewards]
        trainer.reward_func_names = [f"reward_{index}" for index in range(len(rewards))]
        trainer.reward_processing_classes = [None] * len(rewards)
        trainer.reward_weights = torch.tensor(weights)
        trainer.multi_objective_aggregation = aggregation
        scored = trainer._generate_and_score_completions([{"prompt": "a"}] * ROWS)
    finally:
        for key, value in kept.items():
            setattr(trainer, key, value)
    by_function = {f"reward_{index}": values for index, values in enumerate(rewards)}
    weighted = np.array(weights)[:, None] * np.array(rewards)
    total = np.where(np.isnan(weighted).all(axis=0), np.nan, np.nansum(weighted, axis=0))
    compared, group = compared_rewards(config, total, by_function, weights)
    chex.assert_trees_all_close(
        compute_advantages(compared, group), scored["advantages"].numpy(), atol=1e-5
    )
    metrics = trainer._metrics["train"]
    ours = reward_metrics(total, group, "group", by_function, compared)
    theirs = {key: metrics[key][-1] for key in ours}
    chex.assert_trees_all_close(ours, theirs, rtol=1e-5, atol=1e-5)


MANY = (
    *("reward_funcs", "reward_func_names", "reward_processing_classes", "reward_weights"),
    "multi_objective_aggregation",
)


def _returns(values):
    return lambda completions, **_: [None if np.isnan(value) else value for value in values]
