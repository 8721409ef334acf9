"""Strict JAX for every test here, and one hypothesis profile without a deadline.

float64 needs no process of its own: `jax.enable_x64` as a context manager gives the
same bits (test_mechanism.py compares the two), so all rungs run in one pytest.
"""

import jax
import torch
from hypothesis import settings

# The same values as in tests/conftest.py: the two suites share a process.
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_default_matmul_precision", "highest")
jax.config.update("jax_numpy_rank_promotion", "raise")
torch.set_float32_matmul_precision("highest")
# The networks are tiny: handing their products to other threads costs more than them.
torch.set_num_threads(1)

# Examples are drawn from a fixed seed: a red run can be repeated anywhere.
settings.register_profile("parity", deadline=None, derandomize=True, database=None)
settings.load_profile("parity")
