"""The page: as an application of its own, and who checks its questions."""

from typing import Any

from pydantic import Field, SecretStr, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from llava_ray.config.section import Section, refuse_unknown


class ModerationConfig(Section):
    """An endpoint that is asked before a question from the page goes to a model."""

    url: str = Field(
        default="",
        description="Address of an OpenAI-compatible moderation API up to /v1; empty: nothing is "
        "checked.",
    )
    key: SecretStr = Field(default=SecretStr(""), description="Its API key, if it wants one.")
    model: str = Field(
        default="omni-moderation-latest", min_length=1, description="The model that judges."
    )
    timeout_s: float = Field(default=5, gt=0, le=60, description="Seconds to wait for a verdict.")
    allow_on_failure: bool = Field(
        default=False, description="Send a question unchecked when the endpoint does not answer."
    )


class PageConfig(BaseSettings):
    """The page as an application of its own."""

    model_config = SettingsConfigDict(
        env_prefix="LLAVA_RAY_", env_nested_delimiter="__", extra="forbid"
    )

    gateway_url: str | None = Field(
        default="http://127.0.0.1:8000",
        description="Where the gateway answers, seen from the page; null: where the page does.",
    )
    root_path: str | None = Field(
        default=None,
        description="Path or address of the page as people see it, if a reverse proxy changes it.",
    )
    feedback_dir: str | None = Field(
        default=None,
        min_length=1,
        description="Folder of the log of conversations and votes; default: nothing is kept.",
    )
    moderation: ModerationConfig = Field(
        default_factory=ModerationConfig, description="Who checks questions beforehand."
    )
    uploads_kept_s: int = Field(
        default=24 * 3600, ge=1, description="Seconds after which an uploaded image is deleted."
    )

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown(cls, values: Any) -> Any:
        return refuse_unknown(values, cls.model_fields)
