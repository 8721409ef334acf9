"""The train state, and what is compiled: init, train_step, eval_step.

State is a nested dict of arrays: step, params, opt with count, m and v, and guard where
spikes are skipped. Batches are dicts of (A, B, T) arrays: A micro-batches of B rows of
T tokens.
"""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxllm.config import ComputeConfig, RunConfig
from jaxllm.kernels.cross_entropy import cross_entropy
from jaxllm.model import Transformer
from jaxllm.train import guard, optim
from jaxllm.train.compiler import compiler_options, has_products
from jaxllm.train.sharding import batch_sharding, check_divides, shardings

State = dict[str, Any]
Batch = dict[str, Any]


@dataclass(frozen=True)
class Program:
    """The compiled functions of one run, and the shapes and layouts they work on."""

    config: RunConfig
    graphdef: Any
    mesh: Mesh
    abstract_state: State
    """ShapeDtypeStructs with shardings: what a checkpoint is restored onto."""
    batch_sharding: NamedSharding
    init: Callable[[], State]
    train_step: Callable[[State, Batch], tuple[State, dict[str, jax.Array]]]
    eval_step: Callable[[dict, Batch], tuple[jax.Array, jax.Array]]


def build(config: RunConfig, mesh: Mesh, *, total_steps: int) -> Program:
    """Prepares a run's functions for `mesh`; compiles nothing yet.

    Raises: ValueError if the configuration does not fit the mesh.
    """
    check_divides(config, mesh)
    compute = resolve_compute(config, mesh.devices.flat[0], alone=mesh.size == 1)
    config = replace(config, compute=compute)
    model, compute = config.model, config.compute

    def create():
        rngs = nnx.Rngs(config.train.seed)
        return nnx.split(Transformer(model, compute, rngs=rngs))

    # Made once: two graphdefs of equal models may compare unequal and retrace.
    graphdef, _ = nnx.eval_shape(create)

    def init() -> State:
        params = nnx.to_pure_dict(create()[1])
        state = {
            "step": jnp.zeros((), jnp.int32),
            "params": params,
            "opt": optim.init(params),
        }
        return state | ({"guard": guard.init()} if config.guard.spike_factor else {})

    abstract = jax.eval_shape(init)
    layout = shardings(mesh, abstract)
    replicated = NamedSharding(mesh, P())
    rows = batch_sharding(mesh)

    def train_step(state, batch):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh), _precision(compute):
            return update_state(config, graphdef, state, batch, total_steps=total_steps)

    def eval_step(params, batch):
        micro = jax.tree.map(lambda x: x[0], batch)
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh), _precision(compute):
            loss_sum = summed_loss(graphdef, cast_matrices(params, compute), micro)
        return loss_sum, jnp.sum(micro["loss_mask"].astype(jnp.int32))

    return Program(
        config=config,
        graphdef=graphdef,
        mesh=mesh,
        abstract_state=jax.tree.map(
            lambda leaf, s: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=s),
            abstract,
            layout,
        ),
        batch_sharding=rows,
        init=jax.jit(init, out_shardings=layout),
        train_step=jax.jit(
            train_step,
            compiler_options=compiler_options(
                compute, mesh.devices.flat[0], alone=mesh.size == 1
            ),
            donate_argnums=0,
            in_shardings=(layout, rows),
            out_shardings=(layout, replicated),
        ),
        eval_step=jax.jit(
            eval_step,
            in_shardings=(layout["params"], rows),
            out_shardings=(replicated, replicated),
        ),
    )


def to_device(program: Program, batch: Batch, *, parts: int) -> Batch:
    """Cuts host arrays (A B, T) into A = `parts` micro-batches and puts them in place.

    Every process gives the whole batch, and keeps the rows of its own devices.
    """

    def put(x):
        x = x.reshape(parts, -1, *x.shape[1:])
        if jax.process_count() == 1:
            return jax.device_put(x, program.batch_sharding)
        return jax.make_array_from_callback(
            x.shape, program.batch_sharding, lambda index: x[index]
        )

    return {name: put(x) for name, x in batch.items()}


def _precision(compute: ComputeConfig):
    """Where float32 products may use TF32, "highest" forbids it, gradients included."""
    if compute.matmul_precision == "highest":
        return jax.default_matmul_precision("highest")
    return contextlib.nullcontext()


def resolve_compute(
    config: RunConfig, device: Any, *, alone: bool = True
) -> ComputeConfig:
    """Decides every "auto" of the compute configuration for `device`, which computes
    `alone` or shares the work with others."""
    capability = float(getattr(device, "compute_capability", 0.0) or 0.0)
    return config.compute.resolve(
        n_layers=config.model.n_layers,
        vocab_size=config.model.vocab_size,
        head_dim=config.model.head_dim or 0,
        dim=config.model.dim,
        platform=device.platform,
        compute_capability=capability,
        has=lambda gemm: has_products(gemm, device, alone=alone),
    )


def update_state(
    config: RunConfig, graphdef, state: State, batch: Batch, *, total_steps: int
) -> tuple[State, dict[str, jax.Array]]:
    """One update: mean loss, gradient, clip, Adam; a pure function.

    A step whose loss or gradient is not finite, or beyond the bounds of a state with a
    guard, leaves params and opt as they were (`skipped` is 1); `step` always moves on.
    """
    step = state["step"]
    loss, grads = loss_and_grads(config, graphdef, state["params"], batch, step)
    with jax.named_scope("optimizer"):
        return _apply(config, state, batch, loss, grads, total_steps=total_steps)


def _apply(
    config: RunConfig, state: State, batch: Batch, loss, grads, *, total_steps: int
) -> tuple[State, dict[str, jax.Array]]:
    """Clip, the judgement whether the step is good, and Adam if so."""
    step = state["step"]
    norm = optim.global_norm(grads)
    clip = optim.clip_coefficient(config.optim, norm)
    lr = optim.learning_rate(
        config.optim, step, total_steps=total_steps, accumulate=config.train.accumulate
    )
    good = jnp.isfinite(loss) & jnp.isfinite(norm)
    guarded, bounds = {}, {}
    if "guard" in state:
        after, kept, (loss_bound, norm_bound) = guard.judge(
            config.guard.spike_factor, state["guard"], loss, norm
        )
        good &= kept
        guarded = {"guard": after}
        bounds = {"loss_bound": loss_bound, "grad_norm_bound": norm_bound}
    params, opt = optim.update(
        config.optim, state["params"], grads, state["opt"], lr, clip, good
    )
    metrics = {
        "loss": loss,
        "grad_norm": norm,
        "clip": clip,
        "learning_rate": lr,
        "tokens": jnp.sum(batch["loss_mask"].astype(jnp.int32)),
        "skipped": 1 - good.astype(jnp.int32),
    }
    state = {"step": step + 1, "params": params, "opt": opt} | guarded
    return state, metrics | bounds


def loss_and_grads(
    config: RunConfig, graphdef, params: dict, batch: Batch, step: jax.Array
) -> tuple[jax.Array, dict]:
    """The loss of all micro-batches and its gradient, accumulated in `param_dtype`.

    Each micro-batch's summed loss is scaled by one over the tokens of the whole batch
    (loss_norm="token"), or over its own tokens and the number of micro-batches.
    """
    counts_A = jnp.sum(batch["loss_mask"].astype(jnp.int32), axis=(1, 2))
    n_micro = config.train.accumulate
    if config.optim.loss_norm == "token":
        per_A = jnp.full_like(counts_A, 1) * jnp.maximum(jnp.sum(counts_A), 1)
    else:
        per_A = n_micro * jnp.maximum(counts_A, 1)
    key = jax.random.fold_in(jax.random.key(config.train.seed), step)
    compute_params = cast_matrices(params, config.compute)

    def scaled_loss(compute_params, micro, per, index):
        dropout_key = jax.random.fold_in(key, index) if config.model.dropout else None
        loss_sum = summed_loss(graphdef, compute_params, micro, dropout_key)
        return loss_sum / per.astype(loss_sum.dtype)

    value_and_grad = jax.value_and_grad(scaled_loss)

    def widen(grads):
        return jax.tree.map(lambda g, p: g.astype(p.dtype), grads, params)

    if n_micro == 1:
        micro = jax.tree.map(lambda x: x[0], batch)
        loss, grads = value_and_grad(compute_params, micro, per_A[0], 0)
        return loss, widen(grads)

    def body(carry, inputs):
        loss, grads = value_and_grad(compute_params, *inputs)
        return jax.tree.map(jnp.add, carry, (loss, widen(grads))), None

    stat = jnp.promote_types(config.compute.compute_dtype, jnp.float32)
    zero = (jnp.zeros((), stat), jax.tree.map(jnp.zeros_like, params))
    (loss, grads), _ = jax.lax.scan(
        body, zero, (batch, per_A, jnp.arange(n_micro)), length=n_micro
    )
    return loss, grads


def summed_loss(graphdef, params: dict, micro: Batch, dropout_key=None) -> jax.Array:
    """The summed loss in nats of one micro-batch, a dict of (B, T) arrays."""
    model: Transformer = nnx.merge(graphdef, params)
    h_BTD, _ = model.hidden(
        micro["inputs"],
        positions_BT=micro.get("positions"),
        segment_ids_BT=micro.get("segment_ids"),
        dropout_key=dropout_key,
    )
    dtype = model.compute.logits_dtype
    with jax.named_scope("loss"):
        return cross_entropy(
            h_BTD.reshape(-1, h_BTD.shape[-1]),
            model.head_VD(),
            micro["targets"].reshape(-1),
            micro["loss_mask"].reshape(-1),
            implementation=model.compute.cross_entropy,
            chunk=model.compute.loss_chunk,
            dtype=None if dtype == "auto" else dtype,
            ours=model.compute.ours,
        )


def cast_matrices(params: dict, compute: ComputeConfig) -> dict:
    """Casts projection kernels to the compute dtype, once for all micro-batches.

    Norm weights are tiny, and the embedding is gathered (and its gradient scattered)
    in the parameter dtype: bfloat16 scatter-adds lose sums and are slow.
    """

    if compute.layer == "fused":  # folds the norms in before it casts
        return params

    def leaf(path, x):
        return x.astype(compute.compute_dtype) if path[-1].key == "kernel" else x

    return jax.tree_util.tree_map_with_path(leaf, params)
