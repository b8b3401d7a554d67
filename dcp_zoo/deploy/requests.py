"""What a request to the server contains, read within limits; anything else is a 4xx answer that says why."""

import asyncio
import http.client
import json
import urllib.request
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

from fastapi import HTTPException, Request
from PIL import Image
from python_multipart.exceptions import MultipartParseError
from starlette.datastructures import UploadFile
from starlette.types import Message

from dcp_zoo.data.formats import untrusted
from dcp_zoo.data.images import UnsupportedImage, decode_image
from dcp_zoo.deploy.endpoint import Limits
from dcp_zoo.errors import ZooError

DISCARDED = 10
URL_SECONDS = 10  # without progress

Named = tuple[str, bytes]


async def read_images(request: Request, limits: Limits, urls: Sequence[str] = ()) -> list[Named]:
    """The names and bytes of a request's images: its body, the files of a form, or the `urls` of a JSON object.

    Raises:
        HTTPException: 400 without images, 403 an address that is not allowed, 408 too slow, 413 too large or too many.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    body = await read_body(request, limits)
    if kind == "multipart/form-data":
        images = await _files(request, body, limits)
    elif kind == "application/json":
        images = await _from_urls(body, limits, urls)
    else:
        images = [("image", body)] if body else []
    if not images:
        raise HTTPException(400, "No image: send one as the body, or several as files of a multipart form.")
    return images


async def read_body(request: Request, limits: Limits) -> bytes:
    """The whole body; 413 if it is too large, 408 if it is slow.

    A body that is too large is discarded as it arrives, up to `DISCARDED` times the limit: most clients do not read an
    answer before they have sent everything.
    """
    too_large = HTTPException(413, f"The request is larger than {limits.max_bytes:,} bytes.", {"Connection": "close"})
    if int(request.headers.get("content-length", 0)) > limits.max_bytes and "expect" in request.headers:
        raise too_large  # this client waits for permission to send

    async def read() -> bytes:
        body, size = bytearray(), 0
        async for chunk in request.stream():
            size += len(chunk)
            if size <= limits.max_bytes:
                body += chunk
            elif size > DISCARDED * limits.max_bytes:
                break
        if size > limits.max_bytes:
            raise too_large
        return bytes(body)

    try:
        return await asyncio.wait_for(read(), limits.seconds)
    except asyncio.TimeoutError:
        detail = f"The request took longer than {limits.seconds:g} seconds to arrive."
        raise HTTPException(408, detail, {"Connection": "close"}) from None


async def _files(request: Request, body: bytes, limits: Limits) -> list[Named]:
    async def receive() -> Message:
        return {"type": "http.request", "body": body, "more_body": False}

    parsed = Request(request.scope, receive).form(max_files=limits.max_images, max_fields=limits.max_images)
    try:
        async with parsed as form:
            return [
                (f"{(part.filename or name)[:100]}", await part.read())
                for name, part in form.multi_items()
                if isinstance(part, UploadFile)
            ]
    except MultipartParseError as error:  # of which older versions of starlette make no answer
        raise HTTPException(400, f"No image: the form is damaged ({error}).") from error


async def _from_urls(body: bytes, limits: Limits, allowed: Sequence[str]) -> list[Named]:
    if not allowed:
        raise HTTPException(415, "This server does not fetch URLs: send the images themselves.")
    try:
        urls = json.loads(body)["urls"]
        assert isinstance(urls, list)
        assert all(isinstance(url, str) for url in urls)
    except Exception:
        raise HTTPException(400, 'Expected {"urls": ["https://...", ...]}.') from None
    if len(urls) > limits.max_images:
        raise HTTPException(413, f"More than {limits.max_images} images in one request.")
    for url in urls:
        if not url.startswith(tuple(allowed)) or ".." in url or "%" in url:
            raise HTTPException(403, f"{url[:100]} is not below an address that this server may fetch from.")
    return list(await asyncio.gather(*(asyncio.to_thread(fetch_image, url, limits) for url in urls)))


def check_prefix(prefix: str) -> str:
    """A prefix of allowed URLs; ZooError unless it names a host completely."""
    parts = urlsplit(prefix)
    if parts.scheme not in ("http", "https") or not parts.netloc or not parts.path.endswith("/"):
        raise ZooError(
            f"--allow-urls takes the beginning of addresses up to a slash, as in https://host/, not {prefix}."
        )
    return prefix


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *args: Any) -> None:
        return None  # an address that is allowed must not lead to one that is not


def fetch_image(url: str, limits: Limits) -> Named:
    """The name and bytes of an image at an allowed URL, without following redirects; HTTPException 424 if it fails."""
    try:
        with urllib.request.build_opener(_NoRedirect).open(url, timeout=URL_SECONDS) as response:
            data = response.read(limits.max_bytes + 1)
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise HTTPException(424, f"Cannot fetch {url[:100]} ({error}).") from error
    if len(data) > limits.max_bytes:
        raise HTTPException(413, f"{url[:100]} is larger than {limits.max_bytes:,} bytes.")
    return url, data


def decode_upload(name: str, data: bytes, limits: Limits) -> Image.Image:
    """One image; HTTPException 415 if it is not an image, 422 if it is damaged or has too many pixels."""
    try:
        return decode_image(data, name, limits.max_pixels, untrusted())
    except UnsupportedImage as error:
        detail = f"{name} is not an image in a supported format ({', '.join(untrusted())})."
        raise HTTPException(415, detail) from error
    except ZooError as error:
        raise HTTPException(422, str(error)) from error
