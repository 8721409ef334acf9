"""Meters count what they say, and log lines have the seed's form."""

import json
import math
import re
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from jaxllm.config import ComputeConfig, ModelConfig
from jaxllm.model import Transformer
from jaxllm.presets import preset
from jaxllm.train.device import peak_bytes
from jaxllm.train.metrics import (
    Meter,
    append_jsonl,
    flops_per_token,
    peak_flops,
    read_jsonl,
    rewrite_jsonl,
    seconds_of,
    seed_line,
    utilisation,
)


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def test_tokens_per_second_leave_out_paused_time():
    clock = Clock()
    meter = Meter(clock)
    clock.now += 2.0
    meter.stepped(1000, steps=4)
    meter.waited(0.5)
    meter.pause()
    clock.now += 60.0
    meter.resume()
    clock.now += 3.0
    meter.stepped(1500, steps=6)
    assert meter.read() == {"tokens_per_s": 500.0, "step_ms": 500.0, "data_wait": 0.1}
    clock.now += 1.0
    meter.stepped(70)
    # What was counted before the last reading is forgotten.
    expected = {"tokens_per_s": 70.0, "step_ms": 1000.0, "data_wait": 0.0}
    assert meter.read() == pytest.approx(expected)
    assert meter.trained_s == pytest.approx(6.0)


def test_flops_are_those_of_the_two_reference_shapes():
    # The figures are 6 (weights + d V) + 12 L N H T / 2 and / 1, worked out by hand.
    small, large = preset("k-215m").model, preset("k-259m").model
    assert flops_per_token(small, 512) == (1_347_158_016, 1_403_781_120)
    assert flops_per_token(large, 2048) == (1_781_268_480, 2_007_760_896)


def test_flops_agree_with_the_compiler_within_two_percent():
    # Wide enough that norms, softmax and rotations, which the formula leaves out, are
    # small beside the matrix products, as they are in real models.
    model = ModelConfig(
        dim=768, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=3072, max_seq_len=64
    )
    compute = ComputeConfig(unroll=2).resolve(n_layers=2)
    graphdef, state = nnx.split(
        nnx.eval_shape(lambda: Transformer(model, compute, rngs=nnx.Rngs(0)))
    )
    tokens = jax.ShapeDtypeStruct((2, 64), jnp.int32)

    def loss(params, tokens):
        logits = nnx.merge(graphdef, params)(tokens)
        return jax.nn.logsumexp(logits, axis=-1).sum()

    params = nnx.to_pure_dict(state)
    cost = jax.jit(jax.grad(loss)).lower(params, tokens).compile().cost_analysis()
    _, full = flops_per_token(model, 64)
    assert cost is not None
    assert cost["flops"] == pytest.approx(full * tokens.size, rel=0.02)


def test_unknown_devices_have_no_utilisation():
    model = preset("k-215m").model
    known = utilisation(
        365e3, model, 512, device_kind="NVIDIA H100 80GB HBM3", dtype="bfloat16",
        n_devices=1,
    )  # fmt: skip
    assert known["mfu"] == pytest.approx(365e3 * 1_347_158_016 / 989.4e12)
    assert known["mfu_full"] == pytest.approx(365e3 * 1_403_781_120 / 989.4e12)
    eight = utilisation(
        365e3, model, 512, device_kind="NVIDIA H100 80GB HBM3", dtype="bfloat16",
        n_devices=8,
    )  # fmt: skip
    assert eight["mfu"] == pytest.approx(known["mfu"] / 8)
    for kind, dtype in (("cpu", "bfloat16"), ("NVIDIA H100 80GB HBM3", "float32")):
        assert peak_flops(kind, dtype) is None
        assert not utilisation(
            1.0, model, 512, device_kind=kind, dtype=dtype, n_devices=1
        )


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989.4e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A10", 125e12),
        ("NVIDIA A10G", None),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA GeForce RTX 4090", 165.2e12),
        ("NVIDIA GeForce RTX 4080", None),
    ],
)
def test_device_names_are_matched_by_whole_words(kind, peak):
    assert peak_flops(kind, "bfloat16") == peak


def test_peak_memory_is_the_fullest_devices_and_a_cpus_is_the_process():
    x = 2**30
    gpus = [
        SimpleNamespace(memory_stats=lambda peak=peak: {"peak_bytes_in_use": peak})
        for peak in (5 * x, 7 * x, 6 * x)
    ]
    assert peak_bytes(gpus) == 7 * x
    # Linux counts the process's peak in /proc, too.
    status = Path("/proc/self/status").read_text()
    kib = int(re.search(r"VmHWM:\s+(\d+) kB", status)[1])  # type: ignore[index]
    assert peak_bytes(jax.local_devices()) == pytest.approx(kib * 1024, rel=0.1)


def test_log_lines_have_the_form_of_the_seed():
    line = seed_line(
        100, steps_per_epoch=3125, epochs=1, loss=7.3189, lr=1.99547e-4, left_s=2400
    )
    assert line == "Epoch:[1/1](100/3125) loss:7.319 lr:0.0001995 epoch_Time:40.0min;"
    line = seed_line(25, steps_per_epoch=10, epochs=3, loss=1, lr=0, left_s=0)
    assert line.startswith("Epoch:[3/3](5/10) ")


def test_metrics_survive_a_torn_line_and_forget_steps_to_be_redone(tmp_path):
    path = tmp_path / "metrics.jsonl"
    append_jsonl(path, [{"step": i, "loss": 1.0} for i in range(4)])
    append_jsonl(path, [{"step": 4, "loss": math.nan}])
    with path.open("a") as file:
        file.write('{"step": 5, "lo')
    records = read_jsonl(path)
    assert [r["step"] for r in records] == [0, 1, 2, 3, 4]
    assert records[4]["loss"] == "nan"
    assert [r["step"] for r in read_jsonl(path, before_step=2)] == [0, 1]
    for line in path.read_text().splitlines()[:5]:
        json.loads(line)  # strict JSON: no bare NaN
        assert "NaN" not in line
    append_jsonl(path, [{"step": 6, "loss": 1.0}])  # not onto the torn line
    assert [r["step"] for r in read_jsonl(path)] == [0, 1, 2, 3, 4, 6]


def test_damaged_metrics_cost_the_damaged_lines_alone(tmp_path):
    path = tmp_path / "metrics.jsonl"
    append_jsonl(path, [{"step": i, "loss": 1.0} for i in range(4)])
    lines = path.read_bytes().splitlines(keepends=True)
    lines[1] = lines[1].replace(b"loss", b"l\xff\xfe\x00")
    lines[3:3] = [b"12\n", b"[]\n", b"null\n", bytes(40), b"\n", b'{"step": "2"}\n']
    path.write_bytes(b"".join(lines))
    assert [r["step"] for r in read_jsonl(path)] == [0, 2, 3]
    rewrite_jsonl(path, before_step=3)
    assert path.read_bytes() == lines[0] + lines[2]
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_seconds_lost_are_counted_in_steps_not_by_clocks():
    records = [{"step": s, "loss": 1.0} for s in range(9)]
    assert seconds_of(records, 6) == 0.0  # nothing is known
    for step, rate in ((0, 60_000.0), (4, 2000.0), (8, 1000.0)):
        records[step]["step_ms"] = rate
    records.append({"step": 8, "val_loss": 1.0})
    assert seconds_of(records, 6) == 6.0
    assert seconds_of(records, 9) == 0.0


def test_an_evaluation_stays_with_the_state_that_it_was_made_of(tmp_path):
    path = tmp_path / "metrics.jsonl"
    records = [{"step": s, "loss": 1.0} for s in range(4)]
    evaluations = [{"step": s, "val_loss": 2.0} for s in (0, 2, 4)]
    append_jsonl(path, [evaluations[0], *records[:2], evaluations[1], *records[2:]])
    # Going on after 2 steps: step 2 is redone, what was measured before it is not.
    kept = read_jsonl(path, before_step=2)
    assert kept == [evaluations[0], *records[:2], evaluations[1]]
    # From the beginning, the first state is measured again.
    assert read_jsonl(path, before_step=0) == []
