"""Images decoded in parallel processes.

Not by torch's DataLoader: with ONNX Runtime neither this process nor the workers import torch, whose import takes each
of them longer than decoding some hundred images.
"""

import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
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

Decoded = tuple[np.ndarray, list[str]]  # pixels, uint8 (n, 3, H, W); and for each image "" or why it cannot be read
METHOD = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"  # fork breaks threads


def decode_batches(
    paths: Sequence[str], preprocessing: dict[str, Any], batch_size: int, workers: int
) -> Iterator[Decoded]:
    """Batches of the images, in order.

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
        # set by users, and by Ray to a worker's cores
        granted = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]
        with ThreadPoolExecutor(int(granted or 0) or None) as pool:
            for batch in batches:
                yield _stacked(pool.map(partial(_decode, preprocessing), batch))
        return
    workers, context = min(workers, len(batches)), multiprocessing.get_context(METHOD)
    context.set_forkserver_preload([__name__])
    processes = ProcessPoolExecutor(workers, context, _start_worker)
    running: deque[Future[Decoded]] = deque()
    try:
        for batch in batches:
            if len(running) > 2 * workers:  # one in each worker, one waiting for it, one for the consumer
                yield running.popleft().result()
            running.append(processes.submit(_decode_batch, preprocessing, batch))
        while running:
            yield running.popleft().result()
    except BrokenProcessPool as error:
        raise ZooError(
            "A process that decodes images was killed, perhaps for lack of memory. Run the same command again, with "
            "fewer --workers if that repeats."
        ) from error
    finally:
        processes.shutdown(cancel_futures=True)


def _decode(preprocessing: dict[str, Any], path: str) -> tuple[np.ndarray, str]:
    """The pixels (3, H, W) of an image and ""; or zeros, and why it cannot be read."""
    try:
        return crop(load_image(path), preprocessing), ""
    except ZooError as error:
        reason = str(error)
    except MemoryError:
        reason = f"{path} is too large for the memory that is left."
    return np.zeros(preprocessing["input_size"], np.uint8), reason


def _decode_batch(preprocessing: dict[str, Any], paths: Sequence[str]) -> Decoded:
    return _stacked(_decode(preprocessing, path) for path in paths)


def _stacked(images: Iterable[tuple[np.ndarray, str]]) -> Decoded:
    pixels, reasons = zip(*images, strict=True)
    return np.stack(pixels), list(reasons)


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the main process
    Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A worker waits for tasks for ever, even where its parent was killed."""
    parent = multiprocessing.parent_process()
    assert parent
    wait([parent.sentinel])
    os._exit(1)
