"""vLLM and SGLang behind the `Engine` protocol, each in a child process and its own environment.

Prompt -> `InputProcessor` -> `EngineProcess` -> token ids -> text, stop texts and logprobs, with
the same code as in the torch engine. The child receives the rendered prompt and decoded images, so
that it never takes a string from a client for a URL or a path.
"""

import asyncio
import base64
import os
from collections.abc import AsyncGenerator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from llava_ray.config import ModelConfig
from llava_ray.engine.detokenizer import LogprobCollector
from llava_ray.engine.external.process import EngineProcess, ResponseQueue
from llava_ray.engine.external.settings import ExternalEngineKind, build_launch
from llava_ray.engine.input_processor import InputProcessor
from llava_ray.errors import ConfigError, EngineError, RequestError, UnsupportedError
from llava_ray.model.loading import load_without_weights
from llava_ray.types import Chunk, Prompt, Sampling, Tokens

if TYPE_CHECKING:
    from PIL import Image as PILImage

_DEFAULTS = Sampling()


class ExternalEngine:
    """Answers prompts with vLLM or SGLang; see `Engine`.

    Args:
        config: the model's configuration.
        kind: what is specific to vLLM or SGLang.

    Raises:
        ConfigError: the model cannot be loaded, or the engine is not installed or does not start.
    """

    def __init__(self, config: ModelConfig, kind: ExternalEngineKind) -> None:
        launch = build_launch(config, kind)
        core = load_without_weights(launch.folder, template=config.template)
        if (config.context_length or 0) > core.context_length:
            raise ConfigError(
                f"context_length={config.context_length} is more than the {core.context_length} "
                f"tokens that {config.path!r} supports: set it to at most that"
            )
        self.template = core.template
        self.context_length = config.context_length or core.context_length
        self._kind, self._core = kind, core
        self._device, self._dtype = launch.device, config.dtype
        self._unsupported = kind.unsupported(config)
        self._cache_tokens = 0 if config.cache_tokens == "auto" else config.cache_tokens
        self._inputs = InputProcessor(
            core, context_length=self.context_length, room=self.context_length
        )
        self._encoder = ThreadPoolExecutor(2, thread_name_prefix="encode")
        self._held: dict[str, int] = {}  # request -> its tokens so far, prompt and answer
        self._answering: set[str] = set()  # requests whose first token has arrived
        self._process = EngineProcess(
            launch.command,
            name=kind.label,
            environment=launch.environment,
            timeout_s=launch.timeout_s,
        )

    async def stream(self, prompt: Prompt) -> AsyncGenerator[Chunk]:
        """Yield the answer in chunks; see `Engine.stream`."""
        self._refuse(prompt)
        here = asyncio.get_running_loop()
        prompt_ids, message = await here.run_in_executor(self._encoder, self._describe, prompt)
        name = f"{prompt.request_id}-{os.urandom(4).hex()}"  # clients may reuse request ids
        responses = ResponseQueue()
        await here.run_in_executor(self._encoder, self._process.ask, name, message, responses)
        answer = _Answer(self._inputs, prompt, prompt_ids, self._core.eos_token_ids)
        is_over = False
        self._held[name] = len(prompt_ids)
        try:
            while not is_over:
                told = await responses.messages.get()
                if isinstance(told, EngineError):
                    is_over = True
                    raise told
                if "error" in told:
                    is_over = True
                    raise RequestError(f"{self._kind.label} refuses the request: {told['error']}")
                if "failed" in told:
                    is_over = True
                    raise EngineError(f"{self._kind.label} failed ({told['failed']}): try again")
                self._check_length(told["num_prompt_tokens"], len(prompt_ids))
                chunk = answer.take(told)
                self._held[name] = len(prompt_ids) + chunk.num_tokens
                self._answering.add(name)
                is_over = told["finish"] is not None
                yield chunk
                if chunk.finish_reason:
                    return
        finally:
            del self._held[name]
            self._answering.discard(name)
            self._process.forget(name, is_over=is_over)

    async def tokenize(self, prompt: Prompt) -> Tokens:
        """Return a prompt's tokens; see `Engine.tokenize`."""
        here = asyncio.get_running_loop()
        return await here.run_in_executor(self._encoder, self._inputs.tokenize, prompt)

    async def detokenize(self, token_ids: Sequence[int]) -> str:
        """Return the text of tokens; see `Engine.detokenize`."""
        here = asyncio.get_running_loop()
        return await here.run_in_executor(self._encoder, self._inputs.detokenize, token_ids)

    async def check(self) -> None:
        """Check that the process is alive and responsive; see `Engine.check`."""
        self._process.check()

    def stats(self) -> dict[str, float]:
        """Return the current figures; a request without its first token counts as waiting."""
        return {
            "num_running": len(self._answering),
            "num_waiting": len(self._held) - len(self._answering),
            "cache_tokens_used": sum(self._held.values()),
            "cache_tokens_total": self._cache_tokens,
        }

    def describe(self) -> dict[str, str]:
        """Return how it computes; see `Engine.describe`. The rest is in the engine's own log."""
        return {"engine": self._kind.label, "device": self._device, "dtype": self._dtype}

    async def close(self) -> None:
        """End the engine's process; running requests fail with an EngineError."""
        await asyncio.to_thread(self._process.close)
        self._encoder.shutdown(wait=False, cancel_futures=True)

    def _refuse(self, prompt: Prompt) -> None:
        for name in self._unsupported:
            if getattr(prompt.sampling, name) != getattr(_DEFAULTS, name):
                raise UnsupportedError(
                    f"{name} is not supported with engine={self._kind.name!r}: leave it out, or "
                    "use a model on another engine",
                    param=name,
                )

    def _check_length(self, theirs: int, ours: int) -> None:
        """Raise an EngineError unless the child read the prompt as exactly our tokens."""
        if theirs != ours:
            raise EngineError(
                f"{self._kind.label} reads {theirs:,} tokens in a prompt of {ours:,}: its "
                "tokenizer or image processor differs from the model's; use engine='torch'"
            )

    def _describe(self, prompt: Prompt) -> tuple[list[int], dict[str, Any]]:
        """Return a prompt's token ids, and the message for the child."""
        prompt_ids, _ = self._inputs.read(prompt)
        max_tokens = self._inputs.fit(prompt, prompt_ids)
        asked = prompt.sampling
        own_ends = () if asked.ignore_eos else self._core.eos_token_ids
        return prompt_ids, {
            **self._inputs.write(prompt, prompt_ids),
            "images": [_pack(image) for image in prompt.images],
            "sampling": {
                "max_tokens": max_tokens,
                "temperature": 0.0 if asked.is_greedy else asked.temperature,
                "top_p": asked.top_p,
                "top_k": asked.top_k,
                "min_p": asked.min_p,
                "seed": asked.seed,
                "ignore_eos": asked.ignore_eos,
                "presence_penalty": asked.presence_penalty,
                "frequency_penalty": asked.frequency_penalty,
                "repetition_penalty": asked.repetition_penalty,
                "logit_bias": list(asked.logit_bias),
                "min_tokens": asked.min_tokens,
                "stop_token_ids": sorted({*asked.stop_token_ids, *own_ends}),
                "logprobs": asked.num_logprobs,
                "json_schema": asked.json_schema,
            },
        }


class _Answer:
    """Turns the tokens of one answer into chunks."""

    def __init__(
        self,
        inputs: InputProcessor,
        prompt: Prompt,
        prompt_ids: Sequence[int],
        ends: frozenset[int],
    ) -> None:
        self._text = inputs.start_detokenizer(prompt)
        self._logprobs: LogprobCollector | None = inputs.start_logprobs(prompt)
        self._min_tokens = prompt.sampling.min_tokens
        self._ends = {*prompt.sampling.stop_token_ids}
        self._ends |= set() if prompt.sampling.ignore_eos else ends
        self._num_prompt_tokens = len(prompt_ids)
        self._num_image_tokens = inputs.count_image_tokens(prompt_ids)
        self._num_tokens = 0

    def take(self, told: dict[str, Any]) -> Chunk:
        """Return the chunk for a message of the child; the answer ends at a stop text."""
        ids, reason = told["ids"], told["finish"]
        if reason == "stop" and ids and ids[-1] in self._ends:
            self._num_tokens += 1
            ids = ids[:-1]
        piece = ""
        for place, id_ in enumerate(ids):
            may_stop = self._num_tokens >= self._min_tokens
            self._num_tokens += 1
            if self._logprobs:
                logprob, top = told["logprobs"][place]
                self._logprobs.measure(id_, logprob, [(other, value) for other, value in top])
                self._logprobs.push(self._text.num_decoded)
            piece += self._text.push(id_, may_stop=may_stop)
            if self._text.is_stopped:
                reason = "stop"
                break
        if reason and not self._text.is_stopped:
            piece += self._text.flush()
        shown = None if reason and not self._text.is_stopped else self._text.num_returned
        return Chunk(
            piece,
            "length" if reason == "length" else "stop" if reason else None,
            self._num_tokens,
            self._num_prompt_tokens,
            self._num_image_tokens,
            logprobs=self._logprobs.take(shown) if self._logprobs else (),
            num_cached_tokens=told["cached"],
        )


def _pack(image: "PILImage.Image") -> dict[str, Any]:
    rgb = image.convert("RGB")
    return {
        "width": rgb.width,
        "height": rgb.height,
        "rgb": base64.b64encode(rgb.tobytes()).decode(),
    }
