"""What a prompt's tokens stand for, so that equal beginnings can be told from like ones.

To the language model's tokenizer all images are the same token, repeated.
"""

import hashlib
from collections.abc import Sequence
from itertools import groupby

from PIL.Image import Image


def hash_images(images: Sequence[Image]) -> list[int]:
    """Return a number for the content of each image."""
    return [_hash(image.tobytes(), repr(image.size).encode()) for image in images]


def identify_tokens(
    prompt_ids: list[int], image_token_id: int, names: Sequence[int], *, adapter: str = ""
) -> list[int]:
    """Return a prompt's ids, each image token replaced by a number for the content of its image.

    `names` are those of its images. Where images stand side by side, with nothing to say where
    one ends, each of their tokens stands for all of the prompt's images. With an adapter, which
    computes other keys and values of the same tokens, the first stands for that too.
    """
    content = _number_images(prompt_ids, image_token_id, names) if names else prompt_ids
    return [_hash(f"{content[0]} {adapter}".encode()), *content[1:]] if adapter else content


def _number_images(prompt_ids: list[int], image_token_id: int, names: Sequence[int]) -> list[int]:
    runs = [list(run) for _, run in groupby(prompt_ids, lambda id_: id_ == image_token_id)]
    num_runs = sum(run[0] == image_token_id for run in runs)
    if num_runs != len(names):
        names = [hash(tuple(names))] * num_runs
    numbers = iter(names)
    content = []
    for run in runs:
        content += [next(numbers)] * len(run) if run[0] == image_token_id else run
    return content


def _hash(*parts: bytes) -> int:
    """A number that no token has: what differs has different ones."""
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        digest.update(part)
    return -1 - int.from_bytes(digest.digest())
