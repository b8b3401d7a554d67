"""What a run changes in the user's own files, and the way back: a line for each change, written before it is made."""

import errno
import filecmp
import json
import os
import shutil
from base64 import b64decode, b64encode
from collections.abc import Mapping
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
    of: str = ""  # the image for which they are made, if they are taken back image by image

    def move(self, source: Path, target: Path) -> None:
        """Move a file to a place where there is none."""
        self.note({"from": os.path.abspath(source), "to": os.path.abspath(target)})  # noqa: PTH100
        _move(source, target)

    def write(self, file: Path, content: bytes) -> None:
        """Replace the content of a file, or create it; without content, remove it. Only what differs is noted."""
        old = file.read_bytes() if file.exists() else b""
        start = _common(old, content)
        end = _common(old[:start:-1], content[:start:-1])
        part = {"start": start, "end": end, "part": b64encode(old[start : len(old) - end]).decode()}
        hashes = {"before": _hash(old), "after": _hash(content)}
        self.note({"file": os.path.abspath(file)} | part | hashes)  # noqa: PTH100
        _write(file, content)

    def note(self, entry: Values) -> None:
        """Write a line, also of something else than a change."""
        with self.file.open("a", encoding="utf-8") as lines:
            lines.write(f"\n{json.dumps(entry | {'of': self.of})}")  # a kill may have left half a line
            lines.flush()
            os.fsync(lines.fileno())


def lines_of(file: Path) -> list[Values]:
    """The lines of a journal; ZooError for another file."""
    lines = []
    with as_zoo_error(f"{file} is not the undo file of a run ({{}}): they are called TABLE.undo.jsonl."):
        for line in file.read_text("utf-8").split("\n"):
            with suppress(ValueError):  # half a line, whose change was not made
                lines.append(json.loads(line))
        if not lines or not all(isinstance(line, dict) and "of" in line for line in lines):
            raise ValueError("it has other lines")
    return lines


def undo(file: Path, of: str = "") -> tuple[int, list[str]]:
    """Take back the changes of a run, or those for one image, the last first: how many are taken back now, and why
    others stay. The file keeps these, so that a later call tries again; without others it is removed. ZooError if it is
    no file of a `Journal`."""
    lines, stay, problems, done = lines_of(file), list[Values](), list[str](), 0
    # what a call that was stopped has moved back
    back = {line["to"]: line["from"] for line in lines if "to" in line and not os.path.lexists(line["to"])}
    for line in reversed(lines):
        problem = ""
        if is_change := not line.keys().isdisjoint({"to", "part"}) and of in ("", line["of"]):
            problem = _move_back(line) if "to" in line else _write_back(line, back)
            done += not problem
        problems += [problem] if problem else []
        stay += [line] if problem or not is_change else []
    if not of and not problems:
        file.unlink()
    elif done:
        write_file(file, "\n".join(map(json.dumps, reversed(stay))), ADVICE)
    return done, problems


def _move_back(entry: Values) -> str:
    """Why it stays, or ""."""
    source, target = Path(entry["from"]), Path(entry["to"])
    if not os.path.lexists(target):
        return "" if os.path.lexists(source) else f"{target} is not there any more."
    if os.path.lexists(source):
        if not filecmp.cmp(source, target, shallow=False):
            return f"{source} exists again: {target} stays."
        target.unlink()  # copied to another file system, but not moved
    else:
        _move(target, source)
    remove_emptied(target.parent)
    return ""


def remove_emptied(folder: Path) -> None:
    """Remove a folder from which a file was moved, and the one of its class, if that is by date, unless other files are
    there."""
    with suppress(OSError):
        folder.rmdir()
        folder.parent.rmdir()


def _write_back(entry: Values, back: Mapping[str, str]) -> str:
    file = Path(back.get(entry["file"], entry["file"]))
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
