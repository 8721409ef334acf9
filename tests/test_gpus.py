"""GPUs are counted without a driver, as CUDA would count them."""

import pytest

from jaxllm.train import gpus
from jaxllm.train.gpus import count_gpus, has_gpu


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A machine with two GPUs."""
    for name in ("nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm"):
        (tmp_path / name).touch()
    monkeypatch.setattr(gpus, "DEV", tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("environment", "count"),
    [
        ({}, 2),
        ({"CUDA_VISIBLE_DEVICES": "1"}, 1),
        ({"CUDA_VISIBLE_DEVICES": "GPU-3f, GPU-5c"}, 2),
        ({"CUDA_VISIBLE_DEVICES": ""}, 0),
        ({"CUDA_VISIBLE_DEVICES": "-1"}, 0),
        ({"CUDA_VISIBLE_DEVICES": "0,-1,1"}, 1),
        ({"JAX_PLATFORMS": "cpu"}, 0),
        ({"JAX_PLATFORMS": "cuda,cpu"}, 2),
    ],
)
def test_the_gpus_that_a_process_is_shown(machine, environment, count):
    assert count_gpus(environment) == count
    assert has_gpu(environment) == (count > 0)


def test_a_gpu_that_is_named_need_not_be_there(machine):
    for file in machine.iterdir():
        file.unlink()
    assert not has_gpu({}) and not has_gpu({"CUDA_VISIBLE_DEVICES": "0"})
