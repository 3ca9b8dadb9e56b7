"""Bodies of chat completion requests, and the limits that tests parse them with."""

import base64
import io
from typing import Any

from PIL import Image

from llava_ray.config import LimitsConfig

LIMITS = LimitsConfig(max_images=3, max_messages=6)
_BUFFER = io.BytesIO()
Image.new("RGB", (4, 4), "red").save(_BUFFER, "PNG")
PNG = _BUFFER.getvalue()
URL = "data:image/png;base64," + base64.b64encode(PNG).decode()
IMAGE = {"type": "image_url", "image_url": {"url": URL}}
HELLO = {"role": "user", "content": "Hello"}


def body(*messages: Any, **fields: Any) -> dict[str, Any]:
    return {"model": "m", "messages": list(messages) or [HELLO], **fields}
