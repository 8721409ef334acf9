"""Our own float32 kernels for a CPU, compiled by GCC where they run.

What a compiler makes for just this processor is as fast as MKL's products, and shares
XLA's threads. It is compiled once for each processor, compiler and version of XLA's
interface, and kept in the user's cache folder.

Products have two methods: native multiplies float32 by the processor's vectors, amx
makes each product of six of bfloat16, by the processor's tiles, and is then no further
from the truth.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxllm.kernels.processor import features

SOURCES = Path(__file__).parent / "cpu"
FLAGS = ("-O3", "-march=native", "-std=gnu11", "-fPIC", "-shared")
KINDS = ("nn", "nt", "tn")
METHODS = ("native", "amx")
"""Of a product, as gemm.c counts them."""
TARGETS = (
    *(f"gemm_{method}_{kind}" for method in METHODS for kind in KINDS),
    "attention_forward",
    "attention_backward",
)
TIMEOUT_S = 120


class Native(NamedTuple):
    """The compiled kernels and their methods, or why there is none of them."""

    library: ctypes.CDLL | None
    methods: tuple[str, ...] = ()
    problem: str = ""


def has_native(device: Any, method: str = "native") -> bool:
    """Whether there are kernels for `device` with this method of products; compiles
    them if need be, which takes a second, once for each processor."""
    return device.platform == "cpu" and method in native().methods


@functools.cache
def native() -> Native:
    """Finds or compiles the kernels, checks them, and makes them known to XLA."""
    if (sys.platform, platform.machine()) != ("linux", "x86_64"):
        return _none(f"it was tried on Linux x86-64 alone, not {sys.platform}")
    if not {"avx2", "fma"} <= features():
        return _none("the processor has no AVX2 and FMA")
    try:
        library = _library()
    except (OSError, RuntimeError, subprocess.SubprocessError, ValueError) as error:
        return _none(error)
    methods, problem = METHODS, ""
    try:
        _check(library, "amx")
    except ValueError as error:
        methods, problem = ("native",), str(error)
    for name in TARGETS:
        jax.ffi.register_ffi_target(
            target(name), jax.ffi.pycapsule(library[name]), platform="cpu"
        )
    return Native(library, methods, problem)


def _none(problem: object) -> Native:
    return Native(None, problem=" ".join(str(problem).split()))


def target(name: str) -> str:
    """The name by which XLA calls a kernel, one of TARGETS."""
    return f"jaxllm_{name}"


def scratch_floats(method: str, m: int, n: int, k: int) -> int:
    """Float32 values of scratch memory that a product (m, k) by (k, n) takes."""
    library = native().library
    assert library is not None, "has_native was not asked"
    return library.gemm_scratch(METHODS.index(method), m, n, k)


def alone(
    library: ctypes.CDLL, kind: str, a, b, add=None, *, method: str = "native"
) -> np.ndarray:
    """A product of NumPy's float32 matrices on one thread, without XLA.

    Raises: MemoryError
    """
    by_k, by_n = kind[0] == "t", kind[1] == "t"
    (k, m) = a.shape if by_k else a.shape[::-1]
    n = b.shape[0] if by_n else b.shape[1]
    out = np.full((m, n), np.nan, np.float32)
    number = METHODS.index(method)
    scratch = np.full(library.gemm_scratch(number, m, n, k), np.nan, np.float32)
    arrays = (a, b, add, out, scratch)
    pointers = (None if x is None else x.ctypes.data for x in arrays)
    if library.gemm_alone(number, m, n, k, *pointers, by_k, by_n):
        raise MemoryError(f"a product of {m} by {n} by {k}")
    return out


def _library() -> ctypes.CDLL:
    """The compiled kernels: from the cache folder, or, where that cannot be written or
    holds what cannot be used, from a folder that is gone once they are loaded."""
    try:
        path = _compiled()
        try:
            return _checked(path)
        except (OSError, ValueError):
            path.unlink()  # damaged: the next start makes it anew
    except (OSError, RuntimeError):
        pass
    with tempfile.TemporaryDirectory(prefix="jaxllm-") as folder:
        return _checked(_compiled(Path(folder)))


def _compiled(folder: Path | None = None) -> Path:
    """The compiled library's path in `folder`, or the user's cache folder.

    Raises: OSError or RuntimeError if the folder cannot be used,
    subprocess.SubprocessError or ValueError if there is nothing that compiles.
    """
    compiler = shutil.which(os.environ.get("CC", "gcc"))
    if compiler is None:
        raise ValueError("there is no GCC (the variable CC may name it)")
    version = _run([compiler, "--version"])
    include = Path(jax.ffi.include_dir())
    sources = sorted(SOURCES.glob("*.c"))
    headers = *sorted(SOURCES.glob("*.h")), include / "xla/ffi/api/c_api.h"
    key = hashlib.sha256()
    for path in (*sources, *headers):
        key.update(hashlib.sha256(path.read_bytes()).digest())
    key.update(" ".join((compiler, version, *FLAGS, *sorted(features()))).encode())
    folder = folder or _cache_folder()
    path = folder / f"kernels-{key.hexdigest()[:32]}.so"
    if path.exists():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    handle, made = tempfile.mkstemp(suffix=".so", dir=folder)
    os.close(handle)
    try:
        files = map(str, sources)
        _run([compiler, *FLAGS, f"-I{include}", *files, "-o", made, "-lm"])
        os.chmod(made, 0o755)
        os.replace(made, path)  # whoever starts at the same time makes the same
    finally:
        Path(made).unlink(missing_ok=True)
    return path


def _cache_folder() -> Path:
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "jaxllm"


def _run(command: list[str]) -> str:
    done = subprocess.run(
        command, capture_output=True, text=True, errors="replace", timeout=TIMEOUT_S
    )
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["no message"])[0]
        raise ValueError(f"{command[0]} failed: {said}")
    return done.stdout


def _checked(path: Path) -> ctypes.CDLL:
    library = _load(path)
    _check(library, "native")
    return library


def _load(path: Path) -> ctypes.CDLL:
    """Raises: OSError, ValueError if it is no such library."""
    library = ctypes.CDLL(str(path))
    if missing := [name for name in TARGETS if not hasattr(library, name)]:
        raise ValueError(f"{path} has no {missing[0]}")
    library.gemm_scratch.argtypes = [ctypes.c_int] + [ctypes.c_long] * 3
    library.gemm_scratch.restype = ctypes.c_long
    library.gemm_alone.argtypes = [
        *library.gemm_scratch.argtypes,
        *[ctypes.c_void_p] * 5,
        *[ctypes.c_int] * 2,
    ]
    return library


def _check(library: ctypes.CDLL, method: str) -> None:
    """Multiplies once in each way.

    Raises: ValueError if a product is wrong, or the processor has no such method.
    """
    if method == "amx" and not library.gemm_has_amx():
        raise ValueError("the processor has no AMX, or the system does not lend it")
    rng = np.random.default_rng(0)
    for m, n, k in ((45, 100, 71), (100, 45, 601)):
        a, b = rng.standard_normal((m, k), np.float32), rng.standard_normal((k, n))
        b, add = b.astype(np.float32), rng.standard_normal((m, n), np.float32)
        truth = add + a.astype(np.float64) @ b
        for kind in KINDS:
            x = np.ascontiguousarray(a.T) if kind[0] == "t" else a
            y = np.ascontiguousarray(b.T) if kind[1] == "t" else b
            found = alone(library, kind, x, y, add, method=method)
            error = np.max(np.abs(found - truth))
            if not error <= 4e-6 * k**0.5:
                raise ValueError(f"the product {method}_{kind} is off by {error:.1e}")
