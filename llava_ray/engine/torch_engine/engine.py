"""The torch engine: continuous batching of LLaVA on any device that torch supports.

Prompt -> encoded in a helper thread -> `EngineLoop`, in a thread of its own: plan, run, commit ->
chunks in the event loop that reads the stream.
"""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Mapping
from collections.abc import Sequence as Many
from concurrent.futures import Future
from typing import Any

import torch

from llava_ray.config import ModelConfig
from llava_ray.config.model import count_threads
from llava_ray.engine.input_processor import InputProcessor
from llava_ray.engine.protocol import NoteImages, ignore_images
from llava_ray.engine.structured_output import Grammar
from llava_ray.engine.torch_engine.engine_loop import (
    Abort,
    Add,
    Close,
    EngineLoop,
    OutputQueue,
    Ping,
)
from llava_ray.engine.torch_engine.execution.memory_plan import (
    CPU_BATCH_SIZE,
    CPU_CACHE_TOKENS,
)
from llava_ray.engine.torch_engine.execution.model_runner import (
    ModelRunner,
    StepLimits,
    StepRunner,
)
from llava_ray.engine.torch_engine.execution.multi_lora import LoraAdapters, load_lora_adapters
from llava_ray.engine.torch_engine.execution.threads import (
    run_in_temporary_thread,
    start_single_threaded_executor,
    use_threads,
)
from llava_ray.engine.torch_engine.scheduling.content_hash import hash_images, identify_tokens
from llava_ray.engine.torch_engine.scheduling.scheduler import GRANULE, Scheduler
from llava_ray.engine.torch_engine.scheduling.sequence import Sequence
from llava_ray.errors import ConfigError, EngineError
from llava_ray.model.devices import describe_shortage, select_device
from llava_ray.model.loading import LoadedModel, load_model, select_dtype
from llava_ray.types import Chunk, Prompt, Tokens

PREFILL_TOKENS_CPU = 240
PREFILL_TOKENS_GPU = 4096
"""Prompt tokens per step: enough to keep the device busy, few enough not to stall decoding."""


class TorchEngine:
    """Answers many prompts in one batch; see `Engine`.

    Args:
        core: the loaded model; the engine takes ownership and changes its weights in place.
        adapters: the LoRA adapters that were loaded into `core`, if any.
        runner: computes the steps; by default a `ModelRunner` for `core`.
        context_length: longest prompt plus answer, in tokens; by default the model's own.
        cache_tokens: size of the key-value cache, over all requests; None: see `memory_plan`.
        cache_dtype: precision of that cache; by default that of the weights.
        quantization: see `ModelRunner`.
        max_batch_size: most requests that are computed at once; None: see `memory_plan`.
        prefill_tokens: most prompt tokens per step.
        prefix_cache: reuse the keys and values of shared prompt prefixes.
        image_cache_mb: memory for encoded images, in MiB.
        gpu_share: part of the GPU's memory that this engine may take.
        patience_s: a step that takes longer than this many seconds counts as stuck.
        runs_ahead: launch each step before the tokens of the previous one are read; by default on
            GPUs, which compute while Python plans.
        note_images: called by the default runner with counts of encoded and cached images.
    """

    def __init__(
        self,
        core: LoadedModel,
        *,
        adapters: LoraAdapters | None = None,
        runner: StepRunner | None = None,
        context_length: int | None = None,
        cache_tokens: int | None = None,
        cache_dtype: torch.dtype | None = None,
        quantization: str = "none",
        max_batch_size: int | None = None,
        prefill_tokens: int | None = None,
        prefix_cache: bool = True,
        image_cache_mb: int = 256,
        gpu_share: float = 1.0,
        patience_s: float = 60.0,
        runs_ahead: bool | None = None,
        note_images: NoteImages = ignore_images,
    ) -> None:
        num_threads = torch.get_num_threads()
        on_gpu = core.model.device.type != "cpu"
        adapters = adapters or LoraAdapters()
        is_ahead = on_gpu if runs_ahead is None else runs_ahead
        can_split = num_threads == 2 and not (is_ahead or adapters.names or runner)
        prefill_tokens = prefill_tokens or (PREFILL_TOKENS_GPU if on_gpu else PREFILL_TOKENS_CPU)
        image_cost = _weigh_images(core)
        self.template = core.template
        self.context_length = min(context_length or core.context_length, core.context_length)
        if runner is None:
            runner = _build_runner(
                core,
                cache_tokens=cache_tokens and -(-cache_tokens // GRANULE) * GRANULE,
                cache_dtype=cache_dtype,
                quantization=quantization,
                adapters=adapters,
                image_cache_mb=image_cache_mb,
                max_batch_size=max_batch_size,
                uses_graphs=on_gpu,
                limits=StepLimits(prefill_tokens, self.context_length, gpu_share),
                note_images=note_images,
            )
            cache_tokens, max_batch_size = runner.cache_tokens, runner.max_batch_size
        scheduler = Scheduler(
            cache_tokens=cache_tokens or CPU_CACHE_TOKENS,
            max_batch_size=max_batch_size or CPU_BATCH_SIZE,
            prefill_tokens=prefill_tokens,
            image_cost=image_cost,
            prefix_cache=prefix_cache,
        )
        self.max_batch_size = max_batch_size or CPU_BATCH_SIZE
        self._core = core
        self._cache_tokens = scheduler.kv_allocator.num_tokens
        self._inputs = InputProcessor(
            core,
            context_length=self.context_length,
            room=min(self.context_length, self._cache_tokens),
        )
        self._patience_s = patience_s
        self._adapters = adapters
        self._runner = runner
        self._encoder = start_single_threaded_executor("encode")
        names = ("step-0", "step-1") if can_split else ()
        self._threads = [start_single_threaded_executor(name) for name in names]
        self._loop = EngineLoop(
            self._runner,
            scheduler,
            threads=self._threads,
            runs_ahead=is_ahead,
            on_start=lambda: use_threads(num_threads),
            name="torch-engine",
        )

    @classmethod
    def load(
        cls,
        config: ModelConfig,
        *,
        note_images: NoteImages = ignore_images,
        loading: Mapping[str, Any] | None = None,
    ) -> "TorchEngine":
        """Load a model and start an engine for it.

        Args:
            config: the model's configuration.
            note_images: called with counts of encoded and cached images.
            loading: arguments of `load_model` that override those derived from `config`.

        Raises:
            ConfigError: the model cannot be loaded, or `context_length` exceeds the model's.
        """
        torch.set_num_threads(count_threads(config))
        dtype = select_dtype(config.dtype, select_device(config.device))
        # Where "auto" means float32, linear layers read 16-bit weights as stored. Not with
        # adapters: their weights would be rounded to 16 bits, too.
        is_stored = config.dtype == "auto" and dtype == torch.float32 and not config.adapters
        options: dict[str, Any] = {
            "dtype": "stored" if is_stored and not (loading or {}).get("quantization") else dtype,
            "device": config.device,
            "template": config.template,
            **(loading or {}),
        }
        core = run_in_temporary_thread(lambda: load_model(config.path, **options))
        if (config.context_length or 0) > core.context_length:
            raise ConfigError(
                f"context_length={config.context_length} is more than the {core.context_length} "
                f"tokens that {config.path!r} supports: set it to at most that"
            )
        return cls(
            core,
            adapters=load_lora_adapters(core.model, config.adapters),
            context_length=config.context_length,
            cache_tokens=None if config.cache_tokens == "auto" else config.cache_tokens,
            cache_dtype=dtype,
            quantization=config.quantization,
            max_batch_size=None if config.max_batch_size == "auto" else config.max_batch_size,
            gpu_share=config.gpu_share,
            prefix_cache=config.prefix_cache,
            image_cache_mb=config.image_cache_mb,
            note_images=note_images,
        )

    async def stream(self, prompt: Prompt) -> AsyncGenerator[Chunk]:
        """Yield the answer in chunks; see `Engine.stream`."""
        here = asyncio.get_running_loop()
        grammar = await self._inputs.compile_format(prompt)
        sequence = await here.run_in_executor(self._encoder, self._encode, prompt, grammar)
        output = OutputQueue()
        self._loop.send(Add(sequence, output))
        is_finished = False
        try:
            while not is_finished:
                item = await output.items.get()
                is_finished = not isinstance(item, Chunk) or item.finish_reason is not None
                if isinstance(item, EngineError):
                    raise item
                yield item
        finally:
            if not is_finished:
                self._abort(sequence)

    async def tokenize(self, prompt: Prompt) -> Tokens:
        """Return a prompt's tokens; see `Engine.tokenize`."""
        here = asyncio.get_running_loop()
        return await here.run_in_executor(self._encoder, self._inputs.tokenize, prompt)

    async def detokenize(self, token_ids: Many[int]) -> str:
        """Return the text of tokens; see `Engine.detokenize`."""
        here = asyncio.get_running_loop()
        return await here.run_in_executor(self._encoder, self._inputs.detokenize, token_ids)

    async def check(self) -> None:
        """Run a token through the model between two steps; see `Engine.check`."""
        answer: Future[None] = Future()
        self._loop.send(Ping(answer))
        try:
            await asyncio.wait_for(asyncio.wrap_future(answer), self._patience_s)
        except TimeoutError as error:
            raise EngineError(
                f"the engine has been stuck in one step for {self._patience_s:.0f} s"
            ) from error

    def stats(self) -> dict[str, float]:
        """Return the current figures; see `Engine.stats`."""
        scheduler, counters = self._loop.scheduler, self._loop.counters
        allocator = scheduler.kv_allocator
        return {
            "num_running": len(scheduler.running),
            "num_waiting": len(scheduler.waiting),
            "cache_tokens_used": scheduler.kv_allocator.num_used
            - scheduler.prefix_cache.num_tokens,
            "cache_tokens_total": allocator.num_tokens,
            "num_steps": counters.num_steps,
            "num_prompt_tokens": counters.num_prompt_tokens,
            "num_cached_tokens": counters.num_cached_tokens,
            "num_new_tokens": counters.num_new_tokens,
        }

    def describe(self) -> dict[str, str]:
        """Return how it computes; see `Engine.describe`."""
        computing = self._runner.describe() if isinstance(self._runner, ModelRunner) else {}
        return {
            "engine": "torch",
            **computing,
            "cache": f"{self._cache_tokens} tokens",
            "batch": f"{self.max_batch_size} sequences",
        }

    async def close(self) -> None:
        """Abort all requests and end the threads."""
        with contextlib.suppress(EngineError):  # it may have ended already
            self._loop.send(Close())
        await asyncio.to_thread(self._loop.join)
        for thread in self._threads:
            await asyncio.to_thread(thread.shutdown)
        self._encoder.shutdown(wait=False, cancel_futures=True)

    def _abort(self, sequence: Sequence) -> None:
        with contextlib.suppress(EngineError):  # then nothing is left to free
            self._loop.send(Abort(sequence))

    def _encode(self, prompt: Prompt, grammar: Grammar | None) -> Sequence:
        self._adapters.check(prompt.adapter)
        prompt_ids, images = self._inputs.read(prompt)
        is_one_tile = len(prompt.images) > 1 and "batch_num_images" in (images or {})
        names = hash_images(prompt.images, layout="one tile" * is_one_tile)
        return Sequence(
            request_id=prompt.request_id,
            prompt_ids=prompt_ids,
            num_image_tokens=self._inputs.count_image_tokens(prompt_ids),
            sampling=prompt.sampling,
            max_tokens=self._inputs.fit(prompt, prompt_ids),
            text=self._inputs.start_detokenizer(prompt),
            eos_token_ids=self._core.eos_token_ids,
            grammar=grammar,
            logprobs=self._inputs.start_logprobs(prompt),
            inputs=images,
            content=identify_tokens(
                prompt_ids, self._core.image_token_id, names, adapter=prompt.adapter
            ),
            image_names=names,
            adapter=prompt.adapter,
        )


def _build_runner(core: LoadedModel, *, cache_tokens: int | None, **options: Any) -> ModelRunner:
    try:
        return run_in_temporary_thread(
            lambda: ModelRunner(core, cache_tokens=cache_tokens, **options)
        )
    except torch.OutOfMemoryError as error:
        raise ConfigError(
            f"the weights of {str(core.checkpoint.folder)!r} are on the GPU, and there is no "
            f"memory for the rest: {describe_shortage(error)}; lower cache_tokens "
            f"({cache_tokens or 'auto'}) or max_batch_size, or take a larger GPU"
        ) from error


def _weigh_images(core: LoadedModel) -> float:
    """Return the cost of encoding one image token, in tokens of the language model."""

    def count(module: torch.nn.Module) -> int:
        return sum(parameter.numel() for parameter in module.parameters())

    return count(core.model.model.vision_tower) / count(core.model.model.language_model)
