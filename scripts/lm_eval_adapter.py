"""Our networks as a model of lm-evaluation-harness; a part of evaluate.py.

Every context begins with <|im_start|>, as documents do in training. Needs jaxllm[eval].
"""

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxllm.data.tokenizer import BEGIN_ID, END_ID, Tokenizer
from jaxllm.generate import Sampling, stream
from jaxllm.score import ROWS, Scorer

NEW_TOKENS = 256
"""Most tokens of an answer, where the task does not say."""


def require() -> None:
    """Raises: ValueError unless lm-evaluation-harness is installed."""
    if importlib.util.find_spec("lm_eval") is None:
        raise ValueError(
            "--tasks need lm-evaluation-harness: pip install 'jaxllm[eval]'"
        )


def evaluate(
    scorer: Scorer,
    network: tuple[Any, dict],
    tokenizer: Tokenizer,
    *,
    tasks: Sequence[str],
    task_path: Path | None,
    limit: int | None,
) -> dict[str, Any]:
    """Runs tasks; returns their figures by task, and the version of the harness.

    Raises: ValueError for a task that is not known, or whose text cannot be had.
    """
    import lm_eval  # type: ignore[reportMissingImports]
    from lm_eval.tasks import TaskManager  # type: ignore[reportMissingImports]

    if task_path is not None and not task_path.is_dir():
        raise ValueError(f"--task-path {task_path} is not a folder: give one")
    manager = TaskManager(include_path=str(task_path) if task_path else None)
    unknown = sorted(set(tasks) - set(manager.all_tasks))
    if unknown:
        raise ValueError(
            f"--tasks {unknown[0]} is not known to lm-evaluation-harness "
            f"{lm_eval.__version__}: check the name, or give --task-path"
        )
    try:
        run: Any = lm_eval.simple_evaluate  # its decorator hides its parameters
        results = run(
            model=_harness_model(scorer, network, tokenizer), tasks=list(tasks),
            task_manager=manager, limit=limit, bootstrap_iters=0, log_samples=False,
        )  # fmt: skip
    except (ConnectionError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"the text of {', '.join(tasks)} is not here: {reason}"
        ) from None
    figures = {
        task: {
            name.removesuffix(",none"): value
            for name, value in values.items()
            if isinstance(value, float) and "stderr" not in name
        }
        for task, values in results["results"].items()
    }
    return {"tasks": figures, "lm_eval": lm_eval.__version__}


class Answers:
    """The three questions that the harness asks, in terms of text and tokens."""

    def __init__(self, scorer: Scorer, network: tuple[Any, dict], tokenizer: Tokenizer):
        self.scorer, self.network, self.tokenizer = scorer, network, tokenizer
        self.context = scorer.config.max_seq_len

    def likelihoods(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[float, bool]]:
        """For each (context, continuation): the log-probability of the continuation in
        nats, and whether greedy decoding would write it."""
        rows, counts = [], []
        for context, continuation in pairs:
            # Spaces belong to the word behind them, as everywhere in byte-level BPE.
            bare = context.rstrip()
            continuation = context[len(bare) :] + continuation
            before = self.tokenizer.encode(bare)
            both = self.tokenizer.encode(bare + continuation)
            # Their joint may be a token of its own: what is scored begins before it.
            count = max(len(both) - len(before), 1)
            rows.append(np.array([BEGIN_ID, *both], np.int32)[-self.context - 1 :])
            counts.append(min(count, len(rows[-1]) - 1))
        scored = self._scored(rows)
        return [
            (float(log_p[len(log_p) - n :].sum()), bool(best[len(best) - n :].all()))
            for (log_p, best), n in zip(scored, counts, strict=True)
        ]

    def rolling(self, texts: Sequence[str]) -> list[float]:
        """The log-probability of each whole text, in nats; of a text longer than the
        context in windows, each token once, the last window with a full context."""
        totals = []
        for text in texts:
            ids = np.array([BEGIN_ID, *self.tokenizer.encode(text)], np.int32)
            rows, counts = [], []
            for start in range(1, len(ids), self.context):
                end = min(start + self.context, len(ids))
                rows.append(ids[max(0, end - self.context - 1) : end])
                counts.append(end - start)
            scored = self._scored(rows)
            totals.append(
                sum(
                    float(log_p[len(log_p) - n :].sum())
                    for (log_p, _), n in zip(scored, counts, strict=True)
                )
            )
        return totals

    def until(self, context: str, options: dict[str, Any]) -> str:
        """Goes on from a context until one of the `until` texts, which is cut off."""
        stops = options.get("until") or []
        stops = [stops] if isinstance(stops, str) else list(stops)
        most = int(options.get("max_gen_toks", NEW_TOKENS))
        most = max(1, min(most, self.context - 1))
        ids = [BEGIN_ID, *self.tokenizer.encode(context)]
        prompt = ids[-(self.context - most) :]
        warm = options.get("do_sample", False)
        sampling = Sampling(
            temperature=float(options.get("temperature", 0.0)) if warm else 0.0
        )
        new: list[int] = []
        for tokens in stream(
            *self.network, [prompt], max_new_tokens=most, sampling=sampling,
            stop_ids=(END_ID,),
        ):  # fmt: skip
            new += [t for t in tokens if t is not None]
            text = self.tokenizer.decode(new)
            found = [at for stop in stops if stop and (at := text.find(stop)) >= 0]
            if found:
                return text[: min(found)]
        return self.tokenizer.decode(new)

    def _scored(self, rows: list[np.ndarray]) -> list[tuple[np.ndarray, np.ndarray]]:
        # Long ones together: a batch is as wide as its longest row.
        order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
        scored: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        for first in range(0, len(order), ROWS):
            batch = order[first : first + ROWS]
            answers = self.scorer.score([rows[i] for i in batch])
            scored |= dict(zip(batch, answers, strict=True))
        return [scored[i] for i in range(len(rows))]


def _harness_model(scorer: Scorer, network: tuple[Any, dict], tokenizer: Tokenizer):
    """The harness's own kind of model around ours; its base class is only there where
    the harness is installed."""
    from lm_eval.api.model import LM  # type: ignore[reportMissingImports]

    class Model(LM):
        def __init__(self):
            super().__init__()
            self.answers = Answers(scorer, network, tokenizer)

        def loglikelihood(self, requests):
            pairs: Any = [request.args for request in requests]
            return self.answers.likelihoods(pairs)

        def loglikelihood_rolling(self, requests):
            return self.answers.rolling([request.args[0] for request in requests])

        def generate_until(self, requests):
            return [self.answers.until(*request.args) for request in requests]

    return Model()
