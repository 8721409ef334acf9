"""What happens every so many steps: log lines, evaluations, text samples."""

import contextlib
import math
import shutil
from typing import Any

import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxllm.data.tokenizer import BEGIN_ID, END_ID
from jaxllm.generate import Sampling, generate
from jaxllm.train.device import peak_bytes
from jaxllm.train.evaluate import evaluate
from jaxllm.train.manifest import state_bytes
from jaxllm.train.metrics import append_jsonl, rewrite_jsonl, seed_line, utilisation
from jaxllm.train.processes import agree, is_first, one_line
from jaxllm.train.run import Run
from jaxllm.train.step import State


def introduce(run: Run) -> None:
    """Says what is about to be trained, on what, and where."""
    model, compute = run.config.model, run.program.config.compute
    devices = run.program.mesh.devices
    run.console.say(
        f"model: {model.n_params:,} parameters ({model.n_params / 1e6:.3f} million)\n"
        f"data: {run.train.n_rows:,} rows of {run.config.seq_len} tokens in "
        f"{run.config.data.path}; {run.val.n_rows:,} held out\n"
        f"device: {devices.size} x {devices.flat[0].device_kind}; matrix products in "
        f"{compute.compute_dtype}, weights in {compute.param_dtype}\n"
        f"run: {run.total_steps} steps of {run.config.train.batch_size} rows in "
        f"{run.folder.path}"
    )
    if (warmup := run.config.optim.warmup_steps) >= run.total_steps:
        run.console.say(
            f"WARNING: optim.warmup_steps={warmup} is the whole run of "
            f"{run.total_steps} steps: the learning rate only rises"
        )
    predict_disk(run)


def predict_disk(run: Run) -> None:
    """Says how much the checkpoints will take at most, and warns if that is not there.

    The newest are kept, one more is being written, and those of `keep_every` stay.
    """
    options, size = run.config.train, state_bytes(run.program.abstract_state)
    count = options.keep + 1
    if options.keep_every:
        count += run.total_steps // options.keep_every + 1  # and step 0
    there = len(run.checkpoints.steps())
    free = shutil.disk_usage(run.folder.path).free
    if (needed := size * max(count - there, 0)) > free:
        run.console.say(
            f"WARNING: the checkpoints may take {count} x {size / 1e6:.1f} MB, "
            f"{needed / 1e6:,.1f} MB more than now, and the disk of {run.folder.path} "
            f"has {free / 1e6:,.1f} MB: make room, or lower --train.keep or raise "
            f"--train.keep-every"
        )
    else:
        run.console.say(
            f"disk: up to {count} checkpoints of {size / 1e6:.1f} MB; "
            f"{free / 1e9:,.1f} GB free"
        )


def log(run: Run, step: int, *, keep: int = 0, show: bool = True) -> None:
    """Reads the figures of the steps up to `step`, and shows those of `step`."""
    taken = run.pending[: len(run.pending) - keep]
    run.pending = run.pending[len(run.pending) - keep :]
    if not taken or run.position.tripped:  # what followed is undone
        return
    # Waits for the devices to finish the newest of these steps.
    figures = jax.device_get(taken)
    records: list[dict[str, Any]] = []
    for index, one in enumerate(figures, start=step - len(taken) + 1):
        values = {name: value.item() for name, value in one.items()}
        bad = why_bad(values) if values["skipped"] else ""
        if not bad:  # then the bounds are of no interest
            values = {n: v for n, v in values.items() if not n.endswith("_bound")}
        records.append({"step": index} | values)
        if bad:
            batch = index + run.position.data_offset
            run.console.say(f"step {index} was skipped (batch {batch}): {bad}")
        run.position.observe(index, bad=bad, limit=run.config.guard.bad_steps)
        if run.position.tripped:
            break
    run.meter.stepped(sum(one["tokens"] for one in records), steps=len(taken))
    if show and not run.position.tripped:
        records[-1] |= _show(run, step, records[-1])
    record(run, records)


def why_bad(figures: dict[str, float]) -> str:
    """Says what was wrong with the figures of a skipped step."""
    parts = []
    for name, words in (("loss", "loss"), ("grad_norm", "gradient norm")):
        value, bound = figures[name], figures.get(f"{name}_bound", math.inf)
        beyond = f" (bound {bound:.4g})" if value > bound else ""
        parts.append(f"{words} {value:.4g}{beyond}")
    return ", ".join(parts)


def record(run: Run, records: list[dict[str, Any]]) -> None:
    """Appends to metrics.jsonl; a disk that takes no more of it does not end a run."""
    for one in records:
        run.tracker.log(one)
    if not is_first():
        return
    try:
        append_jsonl(run.folder.metrics, records)
    except OSError as error:
        run.console.say(f"WARNING: figures were not written: {error}")


def forget(run: Run, step: int) -> None:
    """Drops the figures of the steps from `step` on, which are done again."""
    if not is_first():
        return
    try:
        rewrite_jsonl(run.folder.metrics, before_step=step)
    except OSError as error:
        run.console.say(f"WARNING: figures from step {step} on stay twice: {error}")


def _show(run: Run, step: int, record: dict[str, Any]) -> dict[str, float]:
    speed = run.meter.read()
    devices = run.program.mesh.devices
    used = utilisation(
        speed["tokens_per_s"], run.config.model, run.config.seq_len,
        device_kind=devices.flat[0].device_kind, n_devices=devices.size,
        dtype=run.program.config.compute.compute_dtype,
    )  # fmt: skip
    peak = peak_bytes(jax.local_devices())
    left_s = (run.total_steps - step - 1) * speed["step_ms"] / 1e3
    per_epoch = min(run.train.steps_per_epoch, run.total_steps)
    epochs = -(-run.total_steps // per_epoch)
    epoch_left_s = min(left_s, (per_epoch - step % per_epoch) * speed["step_ms"] / 1e3)
    line = seed_line(
        step, steps_per_epoch=per_epoch, epochs=epochs, loss=record["loss"],
        lr=record["learning_rate"], left_s=epoch_left_s,
    )  # fmt: skip
    line += (
        f" tokens/s:{speed['tokens_per_s']:.0f} step:{speed['step_ms']:.0f}ms "
        f"grad_norm:{record['grad_norm']:.3f} wait:{speed['data_wait']:.1%} "
        f"memory:{peak / 2**30:.2f}GiB ETA:{left_s / 60:.1f}min"
    )
    if used:
        line += f" MFU:{used['mfu']:.1%}"
    run.console.progress(line, step=step + 1, total=run.total_steps)
    return speed | used | {"peak_bytes": peak}


def validate(run: Run, state: State, step: int) -> None:
    """Measures the loss on held-out documents after `step` steps."""
    run.meter.pause()
    figures = evaluate(
        run.program, state["params"], run.val, run.token_bytes,
        max_rows=run.config.train.eval_rows,
    )  # fmt: skip
    record(run, [{"step": step} | figures])
    run.console.say(
        f"validation after {step} steps: loss {figures['val_loss']:.3f}, "
        f"{figures['val_bpb']:.3f} bits per byte"
    )
    run.meter.resume()


def sample(run: Run, state: State, step: int) -> None:
    """Writes a text with the weights after `step` steps.

    With several processes the first one writes it, alone, with a copy of all weights on
    one of its devices; where these would not fit beside the state there is no text.
    """
    run.meter.pause()
    params = state["params"]
    if jax.process_count() > 1:
        if not _room_for_copy(run, params):
            run.meter.resume()
            return run.console.say(f"no sample after {step} steps: no room for a copy")
        params = whole_on_first(params)
    if is_first():
        try:
            _write_sample(run, params, step)
        except Exception as error:  # such as no memory left: a run is worth more
            text = one_line(error)
            run.console.say(f"WARNING: no sample after {step} steps: {text}")
            run.incidents.note("sample_failed", step=step, error=text)
    run.meter.resume()


def _room_for_copy(run: Run, params: dict) -> bool:
    """Whether every device has room for all weights; the same on each process."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    free = min(s.get("bytes_limit", 1e18) - s.get("bytes_in_use", 0) for s in stats)
    # Twice: the gathered copy, and what the decoding takes.
    needs = 2 * sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    return not agree("" if needs < free else "no room")


def whole_on_first(params: dict) -> dict:
    """Gathers the weights; in the first process they are on one device, whole."""

    def gather(leaf: jax.Array) -> jax.Array:
        layout = NamedSharding(leaf.sharding.mesh, P())  # type: ignore[attr-defined]
        return jax.device_put(leaf, layout).addressable_data(0)

    return jax.tree.map(gather, params)


def _write_sample(run: Run, params: dict, step: int) -> None:
    prompt = [BEGIN_ID, *run.tokenizer.encode(run.config.train.sample_prompt)]
    new = generate(
        run.program.graphdef, params, [prompt], stop_ids=(END_ID,),
        max_new_tokens=run.config.train.sample_tokens,
        sampling=Sampling(temperature=0.8, top_k=50, seed=step),
    )[0]  # fmt: skip
    text = f"sample after {step} steps: {run.tokenizer.decode(prompt + new)}"
    with (
        contextlib.suppress(OSError),  # it is in the log too
        run.folder.samples.open("a", encoding="utf-8") as file,
    ):
        file.write(text + "\n")
    run.console.say(text)
