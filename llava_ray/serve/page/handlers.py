"""The functions behind the page's controls; they receive the chat from the browser and return it.

`upload_guard.py` has already checked that all files in a chat are uploads.
"""

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any

import gradio as gr

from llava_ray import demo
from llava_ray.client import Client
from llava_ray.config import ModelConfig, PageConfig
from llava_ray.errors import LlavaRayError
from llava_ray.serve.page import conversation
from llava_ray.serve.page.compare import stream_together
from llava_ray.serve.page.conversation import Chat, PageAnswer
from llava_ray.serve.page.download import pack_conversations
from llava_ray.serve.page.feedback import Comparison, FeedbackLog, Vote
from llava_ray.serve.page.image_modes import ImageMode
from llava_ray.serve.page.layout import NUM_CHIPS, draw_scene
from llava_ray.serve.page.moderation import Moderator
from llava_ray.types import Sampling


class Handlers:
    """Handlers that need the configuration; they keep no state of visitors.

    Args:
        config: the page's configuration.

    Raises:
        ConfigError: the feedback folder is not writable.
    """

    def __init__(self, config: PageConfig) -> None:
        self._gateway_url = config.gateway_url
        self._log = FeedbackLog(config.feedback_dir) if config.feedback_dir else None
        self._moderator = Moderator(config.moderation)

    async def load(self, request: gr.Request) -> tuple[Any, ...]:
        """List the models for a new visitor, and select the one in the URL's `model` parameter."""
        names, problems = await self._list_models(request)
        asked = request.query_params.get("model")
        chosen = asked if asked in names else next(iter(names), None)
        other = next((name for name in names if name != chosen), chosen)
        return (
            gr.Dropdown(choices=names, value=chosen),
            gr.Dropdown(choices=names, value=other),
            describe_model(chosen),
            problems or gr.skip(),  # do not overwrite a question
        )

    async def reload(self, model: str, other: str, request: gr.Request) -> list[Any]:
        """List the models again; keep the selected ones that still exist."""
        names, problems = await self._list_models(request)
        if problems:
            gr.Warning(problems[0]["content"])
            return [gr.skip(), gr.skip()]
        return [
            # No value: the visitor may be choosing one right now.
            gr.Dropdown(choices=names)
            if name in names
            else gr.Dropdown(choices=names, value=next(iter(names), None))
            for name in (model, other)
        ]

    async def answer(
        self,
        left: Chat,
        right: Chat,
        model: str | None,
        other_model: str | None,
        is_double: bool,
        temperature: float,
        top_p: float,
        max_tokens: float,
        image_mode: ImageMode,
        request: gr.Request,
    ) -> AsyncGenerator[list[Any]]:
        """Answer the last question with one model, or with two at once."""
        if not conversation.is_question(left):
            return
        sampling = Sampling(int(max_tokens), temperature, top_p)
        sides = [(model, left), (other_model, right)][: 1 + is_double]
        answers = [PageAnswer(name or "", chat, sampling, image_mode) for name, chat in sides]
        if refusal := await self._moderate(left):
            yield _show(answers, [[refusal]] * len(answers))
            return
        url = self._find_gateway(request)
        streams = [conversation.stream_answer(url, answer) for answer in answers]
        shown: list[Chat | None] = []
        async with aclosing(stream_together(streams)) as views:
            async for shown in views:
                yield _show(answers, shown)
        if problem := await asyncio.to_thread(self._log_answers, answers):
            yield _show(answers, [[*(messages or []), problem] for messages in shown])

    def vote(self, chat: Chat, vote: Vote) -> None:
        """Log a vote or a flag for the last answer."""
        answer_id = conversation.find_answer_id(chat)
        if self._log and answer_id:
            _tell(self._log.write_vote, answer_id, vote)

    def compare(self, left: Chat, right: Chat, better: Comparison) -> None:
        """Log which of the two last answers is better."""
        left_id, right_id = map(conversation.find_answer_id, (left, right))
        if self._log and left_id and right_id:
            _tell(self._log.write_comparison, left_id, right_id, better)

    def correct(self, chat: Chat, text: str, model: str) -> Chat:
        """Log a corrected last answer, and show it."""
        at, answer_id = conversation.find_answer(chat), conversation.find_answer_id(chat)
        if self._log and answer_id and text.strip():
            asked = conversation.read_history(chat[:at])
            _tell(self._log.write_correction, answer_id, asked, text.strip(), model)
            return conversation.correct_answer(chat, text.strip())
        return chat

    def save(self, left: Chat, right: Chat) -> Any:
        """Write the conversation to a file for download."""
        return gr.DownloadButton(value=pack_conversations([left, right]))

    async def _list_models(self, request: gr.Request) -> tuple[list[str], Chat]:
        try:
            async with Client(self._find_gateway(request)) as client:
                return await client.list_models(), []
        except LlavaRayError as error:
            return [], [conversation.show_error(error)]

    async def _moderate(self, chat: Chat) -> dict[str, Any] | None:
        """Return a note if moderation refuses the question, else None."""
        try:
            messages = await asyncio.to_thread(conversation.read_history, chat[-1:])
            await self._moderator.check(messages[-1])
        except LlavaRayError as error:
            return conversation.show_error(error)
        return None

    def _log_answers(self, answers: list[PageAnswer]) -> dict[str, Any] | None:
        """Log the answers; return a note if that failed."""
        try:
            for answer in answers:
                if self._log and answer.last and answer.text:
                    self._log.write_answer(
                        answer.answer_id,
                        answer.messages,
                        answer.text,
                        model=answer.model,
                        sampling=answer.sampling,
                        last=answer.last,
                        seconds=answer.seconds,
                    )
        except OSError as error:
            return conversation.note(f"⚠ not recorded: {error.strerror or error}", kind="error")
        return None

    def _find_gateway(self, request: gr.Request) -> str:
        if self._gateway_url:
            return self._gateway_url
        assert request.request is not None
        scope = request.request.scope
        return f"http://127.0.0.1:{scope['server'][1]}{scope.get('root_path', '')}"


def add(box: dict[str, Any], left: Chat, right: Chat, is_double: bool) -> tuple[Any, ...]:
    """Append the question in the box to the chat, or to both chats."""
    asked = [conversation.ask(chat, box["text"], box["files"]) for chat in (left, right)]
    return asked[0], asked[1] if is_double else gr.skip(), {"text": "", "files": []}


def add_chip(
    chip: str, box: dict[str, Any], left: Chat, right: Chat, is_double: bool
) -> tuple[Any, ...]:
    """Ask a suggested question about the images in the box."""
    return add({"text": chip, "files": box["files"]}, left, right, is_double)


def add_image(image: dict[str, Any] | None, box: dict[str, Any]) -> tuple[Any, ...]:
    """Move the camera's image into the box, and close the camera."""
    if image is None:
        return gr.skip(), gr.skip(), gr.skip()
    paths = [file["path"] for file in (*box["files"], image)]
    return {"text": box["text"], "files": paths}, None, gr.Accordion(open=False)


def take_back(left: Chat, right: Chat, is_double: bool) -> tuple[Any, ...]:
    """Move the last question back into the box to be edited."""
    before, text, paths = conversation.take_back(left)
    other = conversation.take_back(right)[0] if is_double else gr.skip()
    hidden = gr.Row(visible=False)
    return before, other, {"text": text, "files": paths}, hidden, hidden


def draw() -> tuple[Any, ...]:
    """Put a new scene into the box and suggest questions about it."""
    path, questions = draw_scene()
    chips = [gr.Button(question, visible=True) for question in questions]
    hidden = [gr.Button(visible=False)] * (NUM_CHIPS - len(chips))
    return {"text": "", "files": [path]}, *chips, *hidden


def rewind(left: Chat, right: Chat, is_double: bool) -> list[Any]:
    """Remove the last answer, so that its question is answered again."""
    return [conversation.rewind(left), conversation.rewind(right) if is_double else gr.skip()]


def forget() -> list[Any]:
    """Start a new conversation."""
    return [[], [], *[gr.Button(visible=False)] * NUM_CHIPS]


def mark_stopped(left: Chat, right: Chat, is_double: bool) -> list[Any]:
    """Keep the partial answers and mark them as stopped."""
    stopped = conversation.note("stopped")
    return [[*left, stopped], [*right, stopped] if is_double else gr.skip()]


def describe_model(name: str | None) -> Any:
    """Describe what the embedded model knows; show nothing for other models."""
    return gr.Markdown(demo.KNOWS, visible=name == ModelConfig(path="demo").name)


def _show(answers: list[PageAnswer], shown: list[Any]) -> list[Any]:
    chats = [
        [*answer.history, *(messages or [])]
        for answer, messages in zip(answers, shown, strict=True)
    ]
    return chats if len(chats) == 2 else [chats[0], gr.skip()]


def _tell(write: Callable[..., None], *what: Any) -> None:
    try:
        write(*what)
    except OSError as error:
        gr.Warning(f"This was not recorded: {error.strerror or error}")
    else:
        gr.Info("Thank you, this was recorded.", duration=3)
