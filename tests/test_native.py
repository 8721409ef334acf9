"""Our own products for a CPU: right at every edge and on all threads, or not there."""

import dataclasses
import itertools
import os
import platform
import pwd
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.config import (
    ComputeConfig,
    ModelConfig,
    ParallelConfig,
    RunConfig,
    TrainConfig,
)
from jaxllm.kernels import native
from jaxllm.kernels.native import KINDS, METHODS, alone, has_native
from jaxllm.kernels.processor import features
from jaxllm.kernels.product import product, times_transposed
from jaxllm.train import compiler
from jaxllm.train.compiler import compiler_options
from jaxllm.train.load import for_device
from jaxllm.train.sharding import make_mesh
from jaxllm.train.step import build

AVX2 = ("-O3", "-mavx2", "-mfma", "-mno-avx512f", "-std=gnu11", "-fPIC", "-shared")
SIZES = (
    *(1, 2, 5, 6, 7, 13, 14, 15, 16, 17, 31, 32, 33, 47, 48, 49, 64, 65, 84, 85),
    *(127, 128, 129, 511, 512, 513),
)
"""Around a panel of any method, what a thread takes at a time, and KC."""
LARGE = (700, 300, 900), (300, 700, 600), (500, 500, 1100)
GPU, CPU = SimpleNamespace(platform="gpu"), SimpleNamespace(platform="cpu")
OURS = ComputeConfig(
    compute_dtype="float32", residual_dtype="float32", logits_dtype="float32",
    layer="fused", gemm="native",
)  # fmt: skip
AMX = {"amx_tile", "amx_bf16", "avx512f", "avx512_bf16"}
here = pytest.mark.skipif(
    not has_native(jax.devices()[0]), reason="the kernel cannot be compiled here"
)
amx = pytest.mark.skipif(
    not has_native(jax.devices()[0], "amx"), reason="the processor has no AMX"
)
method = pytest.mark.parametrize(
    "method", [pytest.param("native", marks=here), pytest.param("amx", marks=amx)]
)


def shapes(seed):
    """Each size in each place, with chance others beside it."""
    rng = np.random.default_rng(seed)
    every = [
        np.roll([size, *rng.choice(SIZES, 2)], place).tolist()
        for place, size in itertools.product(range(3), SIZES)
    ]
    return [every[i] for i in rng.permutation(len(every))]


def factors(kind, shape, draw, *, add) -> tuple[tuple[Any, ...], Any]:
    """A product's arrays as the kernel takes them, and what it should be."""
    m, n, k = shape
    a, b, added = (draw(shape).astype(np.float32) for shape in ((m, k), (k, n), (m, n)))
    truth = a.astype(np.float64) @ b + (added if add else 0)
    a = np.ascontiguousarray(a.T) if kind[0] == "t" else a
    b = np.ascontiguousarray(b.T) if kind[1] == "t" else b
    return (a, b, added) if add else (a, b), truth


def cases(seed, *, whole=True):
    """Kinds, with an addend and without, of many shapes; of whole numbers, which no sum
    here rounds."""
    rng = np.random.default_rng(seed)
    draw = (lambda shape: rng.integers(-8, 9, shape)) if whole else rng.standard_normal
    ways = itertools.cycle(itertools.product(KINDS, (False, True)))
    return [
        (kind, *factors(kind, shape, draw, add=add))
        for shape, (kind, add) in zip(shapes(seed), ways, strict=False)
    ]


class Kernel(NamedTuple):
    library: Any
    method: str

    def multiply(self, kind, *arrays):
        return alone(self.library, kind, *arrays, method=self.method)


@pytest.fixture(scope="module", params=[*METHODS, "AVX2"])
def kernel(request, tmp_path_factory):
    """Each method as it is compiled here, and native as for a processor without
    AVX-512."""
    found = native.native()
    if request.param in found.methods:
        return Kernel(found.library, request.param)
    if request.param in METHODS or found.library is None:
        pytest.skip("the kernel cannot be compiled here")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "FLAGS", AVX2)
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("avx2")))
        return Kernel(native._load(native._compiled()), "native")


@pytest.mark.skipif(
    (sys.platform, platform.machine()) != ("linux", "x86_64")
    or not {"avx2", "fma"} <= features()
    or shutil.which(os.environ.get("CC", "gcc")) is None,
    reason="it is for GCC on Linux, and a processor with AVX2",
)
def test_it_is_there_where_gcc_is():
    """Or the tests below would pass over a kernel that is wrong."""
    assert native.native().library is not None, native.native().problem
    if features() >= AMX:
        assert native.native().methods == METHODS, native.native().problem


def test_products_of_every_edge_are_right(kernel):
    for seed in range(4):
        for kind, arrays, truth in cases(seed):
            found = kernel.multiply(kind, *arrays)
            np.testing.assert_array_equal(found, truth, str((kind, truth.shape)))


def test_products_round_as_little_as_numpys(kernel):
    at_most = {"native": 4, "amx": 1}[kernel.method]  # 1.23 and 0.54
    rng = np.random.default_rng(1)
    for kind, shape in zip(KINDS, LARGE, strict=True):
        arrays, truth = factors(kind, shape, rng.standard_normal, add=True)
        a, b = (x.T if t == "t" else x for x, t in zip(arrays, kind, strict=False))
        theirs = np.linalg.norm(a @ b + arrays[2] - truth)
        mine = np.linalg.norm(kernel.multiply(kind, *arrays) - truth)
        assert mine < at_most * theirs, (kind, mine / theirs)


def test_small_values_beside_large_ones_keep_their_digits(kernel):
    """Each element against the sum of its products' sizes, over 26 decimal powers."""
    rng = np.random.default_rng(3)

    def draw(shape):
        return rng.standard_normal(shape) * 2.0 ** rng.integers(-43, 44, shape)

    for kind, shape in zip(KINDS, LARGE, strict=True):
        arrays, truth = factors(kind, shape, draw, add=False)
        a, b = (
            np.abs(x.T if t == "t" else x).astype(np.float64)
            for x, t in zip(arrays, kind, strict=True)
        )
        error = np.abs(kernel.multiply(kind, *arrays) - truth) / (a @ b)
        assert error.max() <= 2**-20, (kind, error.max() * 2**20)  # nn: 0.59 and 0.72


def test_what_is_not_finite_stays_in_its_row_and_column(kernel):
    for kind, arrays, truth in cases(9):
        a, b, *_ = (x.copy() for x in arrays)
        at, to = truth.shape[0] - 1, truth.shape[1] // 2
        (a.T if kind[0] == "t" else a)[at, 0] = np.nan
        (b.T if kind[1] == "t" else b)[-1, to] = np.inf
        wrong = np.zeros(truth.shape, bool)
        wrong[at], wrong[:, to] = True, True
        found = kernel.multiply(kind, a, b, *arrays[2:])
        np.testing.assert_array_equal(~np.isfinite(found), wrong)


GUARDED = """
import ctypes, mmap, sys
import numpy as np

lib, method = ctypes.CDLL(sys.argv[1]), int(sys.argv[3])
if method:
    assert lib.gemm_has_amx()
sizes = [ctypes.c_int] + [ctypes.c_long] * 3
lib.gemm_scratch.argtypes, lib.gemm_scratch.restype = sizes, ctypes.c_long
lib.gemm_alone.argtypes = sizes + [ctypes.c_void_p] * 5 + [ctypes.c_int] * 2
libc, page, kept = ctypes.CDLL(None, use_errno=True), mmap.PAGESIZE, []

def at_the_end(count):  # of the memory that may be touched
    pages = -(-count * 4 // page)
    memory = mmap.mmap(-1, (pages + 1) * page)
    kept.append(memory)
    whole = np.frombuffer(memory, np.float32)
    whole[: pages * page // 4] = 7.0
    begin = whole.ctypes.data + pages * page
    assert not libc.mprotect(ctypes.c_void_p(begin), ctypes.c_size_t(page), 0)
    return whole[: pages * page // 4], count

shapes = eval(sys.argv[2])
for m, n, k in shapes:
    for a_by_k, b_by_n in ((0, 0), (0, 1), (1, 0)):
        for add in (True, False):
            sizes = (m * k, k * n, m * n, m * n, lib.gemm_scratch(method, m, n, k))
            made = [at_the_end(size) for size in sizes]
            arrays = [memory[len(memory) - size :] for memory, size in made]
            for x in arrays[:3]:
                x[:] = 1.0
            pointers = [x.ctypes.data for x in arrays]
            pointers[2] = pointers[2] if add else None
            lib.gemm_alone(method, m, n, k, *pointers, a_by_k, b_by_n)
            assert (arrays[3] == k + add).all(), (m, n, k)
            for x in arrays[:3]:
                assert (x == 1.0).all()
            for memory, size in made:
                assert (memory[: len(memory) - size] == 7.0).all(), (m, n, k)
            del made, arrays, x, memory
            kept.clear()
"""


def test_nothing_is_touched_beyond_an_array(kernel):
    """Each array ends where memory ends that may be touched, in a process of its own:
    what reads on would end it. What lies before an array is looked at."""
    # Copying a panel may spill: rows and columns around whole panels, few and many.
    every = [
        *shapes(3),
        *itertools.product((1, 6, 14, 20), (8, 32, 40), (1, 9)),
    ]
    number = str(METHODS.index(kernel.method))
    done = subprocess.run(
        [sys.executable, "-c", GUARDED, kernel.library._name, repr(every), number],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, (done.returncode, done.stderr)


@pytest.fixture(scope="module", params=METHODS)
def through_xla(request):
    """Products of every edge in one program, independent of each other, with their
    cases: XLA may run several at once."""
    method = request.param
    if method not in native.native().methods:
        pytest.skip("the kernel cannot be compiled here")
    these = cases(5, whole=False)

    def multiply(all_arrays):
        return [
            product(kind, *arrays, ours=method)
            for (kind, _, _), arrays in zip(these, all_arrays, strict=True)
        ]

    inputs = [tuple(map(jnp.asarray, arrays)) for _, arrays, _ in these]
    call = jax.jit(multiply).lower(inputs).compile()
    kernel = Kernel(native.native().library, method)
    return these, lambda: [np.asarray(x) for x in call(inputs)], kernel


def test_through_xla_they_are_as_on_one_thread(through_xla):
    these, call, kernel = through_xla
    for (kind, arrays, _), found in zip(these, call(), strict=True):
        np.testing.assert_array_equal(found, kernel.multiply(kind, *arrays))


def test_products_in_flight_at_once_are_the_same_every_time(through_xla):
    _, call, _ = through_xla
    first = call()
    for _ in range(50):
        for a, b in zip(first, call(), strict=True):
            np.testing.assert_array_equal(a, b)


@method
def test_large_ones_are_shared_out_and_do_not_depend_on_who_takes_what(method):
    kernel = Kernel(native.native().library, method)
    draw = np.random.default_rng(1).standard_normal
    call = jax.jit(lambda kind, *x: product(kind, *x, ours=method), static_argnums=0)
    for kind, shape in zip(KINDS, LARGE, strict=True):
        arrays, _ = factors(kind, shape, draw, add=True)
        one_thread = kernel.multiply(kind, *arrays)
        for _ in range(10):
            np.testing.assert_array_equal(call(kind, *arrays), one_thread)


@method
def test_the_gradient_is_that_of_xlas_product(method):
    rng = np.random.default_rng(2)
    x, y, w = (
        jnp.asarray(rng.standard_normal(s), jnp.float32)
        for s in ((45, 70), (101, 70), (45, 101))
    )

    def grads(multiply):
        return jax.jit(jax.grad(lambda x, y: jnp.sum(w * multiply(x, y)), (0, 1)))(x, y)

    ours = grads(lambda x, y: times_transposed(x, y, method))
    for a, b in zip(ours, grads(lambda x, y: x @ y.T), strict=True):
        assert np.linalg.norm(a - b) <= 1e-6 * np.linalg.norm(b)  # 1.7e-7


A, B, C = (4, 3), (3, 5), (4, 5)


@here
@pytest.mark.parametrize(
    ("given", "made", "said"),
    [
        ([A, (4, 5)], [C, 400], "do not fit together"),
        ([A, B], [(5, 4), 400], "do not fit together"),
        ([A, B, (5, 4)], [C, 400], "do not fit together"),
        ([A, B, (1, 5)], [C, 400], "do not fit together"),
        ([A, B], [C, 30], "do not fit together"),
        ([(0, 3), B], [(0, 5), 400], "do not fit together"),
        ([(4, 0), (0, 5)], [C, 400], "do not fit together"),
        ([A, (1, *B)], [C, 400], "takes float32 matrices"),
        ([(3,), B], [C, 400], "takes float32 matrices"),
        ([A, B], [(4, 5, 1), 400], "gives a float32 matrix"),
        ([A, B], [C], "two or three arrays"),
        ([A], [C, 400], "two or three arrays"),
        ([A, B, C, C], [C, 400], "two or three arrays"),
    ],
)
def test_what_does_not_fit_is_an_error(given, made, said):
    results = [
        jax.ShapeDtypeStruct(s if isinstance(s, tuple) else (s,), jnp.float32)
        for s in made
    ]
    call = jax.jit(jax.ffi.ffi_call("jaxllm_gemm_native_nn", results))
    with pytest.raises(jax.errors.JaxRuntimeError, match=said):
        jax.block_until_ready(call(*map(jnp.ones, given)))


@here
@pytest.mark.parametrize(
    ("given", "made", "said"),
    [
        ((jnp.bfloat16, jnp.float32), jnp.float32, "takes float32 matrices"),
        ((jnp.float32, jnp.int32), jnp.float32, "takes float32 matrices"),
        ((jnp.float32, jnp.float32), jnp.bfloat16, "gives a float32 matrix"),
    ],
)
def test_another_dtype_is_an_error(given, made, said):
    results = jax.ShapeDtypeStruct(C, made), jax.ShapeDtypeStruct((400,), jnp.float32)
    call = jax.jit(jax.ffi.ffi_call("jaxllm_gemm_native_nn", results))
    x, y = (jnp.ones(s, dtype) for s, dtype in zip((A, B), given, strict=True))
    with pytest.raises(jax.errors.JaxRuntimeError, match=said):
        jax.block_until_ready(call(x, y))


# Errors that gemm.c or panels.h might have: text, and what stands there instead.
ADDEND, AT_THE_EDGE = "k0 ? g->c : g->add", "+ (add ? add[i * stride + j] : 0)"
COLUMNS = "min(nr, g->n - j * nr)"
MISTAKES = {
    "addend forgotten": ("gemm.c", ADDEND, "k0 ? g->c : NULL"),
    "what came before forgotten": ("gemm.c", ADDEND, "g->add"),
    "the rest of K forgotten": ("gemm.c", "k0 < g->k;", "!k0 || k0 + KC <= g->k;"),
    "always the first panel": ("gemm.c", "packed += theirs", "packed += 0 * theirs"),
    "tn packs rows": ("gemm.c", "if (g->a_by_k) {", "if (0) {"),
    "last panel too narrow": ("gemm.c", COLUMNS, f"{COLUMNS} - (j > 0)"),
    "last row not packed": ("panels.h", "r[i] = i < rows ?", "r[i] = i < rows - 1 ?"),
    "last k not packed": ("panels.h", "for (; j < k; j++)", "for (; j + 1 < k; j++)"),
    "one half twice": ("panels.h", "sums[i][1] += x * b1;", "sums[i][1] += x * b0;"),
    "no addend at the edge": ("panels.h", AT_THE_EDGE, ""),
}
AMX_MISTAKES = {
    "tn packs rows": ("gemm.c", "if (g->a_by_k) amx", "if (0) amx"),
    "the last part left out": ("amx.h", "LOAD_A(2) MULTIPLY", ""),
    "the middle taken for the last": ("amx.h", "LOAD_B(2)", "LOAD_B(1)"),
    "the middle by the middle left out": ("amx.h", "LOAD_A(1) MULTIPLY", "LOAD_A(1)"),
    "the rest is not what was lost": ("amx.h", "_mm512_sub_ps(x, parts[s])", "x"),
    "one half twice": ("amx.h", "_tile_dpbf16ps(3, 5, 7)", "_tile_dpbf16ps(3, 5, 6)"),
    "the next sum on top": ("amx.h", "  _tile_zero(2);\n", ""),
    "no addend": ("amx.h", "if (add) sum +=", "if (0) sum +="),
    "an odd k dropped": ("amx.h", "k > 0 ? width : 0", "k > 1 ? width : 0"),
    "too few columns": (
        "amx.h",
        "first_lanes(columns - j)",
        "first_lanes(columns - j - 1)",
    ),
    "rows in place of pairs": ("amx.h", "by_k != pairs_down; s++", "0; s++"),
    "the second tile over the first": ("amx.h", "i % 2 * TILE_BYTES", "0"),
}


@pytest.fixture
def quickly(monkeypatch):
    """Compiles in a fifth of the time."""
    monkeypatch.setattr(native, "FLAGS", [*native.FLAGS, "-O0"])


@pytest.mark.parametrize(
    ("method", "name"),
    [
        *(pytest.param("native", name, marks=here) for name in MISTAKES),
        *(pytest.param("amx", name, marks=amx) for name in AMX_MISTAKES),
    ],
)
def test_a_wrong_kernel_is_noticed_before_it_is_used(
    method, name, quickly, monkeypatch, tmp_path
):
    file, old, new = (MISTAKES if method == "native" else AMX_MISTAKES)[name]
    shutil.copytree(native.SOURCES, tmp_path / "cpu")
    path = tmp_path / "cpu" / file
    text = path.read_text()
    assert old in text, "the code has changed, so write the mistake anew"
    path.write_text(text.replace(old, new))
    monkeypatch.setattr(native, "SOURCES", tmp_path / "cpu")
    library = native._compiled(tmp_path)
    with pytest.raises(ValueError, match=f"{method}_.. is off by"):
        native._check(native._load(library), method)
    if name == "one half twice":  # one of them all the way: it takes longer
        found = native_in(tmp_path / "cache", monkeypatch)
        assert "is off by" in found.problem
        assert found.methods == (() if method == "native" else ("native",))


def native_in(cache, monkeypatch):
    """What a process finds that keeps its kernels in `cache`."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    # XLA has this process's already, and takes no other.
    monkeypatch.setattr(jax.ffi, "register_ffi_target", lambda *_, **__: None)
    return native.native.__wrapped__()


def script(path, text):
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


CLANG = """
if [ "$1" = --version ]; then echo clang version 19.1.0; exit; fi
echo 'panels.h:15:2: error: "the kernels take GCC vector extensions"' >&2
exit 1
"""


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "there is no GCC"),
        ("echo it is broken >&2; exit 1", "failed: it is broken"),
        (CLANG, "failed: panels.h:15:2: error: .the kernels take GCC"),
        ("kill -9 $$", "failed: no message"),
        ("exit 0", "file too short"),  # says yes, and compiles nothing
    ],
    ids=["none", "broken", "clang", "killed", "idle"],
)
def test_a_compiler_that_is_not_gcc_is_told_and_no_error(
    text, said, monkeypatch, tmp_path
):
    compiler = tmp_path / "cc"
    monkeypatch.setenv("CC", script(compiler, text) if text else str(compiler))
    found = native_in(tmp_path / "cache", monkeypatch)
    assert found.library is None
    assert re.search(said, found.problem) and "\n" not in found.problem


def test_a_compiler_that_hangs_is_not_waited_for(monkeypatch, tmp_path):
    monkeypatch.setenv("CC", script(tmp_path / "cc", "exec sleep 60"))
    monkeypatch.setattr(native, "TIMEOUT_S", 0.2)
    assert "timed out" in native_in(tmp_path / "cache", monkeypatch).problem


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("platform", "darwin", "Linux x86-64 alone, not darwin"),
        ("machine", "aarch64", "Linux x86-64 alone"),
        ("flags", "flags\t: fpu sse4_2 avx", "no AVX2 and FMA"),
        ("flags", None, "no AVX2 and FMA"),
    ],
)
def test_another_machine_has_none(name, value, said, monkeypatch, tmp_path):
    if name == "platform":
        monkeypatch.setattr(native.sys, "platform", value)
    elif name == "machine":
        monkeypatch.setattr(native.platform, "machine", lambda: value)
    else:
        path = tmp_path / "cpuinfo"
        if value:
            path.write_text(value)
        monkeypatch.setattr(native, "features", lambda: features.__wrapped__(path))
    found = native_in(tmp_path, monkeypatch)
    assert found.library is None and said in found.problem


@pytest.fixture
def no_home(monkeypatch, tmp_path):
    """Where no cache folder can be made, and a folder for temporary files."""
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    (tmp_path / "a file").touch()
    return tmp_path / "a file", temporary


@here
def test_without_a_cache_folder_it_is_compiled_elsewhere(quickly, no_home, monkeypatch):
    home, temporary = no_home
    found = native_in(home, monkeypatch)
    assert found.library is not None
    assert Path(found.library._name).is_relative_to(temporary)


def test_without_any_folder_there_is_none(no_home, monkeypatch):
    home, temporary = no_home
    temporary.rmdir()
    found = native_in(home, monkeypatch)
    assert found.library is None and found.problem


@here
def test_it_is_compiled_once_and_again_when_a_source_changes(
    quickly, monkeypatch, tmp_path
):
    kept = tmp_path / "cache" / "jaxllm"
    shutil.copytree(native.SOURCES, tmp_path / "cpu")
    monkeypatch.setattr(native, "SOURCES", tmp_path / "cpu")
    assert native_in(tmp_path / "cache", monkeypatch).library is not None
    (path,) = kept.iterdir()
    before = path.stat().st_mtime_ns
    assert native_in(tmp_path / "cache", monkeypatch).library is not None
    assert [x.stat().st_mtime_ns for x in kept.iterdir()] == [before]
    with (tmp_path / "cpu" / "xla.h").open("a") as file:
        file.write("/* another */\n")
    assert native_in(tmp_path / "cache", monkeypatch).library is not None
    assert len(list(kept.iterdir())) == 2


@here
@pytest.mark.parametrize("damage", ["empty", "garbage", "cut", "another library"])
def test_a_damaged_kernel_in_the_cache_is_compiled_anew(
    damage, quickly, monkeypatch, tmp_path
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = native._compiled()
    whole = path.read_bytes()
    path.unlink()  # a library that is loaded must not change
    if damage == "another library":
        source = tmp_path / "other.c"
        source.write_text("int nothing;")
        subprocess.run(["gcc", "-shared", "-o", path, source], check=True)
    else:
        texts = {"empty": b"", "garbage": b"no library", "cut": whole[:100]}
        path.write_bytes(texts[damage])
    found = native_in(tmp_path, monkeypatch)
    assert found.library is not None, found.problem


@here
def test_no_temporary_folder_is_left_behind(quickly, no_home, monkeypatch, tmp_path):
    _, temporary = no_home
    assert native_in(tmp_path / "cache", monkeypatch).library is not None
    assert not list(temporary.iterdir())


@here
def test_a_user_without_a_home_has_it_too(quickly, no_home, monkeypatch):
    """As in some containers: neither HOME nor an entry in the list of users."""
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", dict().__getitem__)
    assert native_in("", monkeypatch).library is not None


def test_auto_takes_it_for_large_float32_products_of_one_cpu():
    every = ("amx", "native", "onednn")

    def chosen(*there, dim=256, platform="cpu", **given: Any):
        compute = ComputeConfig(**given).resolve(
            n_layers=2, dim=dim, platform=platform, compute_capability=9.0,
            has=(there or every).__contains__,
        )  # fmt: skip
        return compute.gemm

    assert chosen() == chosen("amx", "native") == chosen(layer="fused") == "amx"
    assert chosen("native", "onednn") == chosen("native") == "native"
    assert chosen("onednn") == "onednn"
    assert chosen("none") == "ynnpack"
    assert chosen(dim=192) == "amx" and chosen(dim=191) == "ynnpack"
    assert chosen("onednn", dim=255) == "ynnpack"
    assert chosen(layer="plain") == "onednn"
    assert chosen("amx", "native", layer="plain") == "ynnpack"
    for name in ("compute_dtype", "residual_dtype", "logits_dtype"):
        narrow: Any = {name: "bfloat16"}
        assert chosen(**narrow) == "ynnpack", name
    assert chosen(compute_dtype="float64") == "ynnpack"
    assert chosen(platform="gpu", compute_dtype="float32") == "triton"
    assert chosen(platform="gpu") == "cublas"
    for gemm in (*every, "ynnpack"):
        assert chosen("none", gemm=gemm, dim=32) == gemm


def test_nobody_is_asked_for_it_in_vain():
    """Asking compiles the kernels, or at least runs the compiler."""

    def has(gemm):
        raise AssertionError(gemm)

    ComputeConfig().resolve(n_layers=1, dim=32, has=has)
    ComputeConfig(compute_dtype="bfloat16").resolve(n_layers=1, dim=512, has=has)
    ComputeConfig(gemm="ynnpack").resolve(n_layers=1, dim=512, has=has)
    ComputeConfig().resolve(n_layers=1, dim=512, has=has, platform="gpu")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("changes", "device", "alone", "there", "said"),
    [
        ({}, CPU, False, True, "several devices"),
        ({"compute_dtype": "bfloat16"}, CPU, True, True, "compute_dtype=bfloat16"),
        ({"residual_dtype": "bfloat16"}, CPU, True, True, "residual_dtype=bfloat16"),
        ({"logits_dtype": "float64"}, CPU, True, True, "logits_dtype=float64"),
        ({"layer": "plain"}, CPU, True, True, "layer=plain"),
        ({}, GPU, True, True, "gpu"),
        ({}, CPU, True, False, "there is no GCC"),
    ],
)
def test_it_is_refused_where_it_is_not_for(
    changes, device, alone, there, said, method, monkeypatch
):
    library: Any = SimpleNamespace()
    found = native.Native(library, METHODS) if there else native.Native(None, (), said)
    for module in (native, compiler):
        monkeypatch.setattr(module, "native", lambda: found)
    asked = dataclasses.replace(OURS, gemm=method)
    if there:
        assert compiler_options(asked, CPU) == {}
    with pytest.raises(ValueError, match=f"compute.gemm={method}.*{said}.*use auto"):
        compiler_options(dataclasses.replace(asked, **changes), device, alone=alone)


def test_amx_is_refused_where_only_the_rest_is(monkeypatch):
    library: Any = SimpleNamespace()
    found = native.Native(library, ("native",), "the processor has no AMX")
    for module in (native, compiler):
        monkeypatch.setattr(module, "native", lambda: found)
    assert compiler_options(OURS, CPU) == {}
    with pytest.raises(ValueError, match="gemm=amx.*with AMX.*processor has no AMX"):
        compiler_options(dataclasses.replace(OURS, gemm="amx"), CPU)


@here
def test_a_step_of_several_devices_refuses_it_before_it_is_compiled():
    config = RunConfig(
        model=ModelConfig(dim=32, n_layers=1, n_heads=2, n_kv_heads=2, vocab_size=64),
        compute=ComputeConfig(gemm="native"),
        train=TrainConfig(batch_size=2),
    )
    with pytest.raises(ValueError, match="compute.gemm=native.*several devices.*auto"):
        mesh = make_mesh(ParallelConfig(2, 1, 1), jax.devices()[:2])
        build(config, mesh, total_steps=9)


def test_a_run_that_asked_for_it_is_read_where_there_is_none(monkeypatch):
    asked = dataclasses.replace(OURS, attention="native")
    auto = dataclasses.replace(OURS, gemm="auto", attention="auto")
    tiles = dataclasses.replace(asked, gemm="amx")
    there: Any = SimpleNamespace()

    def read(compute, *methods, device=CPU):
        found = native.Native(there if methods else None, methods)
        monkeypatch.setattr(native, "native", lambda: found)
        return for_device(compute, device)

    assert read(asked, *METHODS) == read(asked, "native") == asked
    assert read(tiles, *METHODS) == tiles
    assert read(tiles, "native") == dataclasses.replace(asked, gemm="auto")
    assert read(asked) == read(tiles) == auto
    assert read(asked, *METHODS, device=GPU) == auto
    other = ComputeConfig(gemm="ynnpack", attention="plain")
    assert for_device(other, GPU) == other
