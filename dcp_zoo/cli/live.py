"""What there is to see while trials run side by side."""

import time
from collections.abc import Iterable, Iterator

from rich.console import Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from dcp_zoo.benchmark.estimate import in_words
from dcp_zoo.benchmark.sweep import Event, Trial
from dcp_zoo.cli.console import errors

ROWS = 20  # running trials that are shown


class Board:
    """Which trials wait, run, are done and have failed."""

    def __init__(self, total: int) -> None:
        self.total, self.started = total, time.monotonic()
        self.running: dict[Trial, float] = {}  # since when
        self.over = {"done": 0, "failed": 0}

    def take(self, event: Event) -> None:
        self.running.pop(event.trial, None)
        if event.state == "running":
            self.running[event.trial] = time.monotonic()
        if event.state in self.over:
            self.over[event.state] += 1

    def left(self) -> float | None:
        """Seconds that the rest takes at the same pace; None before the first trial has ended."""
        over = sum(self.over.values())
        return (time.monotonic() - self.started) / over * (self.total - over) if over else None

    def __rich__(self) -> Group:
        now = time.monotonic()
        table = Table("running", "for", box=None, padding=(0, 2, 0, 0))
        for trial, since in list(self.running.items())[:ROWS]:
            table.add_row(trial.key, in_words(now - since))
        if len(self.running) > ROWS:
            table.add_row(f"and {len(self.running) - ROWS} more", "")
        waiting = self.total - sum(self.over.values()) - len(self.running)
        counts = (
            f"{waiting} waiting, {len(self.running)} running, {self.over['done']} done, {self.over['failed']} failed"
        )
        return Group(table, Text(f"{counts}; {in_words(now - self.started)} elapsed, {in_words(self.left())} left"))


def watch(events: Iterable[Event], total: int) -> Iterator[Event]:
    """Pass events on, with a board of them on the terminal. Its clock runs while no event comes."""
    board = Board(total)
    with Live(board, console=errors, refresh_per_second=2, transient=True):
        for event in events:
            board.take(event)
            yield event
