import pathlib
import typing

from .clip import FrozenCLIP as FrozenCLIP

MINI_WEIGHTS: pathlib.Path
MINI_CFG: dict[str, typing.Any]
