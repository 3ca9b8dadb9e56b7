"""The HTTP API passes several images to LLaVA-OneVision as in its training."""

import base64
import io
from collections.abc import Iterator

import httpx
import pytest
from PIL import Image

from llava_ray.app import build_app
from llava_ray.config import ModelConfig, ServeConfig
from llava_ray.model.loading import LoadedModel, load_model
from llava_ray.types import ImagePart, Message, TextPart
from tests.support.onevision import CHECKPOINT, read_records
from tests.support.wait import PATIENCE_S, wait_until_ready

pytestmark = pytest.mark.ray

QUESTION = "What is the difference?"


@pytest.fixture(scope="module")
def url(served: str) -> Iterator[str]:
    """Base URL of an application with the golden checkpoint, beside the session's."""
    from ray import serve

    model = ModelConfig(path=str(CHECKPOINT), name="onevision", dtype="float32", num_cpus=0.1)
    app = build_app(ServeConfig(models=[model], page=False))
    serve.run(app, name="onevision", route_prefix="/onevision")
    wait_until_ready(f"{served}/onevision")
    yield f"{served}/onevision"
    serve.delete("onevision")


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    return load_model(CHECKPOINT, dtype="float32", device="cpu")


def encode(image: Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


@pytest.mark.parametrize("num_images", [1, 2, 4])
def test_answers_and_counts_are_those_of_the_model(
    num_images: int, url: str, model: LoadedModel
) -> None:
    images = next(r.images for r in read_records() if len(r.images) == num_images)
    parts = [{"type": "image_url", "image_url": {"url": encode(image)}} for image in images]
    content = [*parts, {"type": "text", "text": QUESTION}]
    body = {
        "model": "onevision",
        "messages": [{"role": "user", "content": content}],
        "temperature": 0,
        "max_tokens": 6,
        "ignore_eos": True,
    }
    reply = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=PATIENCE_S).json()
    asked = Message("user", (*(ImagePart(b"") for _ in images), TextPart(QUESTION)))
    inputs = model.encode(model.template.render((asked,), add_generation_prompt=True), images)
    length = inputs["input_ids"].shape[1]
    assert reply["usage"]["prompt_tokens"] == length
    ids = model.model.generate(
        **inputs, max_new_tokens=6, do_sample=False, eos_token_id=None, repetition_penalty=1.0
    )[0, length:]
    expected = model.tokenizer.decode(ids, skip_special_tokens=True).strip()
    assert reply["choices"][0]["message"]["content"] == expected
