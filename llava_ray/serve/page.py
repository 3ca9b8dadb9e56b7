"""The page: a chat about pictures, in Gradio, and a client of the gateway like any other.

    build_page(url) -> Blocks;  mount_page(api) puts it on the gateway's own application at `/`;
    build_app(PageConfig) makes it an application of its own for a Serve config file.

What is asked and answered is in `conversation.py`; here is what it looks like.
"""

import os
import random
import tempfile
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI
from pydantic import Field
from ray import serve
from ray.serve import Application

from llava_ray import demo
from llava_ray.client import Client
from llava_ray.config import ModelConfig, Section
from llava_ray.errors import LlavaRayError
from llava_ray.serve import conversation
from llava_ray.serve.page_style import CSS, FONTS, MONO_FONTS
from llava_ray.types import Sampling

if TYPE_CHECKING:
    import gradio as gr

NUM_CHIPS = 4
EXAMPLE_SEEDS = (9, 10, 24)
MAX_UPLOAD = "64mb"


class PageConfig(Section):
    """The page as an application of its own."""

    gateway_url: str = Field(
        default="http://127.0.0.1:8000",
        description="Where the gateway answers, seen from the page.",
    )
    root_path: str | None = Field(
        default=None,
        description="Path or address of the page as people see it, if a reverse proxy changes it.",
    )


def build_app(config: PageConfig) -> Application:
    """Return the bound application for a Serve config file: one replica, under any prefix."""
    page = serve.deployment(
        name="page", max_ongoing_requests=1000, ray_actor_options={"num_cpus": 0}
    )(Page)
    return page.bind(config)


@serve.ingress()
class Page:
    """Serves the page alone. One replica: uploads and open streams live in its process."""

    def __init__(self, config: PageConfig) -> None:
        self._config = config

    def __serve_build_asgi_app__(self) -> FastAPI:
        api = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
        config = self._config
        return mount_page(api, base_url=config.gateway_url, root_path=config.root_path)


def mount_page(
    api: FastAPI, *, base_url: str | None = None, root_path: str | None = None
) -> FastAPI:
    """Serve the page at `/` of an application whose own routes go before it.

    Args:
        api: the application; it is changed and returned.
        base_url: as of `build_page`.
        root_path: as of `PageConfig`.
    """
    page = build_page(base_url)
    import gradio as gr

    theme = gr.themes.Default(
        primary_hue="teal", neutral_hue="slate", font=FONTS, font_mono=MONO_FONTS
    )
    # Without this Gradio takes any path that a visitor names for a file of theirs, and reads it.
    page.has_launched = True
    return gr.mount_gradio_app(
        api,
        page,
        path="/",
        root_path=root_path,
        enable_monitoring=False,
        theme=theme,
        css=CSS,
        footer_links=[],
        run_history=False,
        max_file_size=MAX_UPLOAD,
    )


def build_page(base_url: str | None = None) -> "gr.Blocks":
    """Return the page.

    Args:
        base_url: the gateway's address; None: the one at which the page itself is asked for,
            reached over loopback.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported
    # A folder that pages share would lose the pictures of all with the first page that ends.
    os.environ.setdefault("GRADIO_TEMP_DIR", tempfile.mkdtemp(prefix="llava-ray-page-"))
    import gradio as gr

    def gateway(request: gr.Request) -> str:
        if base_url:
            return base_url
        assert request.request is not None
        scope = request.request.scope
        return f"http://127.0.0.1:{scope['server'][1]}{scope.get('root_path', '')}"

    async def load(request: gr.Request) -> tuple[Any, ...]:
        try:
            async with Client(gateway(request)) as client:
                names, problems = await client.list_models(), []
        except LlavaRayError as error:
            names, problems = [], [conversation.show_error(error)]
        asked = request.query_params.get("model")
        chosen = asked if asked in names else next(iter(names), None)
        return gr.Dropdown(choices=names, value=chosen), _describe_model(chosen), problems

    def add(box: dict[str, Any], history: list[Any]) -> tuple[Any, ...]:
        return conversation.ask(history, box["text"], box["files"]), {"text": "", "files": []}

    def add_chip(chip: str, box: dict[str, Any], history: list[Any]) -> tuple[Any, ...]:
        return add({"text": chip, "files": box["files"]}, history)

    def add_example(chosen: gr.SelectData) -> list[Any]:
        paths = [file["path"] for file in chosen.value["files"]]
        return conversation.ask([], chosen.value["text"], paths)

    def draw() -> tuple[Any, ...]:
        picture, questions = demo.make_example(random.randrange(1 << 31))
        path = save(picture)
        chips = [gr.Button(question, visible=True) for question in questions[:NUM_CHIPS]]
        hidden = [gr.Button(visible=False)] * (NUM_CHIPS - len(chips))
        return {"text": "", "files": [path]}, *chips, *hidden

    def save(picture: Any) -> str:
        from gradio.processing_utils import save_pil_to_cache
        from gradio.utils import get_upload_folder

        return save_pil_to_cache(picture, get_upload_folder(), format="png")

    def example(seed: int) -> Any:
        picture, questions = demo.make_example(seed)
        path = save(picture)
        return {"text": questions[seed % len(questions)], "files": [path], "icon": path}

    async def answer(
        history: list[Any],
        model: str | None,
        temperature: float,
        top_p: float,
        max_tokens: float,
        request: gr.Request,
    ) -> AsyncGenerator[list[Any]]:
        if not history or history[-1]["role"] != "user":
            return
        sampling = Sampling(int(max_tokens), temperature, top_p)
        said = conversation.stream_answer(gateway(request), model or "", history, sampling)
        async with aclosing(said):
            async for messages in said:
                yield [*history, *messages]

    def forget() -> list[Any]:
        return [[], *[gr.Button(visible=False)] * NUM_CHIPS]

    def stop(history: list[Any]) -> list[Any]:
        return [*history, conversation.note("stopped")]

    with gr.Blocks(
        title="LLaVA on Ray",
        analytics_enabled=False,
        fill_height=True,
        delete_cache=(3600, 24 * 3600),
    ) as page:
        with gr.Row(elem_id="head"):
            gr.Markdown("# LLaVA on Ray", elem_id="title")
            model = gr.Dropdown(
                [],
                label="Model",
                show_label=False,
                container=False,
                # The gateway knows the models; a new replica of the page has not listed them yet.
                allow_custom_value=True,
                elem_id="model",
            )
        knows = gr.Markdown(elem_id="knows")
        chat = gr.Chatbot(
            elem_id="chat",
            show_label=False,
            scale=1,
            height=260,
            buttons=["copy"],
            placeholder="Drop a picture in and ask about it.",
            examples=[example(seed) for seed in EXAMPLE_SEEDS],
        )
        with gr.Row(elem_id="chips"):
            chips = [gr.Button(visible=False, size="sm", min_width=0) for _ in range(NUM_CHIPS)]
        box = gr.MultimodalTextbox(
            show_label=False,
            placeholder="Ask about pictures: attach, drop or paste them",
            file_types=["image"],
            file_count="multiple",
            autofocus=True,
            elem_id="box",
        )
        with gr.Row(elem_id="actions"):
            draw_button = gr.Button("Draw a new scene", size="sm", min_width=0)
            regenerate = gr.Button("Regenerate", size="sm", min_width=0, interactive=False)
            clear = gr.Button("New chat", size="sm", min_width=0)
        with gr.Accordion("Parameters", open=False), gr.Row():
            temperature = gr.Slider(0, 1, 0.2, step=0.1, label="Temperature")
            top_p = gr.Slider(0.1, 1, 0.7, step=0.1, label="Top p")
            max_tokens = gr.Slider(1, 1024, 512, step=1, label="Max new tokens")

        controls = [box, regenerate, clear, draw_button, *chips]

        def busy() -> list[Any]:
            return [
                gr.MultimodalTextbox(submit_btn=False, stop_btn=True),
                *[gr.Button(interactive=False) for _ in controls[1:]],
            ]

        def idle(history: list[Any]) -> list[Any]:
            can_redo = any(message["role"] == "user" for message in history)
            return [
                gr.MultimodalTextbox(submit_btn=True, stop_btn=False),
                gr.Button(interactive=can_redo),
                *[gr.Button(interactive=True) for _ in controls[2:]],
            ]

        # Not queue=False: Gradio then forgets the prefix of the page in the addresses of pictures.
        quick: dict[str, Any] = {
            "show_progress": "hidden",
            "concurrency_limit": None,
            "api_visibility": "undocumented",
        }
        waiting: dict[str, Any] = {**quick, "show_progress": "minimal"}
        starts = [
            box.submit(add, [box, chat], [chat, box], **quick),
            chat.example_select(add_example, None, chat, **quick),
            regenerate.click(conversation.rewind, chat, chat, **quick),
            *[chip.click(add_chip, [chip, box, chat], [chat, box], **quick) for chip in chips],
        ]
        running = []
        for start in starts:
            begun = start.then(busy, None, controls, **quick)
            answering = begun.then(
                answer,
                [chat, model, temperature, top_p, max_tokens],
                chat,
                **waiting,
            )
            answering.then(idle, chat, controls, **quick)
            running.append(answering)
        stopping = box.stop(None, cancels=running).then(stop, chat, chat, **quick)
        stopping.then(idle, chat, controls, **quick)
        draw_button.click(draw, None, [box, *chips], **quick)
        clear.click(forget, None, [chat, *chips], **quick).then(idle, chat, controls, **quick)
        model.change(_describe_model, model, knows, **quick)
        page.load(load, None, [model, knows, chat], **quick)
    return page


def _describe_model(name: str | None) -> str:
    """What the embedded model knows; of others nothing is known here."""
    return demo.KNOWS if name == ModelConfig(path="demo").name else ""
