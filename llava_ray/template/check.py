"""Checks conversations before a template writes them.

`find_problem` is for inference. `check_sample` is for training and stricter, because there nobody
would notice what went wrong.
"""

from collections.abc import Sequence

from llava_ray.errors import SampleError
from llava_ray.template.tokens import IMAGE_TOKEN, count_images, join_text
from llava_ray.types import ImagePart, Message


def find_problem(messages: Sequence[Message], *, has_system: bool = True) -> str | None:
    """Return what is wrong with the order of the messages and how to fix it, or None.

    Args:
        messages: an optional system message, then user and assistant in turn.
        has_system: whether the template supports a system message.
    """
    if not messages:
        return "the conversation is empty: begin with a user message"
    expected = "user"
    for i, message in enumerate(messages):
        if message.role == "system" and i == 0:
            if not has_system:
                return "this template does not support a system message: leave it out"
            if any(isinstance(part, ImagePart) for part in message.parts):
                return "there is an image in the system message: move it to a user message"
        elif message.role != expected:
            return (
                f"message {i + 1} is from the {message.role}, expected one from the {expected}: "
                "send user and assistant messages in turn, at most one system message first"
            )
        else:
            expected = "assistant" if expected == "user" else "user"
    if messages[-1].role == "system":
        return "there is only a system message: add a user message"
    return None


def check_sample(
    messages: Sequence[Message],
    sample_id: str,
    num_images: int | None = None,
    *,
    has_system: bool = True,
) -> None:
    """Check that a conversation can be trained on.

    Raises:
        SampleError: it cannot; the message names the sample.
    """
    problem = find_problem(messages, has_system=has_system)
    if problem is None:
        problem = _find_empty(messages)
    if problem is None and num_images is not None:
        named = count_images(messages)
        if named != num_images:
            problem = (
                f"the messages contain {named} images and the sample has {num_images}: refer to "
                "each image exactly once"
            )
    if problem is not None:
        raise SampleError(f"{name_sample(sample_id)}: {problem}")


def name_sample(sample_id: str) -> str:
    """Return how errors name a sample."""
    return f"sample {sample_id!r}" if sample_id else "a sample without an id"


def _find_empty(messages: Sequence[Message]) -> str | None:
    if not any(message.role == "assistant" for message in messages):
        return "it has no assistant message, so there is nothing to learn: add the answer"
    for i, message in enumerate(messages):
        if IMAGE_TOKEN in join_text(message):
            return (
                f"the text of message {i + 1} contains {IMAGE_TOKEN} without an image: add an "
                "image to the message for each one, or remove it"
            )
        if not join_text(message) and not count_images([message]):
            return f"message {i + 1} is empty: fill it in, or remove the sample"
    return None
