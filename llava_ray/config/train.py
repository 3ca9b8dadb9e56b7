"""The settings of a training run: `llava-ray train` and `llava_ray.train.launch`.

Names follow Hugging Face Trainer, DeepSpeed and LLaVA where these have one, so that a recipe can be
compared with the script that it comes from.
"""

from typing import Literal

from pydantic import Field, model_validator

from llava_ray.config.data import DataConfig, DatasetConfig
from llava_ray.config.evaluate import TasksConfig
from llava_ray.config.section import Section

Method = Literal["projector", "full", "lora"]
Tracker = Literal["tensorboard", "wandb", "mlflow"]


class BenchmarksConfig(TasksConfig):
    """Tasks of `llava-ray evaluate` that evaluate checkpoints while training continues."""

    steps: int | None = Field(
        default=None,
        ge=1,
        description="Number of steps between two evaluations; a multiple of save_steps. Default: "
        "every checkpoint is evaluated. The last checkpoint always is.",
    )


class TrainConfig(Section):
    """A training run: model, data, optimization, workers, and the checkpoints that are kept."""

    # The model, and which parts of it are trained.
    model: str = Field(
        min_length=1,
        description="Folder, hub name or address of the LLaVA checkpoint to start from. llava-ray "
        "build makes one from a language model and a vision tower.",
    )
    base: str | None = Field(
        default=None, description="Base model, if model is a projector or adapter without one."
    )
    vision_tower: str | None = Field(
        default=None,
        description="Vision tower of a checkpoint in LLaVA's original format, if it is not where "
        "the checkpoint says.",
    )
    pretrain_mm_mlp_adapter: str | None = Field(
        default=None,
        description="Folder of a trained projector to start from: a run's export, or any "
        "checkpoint of the same sizes.",
    )
    template: str | None = Field(
        default=None,
        description="Name of the conversation template. Default: what the checkpoint's files "
        "indicate.",
    )
    method: Method = Field(
        default="full",
        description="How the language model is trained. projector: it is frozen. full: all its "
        "weights. lora: low-rank adapters in it.",
    )
    train_projector: bool = Field(default=True, description="Train the projector.")
    train_vision_tower: bool = Field(default=False, description="Train the vision tower.")
    quantization: Literal["4bit", "8bit"] | None = Field(
        default=None,
        description="Quantization of the frozen language model under LoRA adapters (QLoRA). "
        "Default: none.",
    )
    lora_r: int = Field(default=128, ge=1, le=4096, description="Rank of the LoRA adapters.")
    lora_alpha: int = Field(
        default=256,
        ge=1,
        description="Scale of the LoRA adapters: their output is multiplied by lora_alpha / "
        "lora_r.",
    )
    lora_dropout: float = Field(
        default=0.05,
        ge=0,
        lt=1,
        description="Dropout probability on the input of the LoRA adapters.",
    )

    # The data.
    data: DataConfig = Field(
        description="Training data. Its batch_size and seed are set from train_batch_size and seed."
    )
    eval_datasets: list[DatasetConfig] = Field(
        default_factory=list,
        description="Held-out shards on which the loss is measured during training.",
    )
    eval_steps: int | None = Field(
        default=None,
        ge=1,
        description="Number of steps between two measurements on eval_datasets, in addition to the "
        "one at each checkpoint. Default: only at each checkpoint.",
    )

    num_generations: int = Field(
        default=0,
        ge=0,
        le=64,
        description="Number of held-out questions that the model answers at each evaluation, for "
        "the log. Needs eval_datasets.",
    )
    benchmarks: BenchmarksConfig | None = Field(
        default=None,
        description="Tasks of llava-ray evaluate on which checkpoints are evaluated while training "
        "continues.",
    )

    # Batches.
    train_batch_size: int = Field(
        default=128,
        ge=1,
        description="Samples in one optimizer step, over all workers and accumulation steps.",
    )
    per_device_train_batch_size: int = Field(
        default=16, ge=1, description="Samples that a worker computes at once."
    )
    gradient_accumulation_steps: int | None = Field(
        default=None,
        ge=1,
        description="Forward and backward passes of a worker in one optimizer step. Default: "
        "train_batch_size / (per_device_train_batch_size x workers).",
    )
    num_train_epochs: int = Field(
        default=1, ge=1, description="Number of passes over the training data."
    )
    max_steps: int | None = Field(
        default=None,
        ge=1,
        description="Maximum number of optimizer steps. Default: all steps of num_train_epochs.",
    )

    # Optimisation: AdamW.
    learning_rate: float = Field(default=2e-5, gt=0, description="Peak learning rate.")
    mm_projector_lr: float | None = Field(
        default=None,
        gt=0,
        description="Peak learning rate of the projector. Default: learning_rate.",
    )
    vision_lr: float | None = Field(
        default=None,
        gt=0,
        description="Peak learning rate of the vision tower. Default: learning_rate.",
    )
    weight_decay: float = Field(
        default=0.0,
        ge=0,
        description="Weight decay of matrices. Norms and biases are never decayed.",
    )
    mm_projector_weight_decay: float | None = Field(
        default=None, ge=0, description="Weight decay of the projector. Default: weight_decay."
    )
    vision_weight_decay: float | None = Field(
        default=None, ge=0, description="Weight decay of the vision tower. Default: weight_decay."
    )
    adam_beta1: float = Field(
        default=0.9,
        ge=0,
        lt=1,
        description="Decay rate of AdamW's first moment (the mean gradient).",
    )
    adam_beta2: float = Field(
        default=0.999,
        ge=0,
        lt=1,
        description="Decay rate of AdamW's second moment (the mean squared gradient).",
    )
    adam_epsilon: float = Field(
        default=1e-8, gt=0, description="Constant that AdamW adds to the denominator of a step."
    )
    max_grad_norm: float = Field(
        default=1.0, ge=0, description="Norm to which gradients are clipped. 0: no clipping."
    )
    lr_scheduler_type: Literal["cosine", "linear", "constant"] = Field(
        default="cosine",
        description="Shape of the learning rate after warm-up: cosine and linear decay to 0, or "
        "constant.",
    )
    warmup_ratio: float = Field(
        default=0.03,
        ge=0,
        le=1,
        description="Share of all steps over which the learning rate rises from 0 to its peak.",
    )
    warmup_steps: int | None = Field(
        default=None, ge=0, description="Number of warm-up steps. Replaces warmup_ratio."
    )

    # Precision, memory and kernels.
    bf16: bool | Literal["auto"] = Field(
        default="auto",
        description="Keep the weights and compute in bfloat16; otherwise in float32. auto: "
        "bfloat16 on GPUs.",
    )
    tf32: bool = Field(
        default=True, description="Let GPUs round the inputs of float32 matrix products to TF32."
    )
    gradient_checkpointing: bool = Field(
        default=True,
        description="Recompute activations in the backward pass instead of keeping them, which "
        "saves memory and costs time.",
    )
    attention: str = Field(
        default="auto",
        description="Attention implementation, as transformers names them: sdpa, flash_attention_2 "
        "or eager. auto: flash_attention_2 in bfloat16 on GPUs where flash-attn is installed, "
        "otherwise sdpa.",
    )
    use_liger_kernel: bool = Field(
        default=False,
        description="Use Liger's fused kernels on GPUs. Needs: pip install liger-kernel.",
    )
    deepspeed: str | None = Field(
        default=None,
        description='Path of a DeepSpeed JSON configuration. Its "auto" values are filled in. '
        "Replaces zero_stage and offload.",
    )
    zero_stage: Literal[0, 1, 2, 3] = Field(
        default=2,
        description="ZeRO stage, which decides what is partitioned among workers: 1 the optimizer "
        "states, 2 gradients too, 3 weights too. 0: nothing.",
    )
    offload: Literal["none", "optimizer", "all"] = Field(
        default="none",
        description="What is kept in CPU memory: nothing (none), the optimizer states (optimizer), "
        "or weights too (all; needs zero_stage=3).",
    )
    seed: int = Field(
        default=42, ge=0, description="Random seed of the data order, dropout and new weights."
    )

    # Workers.
    num_workers: int = Field(
        default=1, ge=1, description="Number of training processes, one for each GPU."
    )
    min_workers: int | None = Field(
        default=None,
        ge=1,
        description="Minimum number of workers. The run starts, or resumes after a machine was "
        "lost, with at least this many while there is no room for num_workers. "
        "Default: it waits until there is room for all.",
    )
    grow_every_s: float = Field(
        default=60.0,
        gt=0,
        description="With min_workers: seconds between two checks for room for more workers. If "
        "there is room, the run resumes from its last checkpoint with more workers.",
    )
    use_gpu: bool | Literal["auto"] = Field(
        default="auto", description="Train on GPUs. auto: if the cluster has any."
    )
    cpus_per_worker: float = Field(
        default=1.0, ge=0, description="CPUs that Ray reserves for each worker."
    )
    max_failures: int = Field(
        default=3,
        ge=-1,
        description="Number of times that the run is restarted from its last checkpoint after a "
        "failure. -1: no limit.",
    )

    # Checkpoints, export and logs.
    name: str = Field(
        pattern=r"^[\w][\w.-]*$", description="Name of the run, and of its folder in output_dir."
    )
    output_dir: str = Field(
        default="outputs",
        min_length=1,
        description="Folder or address (s3://...) that holds the folders of all runs.",
    )
    save_steps: int = Field(
        default=500, ge=1, description="Number of steps between two checkpoints."
    )
    save_total_limit: int | None = Field(
        default=1,
        ge=1,
        description="Maximum number of checkpoints that are kept. Without metric_for_best_model, "
        "the newest ones are kept. null: all.",
    )
    metric_for_best_model: str | None = Field(
        default=None,
        description="Metric that decides which checkpoints are kept, besides the newest, and which "
        "one is exported: loss or eval_loss (lowest is best), or a task of benchmarks "
        "(highest is best). Default: the last checkpoint is exported.",
    )
    export_to: Literal["hf", "original"] | None = Field(
        default=None,
        description="Format of the run's export: hf (transformers) or original (LLaVA). Default: "
        "that of the starting model.",
    )
    logging_steps: int = Field(
        default=1, ge=1, description="Number of steps between two lines of the log."
    )
    peak_tflops: float | None = Field(
        default=None,
        gt=0,
        description="Peak bfloat16 TFLOP/s of one GPU, to compute model FLOPs utilization (MFU). "
        "Default: known for common GPUs.",
    )
    report_to: list[Tracker] = Field(
        default_factory=list,
        description="Trackers that get the metrics, in addition to train_log.jsonl: tensorboard, "
        "wandb, mlflow.",
    )

    @model_validator(mode="after")
    def _check(self) -> "TrainConfig":
        if self.quantization and self.method == "full":
            raise ValueError(
                "quantized weights cannot be trained: set method=lora, or remove quantization"
            )
        if self.method == "projector" and not self.train_projector:
            raise ValueError("method=projector with train_projector=false leaves nothing to train")
        if self.offload == "all" and self.zero_stage != 3 and not self.deepspeed:
            raise ValueError("offload=all needs zero_stage=3, which partitions the weights")
        if self.quantization and self.zero_stage == 3:
            raise ValueError("quantized weights cannot be partitioned: set zero_stage=2 or lower")
        if self.eval_steps and not self.eval_datasets:
            raise ValueError("eval_steps needs eval_datasets")
        if self.num_generations and not self.eval_datasets:
            raise ValueError("num_generations needs eval_datasets")
        self._check_metric()
        if self.benchmarks and (self.benchmarks.steps or 0) % self.save_steps:
            raise ValueError(
                f"benchmarks.steps={self.benchmarks.steps} is not a multiple of "
                f"save_steps={self.save_steps}, but only checkpoints are evaluated: change one"
            )
        if self.min_workers and self.min_workers > self.num_workers:
            raise ValueError(
                f"min_workers={self.min_workers} is more than num_workers={self.num_workers}: "
                "lower or remove it"
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
                f"metric_for_best_model={metric}: use loss, eval_loss or a task of benchmarks "
                f"({', '.join(tasks) or 'this run has none'})"
            )

    def _share_with_data(self) -> None:
        """Copy the batch size and the seed of the run into `data`."""
        for name, value in (("batch_size", self.train_batch_size), ("seed", self.seed)):
            if name in self.data.model_fields_set and getattr(self.data, name) != value:
                said = "train_batch_size" if name == "batch_size" else "seed"
                raise ValueError(
                    f"data.{name}={getattr(self.data, name)} contradicts {said}={value}: "
                    f"remove data.{name}"
                )
        self.data = self.data.model_copy(
            update={"batch_size": self.train_batch_size, "seed": self.seed}
        )

    def count_accumulation(self, num_workers: int) -> int:
        """Return how many batches each worker computes in one optimizer step.

        With a different number of workers than the run asks for (see `min_workers`), some may get
        one sample less than others.

        Raises:
            ValueError: the batch cannot be divided evenly among the workers that the run asks for.
        """
        at_once = self.per_device_train_batch_size * num_workers
        steps, rest = divmod(self.train_batch_size, at_once)
        if num_workers != self.num_workers:
            return steps + bool(rest)
        if rest or not steps:
            raise ValueError(
                f"train_batch_size={self.train_batch_size} is not a multiple of "
                f"per_device_train_batch_size={self.per_device_train_batch_size} x {num_workers} "
                f"workers = {at_once}: change one of them"
            )
        given = self.gradient_accumulation_steps
        if given and given != steps:
            raise ValueError(
                f"gradient_accumulation_steps={given} x per_device_train_batch_size="
                f"{self.per_device_train_batch_size} x {num_workers} workers is "
                f"{given * at_once}, not train_batch_size={self.train_batch_size}: remove "
                "gradient_accumulation_steps"
            )
        return steps
