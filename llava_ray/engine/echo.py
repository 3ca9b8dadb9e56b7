"""The echo engine: a stand-in without weights or torch that keeps the whole `Engine` contract.

It repeats the last user message, counts its images and names the adapter, one word per token. It
serves for tests, for trying the application, and for measuring the cost of all that surrounds an
engine.
"""

import asyncio
import re
from collections.abc import AsyncGenerator, Iterator, Sequence
from dataclasses import replace

from llava_ray.engine.detokenizer import Detokenizer, LogprobCollector
from llava_ray.errors import ContextLengthError, EngineError, RequestError, UnsupportedError
from llava_ray.template import IMAGE_TOKEN, OwnTemplate, Template, check_images, find_template
from llava_ray.types import Chunk, Prompt, Tokens


class EchoEngine:
    """Repeats the last user message; see `Engine`. Every word has probability 1.

    When it answers, a token is a word. `tokenize` and `detokenize` use one token per character: its
    code point.

    Args:
        delay_s: time per token of an answer, in seconds.
        context_length: longest prompt plus answer, in words; an image counts as one.
        template: name of a conversation template; by default one that marks the roles only.
    """

    def __init__(
        self, *, delay_s: float = 0.0, context_length: int = 4096, template: str | None = None
    ) -> None:
        self.template: Template = find_template(template) if template else OwnTemplate()
        self.context_length = context_length
        self._delay_s = delay_s
        self._running: dict[str, int] = {}  # request -> tokens that it holds
        self._is_closed = False

    async def stream(self, prompt: Prompt) -> AsyncGenerator[Chunk]:
        """Yield the answer piece by piece; see `Engine.stream`."""
        await self.check()
        check_images(prompt.text, len(prompt.images))
        if prompt.sampling.json_schema is not None:
            raise UnsupportedError(
                "response_format is not supported by the echo engine, which only repeats the "
                "message: leave it out",
                param="response_format",
            )
        if prompt.token_ids:
            prompt = replace(prompt, text=await self.detokenize(prompt.token_ids), token_ids=())
        self._check_images(prompt)
        num_prompt_tokens = len(prompt.text.split()) + len(prompt.images)
        max_tokens = self._fit(prompt, num_prompt_tokens)
        words = list(_answer(prompt, max_tokens))
        text = Detokenizer(lambda ids: "".join(words[i] for i in ids), stop=prompt.sampling.stop)
        counts = (num_prompt_tokens, len(prompt.images))
        logprobs = LogprobCollector(
            lambda i: words[i].encode(), num_top=prompt.sampling.num_logprobs or 0
        )
        self._running[prompt.request_id] = num_prompt_tokens
        try:
            for i in range(min(len(words), max_tokens)):
                await asyncio.sleep(self._delay_s)
                await self.check()
                self._running[prompt.request_id] += 1
                logprobs.measure(i, 0.0, [(i, 0.0)])
                logprobs.push(text.num_decoded)
                piece = text.push(i)
                is_last = i + 1 == len(words) or i + 1 == max_tokens
                if is_last and not text.is_stopped:
                    piece += text.flush()
                reason = "stop" if text.is_stopped or i + 1 == len(words) else None
                if is_last and reason is None:
                    reason = "length"
                told = logprobs.take(text.num_returned)
                is_asked = prompt.sampling.num_logprobs is not None
                yield Chunk(piece, reason, i + 1, *counts, logprobs=told if is_asked else ())
                if reason is not None:
                    return
        finally:
            del self._running[prompt.request_id]

    async def tokenize(self, prompt: Prompt) -> Tokens:
        """Return one token per character; see `Engine.tokenize`."""
        self._check_images(prompt)
        return Tokens([ord(c) for c in prompt.text], list(prompt.text), self.context_length)

    async def detokenize(self, token_ids: Sequence[int]) -> str:
        """Return the characters; see `Engine.detokenize`."""
        for id_ in token_ids:
            if id_ > 0x10FFFF or 0xD800 <= id_ < 0xE000:
                raise RequestError(f"there is no token {id_}: leave it out", param="tokens")
        return "".join(map(chr, token_ids))

    async def check(self) -> None:
        """Raise an EngineError once the engine is closed; see `Engine.check`."""
        if self._is_closed:
            raise EngineError("the engine was closed")

    def stats(self) -> dict[str, float]:
        """Return the current figures; see `Engine.stats`."""
        return {
            "num_running": len(self._running),
            "num_waiting": 0,
            "cache_tokens_used": sum(self._running.values()),
            "cache_tokens_total": 16 * self.context_length,
        }

    def describe(self) -> dict[str, str]:
        """Return how it computes; see `Engine.describe`."""
        return {"engine": "echo"}

    async def close(self) -> None:
        """End all streams at their next token."""
        self._is_closed = True

    def _check_images(self, prompt: Prompt) -> None:
        if prompt.text.count(IMAGE_TOKEN) != len(prompt.images):
            raise RequestError(
                f"the prompt names {prompt.text.count(IMAGE_TOKEN)} images and "
                f"{len(prompt.images)} came with it: write {IMAGE_TOKEN} once for each image",
                param="messages",
            )

    def _fit(self, prompt: Prompt, num_prompt_tokens: int) -> int:
        room = self.context_length - num_prompt_tokens
        asked = prompt.sampling.max_tokens
        if room > 0 and asked is not None and prompt.sampling.may_cut:
            return min(asked, room)
        if room <= 0 or (asked or 0) > room:
            raise ContextLengthError(
                f"the prompt has {num_prompt_tokens:,} tokens ({len(prompt.images)} for images), "
                f"and max_tokens asks for {asked or 1:,} more, but the context holds "
                f"{self.context_length:,}: shorten the conversation or lower max_tokens",
                param="messages" if room <= 0 else "max_tokens",
            )
        return room if asked is None else asked


def _answer(prompt: Prompt, max_tokens: int) -> Iterator[str]:
    said = prompt.text.rpartition("USER:")[2].rpartition("ASSISTANT:")[0] or prompt.text
    adapter = f", {prompt.adapter}" if prompt.adapter else ""
    text = f"{said.replace('<image>', ' ').strip()} ({len(prompt.images)} images{adapter})"
    words = re.findall(r"\s*\S+", text)
    if not prompt.sampling.ignore_eos:
        yield from words
        return
    for i in range(max_tokens + 1):  # one more than fits, so that the answer ends by its length
        yield (" " if i and i % len(words) == 0 else "") + words[i % len(words)]
