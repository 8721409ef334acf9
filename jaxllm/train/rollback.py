"""Going back: too many bad steps in a row undo what led to them.

The newest checkpoint from before the first of them is restored, and the data goes on
behind the last of them, as done by hand in large runs (Chowdhery et al., 2022, section
5.1). Where that is the very checkpoint that the run went back to last time, the one
before it is taken. What is decided here depends on the steps' figures alone: a run that
dies in between meets the same bad steps again, and decides the same.
"""

import contextlib
import json
from typing import Any

from jaxllm.data.files import write_atomically
from jaxllm.train.events import forget
from jaxllm.train.processes import is_first
from jaxllm.train.run import Run, restore
from jaxllm.train.step import State
from jaxllm.train.step_folders import CheckpointError


class Diverged(ValueError):
    """The run went back as often as it may and met bad steps again."""

    exit_code = 65
    """What a program that ends with it exits with: EX_DATAERR of sysexits.h."""


def roll_back(run: Run) -> State:
    """Restores the state to go on with, and moves the data past the bad steps.

    The caller holds no state any more, so that there is room for this one.

    Raises: Diverged after `guard.rollbacks` of them; CheckpointError when no earlier
    step can be restored.
    """
    position = run.position
    assert position.tripped is not None
    first, last = position.tripped
    offset = position.data_offset
    bad = {
        "first_batch": first + offset,
        "last_batch": last + offset,
        "reason": position.reason,
    }
    try:
        run.checkpoints.wait()
    except CheckpointError as error:
        run.save_failed(error)
    if len(position.rollbacks) >= run.config.guard.rollbacks:
        raise Diverged(_diagnosis(run, first, last, [*position.rollbacks, bad]))
    at_most = first
    if position.rollbacks and position.rollbacks[-1]["to"] == max(
        (s for s in run.checkpoints.steps() if s <= first), default=-1
    ):
        at_most = position.rollbacks[-1]["to"] - 1
    restored = restore(run, at_most=at_most)
    step = restored.step
    run.checkpoints.rewind(step)
    forget(run, step)
    run.pending.clear()
    position.tripped, position.bad_in_a_row, position.reason = None, 0, ""
    position.data_offset = last + 1 + offset - step
    position.rollbacks.append({"to": step} | bad)
    lost_s = run.meter.trained_s - run.trained_s_at.get(step, 0.0)
    run.incidents.note("rolled_back", lost_s=lost_s, to=step, **bad)
    run.console.say(
        f"STEPS {first}-{last} WERE BAD ({bad['reason']}): back to the checkpoint of "
        f"step {step}, and on with batch {last + 1 + offset} of the data "
        f"(rollback {len(position.rollbacks)} of {run.config.guard.rollbacks})"
    )
    return restored.state


def _diagnosis(run: Run, first: int, last: int, bad: list[dict[str, Any]]) -> str:
    """Writes diagnosis.json; returns the line that names what was bad and what to do.

    The documents of each bad batch are those of the training split, by data folder.
    """
    batches = [
        {
            "batch": batch,
            "rows": [
                {"folder": str(folder), "documents": [first_one, last_one]}
                for folder, first_one, last_one in run.train.documents(batch)
            ],
        }
        for each in bad
        for batch in range(each["first_batch"], each["last_batch"] + 1)
    ]
    if is_first():
        report = {"steps": [first, last], "bad": bad, "batches": batches}
        text = json.dumps(report, indent=1) + "\n"
        with contextlib.suppress(OSError):  # what matters is in the message
            write_atomically(run.folder.diagnosis, text.encode())
    ranges = ", ".join(f"{b['first_batch']}-{b['last_batch']}" for b in bad)
    row = batches[-1]["rows"][0]
    return (
        f"steps {first}-{last} were bad ({bad[-1]['reason']}) after "
        f"{len(bad) - 1} rollback(s): the bad batches are {ranges}, the last of which "
        f"begins in document {row['documents'][0]} of {row['folder']}; "
        f"{run.folder.diagnosis} names the documents of all. Mend the data, lower "
        f"optim.learning_rate in a new run, or go on with a higher "
        f"--guard.spike-factor, --guard.bad-steps or --guard.rollbacks"
    )
