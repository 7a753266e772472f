"""The configuration: strict, merged in order, told apart by one line per mistake."""

from __future__ import annotations

import dataclasses
import re
import typing

import pytest
import yaml

from jaxgrpo.config import Config, ConfigError
from jaxgrpo.config_files import (
    decode_config,
    dump_config,
    encode_config,
    load_config,
    merge,
    parse_override,
)
from jaxgrpo.identity import first_difference, identity

KEYS = re.findall(
    r"\S+",
    """
run_dir seed steps checkpoint_every_steps keep_checkpoints log_completions_every_steps rewards
reward_timeout_s objective weight_grad_norms wandb_project
model.path model.revision model.dtype model.remat
lora.rank lora.plan lora.adapter lora.max_rank lora.rank_budget lora.alpha lora.scale_rule
lora.target_modules
data.path data.name data.revision data.train_split data.eval_split data.prompt_column
data.answer_column data.system_prompt data.prompt_suffix data.drop_rows_without_answer
data.chat_template_kwargs
data.max_prompt_tokens data.prompt_bucket_tokens data.embedded_problems data.dev_problems
rollout.max_completion_tokens rollout.temperature rollout.top_k rollout.top_p rollout.min_p
rollout.stop_token_ids rollout.stop_strings
grpo.loss grpo.prompts_per_step grpo.group_size grpo.scale_rewards grpo.clip_eps_low
grpo.multi_objective_aggregation
grpo.clip_eps_high grpo.delta grpo.kl_coef grpo.num_iterations grpo.mask_truncated_completions
grpo.importance_correction grpo.importance_cap grpo.micro_batches grpo.logprob_chunk_tokens
optim.learning_rate optim.schedule optim.warmup_steps optim.b1 optim.b2 optim.eps
optim.weight_decay optim.max_grad_norm
eval.reward eval.every_steps eval.problems eval.batch_prompts eval.samples eval.temperature
eval.also_greedy eval.max_completion_tokens eval.before_training eval.after_training
mesh.data mesh.fsdp mesh.model
""",
)


def config_keys(cls=Config, prefix=""):
    hints = typing.get_type_hints(cls)
    for member in dataclasses.fields(cls):
        if dataclasses.is_dataclass(hints[member.name]):
            yield from config_keys(hints[member.name], f"{prefix}{member.name}.")
        else:
            yield prefix + member.name


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return path


def test_these_are_all_the_keys():
    """A new key is added here too, so that a growing configuration shows in review."""
    assert sorted(config_keys()) == sorted(KEYS)


def test_without_files_the_defaults_hold():
    assert load_config() == Config()


def test_an_empty_file_changes_nothing(tmp_path):
    assert load_config([write(tmp_path / "a.yaml", "# only a comment\n")]) == Config()


def test_files_merge_left_to_right_key_by_key(tmp_path):
    first = write(tmp_path / "a.yaml", "steps: 5\ngrpo: {group_size: 4, kl_coef: 0.1}\n")
    second = write(tmp_path / "b.yaml", "grpo: {group_size: 6}\noptim: {b1: 0.5}\n")
    config = load_config([first, second])
    assert (config.steps, config.grpo.kl_coef, config.optim.b1) == (5, 0.1, 0.5)
    assert config.grpo.group_size == 6
    assert load_config([second, first]).grpo.group_size == 4


def test_overrides_come_after_files_and_the_last_one_holds(tmp_path):
    path = write(tmp_path / "a.yaml", "grpo: {group_size: 4}\nsteps: 5\n")
    config = load_config([path], ["grpo.group_size=6", "grpo.group_size=10", "seed=3"])
    assert (config.grpo.group_size, config.steps, config.seed) == (10, 5, 3)


def test_merge_leaves_its_arguments_as_they_were():
    base, update = {"a": {"b": 1}}, {"a": {"c": 2}}
    assert merge(base, update) == {"a": {"b": 1, "c": 2}}
    assert (base, update) == ({"a": {"b": 1}}, {"a": {"c": 2}})


def test_rewards_are_replaced_whole(tmp_path):
    first = write(tmp_path / "a.yaml", "rewards: {gsm8k_answer: 1.0, format: 0.5}\n")
    second = write(tmp_path / "b.yaml", "rewards: {length: 0.25}\n")
    assert load_config([first, second]).rewards == {"length": 0.25}
    assert load_config([first], ["rewards={format: 2}"]).rewards == {"format": 2.0}


def test_the_dots_of_a_reward_belong_to_its_name():
    assert parse_override("rewards.my.module:score=0.5") == {"rewards": {"my.module:score": 0.5}}
    assert load_config([], ["rewards.my.module:score=0.5"]).rewards == {"my.module:score": 0.5}


def test_rewards_given_one_by_one_add_up(tmp_path):
    path = write(tmp_path / "a.yaml", "rewards: {length: 0.25}\n")
    config = load_config([path], ["rewards.gsm8k_answer=1", "rewards.format=0.5"])
    assert config.rewards == {"gsm8k_answer": 1.0, "format": 0.5}


def test_the_value_of_an_override_may_hold_an_equals_sign():
    assert load_config([], ["data.prompt_suffix=a=b"]).data.prompt_suffix == "a=b"


@pytest.mark.parametrize("text", ["1e-5", "1.0e-5", "1E-5", "0.00001"])
def test_scientific_notation_is_a_number(text, tmp_path):
    """YAML 1.1 reads 1e-5, which has no dot, as text."""
    path = write(tmp_path / "a.yaml", f"optim: {{learning_rate: {text}}}\n")
    for config in (load_config([path]), load_config([], [f"optim.learning_rate={text}"])):
        rate = config.optim.learning_rate
        assert type(rate) is float and rate == 1e-5


def test_lists_become_tuples():
    config = load_config([], ["lora.target_modules=[q_proj, v_proj]", "rollout.stop_strings=[a]"])
    assert config.lora.target_modules == ("q_proj", "v_proj")
    assert config.rollout.stop_strings == ("a",)


def test_a_dumped_configuration_loads_back_equal(tmp_path):
    config = load_config(
        [],
        [
            *("lora.target_modules=[q_proj]", "lora.max_rank=32", "rewards.my.module:f=0.5"),
            *("data.system_prompt='on: {#}\n  é' ", "data.prompt_suffix=\n\t 'x'\n", "seed=7"),
            *("optim.learning_rate=3e-7", "rollout.stop_token_ids=[1, 2]", "grpo.delta=4"),
        ],
    )
    path = write(tmp_path / "dumped.yaml", dump_config(config))
    assert load_config([path]) == config
    assert decode_config(encode_config(config)) == config
    assert load_config([write(path, dump_config(Config()))]) == Config()


TEXTS = [
    *(" End with #### and the number", "1.10", "0010", "0123456", "1_000", "1e400", "yes", "~"),
    *("NULL", "2001-01-01", "[a]", "{a: 1}", "a: b", "'quoted'", '"q"', "- x", "*a", "&a b", "!!b"),
    *(
        "two\nlines",
        "\n",
        " ",
        "tab\t",
        "a\r\nb",
        "\x85",
        "\u2028",
        "\x00",
        "é 日",
        "%",
        "@",
        "x" * 300,
    ),
    *("word " * 60, "a\n" * 5, "\ud800", "a #b", "#", "|", ">-", "null ", "<<", "=", "\ufeff"),
]


def test_a_chat_template_is_told_by_name_and_the_last_word_counts(tmp_path):
    file = write(
        tmp_path / "a.yaml", "data: {chat_template_kwargs: {enable_thinking: true, depth: 2}}"
    )
    word = "data.chat_template_kwargs.enable_thinking=false"
    config = load_config([file], [word])
    assert config.data.chat_template_kwargs == {"enable_thinking": False, "depth": 2}
    assert load_config([write(tmp_path / "b.yaml", dump_config(config))]) == config
    difference = first_difference(identity(load_config([file])), identity(config))
    assert difference == "data.chat_template_kwargs.enable_thinking was True, is False"
    with pytest.raises(ConfigError, match=r"data\.chat_template_kwargs must be a mapping, got 3"):
        load_config([], ["data.chat_template_kwargs=3"])


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("key", ["data.prompt_suffix", "data.system_prompt", "run_dir"])
def test_text_on_the_command_line_is_taken_literally_and_survives_its_file(key, text, tmp_path):
    def value(config):
        return config.run_dir if key == "run_dir" else getattr(config.data, key.split(".")[1])

    config = load_config([], [f"{key}={text}"])
    assert value(config) == text
    assert load_config([write(tmp_path / "dumped.yaml", dump_config(config))]) == config


def test_words_that_yaml_would_read_as_numbers_stay_text():
    config = load_config([], ["model.revision=0123456", "run_dir=0010", "data.name=1.10"])
    assert (config.model.revision, config.run_dir, config.data.name) == ("0123456", "0010", "1.10")


def test_no_text_and_null_are_two_things():
    assert load_config([], ["data.system_prompt="]).data.system_prompt == ""
    assert load_config([], ["data.system_prompt=null"]).data.system_prompt is None
    assert load_config([], ["data.prompt_suffix=null"]).data.prompt_suffix == "null"


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("1.10", "data.name: YAML reads 1.10 as 1.1; write '1.10'"),
        ("0010", "data.name: YAML reads 0010 as 8; write '0010'"),
        ("0123456", "data.name: YAML reads 0123456 as 42798; write '0123456'"),
        ("1_000", "data.name: YAML reads 1_000 as 1000; write '1_000'"),
        ("yes", "data.name: YAML reads yes as True; write 'yes'"),
        ("True", "data.name: YAML reads True as True; write 'True'"),
        ("2001-01-01 1:02:03", "data.name: YAML reads 2001-01-01 1:02:03 as datetime"),
        ("~", "data.name: YAML reads ~ as None; write '~'"),
        ("", "data.name is empty"),
        ("''", "data.name is empty"),
        ("End with #### and the number", "'#### and the number' would be lost as a comment"),
        ("End with # and the number", "'# and the number' would be lost as a comment"),
        ("End #and", "'#and' would be lost as a comment"),
        ("one\n    two", "data.name goes over several lines, which YAML would join"),
        ("[a]", "data.name must be text, got ['a']"),
        ("{a: 1}", "data.name must be text, got {'a': 1}"),
    ],
)
def test_text_of_a_file_that_yaml_would_change_is_refused(tmp_path, written, message):
    path = write(tmp_path / "a.yaml", f"data:\n  name: {written}\n  prompt_suffix: x\n")
    with pytest.raises(ConfigError) as caught:
        load_config([path])
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("written", "text"),
    [
        *[("'1.10'", "1.10"), ('"0010"', "0010"), ("!!str yes", "yes"), ("null", None)],
        *[("main  # the subset", "main"), ("main", "main"), ("1234567", "1234567"), ("1.5", "1.5")],
        *[("'a #### b'  # c", "a #### b"), ("|-  # c\n    a\n    b", "a\nb"), ('"a\\nb"', "a\nb")],
        *[(">-\n    a\n    b", "a b"), ("a#b", "a#b"), ("'~'", "~"), ("2001-01-01", "2001-01-01")],
    ],
)
def test_text_of_a_file_is_what_stands_there(tmp_path, written, text):
    path = write(tmp_path / "a.yaml", f"data:\n  name: {written}\n")
    assert load_config([path]).data.name == text


def test_text_behind_an_anchor_is_looked_at_too(tmp_path):
    text = "data: &d {name: a}\nlora: {<<: {plan: 0010}}\n"
    with pytest.raises(ConfigError, match=r"lora\.plan: YAML reads 0010 as 8"):
        load_config([write(tmp_path / "a.yaml", text)])


def test_the_encoded_configuration_is_plain():
    raw = encode_config(Config())
    assert yaml.safe_load(yaml.safe_dump(raw)) == raw


@pytest.mark.parametrize("key", [key for key in KEYS if key != "rewards"])
def test_every_key_is_suggested_when_it_is_misspelt(key):
    with pytest.raises(ConfigError) as caught:
        load_config([], [f"{key}s_=1"])
    assert f"'{key}s_'" in str(caught.value)
    assert f"did you mean '{key.rsplit('.', 1)[-1]}" in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["group_size=4"], "did you mean 'grpo.group_size'?"),
        (["learning_rate=1"], "did you mean 'optim.learning_rate'?"),
        (["grpo.clip_eps=1"], "unknown key 'grpo.clip_eps'; did you mean 'clip_eps_"),
        (["grpo.zzzzzz=1"], "valid: loss, prompts_per_step"),
        (["grpo=4"], "grpo must be a mapping, got 4"),
        (["steps=null"], "steps is empty"),
        (["steps=true"], "steps must be a number, got True"),
        (["lora.max_rank=true"], "lora.max_rank must be a number, got True"),
        (["steps=2.5"], "steps"),
        (["steps=[5]"], "steps must be a number, got [5]"),
        (["steps.x=5"], "steps must be a number, got {'x': 5}"),
        (["rollout.stop_strings=Question"], "must be a list, as in stop_strings=[Question]"),
        (["lora.target_modules=q_proj"], "must be a list, as in target_modules=[q_proj]"),
        (["lora.target_modules={q_proj: 1}"], "lora.target_modules must be a list, got {"),
        (["rollout.stop_token_ids=7"], "must be a list, as in stop_token_ids=[7]"),
        (["rollout.stop_token_ids=[null]"], "rollout.stop_token_ids.0 is empty"),
        (["rollout.stop_token_ids=[1, true]"], "rollout.stop_token_ids.1 must be a number"),
        (
            ["rollout.stop_strings=[no]"],
            "rollout.stop_strings.0: YAML reads no as False; write 'no'",
        ),
        (
            ["rollout.stop_strings=[a, 1.10]"],
            "rollout.stop_strings.1: YAML reads 1.10 as 1.1; write",
        ),
        (["rollout.stop_strings=[a b #c\n]"], "rollout.stop_strings.0: '#c' would be lost"),
        (["lora.plan="], "lora.plan is empty"),
        (["model.path="], "model.path is empty"),
        (["optim.b1=[1]"], "optim.b1 must be a number, got [1]"),
        (["eval.max_completion_tokens=0"], "eval.max_completion_tokens must be at least 1, got 0"),
        (["lora.rank=1000000000000000000000000"], "lora.rank must lie in 1..65536"),
        (["lora.max_rank=0"], "lora.max_rank must lie in 1..65536, got 0"),
        (["lora.rank_budget=0"], "lora.rank_budget must be at least 1, got 0"),
        (["lora.alpha=.inf"], "lora.alpha must be a positive number, got inf"),
        (["rollout.temperature=.inf"], "rollout.temperature must be a number >= 0, got inf"),
        (["grpo.kl_coef=.nan"], "grpo.kl_coef must be a number >= 0, got nan"),
        (["optim.eps=.inf"], "optim.eps must be a positive number"),
        (["optim.weight_decay=.inf"], "optim.weight_decay must be a number >= 0"),
        (["eval.temperature=.inf"], "eval.temperature must be a number >= 0, got inf"),
        (["model.dtype=float16"], "model.dtype"),
        (["grpo.loss=cispo"], "needs grpo.clip_eps_high"),
        (["grpo.group_size=1"], "at least 2"),
        (["rewards={}"], "rewards is empty"),
        (["rewards.gsm8k_answer=.nan"], "finite"),
        (["rewards.gsm8k_answer=much"], "rewards"),
        (["rewards.gsm8k_answer="], "rewards.gsm8k_answer is empty"),
        (["rewards.gsm8k_answer=true"], "rewards.gsm8k_answer must be a number, got True"),
        (["rewards=format"], "rewards must be a mapping of names to weights, got 'format'"),
        (["rewards=[format]"], "rewards must be a mapping of names to weights"),
        (["eval.samples=2"], "eval.temperature > 0"),
        (["mesh.data=0"], "mesh sizes"),
        (["lora.target_modules=[q_prj]"], "did you mean 'q_proj'?"),
        (["seed=2147483648"], "seed must lie in"),
        (["steps"], "is not of the form key=value"),
        (["=1"], "is not of the form key=value"),
        (["steps=[1"], "override 'steps=[1'"),
        (["a\nb=1"], "unknown key"),
        (['rewards={"a\\nb": .nan}'], "finite"),
    ],
)
def test_a_mistake_is_told_in_one_line(overrides, message):
    with pytest.raises(ConfigError) as caught:
        load_config([], overrides)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", KEYS)
def test_any_value_is_taken_or_refused_in_one_line(key):
    scalars = ["", "null", "true", "1", "-1", "0", "1.5", "1e400", ".nan", "10" * 20, "text", "2:3"]
    others = ["[]", "[1]", "[a]", "[[1]]", "[null]", "{}", "{a: 1}", "{1: 2}", "!!binary aGk="]
    for value in [*scalars, *others, "'a\nb'", "2020-01-01", "!!set {a}"]:
        try:
            config = load_config([], [f"{key}={value}"])
        except ConfigError as error:
            message = str(error)
        else:
            message = ""
            assert decode_config(encode_config(config)) == config, value
        assert "\n" not in message, value


@pytest.mark.parametrize(
    ("overrides", "biased"),
    [
        ([], False),
        (["rollout.top_p=0.9"], True),
        (["rollout.top_k=50"], True),
        (["rollout.min_p=0.1"], True),
        (["rollout.temperature=0.7"], False),
    ],
)
def test_only_truncated_sampling_biases_the_ratios(overrides, biased):
    assert load_config([], overrides).rollout.biases_ratios() is biased


def test_evaluation_completes_as_far_as_the_rollout_unless_told():
    assert load_config([], ["rollout.max_completion_tokens=7"]).eval_max_completion_tokens == 7
    assert load_config([], ["eval.max_completion_tokens=9"]).eval_max_completion_tokens == 9


def test_a_file_in_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"no/c\.yaml does not exist$"):
        load_config([tmp_path / "no" / "c.yaml"])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("c.yaml", b"a: [1\nb: }", "is not YAML"),
        ("c.yaml", b"- 1\n- 2\n", "must hold a mapping, got list"),
        ("c.yaml", b"\xff\xfe\xff", "cannot be read"),
        ("c.yaml", b"steps: !!python/object:os.system {}\n", "is not YAML"),
        ("c.yaml", b"1: 2\n", "unknown key '1'"),
        ("c.ymal", b"", "did you mean"),
    ],
)
def test_a_bad_file_is_told_in_one_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        load_config([tmp_path / "c.yaml"])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_another_path_takes_its_name_and_revision_along(tmp_path):
    text = (
        "data: {path: openai/gsm8k, name: main, revision: v1}\nmodel: {path: a/b, revision: v2}\n"
    )
    (file := tmp_path / "a.yaml").write_text(text)
    moved = load_config([file], ["data.path=mine.jsonl", "model.path=there"])
    assert (moved.data.name, moved.data.revision, moved.model.revision) == (None, None, None)
    named = load_config([file], ["data.path=c/d", "data.name=x", "model.path=a/b"])
    assert (named.data.name, named.data.revision, named.model.revision) == ("x", None, "v2")
    (over := tmp_path / "b.yaml").write_text("data: {path: e/f}\n")
    assert load_config([file, over]).data.name is None
