"""The state of one request inside an engine, from admission to its last token."""

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
    """One prompt and the answer that grows behind it.

    Attributes:
        request_id: names the request in logs and errors.
        prompt_ids: the prompt's tokens; an image is as many image tokens as it has features.
        num_image_tokens: how many of them are image tokens.
        sampling: how to choose the next token.
        max_tokens: the answer has at most this many tokens; prompt and answer fit the cache.
        text: decodes the answer.
        eos_token_ids: the answer ends at any of these, unless they are to be ignored.
        grammar: the answer's format; None: any text.
        logprobs: keeps those of the answer's tokens; None: nobody asks for them.
        inputs: the images as the model takes them; only the runner looks inside.
        content: the tokens of prompt and answer, where each image token stands as a number for
            its image: equal contents have equal keys and values.
        image_names: numbers for the contents of its images.
        adapter: the name of the adapter that it belongs to; empty: the model itself.
        token_ids: the answer so far.
        num_expected: tokens of the answer that the device has been asked to choose, and that have
            not been read yet.
        num_computed: tokens, from the prompt's first, whose keys and values are in the cache, or
            will be before the device does what it is asked next.
        num_cached: how many of them were there before, of another sequence.
        kv_slice: its part of the cache; None while it has none.
        last_step: number of the latest step that it was part of.
        seen: tokens that a penalty counts: how often each is in the answer. Those of the prompt
            are among them where a penalty looks at the prompt.
        has_penalty: any penalty is asked for.
        end_token_ids: the answer ends at any of these: end-of-sequence tokens, and those that were
            asked for.
        random: the source of its own random numbers, so that an answer with a seed does not
            depend on what else is computed beside it.
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
        """Whether the model's logits are changed before the next token is chosen."""
        return (
            self.has_penalty
            or not self.may_end
            or self.grammar is not None
            or bool(self.sampling.logit_bias)
        )

    @property
    def num_tokens(self) -> int:
        """Tokens of the prompt and of the answer so far, expected ones among them."""
        return len(self.prompt_ids) + len(self.token_ids) + self.num_expected

    @property
    def may_continue(self) -> bool:
        """Whether the answer goes on after the tokens that are expected, as far as is known."""
        return len(self.token_ids) + self.num_expected < self.max_tokens

    @property
    def num_pending(self) -> int:
        """Tokens that must go through the model before the next one can be chosen."""
        return self.num_tokens - self.num_computed

    @property
    def num_reserved(self) -> int:
        """KernelInputs in the cache with which it can never run out."""
        return len(self.prompt_ids) + self.max_tokens

    def ids_from(self, start: int, length: int) -> list[int]:
        """Return `length` token ids of prompt and answer, from position `start`."""
        num_prompt = len(self.prompt_ids)
        if start >= num_prompt:
            return self.token_ids[start - num_prompt : start - num_prompt + length]
        ids = self.prompt_ids[start : start + length]
        return ids + self.token_ids[: length - len(ids)]

    def append(self, token_id: int) -> Chunk:
        """Take the next token of the answer; the chunk says what it adds and whether it ends."""
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
