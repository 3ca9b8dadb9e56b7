"""How many tokens the answers to one request took: what is charged, logged and told."""

from collections.abc import Iterable
from typing import NamedTuple

from llava_ray.types import Chunk


class Usage(NamedTuple):
    """Tokens of one request, over all its prompts and answers; each prompt counts once."""

    num_prompt_tokens: int = 0
    num_image_tokens: int = 0
    num_tokens: int = 0
    num_cached_tokens: int = 0


def count_usage(latest: Iterable[Chunk], *, answers_each: int = 1) -> Usage:
    """Return the sums over the latest chunk of each answer.

    Args:
        latest: one chunk for each answer that has begun.
        answers_each: answers to each prompt; their numbers are neighbours.
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
