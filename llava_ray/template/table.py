"""The table of LLaVA's own conversation templates, by name.

Models were trained on exactly these texts, roles and separators (LLaVA 1.2, `conversation.py`;
`qwen` is from LLaVA-NeXT). The styles are explained in `styles`.
"""

import difflib
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from llava_ray.errors import ConfigError
from llava_ray.template.listed import ListedTemplate
from llava_ray.template.styles import RenderedTurn

_HELPFUL = "The assistant gives helpful, detailed, and polite answers to the {}'s questions."
_CURIOUS = "A chat between a curious {} and an artificial intelligence assistant. "
_HUMAN = (_CURIOUS + _HELPFUL).format("human", "human")
_USER = (_CURIOUS + _HELPFUL).format("user", "user")
_TAGGED = (
    _CURIOUS.format("user") + "The assistant is able to understand the visual content that the "
    "user provides, and assist the user with a variety of tasks using natural language."
    "The visual content will be provided with the following format: "
    "<Image>visual content</Image>."
)
_VISION = (
    "You are a helpful language and vision assistant. You are able to understand the visual "
    "content that the user provides, and assist the user with a variety of tasks using natural "
    "language."
)
_SAFE = (
    "You are a helpful, respectful and honest assistant. Always answer as helpfully as possible, "
    "while being safe.  Your answers should not include any harmful, unethical, racist, sexist, "
    "toxic, dangerous, or illegal content. Please ensure that your responses are socially "
    "unbiased and positive in nature.\n\nIf a question does not make any sense, or is not "
    "factually coherent, explain why instead of answering something not correct. If you don't "
    "know the answer to a question, please don't share false information."
)
_CHATML = (
    "A conversation between a user and an LLM-based AI assistant. The assistant gives helpful and "
    "honest answers."
)
_EXAMPLE_ANSWER = (
    "Renewable energy sources are those that can be replenished naturally in a relatively short "
    "amount of time, such as solar, wind, hydro, geothermal, and biomass. Non-renewable energy "
    "sources, on the other hand, are finite and will eventually be depleted, such as coal, oil, "
    "and natural gas. Here are some key differences between renewable and non-renewable energy "
    "sources:\n"
    "1. Availability: Renewable energy sources are virtually inexhaustible, while non-renewable "
    "energy sources are finite and will eventually run out.\n"
    "2. Environmental impact: Renewable energy sources have a much lower environmental impact "
    "than non-renewable sources, which can lead to air and water pollution, greenhouse gas "
    "emissions, and other negative effects.\n"
    "3. Cost: Renewable energy sources can be more expensive to initially set up, but they "
    "typically have lower operational costs than non-renewable sources.\n"
    "4. Reliability: Renewable energy sources are often more reliable and can be used in more "
    "remote locations than non-renewable sources.\n"
    "5. Flexibility: Renewable energy sources are often more flexible and can be adapted to "
    "different situations and needs, while non-renewable sources are more rigid and inflexible.\n"
    "6. Sustainability: Renewable energy sources are more sustainable over the long term, while "
    "non-renewable sources are not, and their depletion can lead to economic and social "
    "instability.\n"
)
_EXAMPLE = (
    RenderedTurn(
        False, "What are the key differences between renewable and non-renewable energy sources?"
    ),
    RenderedTurn(True, _EXAMPLE_ANSWER),
)

_TAGS = ("<Image>", "</Image>")
_HASHES: dict[str, Any] = {"roles": ("Human", "Assistant"), "end": "###", "gap": "###"}

_LISTED = (
    ListedTemplate("v0", "single", _HUMAN, **_HASHES, example=_EXAMPLE),
    ListedTemplate("llava_v0", "single", _HUMAN, **_HASHES),
    ListedTemplate("v0_mmtag", "single", _TAGGED, **_HASHES, tags=_TAGS),
    ListedTemplate("vicuna_v1", "two", _USER, gap=" "),
    ListedTemplate("llava_v1", "two", _HUMAN, gap=" "),
    ListedTemplate("v1_mmtag", "two", _TAGGED, gap=" ", tags=_TAGS),
    ListedTemplate("llama_2", "llama_2", _SAFE, begin="<s>"),
    ListedTemplate("llava_llama_2", "llama_2", _VISION, begin="<s>"),
    ListedTemplate("mistral_instruct", "llama_2"),
    ListedTemplate("mpt", "chatml", _CHATML, end="<|im_end|>"),
    ListedTemplate("chatml_direct", "chatml", "Answer the questions.", end="<|im_end|>"),
    ListedTemplate(
        "qwen",
        "chatml",
        "You are a helpful assistant.",
        end="<|im_end|>",
        gap="\n",
        is_interleaved=True,
    ),
    ListedTemplate("plain", "plain", end="\n"),
)

OTHER_NAMES = {
    "default": "v0",
    "v1": "vicuna_v1",
    "mistral_direct": "chatml_direct",
    "v0_plain": "plain",
    "qwen_1_5": "qwen",
}
"""Aliases of templates."""

TEMPLATES: Mapping[str, ListedTemplate] = MappingProxyType(
    {template.name: template for template in _LISTED}
)


def find_template(name: str) -> ListedTemplate:
    """Return the template of that name.

    Raises:
        ConfigError: there is none; the message lists the known names.
    """
    found = TEMPLATES.get(OTHER_NAMES.get(name, name))
    if found is None:
        known = [*TEMPLATES, *OTHER_NAMES]
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise ConfigError(
            f"there is no conversation template {name!r}: {hint}Known are {', '.join(known)}"
        )
    return found
