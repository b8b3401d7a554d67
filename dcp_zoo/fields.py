"""One check for values that come from users or files. What they may be is written at the fields of a dataclass or of a
TypedDict: their types, and the limits of `option` or `Annotated`."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import field, fields, is_dataclass
from functools import cache
from numbers import Integral, Real
from reprlib import repr as shortened
from types import NoneType, UnionType
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints, is_typeddict

from dcp_zoo.errors import ZooError

LARGEST = 2**63  # of a number; NaN is not below it, either
NUMBERS: dict[object, Any] = {int: Integral, float: Real}
WORDS = {bool: "true or false", int: "an integer", float: "a number", str: "a string", NoneType: "null"}


def option(default: Any, help: str, *names: str, choices: tuple[Any, ...] = (), **settings: Any) -> Any:
    """A field of a dataclass with its default and help text. `choices`, `min` and `max` limit its values; `names` and
    other settings are those of `typer.Option`."""
    return field(default=default, metadata={"help": help, "names": names, "choices": choices, **settings})


def count(default: int | None, help: str) -> Any:
    """An `option` that is at least 1."""
    return option(default, help, min=1)


class Checked:
    """Base class of dataclasses whose values are checked whenever one is made."""

    def __post_init__(self) -> None:
        check(type(self).__name__, problems(vars(self), type(self)))


def check(where: object, found: Iterable[str], advice: str = "") -> None:
    """Raise ZooError if problems were found with what is at `where`, such as a file."""
    if text := "; ".join(found):
        raise ZooError(" ".join(filter(None, (f"{where}: {text}.", advice))))


def problems(values: Any, kind: type, name: str = "") -> Iterator[str]:
    """What is wrong with values that are to be the fields of `kind`: a dataclass, of which some may be missing, or a
    TypedDict, to which others may be added. `name` is that of the values as a whole."""
    if not isinstance(values, Mapping):
        yield f"{name or 'it'} must be names with values, not {shortened(values)}"
        return
    kinds, prefix = kinds_of(kind), name and f"{name}."
    if is_dataclass(kind):
        yield from (f"{prefix}{given} is none of {', '.join(kinds)}" for given in values if given not in kinds)
    for field_name, expected in kinds.items():
        place = prefix + field_name
        if field_name not in values:
            if field_name in getattr(kind, "__required_keys__", ()):
                yield f"{place} is missing"
        elif is_typeddict(expected):
            yield from problems(values[field_name], expected, place)
        elif not fits(values[field_name], expected):
            yield f"{place} must be {described(expected)}, not {shortened(values[field_name])}"


@cache
def kinds_of(kind: type) -> dict[str, Any]:
    """The type of each field, annotated with its limits."""
    kinds = get_type_hints(kind, include_extras=True)
    limits = {part.name: part.metadata for part in fields(kind) if part.metadata} if is_dataclass(kind) else {}
    return kinds | {name: Annotated[kinds[name], of] for name, of in limits.items()}


def fits(value: Any, kind: Any) -> bool:
    """Whether a value has a type. An integer is a number, too; true and false are none. A tuple may be a list."""
    of, parts = get_origin(kind), get_args(kind)
    if of is Annotated:
        return fits(value, parts[0]) and (value is None or _is_within(value, **parts[-1]))
    if of in (Union, UnionType):
        return any(fits(value, part) for part in parts)
    if of is dict:
        return isinstance(value, dict) and all(fits(k, parts[0]) and fits(v, parts[1]) for k, v in value.items())
    if of is list:
        return isinstance(value, (list, tuple)) and all(fits(entry, parts[0]) for entry in value)
    if of is tuple and Ellipsis not in parts:
        return isinstance(value, (list, tuple)) and len(value) == len(parts) and all(map(fits, value, parts))
    if kind in NUMBERS:
        return isinstance(value, NUMBERS[kind]) and not isinstance(value, bool) and abs(value) < LARGEST
    return kind is Any or not isinstance(of or kind, type) or isinstance(value, of or kind)


def _is_within(value: Any, choices: tuple = (), min: float | None = None, max: float | None = None, **_: Any) -> bool:
    return (not choices or value in choices) and (min is None or value >= min) and (max is None or value <= max)


def described(kind: Any) -> str:
    """A type in words."""
    of, parts = get_origin(kind), get_args(kind)
    if of is Annotated:
        limits = parts[-1]
        if limits.get("choices"):
            return " or ".join(map(str, limits["choices"]))
        ends = [f"at {word} {limits[name]}" for name, word in (("min", "least"), ("max", "most")) if name in limits]
        return ", ".join([described(parts[0]), *ends])
    if of in (Union, UnionType):
        return " or ".join(map(described, parts))
    if of in (dict, list, tuple):
        return f"a {of.__name__}, each {described(parts[-1])}"
    return WORDS.get(kind) or str(kind)
