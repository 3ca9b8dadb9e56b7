"""The checked fields of a request -> how its answers are generated (`Sampling`), and how many."""

from llava_ray.config import LimitsConfig
from llava_ray.errors import RequestError, UnsupportedError
from llava_ray.serve.openai.protocol import SamplingBody
from llava_ray.serve.openai.validation import show
from llava_ray.types import Sampling

SMALLEST_TOP_P = 1e-5
"""Below it only the likeliest token is left, so decoding is greedy."""


def read_num_answers(options: SamplingBody, limits: LimitsConfig) -> int:
    """Return the number of answers to each prompt.

    Raises:
        RequestError: `n` is above the limit.
        UnsupportedError: `best_of` differs from `n`.
    """
    num_answers = options.n or 1
    if num_answers > limits.max_answers:
        raise RequestError(
            f"n={num_answers} is more than the {limits.max_answers} answers allowed: ask for fewer",
            param="n",
        )
    if options.best_of not in (None, num_answers):
        raise UnsupportedError(
            f"best_of={options.best_of} is not supported by this server: "
            f"leave it out or send n, which is {num_answers}",
            param="best_of",
        )
    return num_answers


def read_sampling(
    options: SamplingBody,
    *,
    max_tokens: int | None,
    num_logprobs: int | None,
    json_schema: str | None = None,
    may_cut: bool,
) -> Sampling:
    """Return how the answer is to be generated, with OpenAI's defaults.

    Args:
        options: the checked fields.
        max_tokens: the most tokens of the answer; None: as many as fit.
        num_logprobs: see `Sampling`.
        json_schema: see `Sampling`.
        may_cut: see `Sampling`.

    Raises:
        RequestError: the fields contradict each other.
    """
    if max_tokens is not None and (options.min_tokens or 0) > max_tokens:
        raise RequestError(
            f"min_tokens={options.min_tokens} is more than the {max_tokens} tokens that the answer "
            "may have: ask for fewer",
            param="min_tokens",
        )
    temperature = 1.0 if options.temperature is None else options.temperature
    top_p = 1.0 if options.top_p is None else options.top_p
    if top_p < SMALLEST_TOP_P:  # only the likeliest token is left
        temperature, top_p = 0.0, 1.0
    return Sampling(
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        stop=tuple(text for text in options.stop or () if text),  # an empty one stops nothing
        seed=options.seed,
        ignore_eos=bool(options.ignore_eos),
        top_k=max(options.top_k or 0, 0),
        min_p=options.min_p or 0.0,
        presence_penalty=options.presence_penalty or 0.0,
        frequency_penalty=options.frequency_penalty or 0.0,
        repetition_penalty=options.repetition_penalty or 1.0,
        logit_bias=_read_biases(options.logit_bias or {}),
        min_tokens=options.min_tokens or 0,
        stop_token_ids=tuple(options.stop_token_ids or ()),
        num_logprobs=num_logprobs,
        json_schema=json_schema,
        may_cut=may_cut,
    )


def _read_biases(values: dict[str, float]) -> tuple[tuple[int, float], ...]:
    biases = {}
    for name, bias in values.items():
        if not (name.isascii() and name.isdigit() and len(name) < 11):
            raise RequestError(
                f"logit_bias has the key {show(name)}: use token ids as keys, like "
                '"42"; /tokenize returns them',
                param="logit_bias",
            )
        biases[int(name)] = bias
    return tuple(biases.items())
