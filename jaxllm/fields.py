"""Fields of configuration dataclasses: their checks, and their form as JSON."""

import dataclasses
import json
from typing import Any, Literal, get_args, get_origin, get_type_hints


def to_json(config: Any) -> str:
    """Writes a configuration dataclass as JSON text, keys in field order."""
    return json.dumps(dataclasses.asdict(config), indent=2) + "\n"


def from_dict(cls: type, values: dict[str, Any], *, where: str = "config") -> Any:
    """Builds the configuration dataclass `cls` from a nested dict.

    Raises: ValueError naming a key that `cls` does not have. Missing keys take their
    defaults, so that older files stay readable.
    """
    if not isinstance(values, dict):
        raise ValueError(f"{where} must be a JSON object, got {type(values).__name__}")
    fields = {f.name: f for f in dataclasses.fields(cls)}
    unknown = sorted(set(values) - set(fields))
    if unknown:
        raise ValueError(
            f"{where} has the unknown key {unknown[0]!r}: {cls.__name__} knows "
            f"{', '.join(fields)}"
        )
    built = {}
    for name, value in values.items():
        kind = fields[name].type
        nested = isinstance(kind, type) and dataclasses.is_dataclass(kind)
        built[name] = (
            from_dict(kind, value, where=f"{where}.{name}")  # type: ignore[arg-type]
            if nested
            else value
        )
    return cls(**built)


def require_int(
    name: str, value: object, *, at_least: int, at_most: int = 2**31 - 1
) -> None:
    """Raises ValueError unless the field `name` holds an integer within bounds; the
    upper one is by default what the step counter and array shapes can hold."""
    if isinstance(value, bool) or not isinstance(value, int) or value < at_least:
        raise ValueError(f"{name}={value!r} must be an integer >= {at_least}")
    if value > at_most:
        raise ValueError(f"{name}={value!r} must be at most {at_most}: lower it")


def require_choices(where: str, config: Any) -> None:
    """Raises ValueError unless every Literal field has one of its values."""
    for name, kind in get_type_hints(type(config)).items():
        if get_origin(kind) is Literal and getattr(config, name) not in get_args(kind):
            raise ValueError(
                f"{where}.{name}={getattr(config, name)!r} must be one of "
                f"{', '.join(map(str, get_args(kind)))}"
            )
