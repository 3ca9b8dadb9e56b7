"""Requests to LLaVA's own workers: Request -> the JSON body of `/worker_generate_stream`.

Conversations are rendered here, because these workers only take prompts.
"""

import base64
from dataclasses import fields
from typing import Any, NamedTuple

from llava_ray.errors import UnsupportedError
from llava_ray.template import check_images, find_template
from llava_ray.types import ChatRequest, ImagePart, PromptRequest, Request, Sampling

_MAX_NEW_TOKENS = 1024
"""LLaVA's workers never generate more than this."""
_KNOWN_SAMPLING = {"max_tokens", "may_cut", "temperature", "top_p", "stop"}


class WorkerRequest(NamedTuple):
    """The body for a worker, and how to read its response.

    Attributes:
        body: of `/worker_generate_stream`.
        stop: the texts that end the answer; the worker itself applies at most one.
        is_chat: whether white space at the start of the answer is removed.
    """

    body: dict[str, Any]
    stop: tuple[str, ...]
    is_chat: bool


def build_worker_request(request: Request) -> WorkerRequest:
    """Return what to send to a worker for a request.

    A conversation is rendered with the template that LLaVA's page uses for the model's name.

    Raises:
        UnsupportedError: the request uses what these workers cannot do.
        RequestError: the template does not accept the conversation, or the number of image
            placeholders in the prompt is not the number of images.
    """
    sampling = request.sampling
    for field in fields(Sampling):
        if field.name not in _KNOWN_SAMPLING and getattr(sampling, field.name) != field.default:
            raise UnsupportedError(
                f"{field.name} is not supported by LLaVA's own workers, one of which serves "
                f"{request.model!r}: leave it out",
                param=field.name,
            )
    if request.num_answers > 1:
        raise UnsupportedError(
            f"n={request.num_answers} is not supported by LLaVA's own workers, one of which serves "
            f"{request.model!r}: send the request n times",
            param="n",
        )
    if isinstance(request, PromptRequest):
        prompt, images, stop = request.prompt, request.images, sampling.stop
    else:
        template = find_template(name_template(request.model))
        prompt = template.render(request.messages)
        stop = (*sampling.stop, *template.stop)
        images = tuple(
            part
            for message in request.messages
            for part in message.parts
            if isinstance(part, ImagePart)
        )
    check_images(prompt, len(images))
    body = {
        "model": request.model,
        "prompt": prompt,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "max_new_tokens": min(sampling.max_tokens or _MAX_NEW_TOKENS, _MAX_NEW_TOKENS),
        "stop": stop[-1] if stop else "</s>",  # these workers fail without one
        "images": [base64.b64encode(image.data).decode() for image in images],
    }
    is_chat = isinstance(request, ChatRequest) and request.messages[-1].role == "user"
    return WorkerRequest(body, stop, is_chat=is_chat)


def name_template(model: str) -> str:
    """Return the name of the template that LLaVA's page uses for a model name."""
    name = model.lower()
    is_tagged = "mmtag" in name or ("plain" in name and "finetune" not in name)
    if "llava" not in name:
        return "mpt" if "mpt" in name else "llama_2" if "llama-2" in name else "vicuna_v1"
    if "llama-2" in name:
        return "llava_llama_2"
    if "mistral" in name or "mixtral" in name:
        return "chatml_direct" if "hermes" in name else "mistral_instruct"
    if "llava-v1.6-34b" in name:
        return "chatml_direct"
    if "v1" in name:
        return "v1_mmtag" if is_tagged else "llava_v1"
    if "mpt" in name:
        return "mpt"
    return "v0_mmtag" if is_tagged else "llava_v0"
