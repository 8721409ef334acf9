"""How a run ends: the last save, the plot, what happened, what to do next."""

import jax

from jaxllm.train import report
from jaxllm.train.console import Console
from jaxllm.train.device import peak_bytes
from jaxllm.train.incidents import describe as describe_incidents
from jaxllm.train.metrics import read_jsonl
from jaxllm.train.processes import from_first, is_first
from jaxllm.train.run import Run, describe, versions
from jaxllm.train.run_folder import RunFolder, Unwritable
from jaxllm.train.step import State
from jaxllm.train.step_folders import CheckpointError


def finish(run: Run, state: State) -> None:
    """Waits for the last checkpoint, draws the plot, says what to do next.

    Raises: CheckpointError when the last state could not be saved; Unwritable when that
    is all that could be.
    """
    step = int(state["step"])
    keep_last(run, state, step)
    run.tracker.close()
    if not is_first():
        return
    records = read_jsonl(run.folder.metrics)
    evaluated = [record for record in records if "val_bpb" in record]
    finished = step == run.total_steps
    draw(run)
    try:
        tell(run, step)
    except OSError as error:
        raise Unwritable(
            f"step {step} is saved, and {run.folder.summary} cannot be written: "
            f"{error.strerror}; make room and give the same command again"
        ) from None
    say = run.console.say
    if not finished:
        say(f"stopped after step {step} of {run.total_steps}; everything is saved")
        return say(f"continue:  {report.resume_command(run.folder)}")
    if len(evaluated) > 1:
        say(
            f"validation: {evaluated[0]['val_bpb']:.3f} -> "
            f"{evaluated[-1]['val_bpb']:.3f} bits per byte in {step} steps"
        )
    say("the run's folder:\n" + "\n".join(report.contents(run.folder)))
    say("next:\n" + "\n".join(report.next_commands(run.folder, steps=step)))


def draw(run: Run) -> None:
    """Draws the loss curve; a run is not lost for want of a picture."""
    try:
        report.write_plot(run.folder)
    except Exception as error:  # whatever a plotting library can raise
        run.console.say(f"WARNING: no plot was drawn: {error}")
        run.incidents.note("plot_failed", error=str(error))


def tell(run: Run, step: int, *, error: str = "") -> None:
    """Says what happened up to `step`, and writes it, with the rest of summary.json;
    `error` is what ended the run before its end.

    Raises: OSError.
    """
    records = read_jsonl(run.folder.metrics)
    evaluated = [record for record in records if "val_bpb" in record]
    undone = [r["last_batch"] + 1 - r["first_batch"] for r in run.position.rollbacks]
    skipped = sum(record.get("skipped", 0) for record in records) + sum(undone)
    happened = {"skipped_steps": skipped} | run.incidents.report()
    summary = {
        "finished": step == run.total_steps and not error,
        "step": step,
        "error": error,
        "parameters": run.config.model.n_params,
        "trained_s": round(run.meter.trained_s, 3),
        "peak_bytes": peak_bytes(jax.local_devices()),
        "skipped_steps": skipped,
        "failed_saves": run.failed_saves,
        "what_happened": happened,
        "rollbacks": run.position.rollbacks,
        "first_evaluation": evaluated[0] if evaluated else None,
        "last_evaluation": evaluated[-1] if evaluated else None,
        "versions": versions(),
    }
    run.console.say("what happened:\n" + "\n".join(describe_incidents(happened)))
    report.write_summary(run.folder, summary)


def keep_last(run: Run, state: State, step: int) -> None:
    """Makes sure that the last state is on disk, by another save if the first failed.

    Raises: CheckpointError when it cannot be.
    """
    try:
        run.checkpoints.wait()
    except CheckpointError as error:
        run.save_failed(error)
    if not is_saved(run, step):
        run.checkpoints.save(step, state, describe(run))
    run.checkpoints.close()


def is_saved(run: Run, step: int) -> bool:
    """Whether the checkpoint of `step` is there; the same on every process."""
    # Listed by one for all: another may not see the latest rename yet.
    return from_first("yes" if step in run.checkpoints.steps() else "") == "yes"


def say_finished(console: Console, folder: RunFolder) -> None:
    """Says that a run has nothing left to do, and what can be done with it."""
    step = folder.finished_at() or 0
    console.say(f"the run in {folder.path} is finished: {step} steps; nothing to do")
    console.say("next:\n" + "\n".join(report.next_commands(folder, steps=step)))
    console.say("  anew:      the same command with --fresh sets this run aside")
