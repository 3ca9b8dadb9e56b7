"""API keys: what is kept of them, and what each may use."""

import hashlib
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, model_validator

from llava_ray.config.section import Section

CLIENT_KEY_VARIABLE = "LLAVA_RAY_API_KEY"
"""The environment variable with the key that `llava_ray.client` sends."""

MIN_KEY_LENGTH = 20


def hash_key(key: str) -> str:
    """Return what is kept of an API key. It is 256 random bits, so no slow hash is needed."""
    return hashlib.sha256(key.encode()).hexdigest()


class KeyConfig(Section):
    """An API key and what it may use, counted by each gateway for itself.

    Read from a text, `name=key` or the key alone, it is hashed at once.
    """

    name: str = Field(
        pattern=r"^[A-Za-z0-9_.-]{1,64}$", description="Whose it is: in the log, usage, metrics."
    )
    sha256: str = Field(pattern="^[0-9a-f]{64}$", description="What `llava-ray keys new` printed.")
    is_admin: bool = Field(default=False, description="Sees the usage of all keys.")
    requests_per_min: int | None = Field(default=None, ge=1, description="Requests in a minute.")
    tokens_per_min: int | None = Field(
        default=None, ge=1, description="Tokens of prompts and answers in a minute."
    )
    tokens_per_day: int | None = Field(
        default=None, ge=1, description="Tokens of prompts and answers in a day."
    )
    max_in_flight: int | None = Field(default=None, ge=1, description="Requests at once.")

    @model_validator(mode="before")
    @classmethod
    def _hash_plain(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        name, _, key = value.strip().rpartition("=")
        if len(key) < MIN_KEY_LENGTH:
            raise ValueError(
                f"an API key has {len(key)} characters: take at least {MIN_KEY_LENGTH} random "
                "ones, as `llava-ray keys new NAME` makes them"
            )
        sha256 = hash_key(key)
        return {"name": name or f"key-{sha256[:6]}", "sha256": sha256}


def read_keys(path: Path) -> list[KeyConfig]:
    """Return the keys in a file; a ValueError says what is wrong with it."""
    try:
        entries = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise ValueError(f"cannot read api_keys_file {str(path)!r}: {error}") from error
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise ValueError(
            f"{str(path)!r} is not a list of keys: write lines like - {{name: me, sha256: ...}}, "
            "as `llava-ray keys new me` prints them"
        )
    return [KeyConfig.model_validate(entry) for entry in entries]
