"""Prompt processing that the torch engine and the external engines share.

Before the model: Prompt -> token ids, image inputs, and the number of tokens the answer may have.
After it: what turns the answer's token ids into text and logprobs.
"""

import functools
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from llava_ray.engine.detokenizer import Detokenizer, LogprobCollector
from llava_ray.engine.structured_output import Grammar, GrammarCompiler, Vocabulary
from llava_ray.errors import ContextLengthError, RequestError, UnsupportedError
from llava_ray.model.loading import LoadedModel
from llava_ray.model.processor import mark_images, tiles_only_one
from llava_ray.template import IMAGE_PLACEHOLDER
from llava_ray.types import Prompt, Tokens

_CHARS_PER_TOKEN = 8
"""Texts of more characters than this for each token that fits are tokenised from the start until
they are known to be too long: tokenising ten megabytes holds up others for seconds."""

_NUM_MERGED = 64
"""How many fewer tokens a text may have than its beginning, because words at the cut merge."""

_NUM_CONTEXTS_TO_COUNT = 16
"""`tokenize` counts the tokens of texts that are up to this many times too long."""

_TEXT_INPUTS = ("input_ids", "attention_mask", "token_type_ids")


class InputProcessor:
    """Processes prompts for one model.

    Args:
        core: supplies the tokenizer and the image processor; it may have no weights.
        context_length: longest prompt plus answer, in tokens.
        room: the tokens that prompt and answer may have here: `context_length`, or the size of the
            engine's cache if that is smaller.
    """

    def __init__(self, core: LoadedModel, *, context_length: int, room: int) -> None:
        self._core, self._context_length, self._room = core, context_length, room
        self._grammars = GrammarCompiler(lambda: self._vocabulary)

    def read(self, prompt: Prompt) -> tuple[list[int], dict[str, torch.Tensor] | None]:
        """Return a prompt's token ids, and the model's image inputs (None without images).

        Raises:
            RequestError: the prompt is invalid.
        """
        if prompt.token_ids:
            self.check_token_ids(prompt.token_ids, param="prompt")
            if self._core.image_token_id in prompt.token_ids:
                raise RequestError(
                    f"token {self._core.image_token_id} stands for an image, but a prompt of token "
                    "ids has no images: leave it out",
                    param="prompt",
                )
            return list(prompt.token_ids), None
        self._check_length(prompt.text, self._room)
        return self._read_text(prompt)

    def _check_length(self, text: str, most: int) -> None:
        """Raise a ContextLengthError if a long text surely has more than `most` tokens."""
        length = most * _CHARS_PER_TOKEN
        while length < len(text):
            beginning = text[:length]
            num_tokens = len(self._core.tokenizer(beginning, add_special_tokens=False).input_ids)
            if num_tokens > most + _NUM_MERGED:
                raise ContextLengthError(
                    f"the prompt has {len(text):,} characters, more than {most:,} tokens, but the "
                    f"context holds {self._room:,}, including the answer: shorten the conversation",
                    param="messages",
                )
            length *= 4

    def _read_text(self, prompt: Prompt) -> tuple[list[int], dict[str, torch.Tensor] | None]:
        if not (prompt.images or prompt.add_special_tokens):
            return self._core.tokenizer(prompt.text, add_special_tokens=False).input_ids, None
        inputs = self._core.encode(prompt.text, prompt.images)
        return inputs["input_ids"][0].tolist(), select_images(inputs)

    def write(self, prompt: Prompt, prompt_ids: Sequence[int]) -> dict[str, Any]:
        """Return a prompt for an engine whose processor expands image tokens itself: `token_ids`
        with one image token per image, and `text` without the BOS token, which it adds itself."""
        if not prompt.images:
            return {"token_ids": list(prompt_ids), "text": ""}
        core = self._core
        if len(prompt.images) > 1 and tiles_only_one(core.processor):
            raise UnsupportedError(
                "this engine lays out each of several images in tiles, which LLaVA-OneVision was "
                "not trained on: send one image, or serve the model with engine: torch",
                param="messages",
            )
        image_id = core.image_token_id
        ids = [image_id if i == IMAGE_PLACEHOLDER else i for i in core.tokenize(prompt.text)]
        text = mark_images(prompt.text) if core.checkpoint.uses_start_end else prompt.text
        return {"token_ids": ids, "text": text.removeprefix(core.tokenizer.bos_token or "")}

    def count_image_tokens(self, prompt_ids: Sequence[int]) -> int:
        """Return how many of a prompt's tokens are image tokens."""
        return prompt_ids.count(self._core.image_token_id)

    def fit(self, prompt: Prompt, prompt_ids: Sequence[int]) -> int:
        """Return the most tokens that the answer may have.

        Raises:
            ContextLengthError: prompt and answer do not fit the context.
            RequestError: `logit_bias` names tokens outside the vocabulary.
        """
        biased = [id_ for id_, _ in prompt.sampling.logit_bias]
        self.check_token_ids(biased, param="logit_bias")
        num_tokens, room = len(prompt_ids), self._room
        num_image_tokens = self.count_image_tokens(prompt_ids)
        images = f"{len(prompt.images)} image{'s' if len(prompt.images) > 1 else ''}"
        parts = (
            f" ({num_image_tokens:,} for {images}, {num_tokens - num_image_tokens:,} of text)"
            if prompt.images
            else ""
        )
        asked = prompt.sampling.max_tokens
        if num_tokens >= room:
            raise ContextLengthError(
                f"the prompt has {num_tokens:,} tokens{parts}, but the context holds {room:,}, "
                "including the answer: shorten the conversation"
                f"{' or send fewer images' * bool(parts)}",
                param="messages",
            )
        if asked is not None and prompt.sampling.may_cut:
            return min(asked, room - num_tokens)
        if asked is not None and num_tokens + asked > room:
            raise ContextLengthError(
                f"the prompt has {num_tokens:,} tokens{parts} and max_tokens asks for {asked:,} "
                f"more, but the context holds {room:,}: ask for at most {room - num_tokens:,}",
                param="max_tokens",
            )
        return room - num_tokens if asked is None else asked

    def start_detokenizer(self, prompt: Prompt) -> Detokenizer:
        """Return the detokenizer of a new answer."""
        tokenizer = self._core.tokenizer
        return Detokenizer(
            lambda ids: tokenizer.decode(ids, skip_special_tokens=True), stop=prompt.sampling.stop
        )

    def start_logprobs(self, prompt: Prompt) -> LogprobCollector | None:
        """Return the logprob collector of a new answer; None unless logprobs are requested."""
        num_top = prompt.sampling.num_logprobs
        return (
            None if num_top is None else LogprobCollector(self._vocabulary.spell, num_top=num_top)
        )

    async def compile_format(self, prompt: Prompt) -> Grammar | None:
        """Return the grammar that the answer must follow; None: any text.

        Raises:
            RequestError: the JSON schema is invalid or too complex.
        """
        schema = prompt.sampling.json_schema
        return None if schema is None else await self._grammars.compile(schema)

    def tokenize(self, prompt: Prompt) -> Tokens:
        """Return a prompt's tokens; see `Engine.tokenize`."""
        self._check_length(prompt.text, _NUM_CONTEXTS_TO_COUNT * self._room)
        ids, _ = self._read_text(prompt)
        texts = self._core.tokenizer.convert_ids_to_tokens(ids)
        return Tokens(ids, [text or "" for text in texts], self._context_length)

    def detokenize(self, token_ids: Sequence[int]) -> str:
        """Return the text of tokens; see `Engine.detokenize`."""
        self.check_token_ids(token_ids, param="tokens")
        return self._core.tokenizer.decode(list(token_ids))

    def check_token_ids(self, token_ids: Iterable[int], *, param: str) -> None:
        """Raise a RequestError, which blames `param`, for a token outside the vocabulary."""
        size = self._core.model.config.text_config.vocab_size
        for id_ in token_ids:
            if id_ >= size:
                raise RequestError(
                    f"{param} names token {id_}, but the vocabulary ends at {size - 1}: leave it "
                    "out",
                    param=param,
                )

    @functools.cached_property
    def _vocabulary(self) -> Vocabulary:
        return Vocabulary(
            self._core.tokenizer,
            size=self._core.model.config.text_config.vocab_size,
            eos_token_ids=self._core.eos_token_ids,
        )


def select_images(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor] | None:
    """Return the image inputs among a processor's outputs, each [N, ...]; None without images.

    `batch_num_images` is repeated for each image: models look at it image by image.
    """
    images = {name: value for name, value in inputs.items() if name not in _TEXT_INPUTS}
    if "batch_num_images" in images:
        images["batch_num_images"] = images["batch_num_images"].repeat(len(images["pixel_values"]))
    return images or None
