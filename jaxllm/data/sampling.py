"""A sample of the corpus for the tokenizer, even over all of it."""

from collections.abc import Iterator

from jaxllm.data.parts import Plan
from jaxllm.data.reading import Part, read_units
from jaxllm.data.records import Damage, Text, read_records

_SPARE = 4
"""Times the sample that is looked at, so that cutting parts short loses little."""


def sample_texts(plan: Plan, sample_bytes: int) -> tuple[list[str], list[Damage]]:
    """Takes every n-th document, n the power of two that gives about `sample_bytes`.

    Of a corpus much larger than the sample only the beginning of every part is looked
    at, and of plain files only that is read; compressed ones have to be unpacked.
    Also gives the damage that was met, for the case that there is no text at all.
    """
    kept: list[str] = []
    damaged: list[Damage] = []
    total = seen = 0
    every = 1
    for record in _look(plan, sample_bytes):
        if isinstance(record, Damage):
            damaged.append(record)
        else:
            if seen % every == 0:
                kept.append(record.text)
                total += len(record.data)
            seen += 1
        while total > 2 * sample_bytes and len(kept) > 1:
            every *= 2
            kept = kept[::2]
            total = sum(len(text.encode()) for text in kept)
    if total > sample_bytes:
        share = sample_bytes / total
        kept = [
            text
            for i, text in enumerate(kept)
            if int((i + 1) * share) > int(i * share) or i == 0
        ]
    return kept, damaged


def _look(plan: Plan, sample_bytes: int) -> Iterator[Text | Damage]:
    """Walks the records of the beginnings of all parts."""
    options = plan.options
    size = sum(source.bytes for source in plan.sources)
    share = min(1.0, _SPARE * sample_bytes / size)
    stretch = max(int(share * options.part_bytes), 1 << 16)
    for part in read_units(
        plan.sources,
        plan.units,
        lambda name: True,
        part_bytes=options.part_bytes,
        line_bytes=options.line_bytes,
        field=options.field,
        stretch=stretch if share < 1 else options.part_bytes,
    ):
        for segment in _spread(part, share):
            for record in read_records(segment, options.field, options.line_bytes):
                if record is not None:
                    yield record


def _spread(part: Part, share: float) -> list:
    """Takes a share of a bundle's files; a part of one file is cut short already."""
    return part.segments[:: max(round(1 / share), 1)]
