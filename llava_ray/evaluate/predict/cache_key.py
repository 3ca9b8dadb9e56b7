"""Which logged predictions a later run may keep: digests of the model and of each request.

A prediction is kept if its cache key is the one that the same request would have today.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict

from llava_ray.config import EvaluateConfig
from llava_ray.evaluate.predict.connect import fetch_fingerprint
from llava_ray.model.checkpoint.locate import find_folder
from llava_ray.model.fingerprint import PREFIX, digest_folder
from llava_ray.types import Question, Sampling


def digest_model(config: EvaluateConfig, model: str) -> str:
    """Return the digest of the model that answers.

    For a folder it covers the content of every file. A live model of this program tells its
    fingerprint, which does too. Of another server only the address and the model's name are known:
    what it serves may change unnoticed, see `is_known_by_weights`.

    Raises:
        ConfigError: there is no such model.
    """
    if config.endpoint or config.app:
        address = f"{config.endpoint or config.app} {model}"
        return fetch_fingerprint(config, model) or hashlib.sha256(address.encode()).hexdigest()
    if config.engine == "echo":
        return hashlib.sha256(b"echo").hexdigest()
    return digest_folder(find_folder(config.model))


def is_known_by_weights(config: EvaluateConfig, digest: str) -> bool:
    """Return whether other weights would have another digest."""
    return not (config.endpoint or config.app) or digest.startswith(PREFIX)


def describe_settings(config: EvaluateConfig, sampling: Sampling) -> str:
    """Return the settings that change responses, as JSON."""
    settings = {"engine": config.engine, "dtype": config.dtype, "template": config.template}
    if config.quantization != "none":  # left out otherwise: the keys of older logs stay valid
        settings["quantization"] = config.quantization
    return json.dumps({**settings, **asdict(sampling)}, sort_keys=True)


def make_cache_key(
    model_digest: str, question: Question, image_sha256: Sequence[str], settings: str
) -> str:
    """Return one digest of all that a response depends on: model, question, images, settings."""
    content = json.dumps([model_digest, question.text, list(image_sha256), settings])
    return hashlib.sha256(content.encode()).hexdigest()
