"""Recipes and plans as JSON values, and back."""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Iterator, Mapping
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

T = TypeVar("T")


def to_json(value: Any) -> Any:
    """Dataclasses, tuples and scalars as JSON values."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_json(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, tuple | list):
        return [to_json(item) for item in value]
    return value


def flat(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """The scalars of a JSON value by their dotted names, as options are called: items of a list that have a name go by
    it (phases.last.lr), other lists stay whole."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from flat(item, f"{name}.{key}".lstrip("."))
    elif isinstance(value, list) and value and all(isinstance(item, dict) and "name" in item for item in value):
        for item in value:
            rest = {key: inner for key, inner in item.items() if key != "name"}
            yield from flat(rest, f"{name}.{item['name']}")
    else:
        yield name, value


def not_finite(value: Any, name: str = "") -> Iterator[tuple[str, float]]:
    """Names and values of the numbers that are not finite, which JSON does not have."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        for f in dataclasses.fields(value):
            yield from not_finite(getattr(value, f.name), f"{name}.{f.name}".lstrip("."))
    elif isinstance(value, tuple | list):
        for number, item in enumerate(value):
            yield from not_finite(item, f"{name}.{number}")
    elif isinstance(value, float) and not math.isfinite(value):
        yield name, value


def from_json(kind: type[T], data: Mapping[str, Any]) -> T:
    """The inverse of `to_json` for dataclass `kind`.

    Raises:
        ValueError: a key that `kind` does not have, or a value of another type.
    """
    if not isinstance(data, Mapping):
        raise ValueError(f"{kind.__name__} is {data!r:.80}; it must be an object")
    known = {f.name for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    unknown = sorted(set(data) - known)
    if unknown:
        raise ValueError(f"{kind.__name__} has no field {', '.join(unknown)}; it has {', '.join(sorted(known))}")
    required = sorted(f.name for f in dataclasses.fields(kind) if _is_required(f))  # type: ignore[arg-type]
    lacking = [name for name in required if name not in data]
    if lacking:
        raise ValueError(f"{kind.__name__} has no {', '.join(lacking)}")
    former: dict[str, dict[bool, str]] = getattr(kind, "FORMER", {})
    data = {
        name: former[name][value] if name in former and isinstance(value, bool) else value
        for name, value in data.items()
    }
    hints = get_type_hints(kind)
    return kind(**{name: _from_json(hints[name], value, name) for name, value in data.items()})


def _is_required(field: dataclasses.Field[Any]) -> bool:
    return field.init and field.default is field.default_factory is dataclasses.MISSING


def _from_json(hint: Any, value: Any, name: str) -> Any:
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return from_json(hint, value)
    if get_origin(hint) is tuple:
        inner = get_args(hint)
        if not isinstance(value, list | tuple):
            raise ValueError(f"{name} is {value!r:.80}; it must be a list")
        hints = [inner[0]] * len(value) if len(inner) == 2 and inner[1] is Ellipsis else list(inner)
        if len(hints) != len(value):
            raise ValueError(f"{name} has {len(value)} values; it takes {len(hints)}")
        return tuple(_from_json(h, item, name) for h, item in zip(hints, value, strict=True))
    if get_origin(hint) is Literal:
        if value not in get_args(hint):
            raise ValueError(f"{name} is {value!r:.80}; it must be one of {', '.join(map(str, get_args(hint)))}")
        return value
    # JSON may write a whole number for a float. True and False are ints to Python, and are never meant as numbers.
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        if abs(value) > sys.float_info.max:
            raise ValueError(f"{name} is {value!r:.80}; it must be float")
        return float(value)
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise ValueError(f"{name} is {value!r:.80}; it must be {hint.__name__}")
    return value
