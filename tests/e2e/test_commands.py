"""Every command of --help and its example, run one after another as a person would."""

import json
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

import jaxgrpo
from jaxgrpo.bench.settings import BenchConfig
from jaxgrpo.commands.command import PROGRAM, command_help, setting_names
from jaxgrpo.config import Config
from jaxgrpo.config_files import load_config
from jaxgrpo.model.peft_files import read_peft
from jaxgrpo.model.weights import EMBEDDED_DIR
from jaxgrpo.records.run_directory import read_jsonl
from jaxgrpo.run import COMMANDS, main, usage
from jaxgrpo.study.sweep import SweepConfig
from tests.e2e.conftest import SMALL, example


@pytest.mark.parametrize("name", COMMANDS)
def test_help_fits_a_screen_and_shows_an_example(name, capsys):
    assert main([name, "--help"]) == 0
    text = capsys.readouterr().out
    assert text == command_help(name, COMMANDS[name])
    lines = text.splitlines()
    assert len(lines) <= 24 and max(map(len, lines)) <= 80, text
    assert lines[-1] == f"  {PROGRAM} {COMMANDS[name].example}"


def test_the_table_of_commands_fits_a_screen(capsys):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert text == usage()
    assert len(text.splitlines()) <= 24 and max(map(len, text.splitlines())) <= 80
    assert all(re.search(rf"^  {name} ", text, re.MULTILINE) for name in COMMANDS)


def test_the_program_alone_prints_help_and_trains_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main([]) == 0
    assert capsys.readouterr().out == usage() and not list(tmp_path.iterdir())


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"jaxgrpo {jaxgrpo.__version__}\n"


def test_every_setting_has_its_default_and_its_meaning_printed(capsys):
    assert main(["settings"]) == 0
    printed = capsys.readouterr().out
    names = {*setting_names(SweepConfig), *setting_names(BenchConfig)}
    assert set(re.findall(r"^([a-z_.0-9]+)=", printed, re.MULTILINE)) == names
    assert main(["settings", "grpo"]) == 0
    section = capsys.readouterr().out
    assert "grpo.group_size=8    (int)\n    Completions per prompt;" in section
    assert "grpo.loss=dapo    (grpo, bnpo, dr_grpo, dapo, cispo, gspo)" in section
    assert "\nlora." not in section and section in printed
    # What is printed as a default is what an override makes of it.
    lines = [line.split("    (")[0] for line in printed.splitlines() if "    (" in line]
    of_runs = [line for line in lines if line.partition("=")[0] in set(setting_names(Config))]
    assert load_config([], of_runs) == Config()
    assert main(["settings", "gropo"]) == 2
    assert "did you mean 'grpo'?" in capsys.readouterr().err


def test_help_and_plans_need_no_jax_to_start():
    """A person who asks for help does not wait for an accelerator."""
    code = "import sys, jaxgrpo.run; jaxgrpo.run.main(['--help']); sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


def test_eval_of_a_run_directory(here, capsys):
    assert main(["eval", "runs/try"]) == 0
    output = capsys.readouterr().out
    assert "after step 2" in output and "accuracy" in output


def test_a_run_directory_that_was_moved_is_still_one(here, capsys, tmp_path):
    import shutil

    shutil.copytree(here / "runs" / "try", tmp_path / "moved")
    assert main(["eval", str(tmp_path / "moved")]) == 0
    assert "moved after step 2" in " ".join(capsys.readouterr().out.split())


def test_export_merged_completes_in_transformers_as_the_run_did(here, capsys):
    assert main(example("export")) == 0
    merged = here / "runs" / "merged"
    tokenizer = AutoTokenizer.from_pretrained(merged)
    model = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32).eval()
    for record in read_jsonl(here / "runs" / "try" / "eval" / "step_000002.jsonl")[:4]:
        inputs = tokenizer(record["prompt"], return_tensors="pt", add_special_tokens=False)
        with torch.no_grad():
            out = model.generate(**inputs, max_new_tokens=32, do_sample=False)
        text = tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        assert text == record["completions"][0]
    card = (merged / "README.md").read_text()
    for part in ("library_name: transformers", "accuracy after", "gsm8k_answer", "runs/try"):
        assert part in card


def test_export_forms_hold_the_same_adapter(here):
    for form in ("peft", "uniform_rank"):
        assert main(["export", "runs/try", f"out=runs/as-{form}", f"form={form}"]) == 0
        one = read_peft(here / "runs" / f"as-{form}")
        for name, module in read_peft(here / "runs" / "try" / "adapter").modules.items():
            np.testing.assert_allclose(one.modules[name].delta(), module.delta(), atol=1e-7)


def test_compress_to_a_share_of_the_parameters(here, capsys):
    assert main(["compress", "runs/try/adapter", "out=runs/quarter", "parameters=0.25"]) == 0
    small, whole = (read_peft(here / "runs" / name) for name in ("quarter", "try/adapter"))
    assert 0.24 * whole.parameters < small.parameters <= 0.25 * whole.parameters
    assert "parameters=0.25" in (here / "runs" / "quarter" / "README.md").read_text()


def test_compress_says_what_it_keeps_and_peft_reads_it(here, capsys):
    assert main(example("compress")) == 0
    output = capsys.readouterr().out
    energy = float(re.search(r"([0-9.]+)% of the energy kept", output)[1])
    assert 90 <= energy < 99
    small, whole = (read_peft(here / "runs" / name) for name in ("small", "try/adapter"))
    assert small.parameters < whole.parameters
    kept = sum((m.delta().astype(float) ** 2).sum() for m in small.modules.values())
    there = sum((m.delta().astype(float) ** 2).sum() for m in whole.modules.values())
    assert kept / there == pytest.approx(energy / 100, abs=1e-3)
    base = AutoModelForCausalLM.from_pretrained(EMBEDDED_DIR, dtype=torch.float32)
    PeftModel.from_pretrained(base, here / "runs" / "small")
    assert f"{energy:.2f}% of the energy" in (here / "runs" / "small" / "README.md").read_text()


def test_an_adapter_is_where_training_and_evaluation_start(here, capsys):
    """The merged model and base + adapter are one policy; training goes on from it."""
    adapter = "lora.adapter=runs/try/adapter"
    assert main(["eval", adapter, "run_dir=runs/evaluated", *SMALL]) == 0
    (by_hand,) = (here / "runs" / "evaluated" / "evaluations").glob("*/step_000000.jsonl")
    after = here / "runs" / "try" / "eval" / "step_000002.jsonl"
    ours, theirs = ([r["completions"] for r in read_jsonl(path)] for path in (by_hand, after))
    assert ours == theirs
    # At a learning rate of zero nothing moves, whatever the scale rule and the width.
    settings = [adapter, "lora.scale_rule=rslora", "lora.max_rank=12", *SMALL]
    assert main(["train", *settings, "optim.learning_rate=0", "run_dir=runs/on", "steps=1"]) == 0
    before = read_peft(here / "runs" / "try" / "adapter").modules
    for name, module in read_peft(here / "runs" / "on" / "adapter").modules.items():
        np.testing.assert_allclose(module.delta(), before[name].delta(), rtol=0, atol=1e-6)
    assert main(["plan", adapter]) == 0
    assert "448 ranks" in capsys.readouterr().out


def test_chat_shows_both_policies(here, capsys, monkeypatch):
    assert main(example("chat")) == 0
    output = capsys.readouterr().out
    assert "base model" in output and "runs/try after step 2" in output
    import io

    monkeypatch.setattr(sys, "stdin", io.StringIO("Tom has 3 apples.\n\n"))
    assert main(["chat", "run_dir=runs/absent"]) == 0
    assert "there is no adapter" in capsys.readouterr().out


def test_plan_prints_edits_draws_and_writes(here, capsys):
    assert main(example("plan")) == 0
    ranks = json.loads((here / "plan.json").read_text())["ranks"]
    assert ranks["q_proj"] == [4, 4, 8, 8, 8, 8, 8, 16]
    assert ranks["up_proj"] == [4, 4, 8, 8, 8, 8, 8, 8]
    assert "400 ranks, 138,240 trainable parameters" in capsys.readouterr().out
    assert main(["plan", "lora.plan=plan.json", "draw=3", "out=drawn.json"]) == 0
    drawn = json.loads((here / "drawn.json").read_text())["ranks"]
    assert sum(map(sum, drawn.values())) == 400 and drawn != ranks
    assert main(["plan", "lora.plan=drawn.json", "out=plan.png"]) == 0
    assert (here / "plan.png").read_bytes().startswith(b"\x89PNG")
    # What it writes is what training takes.
    assert main(["check", "lora.plan=drawn.json", "--dry-run"]) == 0
    assert "400 ranks" in capsys.readouterr().out


def test_check_loads_everything(here, capsys):
    assert main(example("check")) == 0
    assert "224 ranks" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["train", "eval", "check"])
def test_dry_run_shows_what_would_be_and_writes_nothing(here, capsys, name):
    assert main([name, "run_dir=runs/dry", "lora.rank=3", "--dry-run"]) == 0
    output = capsys.readouterr().out
    for part in ("rank: 3", "168 ranks", "trainable parameters", "memory", "peak"):
        assert part in output
    assert not (here / "runs" / "dry").exists()


def test_dry_run_of_a_study(capsys, monkeypatch):
    from tests.test_layout import ROOT

    monkeypatch.chdir(ROOT)
    assert main(example("study")) == 0
    assert "proportional" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("line", "word", "offered"),
    [
        ("jaxgrpo tr", 1, "train"),
        ("jaxgrpo train grpo.group", 2, "grpo.group_size="),
        ("jaxgrpo train --dry", 2, "--dry-run"),
        ("jaxgrpo compress ener", 2, "energy="),
        ("jaxgrpo study study.arms.se", 2, "study.arms.seeds="),
    ],
)
def test_completion_offers_commands_and_settings(here, capsys, line, word, offered):
    assert main(example("completion")) == 0
    script = capsys.readouterr().out
    ask = f"COMP_WORDS=({line}); COMP_CWORD={word}; _jaxgrpo; printf '%s\\n' \"${{COMPREPLY[@]}}\""
    done = subprocess.run(["bash", "-c", script + ask], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert offered in done.stdout.splitlines()


def test_completion_for_zsh_is_bashs_under_its_emulation(capsys):
    assert main(["completion", "zsh"]) == 0
    assert capsys.readouterr().out.startswith("autoload -U +X bashcompinit")
