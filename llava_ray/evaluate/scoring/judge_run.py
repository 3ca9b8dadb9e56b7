"""Asks a judge model, at any OpenAI-compatible server, to grade responses; logs its verdicts.

A run that was killed and started again asks only about responses without a verdict in the log. A
verdict that cannot be read, or a judge that fails, gives a Score without a value, with the reason.
"""

import asyncio
import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from llava_ray.client import Client
from llava_ray.config import TasksConfig
from llava_ray.errors import LlavaRayError
from llava_ray.evaluate.output_files import to_utf8
from llava_ray.evaluate.predict.ask import ask, ask_with_retries, run_async
from llava_ray.evaluate.predict.log import append_log, read_log
from llava_ray.evaluate.scoring.judge import Judge
from llava_ray.types import ChatRequest, Message, Prediction, Question, Score, TextPart

KEY_VARIABLE = "OPENAI_API_KEY"


@dataclass(frozen=True, slots=True)
class Verdict:
    """A judge's verdict on a response.

    Attributes:
        question_id: of the question.
        cache_key: digest of the judge, its prompt and its settings.
        prompt: all that the judge was asked.
        text: the judge's whole response; empty if it failed.
        reason: why it failed.
    """

    question_id: str
    cache_key: str
    prompt: str
    text: str = ""
    reason: str = ""


def grade_predictions(
    judge: Judge,
    questions: Sequence[Question],
    predictions: Mapping[str, Prediction],
    config: TasksConfig,
    log: Path,
    *,
    on_verdict: Callable[[int, int], None] = lambda done, of: None,
) -> dict[str, Score]:
    """Return a score for every response, by question id; what the log holds is not asked again.

    Raises:
        ConfigError: the file of the judge's wording cannot be read.
    """
    if config.judge_endpoint is None:
        why = "no judge was asked: name one with --judge-endpoint"
        return {q.question_id: Score(None, why=why) for q in _find_answered(questions, predictions)}
    wording = judge.load_wording(config.judge_wording)
    drafts = [
        _draft(judge, question, predictions[question.question_id].text, wording(question), config)
        for question in _find_answered(questions, predictions)
    ]
    given = {v.cache_key: v for v in read_log(log, Verdict) if not v.reason}
    verdicts = {d.question_id: given[d.cache_key] for d in drafts if d.cache_key in given}
    on_verdict(len(verdicts), len(drafts))

    def keep(verdict: Verdict) -> None:
        append_log(log, [verdict])
        verdicts[verdict.question_id] = verdict
        on_verdict(len(verdicts), len(drafts))

    missing = [draft for draft in drafts if draft.question_id not in verdicts]
    run_async(_ask_judge(judge, missing, config, keep))
    return {name: _score(judge, verdict) for name, verdict in verdicts.items()}


def _find_answered(
    questions: Sequence[Question], predictions: Mapping[str, Prediction]
) -> list[Question]:
    return [
        question
        for question in questions
        if (found := predictions.get(question.question_id)) and found.status == "answered"
    ]


def _draft(
    judge: Judge, question: Question, text: str, wording: str, config: TasksConfig
) -> Verdict:
    """A verdict that is still to be given."""
    prompt = judge.write(question, text, wording)
    asked = [config.judge_endpoint, config.judge_model, asdict(judge.sampling)]
    key = json.dumps([question.question_id, *asked, prompt])
    return Verdict(question.question_id, hashlib.sha256(key.encode()).hexdigest(), prompt)


async def _ask_judge(
    judge: Judge,
    drafts: Sequence[Verdict],
    config: TasksConfig,
    keep: Callable[[Verdict], None],
) -> None:
    assert config.judge_endpoint is not None
    free = asyncio.Semaphore(config.judge_concurrency)
    key = os.environ.get(KEY_VARIABLE)
    async with Client(config.judge_endpoint, api_key=key) as client:

        async def ask_about(draft: Verdict) -> None:
            request = ChatRequest(
                "",
                config.judge_model,
                (Message("user", (TextPart(to_utf8(draft.prompt)),)),),
                judge.sampling,
            )
            async with free:
                try:
                    response = await ask_with_retries(lambda: ask(client.stream, request))
                    text, reason = response.text, ""
                except LlavaRayError as error:
                    text, reason = "", f"the judge failed: {error.message}"
            keep(Verdict(draft.question_id, draft.cache_key, draft.prompt, text, reason))

        await asyncio.gather(*(ask_about(draft) for draft in drafts))


def _score(judge: Judge, verdict: Verdict) -> Score:
    return Score(None, why=verdict.reason) if verdict.reason else judge.score(verdict.text)
