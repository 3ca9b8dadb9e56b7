"""Runs the model for one step; nothing else in the torch engine calls the model.

plan -> embeddings of its tokens (images are encoded in batches) -> language model with attention
over the cache -> logits of the last tokens -> one token for each complete sequence.

Shapes: B sequences, T tokens, P image tokens an image, D hidden, V vocabulary.
"""

import logging
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, Protocol

import torch

from llava_ray.engine.detokenizer import Detokenizer
from llava_ray.engine.protocol import NoteImages, ignore_images
from llava_ray.engine.torch_engine.execution.attention import ATTENTION_NAME, StepMetadata, attend
from llava_ray.engine.torch_engine.execution.attention_metadata import AttentionMetadata
from llava_ray.engine.torch_engine.execution.cuda_graphs import DecodeGraphs, list_batch_sizes
from llava_ray.engine.torch_engine.execution.device_transfer import Stopwatch, send
from llava_ray.engine.torch_engine.execution.encoder_cache import (
    IMAGES_AT_ONCE,
    EncoderCache,
    is_plain,
)
from llava_ray.engine.torch_engine.execution.fused_decoder import FusedDecoder, can_fuse, fuse
from llava_ray.engine.torch_engine.execution.kv_cache import KVCache, KVShape
from llava_ray.engine.torch_engine.execution.memory_plan import (
    CPU_BATCH_SIZE,
    CPU_CACHE_TOKENS,
    MOST_SEQUENCES,
    can_measure,
    check_cache_tokens,
    choose_batch_size,
    choose_cache_tokens,
    measure_step,
    read_memory,
)
from llava_ray.engine.torch_engine.execution.multi_lora import LoraAdapters
from llava_ray.engine.torch_engine.execution.packed_linear import (
    pack_linears,
    quantize_linears,
    widen,
)
from llava_ray.engine.torch_engine.execution.sampler import SampledTokens, sample
from llava_ray.engine.torch_engine.scheduling.kv_allocator import KVSlice
from llava_ray.engine.torch_engine.scheduling.scheduler import ScheduledSequence, StepPlan
from llava_ray.engine.torch_engine.scheduling.sequence import Sequence
from llava_ray.errors import ConfigError, EngineError
from llava_ray.model.devices import describe_device, describe_shortage
from llava_ray.model.loading import LoadedModel
from llava_ray.types import Sampling

logger = logging.getLogger(__name__)

_LARGEST_SIDE = 4096
"""Pixels: an image that is cut into as many tiles as a model takes."""

_NUM_SCRATCH = 3
"""Number of slots at the end of the cache that no request uses, for `check` and warm-up."""


class StepMemoryError(EngineError):
    """The device had no memory for a step; none of its tokens counts as computed."""


class StepLimits(NamedTuple):
    """What bounds the memory of a step, and of the cache.

    Attributes:
        prefill_tokens: most tokens of prompts.
        context_length: longest prompt plus answer.
        gpu_share: part of the GPU that belongs to this process.
    """

    prefill_tokens: int = 4096
    context_length: int = 4096
    gpu_share: float = 1.0


_LIMITS = StepLimits()


class LaunchedStep(Protocol):
    """A step that was launched on the device and may still be running."""

    def read(self) -> list[int]:
        """Wait for it; return the next token of each complete sequence of the plan, in order."""
        ...


class StepRunner(Protocol):
    """Computes plans. Implementations: ModelRunner; a scripted one in the tests.

    `run` and `launch` raise a `StepMemoryError` where the device has no memory for a plan. Any
    other exception means that the engine is broken.
    """

    def run(self, plan: StepPlan) -> list[int]:
        """Return the next token of each complete sequence of the plan, in order."""
        ...

    def launch(self, plan: StepPlan) -> LaunchedStep:
        """Start computing a plan on the device, after the step that was launched before it.

        Token ids that its sequences still expect are those sampled in that step.
        """
        ...

    def check(self) -> None:
        """Run a small step that changes no sequence; raise if it fails."""
        ...


def skip_unused_vision_layers(model: Any) -> None:
    """Replace the vision tower's layers above the highest one that is read by the identity."""
    read = model.config.vision_feature_layer
    layers = getattr(model.vision_tower, "vision_model", model.vision_tower).encoder.layers
    heights = [index % (len(layers) + 1) for index in ([read] if isinstance(read, int) else read)]
    for layer in layers[max(heights) :]:
        layer.forward = lambda hidden_states, *_args, **_options: hidden_states


class _LaunchedStep(NamedTuple):
    sampled: SampledTokens | None = None  # None: no sequence was complete
    note: Callable[[], None] = lambda: None  # called once it is computed

    def read(self) -> list[int]:
        """See `LaunchedStep`."""
        tokens = self.sampled.read() if self.sampled else []
        self.note()
        return tokens


class ModelRunner:
    """Runs any LLaVA whose language model supports transformers' attention interface.

    It owns and changes the model: attention is redirected, weights are joined and, on a CPU,
    packed. On a CPU that is slow in 16 bits it computes in float32, whatever the weights are in.
    Without adapters, plans that have no sequence in common may run in several threads at once.

    Args:
        core: the loaded model.
        cache_tokens: size of the key-value cache; None: on a GPU as much as fits, see
            `memory_plan`, on a CPU a fixed size.
        cache_dtype: its precision; by default that of the weights.
        quantization: "int8": the language model's products in 8 bits; "none": as they are.
        adapters: LoRA adapters that requests may choose, if any.
        image_cache_mb: memory for image features, in MiB; 0: no cache.
        max_batch_size: most sequences of a step; None: chosen for the size of the cache.
        uses_graphs: decode with CUDA graphs where they can be recorded.
        limits: of a step, for the size of the cache.
        note_images: called after each step that read images.

    Attributes:
        cache_tokens, max_batch_size: as given or chosen.
        without_graphs: why decoding goes without CUDA graphs; empty: it uses them.

    Raises:
        ConfigError: this language model's attention cannot be computed here, or it cannot be
            quantized.
    """

    def __init__(
        self,
        core: LoadedModel,
        *,
        cache_tokens: int | None = CPU_CACHE_TOKENS,
        cache_dtype: torch.dtype | None = None,
        quantization: str = "none",
        adapters: LoraAdapters | None = None,
        image_cache_mb: int = 256,
        max_batch_size: int | None = None,
        uses_graphs: bool = False,
        limits: StepLimits = _LIMITS,
        note_images: NoteImages = ignore_images,
    ) -> None:
        from transformers import AttentionInterface

        config = core.model.config.text_config
        if getattr(config, "attn_logit_softcapping", None):
            raise ConfigError(
                f"the language model {config.model_type!r} caps its attention scores, which the "
                "torch engine does not: use another engine"
            )
        language_model = core.model.model.language_model
        if not language_model._supports_attention_backend:
            raise ConfigError(
                f"the language model {config.model_type!r} computes its attention in a way of its "
                "own, which the torch engine cannot redirect: use load_model and `generate`"
            )
        AttentionInterface.register(ATTENTION_NAME, attend)
        language_model.set_attn_implementation(ATTENTION_NAME)
        self.device: torch.device = core.model.device
        if self.device.type == "cuda" and limits.gpu_share < 1:
            torch.cuda.set_per_process_memory_fraction(limits.gpu_share, self.device)
        self._core = core
        self._adapters = adapters or LoraAdapters()
        self._note_images = note_images
        self._image_cache_bytes = image_cache_mb << 20
        self._encoder_cache = EncoderCache(self._encode_images, max_bytes=self._image_cache_bytes)
        self._model = core.model.model
        self._language_model = language_model
        self._embed = core.model.get_input_embeddings()
        self._kv_shape = KVShape.of(config)
        self._kv_dtype: torch.dtype = cache_dtype or core.model.dtype
        skip_unused_vision_layers(self._model)
        is_fused = not self._adapters.names and can_fuse(language_model)
        if is_fused:
            fuse(language_model)
        if quantization == "int8":
            quantize_linears(language_model)
        pack_linears(core.model)
        widen(core.model)
        self.dtype: torch.dtype = core.model.dtype
        self._compute_layers = (
            FusedDecoder(language_model) if is_fused else self._call_language_model
        )
        self._graphs: DecodeGraphs | None = None
        self._latest: SampledTokens | None = None
        if cache_tokens is None:
            cache_tokens = self._choose_cache_tokens(max_batch_size or MOST_SEQUENCES, limits)
        elif can_measure(self.device):
            check_cache_tokens(
                read_memory(self.device),
                num_tokens=cache_tokens,
                token_bytes=self._kv_shape.count_token_bytes(self._kv_dtype),
            )
        self.cache_tokens = cache_tokens
        self.max_batch_size = max_batch_size or self._choose_batch_size(cache_tokens)
        self._make_cache(cache_tokens)
        self.without_graphs = ""
        self._graphs = self._find_graphs(self.max_batch_size if uses_graphs else None)
        self.run(self._plan_scratch(2, 1))  # compiles the kernels now rather than during a request
        self.run(self._plan_scratch(1))
        if uses_graphs and not self._graphs:
            for size in list_batch_sizes(self.max_batch_size):
                self.run(self._plan_batch(size))

    def _make_cache(self, num_tokens: int) -> None:
        self._cache = KVCache(
            num_tokens=num_tokens + _NUM_SCRATCH,
            **self._kv_shape._asdict(),
            dtype=self._kv_dtype,
            device=self.device,
        )
        self._scratch = KVSlice(num_tokens, _NUM_SCRATCH)

    def _choose_batch_size(self, cache_tokens: int) -> int:
        return choose_batch_size(cache_tokens) if can_measure(self.device) else CPU_BATCH_SIZE

    def _choose_cache_tokens(self, batch_size: int, limits: StepLimits) -> int:
        if not can_measure(self.device):
            return CPU_CACHE_TOKENS
        step_bytes, memory = measure_step(
            self.device, lambda: self._run_largest_step(batch_size, limits.prefill_tokens)
        )
        return choose_cache_tokens(
            memory,
            step_bytes=step_bytes + self._image_cache_bytes,
            token_bytes=self._kv_shape.count_token_bytes(self._kv_dtype),
            share=limits.gpu_share,
            most=batch_size * limits.context_length,
        )

    def _run_largest_step(self, batch_size: int, num_tokens: int) -> None:
        """Compute as many images, prompt tokens and sampled rows as a step may have.

        The cache is one of this step only.
        """
        num_tokens = max(num_tokens, batch_size)
        self._make_cache(num_tokens)
        self._encode_largest_images()
        lengths = [num_tokens - batch_size + 1, *[1] * (batch_size - 1)]
        plan = self._plan_dummies(KVSlice(0, num_tokens), lengths, Sampling(top_p=0.9))
        self.run(plan)
        del self._cache

    def _encode_largest_images(self) -> None:
        from PIL import Image

        image = Image.new("RGB", (_LARGEST_SIDE, _LARGEST_SIDE))
        encoded = self._core.encode(self._core.processor.image_token, [image])
        one = {k: v for k, v in encoded.items() if k not in ("input_ids", "attention_mask")}
        num_images = IMAGES_AT_ONCE if is_plain(one) else 1
        with torch.inference_mode():
            self._encode_images("", {k: torch.cat([v] * num_images) for k, v in one.items()})

    def _find_graphs(self, max_batch_size: int | None) -> DecodeGraphs | None:
        if not max_batch_size:
            self.without_graphs = "not used on a CPU"
        elif not self._cache.attend_decode:
            self.without_graphs = "attention is torch's own"
        elif self._adapters.names:
            self.without_graphs = "the model has adapters"
        else:
            graphs = DecodeGraphs(
                self._compute_logits, self._cache, self._scratch, max_batch_size=max_batch_size
            )
            self.without_graphs = (graphs.record() or "") if self.device.type == "cuda" else ""
            if not self.without_graphs:
                return graphs
            logger.warning("decoding goes without CUDA graphs: %s", self.without_graphs)
        return None

    def run(self, plan: StepPlan) -> list[int]:
        """Return the next token of each complete sequence of the plan, in order."""
        return self._compute(plan).read()

    def launch(self, plan: StepPlan) -> LaunchedStep:
        """Ask the device to compute a plan; see `StepRunner.launch`."""
        launched = self._compute(plan)
        self._latest = launched.sampled
        return launched

    def _compute(self, plan: StepPlan) -> _LaunchedStep:
        try:
            return self._start(plan)
        except torch.OutOfMemoryError as error:
            shortage = describe_shortage(error)
        # Only here are the failed step's tensors gone: the exception's frames held them.
        torch.cuda.empty_cache()
        raise StepMemoryError(
            f"the GPU ran out of memory in this step: {shortage}. Other requests go on; ask again "
            "when fewer run, or lower cache_tokens or max_batch_size in the model's configuration"
        )

    @torch.inference_mode()
    def _start(self, plan: StepPlan) -> _LaunchedStep:
        for source, target, num_tokens in plan.copies:
            self._cache.copy(source, target, num_tokens)
        if not plan.scheduled:
            return _LaunchedStep()
        new = [each.sequence for each in plan.scheduled if isinstance(each.sequence.inputs, dict)]
        if not new:
            return _LaunchedStep(self._choose_tokens(plan))
        watch = Stopwatch(self.device)
        num_encoded, num_cached = self._read_images(new)
        watch.stop()
        sampled = self._choose_tokens(plan)
        return _LaunchedStep(
            sampled, lambda: self._note_images(num_encoded, num_cached, watch.read())
        )

    def _choose_tokens(self, plan: StepPlan) -> SampledTokens | None:
        """Compute the step, whose images are encoded; None: no sequence is complete."""
        if self._graphs and self._graphs.can_compute(plan):
            logits_BV = self._graphs.compute(plan, self._latest)
            return sample(logits_BV, [scheduled.sequence for scheduled in plan.scheduled])
        metadata = StepMetadata(plan, self._cache)
        self._adapters.choose(self._find_rows(plan))
        hidden_BD = self._compute_layers(self._embed_tokens(plan), metadata)
        if not (complete := plan.complete):
            return None
        logits_BV = self._core.model.lm_head(hidden_BD)
        return sample(logits_BV, [scheduled.sequence for scheduled in complete])

    def describe(self) -> dict[str, str]:
        """Return how steps are computed, for people."""
        return {
            "device": describe_device(self.device),
            "dtype": str(self.dtype).removeprefix("torch."),
            "attention": self._cache.attention,
            "graphs": f"off: {self.without_graphs}" if self.without_graphs else "on",
            "cache dtype": str(self._cache.dtype).removeprefix("torch."),
        }

    def check(self) -> None:
        """Send one token through the language model."""
        self.run(self._plan_scratch(1))

    def _plan_scratch(self, *lengths: int) -> StepPlan:
        """Return a step over dummy sequences of these lengths, in the scratch slots."""
        return self._plan_dummies(self._scratch, lengths, Sampling(temperature=0))

    @staticmethod
    def _plan_dummies(slots: KVSlice, lengths: Iterable[int], sampling: Sampling) -> StepPlan:
        """Return a step over dummy sequences, whose slots lie side by side."""
        scheduled, start = [], slots.start
        for length in lengths:
            text = Detokenizer(lambda ids: "")
            sequence = Sequence("check", [0] * length, 0, sampling, 1, text)
            sequence.kv_slice = KVSlice(start, length)
            scheduled.append(ScheduledSequence.of(sequence, length))
            start += length
        return StepPlan(scheduled)

    def _plan_batch(self, size: int) -> StepPlan:
        """Return a step of `size` dummy sequences of one token, all in the same scratch slot."""
        plan = self._plan_scratch(*[1] * size)
        for scheduled in plan.scheduled:
            scheduled.sequence.kv_slice = KVSlice(self._scratch.start, 1)
        return plan

    def _compute_logits(self, ids_B: torch.Tensor, metadata: AttentionMetadata) -> torch.Tensor:
        """Return the logits of one text token of each sequence, [B, V]."""
        return self._core.model.lm_head(self._compute_layers(self._embed(ids_B), metadata))

    def _call_language_model(
        self, embeddings_TD: torch.Tensor, metadata: AttentionMetadata
    ) -> torch.Tensor:
        """Return the wanted tokens' last hidden states, [B, D], with transformers' layers."""
        hidden_TD = self._language_model(
            inputs_embeds=embeddings_TD[None],
            position_ids=metadata.positions_T[None],
            use_cache=False,
            metadata=metadata,
        ).last_hidden_state[0]
        return hidden_TD if metadata.wanted is None else hidden_TD[metadata.wanted]

    def _read_images(self, new: list[Sequence]) -> tuple[int, int]:
        """Replace the pixels of new sequences by image features.

        Returns:
            The number of images that were encoded, and of those found in a cache.
        """
        num_cached = 0
        for sequence in new:
            if self._core.image_token_id not in sequence.prompt_ids[sequence.num_computed :]:
                num_cached += len(sequence.inputs["pixel_values"])
                sequence.inputs = None
        num_encoded, num_known = self._encoder_cache.read([s for s in new if s.inputs])
        return num_encoded, num_cached + num_known

    def _find_rows(self, plan: StepPlan) -> dict[str, torch.Tensor | None]:
        """Return adapter -> indices of the step's tokens that belong to it; None: all of them."""
        rows: dict[str, list[int]] = {}
        offset = 0
        for sequence, _, num_tokens, _ in plan.scheduled:
            if sequence.adapter:
                rows.setdefault(sequence.adapter, []).extend(range(offset, offset + num_tokens))
            offset += num_tokens
        return {
            name: None if len(each) == offset else send(each, self.device)
            for name, each in rows.items()
        }

    def _encode_images(self, adapter: str, inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        """Return the features of each image, [P, D], as the language model reads them."""
        self._adapters.choose({adapter: None})
        config = self._core.model.config
        output = self._model.get_image_features(
            vision_feature_layer=config.vision_feature_layer,
            vision_feature_select_strategy=config.vision_feature_select_strategy,
            **inputs | {"pixel_values": send(inputs["pixel_values"], self.device).to(self.dtype)},
        )
        return list(output.pooler_output)

    def _embed_tokens(self, plan: StepPlan) -> torch.Tensor:
        """Return the embeddings of the plan's tokens, [T, D]: of image tokens, image features."""
        ids: list[int] = []
        image_tokens: list[int] = []  # their indices in the step
        features: list[torch.Tensor] = []
        expected: list[tuple[int, int]] = []  # (index in the step, row of the latest tokens)
        for sequence, start, num_tokens, _ in plan.scheduled:
            piece = sequence.ids_from(start, num_tokens)
            if sequence.num_expected:
                assert self._latest
                assert num_tokens == 1
                expected.append((len(ids), self._latest.rows[sequence]))
                piece = [0]
            if sequence.inputs is not None:
                mine = [i for i, id_ in enumerate(piece) if id_ == self._core.image_token_id]
                done = sequence.prompt_ids[:start].count(self._core.image_token_id)
                image_tokens.extend(len(ids) + i for i in mine)
                features.append(sequence.inputs[done : done + len(mine)])
                if start + num_tokens >= len(sequence.prompt_ids):
                    sequence.inputs = None
            ids.extend(piece)
        ids_T = send(ids, self.device)
        if expected and self._latest:
            expected_E, rows_E = send(expected, self.device).unbind(1)
            ids_T[expected_E] = self._latest.tokens_B[rows_E]
        embeddings_TD = self._embed(ids_T)
        if image_tokens:
            embeddings_TD[send(image_tokens, self.device)] = torch.cat(features)
        return embeddings_TD
