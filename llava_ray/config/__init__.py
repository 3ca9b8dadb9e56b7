"""Typed configuration: pydantic sections in which every field has bounds and a description.

The descriptions are the help texts of the command line. `ServeConfig`, `TrainConfig`,
`EvaluateConfig` and `ConvertConfig` each configure one command; the others are sections of these.
Unknown names are errors, with a suggestion.

`ServeConfig` and `PageConfig` are also read from environment variables `LLAVA_RAY_<FIELD>`.
Arguments of the command line or of a Serve config file take precedence over these, and these over
the defaults.
"""

from llava_ray.config.data import ConvertConfig, DataConfig, DatasetConfig
from llava_ray.config.evaluate import EvaluateConfig, TasksConfig
from llava_ray.config.keys import CLIENT_KEY_VARIABLE, KeyConfig, hash_key
from llava_ray.config.limits import FetchConfig, LimitsConfig
from llava_ray.config.model import (
    DEMO_MODEL,
    PYTHON_VARIABLES,
    DtypeName,
    EngineName,
    ModelConfig,
    QuantizationName,
)
from llava_ray.config.page import ModerationConfig, PageConfig
from llava_ray.config.section import Section, refuse_unknown
from llava_ray.config.serve import WORKER_ADDRESS, LlavaProtocolConfig, ServeConfig
from llava_ray.config.train import BenchmarksConfig, TrainConfig

__all__ = [
    "CLIENT_KEY_VARIABLE",
    "DEMO_MODEL",
    "PYTHON_VARIABLES",
    "WORKER_ADDRESS",
    "BenchmarksConfig",
    "ConvertConfig",
    "DataConfig",
    "DatasetConfig",
    "DtypeName",
    "EngineName",
    "EvaluateConfig",
    "FetchConfig",
    "KeyConfig",
    "LimitsConfig",
    "LlavaProtocolConfig",
    "ModelConfig",
    "ModerationConfig",
    "PageConfig",
    "QuantizationName",
    "Section",
    "ServeConfig",
    "TasksConfig",
    "TrainConfig",
    "hash_key",
    "refuse_unknown",
]
