"""Predictions for many GPUs: the document is the record's, and the model holds."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from jaxllm.plan import scaling
from jaxllm.plan.scaling import SCHEMES, SIZES, Links

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

import scaling as script  # noqa: E402  # pyright: ignore[reportMissingImports]

RECORD = json.loads((ROOT / "docs" / "scaling.json").read_text("utf-8"))
GPUS = (1, 2, 4, 8, 16, 64, 512, 4096)
EACH = pytest.mark.parametrize("size", SIZES)


def predict(size, scheme, gpus, **links):
    return scaling.predict(RECORD, size, scheme, gpus, links=Links(**links))


def volumes(size, mesh):
    """Bytes by kind, of whole networks."""
    found: dict[str, float] = {}
    for one in scaling.exchanges(RECORD, size, mesh):
        found[one.kind] = found.get(one.kind, 0) + one.bytes
    return found


def parameters(size):
    """Bytes of the projections in bfloat16, and of the table in float32."""
    model = SIZES[size][0]
    table = model.vocab_size * model.dim
    return 2 * (model.n_params - table), 4 * table


def test_the_document_is_what_the_script_writes():
    committed = (ROOT / "docs" / "scaling.md").read_text("utf-8")
    assert committed == script.document(RECORD)


def test_a_measured_step_takes_the_rooflines_place():
    text = script.document(RECORD, {"215M": 0.5})
    assert "| 500 ms, measured |" in text
    with pytest.raises(script.argparse.ArgumentTypeError, match="'7B=80' is not SIZE"):
        script.measured("7B=80")
    with pytest.raises(script.argparse.ArgumentTypeError, match="MS above 0"):
        script.measured("215M=-1")


@EACH
@pytest.mark.parametrize("scheme", SCHEMES)
def test_one_gpu_exchanges_nothing_and_more_are_ever_less_efficient(size, scheme):
    steps = [predict(size, scheme, gpus) for gpus in GPUS]
    assert steps[0].exchange_s == 0
    assert steps[0].step_s == pytest.approx(scaling.one_gpu_s(RECORD, size))
    for fewer, more in zip(steps, steps[1:], strict=False):
        assert more.efficiency < fewer.efficiency <= 1
        assert more.exchange_s > fewer.exchange_s
        assert more.memory_bytes <= fewer.memory_bytes or scheme == "HSDP"
    assert all(one.exposed_s <= one.exchange_s for one in steps)


@EACH
def test_slower_links_cost_more(size):
    for scheme in SCHEMES:
        usual = predict(size, scheme, 64)
        assert predict(size, scheme, 64, network=5e9).step_s > usual.step_s
        assert predict(size, scheme, 8, network=5e9) == predict(size, scheme, 8)


@EACH
def test_compiled_volumes_are_those_of_the_parameters(size):
    projections, table = parameters(size)
    # Gradients once; those of the tied table as embedding and as head.
    assert volumes(size, "dp8") == {
        "all-reduce": pytest.approx(projections + 2 * table, rel=0.01)
    }
    # Weights gathered once, and kept for the backward pass; the table in float32, or
    # rounded first.
    gathered = table / 2 if size == "6.6B" else table
    sharded = volumes(size, "fsdp8")
    assert sharded["all-gather"] == pytest.approx(projections + gathered, rel=0.01)
    assert sharded["reduce-scatter"] == pytest.approx(projections + 2 * table, rel=0.01)
    # The last norm's gradient, and five numbers.
    assert sharded["all-reduce"] == 4 * SIZES[size][0].dim + 5 * 4
    # HSDP: the same within a node, and an eighth of the gradients between them.
    pairs = [x for x in scaling.exchanges(RECORD, size, "hsdp16") if x.group == 2]
    assert all(one.kind == "all-reduce" for one in pairs)
    reduced = sum(one.bytes for one in pairs)
    assert reduced == pytest.approx((projections + 2 * table) / 8, rel=0.01)
    # The compiler hides none of it, of the largest size next to none.
    bare = sum(one.bare_bytes for one in pairs)
    assert 0.9 * reduced < bare < reduced if size == "6.6B" else bare == reduced
    hybrid = volumes(size, "hsdp16")
    for kind in ("all-gather", "reduce-scatter"):
        assert hybrid[kind] == pytest.approx(sharded[kind], rel=0.01)


def test_volumes_do_not_depend_on_the_number_of_gpus():
    for low, high in (("dp8", "dp16"), ("fsdp8", "fsdp16")):
        assert volumes("215M", low) == pytest.approx(volumes("215M", high), rel=1e-3)


def test_seconds_of_one_collective_by_hand():
    links = Links(nvlink=100.0, network=10.0, share=0.5, latency_s=0.25)
    # 8 of 8 in a node: 7/8 of 800 bytes over 50 bytes a second, 3 doublings.
    assert scaling.exchange_s("all-gather", 800, 1, 8, 8, links) == 14 + 0.75
    assert scaling.exchange_s("all-reduce", 800, 1, 8, 8, links) == 28 + 0.75
    # 4 nodes: an eighth each, 3/4 of it over 5 bytes a second; 2 of them, 5 doublings.
    assert scaling.exchange_s("all-gather", 800, 2, 32, 8, links) == 14 + 15 + 2.5
    assert scaling.exchange_s("all-reduce", 800, 1, 1, 8, links) == 0


def test_what_is_held_is_shared_out():
    state = {s: scaling.memory_bytes(RECORD, "6.6B", s, 512) for s in SCHEMES}
    assert state["FSDP"] < state["HSDP"] < state["sharded optimizer"] < state["DP"]
    params = SIZES["6.6B"][0].n_params
    saved = state["DP"] - state["sharded optimizer"]
    assert saved == pytest.approx(8 * params * 511 / 512)
    huge = replace(predict("6.6B", "FSDP", 8), memory_bytes=84e9)
    assert not huge.fits and replace(huge, memory_bytes=83e9).fits


def test_groups_of_a_hybrid_stay_in_a_node_or_take_one_gpu_of_each():
    assert scaling.spread("HSDP", 8, 64) == (8, 8)
    assert scaling.spread("HSDP", 2, 64) == (8, 1)
    assert scaling.spread("HSDP", 16, 64) == (64, 8)
    assert scaling.spread("HSDP", 8, 4) == (4, 4)
    assert scaling.spread("FSDP", 8, 64) == (64, 8)
