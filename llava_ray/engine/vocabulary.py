"""A model's tokens as bytes. Made when the first request needs it, since that takes about a second.

Written with llguidance, which reads every kind of transformers' fast tokenizers.
"""

from typing import Any

from llguidance import hf

from llava_ray.errors import UnsupportedError


class Vocabulary:
    """What each token id of a model stands for.

    Args:
        tokenizer: transformers' tokenizer.
        size: length of the model's logits.
        eos_token_ids: an answer ends at any of these.

    Raises:
        UnsupportedError: this tokenizer does not tell.
    """

    def __init__(self, tokenizer: Any, *, size: int, eos_token_ids: frozenset[int]) -> None:
        self._num_named = len(tokenizer)  # logits are often rounded up to more
        try:
            self._tokens = hf.from_tokenizer(
                tokenizer, n_vocab=max(size, len(tokenizer)), eos_token=sorted(eos_token_ids)
            )
        except ValueError as error:
            raise UnsupportedError(
                f"the tokenizer of this model does not tell what its tokens stand for ({error}): "
                "ask without logprobs and response_format"
            ) from error

    def spell(self, token_id: int) -> bytes:
        """Return the bytes of a token; they may be a part of a character."""
        return self._tokens.decode_bytes([token_id]) if token_id < self._num_named else b""
