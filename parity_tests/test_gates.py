"""The ratchet: gates only tighten, and none is far from what was measured."""

import json
import subprocess

from parity_tests import gates
from parity_tests.precision import PRECISIONS
from parity_tests.rungs import RUNGS


def test_every_rung_has_its_gates():
    table = gates.table()
    assert set(table) == set(RUNGS)
    assert all(set(table[name]) == set(rung.limits) for name, rung in RUNGS.items())


def test_gates_stay_within_the_specification_and_near_what_was_measured():
    table = gates.table()
    for rung in RUNGS:
        for name, limit in RUNGS[rung].limits.items():
            entry = table[rung][name]
            assert entry["limit"] == limit, (rung, name)
            assert entry["measured"] <= entry["gate"] <= limit, (rung, name)
            floor = max(entry["measured"], PRECISIONS[name].eps)
            assert entry["gate"] <= gates.WIDEST * floor, (rung, name)


def test_no_gate_is_wider_than_any_committed_before():
    """Walks the history that this clone has; a shallow one has its own commit."""
    now, folder = gates.table(), gates.FILE.parent
    for commit in _git(folder, "log", "--format=%H", "--", gates.FILE.name).split():
        before = json.loads(_git(folder, "show", f"{commit}:./{gates.FILE.name}"))
        for rung, row in before.items():
            assert rung in now, f"{rung} was dropped since {commit[:8]}"
            for name, entry in row.items():
                gate = now[rung][name]["gate"]
                assert gate <= entry["gate"], (
                    f"{rung} {name}: {gate} is wider than {entry['gate']} at "
                    f"{commit[:8]}"
                )


def test_a_gate_never_widens_and_never_passes_its_limit():
    settings = {"limit": 1e-12, "eps": 2e-16}
    assert gates.tightened(3e-15, old=None, **settings) == 3e-14
    assert gates.tightened(3e-15, old=1e-14, **settings) == 1e-14
    assert gates.tightened(1.0, old=None, **settings) == 1e-12
    assert gates.tightened(0.0, old=None, **settings) == 2e-15


def _git(folder, *arguments: str) -> str:
    """Git's answer, or nothing where there is no history (an unpacked archive)."""
    done = subprocess.run(
        ["git", *arguments], cwd=folder, capture_output=True, text=True, check=False
    )
    return done.stdout if done.returncode == 0 else ""
