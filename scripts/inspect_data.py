"""Shows what a data folder holds: rows as the model sees them, statistics, sources.

    python scripts/inspect_data.py data/poems
    python scripts/inspect_data.py data/poems --rows 3 --seq-len 64 --layout rows
    python scripts/inspect_data.py data/poems --histogram lengths.png --verify

PATH is a folder that scripts/prepare_data.py made, or the data folder of a demo run.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import command_line
import numpy as np
import tyro

from jaxllm.data.batches import Batches
from jaxllm.data.shards import Manifest, load_manifest, load_tokenizer, verify_hashes
from jaxllm.data.stream import TokenStream
from jaxllm.data.tokenizer import SPECIAL_TOKENS, Tokenizer

LONGEST_ROW = 1 << 20


@dataclass
class Arguments:
    """Shows what a data folder holds."""

    folder: Annotated[Path, tyro.conf.Positional]
    """Data folder made by scripts/prepare_data.py."""
    split: Literal["train", "val"] = "train"
    """Which documents to show."""
    rows: int = 1
    """Rows to show token by token; 0 shows none."""
    first: int = 0
    """Number of the first row, in the order of training with --seed."""
    layout: Literal["packed", "rows"] = "packed"
    """How rows are cut: windows of the stream, or one document a row."""
    seq_len: int = 64
    """Length of a row in tokens."""
    isolate_documents: bool = False
    """Show segments and positions as data.isolate_documents makes them."""
    seed: int = 0
    """Seed of the order of the rows."""
    documents: int = 0
    """Documents to print as text, from the first of the split on."""
    histogram: Path | None = None
    """PNG file to draw the lengths of the documents into."""
    verify: bool = False
    """Read everything and compare it with the hashes in the manifest."""


def main() -> None:
    """Prints what was asked for.

    Raises: ValueError naming the flag, or the folder, and what is wrong with it.
    """
    args = command_line.parse(Arguments, description=__doc__)
    for name in ("rows", "first", "documents"):
        if getattr(args, name) < 0:
            raise ValueError(f"--{name} {getattr(args, name)} must be >= 0")
    if not 1 <= args.seq_len <= LONGEST_ROW:
        raise ValueError(
            f"--seq-len {args.seq_len} must be from 1 to {LONGEST_ROW}: no model's "
            f"context is longer"
        )
    manifest = load_manifest(args.folder)
    if args.verify:
        print(f"verified: {verify_hashes(manifest):,} bytes are as the manifest says\n")
    lengths = show_splits(manifest)
    show_sources(manifest)
    tokenizer = load_tokenizer(manifest)
    if args.documents:
        show_documents(manifest, args.split, tokenizer, args.documents)
    if args.rows:
        show_rows(args, tokenizer)
    if args.histogram:
        draw_histogram(lengths, args.histogram)


def show_splits(manifest: Manifest) -> dict[str, np.ndarray]:
    """Prints counts and lengths of each split; gives the lengths in tokens of text."""
    lengths = {}
    print(f"{'split':>6} {'documents':>12} {'tokens':>15} {'text bytes':>16} "
          f"{'bytes/token':>11}  tokens of text: min / median / p99 / max")  # fmt: skip
    for split, shards in manifest.splits.items():
        if not shards:
            print(f"{split:>6} {0:>12}")
            continue
        blocks = TokenStream(manifest, split).document_lengths()
        found = np.concatenate(list(blocks)) - 2
        lengths[split] = found
        quantiles = np.quantile(found, [0, 0.5, 0.99, 1]).astype(int)
        text_bytes = manifest.text_bytes(split)
        print(
            f"{split:>6} {manifest.documents(split):>12,} "
            f"{manifest.tokens(split):>15,} {text_bytes:>16,} "
            f"{text_bytes / max(found.sum(), 1):>11.3f}  "
            + " / ".join(f"{q:,}" for q in quantiles)
        )
    print(
        f"\n{manifest.records:,} records read: {manifest.quarantined:,} damaged, "
        f"{manifest.empty:,} empty, {manifest.duplicates:,} dropped as copies"
    )
    return lengths


def show_sources(manifest: Manifest, most: int = 20) -> None:
    """Prints each source's share, and how many bytes of it go into a token."""
    print(
        f"\n{'documents':>12} {'tokens':>15} {'bytes/token':>11} {'damaged':>8}  file"
    )
    sources = sorted(manifest.sources, key=lambda source: -source.tokens)
    for source in sources[:most]:
        text_tokens = max(source.tokens - 2 * source.documents, 1)
        print(
            f"{source.documents:>12,} {source.tokens:>15,} "
            f"{source.text_bytes / text_tokens:>11.3f} {source.quarantined:>8,} "
            f"{source.path}"
        )
    if len(sources) > most:
        print(f"{'':>12} and {len(sources) - most:,} more files")


def show_documents(
    manifest: Manifest, split: str, tokenizer: Tokenizer, count: int
) -> None:
    """Prints the first documents of a split as text."""
    if not manifest.splits[split]:
        raise ValueError(f"{manifest.folder} has no {split} documents")
    stream = TokenStream(manifest, split)
    for i in range(min(count, stream.n_documents)):
        start, end = stream.bounds(i)
        text = tokenizer.decode(stream.read(start, end - start))
        print(f"\n---- {split} document {i}: {end - start} tokens ----\n{text}")


def show_rows(args: Arguments, tokenizer: Tokenizer) -> None:
    """Prints rows token by token: input, target, and what else the model gets."""
    batches = Batches(
        args.folder,
        split=args.split,
        layout=args.layout,
        seq_len=args.seq_len,
        batch_size=1,
        seed=args.seed,
        isolate_documents=args.isolate_documents,
    )
    print(
        f"\n{args.split}, {args.layout}: {batches.n_rows:,} rows of {args.seq_len} "
        f"tokens an epoch, {batches.n_tokens:,} targets bear loss "
        f"({batches.n_tokens / batches.n_rows / args.seq_len:.1%} of the places)"
    )
    for number in range(args.first, args.first + args.rows):
        row = {name: array[0] for name, array in batches[number].items()}
        extra = [name for name in ("segment_ids", "positions") if name in row]
        print(f"\nrow {number}")
        print(f"{'place':>6} {'input':>24} {'target':>24} loss  {'  '.join(extra)}")
        for place in range(args.seq_len):
            pair = (piece(tokenizer, int(row[n][place])) for n in ("inputs", "targets"))
            loss = "yes" if row["loss_mask"][place] else "-"
            more = "  ".join(f"{row[name][place]:>{len(name)}}" for name in extra)
            line = f"{place:>6} " + " ".join(f"{text:>24}" for text in pair)
            print(f"{line} {loss:>4}  {more}".rstrip())


def piece(tokenizer: Tokenizer, token: int) -> str:
    """Writes an id and the text behind it on one line."""
    special = token < len(SPECIAL_TOKENS)
    text = tokenizer.decode([token], skip_special=False)
    return f"{token} {text if special else repr(text)}"


def draw_histogram(lengths: dict[str, np.ndarray], path: Path) -> None:
    """Draws the lengths of the documents, in tokens of text, on a logarithmic axis."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    longest = max(int(found.max()) for found in lengths.values())
    edges = np.geomspace(1, longest + 1, 60).tolist()
    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    for split, found in lengths.items():
        label = f"{split}: {len(found):,} documents"
        axes.hist(np.maximum(found, 1), bins=edges, label=label, histtype="step")
    axes.set(xscale="log", yscale="log", xlabel="tokens of text", ylabel="documents")
    axes.legend()
    figure.savefig(path, dpi=120, format="png")
    pyplot.close(figure)
    print(f"\nlengths of the documents: {path}")


if __name__ == "__main__":
    command_line.run(main)
