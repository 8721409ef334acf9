"""The ladder's training rungs: schedule, clip, Adam's moments, whole trajectories."""

import dataclasses
import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import torch

from jaxllm.config import ModelConfig, OptimConfig
from jaxllm.train import optim as ours_optim
from parity_tests import cases, oracle, sides
from parity_tests.cases import TINY
from parity_tests.compare import Pairs
from parity_tests.oracle import Trajectory
from parity_tests.precision import FP64, Precision

REFERENCE = OptimConfig(
    algorithm="adam", learning_rate=2e-3, min_learning_rate=2e-4, beta2=0.999,
    weight_decay=0.0, loss_norm="micro_batch", schedule_unit="micro_step",
)  # fmt: skip
MODERN = OptimConfig(
    algorithm="adamw", learning_rate=3e-3, min_learning_rate=3e-4, warmup_steps=5,
    weight_decay=0.1, clip_norm=0.3,
)  # fmt: skip

RECIPES: dict[str, tuple[OptimConfig, int]] = {
    "reference, A=1": (REFERENCE, 1),
    "reference, A=4": (REFERENCE, 4),
    "adamw, token mean, A=1": (MODERN, 1),
    "adamw, token mean, A=4": (MODERN, 4),
    "adam, token mean, no clip, A=4": (
        dataclasses.replace(MODERN, algorithm="adam", clip_norm=0.0, eps=1e-6),
        4,
    ),
}
"""Both losses, accumulation 1 and 4, decay on and off, with what each decides."""

SCHEDULES: dict[str, tuple[OptimConfig, int, int]] = {
    f"{optim.schedule_unit}, warm-up {optim.warmup_steps}, A={accumulate}": (
        optim,
        accumulate,
        total,
    )
    for optim, accumulate, total in (
        (REFERENCE, 1, 3125),
        (REFERENCE, 4, 100),
        (MODERN, 1, 100),
        (MODERN, 4, 100),
        (dataclasses.replace(MODERN, schedule_unit="micro_step"), 4, 40),
        (dataclasses.replace(MODERN, warmup_steps=39), 1, 40),
    )
}


def learning_rates(precision: Precision, seed: int) -> Pairs:
    """The learning rate of every step of several schedules, and past their end."""
    del seed
    pairs: Pairs = {}
    for name, (optim, accumulate, total) in SCHEDULES.items():
        steps = np.arange(total + 3)
        with precision.active():
            mine = jax.vmap(
                functools.partial(
                    ours_optim.learning_rate, optim, total_steps=total,
                    accumulate=accumulate,
                )
            )(jnp.asarray(steps, jnp.int32))  # fmt: skip
        theirs = [
            oracle.learning_rate(optim, k, total_steps=total, accumulate=accumulate)
            for k in steps.tolist()
        ]
        pairs[name] = (np.asarray(mine), np.array(theirs))
    return pairs


def clip(precision: Precision, seed: int) -> Pairs:
    """The clip coefficient against PyTorch's own, in float64 whatever ours is in."""
    pairs: Pairs = {}
    rng = np.random.default_rng((21, seed))
    # Norms far above, just above, at and below the limit; and a tiny one.
    for norm in (1e3, 1.0 + 1e-5, 1.0, 0.5, 1e-7):
        leaves = [rng.standard_normal(shape) for shape in ((50, 7), (311,), (3, 5, 9))]
        length = np.sqrt(sum(float(np.sum(x * x)) for x in leaves))
        leaves = [(x * norm / length).astype(precision.dtype) for x in leaves]
        for limit in (1.0, 0.25, 0.0):
            optim = OptimConfig(clip_norm=limit)
            with precision.active():
                tree = {str(i): jnp.asarray(x) for i, x in enumerate(leaves)}
                ours_norm = ours_optim.global_norm(tree)
                mine = np.asarray(ours_optim.clip_coefficient(optim, ours_norm))
            weights = [
                torch.nn.Parameter(torch.zeros(x.shape).double()) for x in leaves
            ]
            for weight, x in zip(weights, leaves, strict=True):
                weight.grad = torch.from_numpy(x.astype(np.float64))
            theirs = 1.0
            if limit:
                torch.nn.utils.clip_grad_norm_(weights, limit)
                before = np.abs(leaves[0]).max()
                assert weights[0].grad is not None
                theirs = weights[0].grad.abs().max().item() / float(before)
            pairs[f"norm={norm:g} limit={limit:g}"] = (mine, theirs)
    return pairs


@dataclass(frozen=True)
class Run:
    """What a trajectory is computed from."""

    recipe: str
    steps: int
    seed: int
    model: ModelConfig = TINY
    rows: int = 2
    length: int = 40
    mesh: tuple[int, int, int] = (1, 1, 1)

    @property
    def optim(self) -> OptimConfig:
        """The recipe's optimizer."""
        return RECIPES[self.recipe][0]

    @property
    def accumulate(self) -> int:
        """The recipe's micro-batches."""
        return RECIPES[self.recipe][1]

    @property
    def total_steps(self) -> int:
        """The schedule's length: a little longer than what is run."""
        return self.steps + self.steps // 4

    def batches(self) -> list[dict]:
        """One batch a step."""
        shape = (self.accumulate, self.rows, self.length)
        return [
            cases.batch(100_000 * self.seed + k, shape, self.model.vocab_size)
            for k in range(self.steps)
        ]

    def params(self, precision: Precision) -> dict:
        """Where it starts."""
        return cases.spread(self.model, self.seed, precision)


def our_run(run: Run, precision: Precision, **compute) -> Trajectory:
    """Our compiled step over the run's batches."""
    config = sides.run_config(
        run.model, precision.compute(**compute), optim=run.optim, rows=run.rows,
        accumulate=run.accumulate,
    )  # fmt: skip
    program = sides.program(config, run.total_steps, run.mesh)
    done = Trajectory()
    with precision.active():
        params = jax.tree.map(jnp.array, run.params(precision))
        state = {
            "step": jnp.zeros((), jnp.int32),
            "params": params,
            "opt": ours_optim.init(params),
        }
        layout = jax.tree.map(lambda leaf: leaf.sharding, program.abstract_state)
        state = jax.device_put(state, layout)
        for batch in run.batches():
            state, metrics = program.train_step(state, batch)
            assert int(metrics["skipped"]) == 0
            assert int(metrics["tokens"]) == int(batch["loss_mask"].sum())
            done.losses.append(float(metrics["loss"]))
            done.learning_rates.append(float(metrics["learning_rate"]))
            done.norms.append(float(metrics["grad_norm"]))
            done.clips.append(float(metrics["clip"]))
        assert int(state["step"]) == int(state["opt"]["count"]) == run.steps
        state = jax.tree.map(np.asarray, state)
    for name, tree in (
        ("params", state["params"]),
        ("m", state["opt"]["m"]),
        ("v", state["opt"]["v"]),
    ):
        tensors = cases.to_torch(tree, run.model)
        if run.model.tie_word_embeddings:
            del tensors["output.weight"]
        setattr(done, name, tensors)
    return done


@functools.cache
def their_run(run: Run, precision: Precision) -> Trajectory:
    """PyTorch over the same batches, from the same weights."""
    model = sides.theirs(run.params(precision), run.model, precision)
    return oracle.train(model, run.batches(), run.optim, total_steps=run.total_steps)


def steps(precision: Precision, seed: int) -> dict[str, Pairs]:
    """Twenty steps of every recipe: what must be equal, by kind."""
    found: dict[str, Pairs] = {}
    for recipe in RECIPES:
        for kind, pairs in paired(Run(recipe, 20, seed), precision).items():
            for name, pair in pairs.items():
                # Tensor by tensor, not all in one: a small one must not hide.
                found.setdefault(kind, {})[f"{recipe}: {name}"] = pair
    return found


def paired(run: Run, precision: Precision, **compute) -> dict[str, Pairs]:
    """One run on both sides: scalars a step, then tensors after the last."""
    mine, other = our_run(run, precision, **compute), their_run(run, precision)
    kinds: dict[str, Pairs] = {
        "step losses": {"all": (mine.losses, other.losses)},
        "step learning rates": {"all": (mine.learning_rates, other.learning_rates)},
        "step clips": {"all": (mine.clips, other.clips)},
    }
    if run.optim.clip_norm:  # without it torch takes no norm
        kinds["step clips"]["norms"] = (mine.norms, other.norms)
    for kind in ("params", "m", "v"):
        ours, theirs = getattr(mine, kind), getattr(other, kind)
        assert ours.keys() == theirs.keys(), (sorted(ours), sorted(theirs))
        kinds[f"step {kind}"] = {name: (ours[name], theirs[name]) for name in theirs}
    return kinds


def noise_ratio(run: Run, precision: Precision) -> dict[str, float]:
    """Our distance to the float64 truth over PyTorch's own, by kind."""
    truth = their_run(run, FP64)
    mine, other = our_run(run, precision), their_run(run, precision)

    def gap(side: Trajectory, kind: str) -> float:
        if kind == "losses":
            return float(np.max(np.abs(np.subtract(side.losses, truth.losses))))
        tensors = getattr(truth, kind)
        return max(
            float(np.linalg.norm(getattr(side, kind)[n] - tensors[n]))
            / float(np.linalg.norm(tensors[n]))
            for n in tensors
        )

    # Neither side's losses can be told from the truth below their last digits.
    floor = {"losses": 4 * precision.eps * float(np.max(truth.losses))}
    return {
        kind: gap(mine, kind) / max(gap(other, kind), floor.get(kind, 0.0))
        for kind in ("losses", "params", "m", "v")
    }


LONG = 200
LONG_RECIPES = ("reference, A=1", "reference, A=4", "adamw, token mean, A=4")
"""Both losses, accumulation 1 and 4, decay on and off, each at least once."""


def long(precision: Precision, seed: int) -> dict[str, Pairs]:
    """200 steps: the losses, and the last parameters and moments. The first seed takes
    every recipe, the others one each."""
    recipes = LONG_RECIPES if seed == 0 else (LONG_RECIPES[seed % len(LONG_RECIPES)],)
    found: dict[str, Pairs] = {}
    for recipe in recipes:
        for kind, pairs in paired(Run(recipe, LONG, seed), precision).items():
            for name, pair in pairs.items():
                found.setdefault(kind, {})[f"{recipe}: {name}"] = pair
    return found


def long_noise(precision: Precision, seed: int) -> Pairs:
    """Our float32 distance from the truth over PyTorch's own, after 200 steps."""
    return {
        f"{recipe}: {kind}": (ratio, 0.0)
        for recipe in LONG_RECIPES
        for kind, ratio in noise_ratio(Run(recipe, LONG, seed), precision).items()
    }
