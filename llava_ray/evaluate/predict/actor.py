"""The Ray Data actor that turns questions into predictions.

It holds one engine, or a connection to a server, and asks many questions at once. Ray Data hands it
two batches at a time so that the engine stays busy between them. Every question yields a
`Prediction`, also when it is refused or fails.
"""

import asyncio
import hashlib
import pickle
import threading
from collections.abc import Sequence
from dataclasses import replace
from typing import Any
from urllib.parse import quote

from llava_ray.config import EvaluateConfig
from llava_ray.errors import EngineError, LlavaRayError, RequestError, SampleError
from llava_ray.evaluate.datasets.images import load_image
from llava_ray.evaluate.output_files import to_utf8
from llava_ray.evaluate.predict.ask import ask, ask_with_retries
from llava_ray.evaluate.predict.cache_key import describe_settings, make_cache_key
from llava_ray.evaluate.predict.connect import connect
from llava_ray.evaluate.predict.crashes import MAX_CRASHES, CrashCounter
from llava_ray.model.fingerprint import PREFIX
from llava_ray.types import (
    ChatRequest,
    ImagePart,
    Message,
    Prediction,
    PredictionStatus,
    Question,
    Sampling,
    TextPart,
)


class Predictor:
    """Answers batches of pickled questions; what Ray Data's `map_batches` starts.

    Args:
        config: who answers, and how many questions at once.
        model: its name at the server.
        sampling: how responses are made.
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
        # Other servers may not know logprobs; ours give them without changing the response.
        self._sampling = sampling if config.endpoint else replace(sampling, num_logprobs=0)
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="predict", daemon=True).start()
        self._answer, self._problem = None, None
        try:
            self._answer = self._run(connect(config, model))
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
            prediction, fingerprint = await ask_with_retries(lambda: self._ask_once(question))
            if self._digest.startswith(PREFIX) and fingerprint != self._digest:
                raise EngineError(
                    f"the model that answered ({fingerprint or 'without a fingerprint'}) is not "
                    f"the one that the run began with ({self._digest}): the server was updated "
                    "meanwhile; run the same command again"
                )
            return prediction
        except (RequestError, SampleError) as error:
            return self._fail(question, "refused", error)
        except LlavaRayError as error:
            return self._fail(question, "failed", error)

    async def _ask_once(self, question: Question) -> tuple[Prediction, str]:
        """Return the prediction, and the fingerprint of the model that made it."""
        if to_utf8(question.text) != question.text:
            raise SampleError("the question has lone surrogates, which are no characters")
        images = [await asyncio.to_thread(load_image, each) for each in question.images]
        shas = tuple(hashlib.sha256(data).hexdigest() for data in images)
        parts = (*(ImagePart(data) for data in images), TextPart(question.text))
        request = ChatRequest(
            _make_request_id(question), self._model, (Message("user", parts),), self._sampling
        )
        assert self._answer is not None
        response = await ask(self._answer, request)
        prediction = Prediction(
            question.question_id,
            "answered",
            response.text.strip(),
            finish_reason=response.last.finish_reason,
            latency_s=response.latency_s,
            num_tokens=response.last.num_tokens,
            num_prompt_tokens=response.last.num_prompt_tokens,
            num_image_tokens=response.last.num_image_tokens,
            confidence=response.confidence,
            image_sha256=shas,
            cache_key=make_cache_key(self._digest, question, shas, self._settings),
            model_digest=self._digest,
        )
        return prediction, response.last.fingerprint

    def _fail(
        self, question: Question, status: PredictionStatus, error: LlavaRayError
    ) -> Prediction:
        reason = f"{type(error).__name__}: {error.message}"
        return Prediction(question.question_id, status, reason=reason, model_digest=self._digest)


def _make_request_id(question: Question) -> str:
    """Return a unique id in ASCII, as HTTP headers need, that begins like the question's."""
    name = question.question_id.encode(errors="surrogatepass")
    return f"eval-{quote(name[:40])}-{hashlib.sha256(name).hexdigest()[:8]}"


async def _make_semaphore(number: int) -> asyncio.Semaphore:
    return asyncio.Semaphore(number)
