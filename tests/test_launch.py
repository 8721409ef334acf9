"""The recipes in docs/launch, run with stand-ins for the programs they call."""

import json
import os
import re
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from jaxllm.config import RunConfig
from jaxllm.parallel import DistributedConfig
from jaxllm.train.cluster import Place, find

ROOT = Path(__file__).parents[1]
LAUNCH = ROOT / "docs" / "launch"
sys.path.insert(0, str(ROOT / "scripts"))
import pretrain  # type: ignore[import-not-found]  # noqa: E402

# Notes its arguments; ends as $CODE says, having written $SUMMARY where it trains.
PYTHON = """#!/bin/bash
trap 'echo TERM >> "$NOTES/signals"; stop=1' TERM
printf '%s\\n' "$@" > "$NOTES/python"
for i in $(seq ${TICKS:-0}); do [ -n "$stop" ] || sleep 0.05; done
exit ${CODE:-0}
"""
SRUN = """#!/bin/bash
while [[ "$1" == --* ]]; do echo "$1" >> "$NOTES/srun"; shift; done
exec "$@"
"""
SCONTROL = '#!/bin/bash\necho "$@" > "$NOTES/scontrol"\n'


@pytest.fixture
def stage(tmp_path):
    """A folder to run a recipe in, with stand-ins first in the PATH."""
    programs = tmp_path / "programs"
    programs.mkdir()
    for name, text in (("python", PYTHON), ("srun", SRUN), ("scontrol", SCONTROL)):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    environment = os.environ | {
        "PATH": f"{programs}:{os.environ['PATH']}", "NOTES": str(tmp_path),
        "SLURM_JOB_ID": "77",
    }  # fmt: skip

    def perform(*command: str, **more: str) -> int:
        return subprocess.run(
            ["bash", *command], cwd=tmp_path, env=environment | more, timeout=60
        ).returncode

    perform.folder = tmp_path  # type: ignore[attr-defined]
    perform.environment = environment  # type: ignore[attr-defined]
    return perform


def asked(folder: Path) -> RunConfig:
    """What the recipe's command asks for; SystemExit for a flag that is not there."""
    script, *flags = (folder / "python").read_text().split("\n")[:-1]
    assert script == "scripts/pretrain.py" and (ROOT / script).exists()
    return pretrain.parse(flags)


def finish(folder: Path, out: str, finished: bool) -> None:
    (folder / out).mkdir(parents=True, exist_ok=True)
    text = json.dumps({"finished": finished, "step": 4}, indent=2)
    (folder / out / "summary.json").write_text(text)


def test_every_recipe_is_in_the_index():
    listed = set(re.findall(r"\]\((\w[\w.]*)\)", (LAUNCH / "README.md").read_text()))
    assert listed == {p.name for p in LAUNCH.iterdir() if p.is_file()} - {"README.md"}


@pytest.mark.parametrize("name", ["one_node.sh", "slurm.sbatch"])
def test_shell_is_sound(name):
    subprocess.run(["bash", "-n", str(LAUNCH / name)], check=True)
    assert "set -euo pipefail" in (LAUNCH / name).read_text()


def test_a_flag_that_does_not_exist_fails_here(capsys):
    with pytest.raises(SystemExit):
        pretrain.parse(["k-215m", "--train.batch-sizes", "8"])
    assert "--train.batch-sizes" in capsys.readouterr().err


def test_one_node(stage):
    assert stage(str(LAUNCH / "one_node.sh"), "shards") == 0
    config = asked(stage.folder)
    assert config.data.path == "shards" and config.parallel.data == -1
    assert config.train.batch_size % 8 == 0
    assert stage(str(LAUNCH / "one_node.sh")) != 0  # the data must be named


def test_slurm_asks_for_what_the_run_needs():
    text = (LAUNCH / "slurm.sbatch").read_text()
    options = dict(re.findall(r"^#SBATCH --([\w-]+)=?(.*)$", text, re.M))
    assert options["signal"] == "TERM@120" and "requeue" in options
    assert options["ntasks-per-node"] == options["gpus-per-node"]
    assert options["open-mode"] == "append"  # a requeued job goes on in its log


@pytest.mark.parametrize(
    ("code", "finished", "requeued"),
    [
        (0, True, False), (0, False, True), (75, None, True), (137, False, True),
        (2, None, False), (65, False, False), (74, False, False),
    ],
)  # fmt: skip
def test_slurm_requeues_until_the_run_is_finished(stage, code, finished, requeued):
    if finished is not None:
        finish(stage.folder, "runs/k-215m", finished)
    script = str(LAUNCH / "slurm.sbatch")
    assert stage(script, "shards", CODE=str(code)) == code
    config = asked(stage.folder)
    assert (config.out, config.data.path) == ("runs/k-215m", "shards")
    assert config.train.batch_size % 16 == 0 and 16 % config.parallel.fsdp == 0
    noted = stage.folder / "scontrol"
    assert noted.exists() == requeued
    assert not requeued or noted.read_text() == "requeue 77\n"
    assert "--kill-on-bad-exit=1" in (stage.folder / "srun").read_text()


@pytest.fixture(scope="module")
def jobset() -> dict:
    return yaml.safe_load((LAUNCH / "jobset.yaml").read_text())


def container(jobset: dict) -> dict:
    job = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
    return job["template"]["spec"]["containers"][0]


def test_the_jobset_describes_the_processes_that_the_run_expects(jobset):
    assert (jobset["apiVersion"], jobset["kind"]) == (
        "jobset.x-k8s.io/v1alpha2", "JobSet"
    )  # fmt: skip
    (replicated,) = jobset["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    pod = job["template"]["spec"]
    assert job["completionMode"] == "Indexed" and job["backoffLimit"] == 0
    assert job["parallelism"] == job["completions"]
    assert replicated["replicas"] == 1
    # Kubernetes demands Never of a job with a pod failure policy.
    assert pod["restartPolicy"] == "Never"
    assert pod["terminationGracePeriodSeconds"] >= 60
    (rule,) = job["podFailurePolicy"]["rules"]
    assert rule["onExitCodes"]["containerName"] == container(jobset)["name"]
    assert (rule["action"], rule["onExitCodes"]["values"]) == ("FailJob", [2, 65, 74])
    (on_mistake,) = jobset["spec"]["failurePolicy"]["rules"]
    assert on_mistake["action"] == "FailJobSet"
    env = {e["name"]: e for e in container(jobset)["env"]}
    index = env["JAX_PROCESS_ID"]["valueFrom"]["fieldRef"]["fieldPath"]
    assert index == "metadata.annotations['batch.kubernetes.io/job-completion-index']"
    name, network = jobset["metadata"]["name"], jobset["spec"]["network"]
    host = f"{name}-{replicated['name']}-0-0.{network['subdomain']}"
    assert network["enableDNSHostnames"] is True
    address = env["JAX_COORDINATOR_ADDRESS"]["value"]
    assert address.rsplit(":", 1)[0] == host
    count = env["JAX_NUM_PROCESSES"]["value"]
    assert int(count) == job["parallelism"]
    seen = {
        "KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "1",
        "JAX_PROCESS_ID": "1", "JAX_NUM_PROCESSES": count,
        "JAX_COORDINATOR_ADDRESS": address,
    }  # fmt: skip
    place = find(DistributedConfig(), seen, n_gpus=8)
    assert place == Place(address, int(count), 1, None)  # and all GPUs of the pod
    mounted = {m["name"] for m in container(jobset)["volumeMounts"]}
    assert mounted == {v["name"] for v in pod["volumes"]}


@pytest.mark.parametrize(
    ("code", "finished", "ends"), [(0, True, 0), (0, False, 75), (2, None, 2)]
)
def test_a_pod_succeeds_only_when_the_run_is_finished(
    stage, jobset, code, finished, ends
):
    shell, option, script = *container(jobset)["command"], *container(jobset)["args"]
    assert (shell, option) == ("bash", "-c")
    script = script.replace("/shared/", f"{stage.folder}/shared/")
    if finished is not None:
        finish(stage.folder, "shared/runs/k-215m", finished)
    assert stage(option, script, CODE=str(code)) == ends
    config = asked(stage.folder)
    assert config.train.batch_size % 16 == 0 and 16 % config.parallel.fsdp == 0


def test_a_drained_pod_lets_the_run_save_and_is_started_again(stage, jobset):
    script = container(jobset)["args"][0]
    script = script.replace("/shared/", f"{stage.folder}/shared/")
    finish(stage.folder, "shared/runs/k-215m", finished=False)
    pod = subprocess.Popen(
        ["bash", "-c", script], cwd=stage.folder,
        env=stage.environment | {"TICKS": "400"},
    )  # fmt: skip
    deadline = time.monotonic() + 30
    while not (stage.folder / "python").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    time.sleep(0.2)
    pod.send_signal(signal.SIGTERM)
    assert pod.wait(timeout=30) == 75
    assert (stage.folder / "signals").read_text() == "TERM\n"


def test_ray_gives_every_worker_the_command():
    recipe = runpy.run_path(str(LAUNCH / "ray_train.py"))
    config = pretrain.parse([*recipe["FLAGS"], "--data.path", "shards"])
    assert config.train.batch_size % 16 == 0 and config.data.path == "shards"


def test_the_image_is_pinned_and_has_what_it_copies():
    text = (LAUNCH / "Dockerfile").read_text()
    (base,) = re.findall(r"^FROM (\S+)$", text, re.M)
    assert re.fullmatch(r"nvidia/cuda:\d+\.\d+\.\d+-base-ubuntu\d+\.\d+", base)
    for sources in re.findall(r"^COPY (.+) \S+$", text, re.M):
        for source in sources.split():
            assert (ROOT / source).exists(), source
    wanted = (ROOT / "pyproject.toml").read_text()
    for package, pin in re.findall(r"'?([a-z-]+)(?:\[\w+\])?==([\d.]+)'?", text):
        least = re.search(rf'"{package}>=([\d.]+)"', wanted)
        assert least, package
        assert [*map(int, pin.split("."))] >= [*map(int, least[1].split("."))]
    extra = re.search(r"\.\[(\w+)\]", text)
    assert extra and f"{extra[1]} = [" in wanted
