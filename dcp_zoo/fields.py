"""One check for values from users or files, by the types of a dataclass or TypedDict and the limits at its
fields."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, field, fields, is_dataclass
from functools import cache
from itertools import repeat
from numbers import Integral, Real
from reprlib import repr as shortened
from types import NoneType, UnionType
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints, is_typeddict

from dcp_zoo.errors import ZooError, beyond

NUMBERS: dict[object, Any] = {
    int: (Integral, 2**63),
    float: (Real, 1e300),
}  # below which NaN is not, either
Values = dict[str, Any]  # by their names, as in JSON or in keyword arguments
WORDS = {bool: "true or false", int: "an integer", float: "a number", str: "a string", NoneType: "null"}


def option(default: object, help: str, **limits: Any) -> Any:
    """A field of a dataclass, limited by `choices`, `min` and `max`."""
    return field(default=default, metadata={"help": help, **limits})


def count(default: int | None, help: str) -> Any:
    """An `option` that is at least 1."""
    return option(default, help, min=1)


class Checked:
    """Base class of dataclasses whose values are checked whenever one is made."""

    as_dict = asdict

    def __post_init__(self) -> None:
        check(type(self).__name__, problems(vars(self), type(self)))


def check(where: object, wrong: Iterable[str], advice: str = "") -> None:
    """Raise ZooError if problems were found with what is at `where`, such as a file."""
    text = "; ".join(wrong)
    if text:
        raise ZooError(f"{where}: {text}. {advice}".strip())


def problems(values: object, kind: type, name: str = "") -> Iterator[str]:
    """What is wrong with values that are to be the fields of `kind`: a dataclass, of which some may be
    missing, or a TypedDict, to which more may be added. `name` is that of the values as a whole."""
    if not isinstance(values, Mapping):
        yield f"{name or 'it'} must be names with values, not {shortened(values)}"
        return
    kinds = kinds_of(kind)
    prefix = f"{name}." if name else ""
    if is_dataclass(kind):
        for field_name in values:
            if field_name not in kinds:
                yield f"{prefix}{field_name} is none of {', '.join(kinds)}"
    required = getattr(kind, "__required_keys__", ())  # of a TypedDict
    for field_name, expected in kinds.items():
        full_name = prefix + field_name
        if field_name not in values:
            if field_name in required:
                yield f"{full_name} is missing"
        elif is_typeddict(expected) or is_dataclass(expected):
            yield from problems(values[field_name], expected, full_name)
        else:
            wanted = mismatch(values[field_name], expected)
            if wanted:
                yield f"{full_name} must be {wanted}, not {shortened(values[field_name])}"


@cache
def kinds_of(kind: type) -> dict[str, Any]:
    """The type of each field, annotated with its limits; attributes of a class are no fields."""
    kinds = get_type_hints(kind, include_extras=True)
    if not is_dataclass(kind):
        return kinds
    return {option.name: Annotated[kinds[option.name], option.metadata] for option in fields(kind)}


def mismatch(value: Any, kind: Any) -> str:
    """What a value should be, by a type and its limits; "" if it is. An integer is a number, too; true is
    none."""
    origin = get_origin(kind)
    arguments = get_args(kind)
    if origin is Annotated:
        wrong = mismatch(value, arguments[0])
        if wrong or value is None:
            return wrong
        return _beyond(value, **arguments[-1])
    if origin in (Union, UnionType):
        wrongs = [mismatch(value, argument) for argument in arguments]
        return " or ".join(wrongs) if all(wrongs) else ""
    if origin in (dict, list, tuple):  # JSON has lists in place of tuples
        is_one = isinstance(value, dict) if origin is dict else isinstance(value, (list, tuple))
        if not is_one or (origin is tuple and len(value) != len(arguments)):
            return f"a {origin.__name__}"
        entries = value.values() if origin is dict else value
        kinds = arguments if origin is tuple else repeat(arguments[-1])
        for entry, entry_kind in zip(entries, kinds, strict=False):
            wrong = mismatch(entry, entry_kind)
            if wrong:
                return f"a {origin.__name__}, each {wrong}"
        return ""
    if kind in NUMBERS:
        number, limit = NUMBERS[kind]
        is_right = isinstance(value, number) and not isinstance(value, bool) and abs(value) < limit
    else:
        plain = origin or kind
        is_right = kind is Any or not isinstance(plain, type) or isinstance(value, plain)
    return "" if is_right else WORDS.get(kind) or str(kind)


def _beyond(value: Any, choices: tuple = (), min: float | None = None, max: float | None = None, **_: object) -> str:
    """The limits at a field that a value is outside of, in words; "" if it is not."""
    if choices and value not in choices:
        return " or ".join(map(str, choices))
    return beyond(value, min, max)
