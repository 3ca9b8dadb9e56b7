"""Counts the tokens of a request: for its response, the log, metrics and the caller's budget."""

from collections.abc import Iterable
from typing import NamedTuple

from llava_ray.types import Chunk


class Usage(NamedTuple):
    """Token counts of one request, summed over its prompts and answers; each prompt counts once."""

    num_prompt_tokens: int = 0
    num_image_tokens: int = 0
    num_tokens: int = 0
    num_cached_tokens: int = 0


def count_usage(latest: Iterable[Chunk], *, answers_each: int = 1) -> Usage:
    """Return the usage of a request.

    Args:
        latest: the latest chunk of each answer that has begun.
        answers_each: number of answers to each prompt, which are numbered consecutively.
    """
    prompts: dict[int, Chunk] = {}
    num_tokens = 0
    for chunk in latest:
        num_tokens += chunk.num_tokens
        prompts[chunk.answer // answers_each] = chunk
    return Usage(
        sum(chunk.num_prompt_tokens for chunk in prompts.values()),
        sum(chunk.num_image_tokens for chunk in prompts.values()),
        num_tokens,
        sum(chunk.num_cached_tokens for chunk in prompts.values()),
    )
