"""Batches from concurrent requests: whatever waits when the model becomes free is its next batch."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from dcp_zoo.deploy.budget import Full


class Batcher:
    """Runs a model on batches, one at a time, without ever waiting for a batch to fill.

    Args:
        model: batch (B, ...) -> (B, C); called in a thread.
        most: images per batch.
        waiting: images that may wait; one more raises `Full`.
        observe: is told the size of each batch.
    """

    def __init__(
        self, model: Callable[[np.ndarray], np.ndarray], most: int, waiting: int, observe: Callable[[int], object]
    ) -> None:
        self.model, self.most, self.observe = model, most, observe
        self.queue: asyncio.Queue[tuple[np.ndarray, asyncio.Future]] = asyncio.Queue(waiting)
        self.thread = ThreadPoolExecutor(1, "model")
        self.task: asyncio.Task | None = None

    def start(self) -> None:
        self.task = asyncio.get_running_loop().create_task(self._run())

    def stop(self) -> None:
        if self.task:
            self.task.cancel()
        self.thread.shutdown()

    @property
    def alive(self) -> bool:
        return self.task is not None and not self.task.done()

    async def __call__(self, image: np.ndarray) -> np.ndarray:
        """One image (...) -> its row (C,)."""
        future = asyncio.get_running_loop().create_future()
        try:
            self.queue.put_nowait((image, future))
        except asyncio.QueueFull:
            raise Full from None
        return await future

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            batch = [await self.queue.get()]
            while len(batch) < self.most and not self.queue.empty():
                batch.append(self.queue.get_nowait())
            waiting = [(image, future) for image, future in batch if not future.done()]  # others were cancelled
            if not waiting:
                continue
            self.observe(len(waiting))
            try:
                rows: Any = await loop.run_in_executor(
                    self.thread, self.model, np.stack([image for image, _ in waiting])
                )
            except Exception as error:  # the next batch may work
                rows = [error] * len(waiting)
            for (_, future), row in zip(waiting, rows, strict=True):
                if not future.done():
                    (future.set_exception if isinstance(row, Exception) else future.set_result)(row)
