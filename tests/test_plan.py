"""The counting of plan, on HLO small enough to count by hand."""

import subprocess
import sys
from pathlib import Path

import pytest

from jaxllm.kernels.native import TARGETS as TARGETS_OF_OURS
from jaxllm.plan import hlo
from jaxllm.plan.targets import TARGETS

HLO = """HloModule jit_step

%slices (p0: f32[18,1024], p1: s32[]) -> f32[1,1024] {
  %p0 = f32[18,1024]{1,0} parameter(0)
  %p1 = s32[] parameter(1)
  %c = f32[18,1024]{1,0} negate(%p0)
  ROOT %s = f32[1,1024]{1,0} slice(%c), slice={[0:1], [0:1024]}
}

%writes (p0: f32[18,1024], p1: f32[1,1024], p2: s32[]) -> f32[18,1024] {
  %p0 = f32[18,1024]{1,0} parameter(0)
  %p1 = f32[1,1024]{1,0} parameter(1)
  %p2 = s32[] parameter(2)
  ROOT %u = f32[18,1024]{1,0} dynamic-update-slice(%p0, %p1, %p2, %p2)
}

%gemm_fusion (p0: bf16[64,32], p1: bf16[32,16]) -> bf16[64,16] {
  %p0 = bf16[64,32]{1,0} parameter(0)
  %p1 = bf16[32,16]{1,0} parameter(1)
  ROOT %d = bf16[64,16]{1,0} dot(%p0, %p1), lhs_contracting_dims={1}
}

%sliced_call (p0: bf16[18,64,32], p1: bf16[32,16]) -> (bf16[64,16], s8[4096]) {
  %p0 = bf16[18,64,32]{2,1,0} parameter(0)
  %p1 = bf16[32,16]{1,0} parameter(1)
  %s = bf16[1,64,32]{2,1,0} slice(%p0), slice={[0:1], [0:64], [0:32]}
  %x = bf16[64,32]{1,0} bitcast(%s)
  ROOT %l = (bf16[64,16]{1,0}, s8[4096]{0}) custom-call(%x, %p1), custom_call_target="__cublas$lt$matmul"
}

%body (t: (s32[], f32[100])) -> (s32[], f32[100]) {
  %t = (s32[], f32[100]{0}) parameter(0)
  %x = f32[100]{0} get-tuple-element(%t), index=1
  %i = s32[] get-tuple-element(%t), index=0
  %y = f32[100]{0} negate(%x), metadata={op_name="jit(step)/optimizer/neg"}
  ROOT %out = (s32[], f32[100]{0}) tuple(%i, %y)
}

ENTRY %main (a: f32[18,1024], b: bf16[64,32], c: bf16[32,16], i: s32[]) -> f32[100] {
  %a = f32[18,1024]{1,0} parameter(0)
  %b = bf16[64,32]{1,0} parameter(1)
  %c = bf16[32,16]{1,0} parameter(2)
  %i = s32[] parameter(3)
  %row = f32[1,1024]{1,0} fusion(%a, %i), kind=kLoop, calls=%slices
  %new = f32[18,1024]{1,0} fusion(%a, %row, %i), kind=kLoop, calls=%writes
  %mm = bf16[64,16]{1,0} fusion(%b, %c), kind=kCustom, calls=%gemm_fusion
  %fa = (bf16[64,16]{1,0}, u8[0]{0}) custom-call(%mm), custom_call_target="__cudnn$fmhaSoftmax"
  %lt = (bf16[64,16]{1,0}, s8[4096]{0}) custom-call(%b, %c, %mm), custom_call_target="__cublas$lt$matmul"
  %st = bf16[18,64,32]{2,1,0} parameter(4)
  %ds = (bf16[64,16]{1,0}, s8[4096]{0}) fusion(%st, %c), kind=kCustom, calls=%sliced_call
  %cp = f32[18,1024]{0,1} copy(%new)
  %ar = f32[18,1024]{1,0} all-reduce-start(%new), to_apply=%slices
  %loop = (s32[], f32[100]{0}) while(%t), condition=%c, body=%body, backend_config={"known_trip_count":{"n":"16"}}
  ROOT %last = f32[100]{0} get-tuple-element(%loop), index=1
}
"""  # noqa: E501


def test_kernels_are_counted_by_what_they_touch():
    kernels = {k.name: k for k in hlo.Program(HLO).kernels()}
    assert set(kernels) == {"row", "new", "mm", "fa", "lt", "ds", "cp", "ar", "y"}
    row = 1024 * 4
    # A fusion that slices, even behind an elementwise operation, reads a slice.
    assert (kernels["row"].read, kernels["row"].written) == (row, row)
    assert kernels["row"].whole == 18 * row + row + 4
    # One that updates in place writes the update, and reads it (and an index).
    assert (kernels["new"].read, kernels["new"].written) == (row + 4, row)
    assert kernels["mm"].moved == 2 * (64 * 32 + 32 * 16 + 64 * 16)
    # The scratch space beside a product is no traffic.
    assert kernels["lt"].written == 2 * 64 * 16
    # Nor in a fusion that slices for the product.
    assert kernels["ds"].moved == kernels["mm"].moved
    assert [kernels[n].kind for n in ("ds", "mm", "lt", "fa", "cp", "ar", "row")] == [
        "matmul", "matmul", "matmul", "attention", "copy", "collective", "elementwise",
    ]  # fmt: skip
    assert kernels["ar"].overlaps


OURS = """HloModule jit_step

ENTRY %main (x: f32[64,32], y: f32[32,16]) -> f32[64,16] {
  %x = f32[64,32]{1,0} parameter(0)
  %y = f32[32,16]{1,0} parameter(1)
  %p = (f32[64,16]{1,0}, f32[1040]{0}) custom-call(%x, %y), custom_call_target="jaxllm_gemm_amx_nn"
  %q = f32[64,16]{1,0} get-tuple-element(%p), index=0
  ROOT %a = f32[64,16]{1,0} custom-call(%q), custom_call_target="jaxllm_attention_forward"
}
"""  # noqa: E501


def test_a_cpus_own_kernels_are_counted_as_what_they_are():
    kernels = {k.name: k for k in hlo.Program(OURS).kernels()}
    assert {n: k.kind for n, k in kernels.items()} == {"p": "matmul", "a": "attention"}
    assert kernels["p"].moved == 4 * (64 * 32 + 32 * 16 + 64 * 16)
    for name in TARGETS_OF_OURS:
        assert ("gemm" in name) != name.startswith("attention"), name


def test_a_loop_counts_its_body_as_often_as_it_runs():
    (looped,) = (k for k in hlo.Program(HLO).kernels() if k.name == "y")
    assert (looped.runs, looped.moved) == (16, 800)
    assert looped.source == "jit(step)/optimizer/neg"


def test_sizes_of_types():
    assert hlo.size("bf16[128,512]{1,0}") == 128 * 512 * 2
    assert hlo.size("(f32[2,3]{1,0}, s8[5]{0}, pred[])") == 24 + 5 + 1


def test_groups_of_a_collective():
    for size, groups in (
        (4, "{{0,1,2,3},{4,5,6,7}}, use_global_device_ids=true"),
        (2, "[4,2]<=[2,4]T(1,0), use_global_device_ids=true"),
        (8, "mesh['a'=1,'b'=8,'c'=2] {'b'}, dimensions={1}"),
        (8, "mesh['a'=1,'b'=8,'c'=2], device_ids=([2,8]T(1,0)) {'b'}, dimensions={1}"),
        (16, "mesh['a'=2,'b'=8], device_ids=([16]) {'a','b'}, dimensions={1}"),
    ):
        assert hlo.group_size(f"channel_id=1, replica_groups={groups}") == size
    assert hlo.group_size("source_target_pairs={{0,1}}") == 2


def test_every_target_describes_itself():
    for target in TARGETS.values():
        assert f"core_count: {target.cores} " in target.description
        assert target.source


PLAN = Path(__file__).parents[1] / "scripts/plan.py"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--target", "tpu"], "invalid choice: 'tpu'"),
        (["--devices", "0"], "--devices 0: must be at least 1"),
        (["--devices", "12"], "--devices 12: 1 to 8, or a multiple of 8"),
        (["--compute", "lean"], "write FIELD=VALUE"),
        (["--compute", "colour=red"], "unknown key 'colour'"),
        (["--compute", "remat=maybe"], "compute.remat='maybe' must be one of"),
        (["--batch", "7", "--accumulate", "2"], "train.batch_size=7 is not divisible"),
        (["--target", "cpu", "--largest"], "--target is cpu"),
        (["--json", "/nowhere/plan.json"], "there is no such folder"),
    ],
)
def test_bad_input_is_one_line_before_anything_is_compiled(argv, words):
    command = [sys.executable, str(PLAN), *argv]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    said = [x for x in done.stderr.splitlines() if x.startswith("plan.py: ")]
    assert done.returncode == 2 and len(said) == 1 and words in said[0], done.stderr
    assert "Traceback" not in done.stderr and not done.stdout
