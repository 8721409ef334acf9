"""Our own attention for a CPU, from the joined product of q, k and v and back."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.kernels import heads, native
from jaxllm.kernels.attention import attention
from jaxllm.kernels.heads import attend, attend_backward

AVX2 = ("-O3", "-mavx2", "-mfma", "-mno-avx512f", "-std=gnu11", "-fPIC", "-shared")
HERE = native.has_native(jax.devices()[0])
pytestmark = pytest.mark.skipif(not HERE, reason="the kernel cannot be compiled here")

# B, T, K, G, H, rows of the tables: around panels of 6, 14, 16 and 32, and one by one.
SHAPES = [
    (1, 1, 1, 1, 2, 1),
    (2, 5, 1, 1, 4, 2),
    (1, 14, 2, 1, 6, 1),
    (2, 15, 1, 3, 10, 1),
    (1, 31, 1, 2, 32, 1),
    (3, 33, 2, 2, 14, 3),
    (2, 64, 1, 4, 128, 1),
    (1, 100, 2, 1, 48, 1),
    (1, 257, 1, 2, 34, 1),
    (2, 256, 2, 2, 64, 1),
]


def arrays(b, t, k, g, h, tables, *, seed=0, scale=2.0):
    """qkv_BTJ, rstd_BT, cos and sin, and a gradient of the output, float32."""
    rng = np.random.default_rng(seed)
    angles = rng.uniform(-3, 3, (tables, t, h // 2))
    made = (
        scale * rng.standard_normal((b, t, k * (g + 2) * h)),
        rng.uniform(0.3, 1.5, (b, t)),
        np.cos(angles),
        np.sin(angles),
        rng.standard_normal((b, t, k * g, h)),
    )
    return tuple(x.astype(np.float32) for x in made)


def both_ways(n, k, implementation, qkv, rstd, cos, sin, dout):
    """The output and the gradient of qkv."""
    out, kept = attend(n, k, implementation, qkv, rstd, cos, sin)
    return out, attend_backward(implementation, kept, rstd, cos, sin, dout)


jitted = jax.jit(both_ways, static_argnums=(0, 1, 2))


def ours(n, k, *inputs):
    return jitted(n, k, "native", *inputs)


def truth(n, k, *inputs):
    with jax.enable_x64(True):
        inputs = (jnp.asarray(np.asarray(x, np.float64)) for x in inputs)
        return [np.asarray(x) for x in jitted(n, k, "plain", *inputs)]


def error(found, true):
    return np.linalg.norm(found - true) / np.linalg.norm(true)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_is_as_near_to_the_truth_as_float32_allows(shape):
    _, _, k, g, *_ = shape
    inputs = arrays(*shape)
    true = truth(k * g, k, *inputs)
    blocked = jitted(k * g, k, "blocked", *inputs)
    for found, other, exact in zip(ours(k * g, k, *inputs), blocked, true, strict=True):
        assert error(found, exact) <= max(2 * error(other, exact), 5e-7)


def test_large_scores_and_small_ones():
    """A softmax that is all but one key's, and one whose keys weigh the same."""
    for scale in (1e-20, 1e-3, 30.0):
        inputs = arrays(1, 70, 1, 2, 16, 1, scale=scale)
        found, true = ours(2, 1, *inputs), truth(2, 1, *inputs)
        assert error(found[0], true[0]) <= 1e-5
        if scale == 1e-20:  # a key's gradient is a difference of what weighs the same
            continue
        assert error(found[1], true[1]) <= 1e-4


def test_no_query_sees_a_later_key():
    inputs = arrays(1, 50, 2, 2, 16, 1)
    before = ours(4, 2, *inputs)[0]
    qkv = inputs[0].copy()
    qkv[:, 23:] += 5.0
    after = ours(4, 2, qkv, *inputs[1:])[0]
    np.testing.assert_array_equal(before[:, :23], after[:, :23])
    assert (np.asarray(before)[:, 23:] != np.asarray(after)[:, 23:]).any(-1).all()


def test_rows_and_heads_are_apart():
    """Another key/value head's values, or another row's, change nothing."""
    shape = b, t, k, g, h, _ = 2, 40, 2, 2, 8, 1
    inputs = arrays(*shape)
    qkv = inputs[0].reshape(b, t, k, g + 2, h).copy()
    qkv[1, :, 0] += 1.0
    before = ours(k * g, k, *inputs)
    after = ours(k * g, k, qkv.reshape(b, t, -1), *inputs[1:])
    for x, y in zip(before, after, strict=True):
        x, y = (np.asarray(z).reshape(b, t, k, -1) for z in (x, y))
        np.testing.assert_array_equal(x[0], y[0])
        np.testing.assert_array_equal(x[1, :, 1], y[1, :, 1])
        assert (x[1, :, 0] != y[1, :, 0]).any()


def test_many_at_once_are_the_same_each_time():
    sets = [arrays(2, 90, 2, 2, 16, 1, seed=seed) for seed in range(8)]

    @jax.jit
    def all_of_them(sets):
        return [both_ways(4, 2, "native", *inputs) for inputs in sets]

    alone = [ours(4, 2, *inputs) for inputs in sets]
    for _ in range(20):
        for x, y in zip(*map(jax.tree.leaves, (all_of_them(sets), alone)), strict=True):
            np.testing.assert_array_equal(x, y)


def test_a_number_that_is_none_shows():
    qkv, *rest = arrays(1, 20, 1, 1, 4, 1)
    qkv[0, 11, 5] = np.nan  # of key 11
    out, dqkv = ours(1, 1, qkv, *rest)
    finite = np.isfinite(out).all(-1)[0, :, 0]
    assert finite[:11].all() and not finite[11:].any()
    assert not np.isfinite(dqkv).all()


@pytest.mark.parametrize(
    "change",
    ["qkv of another width", "rstd of fewer rows", "tables of another length", "half"],
)
def test_arrays_that_do_not_fit_are_refused(change):
    b, t, k, g, h = 2, 20, 1, 2, 8
    qkv, rstd, cos, sin, _ = arrays(b, t, k, g, h, 1)
    if change == "qkv of another width":
        qkv = qkv[..., :-1]
    elif change == "rstd of fewer rows":
        rstd = rstd[:1]
    elif change == "tables of another length":
        cos = cos[:, :-1]
    else:
        qkv = qkv.astype(jnp.bfloat16)
    shapes = (b, t, k * g, h), (2, b, k * g, t)
    call = jax.ffi.ffi_call(
        native.target("attention_forward"),
        [jax.ShapeDtypeStruct(shape, np.float32) for shape in shapes],
    )
    with pytest.raises(jax.errors.JaxRuntimeError, match="attention"):
        jax.block_until_ready(jax.jit(call)(qkv, rstd, cos, sin))


def compiled_as(name, monkeypatch, tmp_path):
    """Has attend take the library that native compiles now, under other names."""
    library = native._load(native._compiled(tmp_path))
    for kernel in native.TARGETS:
        jax.ffi.register_ffi_target(
            f"{name}_{kernel}", jax.ffi.pycapsule(library[kernel]), platform="cpu"
        )
    monkeypatch.setattr(heads.native, "target", lambda kernel: f"{name}_{kernel}")


def check(shapes):
    for shape in shapes:
        _, _, k, g, *_ = shape
        inputs = arrays(*shape)
        found = jax.jit(lambda *x: both_ways(k * g, k, "native", *x))(*inputs)  # noqa: B023
        for x, y in zip(found, truth(k * g, k, *inputs), strict=True):
            assert error(x, y) <= 5e-6


def test_with_avx2_alone(monkeypatch, tmp_path):
    monkeypatch.setattr(native, "FLAGS", AVX2)
    compiled_as("avx2", monkeypatch, tmp_path)
    check(SHAPES)


MUTANTS = {
    "a later key is seen": ("lanes query = lane_numbers() + (int)(t0 + from);",
                            "lanes query = lane_numbers() + (int)(t0 + from) + 1;"),
    "scores are not scaled": ("float root = 1 / sqrtf(a->h);", "float root = 1;"),
    "turned back the wrong way": ("float sign = turn * scale;", "float sign = scale;"),
    "the sum of probabilities times gradients is left out": (
        "prob * (load(to) - sum)", "prob * load(to)"),
    "the factor is left out of values": (
        "turned(joined(p, s, group + 1), cos, sin, h, scale, 0,",
        "turned(joined(p, s, group + 1), cos, sin, h, 1, 0,"),
    "keys' gradients from one query head": (
        "add_outer(p, p->dscores,", "if (!g) add_outer(p, p->dscores,"),
    "tables of the first row for all": ("a->tables > 1 ? row * a->t : 0", "0"),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_is_seen(name, monkeypatch, tmp_path):
    old, new = MUTANTS[name]
    shutil.copytree(native.SOURCES, tmp_path / "cpu")
    source = tmp_path / "cpu" / "attention.c"
    text = source.read_text()
    assert old in text
    source.write_text(text.replace(old, new))
    monkeypatch.setattr(native, "SOURCES", tmp_path / "cpu")
    monkeypatch.setattr(native, "FLAGS", (*native.FLAGS, "-O1"))
    compiled_as(f"mutant {list(MUTANTS).index(name)}", monkeypatch, tmp_path)
    with pytest.raises(AssertionError):
        check([(3, 33, 2, 2, 14, 3)])


def test_without_an_own_kernel_native_is_blocked():
    """Rows that do not run the fused layer: a plain layer of a step with native."""
    rng = np.random.default_rng(0)
    q = jnp.asarray(rng.standard_normal((2, 70, 4, 8)), jnp.float32)
    k, v = q[:, :, :2] + 1, q[:, :, 2:] - 1
    found, same = (attention(q, k, v, implementation=i) for i in ("native", "blocked"))
    np.testing.assert_array_equal(found, same)
