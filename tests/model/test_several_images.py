"""Several images to LLaVA-OneVision take one tile each, as in its training; one alone is tiled."""

import dataclasses
import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from llava_ray.config import LimitsConfig
from llava_ray.data.loader.collate import collate
from llava_ray.data.loader.encode import Encoder, load_encoder
from llava_ray.data.shards import ShardRow
from llava_ray.errors import SampleError
from llava_ray.model.loading import LoadedModel, load_model
from llava_ray.model.open_checkpoint import open_checkpoint
from llava_ray.types import ImagePart, Message, Sample, TextPart
from tests.support.onevision import CHECKPOINT, Record, read_records

RECORDS = read_records()


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    return load_model(CHECKPOINT, dtype="float32", device="cpu")


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: f"{len(record.images)} images")
def test_logits_are_those_of_the_original_code(record: Record, model: LoadedModel) -> None:
    inputs = model.encode(record.prompt, record.images)
    assert inputs["input_ids"].shape[1] == record.sequence_length
    with torch.inference_mode():
        logits = model.model(**inputs).logits[0, -16:, : record.logits.shape[1]]
    torch.testing.assert_close(logits, torch.from_numpy(record.logits), rtol=0, atol=2e-3)
    new = model.model.generate(
        **inputs, do_sample=False, max_new_tokens=8, repetition_penalty=1.0, eos_token_id=None
    )[0, record.sequence_length :]
    assert new.tolist() == record.greedy_ids[:8]


def make_row(record: Record) -> ShardRow:
    """A sample whose first question has the record's images."""
    files = []
    for image in record.images:
        file = io.BytesIO()
        image.save(file, "PNG")
        files.append(file.getvalue())
    parts = tuple(ImagePart(data) for data in files)
    question = Message("user", (*parts, TextPart("what is it?")))
    answer = Message("assistant", (TextPart("red"),))
    sample = Sample("one", (question, answer), tuple(files))
    return ShardRow(sample, tuple(image.size for image in record.images))


def test_training_encodes_images_as_the_model_does(model: LoadedModel) -> None:
    encoder = load_encoder(str(CHECKPOINT))
    rows = [make_row(record) for record in RECORDS]
    encoded = [encoder.encode(row, LimitsConfig()) for row in rows]
    for row, record, each in zip(rows, RECORDS, encoded, strict=True):
        assert encoder.count_image_tokens(row.image_sizes) == record.image_tokens
        is_image = each.input_ids == model.image_token_id
        assert is_image.sum() == sum(record.image_tokens)
        text = encoder.template.render(row.sample.messages[:1], add_generation_prompt=True)
        inputs = model.encode(text, record.images)
        for name in ("pixel_values", "image_sizes", "batch_num_images"):
            assert np.array_equal(each.images[name], inputs[name].numpy()), name
    # Samples with one image and with several share a batch.
    arrays = collate(encoded, pad_token_id=encoder.pad_token_id)
    batch = {n: torch.from_numpy(a) for n, a in arrays.items() if n != "labels"}
    with torch.inference_mode():
        together = model.model(**batch).logits
        for i, each in enumerate(encoded):
            alone = {name: torch.from_numpy(array) for name, array in each.images.items()}
            logits = model.model(torch.from_numpy(each.input_ids)[None], **alone).logits[0]
            torch.testing.assert_close(together[i, : len(logits)], logits, rtol=0, atol=1e-3)


def test_an_image_that_truncation_leaves_alone_is_counted_as_it_is_encoded() -> None:
    encoder = load_encoder(str(CHECKPOINT), truncates=True)
    row = make_row(next(record for record in RECORDS if len(record.images) == 2))
    whole = encoder.encode(row, LimitsConfig())
    seen = set()
    for length in range(len(whole.input_ids), 20, -3):
        shorter = dataclasses.replace(encoder, max_length=length)
        try:
            each = shorter.encode(row, LimitsConfig())
        except SampleError:  # nothing is left to learn
            continue
        num_images = len(each.images.get("pixel_values", ()))
        expected = encoder.count_image_tokens(row.image_sizes[:num_images])
        assert (each.input_ids == encoder.image_token_id).sum() == sum(expected)
        assert len(each.input_ids) <= length
        seen.add(num_images)
    assert 2 in seen


def test_four_large_images_take_2920_tokens_in_a_model_of_real_size(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(CHECKPOINT, folder)
    config = json.loads((folder / "config.json").read_text())
    grid = [[384 * rows, 384 * columns] for rows in range(1, 7) for columns in range(1, 7)]
    config["vision_config"] |= {"image_size": 384, "patch_size": 14}
    config["image_grid_pinpoints"] = grid
    (folder / "config.json").write_text(json.dumps(config))
    settings = json.loads((folder / "processor_config.json").read_text())
    settings["image_processor"] |= {
        "size": {"height": 384, "width": 384},
        "image_grid_pinpoints": grid,
    }
    settings["num_image_tokens"] = 729
    (folder / "processor_config.json").write_text(json.dumps(settings))
    opened = open_checkpoint(folder)
    encoder = Encoder(opened.processor, opened.template, opened.config, False, 32768, False)
    assert sum(encoder.count_image_tokens([(1920, 1080)] * 4)) == 2920
    images = [Image.new("RGB", (1920, 1080)) for _ in range(4)]
    assert (
        opened.processor(images=[images], text="<image>" * 4)["input_ids"][0].count(
            config["image_token_index"]
        )
        == 2920
    )
    (alone,) = encoder.count_image_tokens([(1920, 1080)])
    assert alone > 2920
