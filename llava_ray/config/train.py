"""A training run: what of a model is trained on what, how, on how many workers, what is kept.

Names follow Hugging Face Trainer, DeepSpeed and LLaVA where these have one, so that a recipe can be
read beside the script it came from.
"""

from typing import Literal

from pydantic import Field, model_validator

from llava_ray.config.data import DataConfig, DatasetConfig
from llava_ray.config.evaluate import TasksConfig
from llava_ray.config.section import Section

Method = Literal["projector", "full", "lora"]
Tracker = Literal["tensorboard", "wandb", "mlflow"]


class BenchmarksConfig(TasksConfig):
    """Tasks of `llava-ray evaluate` by which checkpoints are measured while training goes on."""

    steps: int | None = Field(
        default=None,
        ge=1,
        description="Steps from one to the next, a multiple of save_steps; default: each save. "
        "The last checkpoint is always measured.",
    )


class TrainConfig(Section):
    """One run: what is trained on what, how, on how many workers, and what is kept of it."""

    # The model and what of it is trained.
    model: str = Field(
        min_length=1, description="Folder or hub name of the LLaVA to begin with; see `build`."
    )
    base: str | None = Field(default=None, description="The model below a projector or adapter.")
    vision_tower: str | None = Field(
        default=None, description="The tower, of LLaVA's own layout, if not where it says."
    )
    pretrain_mm_mlp_adapter: str | None = Field(
        default=None,
        description="Folder of a trained projector to begin with: a run's export, or any "
        "checkpoint of the same sizes.",
    )
    template: str | None = Field(
        default=None, description="Conversation template; default: what the model's files say."
    )
    method: Method = Field(
        default="full",
        description="What is trained beside the projector: nothing (projector), the language "
        "model (full), or low-rank adapters in it (lora).",
    )
    train_projector: bool = Field(default=True, description="The projector is trained too.")
    train_vision_tower: bool = Field(default=False, description="The vision tower is trained too.")
    quantization: Literal["4bit", "8bit"] | None = Field(
        default=None, description="Precision of the frozen language model below adapters (QLoRA)."
    )
    lora_r: int = Field(default=128, ge=1, le=4096, description="Rank of the adapters.")
    lora_alpha: int = Field(default=256, ge=1, description="Their scale is lora_alpha / lora_r.")
    lora_dropout: float = Field(default=0.05, ge=0, lt=1, description="Dropout before them.")

    # The data.
    data: DataConfig = Field(description="What is read; its batch_size is train_batch_size.")
    eval_datasets: list[DatasetConfig] = Field(
        default_factory=list, description="Shards on which the loss is measured while training."
    )
    eval_steps: int | None = Field(
        default=None, ge=1, description="Steps from one evaluation to the next; default: each save."
    )

    num_generations: int = Field(
        default=0, ge=0, le=64, description="Held-out questions answered at each evaluation."
    )
    benchmarks: BenchmarksConfig | None = Field(
        default=None, description="Tasks that checkpoints are measured by while training goes on."
    )

    # Batches.
    train_batch_size: int = Field(
        default=128, ge=1, description="Samples of a step, over all workers and accumulation."
    )
    per_device_train_batch_size: int = Field(
        default=16, ge=1, description="Samples that a worker computes at once."
    )
    gradient_accumulation_steps: int | None = Field(
        default=None,
        ge=1,
        description="Batches of a worker in a step; default: what train_batch_size leaves.",
    )
    num_train_epochs: int = Field(default=1, ge=1, description="Times that the data is gone over.")
    max_steps: int | None = Field(default=None, ge=1, description="Ends earlier, after so many.")

    # Optimisation: AdamW.
    learning_rate: float = Field(default=2e-5, gt=0, description="Highest learning rate.")
    mm_projector_lr: float | None = Field(
        default=None, gt=0, description="The projector's; default: learning_rate."
    )
    vision_lr: float | None = Field(
        default=None, gt=0, description="The vision tower's; default: learning_rate."
    )
    weight_decay: float = Field(
        default=0.0, ge=0, description="Of matrices; never of norms and biases."
    )
    mm_projector_weight_decay: float | None = Field(
        default=None, ge=0, description="The projector's; default: weight_decay."
    )
    vision_weight_decay: float | None = Field(
        default=None, ge=0, description="The vision tower's; default: weight_decay."
    )
    adam_beta1: float = Field(default=0.9, ge=0, lt=1, description="Decay of the mean gradient.")
    adam_beta2: float = Field(default=0.999, ge=0, lt=1, description="Decay of its square's mean.")
    adam_epsilon: float = Field(default=1e-8, gt=0, description="Keeps AdamW from dividing by 0.")
    max_grad_norm: float = Field(default=1.0, ge=0, description="Gradients are clipped to; 0: not.")
    lr_scheduler_type: Literal["cosine", "linear", "constant"] = Field(
        default="cosine", description="How the learning rate falls after its warm-up."
    )
    warmup_ratio: float = Field(
        default=0.03, ge=0, le=1, description="Share of the steps in which it rises from 0."
    )
    warmup_steps: int | None = Field(
        default=None, ge=0, description="The same in steps, in place of warmup_ratio."
    )

    # How it is computed.
    bf16: bool | Literal["auto"] = Field(
        default="auto", description="bfloat16 weights; auto: on GPUs; otherwise float32."
    )
    tf32: bool = Field(default=True, description="GPUs may round float32 products to TF32.")
    gradient_checkpointing: bool = Field(
        default=True, description="Computes activations twice rather than keep them."
    )
    attention: str = Field(
        default="sdpa", description="sdpa, flash_attention_2 or eager; as transformers names them."
    )
    use_liger_kernel: bool = Field(
        default=False, description="Liger's fused kernels, on GPUs: pip install liger-kernel."
    )
    deepspeed: str | None = Field(
        default=None,
        description='A DeepSpeed JSON; values "auto" are filled in; in place of zero_stage.',
    )
    zero_stage: Literal[0, 1, 2, 3] = Field(
        default=2,
        description="ZeRO: what is divided among workers: 1 the optimizer's state, 2 also "
        "gradients, 3 also weights.",
    )
    offload: Literal["none", "optimizer", "all"] = Field(
        default="none", description="What is kept in the CPUs' memory; all: weights too (ZeRO 3)."
    )
    seed: int = Field(default=42, ge=0, description="Of data order, dropout and new weights.")

    # Where it runs.
    num_workers: int = Field(default=1, ge=1, description="Training processes, one a GPU.")
    min_workers: int | None = Field(
        default=None,
        ge=1,
        description="Workers with which a run begins, or goes on after a machine was lost, while "
        "there is no room for num_workers; default: it waits for room for all.",
    )
    grow_every_s: float = Field(
        default=60.0,
        gt=0,
        description="With min_workers: how often a run looks for room for more workers. With those "
        "it goes on from its last checkpoint.",
    )
    use_gpu: bool | Literal["auto"] = Field(
        default="auto", description="auto: if this cluster has any."
    )
    cpus_per_worker: float = Field(default=1.0, ge=0, description="CPUs set aside for each.")
    max_failures: int = Field(
        default=3, ge=-1, description="Times a run goes on from its last checkpoint; -1: always."
    )

    # What is kept.
    name: str = Field(pattern=r"^[\w][\w.-]*$", description="Of the run: its folder in output_dir.")
    output_dir: str = Field(
        default="outputs", min_length=1, description="Folder or address (s3://...) of all runs."
    )
    save_steps: int = Field(default=500, ge=1, description="Steps from one checkpoint to the next.")
    save_total_limit: int | None = Field(
        default=1, ge=1, description="Checkpoints kept; without a metric the newest."
    )
    metric_for_best_model: str | None = Field(
        default=None,
        description="Keeps the checkpoints that are best by it, and the newest; the best is "
        "exported. Lowest: loss, eval_loss; highest: a task of benchmarks.",
    )
    export_to: Literal["hf", "original"] | None = Field(
        default=None, description="Form of the run's export; default: that of the model."
    )
    logging_steps: int = Field(default=1, ge=1, description="Steps from one line to the next.")
    peak_tflops: float | None = Field(
        default=None,
        gt=0,
        description="What a GPU can do in bfloat16, for MFU; default: known for common ones.",
    )
    report_to: list[Tracker] = Field(
        default_factory=list, description="tensorboard, wandb, mlflow; beside train_log.jsonl."
    )

    @model_validator(mode="after")
    def _check(self) -> "TrainConfig":
        if self.quantization and self.method == "full":
            raise ValueError(
                "quantized weights cannot be trained: set method=lora, or leave quantization away"
            )
        if self.method == "projector" and not self.train_projector:
            raise ValueError("method=projector with train_projector=false leaves nothing to train")
        if self.offload == "all" and self.zero_stage != 3 and not self.deepspeed:
            raise ValueError("offload=all needs zero_stage=3, which divides the weights")
        if self.quantization and self.zero_stage == 3:
            raise ValueError("quantized weights cannot be divided: set zero_stage=2 or lower")
        if self.eval_steps and not self.eval_datasets:
            raise ValueError("eval_steps needs eval_datasets")
        if self.num_generations and not self.eval_datasets:
            raise ValueError("num_generations needs eval_datasets")
        self._check_metric()
        if self.benchmarks and (self.benchmarks.steps or 0) % self.save_steps:
            raise ValueError(
                f"benchmarks.steps={self.benchmarks.steps} is no multiple of "
                f"save_steps={self.save_steps}: checkpoints are what is measured"
            )
        if self.min_workers and self.min_workers > self.num_workers:
            raise ValueError(
                f"min_workers={self.min_workers} is more than num_workers={self.num_workers}: "
                "lower it, or leave it away"
            )
        self._share_with_data()
        self.count_accumulation(self.num_workers)
        return self

    def _check_metric(self) -> None:
        metric = self.metric_for_best_model
        if metric == "eval_loss" and not self.eval_datasets:
            raise ValueError("metric_for_best_model=eval_loss needs eval_datasets")
        tasks = self.benchmarks.tasks if self.benchmarks else []
        if metric and metric not in ("loss", "eval_loss", *tasks):
            raise ValueError(
                f"metric_for_best_model={metric}: it is loss, eval_loss or a task of benchmarks "
                f"({', '.join(tasks) or 'there are none'})"
            )

    def _share_with_data(self) -> None:
        """Give the data the settings that are the whole run's."""
        for name, value in (("batch_size", self.train_batch_size), ("seed", self.seed)):
            if name in self.data.model_fields_set and getattr(self.data, name) != value:
                said = "train_batch_size" if name == "batch_size" else "seed"
                raise ValueError(
                    f"data.{name}={getattr(self.data, name)} and {said}={value} say two things: "
                    f"leave data.{name} away"
                )
        self.data = self.data.model_copy(
            update={"batch_size": self.train_batch_size, "seed": self.seed}
        )

    def count_accumulation(self, num_workers: int) -> int:
        """Return how many batches each of so many workers computes in a step.

        Where there are other workers than the run asks for, some may have a sample less than
        others.

        Raises:
            ValueError: the batch does not divide among the workers that the run asks for.
        """
        at_once = self.per_device_train_batch_size * num_workers
        steps, rest = divmod(self.train_batch_size, at_once)
        if num_workers != self.num_workers:
            return steps + bool(rest)
        if rest or not steps:
            raise ValueError(
                f"train_batch_size={self.train_batch_size} is no multiple of "
                f"per_device_train_batch_size={self.per_device_train_batch_size} x {num_workers} "
                f"workers = {at_once}: change one of them"
            )
        given = self.gradient_accumulation_steps
        if given and given != steps:
            raise ValueError(
                f"gradient_accumulation_steps={given} x per_device_train_batch_size="
                f"{self.per_device_train_batch_size} x {num_workers} workers is "
                f"{given * at_once}, not train_batch_size={self.train_batch_size}: leave "
                "gradient_accumulation_steps away"
            )
        return steps
