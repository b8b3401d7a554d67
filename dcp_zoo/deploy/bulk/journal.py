"""What a run changes in the user's own files, and the way back: a line for each change, written before it is made."""

import errno
import json
import os
import shutil
from base64 import b64decode, b64encode
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from pathlib import Path

import numpy as np

from dcp_zoo.errors import as_zoo_error
from dcp_zoo.fields import Values
from dcp_zoo.files import write_file

ADVICE = "make it writable, and repeat the command"


@dataclass(frozen=True)
class Journal:
    """The changes of a run, in a file of JSON lines."""

    file: Path

    def move(self, source: Path, target: Path) -> None:
        """Move a file to a place where there is none."""
        self._note({"from": os.path.abspath(source), "to": os.path.abspath(target)})  # noqa: PTH100
        _move(source, target)

    def write(self, file: Path, content: bytes) -> None:
        """Replace the content of a file, or create it; without content, remove it. Only what differs is noted."""
        old = file.read_bytes() if file.exists() else b""
        start = _common(old, content)
        end = _common(old[:start:-1], content[:start:-1])
        part = {"start": start, "end": end, "part": b64encode(old[start : len(old) - end]).decode()}
        hashes = {"before": _hash(old), "after": _hash(content)}
        self._note({"file": os.path.abspath(file)} | part | hashes)  # noqa: PTH100
        _write(file, content)

    def _note(self, entry: Values) -> None:
        with self.file.open("a", encoding="utf-8") as lines:
            lines.write(f"\n{json.dumps(entry)}")  # a kill may have left half a line
            lines.flush()
            os.fsync(lines.fileno())


def undo(file: Path) -> tuple[int, list[str]]:
    """Take back the changes of a run, the last first: how many are taken back now, and why others stay. Without others
    the file is removed; with them a later call tries again. ZooError if it is no file of a `Journal`."""
    entries = []
    with as_zoo_error(f"{file} is not the undo file of a run ({{}}): they are called TABLE.undo.jsonl."):
        for line in file.read_text("utf-8").split("\n"):
            with suppress(ValueError):  # half a line, whose change was not made
                entries.append(json.loads(line))
        if not entries or not all(isinstance(entry, dict) and entry.keys() & {"to", "part"} for entry in entries):
            raise ValueError("it has other lines")
    found = [_move_back(entry) if "to" in entry else _write_back(entry) for entry in reversed(entries)]
    if not any(found):
        file.unlink()
    return found.count(""), [problem for problem in found if problem]


def _move_back(entry: Values) -> str:
    """Why it stays, or ""."""
    source, target = Path(entry["from"]), Path(entry["to"])
    if not os.path.lexists(target):
        return "" if os.path.lexists(source) else f"{target} is not there any more."
    if os.path.lexists(source):
        return f"{source} exists again: {target} stays."
    _move(target, source)
    with suppress(OSError):  # other files are there
        target.parent.rmdir()
    return ""


def _write_back(entry: Values) -> str:
    file = Path(entry["file"])
    content = file.read_bytes() if file.exists() else b""
    old = content[: entry["start"]] + b64decode(entry["part"]) + content[len(content) - entry["end"] :]
    if _hash(content) == entry["before"]:
        return ""
    if _hash(content) != entry["after"] or _hash(old) != entry["before"]:
        return f"{file} was changed since: it stays."
    _write(file, old)
    return ""


def _common(one: bytes, other: bytes) -> int:
    """The number of first bytes that both have."""
    length = min(len(one), len(other))
    different = np.frombuffer(one[:length], np.uint8) != np.frombuffer(other[:length], np.uint8)
    return int(different.argmax()) if different.any() else length


def _hash(content: bytes) -> str:
    return sha256(content).hexdigest()


def _write(file: Path, content: bytes) -> None:
    write_file(file, content, ADVICE) if content else file.unlink()


def _move(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        source.rename(target)
    except OSError as error:
        if error.errno != errno.EXDEV:  # another file system
            raise
        write_file(target, partial(shutil.copy2, source), ADVICE)
        source.unlink()
