"""The benchmark of the data's way: it measures all it promises, and extends it."""

import json
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[1] / "scripts"
sys.path.insert(0, str(SCRIPTS))

import bench_data  # noqa: E402  # pyright: ignore[reportMissingImports]
import bench_record  # noqa: E402  # pyright: ignore[reportMissingImports]


def test_a_small_run_measures_everything_and_makes_its_table(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_data, "BASE_BYTES", 150_000)
    monkeypatch.setattr(bench_data, "VOCAB_SIZE", 400)
    made = bench_record.new_record("data", ["--data"])
    made |= {"device_kind": "cpu", "versions": bench_data.versions()}
    bench_data.measure(
        tmp_path, megabytes=1, workers=1, keep=made.__setitem__, seconds=0.05
    )
    small, large = made["prepare"]
    assert 0.9e6 < large["text_bytes"] < 1.1e6 and large["documents"] > 300
    assert large["text_bytes"] > 8 * small["text_bytes"]
    assert large["bytes_per_s"] == large["text_bytes"] / large["seconds"]
    raw = sum(large["raw_bytes_per_s"]) / 2
    assert large["share_of_raw"] == pytest.approx(large["bytes_per_s"] / raw)
    assert large["tokenising_s"] + large["merging_s"] == pytest.approx(large["seconds"])
    for row in made["batches"]:
        assert row["tokens_per_core_s"] > 1e5 and len(row["start_s_at_step"]) == 3
    records, table = tmp_path / "records", tmp_path / "table.md"
    bench_record.write(made, records / "data.json")
    assert bench_record.regenerate(records, table) == 1
    text = table.read_text()
    assert "`python scripts/bench.py --data`" in text and "| packed |" in text
    assert f"**{large['share_of_raw']:.1%}**" in text


def test_no_two_documents_of_the_corpus_are_equal(tmp_path):
    bench_data.write_corpus(tmp_path / "c", ["a", "b"], 2000)
    lines = (tmp_path / "c").read_text().splitlines()
    texts = [json.loads(line)["text"] for line in lines]
    assert len(set(texts)) == len(texts) > 100


def test_the_projection_divides_tokenising_by_the_cores_and_merging_not():
    def run(size, tokenising, merging):
        return {
            "text_bytes": size,
            "tokenising_s": tokenising,
            "merging_s": merging,
            "seconds": tokenising + merging,
        }

    # Per GB 10 s of tokenising by 2 workers and 1 s of merging; 3 s each time.
    runs = [run(1e9, 13.0, 1.0), run(5e9, 53.0, 5.0)]
    found = bench_data._projection(runs, 2)
    assert found["fixed_s"] == pytest.approx(3.0)
    assert found["tokenising_s_per_gb_and_core"] == pytest.approx(20.0)
    assert found["seconds"] == pytest.approx(3.0 + 32 * (20.0 / 16 + 1.0))
