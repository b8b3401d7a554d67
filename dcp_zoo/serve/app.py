"""An HTTP server for an exported head: FastAPI and ONNX Runtime, neither torch nor CLIP."""

import asyncio
import ctypes
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import numpy as np
import yaml
from fastapi import FastAPI, HTTPException, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi_offline import FastAPIOffline
from pydantic import BaseModel, Field
from python_multipart.exceptions import MultipartParseError
from starlette.datastructures import UploadFile
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect
from starlette.types import Message

from dcp_zoo.answers import Outputs, Promises, Row
from dcp_zoo.data.images import UnsupportedImage
from dcp_zoo.errors import ZooError, attempted
from dcp_zoo.features.photos import pixels_of
from dcp_zoo.fields import Values
from dcp_zoo.prediction.onnx import OnnxClassifier
from dcp_zoo.serve import DEFAULT_LIMITS, Limits

BYTES = 64_000_000  # of the bodies of all requests in progress
BATCH = 16  # images
WAITING = 256  # images that may wait; further ones get status 503


class Asked(BaseModel, extra="forbid"):
    """The parameters of a request."""

    top_k: int = Field(5, ge=1)
    sets: float | None = None


class Service:
    """A loaded file: `answer` answers requests while `running`."""

    def __init__(self, classifier: OnnxClassifier, limits: Limits, threads: int) -> None:
        with suppress(Exception):  # not glibc, which keeps the memory of freed images and bodies for itself
            ctypes.CDLL(None).mallopt(-3, 2**20)  # M_MMAP_THRESHOLD
        self.classifier = classifier
        self.limits = limits
        self.decoding = asyncio.Semaphore(threads)
        self.free = max(BYTES, 2 * limits.max_bytes)
        self.queue: asyncio.Queue[tuple[np.ndarray, asyncio.Future]] = asyncio.Queue(WAITING)

    @asynccontextmanager
    async def running(self, app: FastAPI) -> AsyncIterator[None]:
        self.batching = asyncio.create_task(self._classify())
        yield
        self.batching.cancel()

    async def answer(self, request: Request, top_k: int, promises: Promises) -> Response:
        """The images of a request with their most probable classes; of a form also why an image cannot be
        read, unless that holds for all, which is a ZooError."""
        request.state.held = 0  # bytes of the body
        try:
            body = await asyncio.wait_for(self._body(request), self.limits.timeout)
            images = await images_of(request, body, self.limits.max_images)
            answers = await asyncio.gather(*(self._answer_one(image, top_k, promises) for image in images))
            refused = [answer for answer in answers if isinstance(answer, ZooError)]
            if len(refused) == len(answers):
                raise refused[0]
            rows = []
            for image, answer in zip(images, answers, strict=True):
                told: Values = {"error": str(answer)} if isinstance(answer, ZooError) else {**answer}
                rows.append({"name": image["path"]} | told)
            return JSONResponse({"images": rows})
        except ClientDisconnect:
            return Response(status_code=499)  # as nginx calls it; nobody receives it
        except asyncio.TimeoutError:
            raise HTTPException(408, "It arrives too slowly.", {"Connection": "close"}) from None
        except asyncio.QueueFull:
            raise HTTPException(503, "Too much is waiting: try again.", {"Retry-After": "1"}) from None
        finally:
            self.free += request.state.held

    async def _body(self, request: Request) -> bytes:
        """The bytes of a request, at most half of those that are left, so that large requests shut none
        out. What is too much is read, as most clients send it all, but not kept."""
        most = self.limits.max_bytes
        body = bytearray()
        size = 0
        fits = True
        async for part in request.stream():
            size += len(part)
            fits = fits and size <= most and size <= self.free - len(part)
            if fits:
                body += part
                self.free -= len(part)
                request.state.held = size
        if size > most:
            raise HTTPException(413, f"The request is larger than {most:,.0f} bytes.")
        if not fits:
            raise asyncio.QueueFull
        return bytes(body)

    async def _answer_one(self, image: Values, top_k: int, promises: Promises) -> Row | ZooError:
        """The answer for an image, or why it cannot be read."""
        preprocessing = self.classifier.preprocessing
        async with self.decoding:
            pixels = await asyncio.to_thread(attempted, pixels_of, image, preprocessing, self.limits.max_pixels)
        if isinstance(pixels, ZooError):
            return pixels
        begun = asyncio.Future[tuple[asyncio.Task[Outputs], int]]()
        self.queue.put_nowait((pixels, begun))
        computing, position = await begun
        outputs = await asyncio.shield(computing)  # others wait for it, too
        return outputs.of([position]).rows(self.classifier.classnames, top_k, promises)[0]

    async def _classify(self) -> None:
        """Classify what waits as one batch, again and again."""
        while True:
            batch = [await self.queue.get()]
            while len(batch) < BATCH and not self.queue.empty():
                batch.append(self.queue.get_nowait())
            pixels = np.stack([one for one, _ in batch])
            computing = asyncio.create_task(asyncio.to_thread(self.classifier.compute, pixels))
            for i, (_, begun) in enumerate(batch):
                if not begun.done():  # it was cancelled
                    begun.set_result((computing, i))
            await asyncio.wait([computing])  # if it fails, those who wait for it are told, and the next batch may work


async def images_of(request: Request, body: bytes, most: int) -> list[Values]:
    """The names and bytes of a request's images: its body, or the files of its form, at most so many."""
    if not request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
        images = [{"path": "image", "bytes": body}] if body else []
    else:

        async def receive() -> Message:
            return {"type": "http.request", "body": body}

        try:
            async with Request(request.scope, receive).form(max_files=most, max_fields=most) as form:
                files = [part for _, part in form.multi_items() if isinstance(part, UploadFile)]
                images = [{"path": f"{file.filename}"[:100], "bytes": await file.read()} for file in files]
        except MultipartParseError as error:  # of which older versions of starlette make no answer
            raise HTTPException(400, f"No image: the form is damaged ({error}).") from error
    if not images:
        raise HTTPException(400, "No image: send one as the body, or several as files of a multipart form.")
    return images


def application(
    path: Path,
    limits: Limits = DEFAULT_LIMITS,
    threads: int = 1,
    name: str = "",
    hosts: Sequence[str] = ("*",),
    device: str = "cpu",
) -> FastAPI:
    """The server for a file from `dcp-zoo export`: so many `threads` run the model, and as many decode.
    It shows `name`, by default the file's; clients may call the server by the names `hosts`, such as
    "*.example.org"."""
    classifier = OnnxClassifier(path, threads, device)
    service = Service(classifier, limits, threads)
    app = FastAPIOffline(title=name or classifier.name, version=version("dcp_zoo"), lifespan=service.running)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(hosts), www_redirect=False)

    @app.post("/predict", **yaml.safe_load((Path(__file__).parent / "predict.yaml").read_text()))
    async def predict(request: Request, asked: Annotated[Asked, Query()]) -> Response:
        """Classify the image in the body (`curl --data-binary @photo.jpg`) or the files of a form (`curl
        -F`)."""
        return await service.answer(request, asked.top_k, Promises.of(classifier.promises, asked.sets))

    @app.exception_handler(RequestValidationError)
    async def refuse_parameter(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        return JSONResponse({"detail": f"{first['loc'][-1]}: {first['msg']}."}, 422)

    @app.exception_handler(ZooError)
    async def refuse_image(request: Request, error: ZooError) -> Response:
        """No image, a damaged one or one of too many pixels; or sets that the head does not promise."""
        return JSONResponse({"detail": str(error)}, 415 if isinstance(error, UnsupportedImage) else 422)

    @app.get("/health", responses={503: {"description": "the model no longer runs"}})
    async def health() -> Values:
        """Whether the server can classify, the file that it serves, and the classes of its head."""
        if service.batching.done():
            raise HTTPException(503, "The model no longer runs.")
        return {"head": app.title, "file": path.name, "classes": classifier.classnames}

    return app
