"""The settings of the page when it is an application of its own, and of its moderation."""

from typing import Any

from pydantic import Field, SecretStr, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from llava_ray.config.section import Section, refuse_unknown


class ModerationConfig(Section):
    """A moderation API that checks each question from the page before a model sees it."""

    url: str = Field(
        default="",
        description="Base URL (up to /v1) of an OpenAI-compatible moderation API. Empty: nothing "
        "is checked.",
    )
    key: SecretStr = Field(
        default=SecretStr(""), description="API key for the moderation API, if it needs one."
    )
    model: str = Field(
        default="omni-moderation-latest", min_length=1, description="Name of the moderation model."
    )
    timeout_s: float = Field(
        default=5, gt=0, le=60, description="Maximum time to wait for a verdict, in seconds."
    )
    allow_on_failure: bool = Field(
        default=False,
        description="Send a question to the model unchecked if the moderation API fails. Default: "
        "refuse the question.",
    )


class PageConfig(BaseSettings):
    """The page as a Serve application of its own, apart from the gateway."""

    model_config = SettingsConfigDict(
        env_prefix="LLAVA_RAY_", env_nested_delimiter="__", extra="forbid"
    )

    gateway_url: str | None = Field(
        default="http://127.0.0.1:8000",
        description="URL of the gateway, as the page's server reaches it. null: the gateway has "
        "the same address as the page.",
    )
    root_path: str | None = Field(
        default=None,
        description="Path or URL under which browsers see the page, if a reverse proxy changes it.",
    )
    feedback_dir: str | None = Field(
        default=None,
        min_length=1,
        description="Folder for the log of conversations and votes. Default: nothing is logged.",
    )
    moderation: ModerationConfig = Field(
        default_factory=ModerationConfig, description="Moderation of questions from the page."
    )
    uploads_kept_s: int = Field(
        default=24 * 3600, ge=1, description="Seconds after which an uploaded image is deleted."
    )

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown(cls, values: Any) -> Any:
        return refuse_unknown(values, cls.model_fields)
