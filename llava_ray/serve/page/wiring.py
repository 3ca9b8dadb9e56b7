"""Connects the page's events to handlers, and disables controls while an answer streams."""

from collections.abc import Callable
from typing import Any

import gradio as gr

from llava_ray.serve.page import handlers as page_handlers
from llava_ray.serve.page.conversation import Chat, find_answer, find_questions
from llava_ray.serve.page.handlers import Handlers
from llava_ray.serve.page.layout import PageLayout

# Not queue=False: Gradio then omits the route prefix from image URLs.
QUICK: dict[str, Any] = {
    "show_progress": "hidden",
    "concurrency_limit": None,
    "api_visibility": "undocumented",
}
CLICK_DOWNLOAD = "() => document.querySelector('#download a, a#download, #download').click()"


def wire(layout: PageLayout, handlers: Handlers) -> None:
    """Connect the components to the handlers."""
    with layout.page:
        _wire_models(layout, handlers)
        _wire_images(layout)
        starts = _wire_starts(layout)
        _wire_ends(layout, [_answer_after(start, layout, handlers) for start in starts])
        _wire_results(layout, handlers)


def _wire_models(on: PageLayout, handlers: Handlers) -> None:
    models = [on.model, on.other_model]
    on.page.load(handlers.load, None, [*models, on.knows, on.left], **QUICK)
    on.reload.click(handlers.reload, models, models, **QUICK)
    on.model.focus(handlers.reload, models, models, api_name="refresh", **QUICK)
    on.model.change(page_handlers.describe_model, on.model, on.knows, **QUICK)
    changed = [on.other_model, on.right_side, on.right, on.vote_row, on.verdict_row]
    on.is_double.change(_lay_out_sides, [on.is_double, on.left], changed, **QUICK)


def _wire_images(on: PageLayout) -> None:
    on.draw.click(page_handlers.draw, None, [on.box, *on.chips], **QUICK)
    # preprocess=False: otherwise Gradio decodes whatever a visitor sends as an image.
    places = [on.box, on.camera, on.camera_panel]
    on.camera.input(page_handlers.add_image, [on.camera, on.box], places, preprocess=False, **QUICK)


def _wire_starts(on: PageLayout) -> list[Any]:
    """Connect the events that ask a question; return them."""
    chats, sides = [on.left, on.right], [on.left, on.right, on.is_double]
    examples: list[Any] = list(on.left.examples or [])
    kept = [file["path"] for example in examples for file in example["files"]]
    on.left.keep_in_cache |= set(kept)  # otherwise Gradio deletes them with the chats

    def add_example(left: Chat, right: Chat, is_double: bool, chosen: gr.SelectData) -> Any:
        # Only the index is used, because the browser could send any file names.
        example = examples[chosen.index if chosen.index in range(len(examples)) else 0]
        box = {"text": example["text"], "files": [file["path"] for file in example["files"]]}
        return page_handlers.add(box, left, right, is_double)[:2]

    return [
        on.box.submit(page_handlers.add, [on.box, *sides], [*chats, on.box], **QUICK),
        on.left.example_select(add_example, sides, chats, **QUICK),
        on.regenerate.click(page_handlers.rewind, sides, chats, **QUICK),
        *[
            chip.click(page_handlers.add_chip, [chip, on.box, *sides], [*chats, on.box], **QUICK)
            for chip in on.chips
        ],
    ]


def _answer_after(start: Any, on: PageLayout, handlers: Handlers) -> Any:
    begun = start.then(lambda: _wait(on), None, _controls(on), **QUICK)
    answering = begun.then(
        handlers.answer,
        [on.left, on.right, on.model, on.other_model, on.is_double, *on.settings],
        [on.left, on.right],
        **{**QUICK, "show_progress": "minimal"},
    )
    _get_ready_after(answering, on)
    return answering


def _wire_ends(on: PageLayout, running: list[Any]) -> None:
    chats, sides = [on.left, on.right], [on.left, on.right, on.is_double]
    stopping = on.box.stop(None, cancels=running)
    _get_ready_after(stopping.then(page_handlers.mark_stopped, sides, chats, **QUICK), on)
    _get_ready_after(on.clear.click(page_handlers.forget, None, [*chats, *on.chips], **QUICK), on)
    # No _get_ready_after: a second update of the box would lose what was typed in the meantime.
    changed = [*chats, on.box, on.vote_row, on.verdict_row]
    on.edit.click(page_handlers.take_back, sides, changed, **QUICK)


def _wire_results(on: PageLayout, handlers: Handlers) -> None:
    """Connect download, votes and corrections."""
    chats = [on.left, on.right]
    packed = on.save.click(handlers.save, chats, on.download, **QUICK)
    packed.then(None, js=CLICK_DOWNLOAD)
    for vote, button in on.votes.items():
        voted = _with_last(handlers.vote, vote)
        button.click(voted, on.left, None, api_name=f"vote_{vote}", **QUICK)
    for better, button in on.verdicts.items():
        button.click(_with_last(handlers.compare, better), chats, None, **QUICK)
    panel, text = on.correction.panel, on.correction.text
    on.correct.click(_open_correction, on.left, [panel, text], **QUICK)
    on.correction.cancel.click(_hide, None, panel, **QUICK)
    kept = on.correction.keep.click(handlers.correct, [on.left, text, on.model], on.left, **QUICK)
    kept.then(_hide, None, panel, **QUICK)


def _with_last(handle: Callable[..., None], last: str) -> Callable[..., None]:
    """Bind the last argument of `handle`; Gradio accepts no partial objects."""

    def handle_rest(*values: Any) -> None:
        handle(*values, last)

    return handle_rest


def _open_correction(chat: Chat) -> tuple[Any, ...]:
    at = find_answer(chat)
    text = "" if at is None else "".join(part["text"] for part in chat[at]["content"])
    return gr.Column(visible=True), text


def _hide() -> Any:
    return gr.Column(visible=False)


def _lay_out_sides(is_double: bool, left: Chat) -> tuple[Any, ...]:
    """Show one chat or two; the second one starts as a copy of the first."""
    right = left if is_double else []
    hidden = gr.Row(visible=False)
    return gr.Dropdown(visible=is_double), gr.Column(visible=is_double), right, hidden, hidden


def _controls(on: PageLayout) -> list[Any]:
    """Return the components that change while an answer streams."""
    rows = [on.vote_row, on.verdict_row, on.correction.panel]
    buttons = [on.regenerate, on.edit, on.save, on.clear, on.draw, *on.chips]
    return [on.box, on.is_double, *rows, *buttons]


def _wait(on: PageLayout) -> list[Any]:
    """Return the state of `_controls` while an answer streams."""
    return [
        gr.MultimodalTextbox(submit_btn=False, stop_btn=True),
        gr.Checkbox(interactive=False),
        *[gr.Row(visible=False), gr.Row(visible=False), gr.Column(visible=False)],
        *[gr.Button(interactive=False)] * (5 + len(on.chips)),
    ]


def _get_ready_after(event: Any, on: PageLayout) -> None:
    def get_ready(left: Chat, right: Chat, is_double: bool) -> list[Any]:
        has_asked = bool(find_questions(left))
        has_answer = find_answer(left) is not None
        has_two = has_answer and find_answer(right) is not None
        return [
            gr.MultimodalTextbox(submit_btn=True, stop_btn=False),
            gr.Checkbox(interactive=True),
            gr.Row(visible=on.is_logged and has_answer and not is_double),
            gr.Row(visible=on.is_logged and has_two and is_double),
            gr.Column(visible=False),
            *[gr.Button(interactive=has_asked)] * 3,
            *[gr.Button(interactive=True)] * (2 + len(on.chips)),
        ]

    event.then(get_ready, [on.left, on.right, on.is_double], _controls(on), **QUICK)
