"""What a request brings: the bytes of one image, however they are wrapped, and whether they may be decoded.

Nothing here needs Ray or a model. Pillow is imported where it is used: the app is built on the head, too.
"""

from __future__ import annotations

import base64
import binascii
import io
from dataclasses import dataclass
from typing import Any

from starlette.datastructures import UploadFile
from starlette.requests import Request

from serve_apps.openai_api import Refused, wanted_body

# What Pillow reads with code of its own; others start programs (EPS), or are read by no browser.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
# Others have more than 8 bits a channel, and would be cut to white.
MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")
# Of a form or an object, beside the image itself.
WRAPPING = 65536
MOST_LABELS = 1000
FIELDS = ("top_k", "model")


@dataclass(frozen=True)
class Limits:
    """What is taken, as `user_config` has it."""

    max_image_bytes: int
    max_pixels: int
    top_k: int


@dataclass(frozen=True)
class Wanted:
    """An image to be classified; `model` is the one that was asked for, if any was."""

    data: bytes
    top_k: int
    model: str | None


def _too_large(most: int) -> Refused:
    return Refused(f"the image is larger than {most / 2**20:g} MiB", "image", "image_too_large", 413)


async def wanted_image(request: Request, limits: Limits) -> Wanted:
    """The image of a request: its whole body, the file `image` of a form, or base64 in an object. No more is read than
    may be. Refused where there is none, or one too large."""
    most = limits.max_image_bytes
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    fields: dict[str, Any] = dict(request.query_params)
    if kind.startswith("image/") or kind == "application/octet-stream":
        data: Any = await _limited(request, most, most).body()
    elif kind == "multipart/form-data":
        data, more = await _of_form(_limited(request, most + WRAPPING, most))
        fields |= more
    elif kind == "application/json":
        data, more = await _of_object(_limited(request, most * 4 // 3 + WRAPPING, most))
        fields |= more
    else:
        hint = "an image type (such as image/jpeg), multipart/form-data or application/json"
        raise Refused(f"the Content-Type must be {hint}, and is {kind or 'missing'}", code="no_image", status=415)
    unknown = sorted(fields.keys() - set(FIELDS))
    if unknown:
        raise Refused(f"this server knows no {unknown[0]!r}", unknown[0], "unsupported_parameter")
    if len(data) > most:
        raise _too_large(most)
    if not data:
        raise Refused("there is no image in the request", "image", "no_image")
    model = fields.get("model")
    return Wanted(data, wanted_top_k(fields.get("top_k"), limits.top_k), None if model is None else str(model))


def wanted_top_k(given: Any, otherwise: int) -> int:
    if given is None:
        return otherwise
    try:
        # A query and a form have texts only.
        number = int(given) if isinstance(given, str) else given
    except ValueError:
        number = None
    if not isinstance(number, int) or isinstance(number, bool) or not 1 <= number <= MOST_LABELS:
        raise Refused(f"top_k must be a whole number from 1 to {MOST_LABELS}", "top_k")
    return number


def _limited(request: Request, most: int, shown: int) -> Request:
    """The same request, refused as soon as more than `most` bytes are declared or come; `shown` is what is said."""
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > most:
        raise _too_large(shown)
    seen = 0

    async def receive() -> Any:
        nonlocal seen
        message = await request.receive()
        seen += len(message.get("body", b""))
        if seen > most:
            raise _too_large(shown)
        return message

    return Request(request.scope, receive)


async def _of_form(request: Request) -> tuple[bytes, dict[str, Any]]:
    async with request.form(max_files=1, max_fields=len(FIELDS)) as form:
        file = form.get("image")
        if not isinstance(file, UploadFile):
            raise Refused("the form must have a file with the name image", "image", "no_image")
        return await file.read(), {name: value for name, value in form.items() if name != "image"}


async def _of_object(request: Request) -> tuple[bytes, dict[str, Any]]:
    body = await wanted_body(request)
    text = body.pop("image", None) if isinstance(body, dict) else None
    if not isinstance(text, str):
        raise Refused("the body must be an object with the image in base64 as image", "image", "no_image")
    if text.startswith("data:"):
        text = text.partition(",")[2]
    try:
        return base64.b64decode(text, validate=True), body
    except (binascii.Error, ValueError):
        raise Refused("image is no base64", "image", "no_image") from None


def look(data: bytes, max_pixels: int) -> dict[str, Any]:
    """Format, width and height, as the header says them; nothing is decoded. Refused where it may not be."""
    with _opened(data) as image:
        width, height = image.size
        if width * height > max_pixels:
            problem = f"the image has {width} x {height} pixels, and may have {max_pixels} in all"
            raise Refused(problem, "image", "image_too_large", 413)
        if image.mode not in MODES:
            problem = f"the image has more than 8 bits a channel ({image.mode}): convert it first"
            raise Refused(problem, "image", "unsupported_image", 415)
        return {"format": image.format, "width": width, "height": height}


def decoded(data: bytes) -> Any:
    """The image (of several its first) in RGB, upright. Refused where it is broken."""
    from PIL import ImageOps

    with _opened(data) as image:
        try:
            upright = ImageOps.exif_transpose(image)
            return upright.convert("RGB")
        except Exception as error:
            # It is a stranger's: whatever a decoder stumbles over lies in there.
            raise Refused(f"the image cannot be decoded: {error}", "image", "broken_image") from None


def _opened(data: bytes) -> Any:
    from PIL import Image

    # `look` has a limit of its own.
    Image.MAX_IMAGE_PIXELS = None
    try:
        return Image.open(io.BytesIO(data), formats=FORMATS)
    except Exception:
        kinds = f"{', '.join(FORMATS[:-1])} or {FORMATS[-1]}"
        raise Refused(f"this is no image in {kinds}", "image", "unsupported_image", 415) from None
