"""The Ray Data actor that turns questions into predictions.

It holds one engine, or a connection to a server, and asks many questions at once. Ray Data hands it
two batches at a time so that the engine stays busy between them. Every question yields a
`Prediction`, also when it is refused or fails. The digests at the top and bottom of this file
decide which logged predictions a later run may keep.
"""

import asyncio
import hashlib
import json
import pickle
import threading
from collections import Counter
from collections.abc import AsyncGenerator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from llava_ray.config import EvaluateConfig, LimitsConfig
from llava_ray.errors import EngineError, LlavaRayError, RequestError, SampleError
from llava_ray.evaluate.datasets.images import load_image
from llava_ray.evaluate.predict.ask import Answerer, ask, ask_with_retries
from llava_ray.storage import hash_file
from llava_ray.types import (
    ChatRequest,
    Chunk,
    ImagePart,
    Message,
    Prediction,
    PredictionStatus,
    Question,
    Sampling,
    TextPart,
)


def digest_model(config: EvaluateConfig, model: str) -> str:
    """Return the digest of the model that answers.

    Of a folder the content of every file counts. Of a server only its address and the model's name
    are known: weights that change behind these are not noticed.

    Raises:
        ConfigError: there is no such model.
    """
    if config.endpoint or config.app:
        address = f"{config.endpoint or config.app} {model}"
        return hashlib.sha256(address.encode()).hexdigest()
    if config.engine == "echo":
        return hashlib.sha256(b"echo").hexdigest()
    from llava_ray.model.checkpoint.locate import find_folder

    return digest_folder(find_folder(config.model))


def digest_folder(folder: Path) -> str:
    """Return the SHA-256 of the names and contents of the files in a folder."""
    whole = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        whole.update(f"{path.relative_to(folder).as_posix()} {hash_file(path)}\n".encode())
    return whole.hexdigest()


MAX_CRASHES = 2
"""A question counts as failed once this many actors have crashed while answering it."""


class CrashCounter:
    """Counts, for each question, the actors that began to answer it and crashed."""

    def __init__(self) -> None:
        self._num_open: Counter[str] = Counter()

    def begin(self, ids: Sequence[str]) -> None:
        self._num_open.update(ids)

    def end(self, ids: Sequence[str]) -> None:
        for id_ in ids:
            del self._num_open[id_]

    def count_crashes(self, ids: Sequence[str]) -> list[int]:
        """Return the number of crashes for each question; none of them may be in flight."""
        return [self._num_open[id_] for id_ in ids]


class SharedCrashCounter(CrashCounter):
    """A `CrashCounter` that lives in a Ray actor, so that all predictors share it."""

    def __init__(self) -> None:
        import ray

        actor = ray.remote(CrashCounter).options(num_cpus=0, max_restarts=-1, max_task_retries=-1)
        self._counter: Any = actor.remote()

    def begin(self, ids: Sequence[str]) -> None:
        self._call("begin", ids)

    def end(self, ids: Sequence[str]) -> None:
        self._call("end", ids)

    def count_crashes(self, ids: Sequence[str]) -> list[int]:
        return self._call("count_crashes", ids)

    def _call(self, name: str, ids: Sequence[str]) -> Any:
        import ray

        return ray.get(getattr(self._counter, name).remote(ids))


class Predictor:
    """Answers batches of pickled questions; see `Ray Data's map_batches`.

    Args:
        config: who answers, and how many questions at once.
        model: its name at the server.
        sampling: how replies are made.
        model_digest: see `Prediction`.
        crashes: counts the crashes of this run's actors, by question.
    """

    def __init__(
        self,
        config: EvaluateConfig,
        model: str,
        sampling: Sampling,
        model_digest: str,
        crashes: CrashCounter,
    ) -> None:
        self._model, self._digest, self._crashes = model, model_digest, crashes
        self._alone = threading.Lock()
        self._settings = describe_settings(config, sampling)
        # Other servers may not know logprobs; ours give them without changing the reply.
        self._sampling = sampling if config.endpoint else replace(sampling, num_logprobs=0)
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="predict", daemon=True).start()
        self._answer, self._problem = None, None
        try:
            self._answer = self._run(_connect(config, model))
        except LlavaRayError as error:  # calls return it: Ray would wrap one raised here
            self._problem = error
        self._free = self._run(_make_semaphore(config.concurrency))

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[bytes]]:
        """Return the predictions of a batch, pickled; or the error that the model does not load."""
        if self._problem:
            return {"prediction": [pickle.dumps(self._problem)]}
        questions = [pickle.loads(each) for each in batch["question"]]
        return {"prediction": [pickle.dumps(p) for p in self._ask_batch(questions)]}

    def _run(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def _ask_batch(self, questions: Sequence[Question]) -> list[Prediction]:
        """Ask together the questions without a crash, then the others one at a time."""
        crashes = self._crashes.count_crashes([question.question_id for question in questions])
        known = list(zip(questions, crashes, strict=True))
        predictions = self._ask_watched([question for question, num in known if not num])
        for question, num in known:
            if num >= MAX_CRASHES:
                error = EngineError(f"{num} actors crashed while answering it: see Ray's logs")
                predictions.append(self._fail(question, "failed", error))
            elif num:
                with self._alone:
                    predictions += self._ask_watched([question])
        return predictions

    def _ask_watched(self, questions: Sequence[Question]) -> list[Prediction]:
        ids = [question.question_id for question in questions]
        self._crashes.begin(ids)
        predictions = self._run(self._ask_all(questions))
        self._crashes.end(ids)
        return predictions

    async def _ask_all(self, questions: Sequence[Question]) -> list[Prediction]:
        return await asyncio.gather(*(self._ask_in_turn(question) for question in questions))

    async def _ask_in_turn(self, question: Question) -> Prediction:
        async with self._free:
            return await self._ask(question)

    async def _ask(self, question: Question) -> Prediction:
        try:
            return await ask_with_retries(lambda: self._ask_once(question))
        except (RequestError, SampleError) as error:
            return self._fail(question, "refused", error)
        except LlavaRayError as error:
            return self._fail(question, "failed", error)

    async def _ask_once(self, question: Question) -> Prediction:
        images = [await asyncio.to_thread(load_image, each) for each in question.images]
        shas = tuple(hashlib.sha256(data).hexdigest() for data in images)
        parts = (*(ImagePart(data) for data in images), TextPart(question.text))
        request = ChatRequest(
            f"eval-{question.question_id}", self._model, (Message("user", parts),), self._sampling
        )
        assert self._answer is not None
        reply = await ask(self._answer, request)
        return Prediction(
            question.question_id,
            "answered",
            reply.text.strip(),
            finish_reason=reply.last.finish_reason,
            latency_s=reply.latency_s,
            num_tokens=reply.last.num_tokens,
            num_prompt_tokens=reply.last.num_prompt_tokens,
            num_image_tokens=reply.last.num_image_tokens,
            confidence=reply.confidence,
            image_sha256=shas,
            cache_key=make_cache_key(self._digest, question, shas, self._settings),
            model_digest=self._digest,
        )

    def _fail(
        self, question: Question, status: PredictionStatus, error: LlavaRayError
    ) -> Prediction:
        reason = f"{type(error).__name__}: {error.message}"
        return Prediction(question.question_id, status, reason=reason, model_digest=self._digest)


def make_cache_key(
    model_digest: str, question: Question, image_sha256: Sequence[str], settings: str
) -> str:
    """Return what a reply depends on, as one digest: model, question, images and settings."""
    content = json.dumps([model_digest, question.text, list(image_sha256), settings])
    return hashlib.sha256(content.encode()).hexdigest()


def describe_settings(config: EvaluateConfig, sampling: Sampling) -> str:
    """Return the settings that change replies."""
    settings = {"engine": config.engine, "dtype": config.dtype, "template": config.template}
    if config.quantization != "none":  # not named, older results hold
        settings["quantization"] = config.quantization
    return json.dumps({**settings, **asdict(sampling)}, sort_keys=True)


async def _connect(config: EvaluateConfig, model: str) -> Answerer:
    """Load the engine, or prepare to ask the server or the application."""
    if config.endpoint:
        from llava_ray.client import Client

        return Client(config.endpoint).stream
    if config.app:
        from ray import serve

        handle = serve.get_deployment_handle(model, config.app).options(stream=True)
        return lambda request: _ask_app(handle, request)
    from llava_ray.engine.chat import chat
    from llava_ray.engine.factory import load_engine

    engine = await asyncio.to_thread(load_engine, config.describe_model())
    limits = LimitsConfig(max_image_bytes=64 << 20, max_image_pixels=120_000_000)
    return lambda request: chat(engine, request, limits=limits)


async def _ask_app(handle: Any, request: ChatRequest) -> AsyncGenerator[Chunk]:
    """Ask a replica of the live application; Ray's errors become ours."""
    from ray.exceptions import RayError, RayTaskError
    from ray.serve.exceptions import RayServeException

    try:
        async for chunk in handle.chat.remote(request):
            yield chunk
    except (RayError, RayServeException) as error:
        cause = error.cause if isinstance(error, RayTaskError) else error
        if isinstance(cause, LlavaRayError):
            raise cause from error
        raise EngineError(f"the replica broke: {type(cause).__name__}: {cause}") from error


async def _make_semaphore(number: int) -> asyncio.Semaphore:
    return asyncio.Semaphore(number)
