"""The state of one request inside the torch engine, from its arrival to its last token.

The scheduler plans sequences, the runner computes them, and `append` turns their tokens into
chunks.
"""

from collections.abc import Sequence as Many
from dataclasses import dataclass, field
from random import Random
from typing import Any

from llava_ray.engine.detokenizer import Detokenizer, LogprobCollector
from llava_ray.engine.structured_output import Grammar
from llava_ray.engine.torch_engine.scheduling.kv_allocator import KVSlice
from llava_ray.types import Chunk, FinishReason, Sampling


@dataclass(eq=False)
class Sequence:
    """One prompt and its growing answer.

    Attributes:
        request_id: names the request in logs and errors.
        prompt_ids: the prompt's tokens; each image has one image token per feature vector.
        num_image_tokens: how many of the prompt's tokens are image tokens.
        sampling: how to choose the next token.
        max_tokens: most tokens of the answer; prompt and answer together fit the cache.
        text: the answer's detokenizer.
        eos_token_ids: the model's end-of-sequence tokens.
        grammar: what the answer must follow; None: any text.
        logprobs: collects the logprobs of the answer's tokens; None: not requested.
        inputs: the model's image inputs, later the encoded features; only the runner reads them.
        content: the tokens of prompt and answer, with each image token replaced by a hash of its
            image: equal prefixes of `content` have equal keys and values.
        image_names: one content hash per image.
        adapter: name of the LoRA adapter to apply; empty: the base model.
        token_ids: the answer so far.
        num_expected: tokens of the answer whose computation is launched but whose ids have not
            been read yet.
        num_computed: tokens, counted from the start of the prompt, whose keys and values are in
            the cache, or will be before the next step runs on the device.
        num_cached: how many of those were copied from another sequence.
        kv_slice: its part of the cache; None until it is admitted.
        failure: why it cannot go on, if a step found out; it ends with an error then.
        last_step: number of the latest committed step that it was part of.
        seen: token id -> its count in the answer, for penalties. Tokens of the prompt are keys,
            too, if the repetition penalty is used.
        has_penalty: whether any penalty is used.
        end_token_ids: the answer ends at any of these: the request's stop tokens and, unless they
            are ignored, the end-of-sequence tokens.
        random: its own random number generator, so that a seeded answer does not depend on the
            rest of the batch.
    """

    request_id: str
    prompt_ids: list[int]
    num_image_tokens: int
    sampling: Sampling
    max_tokens: int
    text: Detokenizer
    eos_token_ids: frozenset[int] = frozenset()
    grammar: Grammar | None = None
    logprobs: LogprobCollector | None = None
    inputs: Any = None
    content: list[int] = field(default_factory=list)
    image_names: Many[int] = ()
    adapter: str = ""
    token_ids: list[int] = field(default_factory=list)
    num_expected: int = 0
    num_computed: int = 0
    num_cached: int = 0
    kv_slice: KVSlice | None = None
    failure: str = ""
    last_step: int = 0
    seen: dict[int, int] = field(init=False)
    random: Random = field(init=False)

    def __post_init__(self) -> None:
        self.content = list(self.content or self.prompt_ids)
        sampling = self.sampling
        self.random = Random(sampling.seed)
        self.has_penalty = (
            sampling.repetition_penalty != 1
            or sampling.presence_penalty != 0
            or sampling.frequency_penalty != 0
        )
        self.seen = dict.fromkeys(self.prompt_ids, 0) if sampling.repetition_penalty != 1 else {}
        eos = frozenset() if sampling.ignore_eos else self.eos_token_ids
        self.end_token_ids = eos | frozenset(sampling.stop_token_ids)

    @property
    def may_end(self) -> bool:
        """Whether the next token may be one of `end_token_ids`."""
        return len(self.token_ids) >= self.sampling.min_tokens

    @property
    def has_own_logits(self) -> bool:
        """Whether logits processors change the model's logits for this sequence."""
        return (
            self.has_penalty
            or not self.may_end
            or self.grammar is not None
            or bool(self.sampling.logit_bias)
        )

    @property
    def num_tokens(self) -> int:
        """Tokens of the prompt and of the answer so far, including expected ones."""
        return len(self.prompt_ids) + len(self.token_ids) + self.num_expected

    @property
    def may_continue(self) -> bool:
        """Whether `max_tokens` leaves room for more tokens after the expected ones."""
        return len(self.token_ids) + self.num_expected < self.max_tokens

    @property
    def num_pending(self) -> int:
        """Tokens that must go through the model before the next one can be chosen."""
        return self.num_tokens - self.num_computed

    @property
    def num_reserved(self) -> int:
        """Slots of the cache that it reserves: enough for the longest possible answer."""
        return len(self.prompt_ids) + self.max_tokens

    def ids_from(self, start: int, length: int) -> list[int]:
        """Return `length` token ids of prompt and answer, from position `start`."""
        num_prompt = len(self.prompt_ids)
        if start >= num_prompt:
            return self.token_ids[start - num_prompt : start - num_prompt + length]
        ids = self.prompt_ids[start : start + length]
        return ids + self.token_ids[: length - len(ids)]

    def append(self, token_id: int) -> Chunk:
        """Append a token to the answer; return the chunk with its text and finish reason."""
        may_stop = self.may_end
        self.token_ids.append(token_id)
        self.content.append(token_id)
        if self.has_penalty:
            self.seen[token_id] = self.seen.get(token_id, 0) + 1
        if token_id in self.end_token_ids:
            return self._chunk(self.text.flush(), "stop")
        if self.logprobs is not None:
            self.logprobs.push(self.text.num_decoded)
        text = self.text.push(token_id, may_stop=may_stop)
        if self.text.is_stopped:
            return self._chunk(text, "stop")
        reason = self._find_end(token_id)
        if reason is not None:
            text += self.text.flush()
        return self._chunk(text, "stop" if self.text.is_stopped else reason)

    def _find_end(self, token_id: int) -> FinishReason | None:
        if self.grammar is not None:
            self.grammar.accept(token_id)
            if self.grammar.is_over:
                return "length" if self.grammar.is_broken else "stop"
        return "length" if len(self.token_ids) >= self.max_tokens else None

    def _chunk(self, text: str, finish_reason: FinishReason | None) -> Chunk:
        logprobs = ()
        if self.logprobs is not None:
            is_whole = finish_reason is not None and not self.text.is_stopped
            logprobs = self.logprobs.take(None if is_whole else self.text.num_returned)
        return Chunk(
            text,
            finish_reason,
            len(self.token_ids),
            len(self.prompt_ids),
            self.num_image_tokens,
            logprobs=logprobs,
            num_cached_tokens=self.num_cached,
        )
