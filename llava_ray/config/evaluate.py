"""An evaluation: `llava-ray evaluate`, `jobs/evaluate.py`, `benchmarks` of a training run."""

from pydantic import Field, model_validator

from llava_ray.config.model import (
    DEMO_MODEL,
    DtypeName,
    EngineName,
    ModelConfig,
    QuantizationName,
    check_quantization,
)
from llava_ray.config.section import Section


class TasksConfig(Section):
    """Which tasks are asked, by how many actors, and what counts as enough."""

    tasks: list[str] = Field(min_length=1, description="Names of tasks (scienceqa_img, pope, ...).")
    data: str = Field(min_length=1, description="Folder of the benchmarks, or of one task.")
    limit: int | None = Field(default=None, ge=1, description="Ask only the first so many.")
    num_actors: int = Field(default=1, ge=1, description="Engines side by side.")
    num_cpus: float = Field(default=1.0, ge=0, description="CPUs that Ray sets aside an actor.")
    num_gpus: float = Field(default=0.0, ge=0, description="GPUs that Ray sets aside an actor.")
    concurrency: int = Field(
        default=32, ge=1, le=1024, description="Questions that an actor asks at once."
    )
    min_coverage: float = Field(
        default=0.99,
        ge=0,
        le=1,
        description="Share of questions that must be scored for a headline number.",
    )

    judge_endpoint: str | None = Field(
        default=None,
        description="OpenAI-compatible server that grades (llava_in_the_wild, mmvet); its key is "
        "OPENAI_API_KEY.",
    )
    judge_model: str = Field(default="gpt-4o", min_length=1, description="Name of the judge there.")
    judge_wording: str | None = Field(
        default=None,
        description="File of the judge's instruction, in place of ours; LLaVA's rule.json will do.",
    )
    judge_concurrency: int = Field(
        default=8, ge=1, le=256, description="Replies that the judge reads at once."
    )


class EvaluateConfig(TasksConfig):
    """An evaluation: which model answers which tasks, and how."""

    model: str = Field(
        default=DEMO_MODEL, min_length=1, description="Folder or hub name of the weights."
    )
    endpoint: str | None = Field(
        default=None, description="Ask this OpenAI-compatible server in place of loading a model."
    )
    app: str | None = Field(
        default=None, description="Ask this live Serve application in place of loading a model."
    )
    model_name: str = Field(default="", description="Name of the model at the server.")
    output: str = Field(min_length=1, description="Folder of results; what it holds is resumed.")
    engine: EngineName = Field(default="torch", description="torch, vllm, sglang or echo.")
    dtype: DtypeName = Field(default="auto", description="Precision of the weights.")
    quantization: QuantizationName = Field(
        default="none", description="int8: what computing in 8 bits on CPUs costs in quality."
    )
    template: str | None = Field(default=None, min_length=1, description="Conversation template.")

    @model_validator(mode="after")
    def _check_source(self) -> "EvaluateConfig":
        if self.endpoint and self.app:
            raise ValueError("endpoint and app are two ways to ask: give one")
        check_quantization(self.engine, self.quantization)
        return self

    def describe_model(self) -> ModelConfig:
        """The model that an actor loads."""
        return ModelConfig(
            path=self.model,
            engine=self.engine,
            dtype=self.dtype,
            quantization=self.quantization,
            template=self.template,
            max_batch_size=self.concurrency,
            num_cpus=self.num_cpus,
            max_replicas=self.num_actors,
        )
