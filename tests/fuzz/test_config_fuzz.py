"""Configurations, overrides and rank plans from anywhere: a value or one line, never more."""

import json
import string

import numpy as np
import yaml
from hypothesis import given
from hypothesis import strategies as st

from jaxgrpo.commands.command import setting_names
from jaxgrpo.commands.plan import apply_edit, take_edits
from jaxgrpo.config import MODULES, Config, ConfigError, LoraConfig
from jaxgrpo.config_files import dump_config, load_config
from jaxgrpo.rank_plan import RankPlan, make_rank_plan
from jaxgrpo.study.config import StudyConfig
from tests.fuzz.amounts import fuzz

KEYS = [*setting_names(Config)]
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(-5, 300),
    st.floats(),
    st.text(max_size=20),
    st.sampled_from(["embedded", "1e-4", "2001-99-99", "0x1f", "1_000", "~", "<<", "=", "١٢"]),
    st.sampled_from([10**400, -(10**400), 2**63, 1e308, "9" * 5000]),
    st.dates(),
    st.binary(max_size=8),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=12,
)


def one_line(error: ConfigError) -> None:
    assert "\n" not in str(error) and 0 < len(str(error)) <= 600, str(error)


def decodes_or_says_why(path, overrides, cls) -> None:
    try:
        config = load_config([path] if path else [], overrides, cls)
    except ConfigError as error:
        one_line(error)
        return
    # What is accepted is written and read back as itself.
    path = path.with_name("again.yaml")
    path.write_text(dump_config(config))
    assert load_config([path], (), cls) == config


def test_configuration_files(tmp_path):
    path = tmp_path / "c.yaml"
    sections = sorted({key.split(".")[0] for key in KEYS})

    @given(
        st.one_of(
            st.dictionaries(st.sampled_from(sections) | st.text(max_size=6), VALUES, max_size=4),
            VALUES,
        ).map(lambda raw: yaml.dump(raw, allow_unicode=True))
        | st.text(max_size=200)
        | st.text(alphabet="&*!|>{}[]:,-?%@`'\"\\ \n\tab1", max_size=200)
    )
    def run(text):
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
        decodes_or_says_why(path, [], Config)

    fuzz(run, 1000)


def test_settings_on_the_command_line(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("")
    study = [*setting_names(StudyConfig)]

    @given(
        st.lists(
            st.tuples(
                st.sampled_from(study) | st.text(max_size=10),
                SCALARS.map(str) | VALUES.map(lambda v: json.dumps(v, default=str)),
            ).map("=".join)
            | st.text(max_size=30),
            max_size=3,
        ),
        st.sampled_from([Config, StudyConfig]),
    )
    def run(words, cls):
        decodes_or_says_why(path, words, cls)

    fuzz(run, 1000)


def test_rank_plan_files(tmp_path):
    path = tmp_path / "plan.json"
    ranks = st.lists(st.integers(-3, 9) | st.sampled_from([2**16, 10**400]) | SCALARS, max_size=5)
    whole = st.lists(st.integers(0, 9), min_size=4, max_size=4)

    @given(
        st.one_of(
            st.fixed_dictionaries(
                {"ranks": st.dictionaries(st.sampled_from(MODULES), whole, max_size=7)}
            ),
            st.fixed_dictionaries({"ranks": ranks | whole}),
            st.dictionaries(st.sampled_from([*MODULES, "ranks", "lm_head"]), ranks | VALUES),
            VALUES,
        ).map(lambda raw: json.dumps(raw, default=str))
        | st.text(max_size=80)
        | st.sampled_from(["[" * 3_000, '{"ranks": [NaN, Infinity, 1, 1]}', "\ufeff{}"]),
        st.sampled_from([None, 1, 8]),
        st.sampled_from([None, 1, 50]),
    )
    def run(text, max_rank, budget):
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
        try:
            config = LoraConfig(plan=str(path), max_rank=max_rank, rank_budget=budget)
            plan = make_rank_plan(config, 4)
        except ConfigError as error:
            one_line(error)
            return
        assert plan.total_rank >= 1 and np.isfinite(np.concatenate([*plan.scales().values()])).all()
        again = RankPlan.from_json(json.loads(json.dumps(plan.to_json())))
        assert again.to_json() == plan.to_json()

    fuzz(run, 1000)


def test_plan_edits():
    words = st.builds(
        "{}{}={}".format,
        st.sampled_from([*MODULES, "layers", "layer"]),
        st.sampled_from(["", ".0", ".1-2", ".3-1", ".9999", ".-1"])
        | st.text(".0123456789-", max_size=6),
        st.integers(-2, 2**17).map(str) | st.text(string.digits + "٣²x", max_size=6),
    )

    @given(st.lists(words, max_size=4))
    def run(given_words):
        rest, taken = take_edits(given_words)
        assert len(rest) + len(taken.get("edits", ())) == len(given_words)
        ranks = {"q_proj": np.full(4, 2)}
        try:
            for edit in taken.get("edits", ()):
                apply_edit(edit, ranks)
        except ConfigError as error:
            one_line(error)
        assert all(len(values) == 4 and values.min() >= 0 for values in ranks.values())

    fuzz(run, 1000)
