"""What `/readyz` says of models that respond."""

import asyncio
from types import SimpleNamespace
from typing import Any

import httpx

from llava_ray.config import ModelConfig, ServeConfig
from llava_ray.serve.gateway.deployment import build_api

ENGINE = {"engine": "torch", "device": "cuda (NVIDIA L4)", "graphs": "on"}


class Handle:
    """Stands for the handle of a model's deployment."""

    def __init__(self, **answers: Any) -> None:
        for name, answer in answers.items():
            setattr(self, name, SimpleNamespace(remote=lambda answer=answer: _tell(answer)))

    def options(self, **_: Any) -> "Handle":
        return self


def _tell(answer: Any) -> "asyncio.Future[Any]":
    future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
    future.set_result(answer)
    return future


def test_readiness_says_how_each_model_that_responds_computes():
    model = ModelConfig(path="pet", engine="echo")
    handles: Any = {"pet": Handle(stats={}, describe=ENGINE)}
    transport = httpx.ASGITransport(build_api(ServeConfig(models=[model]), handles))

    async def ask() -> dict[str, Any]:
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return (await client.get("/readyz")).json()

    assert asyncio.run(ask()) == {
        "status": "ready",
        "models": {"pet": "ready"},
        "engines": {"pet": ENGINE},
    }
