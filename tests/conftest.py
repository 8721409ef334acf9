"""Strict JAX for every test: 8 CPU devices, exact products, no implicit ranks.

Set in this process only: a test that starts another process starts a plain one.
"""

import os
import shutil
import tempfile

import jax

# Before the first use of a device, after which JAX does not take it any more.
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_default_matmul_precision", "highest")
jax.config.update("jax_numpy_rank_promotion", "raise")

# Many tests compile the same programs: half of the time of test_kernels.py. All workers
# of one run of pytest share what they compiled, and whoever made the folder clears it.
MINE = "JAXLLM_TEST_PROGRAMS" not in os.environ
if MINE:
    os.environ["JAXLLM_TEST_PROGRAMS"] = tempfile.mkdtemp(prefix="jaxllm-tests-")
PROGRAMS = os.environ["JAXLLM_TEST_PROGRAMS"]
jax.config.update("jax_compilation_cache_dir", PROGRAMS)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


def pytest_unconfigure():
    if MINE:
        shutil.rmtree(PROGRAMS, ignore_errors=True)
