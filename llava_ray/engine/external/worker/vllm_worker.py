"""The worker program for vLLM: its `AsyncLLM` behind the pipe of `pipe.py`.

It runs in vLLM's own environment.
"""

import asyncio
import dataclasses
import json
from collections.abc import AsyncIterator
from typing import Any

from pipe import WorkerPipe, read_images, read_settings, refuse_unknown  # pyright: ignore


class Vllm:
    """vLLM as a `WorkerEngine`."""

    def __init__(self, settings: dict[str, Any]) -> None:
        from vllm import AsyncEngineArgs  # pyright: ignore
        from vllm.v1.engine.async_llm import AsyncLLM  # pyright: ignore

        known = {field.name for field in dataclasses.fields(AsyncEngineArgs)}
        refuse_unknown(settings, known)
        self._engine = AsyncLLM.from_engine_args(AsyncEngineArgs(**settings))
        self._num_running = 0

    async def stream(self, request: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        from vllm.exceptions import VLLMClientError  # pyright: ignore

        prompt: dict[str, Any] = {"prompt_token_ids": request["token_ids"]}
        if request["images"]:
            prompt["multi_modal_data"] = {"image": read_images(request)}
        self._num_running += 1
        try:
            wanted = _describe_sampling(request["sampling"])
            async for out in self._engine.generate(prompt, wanted, request["id"]):
                answer = out.outputs[0]
                yield {
                    "ids": list(answer.token_ids),
                    "finish": answer.finish_reason,
                    "cached": out.num_cached_tokens or 0,
                    "num_prompt_tokens": len(out.prompt_token_ids),
                    "logprobs": _read_logprobs(answer),
                }
        except VLLMClientError as error:
            raise ValueError(str(error)) from error
        finally:
            self._num_running -= 1

    async def check(self) -> dict[str, float]:
        await self._engine.check_health()
        return {"num_running": self._num_running}


def _describe_sampling(asked: dict[str, Any]) -> Any:
    from vllm import SamplingParams  # pyright: ignore
    from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams  # pyright: ignore

    schema = asked.pop("json_schema")
    bias = {int(id_): value for id_, value in asked.pop("logit_bias")}
    return SamplingParams(
        **asked,
        logit_bias=bias or None,
        structured_outputs=StructuredOutputsParams(json=json.loads(schema)) if schema else None,
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
    )


def _read_logprobs(answer: Any) -> list[Any]:
    """Return for each new token its logprob and the most likely (id, logprob), best first."""
    if not answer.logprobs:
        return []
    told = []
    for id_, found in zip(answer.token_ids, answer.logprobs, strict=True):
        ranked = sorted(found.items(), key=lambda entry: entry[1].rank or 0)
        told.append([found[id_].logprob, [[other, entry.logprob] for other, entry in ranked]])
    return told


def main() -> None:
    pipe = WorkerPipe()
    engine = Vllm(read_settings())

    async def run() -> None:
        try:
            await pipe.run(engine)
        finally:
            engine._engine.shutdown()

    asyncio.run(run())


if __name__ == "__main__":  # vLLM imports this module again in its child processes
    main()
