"""One check for values from users or files, by the types of a dataclass or TypedDict and the limits at its fields."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, field, fields, is_dataclass
from functools import cache
from itertools import repeat
from numbers import Integral, Real
from reprlib import repr as shortened
from types import NoneType, UnionType
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints, is_typeddict

from dcp_zoo.errors import ZooError, beyond

NUMBERS: dict[object, Any] = {int: (Integral, 2**63), float: (Real, 1e300)}  # below which NaN is not, either
Values = dict[str, Any]  # by their names, as in JSON or in keyword arguments
WORDS = {bool: "true or false", int: "an integer", float: "a number", str: "a string", NoneType: "null"}


def option(default: object, help: str, **limits: Any) -> Any:
    """A field of a dataclass, limited by `choices`, `min` and `max`."""
    return field(default=default, metadata={"help": help, **limits})


def count(default: int | None, help: str) -> Any:
    """An `option` that is at least 1."""
    return option(default, help, min=1)


def changed(base: type, name: str, default: object) -> Any:
    return field(default=default, metadata=base.__dataclass_fields__[name].metadata)  # type: ignore[attr-defined]


class Checked:
    """Base class of dataclasses whose values are checked whenever one is made."""

    as_dict = asdict

    def __post_init__(self) -> None:
        check(type(self).__name__, problems(vars(self), type(self)))


def check(where: object, wrong: Iterable[str], advice: str = "") -> None:
    """Raise ZooError if problems were found with what is at `where`, such as a file."""
    if text := "; ".join(wrong):
        raise ZooError(" ".join(filter(None, (f"{where}: {text}.", advice))))


def problems(values: object, kind: type, name: str = "") -> Iterator[str]:
    """What is wrong with values that are to be the fields of `kind`: a dataclass, of which some may be missing, or a
    TypedDict, to which more may be added. `name` is that of the values as a whole."""
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
        elif is_typeddict(expected) or is_dataclass(expected):
            yield from problems(values[field_name], expected, place)
        elif wanted := mismatch(values[field_name], expected):
            yield f"{place} must be {wanted}, not {shortened(values[field_name])}"


@cache
def kinds_of(kind: type) -> dict[str, Any]:
    """The type of each field, annotated with its limits."""
    kinds = get_type_hints(kind, include_extras=True)
    limits = {part.name: part.metadata for part in fields(kind) if part.metadata} if is_dataclass(kind) else {}
    return kinds | {name: Annotated[kinds[name], of] for name, of in limits.items()}


def mismatch(value: Any, kind: Any) -> str:
    """What a value should be, by a type and its limits; "" if it is. An integer is a number, too; true is none."""
    of, parts = get_origin(kind), get_args(kind)
    if of is Annotated:
        return mismatch(value, parts[0]) or ("" if value is None else _beyond(value, **parts[-1]))
    if of in (Union, UnionType):
        wrong = [mismatch(value, part) for part in parts]
        return " or ".join(wrong) if all(wrong) else ""
    if of in (dict, list, tuple):  # JSON has lists in place of tuples
        is_one = isinstance(value, dict) if of is dict else isinstance(value, (list, tuple))
        if not is_one or (of is tuple and len(value) != len(parts)):
            return f"a {of.__name__}"
        entries = value.values() if of is dict else value
        kinds = parts if of is tuple else repeat(parts[-1])
        wrong = [text for text in map(mismatch, entries, kinds) if text]
        return f"a {of.__name__}, each {wrong[0]}" if wrong else ""
    if kind in NUMBERS:
        number, limit = NUMBERS[kind]
        is_right = isinstance(value, number) and not isinstance(value, bool) and abs(value) < limit
    else:
        is_right = kind is Any or not isinstance(of or kind, type) or isinstance(value, of or kind)
    return "" if is_right else WORDS.get(kind) or str(kind)


def _beyond(value: Any, choices: tuple = (), min: float | None = None, max: float | None = None, **_: object) -> str:
    return " or ".join(map(str, choices)) if choices and value not in choices else beyond(value, min, max)
