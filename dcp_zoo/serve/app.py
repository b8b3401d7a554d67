"""An HTTP server for an exported head: FastAPI and ONNX Runtime, neither torch nor CLIP."""

import asyncio
import ctypes
import json
import platform
import time
from base64 import b64decode
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import yaml
from fastapi import FastAPI, HTTPException, Query, Request, Response
from fastapi.responses import JSONResponse, RedirectResponse
from fastapi_offline import FastAPIOffline
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.process_collector import ProcessCollector
from python_multipart.exceptions import MultipartParseError
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect
from starlette.types import Message

from dcp_zoo.answers import Outputs
from dcp_zoo.data.images import UnsupportedImage, count_pixels, is_heif, picture_formats
from dcp_zoo.errors import ZooError
from dcp_zoo.fields import Values
from dcp_zoo.files import sha256_of
from dcp_zoo.onnx.classifier import OnnxClassifier
from dcp_zoo.prediction import decode
from dcp_zoo.serve import DEFAULT_LIMITS, Limits

BYTES = 64_000_000  # of the bodies of all requests in progress
BATCH, WAITING = 16, 256  # images per batch, and images that may wait; further ones get status 503
REQUEST_IMAGES = 2  # of the most pixels, which a request may have
LARGE = 4_000_000  # pixels of a request, which then leaves threads to the others
DISCARDED = 10  # times the most bytes, which are read of a request that is too large
JSON_KEYS = ("images", "image", "inputs", "instances")
JSON_HELP = 'Expected {"images": ["<base64>", ...]}, or "inputs" or "instances" in its place.'
OPTIONS_HELP = "Options belong in the URL, such as ?top_k=1."
Named = tuple[str, bytes]  # an image of a request


class Service:
    """A loaded file: `answer` answers requests while `running`."""

    def __init__(self, path: Path, limits: Limits, threads: int, name: str, device: str) -> None:
        with suppress(Exception):  # not glibc, which keeps the memory of freed images and bodies for itself
            ctypes.CDLL(None).mallopt(-3, 2**20)  # M_MMAP_THRESHOLD
        self.classifier, self.limits = OnnxClassifier(path, threads, device), limits
        self.free = max(BYTES, 2 * limits.max_bytes)
        self.small, self.large = ThreadPoolExecutor(threads), ThreadPoolExecutor(max(1, threads // 2))
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self.requests = Counter("dcp_requests", "Requests by status.", ["status"], registry=registry)
        self.seconds = Histogram("dcp_request_seconds", "Time from a request to its answer.", registry=registry)
        sizes = Histogram("dcp_batch_images", "Images per batch.", buckets=(1, 2, 4, 8, 16, 32, 64), registry=registry)
        self.batcher = Batcher(self._compute, sizes.observe)
        Gauge("dcp_waiting_images", "Images that wait.", registry=registry).set_function(self.batcher.queue.qsize)
        versions = {"python": platform.python_version()} | {name: version(name) for name in ("dcp_zoo", "onnxruntime")}
        self.info: Values = {
            "head": name if name and not name.endswith(".onnx") else self.classifier.name,
            "classes": self.classifier.classnames,
            "file": path.name,
            "sha256": sha256_of(path),
            "versions": versions,
            "limits": vars(limits),
        }

    @asynccontextmanager
    async def running(self, app: FastAPI) -> AsyncIterator[None]:
        with self.small, self.large:
            self.batching = asyncio.create_task(self.batcher.run())
            yield
            self.batching.cancel()

    async def answer(self, request: Request, top_k: int) -> Response:
        """The answer to a request, which is counted by its status."""
        start, status, held = time.perf_counter(), 500, 0

        def take(size: int) -> bool:
            """Hold so many bytes more, if not more than are left free, so that large requests shut none out."""
            nonlocal held
            if fits := held + size <= self.free - size:
                held, self.free = held + size, self.free - size
            return fits

        try:
            answers = await self.classify(await read_images(request, self.limits, take), top_k)
            status = 200
            return JSONResponse({"images": answers})
        except ClientDisconnect:
            return Response(status_code=(status := 499))  # as nginx calls it; nobody receives it
        except asyncio.QueueFull:
            return JSONResponse({"detail": "Too much is waiting: try again."}, (status := 503), {"Retry-After": "1"})
        except StarletteHTTPException as error:  # FastAPI's, and that of a form that cannot be read
            status = error.status_code
            raise
        finally:
            self.free += held
            self.requests.labels(status).inc()
            self.seconds.observe(time.perf_counter() - start)

    async def classify(self, images: Sequence[Named], top_k: int) -> list[Values]:
        """The names of a request's images with their most probable classes."""
        run, most = asyncio.get_running_loop().run_in_executor, REQUEST_IMAGES * self.limits.max_pixels
        if (pixels := sum(await run(self.small, self._read, count_pixels, images))) > most:
            raise HTTPException(422, f"{pixels:,} pixels in one request, more than the limit of {most:,}.")
        pool = self.large if pixels > LARGE else self.small
        decoded = await run(pool, self._read, self._decode, images)
        found = await asyncio.gather(*map(self.batcher, decoded))
        rows = Outputs.joined(found).rows(self.classifier.classnames, top_k)
        return [{"name": name} | row for (name, _), row in zip(images, rows, strict=True)]

    def _decode(self, data: bytes, name: str, max_pixels: int) -> np.ndarray:
        return decode({"bytes": data, "path": name}, self.classifier.preprocessing, max_pixels)

    def _read(self, read: Callable, images: Sequence[Named]) -> list[Any]:
        """What `read` makes of each image; HTTPException 415 for none, 422 for a damaged one or too many pixels."""
        results = []
        for name, data in images:
            try:
                results.append(read(data, name, self.limits.max_pixels))
            except UnsupportedImage as error:
                what = "HEIC, not" if is_heif(data[:12]) else "not an image in"
                detail = f"{name} is {what} a supported format ({', '.join(picture_formats())})."
                raise HTTPException(415, detail) from error
            except ZooError as error:
                raise HTTPException(422, str(error)) from error
        return results

    def _compute(self, pixels: np.ndarray) -> list[Outputs]:
        """The outputs for each image."""
        found = self.classifier.compute(pixels)
        return [found.of([i]) for i in range(len(pixels))]


def application(
    path: Path,
    limits: Limits = DEFAULT_LIMITS,
    threads: int = 1,
    name: str = "",
    hosts: Sequence[str] = ("*",),
    device: str = "cpu",
) -> FastAPI:
    """The server for a file from `dcp-zoo export`: so many `threads` run the model, and as many decode. It shows
    `name`, by default the file's; clients may call the server by the names `hosts`, such as "*.example.org"."""
    service = Service(path, limits, threads, name, device)
    app = FastAPIOffline(title=service.info["head"], version=version("dcp_zoo"), lifespan=service.running)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(hosts), www_redirect=False)

    @app.get("/", include_in_schema=False)
    async def root() -> RedirectResponse:
        return RedirectResponse("docs")

    @app.post("/predict", **yaml.safe_load((Path(__file__).parent / "predict.yaml").read_text()))
    async def predict(request: Request, top_k: Annotated[int, Query(ge=1)] = 5) -> Response:
        """Classify the image in the body (`curl --data-binary @photo.jpg`) or the files of a form (`curl -F`)."""
        if unknown := [name for name in request.query_params if name != "top_k"]:
            raise HTTPException(422, f"There is no parameter {', '.join(unknown)}: the only one is top_k.")
        return await service.answer(request, top_k)

    @app.get("/health", responses={503: {"description": "the model no longer runs"}})
    async def health() -> dict[str, str]:
        """Whether the server can classify."""
        if service.batching.done():
            raise HTTPException(503, "The model no longer runs.")
        return {"status": "ok"}

    @app.get("/info")
    async def info() -> Values:
        """The head, its classes, the hash of its file, versions and limits."""
        return service.info

    @app.get("/metrics")
    async def metrics() -> Response:
        """Metrics for Prometheus."""
        return Response(generate_latest(service.registry), media_type=CONTENT_TYPE_LATEST)

    return app


class Batcher:
    """Runs a model, batch (B, ...) -> B rows, while `run` does: what waits is its next batch, up to `most` images."""

    def __init__(self, model: Callable, observe: Callable, most: int = BATCH, waiting: int = WAITING) -> None:
        self.model, self.observe, self.most = model, observe, most
        self.queue: asyncio.Queue[tuple[np.ndarray, asyncio.Future]] = asyncio.Queue(waiting)

    async def __call__(self, image: np.ndarray) -> Any:
        """One image (...) -> its row; QueueFull if too many wait."""
        future = asyncio.get_running_loop().create_future()
        self.queue.put_nowait((image, future))
        return await future

    async def run(self) -> None:
        while True:
            batch = [await self.queue.get()]
            while len(batch) < self.most and not self.queue.empty():
                batch.append(self.queue.get_nowait())
            self.observe(len(batch))
            try:
                rows: Sequence[Any] = await asyncio.to_thread(self.model, np.stack([image for image, _ in batch]))
            except Exception as error:  # the next batch may work
                rows = [error] * len(batch)
            for (_, future), row in zip(batch, rows, strict=True):
                if not future.done():  # it was cancelled
                    (future.set_exception if isinstance(row, Exception) else future.set_result)(row)


async def read_images(request: Request, limits: Limits, take: Callable[[int], bool]) -> list[Named]:
    """A request's images by name: its body, files of a form, or those in JSON. QueueFull if `take` refuses a size."""
    try:
        body = await asyncio.wait_for(_body(request, limits, take), limits.timeout)
    except asyncio.TimeoutError:
        raise HTTPException(408, f"Not here within {limits.timeout:g} seconds.", {"Connection": "close"}) from None
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "multipart/form-data":
        images = await _from_form(request, body, limits)
    elif kind == "application/json" or body.startswith(b"{"):  # as no image does
        images = await asyncio.to_thread(_from_json, body)
    else:
        images = [("image", body)] if body else []
    if not images:
        raise HTTPException(400, "No image: send one as the body, or several as files of a multipart form.")
    if len(images) > limits.max_images:
        raise HTTPException(413, f"More than {limits.max_images} images in one request.")
    return images


async def _body(request: Request, limits: Limits, take: Callable[[int], bool]) -> bytes:
    """The bytes of a request. What is too much is read for a while, as most clients send it all, but not kept."""
    most, body, size, fits = limits.max_bytes, bytearray(), 0, True
    async for part in request.stream():
        size += len(part)
        if fits := fits and size <= most and take(len(part)):
            body += part
        elif size > DISCARDED * most:
            break
    if size > most:
        raise HTTPException(413, f"The request is larger than {most:,} bytes.", {"Connection": "close"})
    if not fits:
        raise asyncio.QueueFull
    return bytes(body)


async def _from_form(request: Request, body: bytes, limits: Limits) -> list[Named]:
    async def receive() -> Message:
        return {"type": "http.request", "body": body}

    try:
        again = Request(request.scope, receive)
        async with again.form(max_files=limits.max_images, max_fields=limits.max_images) as form:
            parts = form.multi_items()
            files = [(part.filename or name, await part.read()) for name, part in parts if isinstance(part, UploadFile)]
    except MultipartParseError as error:  # of which older versions of starlette make no answer
        raise HTTPException(400, f"No image: the form is damaged ({error}).") from error
    if len(files) < len(parts):
        raise HTTPException(400, OPTIONS_HELP)
    return [(name[:100], data) for name, data in files]


def _from_json(body: bytes) -> list[Named]:
    """The images in the forms of Hugging Face's and TensorFlow's servers: base64 text, data URIs, {"b64": text}."""
    try:
        document = json.loads(body)
        value = next(document[key] for key in JSON_KEYS if key in document)
        options = document.get("parameters")
    except (ValueError, TypeError, LookupError, AttributeError, StopIteration, RecursionError):
        raise HTTPException(400, f"No image in this JSON. {JSON_HELP}") from None
    if options:
        raise HTTPException(400, OPTIONS_HELP)
    return [_entry(f"image {i}", entry) for i, entry in enumerate(value if isinstance(value, list) else [value], 1)]


def _entry(name: str, entry: object) -> Named:
    text = entry.get("b64") if isinstance(entry, dict) else entry
    if not isinstance(text, str) or not text:
        raise HTTPException(400, f"{name} is not base64 text. {JSON_HELP}")
    try:
        encoded = text.partition(",")[2] if text.startswith("data:") else text
        return name, b64decode("".join(encoded.split()), validate=True)
    except ValueError:
        raise HTTPException(400, f"{name} is not base64, from {text[:20]!r} on. {JSON_HELP}") from None
