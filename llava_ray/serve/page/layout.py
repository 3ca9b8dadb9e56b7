"""The components of the page; `wiring.py` has its behaviour, `style.py` its CSS."""

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.processing_utils import save_pil_to_cache
from gradio.utils import get_upload_folder

from llava_ray import demo
from llava_ray.config import PageConfig
from llava_ray.serve.page.feedback import Comparison, Vote
from llava_ray.serve.page.image_modes import IMAGE_MODES
from llava_ray.serve.page.upload_guard import GuardedBlocks

NUM_CHIPS = 4
EXAMPLE_SEEDS = (9, 10, 24)
VOTES: dict[Vote, str] = {"up": "👍 Good", "down": "👎 Bad", "flag": "⚑ Flag"}
VERDICTS: dict[Comparison, str] = {
    "left": "👈 Left is better",
    "right": "👉 Right is better",
    "tie": "Tie",
    "both bad": "Both are bad",
}
PRIVACY_NOTE = (
    "This page records: questions, images, answers, votes and corrections are kept by its "
    "operator and may be used to train models. Do not enter anything private."
)


@dataclass(frozen=True, slots=True)
class Correction:
    """The panel in which an answer is corrected."""

    panel: gr.Column
    text: gr.Textbox
    keep: gr.Button
    cancel: gr.Button


@dataclass(frozen=True, slots=True)
class PageLayout:
    """The interactive components of the page, by purpose."""

    page: gr.Blocks
    is_logged: bool
    model: gr.Dropdown
    other_model: gr.Dropdown
    reload: gr.Button
    is_double: gr.Checkbox
    knows: gr.Markdown
    left: gr.Chatbot
    right: gr.Chatbot
    right_side: gr.Column
    vote_row: gr.Row
    votes: dict[Vote, gr.Button]
    correct: gr.Button
    correction: Correction
    verdict_row: gr.Row
    verdicts: dict[Comparison, gr.Button]
    chips: list[gr.Button]
    box: gr.MultimodalTextbox
    camera: gr.Image
    camera_panel: gr.Accordion
    draw: gr.Button
    regenerate: gr.Button
    edit: gr.Button
    clear: gr.Button
    save: gr.Button
    download: gr.DownloadButton
    settings: list[Any]


def build_layout(config: PageConfig) -> PageLayout:
    """Return the page's components, without event handlers."""
    parts: dict[str, Any] = {"is_logged": bool(config.feedback_dir)}
    with GuardedBlocks(
        title="LLaVA on Ray",
        analytics_enabled=False,
        fill_height=True,
        delete_cache=(min(3600, config.uploads_kept_s), config.uploads_kept_s),
    ) as parts["page"]:
        parts |= _build_head()
        if parts["is_logged"]:
            gr.Markdown(PRIVACY_NOTE, elem_id="privacy")
        parts["knows"] = gr.Markdown(visible=False, elem_id="knows")
        with gr.Row(elem_id="chats", scale=1):
            with gr.Column(min_width=280, elem_classes="side"):
                parts["left"] = _build_chat("chat")
            with gr.Column(min_width=280, visible=False, elem_classes="side") as right_side:
                parts["right"] = _build_chat("other-chat")
        parts["right_side"] = right_side
        parts |= _build_votes()
        with gr.Row(elem_id="chips"):
            parts["chips"] = [_small_button("", visible=False) for _ in range(NUM_CHIPS)]
        parts |= _build_box()
        with gr.Accordion("Camera", open=False, elem_id="camera") as parts["camera_panel"]:
            parts["camera"] = gr.Image(
                label="Camera", show_label=False, sources=["webcam"], height=320, buttons=[]
            )
        parts["settings"] = _build_settings()
    return PageLayout(**parts)


def _build_head() -> dict[str, Any]:
    with gr.Row(elem_id="head"):
        gr.Markdown("# LLaVA on Ray", elem_id="title")
        return {
            "model": _build_model_list("Model", "model"),
            "other_model": _build_model_list("Second model", "other-model", visible=False),
            "reload": _small_button("⟳ Models", elem_id="reload"),
            "is_double": gr.Checkbox(
                label="Side by side", container=False, elem_id="double", min_width=0
            ),
        }


def _build_model_list(label: str, elem_id: str, *, visible: bool = True) -> gr.Dropdown:
    return gr.Dropdown(
        [],
        label=label,
        show_label=False,
        container=False,
        # The gateway checks the name; a new page replica has not listed the models yet.
        allow_custom_value=True,
        elem_id=elem_id,
        visible=visible,
    )


def _build_chat(elem_id: str) -> gr.Chatbot:
    return gr.Chatbot(
        elem_id=elem_id,
        elem_classes="chat",
        label="Answers",
        show_label=False,
        scale=1,
        height=260,
        buttons=["copy"],
        placeholder="Attach, drop or paste an image below and ask about it.",
        examples=[_make_example(seed) for seed in EXAMPLE_SEEDS] if elem_id == "chat" else None,
        feedback_options=None,
    )


def _build_votes() -> dict[str, Any]:
    with gr.Row(elem_classes="votes", visible=False) as vote_row:
        votes = {vote: _small_button(text) for vote, text in VOTES.items()}
        correct = _small_button("✎ Correct")
    with gr.Row(elem_classes="votes", visible=False) as verdict_row:
        verdicts = {better: _small_button(text) for better, text in VERDICTS.items()}
    with gr.Column(visible=False, elem_id="correction") as panel:
        text = gr.Textbox(label="What the answer should have been", lines=3, max_lines=12)
        with gr.Row(elem_classes="votes"):
            correction = Correction(
                panel, text, _small_button("Record the correction"), _small_button("Cancel")
            )
    return {
        "vote_row": vote_row,
        "votes": votes,
        "correct": correct,
        "correction": correction,
        "verdict_row": verdict_row,
        "verdicts": verdicts,
    }


def _build_box() -> dict[str, Any]:
    box = gr.MultimodalTextbox(
        label="Question",
        show_label=False,
        placeholder="Ask about images",
        file_types=["image"],
        file_count="multiple",
        autofocus=True,
        elem_id="box",
    )
    with gr.Row(elem_id="actions"):
        return {
            "box": box,
            "draw": _small_button("Draw a new scene"),
            "regenerate": _small_button("Regenerate", interactive=False),
            "edit": _small_button("Edit question", interactive=False),
            "save": _small_button("Download", interactive=False),
            "clear": _small_button("Clear"),
            "download": gr.DownloadButton("Conversation", visible="hidden", elem_id="download"),
        }


def _build_settings() -> list[Any]:
    with gr.Accordion("Parameters", open=False, elem_id="parameters"), gr.Row():
        return [
            gr.Slider(0, 1, 0.2, step=0.1, label="Temperature"),
            gr.Slider(0.1, 1, 0.7, step=0.1, label="Top p"),
            gr.Slider(1, 1024, 512, step=1, label="Max new tokens"),
            gr.Radio(
                list(IMAGE_MODES),
                value="default",
                label="Images",
                info="default: as in the model's training; the others change the image first",
            ),
        ]


def _small_button(text: str, **kwargs: Any) -> gr.Button:
    return gr.Button(text, size="sm", min_width=0, **kwargs)


def draw_scene() -> tuple[str, list[str]]:
    """Draw a scene that the embedded model understands; return its path, and questions about it."""
    image, questions = demo.make_example(random.randrange(1 << 31))
    path = save_pil_to_cache(image, get_upload_folder(), format="png")
    return path, list(questions[:NUM_CHIPS])


def _make_example(seed: int) -> Any:
    image, questions = demo.make_example(seed)
    # Not in Gradio's cache, which deletes files some time after a chat has shown them.
    folder = Path(get_upload_folder()) / "examples"
    folder.mkdir(parents=True, exist_ok=True)
    path = str(folder / f"{seed}.png")
    image.save(path)
    return {"text": questions[seed % len(questions)], "files": [path], "icon": path}
