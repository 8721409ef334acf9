"""Mistakes in training, conversion and data, and the rung that has to notice."""

from parity_tests.patching import Mutant

_RATE, _UPDATE = "train.optim:learning_rate", "train.optim:update"
_STATE, _GRADS = "train.step:_apply", "train.step:loss_and_grads"
_OUT, _IN = "convert.names:_outward", "convert.names:_inward"
_PACKED = "data.batches:PackedRows.__getitem__"
_AT = "(step.astype(real) + 1) * unit - 1"

TRAINING = (
    # Schedule
    Mutant("one step ahead", _RATE, _AT, "(step.astype(real) + 1) * unit",
           "learning rates"),
    Mutant("first micro-step of the update", _RATE, _AT, "step.astype(real) * unit",
           "learning rates"),
    Mutant("cosine from the peak to zero", _RATE, "0.5 * (high - low)", "0.5 * high",
           "learning rates"),
    Mutant("warm-up from zero", _RATE, "high * (at + 1)", "high * at",
           "learning rates"),
    Mutant("cosine ends a step early", _RATE, "max(total - warmup, 1)",
           "max(total - warmup - 1, 1)", "learning rates"),
    Mutant("warm-up not taken off", _RATE, "(at - warmup) /", "at /",
           "learning rates"),
    Mutant("schedule in float32", _RATE, "jnp.result_type(float)", "jnp.float32",
           "learning rates"),
    # Clip
    Mutant("clip without 1e-6", "train.optim:clip_coefficient",
           "optim.clip_norm / (norm + 1e-6)",
           "optim.clip_norm / norm", "clip"),
    Mutant("clip that scales up", "train.optim:clip_coefficient",
           "jnp.minimum(1.0, optim.clip_norm / (norm + 1e-6))",
           "optim.clip_norm / (norm + 1e-6)", "clip"),
    Mutant("sum of norms", "train.optim:global_norm",
           "jnp.sqrt(sum(_square_sum(leaf) for leaf in jax.tree.leaves(grads)))",
           "sum(jnp.sqrt(_square_sum(leaf)) for leaf in jax.tree.leaves(grads))",
           "clip"),
    Mutant("norm in float32", "train.optim:_square_sum",
           "jnp.promote_types(x.dtype, jnp.float32)", "jnp.float32", "clip"),
    # Adam
    Mutant("eps before the bias correction", _UPDATE,
           "jnp.sqrt(v) / root_bias2.astype(p.dtype) + optim.eps",
           "(jnp.sqrt(v) + optim.eps) / root_bias2.astype(p.dtype)", "update"),
    Mutant("eps inside the root", _UPDATE, "jnp.sqrt(v) /",
           "jnp.sqrt(v + optim.eps) /", "update"),
    Mutant("no first bias correction", _UPDATE, "(lr / bias1)", "lr", "update"),
    Mutant("no second bias correction", _UPDATE, " / root_bias2.astype(p.dtype)", "",
           "update"),
    Mutant("bias corrections by one beta", _UPDATE,
           "_bias_correction(optim.beta1, count)",
           "_bias_correction(optim.beta2, count)", "update"),
    Mutant("bias correction in float32", "train.optim:_bias_correction",
           "count.astype(jnp.result_type(float))", "count.astype(jnp.float32)",
           "update"),
    Mutant("betas mixed", _UPDATE, "(1 - optim.beta1) * g", "(1 - optim.beta2) * g",
           "update"),
    Mutant("gradient not squared", _UPDATE, "* g * g", "* jnp.abs(g)", "update"),
    Mutant("count begins at 2", _UPDATE, 'opt["count"] + 1', 'opt["count"] + 2',
           "update"),
    Mutant("moments exchanged", _UPDATE, '"m": m, "v": v', '"m": v, "v": m',
           "update"),
    Mutant("clip not applied", _UPDATE, " * clip.astype(p.dtype)", "", "update"),
    # Decay
    Mutant("decay on norm weights", "train.optim:decays",
           '("kernel", "embedding")', '("kernel", "embedding", "weight")', "update"),
    Mutant("no decay on an untied head", "train.optim:decays",
           'in ("kernel", "embedding")',
           'in ("kernel", "embedding") and path[0].key != "output"', "update"),
    Mutant("no decay on the embedding", "train.optim:decays",
           '("kernel", "embedding")', '("kernel",)', "update"),
    Mutant("Adam decays too", _UPDATE, 'optim.algorithm == "adamw" and decays(path)',
           "decays(path)", "update"),
    Mutant("coupled decay", _UPDATE, "* clip.astype(p.dtype)",
           "* clip.astype(p.dtype) + optim.weight_decay * p", "update"),
    Mutant("decay without the learning rate", _UPDATE,
           "(1 - lr * optim.weight_decay)", "(1 - 1e-3 * optim.weight_decay + 0 * lr)",
           "update"),
    Mutant("decay off", _UPDATE, "(1 - lr * optim.weight_decay)", "(1 - 0 * lr)",
           "update"),
    # Step
    Mutant("mean of means for the token mean", _GRADS,
           "jnp.full_like(counts_A, 1) * jnp.maximum(jnp.sum(counts_A), 1)",
           "n_micro * jnp.maximum(counts_A, 1)", "accumulation"),
    Mutant("micro-batches summed", _GRADS, "n_micro * jnp.maximum(counts_A, 1)",
           "jnp.maximum(counts_A, 1)", "accumulation"),
    Mutant("last micro-batch dropped", _GRADS,
           "(batch, per_A, jnp.arange(n_micro)), length=n_micro",
           "jax.tree.map(lambda x: x[:-1], (batch, per_A, jnp.arange(n_micro)))",
           "accumulation"),
    Mutant("padding counted", _GRADS, 'jnp.sum(batch["loss_mask"].astype(jnp.int32)',
           'jnp.sum(jnp.ones_like(batch["loss_mask"], jnp.int32)', "accumulation"),
    Mutant("accumulates in float32", _GRADS, "g.astype(p.dtype)",
           "g.astype(jnp.float32).astype(p.dtype)", "accumulation"),
    Mutant("learning rate of the next step", _STATE, "config.optim, step, total",
           "config.optim, step + 1, total", "one recipe"),
    Mutant("schedule not told of accumulation", _STATE,
           "accumulate=config.train.accumulate", "accumulate=1", "mesh"),
    Mutant("step never clips", _STATE, "optim.clip_coefficient(config.optim, norm)",
           "jnp.ones_like(norm)", "one recipe"),
    Mutant("bad steps applied", _STATE, "jnp.isfinite(loss) & jnp.isfinite(norm)",
           "jnp.isfinite(norm) | True", "skipped"),
    Mutant("bad steps not counted", _STATE, '"step": step + 1',
           '"step": step + good.astype(jnp.int32)', "skipped"),
    Mutant("one dropout for all micro-batches", _GRADS,
           "jax.random.fold_in(key, index)", "key", "dropout"),
    Mutant("one dropout for all steps", _GRADS,
           "jax.random.fold_in(jax.random.key(config.train.seed), step)",
           "jax.random.key(config.train.seed)", "dropout"),
    Mutant("evaluation counts padding", "train.step:build",
           'jnp.sum(micro["loss_mask"].astype(jnp.int32))',
           'jnp.sum(jnp.ones_like(micro["loss_mask"], jnp.int32))', "evaluation"),
    Mutant("a step ignores segments", "train.step:summed_loss",
           'micro.get("segment_ids")', "None", "document gradients"),
    Mutant("nothing to learn from is a NaN", _GRADS,
           "jnp.maximum(jnp.sum(counts_A), 1)", "jnp.sum(counts_A)", "accumulation"),
    # Conversion
    Mutant("no permutation", _OUT, 'row.rotary and format == "llama"', "False",
           "weights"),
    Mutant("queries permuted, keys not", _OUT, 'row.rotary and format == "llama"',
           'row.rotary == "n_heads" and format == "llama"', "weights"),
    Mutant("keys permuted by the queries' heads", _OUT,
           "getattr(config, row.rotary)", "config.n_heads", "weights"),
    Mutant("permuted the wrong way", _OUT, "-1, 2, tensor.shape[1]",
           "2, -1, tensor.shape[1]", "weights"),
    Mutant("GGUF permuted too", _OUT, 'format == "llama"', 'format != "k_model"',
           "weights"),
    Mutant("matrices not transposed", _OUT, "tensor.T if row.matrix else tensor",
           "tensor", "weights"),
    Mutant("import without permutation", _IN, 'row.rotary and format == "llama"',
           "False", "weights"),
    Mutant("layer one further", "convert.names:_name", ".format(i=i)",
           ".format(i=i ^ 1)", "weights"),
    Mutant("Llama's own eps", "convert.configs:llama_config",
           '"rms_norm_eps": config.norm_eps', '"rms_norm_eps": 1e-6', "exported"),
    Mutant("Llama's own base", "convert.configs:llama_config",
           '"rope_type": "default", "rope_theta": config.rope_theta',
           '"rope_type": "default", "rope_theta": 10000.0', "exported"),
    Mutant("imports with its own eps", "convert.configs:config_from_llama",
           'values.get("rms_norm_eps", 1e-6)', "1e-5", "weights"),
    Mutant("imports with its own base", "convert.configs:config_from_llama",
           "_rope_theta(values)", "10000.0", "weights"),
    Mutant("imports with its own length", "convert.configs:config_from_llama",
           'values.get("max_position_embeddings", 2048)', "48", "weights"),
    Mutant("a k_model's eps forgotten", "convert.configs:config_from_k_model",
           "if name in values}", 'if name in values and name != "norm_eps"}',
           "weights"),
    Mutant("every half is bfloat16", "convert.dtypes:as_dtype",
           'name == "bfloat16"', '"16" in name', "weights"),
    Mutant("bfloat16 read as float16", "convert.tensors:_open",
           '_DTYPES[entry["dtype"]], tuple', '_DTYPES[entry["dtype"][-3:]], tuple',
           "weights"),
    # Data
    Mutant("window off by one", _PACKED, "int(index) * self.seq_len",
           "int(index) * self.seq_len + 1", "rows"),
    Mutant("targets between windows lost", _PACKED, "int(index) * self.seq_len",
           "int(index) * (self.seq_len + 1)", "rows"),
    Mutant("a document twice", "data.batches:DocumentRows.__getitem__",
           "bounds(int(index))", "bounds(int(index) // 2 * 2)", "rows"),
    Mutant("the end learned where the seed does not",
           "data.batches:DocumentRows.__getitem__", "end - 1 - start", "end - start",
           "rows"),
    Mutant("targets not shifted", "data.batches:_shifted", "_padded(tokens[1:]",
           "_padded(tokens[:-1]", "rows"),
    Mutant("one padded target bears loss", "data.batches:_shifted", "loss_mask[:n]",
           "loss_mask[: n + 1]", "rows"),
    Mutant("positions run on", _PACKED, "np.arange(n) - starts", "np.arange(n)",
           "rows"),
    Mutant("first token of a document bears loss", _PACKED,
           "document[1:] == document[:-1]", "document[1:] >= document[:-1]", "rows"),
)  # fmt: skip

EQUIVALENT: dict[str, str] = {
    "positions that go on over the documents of a row": (
        "Rotary attention sees differences of positions alone, and isolated documents "
        "see none but their own: 'documents' reads the same to the last digits. That "
        "positions restart is pinned in the data, by 'rows', and that given positions "
        "are used at all by 'cached decode'."
    ),
    "key/value cache in slots beyond a row's end": (
        "Padding of a shorter prompt is written to the cache, but a query sees slots "
        "up to its own position only, and decoding overwrites a slot before any query "
        "reaches it: 'cached decode' prefills such rows and finds them equal."
    ),
    "dropping checkpoint_name, remat='layer' for 'none'": (
        "Rematerialisation decides what is kept, not what is computed: 'fast forms' "
        "runs each choice against the same reference within the same gate."
    ),
    "norm over the stacked layers at once": (
        "The global norm is a sum of squares: stacking layers changes the order of "
        "the sum and nothing else, within the gates of 'clip'."
    ),
}
"""Changes that look like mistakes and are none, each with its argument."""
