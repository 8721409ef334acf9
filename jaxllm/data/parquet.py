"""The column of a Parquet file that holds the texts."""

from collections.abc import Iterator
from typing import Any

from jaxllm.data.sources import Source
from jaxllm.data.unpack import damage_reason, is_damage


def parquet_file(source: Source) -> Any:
    """Opens a Parquet file.

    Raises: ValueError if it is none, or there is no pyarrow.
    """
    try:
        import pyarrow.parquet  # type: ignore[reportMissingImports]
    except ImportError:
        raise ValueError(
            f"input {source.path} is a Parquet file, which needs pyarrow: "
            f"pip install 'jaxllm[parquet]'"
        ) from None
    try:
        return pyarrow.parquet.ParquetFile(source.path)
    except pyarrow.ArrowException as error:
        raise ValueError(
            f"input {source.path} is no Parquet file: {damage_reason(error)}"
        ) from None


def column_values(source: Source, group: int, name: str) -> Iterator[Any]:
    """Gives the values of a column in one row group, a batch of rows at a time.

    A value is UTF-8, perhaps damaged, or None. Where the file cannot be read any
    further the error comes as the last.

    Raises: ValueError if there is no such column, or it holds no text.
    """
    import pyarrow.compute  # type: ignore[reportMissingImports]

    file = parquet_file(source)
    names = [file.schema.column(i).path for i in range(len(file.schema))]
    if name not in names:
        raise ValueError(
            f"input {source.path} has no column {name!r}: name one of "
            f"{', '.join(names)} with --field"
        )
    try:
        for batch in file.iter_batches(1024, row_groups=[group], columns=[name]):
            values = batch.column(0)
            while pyarrow.types.is_struct(values.type):  # a.b is a with only b in it
                values = pyarrow.compute.struct_field(  # type: ignore[attr-defined]
                    values, [0]
                )
            kind = values.type
            if pyarrow.types.is_dictionary(kind):
                kind = kind.value_type
            if str(kind) not in ("string", "large_string", "string_view", "null"):
                raise ValueError(
                    f"column {name!r} of input {source.path} holds {values.type}, no "
                    f"text: name another one with --field"
                )
            # As bytes: a value that is not UTF-8 would fail all of them.
            values = pyarrow.compute.cast(values, pyarrow.large_binary(), safe=False)
            yield from values.to_pylist()
    except Exception as error:
        if not (isinstance(error, pyarrow.ArrowException) or is_damage(error)):
            raise
        yield error
