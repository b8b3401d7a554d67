"""Class names, and descriptions of classes, from a file."""

import json
import re
from pathlib import Path

from dcp_zoo.errors import ZooError

CUPL = 'JSON as of CuPL, {"class name": ["sentence", "another sentence"]}'


def read_classnames(path: str | Path) -> list[str]:
    """Class names from a file: a JSON list, CoOp's ImageNet file (`n01440764 tench`), or one name per line.

    Raises:
        ZooError: no such file, or no names in it.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
        names = json.loads(text) if text.lstrip().startswith("[") else text.splitlines()
    except (OSError, ValueError, RecursionError) as error:
        raise ZooError(f"Cannot read class names from {path} ({error}). Use a text file, one name per line.") from error
    names = [name for line in names if (name := line.strip() if isinstance(line, str) else line) != ""]
    if not any(names) or not all(isinstance(name, str) for name in names):
        raise ZooError(f"{path} must be a list of class names: one name per line, or a JSON list of names.")
    if all(re.match(r"n\d{8}\s", name) for name in names):
        return [name.split(maxsplit=1)[1] for name in names]
    return names


def read_descriptions(path: str | Path) -> dict[str, list[str]]:
    """Sentences by class name from a file in the format of CuPL: `{"class name": ["sentence", ...], ...}`.

    Raises:
        ZooError: no such file, another format, or a class without sentences.
    """
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise ZooError(f"Cannot read descriptions from {path} ({error}). Use {CUPL}.") from error
    lists = found.values() if isinstance(found, dict) else [None]
    if not found or not all(isinstance(s, list) and all(isinstance(text, str) for text in s) for s in lists):
        raise ZooError(f"{path} has no descriptions: use {CUPL}.")
    if empty := [name for name, sentences in found.items() if not sentences or not all(map(str.strip, sentences))]:
        raise ZooError(
            f"{path} has an empty list or sentence for {', '.join(map(repr, empty[:5]))}: write one or more."
        )
    return found
