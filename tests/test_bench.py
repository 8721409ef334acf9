"""The benchmark: right figures, fair turns, and nothing lost when a part breaks."""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

SCRIPTS = Path(__file__).parents[1] / "scripts"
sys.path.insert(0, str(SCRIPTS))

import bench  # noqa: E402  # pyright: ignore[reportMissingImports]
import bench_common as common  # noqa: E402  # pyright: ignore[reportMissingImports]
import bench_probe as probe  # noqa: E402  # pyright: ignore[reportMissingImports]
import bench_process as process  # noqa: E402  # pyright: ignore[reportMissingImports]
import bench_record as record  # noqa: E402  # pyright: ignore[reportMissingImports]

# What a bare machine lacks (rich comes with flax): each of these fails to import.
ABSENT = ("tyro", "grain", "datatrove", "orjson", "matplotlib", "gguf", "tokenizers",
          "safetensors", "transformers")  # fmt: skip


@pytest.fixture
def bare(tmp_path) -> dict[str, str]:
    """An environment without the packages that only the rest of jaxllm needs."""
    stubs = tmp_path / "stubs"
    stubs.mkdir()
    (stubs / "sitecustomize.py").write_text(
        "import sys\n"
        "from importlib.machinery import PathFinder\n"
        "class Bare(PathFinder):\n"
        "    @classmethod\n"
        "    def find_spec(cls, name, *where):\n"
        f"        absent = name.split('.')[0] in {ABSENT}\n"
        "        return None if absent else super().find_spec(name, *where)\n"
        "finders = sys.meta_path\n"
        "finders[:] = [Bare if f is PathFinder else f for f in finders]\n"
    )
    return {**os.environ, "PYTHONPATH": str(stubs), "CUDA_VISIBLE_DEVICES": ""}


def _bench(*argv: str, env: dict[str, str], cwd: Path, timeout: int = 900):
    return subprocess.run(
        [sys.executable, str(SCRIPTS / "bench.py"), *argv],
        env=env, cwd=cwd, capture_output=True, text=True, timeout=timeout,
    )  # fmt: skip


def test_shapes_are_those_of_the_seed():
    parameters = {name: shape.n_params for name, shape in common.SHAPES.items()}
    assert parameters["A"] == 215_127_040
    assert parameters["B"] == 259_167_232
    assert common.SHAPES["A"].max_seq_len == 512
    assert common.SHAPES["B"].max_seq_len == 2048


@pytest.mark.parametrize("kind", ["zipf", "uniform"])
def test_tokens_are_random_and_in_range(kind):
    ids = common.token_ids(kind, np.random.default_rng(0), 1000, (64, 1000))
    assert ids.dtype == np.int32 and ids.min() == 0 and ids.max() == 999
    share = np.mean(ids == 0)
    # 1 / H(1000) = 0.1336 of a Zipf draw is the first id, 0.001 of a uniform one.
    expected = 0.1336 if kind == "zipf" else 0.001
    assert share == pytest.approx(expected, rel=0.35)


def test_targets_are_the_next_inputs_and_batches_differ():
    config = common.run_config("tiny", 4)
    batches = common.make_batches(config, "zipf")
    for batch in batches:
        assert batch["inputs"].shape == batch["targets"].shape == (4, 32)
        np.testing.assert_array_equal(batch["inputs"][:, 1:], batch["targets"][:, :-1])
        assert batch["loss_mask"].all() and len(np.unique(batch["inputs"])) > 10
    assert len({batch["inputs"].tobytes() for batch in batches}) == common.POOL


def test_blocks_are_milliseconds_of_one_step():
    import time

    ms = common.timed_blocks(lambda n: time.sleep(0.02 * n), 3, 2)
    assert len(ms) == 3 and all(20 <= value < 100 for value in ms)


def test_rates_are_those_of_the_formula():
    made = record.new_record("compare", ["--compare"], "A")
    made |= {"device_kind": "NVIDIA H100 80GB HBM3", "matmul_flops_per_s": 798e12}
    figures = record.rates(made, 65_536, 65_536 / 365_000 * 1e3, "bfloat16")
    assert figures["tokens_per_s"] == pytest.approx(365_000)
    # 1.3472 and 1.4038 GFLOP a token, 989.4 TFLOP/s on the data sheet.
    assert figures["mfu_half"] == pytest.approx(0.4970, abs=1e-4)
    assert figures["mfu_full"] == pytest.approx(0.5179, abs=1e-4)
    assert figures["of_measured_matmul"] == pytest.approx(0.6162, abs=1e-4)


def test_a_record_names_the_code_it_timed():
    commit = record.new_record("compare", [], "tiny")["commit"]
    assert "source sha256 " in commit or len(commit) == 12


def test_an_unknown_device_has_no_utilisation():
    made = record.new_record("compare", [], "tiny") | {"device_kind": "Radeon 9"}
    assert record.rates(made, 128, 1.0, "bfloat16")["mfu_half"] is None
    made["device_kind"] = "NVIDIA H100 80GB HBM3"
    assert record.rates(made, 128, 1.0, "float32")["mfu_half"] is None


def _made_up(**more) -> dict:
    made = record.new_record("compare", ["--compare", "--shape", "A"], "A")
    made |= {"device_kind": "NVIDIA H100 80GB HBM3", "errors": [], "dtype": "bfloat16"}
    return made | {"versions": {"jax": "0.11.2", "cuda": None}, **more}


def _summarised(rounds) -> dict:
    """What `summarise` makes of rounds of ms a step."""
    fake = argparse.Namespace(
        args=argparse.Namespace(shape="A"), record=_made_up(matmul_flops_per_s=8e14)
    )
    best = {
        name: {"name": name, "batch": rows, "cold_s": 40.0, "peak_bytes": 2**34}
        for name, rows in (("jaxllm", 128), ("torch.compile", 256))
    }
    bench.summarise(fake, best, rounds)  # type: ignore[arg-type]
    return fake.record


def test_ratio_is_the_median_over_pairs_of_tokens_per_second():
    # At half the rows, equal time per step is half the speed.
    made = _summarised(
        {"jaxllm": [200.0, 100.0, 200.0], "torch.compile": [400.0, 400.0, 600.0]}
    )
    ours, theirs = made["results"]
    assert theirs["pair_ratios"] == pytest.approx([1.0, 2.0, 1.5])
    assert theirs["ours_over_this"] == pytest.approx(1.5)
    assert ours["ms"] == 200.0 and ours["tokens_per_s"] == pytest.approx(327_680)
    assert "ours_over_this" not in ours
    table = record.results_table(made["results"])
    assert "| jaxllm | 128 | 200.0 | 327,680 | 44.6 % / 46.5 % |" in table
    assert "**1.50** (1.00-2.00)" in table


def test_table_is_generated_from_the_records(tmp_path):
    records, table = tmp_path / "records", tmp_path / "table.md"
    made = _summarised({"jaxllm": [200.0], "torch.compile": [400.0]})
    record.write(made, records / "compare.json")
    items = [
        {"probe": "2 matrix products", "job": "matmul_ours", "item": "w1 forward",
         "ms": 0.51, "tflops": 720.0},
        {"probe": "2 matrix products", "job": "matmul_torch", "item": "w1 forward",
         "error": "OutOfMemoryError: | too much"},
    ]  # fmt: skip
    record.write(_made_up(kind="probe", items=items), records / "probe.json")
    assert record.regenerate(records, table) == 2
    text = table.read_text()
    assert "## compare, shape A, NVIDIA H100 80GB HBM3" in text
    assert "| w1 forward | jaxllm | 0.510 | 720.0 | - |  |" in text
    assert "error OutOfMemoryError: / too much" in text
    assert not list(records.glob(".*"))


def test_the_table_in_docs_is_up_to_date(tmp_path):
    record.regenerate(record.RECORDS, tmp_path / "table.md")
    assert (tmp_path / "table.md").read_text() == record.TABLE.read_text()


def test_a_probe_that_fails_does_not_lose_the_others(capsys):
    def broken():
        raise RuntimeError("no\nsuch kernel")

    probe.measure(iter([("a", broken), ("b", lambda: {"ms": 1.5})]))
    first, second = (
        json.loads(line.removeprefix(common.MARK))
        for line in capsys.readouterr().out.splitlines()
    )
    assert first["error"] == "RuntimeError: no such kernel"
    assert (second["item"], second["ms"]) == ("b", 1.5)


def test_every_job_is_one_of_eight_probes_and_fits_ten_minutes_with_its_side():
    assert len({name for name, _ in probe.JOBS.values()}) == 8
    assert {job.split("_")[1] for job in probe.JOBS} == {"ours", "torch"}


def test_a_short_budget_is_shared_out_over_all_probes():
    jobs, left_s, given = list(probe.JOBS), 560.0, []
    for number in range(len(jobs)):
        given.append(bench.share_s(jobs[number:], left_s))
        left_s -= given[-1]
    assert sum(given) == pytest.approx(560) and min(given) > 15
    limits = [limit for _, limit in probe.JOBS.values()]
    assert given == pytest.approx([560 * limit / sum(limits) for limit in limits])
    # With time enough, a limit is a limit.
    assert bench.share_s(jobs, 1e6) == limits[0]


def _worker(tmp_path, monkeypatch, code: str) -> process.Worker:
    (tmp_path / "worker.py").write_text(code)
    monkeypatch.setattr(process, "HERE", tmp_path)
    return process.Worker("worker.py", {}, dict(os.environ))


def test_a_worker_that_dies_says_of_what(tmp_path, monkeypatch):
    code = "import sys\nprint('noise')\nprint('cause', file=sys.stderr)\nsys.exit(3)"
    with (
        _worker(tmp_path, monkeypatch, code) as worker,
        pytest.raises(process.Failed, match="exit code 3: cause"),
    ):
        worker.ask("build", 30)


def test_a_worker_that_hangs_is_left(tmp_path, monkeypatch):
    with (
        _worker(tmp_path, monkeypatch, "import time\ntime.sleep(60)") as worker,
        pytest.raises(process.Failed, match="nothing within 0 s"),
    ):
        worker.ask("build", 0.2)
    assert worker.process.returncode is not None


def test_an_error_is_an_answer(tmp_path, monkeypatch):
    code = (
        f"import sys\nsys.path.insert(0, {str(SCRIPTS)!r})\n"
        "import bench_common\n"
        "bench_common.serve({'build': lambda batch: {'ok': 1 / batch}})\n"
    )
    with _worker(tmp_path, monkeypatch, code) as worker:
        assert worker.hear(60) is not None
        with pytest.raises(process.Failed, match="ZeroDivisionError"):
            worker.ask("build", 60, batch=0)
        assert worker.ask("build", 60, batch=4)["ok"] == 0.25


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--compare", "--set", "layer"], ["--set layer", "NAME=VALUE"]),
        (["--compare", "--set", "colour=red"], ["--set colour=red", "layer"]),
        (["--compare", "--set", "layer=red"], ["compute.layer='red'", "fused"]),
        (["--compare", "--beside", "layer=red"], ["compute.layer='red'", "fused"]),
        (["--compare", "--beside", "gold=1"], ["--beside gold=1", "layer"]),
        (["--compare", "--batches", "0"], ["batch_size=0", ">= 1"]),
    ],
)
def test_bad_input_is_one_line(capsys, argv, words):
    assert bench.main([*argv, "--shape", "tiny", "--cpu"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and all(word in err for word in words), err


@pytest.mark.parametrize("argv", [[], ["--compare", "--shape", "C"], ["--faster"]])
def test_bad_flags_are_one_line(capsys, argv):
    with pytest.raises(SystemExit, match="2"):
        bench.main(argv)
    assert capsys.readouterr().err.count("\n") == 1


def test_another_form_of_ours_takes_turns_beside_the_first():
    args = argparse.Namespace(set=["layer=plain"], beside=["unroll=1", "gemm=triton"])
    found = bench.sides(argparse.Namespace(args=args, gpu=False))  # type: ignore
    (first, beside), names = list(found.values())[:2], list(found)
    assert names[:3] == ["jaxllm", "jaxllm, unroll=1 gemm=triton", "torch eager"]
    assert first == ("ours", {})
    changes = {"layer": "plain", "unroll": 1, "gemm": "triton"}
    assert beside == ("ours", {"compute": changes})


@pytest.mark.slow
def test_compare_runs_from_a_bare_checkout(bare, tmp_path):
    path = tmp_path / "record.json"
    done = _bench("--compare", "--cpu", "--shape", "tiny", "--rounds", "2",
                  "--threads", "1", "--batches", "2", "4", "--build_s", "200",
                  "--json", str(path), cwd=tmp_path,
                  env=bare | {"CXX": "no-compiler-here"})  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    made = json.loads(path.read_text())
    # Without a C++ compiler one side fails, and the others are compared all the same.
    assert [text.split(":")[0] for text in made["errors"]] == ["torch.compile"]
    names = [result["name"] for result in made["results"]]
    assert names == ["jaxllm", "torch eager", "torch eager, memory kept"]
    for result in made["results"]:
        assert len(result["rounds_ms"]) == 2
        assert 0 < result["loss"] < 7 and result["peak_bytes"] > 1e8
        assert result["mfu_half"] is None and result["of_measured_matmul"] > 0
    assert made["results"][1]["ours_over_this"] > 0
    assert made["versions"]["jax"] and made["versions"]["torch"]
    assert "**" in done.stdout


@pytest.mark.slow
def test_sides_that_take_turns_by_restarting_do_so(tmp_path):
    """The way of a GPU, which does not hold both sides at once, on a CPU."""
    argv = ["--compare", "--cpu", "--shape", "tiny", "--rounds", "2", "--threads", "1"]
    args = bench.make_parser().parse_args([*argv, "--json", str(tmp_path / "r.json")])
    started = bench.Bench(args, "compare", tmp_path)
    best = {
        name: {"name": name, "batch": 4, "cold_s": 1.0, "ms": 1.0}
        for name in ("jaxllm", "torch eager")
    }
    bench.turns_restarting(started, best)
    made = json.loads((tmp_path / "r.json").read_text())
    assert made["errors"] == []
    assert [len(result["rounds_ms"]) for result in made["results"]] == [2, 2]
    assert len(made["results"][1]["pair_ratios"]) == 2


@pytest.mark.slow
@pytest.mark.parametrize("jobs", [["versions_ours", "matmul_ours", "scatter_ours"],
                                  ["versions_torch", "matmul_torch", "attention_torch",
                                   "scatter_torch"]])  # fmt: skip
def test_probes_run_from_a_bare_checkout(bare, tmp_path, jobs):
    path = tmp_path / "record.json"
    done = _bench("--probe", "--cpu", "--shape", "tiny", "--threads", "1", "--jobs",
                  *jobs, "--json", str(path), env=bare, cwd=tmp_path)  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    made = json.loads(path.read_text())
    assert [item for item in made["items"] if "error" in item] == []
    assert {item["job"] for item in made["items"]} == set(jobs)


def test_every_part_of_the_step_can_be_taken_out(bare, tmp_path):
    path = tmp_path / "record.json"
    done = _bench("--probe", "--cpu", "--shape", "tiny", "--threads", "1", "--jobs",
                  "ablation_ours", "--json", str(path), env=bare,
                  cwd=tmp_path)  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    items = {item["item"]: item for item in json.loads(path.read_text())["items"]}
    assert len(items) == 5 and not [i for i in items.values() if "error" in i]
    whole = items["whole step"]["first_loss"]
    # What is taken out was in: the loss shows it, or cannot, being of the first step.
    assert items["without attention"]["first_loss"] != whole
    assert items["without loss"]["first_loss"] < 1.0
    assert items["without optimizer"]["first_loss"] == whole


@pytest.mark.parametrize(
    ("environment", "used"),
    [
        ({}, True),
        ({"CUDA_VISIBLE_DEVICES": "1"}, True),
        ({"CUDA_VISIBLE_DEVICES": "-1"}, False),
        ({"JAX_PLATFORMS": "cpu"}, False),
    ],
)
def test_the_driver_is_asked_where_there_are_no_device_files(
    monkeypatch, environment, used
):
    for name in ("CUDA_VISIBLE_DEVICES", "JAX_PLATFORMS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(process, "has_gpu", lambda: False)
    monkeypatch.setattr(process, "nvidia_smi", lambda field: "NVIDIA something")
    assert process.gpu_to_use() == used
    monkeypatch.setattr(process, "nvidia_smi", lambda field: None)
    assert not process.gpu_to_use()
