"""The scripts in tpu/ against a gcloud that writes down what it is asked and plays the first host:
what they copy arrives in a directory, what they run there runs in it, with a python that writes
down its words. Nothing here says that the cloud accepts them."""

from __future__ import annotations

import math
import os
import shlex
import shutil
import stat
import subprocess
import time
from pathlib import Path

import pytest
import yaml

from jaxgrpo.config_files import load_config
from jaxgrpo.study.sweep import SweepConfig
from tests.test_layout import ROOT

GCLOUD = r"""#!/usr/bin/env bash
set -euo pipefail
printf '%s\0' "$@" >>"$FAKE/gcloud" && printf '\n\0' >>"$FAKE/gcloud"
case " $* " in
*" config get-value project "*) echo from-gcloud ;;
*" tpu-vm describe "*) [ -e "$FAKE/slice" ] ;;
*" tpu-vm create "*) touch "$FAKE/slice" ;;
*" tpu-vm delete "*) rm "$FAKE/slice" ;;
*" tpu-vm ssh "*)
    while [ "$1" != --command ]; do shift; done
    cd "$FAKE/home" && HOME="$FAKE/home" bash -c "$2" ;;
*" tpu-vm scp --recurse "*)
    shift 4
    cp -r "$FAKE/home/${2#*:}" "$3" ;;
*" tpu-vm scp "*)
    shift 4
    cp "$1" "$FAKE/home/${2#*:}" ;;
*) echo "what is this: $*" >&2; exit 9 ;;
esac
"""
NOTES = r"""#!/usr/bin/env bash
printf '%s\0' "$@" >>"$FAKE/$(basename "$0")" && printf '\n\0' >>"$FAKE/$(basename "$0")"
"""
SETTINGS = {"TPU_NAME": "mine", "ZONE": "us-west4-a", "TYPE": "v5litepod-16"}
PLACE = ["--zone", "us-west4-a", "--project", "from-gcloud"]
TPU = ["compute", "tpus", "tpu-vm"]


@pytest.fixture
def fake(tmp_path):
    """A directory with `bin` for the PATH and `home` for what lies on the hosts."""
    if not (ROOT / ".git").exists():
        pytest.skip("sync.sh copies what git knows")
    for name, text in (("bin/gcloud", GCLOUD), ("bin/gcsfuse", NOTES), ("bin/mountpoint", NOTES),
                       ("home/jaxgrpo/.venv/bin/python", NOTES)):  # fmt: skip
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    # Not mounted yet.
    with (tmp_path / "bin/mountpoint").open("a") as file:
        file.write("exit 1\n")
    return tmp_path


def run(fake, script, *words, expect=0, **settings):
    given = {name: value for name, value in {**SETTINGS, **settings}.items() if value is not None}
    kept = {name: os.environ[name] for name in ("LANG", "TMPDIR") if name in os.environ}
    done = subprocess.run(
        ["bash", str(ROOT / "tpu" / script), *words],
        env={"FAKE": str(fake), "PATH": f"{fake / 'bin'}:/usr/local/bin:/usr/bin:/bin",
             "HOME": str(fake), **kept, **given},
        capture_output=True,
        text=True,
        timeout=120,
    )  # fmt: skip
    assert done.returncode == expect, done.stderr
    return done


def calls(fake, name="gcloud"):
    """Every call's words, in order."""
    path = fake / name
    if not path.exists():
        return []
    return [one.split("\0")[:-1] for one in path.read_text().split("\n\0")[:-1]]


def trained(fake):
    """The words of the training that was started in the background."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        found = [words for words in calls(fake, "python") if words[:2] == ["-m", "jaxgrpo.run"]]
        if found:
            return found
        time.sleep(0.05)
    raise AssertionError("nothing was started")


def test_launch_creates_copies_installs_and_starts(fake):
    odd = 'data.prompt_suffix=it\'s $HOME; "so"'
    out = run(fake, "launch.sh", "tpu/v5e-16_1.5b.yaml", "steps=100", odd, BUCKET="bucket").stdout
    asked = [words for words in calls(fake) if words[:2] != ["config", "get-value"]]
    assert asked[0] == [*TPU, "describe", "mine", *PLACE]
    version = ["--accelerator-type", "v5litepod-16", "--version", "v2-alpha-tpuv5-lite"]
    assert asked[1] == [*TPU, "create", "mine", *PLACE, *version]
    copy, install, mount, start = asked[2:]
    assert copy[:4] == [*TPU, "scp"] and copy[5:] == ["mine:jaxgrpo.tgz", *PLACE, "--worker=all"]
    for words in (install, mount, start):
        assert words[:-1] == [*TPU, "ssh", "mine", *PLACE, "--worker=all", "--command"]
    assert "follow it with: gcloud compute tpus tpu-vm ssh mine" in out
    home = fake / "home"
    for name in ("pyproject.toml", "tpu/v5e-16_1.5b.yaml", "jaxgrpo/run.py"):
        assert (home / "jaxgrpo" / name).read_bytes() == (ROOT / name).read_bytes()
    pip = ["-m", "pip", "install", "--quiet"]
    assert calls(fake, "python")[:2] == [[*pip, "--upgrade", "pip"], [*pip, "--editable", ".[tpu]"]]
    assert calls(fake, "gcsfuse") == [["--implicit-dirs", "bucket", str(home / "runs")]]
    where = f"run_dir={home}/runs/v5e-16_1.5b"
    train = ["-m", "jaxgrpo.run", "train", "tpu/v5e-16_1.5b.yaml", where]
    assert trained(fake) == [[*train, "steps=100", odd]]


def test_launch_again_uses_the_slice_that_is_there_and_adds_no_words(fake):
    (fake / "slice").touch()
    run(fake, "launch.sh", "tpu/v5e-16_1.5b.yaml", SPOT="1", PROJECT="mine-too")
    asked = calls(fake)
    assert [words[3] for words in asked] == ["describe", "scp", "ssh", "ssh"]
    assert all("mine-too" in words for words in asked)
    assert not calls(fake, "gcsfuse")
    (words,) = trained(fake)
    assert words[-1] == f"run_dir={fake}/home/runs/v5e-16_1.5b"


def test_spot_slices_and_software_are_asked_for(fake):
    run(fake, "launch.sh", "tpu/v6e-8_1.5b.yaml", TYPE="v6e-8", SPOT="1", VERSION="new")
    create = next(words for words in calls(fake) if words[3:4] == ["create"])
    assert create[9:] == ["--accelerator-type", "v6e-8", "--version", "new", "--spot"]


@pytest.mark.parametrize(
    ("words", "settings", "code", "message"),
    [
        (["tpu/none.yaml"], {}, 2, "tpu/none.yaml is not a file of the repository"),
        ([], {}, 1, "name a configuration"),
        (["tpu/v5e-16_1.5b.yaml"], {"TYPE": "v4-8"}, 2, "none of v5litepod-N"),
        (["tpu/v5e-16_1.5b.yaml"], {"TPU_NAME": None}, 1, "set TPU_NAME"),
        (["tpu/v5e-16_1.5b.yaml"], {"ZONE": None}, 1, "set ZONE"),
    ],
)
def test_launch_refuses_before_it_asks_for_anything(fake, words, settings, code, message):
    assert message in run(fake, "launch.sh", *words, expect=code, **settings).stderr
    assert not [words for words in calls(fake) if words[:3] == TPU]


def test_delete_asks_unless_told_not_to(fake):
    for settings, more in (({}, []), ({"YES": "1"}, ["--quiet"])):
        (fake / "slice").touch()
        run(fake, "delete.sh", **settings)
        assert calls(fake)[-1] == [*TPU, "delete", "mine", *PLACE, *more]


def test_fetch_copies_a_run_here(fake):
    (fake / "home/runs/some").mkdir(parents=True)
    (fake / "home/runs/some/metrics.jsonl").write_text("{}\n")
    here = fake / "repository"
    shutil.copytree(ROOT / "tpu", here / "tpu")
    run(fake, here / "tpu" / "fetch.sh", "some")
    there = ["mine:runs/some", f"{here}/runs/", *PLACE, "--worker=0"]
    assert calls(fake)[-1] == [*TPU, "scp", "--recurse", *there]
    assert (here / "runs/some/metrics.jsonl").read_text() == "{}\n"


# ray.io/v1 of KubeRay: github.com/ray-project/kuberay, ray-operator/apis/ray/v1/*_types.go
RAY_JOB = {
    "activeDeadlineSeconds", "backoffLimit", "clusterSelector", "deletionStrategy", "entrypoint",
    "entrypointNumCpus", "entrypointNumGpus", "entrypointResources", "jobId", "managedBy",
    "metadata", "rayClusterSpec", "runtimeEnvYAML", "shutdownAfterJobFinishes", "submissionMode",
    "submitterConfig", "submitterPodTemplate", "suspend", "ttlSecondsAfterFinished",
}  # fmt: skip
RAY_CLUSTER = {
    "autoscalerOptions", "enableInTreeAutoscaling", "headGroupSpec", "headServiceAnnotations",
    "rayVersion", "suspend", "workerGroupSpecs",
}  # fmt: skip
WORKER_GROUP = {
    "groupName", "maxReplicas", "minReplicas", "numOfHosts", "rayStartParams", "replicas",
    "scaleStrategy", "template",
}  # fmt: skip


def test_the_ray_job_has_kuberays_fields_whole_slices_and_a_sweep_that_is_read(monkeypatch):
    job = yaml.safe_load((ROOT / "tpu" / "rayjob.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    spec = job["spec"]
    cluster = spec["rayClusterSpec"]
    head, (workers,) = cluster["headGroupSpec"], cluster["workerGroupSpecs"]
    assert spec.keys() <= RAY_JOB and cluster.keys() <= RAY_CLUSTER
    assert head.keys() == {"rayStartParams", "template"}
    assert {"groupName", "minReplicas", "maxReplicas"} <= workers.keys() <= WORKER_GROUP
    assert workers["minReplicas"] <= workers["replicas"] <= workers["maxReplicas"]
    for group in (head, workers):
        assert isinstance(group["rayStartParams"], dict)
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        mounted = {mount["name"] for mount in container["volumeMounts"]}
        assert mounted == {volume["name"] for volume in pod["volumes"]}
        assert container["resources"]["requests"] == container["resources"]["limits"]
    pod = workers["template"]["spec"]
    topology = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"]
    chips = int(pod["containers"][0]["resources"]["requests"]["google.com/tpu"])
    assert workers["numOfHosts"] * chips == math.prod(map(int, topology.split("x")))

    monkeypatch.chdir(ROOT)
    words = shlex.split(spec["entrypoint"])
    assert words[:4] == ["python", "-m", "jaxgrpo.run", "sweep"]
    config, first, *rest = words[4:]
    sweep = load_config([Path(config)], [first, *rest], SweepConfig).sweep
    assert (sweep.hosts, sweep.tpus) == (workers["numOfHosts"], chips)
    assert sweep.tpu_topology == topology
    volume = pod["containers"][0]["volumeMounts"][0]["mountPath"]
    assert first.startswith(f"run_dir={volume}/")
