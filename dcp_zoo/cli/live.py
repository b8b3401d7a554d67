"""Live display of trials that run in parallel."""

import time
from collections.abc import Iterable, Iterator

from rich.console import Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from dcp_zoo.benchmark.estimate import format_duration
from dcp_zoo.benchmark.sweep import Event
from dcp_zoo.benchmark.trial import Trial
from dcp_zoo.cli.console import errors

ROWS = 20  # running trials displayed


class Board:
    """Which trials are waiting, running, done and failed."""

    def __init__(self, total: int) -> None:
        self.total, self.started = total, time.monotonic()
        self.running: dict[Trial, float] = {}  # start times
        self.finished = {"done": 0, "failed": 0}

    def update(self, event: Event) -> None:
        self.running.pop(event.trial, None)
        if event.state == "running":
            self.running[event.trial] = time.monotonic()
        if event.state in self.finished:
            self.finished[event.state] += 1

    def left(self) -> float | None:
        """Seconds left at the same rate; None before the first trial has finished."""
        finished = sum(self.finished.values())
        return (time.monotonic() - self.started) / finished * (self.total - finished) if finished else None

    def __rich__(self) -> Group:
        now = time.monotonic()
        table = Table("running", "for", box=None, padding=(0, 2, 0, 0))
        for trial, since in list(self.running.items())[:ROWS]:
            table.add_row(trial.key, format_duration(now - since))
        if len(self.running) > ROWS:
            table.add_row(f"and {len(self.running) - ROWS} more", "")
        waiting = self.total - sum(self.finished.values()) - len(self.running)
        done, failed = self.finished.values()
        counts = f"{waiting} waiting, {len(self.running)} running, {done} done, {failed} failed"
        elapsed, left = format_duration(now - self.started), format_duration(self.left())
        return Group(table, Text(f"{counts}; {elapsed} elapsed, {left} left"))


def watch(events: Iterable[Event], total: int) -> Iterator[Event]:
    """Yield the events and display them on the terminal; the times keep updating between events."""
    board = Board(total)
    with Live(board, console=errors, refresh_per_second=2, transient=True):
        for event in events:
            board.update(event)
            yield event
