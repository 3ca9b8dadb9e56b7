"""A look at some of a run's samples before it starts: how long they are, and which are left out.

`launch` refuses a run of which no sample can be used, and `dry_run` tells what it found.
"""

from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from llava_ray.config import TrainConfig
from llava_ray.data.loader.dataset import SampleReader, ShardedDatasets
from llava_ray.data.loader.encode import Encoder
from llava_ray.data.loader.order import SampleOrder
from llava_ray.errors import ConfigError, ImageError, SampleError

NUM_SAMPLES = 64


@dataclass
class SampleSurvey:
    """What was found.

    Attributes:
        num_samples: how many samples an epoch has.
        lengths: of the samples that can be used, in tokens.
        left_out: how many cannot be used, by reason.
        example: the message of the first of those.
    """

    num_samples: int
    lengths: list[int] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)
    example: str = ""

    @property
    def num_checked(self) -> int:
        return len(self.lengths) + self.left_out.total()

    @property
    def longest(self) -> int:
        """The length of the longest sample, in tokens; 0 if none can be used."""
        return max(self.lengths, default=0)

    def describe(self) -> str:
        """Return lines for the console."""
        checked = f"{self.num_checked:,} of {self.num_samples:,} samples were looked at"
        if not self.left_out:
            return f"{checked}: all can be used, the longest has {self.longest:,} tokens"
        reasons = describe_reasons(self.left_out)
        return (
            f"{checked}: {self.left_out.total():,} are left out of training ({reasons}); "
            f"for example: {self.example}"
        )


def describe_reasons(left_out: Counter[str]) -> str:
    """Return the reasons for which samples are left out, with their counts."""
    return ", ".join(f"{reason} {num:,}" for reason, num in left_out.most_common())


def survey_samples(
    config: TrainConfig, datasets: ShardedDatasets, order: SampleOrder, encoder: Encoder
) -> SampleSurvey:
    """Encode samples that are spread over the first epoch, and go on until one can be used.

    Raises:
        ConfigError: none of all samples can be used.
    """
    numbers = order.order_epoch(0)
    survey = SampleSurvey(len(numbers))
    spread = np.unique(np.linspace(0, len(numbers) - 1, NUM_SAMPLES, dtype=int))
    others = np.setdiff1d(np.arange(len(numbers)), spread)
    reader = SampleReader(datasets)
    for place in (*spread, *others):
        if survey.lengths and survey.num_checked >= len(spread):
            break
        try:
            row = reader.read(int(numbers[place]))
            survey.lengths.append(len(encoder.encode(row, config.data.limits).input_ids))
        except (SampleError, ImageError) as error:
            survey.left_out[getattr(error, "reason", None) or "image"] += 1
            survey.example = survey.example or error.message
    if not survey.lengths:
        raise ConfigError(
            f"none of the {survey.num_samples:,} samples can be used "
            f"({describe_reasons(survey.left_out)}): {survey.example}"
        )
    return survey
