"""Images decoded in parallel processes, into memory that they share with the process that computes."""

import math
import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from multiprocessing.connection import wait
from threading import Thread
from typing import Any

import numpy as np

from dcp_zoo.data.images import load_image
from dcp_zoo.deploy.onnx_classifier import crop
from dcp_zoo.errors import ZooError

Batch = tuple[np.ndarray, list[str]]  # pixels, uint8 (n, 3, H, W); and for each image "" or why it cannot be read
METHOD = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"  # fork breaks threads


def decode(paths: Sequence[str], preprocessing: dict[str, Any], batch_size: int, workers: int) -> Iterator[Batch]:
    """Batches of the images, in order. The pixels of a batch are overwritten once the next one is asked for.

    Args:
        paths: for `load_image`.
        preprocessing: timm's input_size and crop_pct.
        batch_size: images per batch, and per task of a worker.
        workers: processes, for which a script needs `if __name__ == "__main__":`; with 0, threads of this process
            decode each batch when it is asked for.

    Raises:
        ZooError: a worker died.
    """
    batches = [paths[start : start + batch_size] for start in range(0, len(paths), batch_size)]
    if workers == 0:
        return _in_threads(batches, preprocessing)
    return _in_processes(batches, preprocessing, min(workers, len(batches)))


def _in_threads(batches: list[Sequence[str]], preprocessing: dict[str, Any]) -> Iterator[Batch]:
    pixels = np.empty((max(map(len, batches), default=0), *preprocessing["input_size"]), np.uint8)
    granted = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]  # set by users, and by Ray to a worker's cores
    with ThreadPoolExecutor(int(granted or 0) or None) as pool:
        for batch in batches:
            yield pixels[: len(batch)], list(pool.map(partial(_read, preprocessing), batch, pixels))


def _in_processes(batches: list[Sequence[str]], preprocessing: dict[str, Any], workers: int) -> Iterator[Batch]:
    slots = 2 * workers + 1  # one in each worker, one waiting for it, one with the consumer
    shape = (slots, max(map(len, batches)), *preprocessing["input_size"])
    context = multiprocessing.get_context(METHOD)
    context.set_forkserver_preload([__name__])
    memory = context.RawArray("B", math.prod(shape))  # has no name that could outlive a killed process
    pixels = np.frombuffer(memory, np.uint8).reshape(shape)
    pool = ProcessPoolExecutor(workers, context, _start_worker, (memory, shape, preprocessing))
    running: deque[tuple[int, Future]] = deque()
    try:
        for number, batch in enumerate(batches):
            if len(running) == slots:
                yield _result(running, pixels)
            running.append((number % slots, pool.submit(_decode_batch, number % slots, batch)))
        while running:
            yield _result(running, pixels)
    finally:
        pool.shutdown(cancel_futures=True)


def _result(running: deque[tuple[int, Future]], pixels: np.ndarray) -> Batch:
    slot, future = running.popleft()
    try:
        reasons = future.result()
    except BrokenProcessPool as error:
        raise ZooError(
            "A process that decodes images was killed, perhaps for lack of memory. Run the same command again, with "
            "fewer --workers if that repeats."
        ) from error
    return pixels[slot, : len(reasons)], reasons


# -------------------------------------------------------------------------------------------------- in a worker process

_slots: np.ndarray
_preprocessing: dict[str, Any]


def _start_worker(memory: Any, shape: tuple[int, ...], preprocessing: dict[str, Any]) -> None:
    global _slots, _preprocessing
    _slots, _preprocessing = np.frombuffer(memory, np.uint8).reshape(shape), preprocessing
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the main process
    Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A worker waits for tasks for ever, even where its parent was killed."""
    parent = multiprocessing.parent_process()
    assert parent
    wait([parent.sentinel])
    os._exit(1)


def _decode_batch(slot: int, paths: Sequence[str]) -> list[str]:
    return [_read(_preprocessing, path, pixels) for path, pixels in zip(paths, _slots[slot], strict=False)]


def _read(preprocessing: dict[str, Any], path: str, pixels: np.ndarray) -> str:
    """Decode an image into pixels (3, H, W); returns why it cannot be read, or ""."""
    try:
        pixels[:] = crop(load_image(path), preprocessing)
    except (ZooError, MemoryError) as error:
        pixels[:] = 0
        return str(error) if isinstance(error, ZooError) else f"{path} is too large for the memory that is left."
    return ""
