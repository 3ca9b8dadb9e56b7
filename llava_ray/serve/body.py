"""The body of a request, read no further than is allowed."""

from fastapi import Request

from llava_ray.errors import RequestTooLargeError


async def read_body(request: Request, *, max_bytes: int) -> bytes:
    """Return the body of a request; reading stops where it becomes too large.

    Raises:
        RequestTooLargeError: it has, or says that it has, more than `max_bytes`.
    """
    declared = request.headers.get("content-length", "")
    num_bytes = int(declared) if declared.isascii() and declared.isdigit() else 0
    pieces = []
    if num_bytes <= max_bytes:
        num_bytes = 0
        async for piece in request.stream():
            pieces.append(piece)
            num_bytes += len(piece)
            if num_bytes > max_bytes:
                break
        else:
            return b"".join(pieces)
    raise RequestTooLargeError(
        f"the body has more than the {max_bytes:,} bytes allowed: send fewer or smaller pictures"
    )
