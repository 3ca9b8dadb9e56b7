"""Live models are identified by their weights; a server without a fingerprint is asked again."""

from pathlib import Path
from typing import Any

import httpx
import pyarrow.parquet as pq
import pytest

from llava_ray.config import EvaluateConfig
from llava_ray.data.shards import ShardWriter
from llava_ray.data.sources.building import assistant, make_sample, user
from llava_ray.data.validate import CheckedImage
from llava_ray.errors import UserError
from llava_ray.evaluate import run
from llava_ray.evaluate.results.results import TaskResult
from tests.support.benchmark_files import write_lines
from tests.support.raw_data import save
from tests.support.scripted_openai import ScriptedOpenAI
from tests.support.tiny_checkpoint import make_image

pytestmark = pytest.mark.ray

NUM = 5


def evaluate(folder: Path, **settings: Any) -> tuple[TaskResult, list[str], int]:
    """Return the result, the notes, and how many questions had a prediction at the start."""
    if "data" not in settings:
        rows = [{"question_id": i, "text": f"say {i}", "answer": f"say {i}"} for i in range(NUM)]
        settings["data"] = str(write_lines(folder / "data" / "questions.jsonl", rows).parent)
    notes: list[str] = []
    steps: list[run.EvaluateProgress] = []
    settings = {"tasks": ["own_exact"], "output": str(folder / "out"), "num_cpus": 0.1, **settings}
    config = EvaluateConfig(**settings)
    (result,) = run.evaluate_model(config, on_progress=steps.append, on_note=notes.append)
    return result, notes, steps[0].num_done


@pytest.mark.usefixtures("cluster")
def test_a_strangers_server_is_asked_anew_unless_told_otherwise(tmp_path: Path) -> None:
    answers = ["wrong"]
    with ScriptedOpenAI(lambda text: answers[0] or text) as server:
        first, notes, _ = evaluate(tmp_path, endpoint=server.url)
        assert first.metrics["accuracy"].value == 0
        assert "does not tell which weights it serves: all questions are asked" in notes[0]
        answers[0] = ""  # other weights behind the same address
        again, _, num_known = evaluate(tmp_path, endpoint=server.url)
        assert (again.metrics["accuracy"].value, num_known) == (100, 0)
        answers[0] = "wrong"
        kept, notes, num_known = evaluate(tmp_path, endpoint=server.url, reuse=True)
        assert (kept.metrics["accuracy"].value, num_known) == (100, NUM)
        assert "are kept because of reuse" in notes[0]
        assert len(server.asked) == 2 * NUM


@pytest.mark.usefixtures("cluster")
def test_new_weights_behind_one_of_our_addresses_are_noticed(tmp_path: Path) -> None:
    with ScriptedOpenAI(lambda text: text, fingerprint="fp_llava_1", owner="llava-ray") as server:
        for fingerprint, num_known in (("fp_llava_1", 0), ("fp_llava_1", NUM), ("fp_llava_2", 0)):
            server.fingerprint = fingerprint
            result, notes, found = evaluate(tmp_path, endpoint=server.url)
            assert (result.num_scored, found, notes) == (NUM, num_known, [])


def test_a_replica_tells_its_fingerprint_on_every_path(served: str, tmp_path: Path) -> None:
    body = {"model": "echo", "messages": [{"role": "user", "content": "hi"}]}
    told = httpx.post(f"{served}/v1/chat/completions", json=body).json()["system_fingerprint"]
    other = httpx.post(f"{served}/v1/chat/completions", json={**body, "model": "other"}).json()
    assert told.startswith("fp_llava_")
    assert told != other["system_fingerprint"]
    for path in ({"endpoint": served}, {"app": "app"}):
        folder = tmp_path / next(iter(path))
        for num_known in (0, NUM):
            result, notes, found = evaluate(folder, model_name="echo", **path)
            assert (result.num_scored, found, notes) == (NUM, num_known, [])
        lines = (folder / "out" / "predictions_own_exact.jsonl").read_text()
        assert lines.count(told) == NUM


@pytest.mark.usefixtures("cluster")
def test_five_hundred_samples_of_ones_own_shards_are_asked(tmp_path: Path) -> None:
    """Many threads read images of one shard at the same time."""
    (tmp_path / "shards").mkdir()
    path = tmp_path / "shards" / "part-00000.parquet"
    writer = ShardWriter(path)
    data = save(tmp_path / "raw.png")
    image = CheckedImage(data, *make_image().size)
    for i in range(500):
        turns = (user(f"<image>\nsay {i}"), assistant(f"say {i}"))
        writer.add(make_sample("mine", f"s{i}", turns, data), [image], num_tokens=None)
    writer.close()
    assert pq.ParquetFile(path).num_row_groups >= 8
    settings = {"data": str(path.parent), "engine": "echo", "concurrency": 64, "num_actors": 2}
    result, notes, _ = evaluate(tmp_path, **settings)
    assert result.statuses == {"answered": 500}
    assert notes == []


@pytest.mark.usefixtures("cluster")
def test_a_run_that_got_no_answer_at_all_is_an_error_with_the_first_reason(tmp_path: Path) -> None:
    rows = [{"question_id": i, "text": "?", "answer": "!", "image": "gone.png"} for i in range(3)]
    data = write_lines(tmp_path / "data" / "questions.jsonl", rows).parent
    with pytest.raises(UserError, match=r"none of its 3 questions was answered: .*gone\.png"):
        evaluate(tmp_path, data=str(data), engine="echo")
    assert (tmp_path / "out" / "report.html").is_file()
