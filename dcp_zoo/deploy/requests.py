"""What a request to the server contains, read within limits; anything else is a 4xx answer that says why."""

import asyncio
import json
import time
from base64 import b64decode
from collections.abc import Awaitable, Callable, Iterable
from typing import Any, TypeVar

from fastapi import HTTPException, Request
from python_multipart.exceptions import MultipartParseError
from starlette.datastructures import UploadFile
from starlette.types import Message

from dcp_zoo.data.images import UnsupportedImage, decode_image
from dcp_zoo.data.paths import is_heif, picture_formats
from dcp_zoo.deploy.limits import Full, Limits
from dcp_zoo.errors import ZooError

DISCARDED = 10
PAUSE = 0.002  # seconds between the parts that are discarded, of all requests together: others come first
JSON_KEYS = ("images", "image", "inputs", "instances")
JSON_HELP = 'Expected {"images": ["<base64>", ...]}, or "inputs" or "instances" in its place.'
OPTIONS_HELP = "Options belong in the URL, such as ?top_k=1."

T = TypeVar("T")
Named = tuple[str, bytes]
discarding: set[int] = set()  # the requests whose rest is being discarded
Take = Callable[..., None]  # see `Budget.share`


async def read_images(request: Request, limits: Limits, take: Take) -> list[Named]:
    """A request's images by name: its body, the files of a form, or those in JSON."""
    try:
        images = await asyncio.wait_for(_read(_limited(request, limits, take), limits), limits.timeout)
    except asyncio.TimeoutError:
        detail = f"The request took longer than {limits.timeout:g} seconds to arrive."
        raise HTTPException(408, detail, {"Connection": "close"}) from None
    if not images:
        raise HTTPException(400, "No image: send one as the body, or several as files of a multipart form.")
    if len(images) > limits.max_images:
        raise HTTPException(413, f"More than {limits.max_images} images in one request.")
    return images


def _limited(request: Request, limits: Limits, take: Take) -> Request:
    """The request, whose bytes are taken as they arrive: 413 or `Full` for too many. The rest is then discarded for a
    while, as most clients read no answer before they have sent everything."""
    too_large = HTTPException(413, f"The request is larger than {limits.max_bytes:,} bytes.", {"Connection": "close"})
    asks, declared = "expect" in request.headers, int(request.headers.get("content-length", 0))
    size, more, end = 0, True, time.monotonic() + 0.9 * limits.timeout

    def check(new: int) -> None:
        if max(size, declared) > limits.max_bytes:
            raise too_large
        take(new, declared)

    async def next_message() -> Message:
        nonlocal size, more
        message = await request.receive()
        size += len(message.get("body", b""))
        more = message.get("more_body", False)
        return message

    async def discard() -> None:
        discarding.add(id(request))
        try:
            while more and size <= DISCARDED * limits.max_bytes and time.monotonic() < end:
                await asyncio.sleep(PAUSE * len(discarding))
                await next_message()
        finally:
            discarding.discard(id(request))

    async def receive() -> Message:
        try:
            if asks:  # this client waits for permission to send, which the first call gives
                check(0)
            message = await next_message()
            check(len(message.get("body", b"")))
        except (HTTPException, Full):
            if not asks:
                await discard()
            raise
        return message

    return Request(request.scope, receive)


async def _read(request: Request, limits: Limits) -> list[Named]:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "multipart/form-data":
        try:
            async with request.form(max_files=limits.max_images, max_fields=limits.max_images) as form:
                if any(not isinstance(part, UploadFile) for part in form.values()):
                    raise HTTPException(400, OPTIONS_HELP)
                parts = [(name, part) for name, part in form.multi_items() if isinstance(part, UploadFile)]
                return [((part.filename or name)[:100], await part.read()) for name, part in parts]
        except MultipartParseError as error:  # of which older versions of starlette make no answer
            raise HTTPException(400, f"No image: the form is damaged ({error}).") from error
    body = await request.body()
    if kind == "application/json" or body.startswith(b"{"):  # as no image does
        return await asyncio.to_thread(_from_json, body, limits)
    return [("image", body)] if body else []


def _from_json(body: bytes, limits: Limits) -> list[Named]:
    """The images in the forms of Hugging Face's and TensorFlow's servers: base64 text, data URIs, {"b64": text}."""
    try:
        document = json.loads(body)
        value = next(document[key] for key in JSON_KEYS if key in document)
        options = document.get("parameters")
    except (ValueError, TypeError, LookupError, StopIteration, RecursionError):
        raise HTTPException(400, f"No image in this JSON. {JSON_HELP}") from None
    if options:
        raise HTTPException(400, OPTIONS_HELP)
    entries = value if isinstance(value, list) else [value]
    if len(entries) > limits.max_images:
        raise HTTPException(413, f"More than {limits.max_images} images in one request.")
    return [_entry(f"image {i}", entry) for i, entry in enumerate(entries, 1)]


def _entry(name: str, entry: object) -> Named:
    text = entry.get("b64") if isinstance(entry, dict) else entry
    if not isinstance(text, str) or not text:
        raise HTTPException(400, f"{name} is not base64 text. {JSON_HELP}")
    if text.startswith(("http://", "https://")):
        raise HTTPException(400, f"This server does not fetch URLs: send the images themselves. {JSON_HELP}")
    try:
        encoded = text.partition(",")[2] if text.startswith("data:") else text
        return name, b64decode("".join(encoded.split()), validate=True)
    except ValueError:
        raise HTTPException(400, f"{name} is not base64, from {text[:20]!r} on. {JSON_HELP}") from None


async def gather(work: Iterable[Awaitable[T]]) -> list[T]:
    """The results of all. When one fails or this is cancelled, the others are."""
    tasks = [asyncio.ensure_future(one) for one in work]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        tasks.clear()


def decode_upload(name: str, data: bytes, limits: Limits, read: Callable = decode_image) -> Any:
    """What `read` makes of an image; HTTPException 415 if it is none, 422 if it is damaged or has too many pixels."""
    try:
        return read(data, name, limits.max_pixels)
    except UnsupportedImage as error:
        what = "HEIC, not" if is_heif(data[:12]) else "not an image in"
        raise HTTPException(415, f"{name} is {what} a supported format ({', '.join(picture_formats())}).") from error
    except ZooError as error:
        raise HTTPException(422, str(error)) from error
