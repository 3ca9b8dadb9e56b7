"""Our own engine: continuous batching of LLaVA wherever torch runs.

prompt -> encoded (one helper thread) -> the engine's loop (another thread): plan, run, commit ->
chunks, back in the event loop of whoever reads the stream.
"""

import asyncio
import contextlib
import functools
from collections.abc import AsyncGenerator
from concurrent.futures import Future

import torch

from llava_ray.config import ModelConfig
from llava_ray.engine.content import describe_content
from llava_ray.engine.grammar import Grammar
from llava_ray.engine.load import count_threads
from llava_ray.engine.logprobs import LogprobStream
from llava_ray.engine.loop import Abort, Add, Close, EngineLoop, Ping, Reader
from llava_ray.engine.runner import LlavaRunner, Runner, select_pictures
from llava_ray.engine.scheduler import Scheduler
from llava_ray.engine.sequence import Sequence
from llava_ray.engine.text import TextStream
from llava_ray.engine.threads import (
    run_in_passing_thread,
    start_single_threaded_executor,
    use_threads,
)
from llava_ray.engine.vocabulary import Vocabulary
from llava_ray.errors import ConfigError, ContextLengthError, EngineError, RequestError
from llava_ray.model.core import Core, load_model
from llava_ray.types import Chunk, Prompt

PREFILL_TOKENS_CPU = 256
PREFILL_TOKENS_GPU = 4096
"""Prompt tokens in one step: enough to keep the device busy, few enough not to stall streams."""


class TorchEngine:
    """Answers many prompts at once; see `Engine`.

    Args:
        core: the loaded model; the engine takes it over, weights included.
        runner: computes the steps; by default the real one for `core`.
        context_length: longest prompt plus answer; default: the model's own.
        cache_tokens: size of the key-value cache, over all requests.
        max_batch_size: requests computed at once.
        prefill_tokens: prompt tokens of one step.
        prefix_cache: keep what was computed, for prompts that begin alike.
        patience_s: a step that takes longer than this counts as stuck.
    """

    def __init__(
        self,
        core: Core,
        *,
        runner: Runner | None = None,
        context_length: int | None = None,
        cache_tokens: int = 16384,
        max_batch_size: int = 32,
        prefill_tokens: int | None = None,
        prefix_cache: bool = True,
        patience_s: float = 60.0,
    ) -> None:
        num_threads = torch.get_num_threads()
        on_gpu = core.model.device.type != "cpu"
        scheduler = Scheduler(
            cache_tokens=cache_tokens,
            max_batch_size=max_batch_size,
            prefill_tokens=prefill_tokens or (PREFILL_TOKENS_GPU if on_gpu else PREFILL_TOKENS_CPU),
            prefix_cache=prefix_cache,
        )
        self.template = core.template
        self.context_length = min(context_length or core.context_length, core.context_length)
        self._core = core
        self._cache_tokens = scheduler.regions.num_tokens
        self._patience_s = patience_s
        runner = runner or run_in_passing_thread(
            lambda: LlavaRunner(core, cache_tokens=self._cache_tokens)
        )
        self._encoder = start_single_threaded_executor("encode")
        self._loop = EngineLoop(
            runner, scheduler, on_start=lambda: use_threads(num_threads), name="torch-engine"
        )

    @classmethod
    def load(cls, config: ModelConfig) -> "TorchEngine":
        """Load a model and start an engine for it.

        Raises:
            ConfigError: the model does not load, or the configuration asks more than it has.
        """
        torch.set_num_threads(count_threads(config))
        core = run_in_passing_thread(
            lambda: load_model(
                config.path, dtype=config.dtype, device=config.device, template=config.template
            )
        )
        if (config.context_length or 0) > core.context_length:
            raise ConfigError(
                f"context_length={config.context_length} is more than the {core.context_length} "
                f"tokens that {config.path!r} was made for: ask for at most that"
            )
        return cls(
            core,
            context_length=config.context_length,
            cache_tokens=config.cache_tokens,
            max_batch_size=config.max_batch_size,
            prefix_cache=config.prefix_cache,
        )

    async def stream(self, prompt: Prompt) -> AsyncGenerator[Chunk]:
        """Yield the answer piece by piece; see `Engine.stream`."""
        here = asyncio.get_running_loop()
        sequence = await here.run_in_executor(self._encoder, self._encode, prompt)
        reader = Reader()
        self._loop.send(Add(sequence, reader))
        is_finished = False
        try:
            while not is_finished:
                item = await reader.news.get()
                is_finished = not isinstance(item, Chunk) or item.finish_reason is not None
                if isinstance(item, EngineError):
                    raise item
                yield item
        finally:
            if not is_finished:
                self._abort(sequence)

    async def check(self) -> None:
        """Send a token through the model, between two steps; see `Engine.check`."""
        answer: Future[None] = Future()
        self._loop.send(Ping(answer))
        try:
            await asyncio.wait_for(asyncio.wrap_future(answer), self._patience_s)
        except TimeoutError as error:
            raise EngineError(
                f"the engine has been stuck in one step for {self._patience_s:.0f} s"
            ) from error

    def stats(self) -> dict[str, float]:
        """Figures of this moment."""
        scheduler, figures = self._loop.scheduler, self._loop.figures
        return {
            "num_running": len(scheduler.running),
            "num_waiting": len(scheduler.waiting),
            "cache_tokens_used": scheduler.regions.num_used - scheduler.prefixes.num_tokens,
            "cache_tokens_total": scheduler.regions.num_tokens,
            "num_steps": figures.num_steps,
            "num_prompt_tokens": figures.num_prompt_tokens,
            "num_cached_tokens": figures.num_cached_tokens,
            "num_new_tokens": figures.num_new_tokens,
        }

    async def close(self) -> None:
        """Abort what is running, end the threads."""
        with contextlib.suppress(EngineError):  # it may have ended already
            self._loop.send(Close())
        await asyncio.to_thread(self._loop.join)
        self._encoder.shutdown(wait=False, cancel_futures=True)

    def _abort(self, sequence: Sequence) -> None:
        with contextlib.suppress(EngineError):  # then nothing is left to free
            self._loop.send(Abort(sequence))

    def _encode(self, prompt: Prompt) -> Sequence:
        inputs = self._core.encode(prompt.text, prompt.images)
        prompt_ids: list[int] = inputs["input_ids"][0].tolist()
        num_image_tokens = prompt_ids.count(self._core.image_token_id)
        tokenizer = self._core.tokenizer
        self._check_token_ids(prompt)
        return Sequence(
            request_id=prompt.request_id,
            prompt_ids=prompt_ids,
            num_image_tokens=num_image_tokens,
            sampling=prompt.sampling,
            max_tokens=self._fit(prompt, len(prompt_ids), num_image_tokens),
            text=TextStream(
                lambda ids: tokenizer.decode(ids, skip_special_tokens=True),
                stop=prompt.sampling.stop,
            ),
            eos_token_ids=self._core.eos_token_ids,
            grammar=self._compile_format(prompt),
            logprobs=self._open_logprobs(prompt),
            inputs=select_pictures(inputs),
            content=describe_content(prompt_ids, self._core.image_token_id, prompt.images),
        )

    @functools.cached_property
    def _vocabulary(self) -> Vocabulary:
        return Vocabulary(
            self._core.tokenizer,
            size=self._core.model.config.text_config.vocab_size,
            eos_token_ids=self._core.eos_token_ids,
        )

    def _compile_format(self, prompt: Prompt) -> Grammar | None:
        schema = prompt.sampling.json_schema
        return None if schema is None else self._vocabulary.compile(schema)

    def _open_logprobs(self, prompt: Prompt) -> LogprobStream | None:
        num_top = prompt.sampling.num_logprobs
        return None if num_top is None else LogprobStream(self._vocabulary.spell, num_top=num_top)

    def _check_token_ids(self, prompt: Prompt) -> None:
        size = self._core.model.config.text_config.vocab_size
        for id_, _ in prompt.sampling.logit_bias:
            if id_ >= size:
                raise RequestError(
                    f"logit_bias names token {id_}, the vocabulary ends at {size - 1}: "
                    "leave it out",
                    param="logit_bias",
                )

    def _fit(self, prompt: Prompt, num_tokens: int, num_image_tokens: int) -> int:
        """Return how long the answer may become."""
        room = min(self.context_length, self._cache_tokens)
        pictures = f"{len(prompt.images)} picture{'s' if len(prompt.images) > 1 else ''}"
        parts = (
            f" ({num_image_tokens:,} for {pictures}, {num_tokens - num_image_tokens:,} of text)"
            if prompt.images
            else ""
        )
        asked = prompt.sampling.max_tokens
        if num_tokens >= room:
            raise ContextLengthError(
                f"the prompt has {num_tokens:,} tokens{parts}, the context holds {room:,} with "
                f"the answer: shorten the conversation{' or send fewer pictures' * bool(parts)}",
                param="messages",
            )
        if asked is not None and num_tokens + asked > room:
            raise ContextLengthError(
                f"the prompt has {num_tokens:,} tokens{parts} and max_tokens asks for {asked:,} "
                f"more, the context holds {room:,}: ask for at most {room - num_tokens:,}",
                param="max_tokens",
            )
        return room - num_tokens if asked is None else asked
