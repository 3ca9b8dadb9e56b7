"""API keys: how they are stored, and the rate limits of each."""

import hashlib
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, model_validator

from llava_ray.config.section import Section

CLIENT_KEY_VARIABLE = "LLAVA_RAY_API_KEY"
"""The environment variable with the API key that `llava_ray.client` sends."""

MIN_KEY_LENGTH = 20


def hash_key(key: str) -> str:
    """Return the digest that is stored in place of an API key.

    A key has 256 random bits, so a slow password hash is not needed.
    """
    return hashlib.sha256(key.encode()).hexdigest()


class KeyConfig(Section):
    """An API key and its rate limits.

    All gateways together count requests and tokens; `max_in_flight` holds for each gateway alone.
    A plain text, `name=key` or just the key, is hashed as soon as it is read.
    """

    name: str = Field(
        pattern=r"^[A-Za-z0-9_.-]{1,64}$",
        description="Name of the key's owner, in the log, usage report and metrics.",
    )
    sha256: str = Field(
        pattern="^[0-9a-f]{64}$",
        description="SHA-256 of the key, as printed by llava-ray keys new.",
    )
    is_admin: bool = Field(default=False, description="This key may see the usage of all keys.")
    requests_per_min: int | None = Field(
        default=None, ge=1, description="Maximum number of requests per minute. Default: no limit."
    )
    tokens_per_min: int | None = Field(
        default=None,
        ge=1,
        description="Maximum number of tokens per minute, prompts and answers together. Default: "
        "no limit.",
    )
    tokens_per_day: int | None = Field(
        default=None,
        ge=1,
        description="Maximum number of tokens per day, prompts and answers together. Default: no "
        "limit.",
    )
    max_in_flight: int | None = Field(
        default=None,
        ge=1,
        description="Maximum number of requests at the same time at each gateway. Default: no "
        "limit.",
    )

    @model_validator(mode="before")
    @classmethod
    def _hash_plain(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        name, _, key = value.strip().rpartition("=")
        if len(key) < MIN_KEY_LENGTH:
            raise ValueError(
                f"an API key has only {len(key)} characters: use at least {MIN_KEY_LENGTH} random "
                "ones; `llava-ray keys new NAME` makes such a key"
            )
        sha256 = hash_key(key)
        return {"name": name or f"key-{sha256[:6]}", "sha256": sha256}


def read_keys(path: Path) -> list[KeyConfig]:
    """Return the keys in a YAML or JSON file.

    Raises:
        ValueError: the file cannot be read, or is not a list of keys.
    """
    try:
        entries = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise ValueError(f"cannot read api_keys_file {str(path)!r}: {error}") from error
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise ValueError(
            f"{str(path)!r} is not a list of keys: write lines like - {{name: me, sha256: ...}}, "
            "which `llava-ray keys new me` prints"
        )
    return [KeyConfig.model_validate(entry) for entry in entries]
