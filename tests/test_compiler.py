"""What the step is compiled with: chosen by device, dtype, size, and versions tried."""

import dataclasses
import functools
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from jaxllm.config import ComputeConfig, ModelConfig, RunConfig, TrainConfig
from jaxllm.kernels.native import has_native, native
from jaxllm.kernels.processor import features
from jaxllm.train import compiler
from jaxllm.train.compiler import compiler_options, has_onednn
from jaxllm.train.sharding import make_mesh
from jaxllm.train.step import build, resolve_compute, to_device

GPU, CPU = SimpleNamespace(platform="gpu"), SimpleNamespace(platform="cpu")
SINGLE = ComputeConfig(
    compute_dtype="float32", residual_dtype="float32", logits_dtype="float32",
    gemm="onednn",
)  # fmt: skip
FLAGS = "flags\t\t: fpu avx2 avx512f avx512dq avx512bw avx512vl amx_tile\n"
here = pytest.mark.skipif(
    not has_onednn(jax.devices()[0]), reason="XLA is not known to have oneDNN here"
)
gcc = pytest.mark.skipif(
    not has_native(jax.devices()[0]), reason="our own kernel cannot be compiled here"
)
tiles = pytest.mark.skipif(
    not has_native(jax.devices()[0], "amx"), reason="the processor has no AMX"
)


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A Linux machine on which oneDNN is known to work; the path of its cpuinfo."""
    path = tmp_path / "cpuinfo"
    path.write_text("processor\t: 0\n" + FLAGS)
    read = features.__wrapped__
    monkeypatch.setattr(compiler, "features", lambda: read(path))
    monkeypatch.setattr(compiler.sys, "platform", "linux")
    monkeypatch.setattr(compiler.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(jax, "__version_info__", (0, 10, 2))
    for name in compiler.ONEDNN_LIMITS:
        monkeypatch.delenv(name, raising=False)
    return path


@pytest.mark.parametrize(
    "version, known", [((0, 11, 2), True), ((0, 12, 0), True), ((0, 13, 0), False)]
)
def test_a_gpus_options_are_for_versions_that_have_them(monkeypatch, version, known):
    monkeypatch.setattr(jax, "__version_info__", version)
    assert bool(compiler_options(ComputeConfig(gemm="cublas"), GPU)) == known
    assert not compiler_options(ComputeConfig(gemm="triton"), GPU)


def test_onednn_is_where_it_was_tried(machine, monkeypatch):
    assert has_onednn(CPU) and not has_onednn(GPU)
    monkeypatch.setattr(jax, "__version_info__", (0, 11, 0))
    assert not has_onednn(CPU)


@pytest.mark.parametrize("name, value", [("sys", "darwin"), ("machine", "aarch64")])
def test_onednn_is_for_linux_on_x86(machine, monkeypatch, name, value):
    if name == "sys":
        monkeypatch.setattr(compiler.sys, "platform", value)
    else:
        monkeypatch.setattr(compiler.platform, "machine", lambda: value)
    assert not has_onednn(CPU)


@pytest.mark.parametrize(
    "text", ["", FLAGS.replace("avx512bw ", ""), FLAGS.replace("avx512", "axv")]
)
def test_onednn_takes_the_whole_of_avx512(machine, text):
    machine.write_text(text)
    assert not has_onednn(CPU)
    machine.unlink()
    assert not has_onednn(CPU)


@pytest.mark.parametrize("name", ["ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"])
def test_onednn_is_not_taken_where_it_is_kept_from_avx512(machine, monkeypatch, name):
    monkeypatch.setenv(name, "AVX2")
    assert not has_onednn(CPU)


def test_auto_takes_onednn_for_large_float32_products_on_a_cpu():
    def chosen(*, dim=256, platform="cpu", onednn=True, **given: Any):
        compute = ComputeConfig(**given)
        return compute.resolve(
            n_layers=2, dim=dim, platform=platform, compute_capability=9.0,
            has=lambda gemm: onednn and gemm == "onednn",
        ).gemm  # fmt: skip

    assert chosen() == "onednn"
    assert chosen(dim=192) == chosen(onednn=False) == "ynnpack"
    for name in ("compute_dtype", "residual_dtype", "logits_dtype"):
        narrow: Any = {name: "bfloat16"}
        assert chosen(**narrow) == "ynnpack", name
    assert chosen(compute_dtype="float64") == "ynnpack"
    assert chosen(dim=32, gemm="onednn") == "onednn"
    assert chosen(gemm="ynnpack") == "ynnpack"
    assert chosen(platform="gpu") == "cublas"


def test_onednn_is_refused_where_it_is_not_known_to_work(machine):
    assert compiler_options(SINGLE, CPU)
    cases: list[Any] = [(SINGLE, GPU, "gpu")]
    for name in ("compute_dtype", "residual_dtype", "logits_dtype"):
        half: Any = {name: "bfloat16"}
        cases.append((dataclasses.replace(SINGLE, **half), CPU, f"{name}=bfloat16"))
    for compute, device, said in cases:
        with pytest.raises(ValueError, match=f"compute.gemm=onednn.*{said}.*use auto"):
            compiler_options(compute, device)


def network(dim: int, gemm: Any):
    """A network's configuration; with a dim of 256 the smallest for which auto leaves
    XLA's own products."""
    return RunConfig(
        model=ModelConfig(
            dim=dim, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=500,
            max_seq_len=80,
        ),
        compute=ComputeConfig(gemm=gemm),
        train=TrainConfig(batch_size=4, accumulate=2),
    )  # fmt: skip


@functools.cache
def compiled(gemm, dim=256):
    """A step's text, its state after one step, and after three, twice."""
    config = network(dim, gemm)
    mesh = make_mesh(config.parallel, jax.devices()[:1])
    program = build(config, mesh, total_steps=9)
    rng = np.random.default_rng(5)
    ids = rng.integers(0, 500, (2, 4, 80), dtype=np.int32)
    batch = {
        "inputs": ids[0], "targets": ids[1], "loss_mask": np.ones((4, 80), np.int32),
    }  # fmt: skip
    batch = to_device(program, batch, parts=2)
    step = program.train_step.lower(program.abstract_state, batch).compile()

    def after(steps):
        state = program.init()
        for _ in range(steps):
            state, _ = step(state, batch)
        return jax.tree.map(np.asarray, state)

    return str(step.as_text()), after(1), (after(3), after(3))


PRODUCTS = {
    "amx": "jaxllm_gemm_amx_",
    "native": "jaxllm_gemm_native_",
    "onednn": '"kind":"__onednn_fusion"',
}
"""What a CPU's step may multiply by, and how that is called in its text."""
kinds = pytest.mark.parametrize(
    "gemm",
    [
        pytest.param("amx", marks=tiles),
        pytest.param("native", marks=gcc),
        pytest.param("onednn", marks=here),
    ],
)


@gcc
def test_auto_multiplies_by_our_own_products():
    config = network(256, "auto")
    best = native().methods[-1]
    assert resolve_compute(config, jax.devices()[0]).gemm == best
    found = resolve_compute(config, jax.devices()[0], alone=False).gemm
    assert found == ("onednn" if has_onednn(jax.devices()[0]) else "ynnpack")


@kinds
def test_the_step_multiplies_by_what_it_was_told_and_twice_the_same(gemm):
    text, _, (first, again) = compiled(gemm)
    for kind, name in PRODUCTS.items():
        assert (text.count(name) > 20) if kind == gemm else name not in text
    for a, b in zip(*map(jax.tree.leaves, (first, again)), strict=True):
        np.testing.assert_array_equal(a, b)


@kinds
def test_a_step_agrees_with_xlas_own_products(gemm):
    # One step: three take each of them, XLA's own too, up to 5e-5 from float64.
    (_, mine, _), (text, other, _) = compiled(gemm), compiled("ynnpack")
    assert not any(name in text for name in PRODUCTS.values())
    for a, b in zip(*map(jax.tree.leaves, (mine["opt"], other["opt"])), strict=True):
        assert np.linalg.norm(a - b) <= 5e-6 * np.linalg.norm(b)  # 9.3e-7


@pytest.fixture
def cache(tmp_path):
    """JAX's cache of compiled programs, in a folder of its own."""
    names = ("compilation_cache_dir", "persistent_cache_min_compile_time_secs")
    before = {f"jax_{name}": jax.config.values[f"jax_{name}"] for name in names}
    jax.clear_caches()
    compilation_cache.reset_cache()  # or it stays in the folder of its first use
    try:
        jax.config.update("jax_compilation_cache_dir", str(tmp_path))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        yield tmp_path
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()


def kept(cache):
    return {path.name.split("-")[0] for path in cache.iterdir()}


@here
def test_no_warning_that_a_step_with_onednn_cannot_be_cached(cache):
    # Warnings are errors here; jax's own ends the compilation.
    compiled.__wrapped__("onednn", dim=32)
    assert "jit_init" in kept(cache) and "jit_train_step" not in kept(cache)


@gcc
def test_a_step_with_our_own_products_is_read_from_the_cache(cache):
    _, _, (first, _) = compiled.__wrapped__("native", dim=32)
    assert "jit_train_step" in kept(cache)
    files, read = sorted(cache.iterdir()), []

    def note(event, **_):
        read.append(event)

    jax.clear_caches()
    jax.monitoring.register_event_listener(note)
    try:
        _, _, (again, _) = compiled.__wrapped__("native", dim=32)
    finally:
        jax.monitoring.unregister_event_listener(note)
    assert "/jax/compilation_cache/cache_hits" in read
    assert "/jax/compilation_cache/cache_misses" not in read
    assert sorted(cache.iterdir()) == files
    for a, b in zip(*map(jax.tree.leaves, (first, again)), strict=True):
        np.testing.assert_array_equal(a, b)


@here
@pytest.mark.parametrize("seed", range(4))
def test_onednn_multiplies_right_whatever_the_shape(seed):
    """Odd sizes, ones, up to two batch axes, either operand transposed."""
    rng = np.random.default_rng(seed)
    taken = 0
    for _ in range(20):
        m, k, n = rng.choice([1, 2, 3, 7, 16, 31, 64, 100, 257], 3).tolist()
        batch = tuple(rng.integers(1, 4, rng.integers(0, 3)).tolist())
        swap_a, swap_b = rng.integers(0, 2, 2).tolist()
        axes = tuple(range(len(batch)))
        a = rng.normal(size=(*batch, *((k, m) if swap_a else (m, k))))
        b = rng.normal(size=(*batch, *((n, k) if swap_b else (k, n))))
        contracted = ((len(axes) + 1 - swap_a,), (len(axes) + swap_b,))
        product = functools.partial(
            jax.lax.dot_general, dimension_numbers=(contracted, (axes, axes))
        )
        a32, b32 = (jnp.asarray(x, jnp.float32) for x in (a, b))
        jitted = jax.jit(product, compiler_options=compiler.ONEDNN)
        call = jitted.lower(a32, b32).compile()
        taken += "__onednn" in str(call.as_text())
        truth = (a.swapaxes(-1, -2) if swap_a else a) @ (
            b.swapaxes(-1, -2) if swap_b else b
        )
        # A sum of k rounded products, none larger than about 16.
        np.testing.assert_allclose(call(a32, b32), truth, atol=2e-5 * k**0.5, rtol=1e-5)
    assert taken > 8
