"""The reference trainer: what a PyTorch user would write, on the same data and config.

    python torch_ref/ddp_pretrain.py --data DIR --preset reference
    torchrun --nproc_per_node 8 torch_ref/ddp_pretrain.py --data DIR --preset k-215m

It reads the shards of scripts/prepare_data.py in the order in which jaxllm reads them,
and from equal weights its losses are jaxllm's. The functions above `train` are what
the tests and the benchmark drive. B rows of T tokens; A micro-batches in an update.
"""

import argparse
import contextlib
import dataclasses
import math
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers.utils.logging import disable_progress_bar

from jaxllm.config import ModelConfig, OptimConfig, RunConfig
from torch_ref import k_model
from torch_ref.arguments import configure, make_parser
from torch_ref.run_folder import Log, checkpoints, load_weights, restore, save

Batch = dict[str, np.ndarray]


def learning_rate(
    optim: OptimConfig, step: int, total_steps: int, accumulate: int = 1
) -> float:
    """The learning rate of update `step` (0-based): linear warm-up, then a cosine.

    With schedule_unit="micro_step" the schedule counts micro-batches, as the lineage
    does, and an update has the learning rate of its last one.
    """
    unit = accumulate if optim.schedule_unit == "micro_step" else 1
    at = (step + 1) * unit - 1
    warmup, total = optim.warmup_steps * unit, total_steps * unit
    if at < warmup:
        return optim.learning_rate * (at + 1) / warmup
    progress = min(max((at - warmup) / max(total - warmup, 1), 0.0), 1.0)
    span = optim.learning_rate - optim.min_learning_rate
    return optim.min_learning_rate + 0.5 * span * (1 + math.cos(math.pi * progress))


def make_model(
    config: ModelConfig,
    *,
    dtype: str = "float32",
    device: str | torch.device = "cpu",
    sdpa: str = "default",
    seed: int = 0,
) -> k_model.Transformer:
    """Builds the Transformer with fresh weights, float64 for "float64", else float32.

    `sdpa` is the attention: "default" is what PyTorch picks; "flash" its FlashAttention
    and nothing else, which is set for the whole process; "plain" the masked form.
    """
    if sdpa == "flash":
        torch.backends.cuda.enable_flash_sdp(True)
        torch.backends.cuda.enable_cudnn_sdp(False)
        torch.backends.cuda.enable_mem_efficient_sdp(False)
        torch.backends.cuda.enable_math_sdp(False)
    torch.manual_seed(seed)
    values = dataclasses.asdict(config)
    model = k_model.Transformer(
        k_model.ModelConfig(**values, flash_attn=sdpa != "plain")
    )
    if dtype == "float64":
        model.double()
    return model.to(device=torch.device(device))  # type: ignore[call-arg]


class SummedLoss(nn.Module):
    """The loss in nats, summed over unmasked tokens: all that a compiler should see.

    With the loss inside the compiled region the logits are no output of it, and
    need not be written in float32.
    """

    def __init__(self, model: k_model.Transformer):
        super().__init__()
        self.model = model
        # The rotary tables are made here, outside the compiled region: made inside,
        # they would be a side effect, and the second call would compile again.
        model._tables(model.get_input_embeddings().weight)  # type: ignore[arg-type]

    def forward(self, inputs_BT, targets_BT, loss_mask_BT) -> torch.Tensor:
        """Maps integer inputs and targets and a bool mask, all (B, T), to a scalar."""
        losses_BT = self.model(inputs_BT, targets_BT).loss
        return (losses_BT * loss_mask_BT).sum()


def make_optimizer(
    model: nn.Module, optim: OptimConfig, *, fused: bool = True
) -> torch.optim.Optimizer:
    """Adam without decay, or AdamW with decay on matrices and not on norm weights."""
    params = list(model.parameters())
    decay = optim.weight_decay if optim.algorithm == "adamw" else 0.0
    groups = [
        {"params": [p for p in params if p.ndim >= 2], "weight_decay": decay},
        {"params": [p for p in params if p.ndim < 2], "weight_decay": 0.0},
    ]
    kind = torch.optim.AdamW if optim.algorithm == "adamw" else torch.optim.Adam
    betas = (optim.beta1, optim.beta2)
    return kind(groups, lr=optim.learning_rate, betas=betas, eps=optim.eps, fused=fused)


def train_step(
    loss_module: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    *,
    config: RunConfig,
    step: int,
    total_steps: int,
    dtype: str = "float32",
) -> dict[str, Any]:
    """One update with those rows of `batch` that are this rank's; returns its metrics.

    `loss_module` is a SummedLoss, compiled or not, in DDP or not. `batch` holds the
    rows of all ranks, (B, T), so that each knows the token counts of all without
    asking. `dtype` "bfloat16" means autocast. loss, grad_norm and clip stay on the
    device as tensors: nothing here waits for it.
    """
    optim, accumulate = config.optim, config.train.accumulate
    rank, world = _rank_and_world()
    lr = learning_rate(optim, step, total_steps, accumulate)
    for group in optimizer.param_groups:
        group["lr"] = lr
    if config.model.dropout:
        # From the step alone, so that a resumed run drops what it would have dropped.
        torch.manual_seed((config.train.seed * 1_000_003 + step) * world + rank)

    loss, counts = _accumulate_grads(
        loss_module, batch, optim.loss_norm, accumulate, dtype
    )
    params = [p for p in loss_module.parameters() if p.grad is not None]
    if optim.clip_norm:
        norm = nn.utils.clip_grad_norm_(params, optim.clip_norm)
        clip = (optim.clip_norm / (norm + 1e-6)).clamp(max=1.0)
    else:
        norm = nn.utils.get_total_norm([p.grad for p in params if p.grad is not None])
        clip = torch.ones_like(norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    if world > 1:
        dist.all_reduce(loss)
    return {
        "step": step,
        "loss": loss,
        "lr": lr,
        "grad_norm": norm,
        "clip": clip,
        "tokens": sum(counts),
    }


def _accumulate_grads(loss_module, batch: Batch, loss_norm, accumulate, dtype):
    """Adds the gradients of all micro-batches; returns this rank's part of the loss,
    and the token count of each micro-batch over all ranks."""
    device = next(loss_module.parameters()).device
    rank, world = _rank_and_world()
    micros = [
        {name: np.split(rows, accumulate)[i] for name, rows in batch.items()}
        for i in range(accumulate)
    ]
    counts = [int(micro["loss_mask"].sum()) for micro in micros]
    loss = torch.zeros((), device=device)
    for i, micro in enumerate(micros):
        if loss_norm == "token":
            per = max(sum(counts), 1)
        else:
            per = accumulate * max(counts[i], 1)
        sync = contextlib.nullcontext()
        if isinstance(loss_module, DistributedDataParallel) and i < accumulate - 1:
            sync = loss_module.no_sync()
        with sync:
            with torch.autocast(device.type, torch.bfloat16, dtype == "bfloat16"):
                part = loss_module(*_to_device(micro, device, rank, world)) / per
            # DDP takes the mean over the ranks, where the sum is what we want.
            (part * world).backward()
        loss = loss + part.detach()
    return loss, counts


def _to_device(micro: Batch, device, rank: int, world: int) -> list[torch.Tensor]:
    """This rank's rows of a micro-batch: inputs, targets and loss_mask."""
    tensors = []
    for name in ("inputs", "targets", "loss_mask"):
        tensor = torch.from_numpy(np.split(micro[name], world)[rank])
        if device.type == "cuda":
            tensor = tensor.pin_memory()
        tensor = tensor.to(device, non_blocking=True)
        # Cross entropy wants int64, which is made on the device: half to transfer.
        tensors.append(tensor.long() if name == "targets" else tensor)
    return tensors


def train(config: RunConfig, args: argparse.Namespace) -> None:
    """Runs the updates of `config`; the rest of the command line is in `args`.

    Raises: ValueError for what does not fit together, FloatingPointError if the loss
    is not finite.
    """
    from jaxllm.data.batches import Batches

    device, (rank, world) = _device(args.device), _rank_and_world()
    _check(config, world)
    batches = Batches(
        args.data, layout=config.data.layout, seq_len=config.seq_len,
        batch_size=config.train.batch_size, seed=config.data.seed,
        vocab_size=config.model.vocab_size,
    )  # fmt: skip
    rows = config.train.epochs * batches.n_rows
    total = config.train.steps or math.ceil(rows / config.train.batch_size)
    model = make_model(
        config.model, dtype=args.dtype, device=device, sdpa=args.sdpa,
        seed=config.train.seed,
    )  # fmt: skip
    optimizer = make_optimizer(model, config.optim)
    out, start = Path(args.out), 0
    found = checkpoints(out)
    if args.resume:
        if not found:
            raise ValueError(f"--out {out} has no checkpoint: start without --resume")
        start = restore(found[-1], model, optimizer, config)
    elif found:
        raise ValueError(f"--out {out} holds a run: give --resume, or another --out")
    elif args.init_from:
        load_weights(model, args.init_from)

    loss_module: nn.Module = SummedLoss(model)
    if args.compile:
        loss_module.compile()
    if world > 1:
        ids = [device.index] if device.type == "cuda" else None
        loss_module = DistributedDataParallel(
            loss_module, device_ids=ids, gradient_as_bucket_view=True
        )
    log = None
    if rank == 0:
        log = Log(
            out, start=start, total_steps=total, as_json=args.json,
            steps_per_epoch=batches.steps_per_epoch,
        )  # fmt: skip
        print(f"{model.num_parameters()} parameters, {args.dtype}, {world} x {device}")
    for step, batch in _prefetched(batches, start, total):
        metrics = train_step(
            loss_module, optimizer, batch, config=config, step=step,
            total_steps=total, dtype=args.dtype,
        )  # fmt: skip
        done = step + 1
        if log:
            log.add(metrics)
            if step % config.train.log_every == 0 or done == total:
                log.show()
        if done % config.train.save_every == 0 or done == total:
            if log:
                log.flush()
                save(out, model, optimizer, config, done)
            if world > 1:
                dist.barrier()


def _check(config: RunConfig, world: int) -> None:
    micro = config.train.batch_size // config.train.accumulate
    if micro % world:
        raise ValueError(
            f"--batch_size {config.train.batch_size} in {config.train.accumulate} "
            f"part(s) gives {micro} rows, which do not divide by {world} processes: "
            f"use a multiple of {world * config.train.accumulate}"
        )
    if config.data.isolate_documents:
        raise ValueError(
            "data.isolate_documents=True is nothing the reference trainer does: use a "
            "preset without it"
        )


def _prefetched(batches, start: int, total: int) -> Iterator[tuple[int, Batch]]:
    """Reads each batch on a thread while the one before it is trained on."""
    with ThreadPoolExecutor(1) as reader:
        coming = reader.submit(batches.__getitem__, start) if start < total else None
        for step in range(start, total):
            assert coming is not None
            batch = coming.result()
            coming = reader.submit(batches.__getitem__, step + 1)
            yield step, batch


def _rank_and_world() -> tuple[int, int]:
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cpu":
        return torch.device("cpu")
    if not name.startswith("cuda"):
        raise ValueError(f"--device {name} must be cpu, cuda, cuda:N or auto")
    if not torch.cuda.is_available():
        raise ValueError(f"--device {name}: PyTorch sees no GPU; use --device cpu")
    device = torch.device(
        f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if name == "cuda" else name
    )
    torch.cuda.set_device(device)
    return device


def main(argv: list[str] | None = None) -> int:
    """Parses the command line and trains; returns the exit code."""
    args = make_parser().parse_args(argv)
    disable_progress_bar()  # one for each checkpoint, of which none takes long
    try:
        config = configure(args)
        if args.threads:
            torch.set_num_threads(args.threads)
        if "RANK" in os.environ:  # started by torchrun
            gpu = _device(args.device).type == "cuda"
            dist.init_process_group("nccl" if gpu else "gloo")
        train(config, args)
    except (ValueError, FloatingPointError, OSError) as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"ddp_pretrain.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    finally:
        if dist.is_available() and dist.is_initialized():
            dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
