"""Reads a compiled program: its kernels, the bytes each moves, copies, collectives.

Bytes are what a kernel must read and write in device memory: of an operand that it only
slices or gathers from, the part it takes; of one that it updates in place, the part it
writes; of a product, not the scratch space that cuBLAS is lent. Caches are not
modelled. A loop's body counts as often as it runs.
"""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

WIDTHS = {
    "f64": 8, "s64": 8, "u64": 8, "c64": 8, "f32": 4, "s32": 4, "u32": 4, "bf16": 2,
    "f16": 2, "s16": 2, "u16": 2, "s8": 1, "u8": 1, "pred": 1, "f8e4m3fn": 1,
    "f8e5m2": 1, "token": 0,
}  # fmt: skip
NO_KERNEL = {
    "parameter", "tuple", "get-tuple-element", "bitcast", "constant", "after-all",
    "partition-id", "replica-id", "opt-barrier", "while", "conditional", "call",
    "async-done", "all-reduce-done", "all-gather-done", "collective-permute-done",
    "reduce-scatter-done", "all-to-all-done", "copy-done",
}  # fmt: skip
COLLECTIVES = (
    "all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute",
)  # fmt: skip
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_INSTRUCTION = re.compile(r"^\s*(ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)$")
# mesh['a'=2,'b'=8] {'b'}, or with the devices' order before the axes that take part.
_MESH = re.compile(r"mesh\[([^\]]*)\](?:, device_ids=\S*)?\s*\{([^}]*)\}")
_SLICES = {"slice", "dynamic-slice", "gather"}


@dataclass(frozen=True)
class Instruction:
    """One line of HLO."""

    name: str
    type: str
    op: str
    operands: tuple[str, ...]
    rest: str
    root: bool

    def attribute(self, pattern: str) -> str:
        """The first group of `pattern` in the instruction's attributes, or ""."""
        found = re.search(pattern, self.rest)
        return found[1] if found else ""


@dataclass(frozen=True)
class Kernel:
    """One launch: what kind it is, where it comes from, and the bytes it moves."""

    name: str
    kind: str
    """matmul, attention, elementwise, copy or collective."""
    source: str
    """JAX's name stack, such as jit(train_step)/optimizer/mul."""
    read: int
    written: int
    whole: int
    """Bytes of all operands and results in full, whatever part of them is touched."""
    runs: int
    """How often it runs in a step."""
    overlaps: bool = False
    """Whether a collective is started and waited for in two places."""

    @property
    def moved(self) -> int:
        return self.read + self.written


@dataclass(frozen=True)
class Collective:
    """One exchange between devices, as the compiled program schedules it."""

    kind: str
    """One of COLLECTIVES."""
    dtypes: tuple[str, ...]
    bytes: int
    """Of what is exchanged, whole: what every device has after an all-gather, and
    before a reduce-scatter or an all-reduce."""
    group: int
    """Devices that take part in it together."""
    runs: int
    asynchronous: bool
    """Whether it is started in one place and awaited in another."""
    behind: int
    """Matrix products and attention kernels that run between the two."""

    @property
    def sent(self) -> float:
        """Bytes that each device sends, on a ring, each time it runs."""
        share = (self.group - 1) / self.group
        return self.bytes * share * (2 if self.kind == "all-reduce" else 1)


class Program:
    """The computations of an HLO module, by name."""

    def __init__(self, text: str):
        self.computations: dict[str, dict[str, Instruction]] = {}
        self.entry = ""
        current: dict[str, Instruction] = {}
        for line in text.splitlines():
            if opened := _COMPUTATION.match(line):
                current = self.computations.setdefault(opened[2], {})
                self.entry = opened[2] if opened[1] else self.entry
            elif found := _INSTRUCTION.match(line):
                root, name, type_, op, rest = found.groups()
                inside = re.split(r"\)(?:,|$)", rest)[0]
                operands = tuple(re.findall(r"%([\w.\-]+)", inside))
                current[name] = Instruction(
                    name, type_, op, operands, rest, root is not None
                )

    def kernels(self) -> list[Kernel]:
        """Every launch of a step."""
        return list(self._walk(self.entry, 1))

    def collectives(self) -> list[Collective]:
        """Every exchange of a step, in the order of the schedule."""
        return list(self._exchanges(self.entry, 1))

    def _exchanges(self, computation: str, runs: int) -> Iterator[Collective]:
        body = self.computations[computation]
        order = list(body.values())
        for place, instruction in enumerate(order):
            yield from self._exchanges_below(instruction, runs)
            kind = self._exchange(instruction)
            if not kind or instruction.op.endswith("-done"):
                continue
            done = next(
                (
                    later
                    for later in range(place + 1, len(order))
                    if instruction.name in order[later].operands
                    and order[later].op.endswith("-done")
                ),
                place,
            )
            between = order[place + 1 : done]
            operands = [body[name] for name in instruction.operands if name in body]
            group = group_size(instruction.rest)
            if instruction.op == "async-start":
                called = instruction.attribute(r"calls=%?([\w.\-]+)")
                inside = self.computations[called].values()
                group = max(group_size(x.rest) for x in inside)
            whole = sum(size(operand.type) for operand in operands)
            yield Collective(
                kind=kind,
                dtypes=tuple(sorted({x.type.split("[")[0] for x in operands})),
                bytes=whole * (group if kind == "all-gather" else 1),
                group=group,
                runs=runs,
                asynchronous=instruction.op.endswith("-start"),
                behind=sum(self._is_product(x) for x in between),
            )

    def _exchanges_below(self, instruction, runs: int) -> Iterator[Collective]:
        if instruction.op == "while":
            trips = int(instruction.attribute(r'"known_trip_count":\{"n":"(\d+)"') or 1)
            yield from self._exchanges(
                instruction.attribute(r"body=%?([\w.\-]+)"), runs * trips
            )
        elif instruction.op in ("call", "conditional"):
            for name in re.findall(
                r"(?:to_apply|true_computation|false_computation)=%?([\w.\-]+)",
                instruction.rest,
            ):
                yield from self._exchanges(name, runs)

    def _exchange(self, instruction: Instruction) -> str:
        """Which of COLLECTIVES an instruction is, or ""."""
        op = instruction.op
        if op == "async-start":
            called = instruction.attribute(r"calls=%?([\w.\-]+)")
            ops = [x.op for x in self.computations.get(called, {}).values()]
        else:
            ops = [op]
        return next((c for c in COLLECTIVES for op in ops if op.startswith(c)), "")

    def _is_product(self, instruction: Instruction) -> bool:
        called = instruction.attribute(r"calls=%?([\w.\-]+)")
        return self._kind(instruction, called) in ("matmul", "attention")

    def _walk(self, computation: str, runs: int) -> Iterator[Kernel]:
        body = self.computations[computation]
        for instruction in body.values():
            if instruction.op == "while":
                trips = int(
                    instruction.attribute(r'"known_trip_count":\{"n":"(\d+)"') or 1
                )
                yield from self._walk(
                    instruction.attribute(r"body=%?([\w.\-]+)"), runs * trips
                )
            elif instruction.op in ("call", "conditional"):
                called = re.findall(
                    r"(?:to_apply|true_computation|false_computation)=%?([\w.\-]+)",
                    instruction.rest,
                )
                for name in called:
                    yield from self._walk(name, runs)
            elif instruction.op not in NO_KERNEL:
                yield self._kernel(body, instruction, runs)

    def _kernel(self, body, instruction: Instruction, runs: int) -> Kernel:
        op = instruction.op
        operands = [body[name] for name in instruction.operands if name in body]
        sizes = [size(operand.type) for operand in operands]
        whole = size(instruction.type) + sum(sizes)
        read, written = sum(sizes), size(instruction.type)
        called = instruction.attribute(r"calls=%?([\w.\-]+)")
        if op == "fusion" and called in self.computations:
            read, written = self._touched(called, sizes, written)
        elif op in _SLICES:
            read = written
        elif op == "dynamic-update-slice":
            read = written = sizes[1]
        kind = self._kind(instruction, called)
        if kind == "matmul":
            # Scratch space: a library's bytes, or our own kernels' float32.
            scratch = re.findall(r"(?:s8|f32)\[\d+\]", instruction.type)
            written -= sum(map(size, scratch)) if "(" in instruction.type else 0
        return Kernel(
            name=instruction.name,
            kind=kind,
            source=instruction.attribute(r'op_name="([^"]*)"'),
            read=read,
            written=written,
            whole=whole,
            runs=runs,
            overlaps=kind == "collective" and op.endswith("-start"),
        )

    def _kind(self, instruction: Instruction, called: str) -> str:
        op = instruction.op
        inside = self.computations.get(called, {})
        # A library's call may stand in a fusion that only slices its operands for it.
        targets = " ".join(
            x.attribute(r'custom_call_target="([^"]+)"')
            for x in (instruction, *inside.values())
        )
        if "fmha" in targets or "jaxllm_attention" in targets:
            return "attention"
        if "gemm" in targets or "matmul" in targets or "gemm" in instruction.name:
            return "matmul"
        if op == "dot" or any(x.op == "dot" for x in inside.values()):
            return "matmul"
        # An asynchronous collective wraps its computation in "async-start".
        if op.startswith(COLLECTIVES) or any(
            x.op.startswith(COLLECTIVES) for x in inside.values()
        ):
            return "collective"
        return "copy" if op in ("copy", "copy-start") else "elementwise"

    def _touched(self, called: str, sizes: list[int], written: int) -> tuple[int, int]:
        """Bytes that a fusion reads and writes, given those of its operands."""
        inside = self.computations[called]
        users: dict[str, list[Instruction]] = {name: [] for name in inside}
        for instruction in inside.values():
            for operand in set(instruction.operands) & set(users):
                users[operand].append(instruction)
        read = 0
        for instruction in inside.values():
            if instruction.op == "parameter":
                index = int(re.match(r"(\d+)", instruction.rest)[1])  # type: ignore[index]
                read += round(sizes[index] * _share(instruction, users))
            elif instruction.op == "dynamic-update-slice":
                # Updated in place: only the update is written.
                whole, update = size(instruction.type), instruction.operands[1]
                if whole <= written:
                    written -= whole - size(inside[update].type)
        return read, written


def _share(value: Instruction, users: dict[str, list[Instruction]]) -> float:
    """The share of a fusion's value that its users need."""
    if value.root:
        return 1.0
    share = 0.0
    for user in users[value.name]:
        if user.op in _SLICES and user.operands[0] == value.name:
            share += elements(user.type) / elements(value.type) * _share(user, users)
        elif user.op == "dynamic-update-slice" and user.operands[0] == value.name:
            continue
        elif elements(user.type) == elements(value.type):  # elementwise, or a bitcast
            share += _share(user, users)
        else:
            return 1.0
    return min(share, 1.0)


def group_size(attributes: str) -> int:
    """Devices of one group of a collective's replica_groups, in any of XLA's forms."""
    text = attributes.partition("replica_groups=")[2]
    if found := re.match(r"\{\{([\d,]+)\}", text):
        return found[1].count(",") + 1
    if found := re.match(r"\[\d+,(\d+)\]<=", text):
        return int(found[1])
    if found := re.match(_MESH, text):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", found[1]))
        return prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", found[2]))
    return 2 if "source_target_pairs=" in attributes else 1


def elements(hlo_type: str) -> int:
    """Number of elements of an HLO array type."""
    found = re.match(r"\w+\[([\d,]*)\]", hlo_type)
    return prod(int(n) for n in found[1].split(",") if n) if found else 0


def size(hlo_type: str) -> int:
    """Bytes of an HLO type such as bf16[128,512]{1,0}, or of a tuple of them."""
    return sum(
        WIDTHS.get(dtype, 0) * prod(int(n) for n in dims.split(",") if n)
        for dtype, dims in re.findall(r"(\w+)\[([\d,]*)\]", hlo_type)
    )


def moved_by(kernels: list[Kernel], *, key) -> Counter:
    """Bytes a step moves, summed by `key` of a kernel."""
    total: Counter = Counter()
    for kernel in kernels:
        total[key(kernel)] += kernel.moved * kernel.runs
    return total
