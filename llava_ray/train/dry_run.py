"""Describe what a run would do and need, without a GPU and without reading any weights.

Behind `llava-ray train --dry-run`.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import yaml

from llava_ray.cluster import count_gpus
from llava_ray.config import TrainConfig
from llava_ray.data.loader.dataset import SampleReader, ShardedDatasets, make_order, open_datasets
from llava_ray.data.loader.encode import Encoder
from llava_ray.data.loader.order import SampleOrder
from llava_ray.errors import LlavaRayError
from llava_ray.template import IGNORED
from llava_ray.train.deepspeed_config import describe_engine, read_stage
from llava_ray.train.param_groups import ParamGroupSummary, summarize_param_groups
from llava_ray.train.preflight import build_meta_model, load_run_encoder, open_run
from llava_ray.train.survey import SampleSurvey, survey_samples

_NUM_SHOWN = 3


def explain_run(config: TrainConfig) -> str:
    """Return the report: settings, parts of the model, batches, memory, a few encoded samples.

    Raises:
        ConfigError: The run could not start.
    """
    datasets = open_datasets(config.data.datasets)
    order = make_order(config.data, datasets)
    opened = open_run(config)
    model = build_meta_model(config, opened)
    param_groups = summarize_param_groups(model, config)
    encoder = load_run_encoder(config, opened)
    survey = survey_samples(config.data, datasets, order, encoder)
    sections = {
        "settings": "\n".join([describe_settings(config), describe_precision(config)]),
        "parameters": "\n".join(group.describe() for group in param_groups),
        "batches": explain_batches(config, order, survey),
        "memory per worker": explain_memory(config, model, param_groups, survey),
        "samples": "\n".join([*survey.describe(), *show_samples(config, datasets, order, encoder)]),
    }
    return "\n\n".join(f"== {title}\n{text}" for title, text in sections.items())


def describe_settings(config: TrainConfig) -> str:
    """Return all settings as YAML."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False).rstrip()


def describe_precision(config: TrainConfig) -> str:
    """Return what `bf16` becomes, as a comment below the settings."""
    is_gpu = count_gpus() > 0 if config.use_gpu == "auto" else config.use_gpu
    becomes = "bfloat16 on GPUs that compute it fast, else float32" if is_gpu else "float32"
    if config.bf16 != "auto":
        becomes = "bfloat16" if config.bf16 else "float32"
    return f"# bf16: {config.bf16} means {becomes} here"


def explain_batches(config: TrainConfig, order: SampleOrder, survey: SampleSurvey) -> str:
    """Return the arithmetic of batches and steps."""
    accumulation = config.count_accumulation(config.num_workers)
    num_steps = order.num_batches * config.num_train_epochs
    measured = measure_order(order, survey)
    padding = measured.measure_padding(num_workers=config.num_workers, accumulation=accumulation)
    return (
        f"{config.per_device_train_batch_size} samples x {accumulation} accumulation steps x "
        f"{config.num_workers} workers = {config.train_batch_size} per step\n"
        f"{len(order.order_epoch(0)):,} samples = {order.num_batches:,} steps per epoch x "
        f"{config.num_train_epochs} epochs = {min(num_steps, config.max_steps or num_steps):,} "
        f"steps, a checkpoint every {config.save_steps} steps\n"
        f"about {padding:.0%} of an epoch's tokens are padding"
    )


def measure_order(order: SampleOrder, survey: SampleSurvey) -> SampleOrder:
    """Return the order with the lengths that were measured, where all samples were."""
    if not survey.is_complete:
        return order
    lengths = np.zeros_like(order.lengths)
    for number, length in survey.lengths.items():
        lengths[number] = length
    return replace(order, lengths=lengths)


def explain_memory(
    config: TrainConfig,
    model: Any,
    param_groups: list[ParamGroupSummary],
    survey: SampleSurvey,
) -> str:
    """Return an estimate of the memory that each GPU needs, in GB.

    The batch is taken to be full of samples as long as the longest that was tried. Counts weights,
    gradients, AdamW's state in float32 (12 bytes per trained weight), the stored activations and
    the logits, but not the kernels' workspace.
    """
    is_gpu = count_gpus() > 0 if config.use_gpu == "auto" else config.use_gpu
    is_bf16 = is_gpu if config.bf16 == "auto" else config.bf16
    described = describe_engine(
        config,
        num_workers=config.num_workers,
        hidden_size=model.config.text_config.hidden_size,
        is_bf16=is_bf16,
    )
    zero = described.get("zero_optimization", {})
    stage, num_workers = read_stage(described), config.num_workers
    width = 2 if is_bf16 else 4
    longest = max(survey.lengths.values())
    total = sum(group.num_parameters for group in param_groups)
    trained = sum(group.num_trainable for group in param_groups)
    frozen_width = {"4bit": 0.55, "8bit": 1.05}.get(config.quantization or "", width)
    needs = {
        "weights": ((total - trained) * frozen_width + trained * width)
        / (num_workers if stage == 3 else 1)
        * ("offload_param" not in zero),
        "gradients": trained * width / (num_workers if stage >= 2 else 1),
        "optimizer": trained
        * 12
        / (num_workers if stage else 1)
        * ("offload_optimizer" not in zero),
        "activations and logits": _count_activations(
            config, model.config.text_config, width, longest
        ),
    }
    lines = [f"{name}: {num_bytes / 1e9:.2f} GB" for name, num_bytes in needs.items()]
    lines.append(
        f"for batches of {config.per_device_train_batch_size} samples of {longest:,} tokens, the "
        f"longest of {len(survey.lengths):,} that were measured"
    )
    return "\n".join([*lines, f"total: about {sum(needs.values()) / 1e9:.2f} GB"])


def show_samples(
    config: TrainConfig, datasets: ShardedDatasets, order: SampleOrder, encoder: Encoder
) -> Iterator[str]:
    """Yield the first few samples as the model would be trained on them."""
    reader = SampleReader(datasets)
    for number in order.batch(order.start())[:_NUM_SHOWN]:
        row = reader.read(int(number))
        try:
            example = encoder.encode(row, config.data.limits)
        except LlavaRayError as error:
            yield error.message
            continue
        ids, labels = example.input_ids.tolist(), example.labels.tolist()
        learned = [id_ for id_, label in zip(ids, labels, strict=True) if label != IGNORED]
        yield (
            f"{example.sample_id}: {len(ids)} tokens, {len(row.sample.images)} images, "
            f"{len(learned)} tokens in the loss\n  reads  {_decode(encoder, ids)}\n"
            f"  learns {_decode(encoder, learned)}"
        )


def _decode(encoder: Encoder, ids: list[int]) -> str:
    image = encoder.image_token_id
    kept = [id_ for i, id_ in enumerate(ids) if id_ != image or not i or ids[i - 1] != image]
    text = encoder.processor.tokenizer.decode([id_ for id_ in kept if id_ != image])
    return repr(text)[:300]


def _count_activations(config: TrainConfig, text: Any, width: int, length: int) -> float:
    """Return the bytes of activations and logits kept for the backward pass of one batch."""
    num_tokens = config.per_device_train_batch_size * length
    a_layer = text.hidden_size * (1 if config.gradient_checkpointing else 16)
    return num_tokens * (a_layer * text.num_hidden_layers * width + text.vocab_size * (width + 8))
