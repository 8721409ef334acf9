"""The training step as PyTorch writes it: torch.optim, clip_grad_norm_, autograd.

Every formula stands here a second time, independently of jaxllm.train: the schedule in
Python floats, the update in torch.optim, the clip in torch.nn.utils.
"""

import math
from dataclasses import dataclass, field

import numpy as np
import torch

from jaxllm.config import OptimConfig
from parity_tests.sides import as_torch, named_parameters
from torch_ref import k_model


@dataclass
class Trajectory:
    """What a run leaves behind: a value a step, and the last state by tensor name."""

    losses: list[float] = field(default_factory=list)
    learning_rates: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    clips: list[float] = field(default_factory=list)
    params: dict[str, np.ndarray] = field(default_factory=dict)
    m: dict[str, np.ndarray] = field(default_factory=dict)
    v: dict[str, np.ndarray] = field(default_factory=dict)


def learning_rate(
    optim: OptimConfig, update: int, *, total_steps: int, accumulate: int = 1
) -> float:
    """The schedule in Python floats: a linear rise, then half a cosine."""
    if optim.schedule_unit == "micro_step":
        at, unit = (update + 1) * accumulate - 1, accumulate
    else:
        at, unit = update, 1
    warmup, total = optim.warmup_steps * unit, total_steps * unit
    high, low = optim.learning_rate, optim.min_learning_rate
    if at < warmup:
        return high * (at + 1) / warmup
    if at >= total:
        return low
    turn = math.pi * (at - warmup) / (total - warmup)
    return low + (high - low) * (1 + math.cos(turn)) / 2


def backward(
    model: k_model.Transformer, batch: dict, loss_norm: str
) -> tuple[float, dict[str, torch.Tensor]]:
    """Accumulates the gradients of one update; returns its loss and them."""
    model.zero_grad(set_to_none=True)
    n_micro = len(batch["inputs"])
    count = as_torch(batch["loss_mask"]).sum()
    total = 0.0
    for i in range(n_micro):
        mask = as_torch(batch["loss_mask"][i])
        inputs, targets = as_torch(batch["inputs"][i]), as_torch(batch["targets"][i])
        if loss_norm == "micro_batch":
            # As ddp_pretrain.py has it; an empty micro-batch counts as zero.
            summed = (model(inputs, targets).loss * mask).sum()
            loss = summed / mask.sum().clamp(min=1) / n_micro
        else:
            loss = (model(inputs, targets).loss * mask).sum() / count
        loss.backward()
        total += loss.item()
    grads = {}
    for name, parameter in named_parameters(model).items():
        assert parameter.grad is not None, name
        grads[name] = parameter.grad
    return total, grads


def optimizer(
    model: k_model.Transformer, optim: OptimConfig
) -> torch.optim.Adam | torch.optim.AdamW:
    """torch's own Adam, or AdamW with decay on tensors of two or more dimensions."""
    settings: dict = {"betas": (optim.beta1, optim.beta2), "eps": optim.eps}
    parameters = list(named_parameters(model).values())
    if optim.algorithm == "adam":
        return torch.optim.Adam(parameters, lr=0.0, **settings)
    matrices = [p for p in parameters if p.dim() >= 2]
    vectors = [p for p in parameters if p.dim() < 2]
    groups = [
        {"params": matrices, "weight_decay": optim.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=0.0, **settings)


def train(
    model: k_model.Transformer,
    batches: list[dict],
    optim: OptimConfig,
    *,
    total_steps: int,
    autocast: torch.dtype | None = None,
) -> Trajectory:
    """Runs one update a batch and records everything that our side must equal."""
    model.train()
    adam, run = optimizer(model, optim), Trajectory()
    for update, batch in enumerate(batches):
        lr = learning_rate(
            optim, update, total_steps=total_steps, accumulate=len(batch["inputs"])
        )
        for group in adam.param_groups:
            group["lr"] = lr
        with torch.autocast("cpu", autocast, enabled=autocast is not None):
            loss, _ = backward(model, batch, optim.loss_norm)
        norm, clip = math.nan, 1.0
        if optim.clip_norm:
            limit = optim.clip_norm
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), limit).item()
            clip = min(1.0, limit / (norm + 1e-6))
        adam.step()
        run.losses.append(loss)
        run.learning_rates.append(lr)
        run.norms.append(norm)
        run.clips.append(clip)
    for name, parameter in named_parameters(model).items():
        run.params[name] = parameter.detach().numpy().copy()
        run.m[name] = adam.state[parameter]["exp_avg"].numpy().copy()
        run.v[name] = adam.state[parameter]["exp_avg_sq"].numpy().copy()
    return run
