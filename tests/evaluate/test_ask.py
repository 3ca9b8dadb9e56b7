"""Questions to a model: the same responses in any batch, faults told apart, nothing asked twice."""

import hashlib
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llava_ray.config import EvaluateConfig
from llava_ray.errors import ConfigError, UserError
from llava_ray.evaluate import run
from llava_ray.evaluate.predict import ask as asking
from llava_ray.evaluate.predict.actor import Predictor
from llava_ray.evaluate.predict.cache_key import (
    describe_settings,
    digest_model,
    is_known_by_weights,
    make_cache_key,
)
from llava_ray.evaluate.predict.crashes import CrashCounter
from llava_ray.evaluate.tasks import TASKS
from llava_ray.types import Prediction, Question, Sampling
from tests.support.raw_data import save
from tests.support.scene_benchmark import write_scenes
from tests.support.scripted_openai import Script, ScriptedOpenAI

SHORT = Sampling(max_tokens=24, temperature=0)


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asking, "FIRST_PAUSE_S", 0.001)


def configure(**settings: Any) -> EvaluateConfig:
    return EvaluateConfig(**{"tasks": ["own_exact"], "data": ".", "output": ".", **settings})


def predict(questions: list[Question], **settings: Any) -> list[Prediction]:
    """Answer questions as an actor does, in this process."""
    predictor = Predictor(configure(**settings), "scripted", SHORT, "digest", CrashCounter())
    batch = predictor({"question": [pickle.dumps(question) for question in questions]})
    return [pickle.loads(each) for each in batch["prediction"]]


def test_greedy_responses_are_the_same_one_at_a_time_and_in_batches_of_32(tmp_path: Path) -> None:
    questions = TASKS["own_exact"].read_all(write_scenes(tmp_path, num_scenes=4))
    assert len(questions) > 32
    # several actors have a thread each, which a busy machine bears better than two of one
    settings = {"num_actors": 2, "num_cpus": 1}
    alone, together = (predict(questions, concurrency=size, **settings) for size in (1, 32))
    assert [p.status for p in alone] == ["answered"] * len(questions)
    assert [p.text for p in together] == [p.text for p in alone]
    assert all(p.confidence is not None and 0 < p.confidence <= 1 for p in together)
    scores = [TASKS["own_exact"].score(q, p.text) for q, p in zip(questions, alone, strict=True)]
    assert sum(score.value for score in scores) > 0.7 * len(scores)


def ask(script: Script, *questions: Question) -> list[Prediction]:
    with ScriptedOpenAI(script) as server:
        return predict(list(questions), endpoint=server.url)


def test_what_cannot_be_asked_is_refused_and_what_breaks_is_failed(tmp_path: Path) -> None:
    """Refused rows would be refused again; failed ones are asked again by the next run."""
    absent = (str(tmp_path / "absent.png"),)
    questions = [
        Question("1", "fine"), Question("2", "bad"), Question("3", "broken"), Question("4", "down"),
        Question("5", "no image", absent),
    ]  # fmt: skip
    said = {"fine": "yes", "bad": 400, "broken": None, "down": 503}
    told = ask(lambda text: said[text], *questions)
    assert [p.status for p in told] == ["answered", "refused", "failed", "failed", "refused"]
    assert [p.text for p in told] == ["yes", "", "", "", ""]
    assert "the script says no" in told[1].reason
    assert "ended the answer too early" in told[2].reason
    assert "absent.png cannot be read" in told[4].reason


def test_a_server_that_does_not_speak_openais_language_fails_its_questions_only() -> None:
    end = b'data: {"choices": [{"finish_reason": "stop"}]}\n\n'
    bodies = {
        "words": b"data: hello\n\n",
        "list": b"data: []\n\n",
        "odd": b'data: {"choices": [5]}\n\n',
        "empty": b"",
        "lone": b'data: {"choices": [{"delta": {"content": "\\ud800"}}]}\n\n' + end,
        "bare": end,
    }
    told = ask(lambda text: bodies[text], *(Question(name, name) for name in bodies))
    assert [p.status for p in told] == ["failed"] * 4 + ["answered"] * 2
    assert "does not stream as the OpenAI API does" in told[0].reason
    assert [p.text for p in told[4:]] == ["\ud800", ""]


def test_what_may_pass_is_tried_again() -> None:
    responses = iter([503, None, "at last"])
    (told,) = ask(lambda _: next(responses), Question("1", "?"))
    assert (told.status, told.text) == ("answered", "at last")


def test_a_response_of_other_weights_than_the_run_began_with_is_no_prediction() -> None:
    with ScriptedOpenAI(lambda _: "yes", fingerprint="fp_llava_new") as server:
        config = configure(endpoint=server.url)
        for digest, status in (("fp_llava_new", "answered"), ("fp_llava_old", "failed")):
            predictor = Predictor(config, "scripted", SHORT, digest, CrashCounter())
            (told,) = predictor._ask_batch([Question("1", "?")])
            assert told.status == status
    assert "(fp_llava_new) is not the one that the run began with (fp_llava_old)" in told.reason
    assert len(server.asked) == 2  # asking again would not help


def test_only_our_own_models_tell_their_weights() -> None:
    for owner, fingerprint, known in (
        ("llava-ray", "fp_llava_1", True),
        ("llava-ray", None, False),  # behind our gateway, a worker of LLaVA's
        ("llava-ray", "fp_other", False),
        ("vllm", "fp_llava_1", False),
    ):
        with ScriptedOpenAI(lambda _: "hi", fingerprint=fingerprint, owner=owner) as server:
            config = configure(endpoint=server.url)
            digest = digest_model(config, "scripted")
            assert (digest == "fp_llava_1") == known
            assert is_known_by_weights(config, digest) == known
            assert len(server.asked) == (owner == "llava-ray")
    assert is_known_by_weights(configure(engine="echo"), digest_model(configure(engine="echo"), ""))


def test_a_question_may_have_any_id() -> None:
    ids = ["é", "猫", "a b", "line\nbreak", "\ud800", "", "x" * 5000, "\0"]
    told = ask(lambda _: "yes", *(Question(each, "?") for each in ids))
    assert [(p.question_id, p.status) for p in told] == [(each, "answered") for each in ids]


def test_a_question_of_lone_surrogates_is_refused_and_ends_nothing() -> None:
    told = ask(lambda _: "yes", Question("1", "\ud800?"), Question("2", "fine"))
    assert [p.status for p in told] == ["refused", "answered"]
    assert "lone surrogates" in told[0].reason


def test_a_model_or_server_that_is_not_there_is_named_before_anything_is_asked(
    tmp_path: Path,
) -> None:
    (tmp_path / "q.jsonl").write_text('{"question_id": 1, "text": "?", "answer": "!"}\n')
    folders = {"data": str(tmp_path), "output": str(tmp_path / "out")}
    with pytest.raises(ConfigError, match="there is no such folder"):
        run.evaluate_model(configure(**folders, model=str(tmp_path / "nowhere")))
    with pytest.raises(UserError, match="no server answers at http://127"):
        run.evaluate_model(configure(**folders, endpoint="http://127.0.0.1:9/v1"))
    with ScriptedOpenAI(lambda _: "!") as server:
        wrong = configure(**folders, endpoint=server.url, model_name="other")
        with pytest.raises(ConfigError, match="has no model 'other': it serves scripted"):
            run.evaluate_model(wrong)
        assert server.asked == []
    with pytest.raises(ConfigError, match="neither shards"):
        run.evaluate_model(configure(**folders | {"data": str(tmp_path / "nowhere")}))


def test_a_response_holds_for_its_model_prompt_images_and_settings(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    question = Question("1", "What?", (str(path),))
    sha = hashlib.sha256(save(path)).hexdigest()
    settings = describe_settings(configure(), SHORT)
    key = make_cache_key("digest", question, [sha], settings)
    known = {"1": Prediction("1", "answered", "x", cache_key=key)}

    def is_open(asked: Question = question, digest: str = "digest", told: str = settings) -> bool:
        return bool(run.find_unanswered([asked], known, digest, told))

    assert not is_open()
    assert not is_open(replace(question, answers=("scored anew",)))
    assert is_open(replace(question, text="What else?"))
    assert is_open(digest="another model")
    for changed in (
        {"template": "llava_v0"},
        {"dtype": "float32"},
        {"engine": "echo"},
        {"quantization": "int8"},
    ):
        assert is_open(told=describe_settings(configure(**changed), SHORT))
    assert is_open(told=describe_settings(configure(), Sampling(max_tokens=25, temperature=0)))
    assert not is_open(told=describe_settings(configure(concurrency=1, num_actors=4), SHORT))
    known["1"] = replace(known["1"], status="failed")
    assert is_open()
    known["1"] = replace(known["1"], status="answered")
    other = tmp_path / "b.png"
    save(other, seed=1)
    assert is_open(replace(question, images=(str(other),)))
    known["1"] = replace(known["1"], cache_key=key)
    save(path, seed=2)  # another image in the same place
    assert is_open()
    other.unlink()
    assert is_open(replace(question, images=(str(tmp_path / "absent.png"),)))
