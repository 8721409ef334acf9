"""Planted mistakes are noticed: all of them, each by ten times its gate."""

import pytest

from parity_tests.mutants_forward import FORWARD
from parity_tests.mutants_training import TRAINING
from parity_tests.mutation import ALL, MARGIN, attempt


def test_there_are_enough_mutants_and_none_twice():
    assert len(FORWARD) >= 30 and len(TRAINING) >= 20
    assert len({mutant.name for mutant in ALL}) == len(ALL)
    assert len({(m.target, m.old, m.new, m.rung) for m in ALL}) == len(ALL)


@pytest.mark.parametrize("mutant", ALL, ids=lambda mutant: mutant.name)
def test_every_mutant_is_killed_by_ten_times_the_gate(mutant):
    kill = attempt(mutant)
    print(f"{mutant.name}: {mutant.rung} {kill.margin:.3g}x ({kill.detail})")
    assert kill.killed, (
        f"survived: {mutant.rung} reads {kill.error:.3g}, only {kill.margin:.3g} times "
        f"its gate {kill.gate:.3g}, where {MARGIN:g} are wanted"
    )
