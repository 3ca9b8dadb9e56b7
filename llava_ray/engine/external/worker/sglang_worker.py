"""The worker program for SGLang: its `Engine` behind the pipe of `pipe.py`.

It runs in SGLang's own environment.
"""

import inspect
import os
from collections.abc import AsyncIterator
from typing import Any

from pipe import WorkerPipe, read_images, read_settings, refuse_unknown  # pyright: ignore


class Sglang:
    """SGLang as a `WorkerEngine`."""

    def __init__(self, settings: dict[str, Any]) -> None:
        import sglang  # pyright: ignore
        from sglang.srt.server_args import ServerArgs  # pyright: ignore

        refuse_unknown(settings, inspect.signature(ServerArgs).parameters)
        self._engine = sglang.Engine(**settings)
        self.loop = self._engine.loop
        self._num_running = 0

    async def stream(self, request: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        asked = request["sampling"]
        prompt = (
            {"prompt": request["text"]}  # with images, SGLang takes text only
            if request["images"]
            else {"input_ids": request["token_ids"]}
        )
        num_told = 0
        self._num_running += 1
        is_over = False
        try:
            answers = await self._engine.async_generate(
                **prompt,
                image_data=read_images(request) or None,
                sampling_params=_describe_sampling(asked),
                return_logprob=asked["logprobs"] is not None,
                top_logprobs_num=asked["logprobs"] or 0,
                stream=True,
                rid=request["id"],
            )
            async for out in answers:
                about = out["meta_info"]
                ids = out["output_ids"][num_told:]
                reason = about["finish_reason"]
                is_over = reason is not None
                if is_over and reason["type"] == "abort":
                    raise ValueError(reason.get("message", "SGLang has aborted the request"))
                yield {
                    "ids": ids,
                    "finish": reason["type"] if is_over else None,
                    "cached": about.get("cached_tokens", 0),
                    "num_prompt_tokens": about["prompt_tokens"],
                    "logprobs": _read_logprobs(about, num_told, len(ids)),
                }
                num_told += len(ids)
        finally:
            self._num_running -= 1
            if not is_over:
                self._engine.tokenizer_manager.abort_request(request["id"])

    async def check(self) -> dict[str, float]:
        for pid in self._engine.get_all_child_pids():
            if not _is_alive(pid):
                raise RuntimeError(f"SGLang's process {pid} has ended")
        return {"num_running": self._num_running}


def _describe_sampling(asked: dict[str, Any]) -> dict[str, Any]:
    names = {
        "max_tokens": "max_new_tokens",
        "min_tokens": "min_new_tokens",
        "seed": "sampling_seed",
    }
    bias = {str(id_): value for id_, value in asked["logit_bias"]}
    asked = asked | {"logit_bias": bias or None, "logprobs": None}
    wanted = {names.get(n, n): v for n, v in asked.items() if v is not None}
    if wanted["top_k"] == 0:
        wanted["top_k"] = -1
    return wanted


def _read_logprobs(about: dict[str, Any], start: int, count: int) -> list[Any]:
    chosen = about.get("output_token_logprobs") or []
    tops = about.get("output_top_logprobs") or [[]] * len(chosen)
    return [
        [logprob, [[id_, value] for value, id_, _ in top or []]]
        for (logprob, _, _), top in list(zip(chosen, tops, strict=True))[start : start + count]
    ]


def _is_alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return not os.path.isdir("/proc") and _answers(pid)


def _answers(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except OSError:
        return False
    return True


def main() -> None:
    pipe = WorkerPipe()
    engine = Sglang(read_settings())
    engine.loop.run_until_complete(pipe.run(engine))
    engine._engine.shutdown()


if __name__ == "__main__":  # SGLang imports this module again in its child processes
    main()
