"""The image for hosts of accelerators, and what starts it: Dockerfile, the manifests of Kubernetes, SLURM's script."""

import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from typing import Any

import pytest
import yaml
from config.test_names import flags_of
from training.tools import ROOT

from bigmac_jax.config import check_batch, load_config

EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
HOST_FLAGS = ("coordinator", "num_processes", "process_id", "distributed", "peer_timeout")
MANIFESTS = {"gke_tpu.yaml": 4, "gke_tpu_slices.yaml": 4, "gke_gpu.yaml": 8}  # → devices of a pod


def instructions() -> list[tuple[str, str]]:
    lines = (ROOT / "Dockerfile").read_text().replace("\\\n", " ").splitlines()
    return [(line.split()[0], line.split(maxsplit=1)[1]) for line in lines if line and not line.startswith("#")]


def follow(place: pathlib.Path, arguments: dict[str, str], env: dict[str, str]) -> list[str]:
    """Does in `place` what the instructions say, without containers: RUN lines by bash; returns what CMD names."""
    folder, end = place, []
    values = dict(env)
    for word, rest in instructions():
        if word == "ARG":
            name, _, default = rest.partition("=")
            values[name] = arguments.get(name, default)
        elif word == "ENV":
            values |= dict(pair.split("=", 1) for pair in rest.split())
        elif word == "WORKDIR":
            folder = place / rest.lstrip("/")
            folder.mkdir(parents=True, exist_ok=True)
        elif word == "COPY":
            *files, target = rest.split()
            for file in files:
                if (ROOT / file).is_dir():
                    shutil.copytree(ROOT / file, folder / target, ignore=shutil.ignore_patterns("__pycache__"))
                else:
                    shutil.copy(ROOT / file, folder / target)
        elif word == "RUN":
            ran = subprocess.run(
                ["bash", "-euc", rest], cwd=folder, env=values, capture_output=True, text=True, timeout=900
            )
            assert ran.returncode == 0, f"{rest}: {ran.stderr[-2000:]}"
        elif word == "CMD":
            end = eval(rest)
        else:
            assert word == "FROM", word
    return end


def test_the_image_needs_nothing_but_a_python() -> None:
    """No registry of ours; what is copied is there, and sent to the builder; extras are those of the package."""
    found = instructions()
    arguments = dict(rest.split("=") for word, rest in found if word == "ARG")
    assert [rest for word, rest in found if word == "FROM"] == ["${BASE}"]
    assert re.fullmatch(r"python:3\.1[123]-slim", arguments["BASE"])
    sent = [line[1:] for line in (ROOT / ".dockerignore").read_text().split() if line.startswith("!")]
    copied = [file for word, rest in found if word == "COPY" for file in rest.split()[:-1]]
    assert sorted(copied) == sorted(sent) and all((ROOT / file).exists() for file in copied)
    pages = "".join((ROOT / name).read_text() for name in ("Dockerfile", "docs/hosts.md", "docs/training.md", *(
        f"scripts/{name}" for name in MANIFESTS)))  # fmt: skip
    extras = [name for names in re.findall(r"EXTRAS=([\w,]+)", pages) for name in names.split(",")]
    assert {"gpu", "tpu", "gcs"} <= set(extras) <= set(EXTRAS)


@pytest.mark.full
def test_the_image_is_built(tmp_path: pathlib.Path) -> None:
    """In a fresh environment, not a container, with a small extra: every RUN line, and what a container starts."""
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True)
    keep = ("HOME", "PIP_INDEX_URL", "PIP_CONFIG_FILE", "PIP_CACHE_DIR", "SSL_CERT_FILE", "REQUESTS_CA_BUNDLE")
    kept = {name: os.environ[name] for name in keep if name in os.environ}
    env = kept | {"PATH": f"{tmp_path}/venv/bin:/usr/bin:/bin", "BIGMAC_CACHE_DIR": str(tmp_path / "cache")}
    start = follow(tmp_path / "root", {"EXTRAS": "serve"}, env)
    shown = subprocess.run(start, cwd=tmp_path, env=env, capture_output=True, text=True, check=True).stdout
    assert "\n  train " in shown


@pytest.mark.parametrize("name", MANIFESTS)
def test_a_manifest_starts_what_can_run(name: str) -> None:
    """Its command has flags that there are, and a config whose batch divides over the devices of all its pods."""
    loaded: dict[str, Any] = yaml.safe_load((ROOT / "scripts" / name).read_text())
    (jobs,) = loaded["spec"]["replicatedJobs"]
    job = jobs["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    (devices,) = container["resources"]["limits"].values()
    assert devices == MANIFESTS[name] and job["parallelism"] == job["completions"]
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    shell, c, line = container["command"]
    program = shlex.split(line)
    assert (shell, c, program[:3]) == ("bash", "-c", ["exec", "bigmac", "train"])
    flags = dict(word.removeprefix("--").partition("=")[::2] for word in program[3:])
    overrides = [f"{flag[7:]}={value}" for flag, value in flags.items() if flag.startswith("config.")]
    assert {flag for flag in flags if "." not in flag} <= {*flags_of("train"), *HOST_FLAGS}
    assert 0 < int(flags["stopped_exit_code"]) < 256  # or a job that was stopped would be complete
    config = load_config(flags["config"], overrides)
    assert config.mesh.replica == jobs.get("replicas", 1)
    check_batch(config, devices * job["parallelism"] // config.mesh.model_ranks)
    if "coordinator" in flags:
        own, of = loaded["metadata"]["name"], jobs["name"]
        assert flags["coordinator"].partition(":")[0] == f"{own}-{of}-0-0.{own}"
        assert (flags["num_processes"], flags["process_id"]) == (str(job["parallelism"]), "$JOB_COMPLETION_INDEX")


@pytest.mark.parametrize(
    ("env", "wanted"),
    [
        ({}, "--kill-on-bad-exit=1 --label python train.py --distributed --workdir=a b"),
        ({"PYTHON": "my python"}, "--kill-on-bad-exit=1 --label my python train.py --distributed --workdir=a b"),
        (
            {"IMAGE": "my.sif"},
            "--kill-on-bad-exit=1 --label apptainer exec --nv my.sif bigmac train --distributed --workdir=a b",
        ),
    ],
)
def test_slurm(env: dict[str, str], wanted: str, tmp_path: pathlib.Path) -> None:
    srun = tmp_path / "srun"
    srun.write_text('#!/bin/sh\necho "$# $*"\n')
    srun.chmod(0o755)
    clean = {"PATH": f"{tmp_path}:/usr/bin:/bin"} | env
    ran = subprocess.run(
        ["bash", "scripts/slurm.sh", "--workdir=a b"], cwd=ROOT, env=clean, capture_output=True, text=True, check=True
    )
    words = 6 if "IMAGE" not in env else 10
    assert ran.stdout == f"{words} {wanted}\n"


def test_make_env_says_what_it_does(tmp_path: pathlib.Path) -> None:
    """Before it takes its time, and how to go on; with a pip that does nothing."""
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    python.write_text("#!/bin/sh\n")
    python.chmod(0o755)
    make = ["make", "--silent", "env", f"VENV={tmp_path}", f"PYTHON={sys.executable}"]
    first, again = (subprocess.run(make, cwd=ROOT, capture_output=True, text=True, check=True).stdout for _ in range(2))
    enter = f"to enter the environment: source {tmp_path}/bin/activate\n"
    assert first == f"installing bigmac_jax and its packages into {tmp_path}: 1.2 GB, a minute or more\n{enter}"
    assert again == enter
