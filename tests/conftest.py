"""Strict JAX for every test: 8 CPU devices, exact products, no implicit ranks.

Set in this process only: a test that starts another process starts a plain one.
"""

import jax

# Before the first use of a device, after which JAX does not take it any more.
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_default_matmul_precision", "highest")
jax.config.update("jax_numpy_rank_promotion", "raise")
