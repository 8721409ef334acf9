"""bfloat16: our error and that of torch's autocast, both against the float64 truth."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import torch

from jaxllm import model as ours_model
from jaxllm.config import ComputeConfig, RunConfig
from parity_tests import cases, oracle, sides
from parity_tests.cases import SMALL
from parity_tests.compare import Pairs
from parity_tests.precision import FP32, FP64, Precision
from parity_tests.rungs_training import Run, our_run, their_run
from torch_ref import k_model

FUSED: dict = {"layer": "fused", "gate_up": "joined"}
VARIANTS: dict[str, dict] = {
    "residual float32": {"residual_dtype": "float32"},
    "residual bfloat16": {"residual_dtype": "bfloat16"},
    "residual float32, fused": {"residual_dtype": "float32"} | FUSED,
    "residual bfloat16, fused": {"residual_dtype": "bfloat16"} | FUSED,
    "residual float32, fused, bfloat16 logits": {
        "residual_dtype": "float32", "cross_entropy": "chunked",
        "logits_dtype": "bfloat16", **FUSED,
    },
    "goal lean: residual, logits bfloat16, fused": {
        "residual_dtype": "bfloat16", "layer": "fused", "cross_entropy": "chunked",
        "logits_dtype": "bfloat16", "remat": "products",
    },
}  # fmt: skip
CHOSEN = "residual float32"
"""What "auto" resolves to, on a GPU in the fused form; the gates hold for both. The
others are measured beside them."""
GATED = (CHOSEN, f"{CHOSEN}, fused")
LENGTH = 128


def compute(variant: str) -> ComputeConfig:
    """float32 weights, bfloat16 products."""
    return FP32.compute(compute_dtype="bfloat16", **VARIANTS[variant])


@functools.cache
def errors(
    seed: int, variants: tuple[str, ...] = tuple(VARIANTS)
) -> dict[str, dict[str, float]]:
    """Relative errors of logits, loss, gradients: autocast's, then each variant's."""
    params = cases.trained(seed, FP32)
    wide = cases.trained(seed, FP32)
    batch = cases.batch(seed, (1, 4, LENGTH), SMALL.vocab_size)
    truth = torch_side(wide, SMALL, FP64, batch, autocast=False)
    cast = torch_side(params, SMALL, FP32, batch, autocast=True)
    found = {"autocast": distance(cast, truth)}
    for variant in variants:
        config = sides.run_config(SMALL, compute(variant), rows=len(batch["inputs"][0]))
        found[variant] = distance(our_side(params, config, batch), truth)
    return found


def forward_and_gradients(precision: Precision, seed: int) -> Pairs:
    """Our error over autocast's, seed by seed."""
    del precision
    found = errors(seed, GATED)
    return {
        f"{variant}: {kind}": (found[variant][kind] / found["autocast"][kind], 0.0)
        for variant in GATED
        for kind in ("logits", "gradients")
    }


def trajectory(precision: Precision, seed: int) -> Pairs:
    """200 steps: mean error of our bfloat16 losses over autocast's."""
    del precision
    run = Run("reference, A=1", 200, seed)
    truth = np.array(their_run(run, FP64).losses)
    settings: dict = {"compute_dtype": "bfloat16"} | VARIANTS[CHOSEN]
    mine = np.array(our_run(run, FP32, **settings).losses)
    model = sides.theirs(run.params(FP32), run.model, FP32)
    other = oracle.train(
        model, run.batches(), run.optim, total_steps=run.total_steps,
        autocast=torch.bfloat16,
    )  # fmt: skip
    gaps = [np.mean(np.abs(x - truth)) for x in (mine, np.array(other.losses))]
    return {"mean loss error": (gaps[0] / gaps[1], 0.0)}


def parts(precision: Precision, seed: int) -> Pairs:
    """Norm and rotation of bfloat16 inputs: the reference rounds at the same places."""
    del precision
    rng = np.random.default_rng((61, seed))
    x = torch.tensor(rng.standard_normal((2, 64, 4, 16))).bfloat16()
    pairs: Pairs = {}
    flat = x.flatten(2)
    other = k_model.RMSNorm(64, 1e-5).bfloat16()
    other.weight.data = torch.tensor(1 + 0.3 * rng.standard_normal(64)).bfloat16()
    norm = ours_model.RMSNorm(64, 1e-5, param_dtype="bfloat16")
    norm.weight[...] = _to_jax(other.weight.data)
    with torch.no_grad():
        pairs["norm"] = (_wide(norm(_to_jax(flat))), other(flat).double().numpy())
    cos, sin = k_model.precompute_freqs_cis(16, 64, dtype=torch.bfloat16)
    turned = ours_model.apply_rotary_emb(
        *(_to_jax(x), _to_jax(x[:, :, :2]), _to_jax(cos[None]), _to_jax(sin[None]))
    )
    expected = k_model.apply_rotary_emb(x, x[:, :, :2], cos, sin)
    for name, a, b in zip("qk", turned, expected, strict=True):
        pairs[f"rotary {name}"] = (_wide(a), b.double().numpy())
    return pairs


def _to_jax(x: torch.Tensor) -> jax.Array:
    dtype = jnp.bfloat16 if x.dtype == torch.bfloat16 else jnp.float32
    return jnp.asarray(x.float().numpy()).astype(dtype)


def _wide(x: jax.Array) -> np.ndarray:
    return np.asarray(x.astype(jnp.float32)).astype(np.float64)


def torch_side(params, model_config, precision, batch, *, autocast: bool) -> dict:
    """The reference's logits, loss and gradients on the CPU."""
    model = sides.theirs(params, model_config, precision)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        with torch.no_grad():
            logits = model(sides.as_torch(batch["inputs"][0])).logits
        loss, grads = oracle.backward(model, batch, "token")
    results = {name: grad.double().numpy() for name, grad in grads.items()}
    return {"logits": logits.double().numpy(), "loss": loss, "gradients": results}


def our_side(params, config: RunConfig, batch) -> dict:
    """Our logits, loss and gradients on the device at hand."""
    functions = sides.ours(config)
    logits = np.asarray(functions.logits(params, batch["inputs"][0]), np.float64)
    loss, grads = sides.our_loss_and_grads(config, FP32, params, batch)
    by_name = cases.to_torch(grads, config.model)
    return {"logits": logits, "loss": float(loss), "gradients": by_name}


def distance(side: dict, truth: dict) -> dict[str, float]:
    """Relative errors of a side."""

    def relative(a, b):
        return float(np.linalg.norm(np.float64(a) - b) / np.linalg.norm(b))

    by_tensor = [
        relative(side["gradients"][name], grad)
        for name, grad in truth["gradients"].items()
    ]
    return {
        "logits": relative(side["logits"], truth["logits"]),
        "loss": abs(side["loss"] - truth["loss"]) / truth["loss"],
        # The root mean square over tensors: large ones do not drown small ones.
        "gradients": float(np.sqrt(np.mean(np.square(by_tensor)))),
    }
