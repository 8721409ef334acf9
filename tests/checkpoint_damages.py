"""Damages a finished checkpoint in random ways and looks whether that is noticed.

As a script: checkpoint_damages.py COUNT [--reseal] [--write], prints one line of JSON
of what came; with --write also into docs/damages.json.
"""

import json
import random
import shutil
import sys
import tempfile
from collections import Counter
from pathlib import Path

from checkpoint_worker import abstract_state, assert_same_bits, make_state
from stamp import stamp

from jaxllm.train.checkpoint import Checkpoints
from jaxllm.train.seal import seal

KINDS = ("flip", "cut", "delete", "swap", "exchange", "zero", "grow")


def save_pristine(folder: Path) -> None:
    """Saves the steps 100, 200 and 300."""
    checkpoints = Checkpoints(folder)
    for step in (100, 200, 300):
        checkpoints.save(step, make_state(step), {"step": step})
    checkpoints.close()


def files_of(folder: Path) -> list[Path]:
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    assert len(files) >= 10
    return files


def damage(rng: random.Random, newest: Path, older: Path) -> str:
    """Does one thing to a random file of `newest`; returns what, in words."""
    file = rng.choice(files_of(newest))
    data = file.read_bytes()
    kind = rng.choice(KINDS)
    what = f"{kind} {file.relative_to(newest)}"
    if kind == "flip":
        at, bit = rng.randrange(len(data)), rng.randrange(8)
        changed = bytes([data[at] ^ 1 << bit])
        file.write_bytes(data[:at] + changed + data[at + 1 :])
        return f"{what}: bit {bit} of byte {at}"
    if kind == "cut":
        size = rng.choice([0, len(data) - 1, rng.randrange(len(data))])
        file.write_bytes(data[:size])
        return f"{what} to {size} bytes"
    if kind == "delete":
        file.unlink()
        return what
    if kind == "zero":
        file.write_bytes(bytes(len(data)))
        return what
    if kind == "grow":
        file.write_bytes(data + bytes([rng.randrange(256)]))
        return what
    # With another file of the step, or with one of another step.
    other = rng.choice(files_of(newest) if kind == "swap" else files_of(older))
    if other.read_bytes() == data:
        return damage(rng, newest, older)
    file.write_bytes(other.read_bytes())
    other.write_bytes(data)
    return f"{what} with {other.relative_to(newest.parent)}"


def run(count: int, *, reseal: bool = False) -> dict:
    """Does `count` damages, each to a fresh copy of step 300, and restores after each.

    With `reseal` the seal is made anew over the damage, so that only Orbax and the
    digests are left to notice it; some bytes then decide nothing (unused records, white
    space), and the step may come back if it comes back right.
    """
    report: Counter = Counter()
    with tempfile.TemporaryDirectory() as scratch:
        pristine, folder = Path(scratch, "pristine"), Path(scratch, "damaged")
        save_pristine(pristine)
        shutil.copytree(pristine, folder)
        expected = {step: make_state(step) for step in (100, 200, 300)}
        for seed in range(count):
            for step in ("200", "300"):
                shutil.rmtree(folder / step)
                shutil.copytree(pristine / step, folder / step)
            done = damage(random.Random(seed), folder / "300", folder / "200")
            if reseal:
                seal(folder / "300")
            restored = Checkpoints(folder).restore(abstract_state())
            noticed = restored.step != 300
            assert noticed or reseal, done
            if noticed:
                # A file exchanged with step 200 damages that as well.
                assert restored.step == (100 if "with 200/" in done else 200), done
                assert restored.skipped[0][0] == 300 and restored.skipped[0][1], done
            assert restored.meta == {"step": restored.step}, done
            assert_same_bits(restored.state, expected[restored.step])
            report[done.split()[0]] += 1
            report["noticed"] += noticed
            report["restored right"] += 1
    return dict(report)


if __name__ == "__main__":
    record: dict = run(int(sys.argv[1]), reseal="--reseal" in sys.argv)
    print(json.dumps(record))
    if "--write" in sys.argv:
        text = json.dumps(record | stamp(), indent=1) + "\n"
        Path(__file__).parents[1].joinpath("docs", "damages.json").write_text(text)
