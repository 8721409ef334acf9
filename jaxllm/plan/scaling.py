"""Step time and efficiency on many GPUs, from what the compiled step exchanges.

The step is compiled at two depths for 1, 8 and 16 GPUs; layers being alike, what it
exchanges, computes and holds is linear in their number. How long the exchange takes on
more GPUs follows from the links.
"""

import math
from dataclasses import dataclass
from typing import Any

from jaxllm.config import ModelConfig
from jaxllm.plan.targets import RESERVED_BYTES, TARGETS

DEPTHS = (2, 4)
"""Layers at which a step is compiled."""
GPUS_A_NODE = 8

# Name, network, rows a GPU: about 32,000 tokens each, 16,000 where the layers are wide.
SIZES: dict[str, tuple[ModelConfig, int]] = {
    "215M": (ModelConfig(), 64),
    "1.0B": (
        ModelConfig(
            dim=2048, n_layers=22, n_heads=32, n_kv_heads=4, hidden_dim=5632,
            vocab_size=32000, max_seq_len=2048,
        ),
        16,
    ),
    "6.6B": (
        ModelConfig(
            dim=4096, n_layers=32, n_heads=32, n_kv_heads=32, hidden_dim=11008,
            vocab_size=32000, max_seq_len=4096,
        ),
        4,
    ),
}  # fmt: skip
MESHES: dict[str, tuple[int, int, int]] = {
    "one": (1, 1, 1),
    "dp8": (8, 1, 1),
    "fsdp8": (1, 8, 1),
    "dp16": (16, 1, 1),
    "fsdp16": (1, 16, 1),
    "hsdp16": (2, 8, 1),
}
"""Meshes a step is compiled for: data x fsdp x tensor."""
NEEDED = ("one", "dp8", "fsdp8", "hsdp16")
"""Those that predictions are made from; the others show that they may be."""
CHECKS = {"215M": ("fsdp8",)}
"""Compiled on all MESHES, and with all layers on these."""
SCHEMES = ("DP", "sharded optimizer", "FSDP", "HSDP")
GPU = TARGETS["h100"]
FORWARD = 1 / 3
"""Share of a step's computing that gathers run beside; reductions beside the rest."""


@dataclass(frozen=True)
class Links:
    """How fast GPUs talk, each in one direction, in bytes a second."""

    nvlink: float = GPU.link
    """Between the GPUs of a node."""
    network: float = 50e9
    """Of a GPU to other nodes: 400 Gb/s."""
    share: float = 0.8
    """What a collective reaches of a link's figure."""
    latency_s: float = 20e-6
    """Of a collective of no bytes, for each doubling of its group."""


@dataclass(frozen=True)
class Exchange:
    """The collectives of a step of one kind and group, or some of them."""

    kind: str
    group: int
    runs: float
    bytes: float
    """Whole: what every GPU has after a gather, or before a reduction."""
    bare_runs: float = 0.0
    bare_bytes: float = 0.0
    """The part that has no product between its start and its end."""


@dataclass(frozen=True)
class Prediction:
    """A step on many GPUs. Efficiency is against one GPU that had the memory."""

    step_s: float
    exchange_s: float
    """Seconds of exchange, hidden or not."""
    exposed_s: float
    """Seconds of exchange with nothing left to hide behind."""
    memory_bytes: float

    @property
    def efficiency(self) -> float:
        return (self.step_s - self.exposed_s) / self.step_s

    @property
    def fits(self) -> bool:
        return self.memory_bytes <= GPU.memory_bytes - RESERVED_BYTES


def at_depth(low: float, high: float, layers: int) -> float:
    """A quantity at `layers` layers, given its values at the two DEPTHS."""
    return low + (high - low) / (DEPTHS[1] - DEPTHS[0]) * (layers - DEPTHS[0])


def quantity(record: dict[str, Any], size: str, mesh: str, name: str) -> float:
    """A recorded quantity of the whole network's step on `mesh`, by its name."""
    low, high = (record["sizes"][size][mesh][str(depth)][name] for depth in DEPTHS)
    return at_depth(low, high, SIZES[size][0].n_layers)


def exchanges(record: dict[str, Any], size: str, mesh: str) -> list[Exchange]:
    """What the whole network's step exchanges on `mesh`.

    XLA puts small collectives together, up to a size: the part with nothing beside it
    grows with depth until then. Scaled as if it always did, it errs on the dear side.
    """
    low, high = (
        {(one["kind"], one["group"]): one for one in plan["collectives"]}
        for plan in (record["sizes"][size][mesh][str(depth)] for depth in DEPTHS)
    )
    layers = SIZES[size][0].n_layers
    found = []
    for key in sorted(low.keys() | high.keys()):
        few, more = low.get(key, {}), high.get(key, {})
        runs, bare_runs, whole, bare = (
            max(
                more.get(part, 0), at_depth(few.get(part, 0), more.get(part, 0), layers)
            )
            for part in ("runs", "bare_runs", "bytes", "bare_bytes")
        )
        found.append(
            Exchange(*key, runs, whole, min(bare_runs, runs), min(bare, whole))
        )
    return found


def sharded_optimizer(record: dict[str, Any], size: str) -> list[Exchange]:
    """DP's exchange with its reductions scattered, and the weights gathered after, in
    the dtype of the products, a layer at a time: by calculation, nothing compiled."""
    model = SIZES[size][0]
    weights, layers = 2.0 * model.n_params, model.n_layers
    found = [
        Exchange("reduce-scatter", x.group, x.runs, x.bytes, x.bare_runs, x.bare_bytes)
        for x in exchanges(record, size, "dp8")
        if x.kind == "all-reduce"
    ]
    return [
        *found,
        Exchange("all-gather", 8, layers, weights, 1, weights / layers),
    ]


def exchange_s(
    kind: str, size: float, runs: float, group: int, near: int, links: Links
) -> float:
    """Seconds of `runs` collectives of `size` bytes in all over `group` GPUs, `near` of
    them in each node.

    In stages: within the node, then between nodes, where each GPU of a node carries its
    share of the bytes over its own network link; nothing of one is hidden by the other.
    """
    near = min(near, group)
    nodes = group / near
    passes = 2 if kind == "all-reduce" else 1
    inside = size * (near - 1) / near / (links.nvlink * links.share)
    between = size / near * (nodes - 1) / nodes / (links.network * links.share)
    return passes * (inside + between) + runs * links.latency_s * math.log2(group)


def spread(scheme: str, compiled_group: int, gpus: int) -> tuple[int, int]:
    """What a compiled group is on `gpus` GPUs: its size, and how many a node has."""
    near = min(gpus, GPUS_A_NODE)
    if scheme == "HSDP" and gpus > GPUS_A_NODE:
        # Compiled as 2 x 8: groups of 8 stay in a node, pairs are one GPU of each node.
        if compiled_group == GPUS_A_NODE:
            return near, near
        if compiled_group == 2:
            return gpus // near, 1
    return gpus, near


def one_gpu_s(record: dict[str, Any], size: str) -> float:
    """Seconds of the step on one GPU, by the roofline."""
    parts = ("matmul_s", "attention_s", "rest_s")
    return sum(quantity(record, size, "one", part) for part in parts)


def memory_bytes(record: dict[str, Any], size: str, scheme: str, gpus: int) -> float:
    """Bytes a GPU needs: weights and moments as sharded, and the step's temporaries."""
    mesh = compiled_mesh(scheme, gpus)
    state = quantity(record, size, mesh, "argument_bytes")
    if scheme == "sharded optimizer":
        state -= 8 * SIZES[size][0].n_params * (1 - 1 / gpus)  # two moments in float32
    elif mesh == "fsdp8":
        state *= GPUS_A_NODE / gpus
    return state + quantity(record, size, mesh, "temporary_bytes")


def compiled_mesh(scheme: str, gpus: int) -> str:
    """Which of MESHES a scheme is predicted from."""
    if scheme in ("DP", "sharded optimizer"):
        return "dp8"
    return "hsdp16" if scheme == "HSDP" and gpus > GPUS_A_NODE else "fsdp8"


def predict(
    record: dict[str, Any],
    size: str,
    scheme: str,
    gpus: int,
    *,
    links: Links,
    step_s: float | None = None,
) -> Prediction:
    """Predicts a step of `size` on `gpus` GPUs: 1 to 8, or nodes of 8.

    `step_s`, measured on one GPU, replaces the roofline's seconds.
    """
    computing = step_s or one_gpu_s(record, size)
    if scheme == "sharded optimizer":
        found = sharded_optimizer(record, size)
    else:
        found = exchanges(record, size, compiled_mesh(scheme, gpus))
    bare = gathers = reductions = 0.0
    for one in found:
        group, near = spread(scheme, one.group, gpus)
        every, alone = (
            exchange_s(one.kind, sent, runs, group, near, links)
            for sent, runs in (
                (one.bytes, one.runs),
                (one.bare_bytes, one.bare_runs),
            )
        )
        bare += alone
        if one.kind == "all-gather":
            gathers += every - alone
        else:
            reductions += every - alone
    late = max(0.0, gathers - FORWARD * computing)
    late += max(0.0, reductions - (1 - FORWARD) * computing)
    return Prediction(
        step_s=computing + bare + late,
        exchange_s=bare + gathers + reductions,
        exposed_s=bare + late,
        memory_bytes=memory_bytes(record, size, scheme, gpus),
    )
