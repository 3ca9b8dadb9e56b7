"""A model is known by its weights and the settings that change its answers, and by nothing else."""

import shutil
from pathlib import Path

from llava_ray.config import ModelConfig
from llava_ray.model.fingerprint import PREFIX, make_fingerprint
from llava_ray.serve.openai.streaming import (
    ChatFormatter,
    ChunkEncoder,
    ResponseMeta,
    build_completion,
)
from llava_ray.types import Chunk

FORMATTER = ChatFormatter(has_logprobs=False)
META = ResponseMeta("id", "model", 0)


def make_folder(path: Path, weights: bytes = b"weights") -> str:
    path.mkdir()
    (path / "config.json").write_text("{}")
    (path / "model.safetensors").write_bytes(weights)
    return str(path)


def test_weights_and_settings_that_change_answers_change_the_fingerprint(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "a")
    adapters = {"x": make_folder(tmp_path / "x"), "y": make_folder(tmp_path / "y", b"other")}
    plain = make_fingerprint(ModelConfig(path=folder))
    assert plain.startswith(PREFIX)
    found = [
        plain,
        make_fingerprint(ModelConfig(path=make_folder(tmp_path / "b", b"w3ights"))),
        make_fingerprint(ModelConfig(path=folder, quantization="int8")),
        make_fingerprint(ModelConfig(path=folder, dtype="float16")),
        make_fingerprint(ModelConfig(path=folder, template="llava_v0")),
        make_fingerprint(ModelConfig(path=folder, engine="vllm")),
        make_fingerprint(ModelConfig(path=folder, adapters=adapters), "x"),
        make_fingerprint(ModelConfig(path=folder, adapters=adapters), "y"),
    ]
    assert len(set(found)) == len(found)


def test_names_places_and_hidden_files_do_not(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "a")
    plain = make_fingerprint(ModelConfig(path=folder))
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / ".cache").mkdir()
    (copy / ".cache" / "metadata").write_text("now")
    settings = {"name": "other", "max_batch_size": 4, "cache_tokens": 4096}
    assert make_fingerprint(ModelConfig(path=str(copy), **settings)) == plain


def test_a_response_has_the_fingerprint_of_the_replica_that_made_it() -> None:
    chunks = [Chunk("a", None, 1, 1, 0, fingerprint="fp"), Chunk("b", "stop", 2, 1, 0)]
    encoder = ChunkEncoder(FORMATTER, META, include_usage=True)
    events = b"".join(map(encoder.encode, chunks)).decode()
    assert events.count('"system_fingerprint": "fp"') == events.count("data: ") > 2
    assert build_completion(chunks[:1], FORMATTER, META)["system_fingerprint"] == "fp"
    encoder = ChunkEncoder(FORMATTER, META, include_usage=True)
    assert b'"system_fingerprint": null' in encoder.encode(chunks[1])
