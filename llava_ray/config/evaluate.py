"""The settings of an evaluation: `llava-ray evaluate`, and `benchmarks` of a training run."""

from pydantic import Field, model_validator

from llava_ray.config.model import (
    DEMO_MODEL,
    DtypeName,
    EngineName,
    ModelConfig,
    NumGpus,
    QuantizationName,
    check_num_gpus,
    check_quantization,
    count_gpus_of_replica,
)
from llava_ray.config.section import Section


class TasksConfig(Section):
    """Which tasks run, the actors that ask their questions, and the judge."""

    tasks: list[str] = Field(
        min_length=1, description="Names of the tasks to run: scienceqa_img, pope, ..."
    )
    data: str = Field(
        min_length=1,
        description="Folder that holds the benchmarks' folders, or the folder of a single task.",
    )
    limit: int | None = Field(
        default=None, ge=1, description="Ask only the first N questions of each task. Default: all."
    )
    num_actors: int = Field(
        default=1,
        ge=1,
        description="Number of actors that answer in parallel; each loads its own engine.",
    )
    num_cpus: float = Field(default=1.0, ge=0, description="CPUs that Ray reserves for each actor.")
    num_gpus: NumGpus = Field(
        default="auto",
        description="GPUs that Ray reserves for each actor; it computes on these and no others. "
        "auto: 1 if the cluster has GPUs or its autoscaler can start machines with GPUs, otherwise "
        "0; also 0 where a server is asked.",
    )
    concurrency: int = Field(
        default=32, ge=1, le=1024, description="Questions that an actor asks at the same time."
    )
    min_coverage: float = Field(
        default=0.99,
        ge=0,
        le=1,
        description="Minimum share of questions that must be scored. Below it a task has no "
        "headline number.",
    )

    judge_endpoint: str | None = Field(
        default=None,
        description="URL of an OpenAI-compatible server whose model grades the responses of "
        "llava_in_the_wild and mmvet. Its API key is read from OPENAI_API_KEY. "
        "Default: those tasks are not graded.",
    )
    judge_model: str = Field(
        default="gpt-4o", min_length=1, description="Name of the judge model at judge_endpoint."
    )
    judge_wording: str | None = Field(
        default=None,
        description="File with the instruction for the judge: plain text, or LLaVA's rule.json. "
        "Default: the built-in wording.",
    )
    judge_concurrency: int = Field(
        default=8, ge=1, le=256, description="Responses that the judge grades at the same time."
    )


class EvaluateConfig(TasksConfig):
    """An evaluation: the model that is asked, its tasks, and the folder of results."""

    model: str = Field(
        default=DEMO_MODEL,
        min_length=1,
        description="Folder, hub name or address of the weights. 'demo' is the embedded model.",
    )
    endpoint: str | None = Field(
        default=None,
        description="Ask the OpenAI-compatible server at this URL instead of loading a model.",
    )
    app: str | None = Field(
        default=None,
        description="Ask the Serve application of this name on the running cluster instead of "
        "loading a model.",
    )
    model_name: str = Field(
        default="",
        description="Name of the model at the endpoint or application. Default: the endpoint's "
        "first model, or the name of model.",
    )
    output: str = Field(
        min_length=1,
        description="Folder for the results. A run that finds its earlier results there resumes.",
    )
    reuse: bool = Field(
        default=False,
        description="Keep the logged predictions of a server that does not tell which weights it "
        "serves. false: such a server is asked all questions again in each run. Models that this "
        "program loads or serves are known by their weights, and are never asked twice.",
    )
    engine: EngineName = Field(
        default="torch", description="Inference engine: torch, vllm, sglang or echo."
    )
    dtype: DtypeName = Field(
        default="auto",
        description="Precision of the weights: auto, float32, bfloat16 or float16. auto: bfloat16 "
        "where the device computes in it at full speed, otherwise float16 (GPU) or float32 (CPU).",
    )
    quantization: QuantizationName = Field(
        default="none",
        description="int8: multiply in 8 bits on CPUs, to measure what it costs in quality. none: "
        "no quantization.",
    )
    template: str | None = Field(
        default=None,
        min_length=1,
        description="Name of the conversation template. Default: what the checkpoint's files "
        "indicate.",
    )

    @model_validator(mode="after")
    def _check_source(self) -> "EvaluateConfig":
        if self.endpoint and self.app:
            raise ValueError("endpoint and app are both set: set only one of them")
        check_quantization(self.engine, self.quantization)
        check_num_gpus(self.num_gpus, self.engine, used=self.gpus_if_any)
        return self

    @property
    def gpus_if_any(self) -> int:
        """What `num_gpus: auto` stands for in a cluster that has GPUs."""
        if self.endpoint or self.app:
            return 0
        return count_gpus_of_replica(self.engine, quantization=self.quantization)

    def describe_model(self) -> ModelConfig:
        """Return the settings of the model that each actor loads."""
        return ModelConfig(
            path=self.model,
            engine=self.engine,
            dtype=self.dtype,
            quantization=self.quantization,
            template=self.template,
            max_batch_size=self.concurrency,
            num_cpus=self.num_cpus,
            num_gpus=self.num_gpus,
            max_replicas=self.num_actors,
        )
