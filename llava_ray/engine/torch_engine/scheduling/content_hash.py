"""Content hashes of images, which tell prompts with equal tokens but different images apart.

In a prompt's token ids all images look the same: one image token, repeated. The prefix cache and
the encoder cache compare these hashes instead.
"""

import hashlib
from collections.abc import Sequence
from itertools import groupby

from PIL.Image import Image


def hash_images(images: Sequence[Image], *, layout: str = "") -> list[int]:
    """Return a hash of each image's pixels and size; negative, unlike any token id.

    Args:
        images: the images of one prompt.
        layout: how they are laid out, if the same image has other features in other prompts.
    """
    return [_hash(image.tobytes(), f"{image.size}{layout}".encode()) for image in images]


def identify_tokens(
    prompt_ids: list[int], image_token_id: int, names: Sequence[int], *, adapter: str = ""
) -> list[int]:
    """Return a prompt's token ids, with each image token replaced by the hash of its image.

    Adjacent images cannot be told apart in the ids; then every image token is replaced by one hash
    of all the prompt's images. An adapter computes different keys and values for the same tokens,
    so its name is hashed into the first element.

    Args:
        prompt_ids: the prompt's token ids.
        image_token_id: the id of image tokens.
        names: the hashes of the prompt's images, in order.
        adapter: name of the adapter; empty: the base model.
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
    """Return a negative 64-bit hash, which no token id equals."""
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        digest.update(part)
    return -1 - int.from_bytes(digest.digest())
