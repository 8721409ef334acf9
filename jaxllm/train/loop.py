"""The phases of a run, in order, each a call.

folder -> mesh -> data -> state (restore or start) -> step loop -> final save -> report
"""

import contextlib
from dataclasses import replace
from typing import Any

import jax

from jaxllm.config import RunConfig, to_json
from jaxllm.parallel import DistributedConfig
from jaxllm.train import events, report
from jaxllm.train.cluster import joined
from jaxllm.train.console import Console
from jaxllm.train.device import out_of_memory
from jaxllm.train.feed import prefetched
from jaxllm.train.incidents import describe as describe_incidents
from jaxllm.train.metrics import read_jsonl, rewrite_jsonl
from jaxllm.train.position import Position
from jaxllm.train.processes import (
    from_first,
    is_first,
    on_first,
    require_same,
    require_shared,
)
from jaxllm.train.rollback import Diverged, roll_back
from jaxllm.train.run import Run, describe, describe_data, prepare, restore, versions
from jaxllm.train.run_folder import RunFolder, decide
from jaxllm.train.sharding import make_mesh
from jaxllm.train.step import State
from jaxllm.train.step_folders import CheckpointError
from jaxllm.train.stop import Stop


def run(config: RunConfig) -> None:
    """Trains as `config` says, or goes on where the run in its folder stands.

    Every process of a run calls it; an error in one ends them all.

    Raises: ValueError for what the user can mend; nothing is half-written then.
    """
    with joined(config.distributed) as peers, contextlib.ExitStack() as held:
        # Which process this is ends here: what follows is the same on all.
        config = replace(config, distributed=DistributedConfig())
        require_same(to_json(config))
        console = held.enter_context(Console(quiet=not is_first()))
        folder = RunFolder(config.out)
        start = on_first(lambda: decide(folder, config))
        if start == "finished" and config.resume and _goes_again(config):
            steps = config.train.steps + int(on_first(lambda: _finished_at(folder)))
            config = replace(config, train=replace(config.train, steps=steps))
            start = "continue"
        if start == "finished":
            return _say_finished(console, folder)
        mesh = make_mesh(config.parallel)
        on_first(lambda: _take(folder, held, console, new=start == "new"))
        require_shared(folder.path)
        started = prepare(config, folder, console, mesh)
        peers.before_leaving = started.checkpoints.let_finish
        events.introduce(started)
        try:
            state = restore_or_init(started, resuming=start == "continue")
            # Until here a signal ends the process: there is nothing to save yet.
            with Stop() as stop:
                with started.watchdog:
                    state = train(started, state, stop)
                finish(started, state)
        except BaseException as error:
            # A save under way is worth more than a quick death.
            started.checkpoints.let_finish()
            if isinstance(error, Diverged) and is_first():
                records = read_jsonl(folder.metrics)
                steps = started.checkpoints.steps()
                write_summary(started, max(steps, default=0), records)
            if isinstance(error, jax.errors.JaxRuntimeError) and (
                advice := out_of_memory(error, started.program.config)
            ):
                raise ValueError(advice) from None
            raise


def _take(
    folder: RunFolder, held: contextlib.ExitStack, console: Console, *, new: bool
) -> None:
    """Makes the folder this run's own while `held` is open; sets an earlier aside."""
    folder.create()
    held.enter_context(folder.locked())
    if new and (archived := folder.set_aside()):
        console.say(f"the earlier run was set aside in {archived}")


def restore_or_init(run: Run, *, resuming: bool) -> State:
    """The newest state that verifies, or a fresh one."""
    if not resuming:
        return run.program.init()
    restored = restore(run)
    trained_on = restored.meta["data"]
    if trained_on != (now := describe_data(run)):
        raise ValueError(
            f"the run in {run.folder.path} was trained on other data ({trained_on}) "
            f"than {run.config.data.path} holds now ({now}): give its --data.path"
        )
    step = restored.step
    run.position = Position.from_meta(restored.meta)
    lost_s = run.alive_at - run.folder.saved_at(step)
    run.incidents.note("resumed", step=step, lost_s=lost_s)
    if restored.meta["total_steps"] != run.total_steps:
        run.console.say(
            f"note: the run is now {run.total_steps} steps long, not "
            f"{restored.meta['total_steps']}: its learning-rate schedule is stretched"
        )
    # The log of steps that a fallback lost is written again.
    if is_first():
        rewrite_jsonl(run.folder.metrics, before_step=step)
    run.console.say(f"continuing from the checkpoint of step {step}")
    return restored.state


def train(run: Run, state: State, stop: Stop) -> State:
    """Steps to the end, or until asked to stop; the state is saved by then.

    Raises: Diverged when going back does not help any more.
    """
    begin(run, state)
    while True:
        state = advance(run, state, stop)
        if run.position.tripped is None:
            return state
        del state  # there may be no room for two
        state = roll_back(run)


def begin(run: Run, state: State) -> None:
    """Saves and measures the state before the first step of this start, where the run
    has not done so yet."""
    first = int(state["step"])
    if first == 0 and not _is_saved(run, first):
        # The initial weights, for comparisons, and proof that saving works here before
        # hours depend on it.
        run.checkpoints.save(first, state, describe(run))
        run.checkpoints.wait()
    if first == 0 or (
        _due(first, run.config.train.eval_every) and not _is_evaluated(run, first)
    ):
        events.validate(run, state, first)
    run.trained_s_at[first] = run.meter.trained_s


def advance(run: Run, state: State, stop: Stop) -> State:
    """The step loop: fetch, step, and every so often log, save, evaluate, sample.

    Ends before the last step when it is asked to stop, with the state saved, or when
    `run.position` has tripped.
    """
    options, total = run.config.train, run.total_steps
    first = int(state["step"])
    run.meter.resume()
    for step, batch, waited in prefetched(run, first):
        run.meter.waited(waited)
        state, metrics = run.program.train_step(state, batch)
        run.pending.append(metrics)
        done = step + 1
        last = done == total
        stopping = stop.reached() and not last
        # Read one step late, so that the device is never left without work.
        if (step - 1) % options.log_every == 0 and step > first:
            events.log(run, step - 1, keep=1)
        if step == first:
            events.log(run, step)
        saving = last or stopping or done % options.save_every == 0
        if saving:
            events.log(run, step, show=last or stopping)
        if run.position.tripped:
            break
        if saving:
            with run.watchdog.paused():
                save(run, state, done)
        if stopping:
            break
        if last or _due(done, options.eval_every):
            with run.watchdog.paused():
                events.validate(run, state, done)
        if last or _due(done, options.sample_every):
            with run.watchdog.paused():
                events.sample(run, state, done)
    return state


def save(run: Run, state: State, step: int) -> None:
    """Starts a checkpoint of `step`; the writing goes on beside the training.

    Training goes on without it too, if need be: the earlier ones are untouched, and the
    next save may find the disk mended. What the run cannot end without is in `finish`.
    """
    run.meter.pause()
    # Twice, since the first call may only bring the news that an earlier save failed.
    for _ in range(2):
        try:
            run.checkpoints.save(step, state, describe(run))
            break
        except CheckpointError as error:
            run.save_failed(error)
    run.trained_s_at[step] = run.meter.trained_s
    run.meter.resume()


def finish(run: Run, state: State) -> None:
    """Waits for the last checkpoint, draws the plot, says what to do next.

    Raises: CheckpointError when the last state could not be saved.
    """
    step = int(state["step"])
    keep_last(run, state, step)
    if not is_first():
        return
    records = read_jsonl(run.folder.metrics)
    evaluated = [record for record in records if "val_bpb" in record]
    finished = step == run.total_steps
    draw(run)
    happened = write_summary(run, step, records)
    say = run.console.say
    say("what happened:\n" + "\n".join(describe_incidents(happened)))
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


def write_summary(run: Run, step: int, records: list[dict[str, Any]]) -> dict[str, Any]:
    """Writes summary.json after `step` steps; returns what happened, counted."""
    evaluated = [record for record in records if "val_bpb" in record]
    undone = [r["last_batch"] + 1 - r["first_batch"] for r in run.position.rollbacks]
    skipped = sum(record.get("skipped", 0) for record in records) + sum(undone)
    happened = {"skipped_steps": skipped} | run.incidents.report()
    summary = {
        "finished": step == run.total_steps,
        "step": step,
        "parameters": run.config.model.n_params,
        "trained_s": round(run.meter.trained_s, 3),
        "skipped_steps": skipped,
        "failed_saves": run.failed_saves,
        "what_happened": happened,
        "rollbacks": run.position.rollbacks,
        "first_evaluation": evaluated[0] if evaluated else None,
        "last_evaluation": evaluated[-1] if evaluated else None,
        "versions": versions(),
    }
    report.write_summary(run.folder, summary)
    return happened


def keep_last(run: Run, state: State, step: int) -> None:
    """Makes sure that the last state is on disk, by another save if the first failed.

    Raises: CheckpointError when it cannot be.
    """
    try:
        run.checkpoints.wait()
    except CheckpointError as error:
        run.save_failed(error)
    if not _is_saved(run, step):
        run.checkpoints.save(step, state, describe(run))
    run.checkpoints.close()


def _is_saved(run: Run, step: int) -> bool:
    # Listed by one for all: another process may not see the latest rename yet.
    return from_first("yes" if step in run.checkpoints.steps() else "") == "yes"


def _is_evaluated(run: Run, step: int) -> bool:
    def look() -> str:
        records = read_jsonl(run.folder.metrics)
        there = any(r["step"] == step and "val_loss" in r for r in records)
        return "yes" if there else ""

    return on_first(look) == "yes"


def _finished_at(folder: RunFolder) -> str:
    return str(folder.finished_at() or 0)


def _goes_again(config: RunConfig) -> bool:
    return config.train.when_finished == "again" and config.train.steps > 0


def _say_finished(console: Console, folder: RunFolder) -> None:
    step = folder.finished_at() or 0
    console.say(f"the run in {folder.path} is finished: {step} steps; nothing to do")
    console.say("next:\n" + "\n".join(report.next_commands(folder, steps=step)))
    console.say("  anew:      the same command with --fresh sets this run aside")


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
