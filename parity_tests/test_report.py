"""The report leaves nothing out, and says what fails."""

from collections import Counter

import pytest

from parity_tests import report
from parity_tests.markdown import page
from parity_tests.mutation import ALL
from parity_tests.report import Task
from parity_tests.rungs import RUNGS


def test_the_full_report_measures_every_rung_in_every_precision_and_every_mutant():
    tasks = [task for chain in report.chains(False, True) for task in chain]
    rungs = [task.inputs for task in tasks if task.part == "ladder"]
    expected = [(name, p, False) for name, rung in RUNGS.items() for p in rung.limits]
    assert Counter(rungs) == Counter(expected)
    mutants = [task.inputs for task in tasks if task.part == "mutants"]
    assert mutants == [(i,) for i in range(len(ALL))]
    assert {task.part for task in tasks} == set(report.PARTS) - {"gpu"}
    on_gpu = {task.part for chain in report.chains(True, False) for task in chain}
    assert on_gpu == {"ladder", "noise", "gpu"}


def test_a_part_comes_when_all_of_it_is_there_and_in_its_order():
    def row(index):
        return {"index": index, "killed": True}

    todo = [
        [Task("mutants", row, (0,))],
        [Task("noise", dict, ({"a": 1},)), Task("mutants", row, (1,))],
        [Task("mutants", row, (2,))],
    ]
    found = list(report.measured(todo, 1))
    assert found == [("noise", {"a": 1}), ("mutants", [row(0), row(1), row(2)])]


def test_the_page_shows_the_figures_and_a_failure_ends_the_command(capsys):
    row = report.rung_row("rope tables", "fp64", True)
    assert row["passed"] and row["seeds"] == 1
    env = {"commit": "c" * 40}
    results = {"ladder": {"commit": "b" * 40, "results": [row]}}
    text = page(env, results)
    assert "| rope tables | fp64 | absolute | 1 |" in text and "holds" in text
    assert "Measured at commit bbbbbbbbbbbb." in text
    report._judge(results)
    failing = {"ladder": {"commit": "c", "results": [row | {"passed": False}]}}
    assert "**FAILS**" in page(env, failing)
    alive = {"mutants": {"results": [{"name": "a mistake", "killed": False}]}}
    for wrong, name in ((failing, "rope tables fp64"), (alive, "a mistake")):
        with pytest.raises(SystemExit):
            report._judge(wrong)
        assert name in capsys.readouterr().out
