"""The phases of a run, in order, each a call.

folder -> mesh -> data -> state (restore or start) -> step loop -> final save -> report
"""

import contextlib
import time
from collections import deque
from dataclasses import replace

import jax

from jaxllm.config import RunConfig, to_json
from jaxllm.parallel import DistributedConfig
from jaxllm.train import events, origin
from jaxllm.train.allocator import tend
from jaxllm.train.cluster import joined
from jaxllm.train.console import Console
from jaxllm.train.device import out_of_memory, pin_kernels
from jaxllm.train.ending import finish, is_saved, say_finished, tell
from jaxllm.train.feed import prefetched
from jaxllm.train.metrics import read_jsonl, seconds_of
from jaxllm.train.position import Position
from jaxllm.train.processes import (
    from_first,
    is_first,
    on_first,
    require_same,
    require_shared,
)
from jaxllm.train.rollback import Diverged, roll_back
from jaxllm.train.run import Run, describe, describe_data, prepare, restore
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
    folder = RunFolder(config.out)
    if config.deterministic:
        pin_kernels(folder.cache)
    with joined(config.distributed) as peers, contextlib.ExitStack() as held:
        # Which process this is ends here: what follows is the same on all.
        config = replace(config, distributed=DistributedConfig())
        require_same(to_json(config))
        console = held.enter_context(Console(quiet=not is_first()))
        start = on_first(lambda: decide(folder, config))
        if start == "finished" and config.resume and _goes_again(config):
            steps = config.train.steps + int(on_first(lambda: _finished_at(folder)))
            config = replace(config, train=replace(config.train, steps=steps))
            start = "continue"
        if start == "finished":
            return say_finished(console, folder)
        mesh = make_mesh(config.parallel)
        on_first(lambda: _take(folder, held, console, new=start == "new"))
        require_shared(folder.path)
        started = prepare(config, folder, console, mesh)
        peers.before_leaving = started.checkpoints.let_finish
        events.introduce(started)
        try:
            with started.watchdog as dog:
                with dog.paused("the start"):
                    state = restore_or_init(started, resuming=start == "continue")
                # Until here a signal ends the process: there is nothing to save.
                with Stop() as stop:
                    state = train(started, state, stop)
                    with dog.paused("the last save"):
                        finish(started, state)
        except BaseException as error:
            # A save under way is worth more than a quick death.
            started.checkpoints.let_finish()
            started.tracker.close()
            if isinstance(error, (Diverged, CheckpointError)) and is_first():
                with contextlib.suppress(OSError, CheckpointError):
                    step = max(started.checkpoints.steps(), default=0)
                    tell(started, step, error=str(error))
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
        return init(run)
    restored = restore(run)
    trained_on = restored.meta["data"]
    # An import without data leaves it open what comes next.
    if trained_on not in (None, now := describe_data(run)):
        raise ValueError(
            f"the run in {run.folder.path} was trained on other data ({trained_on}) "
            f"than {run.config.data.path} holds now ({now}): give its --data.path"
        )
    step = restored.step
    if step > run.total_steps:
        raise ValueError(
            f"the run in {run.folder.path} has taken {step} steps, and is to end after "
            f"{run.total_steps}: give --train.steps {step} or more, or another --out"
        )
    run.position = Position.from_meta(restored.meta)
    lost_s = seconds_of(read_jsonl(run.folder.metrics), step)
    run.incidents.note("resumed", step=step, lost_s=lost_s)
    if trained_on and restored.meta["total_steps"] != run.total_steps:
        run.console.say(
            f"note: the run is now {run.total_steps} steps long, not "
            f"{restored.meta['total_steps']}: its learning-rate schedule is stretched"
        )
    # The log of steps that a fallback lost is written again.
    events.forget(run, step)
    run.console.say(f"continuing from the checkpoint of step {step}")
    return restored.state


def init(run: Run) -> State:
    """A state at step 0, with the weights of --init-from or random ones."""
    state = run.program.init()
    if run.config.init_from:
        state["params"], words = origin.load(run.config, run.program.abstract_state)
        run.console.say(words)
    return state


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
    if first == 0 and not is_saved(run, first):
        # The initial weights, for comparisons, and proof that saving works here before
        # hours depend on it.
        with run.watchdog.paused("the first save"):
            run.checkpoints.save(first, state, describe(run))
            run.checkpoints.wait()
    if first == 0 or (
        _due(first, run.config.train.eval_every) and not _is_evaluated(run, first)
    ):
        events.validate(run, state, first)
    run.trained_s_at[first] = run.meter.trained_s
    run.saved_since = time.monotonic()


def advance(run: Run, state: State, stop: Stop) -> State:
    """The step loop: fetch, step, and every so often log, save, evaluate, sample.

    Ends before the last step when it is asked to stop, with the state saved, or when
    `run.position` has tripped.
    """
    options, total = run.config.train, run.total_steps
    first = int(state["step"])
    if stop.reached() and is_saved(run, first):  # asked while that was saved, measured
        return state
    run.meter.resume()
    ahead: deque[jax.Array] = deque()
    for step, batch, waited in prefetched(run, first):
        run.meter.waited(waited)
        if step == first:  # the call compiles, which says nothing about the time left
            run.meter.pause()
        state, metrics = run.program.train_step(state, batch)
        if step == first:
            run.meter.resume()
        run.pending.append(metrics)
        ahead.append(metrics["loss"])
        # Two steps are under way at most: enough for the device to be never without
        # work, and few enough to stop soon and to notice soon that one hangs.
        if len(ahead) > 2:
            ahead.popleft().block_until_ready()
            run.watchdog.beat(step - 2)
        done = step + 1
        last = done == total
        stopping = stop.reached() and not last
        # Read one step late, so that the device is never left without work.
        if (step - 1) % options.log_every == 0 and step > first:
            events.log(run, step - 1, keep=1)
        if step == first:
            events.log(run, step)
        saving = last or stopping or save_is_due(run, done)
        if saving:
            shown = last or stopping or _due(step, options.log_every)
            events.log(run, step, show=shown)
        if run.position.tripped:
            break
        if saving:
            with run.watchdog.paused("a save"):
                save(run, state, done)
        if stopping:
            break
        if last or _due(done, options.eval_every):
            with run.watchdog.paused("an evaluation"):
                events.validate(run, state, done)
        if last or _due(done, options.sample_every):
            with run.watchdog.paused("a text sample"):
                events.sample(run, state, done)
        tend()
    return state


def save_is_due(run: Run, step: int) -> bool:
    """Whether a checkpoint is due after `step` steps, by their number or by the clock.

    Several processes go by the first one's clock, and ask it when they log.
    """
    options = run.config.train
    if step % options.save_every == 0:
        return True
    if not options.save_every_minutes:
        return False
    if jax.process_count() > 1 and step % options.log_every:
        return False
    since_s = time.monotonic() - run.saved_since
    return from_first(str(since_s >= 60 * options.save_every_minutes)) == "True"


def save(run: Run, state: State, step: int) -> None:
    """Starts a checkpoint of `step`; the writing goes on beside the training.

    Training goes on without it too, if need be: the earlier ones are untouched, and the
    next save may find the disk mended. What the run cannot end without is in `finish`.
    """
    run.meter.pause()
    # Each for itself, so that the failure of an earlier save costs this one nothing.
    for part in (
        run.checkpoints.wait,
        lambda: run.checkpoints.save(step, state, describe(run)),
    ):
        try:
            part()
        except CheckpointError as error:
            run.save_failed(error)
    run.trained_s_at[step] = run.meter.trained_s
    run.saved_since = time.monotonic()
    run.meter.resume()


def _is_evaluated(run: Run, step: int) -> bool:
    def look() -> str:
        records = read_jsonl(run.folder.metrics)
        there = any(r.get("step") == step and "val_loss" in r for r in records)
        return "yes" if there else ""

    return on_first(look) == "yes"


def _finished_at(folder: RunFolder) -> str:
    return str(folder.finished_at() or 0)


def _goes_again(config: RunConfig) -> bool:
    return config.train.when_finished == "again" and config.train.steps > 0


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
