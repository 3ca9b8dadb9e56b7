"""The application as a whole: what is deployed, and the embedded model behind the API."""

import asyncio
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from openai import OpenAI
from ray import serve
from ray.serve.schema import ServeDeploySchema

from llava_ray import app, demo
from llava_ray.config import LimitsConfig, ModelConfig, PageConfig, ServeConfig
from llava_ray.demo.questions import make_conversation
from llava_ray.demo.scenes import draw, make_scene
from llava_ray.errors import EngineError
from llava_ray.images import to_data_url
from llava_ray.serve.replica.deployment import FAILED_CHECKS, Replica
from llava_ray.types import ChatRequest, Message, TextPart
from tests.support.tiny_checkpoint import tiny_model

pytestmark = pytest.mark.ray

CONFIG = Path(__file__).parents[2] / "jobs" / "configs" / "serve.yaml"


@pytest.fixture(scope="module")
def client(served: str) -> Iterator[OpenAI]:
    """The unmodified client of an application that serves the embedded model."""
    config = ServeConfig(models=[ModelConfig(num_cpus=0.1)], page=False)
    serve.run(app.build_app(config), name="demo", route_prefix="/demo")
    with OpenAI(base_url=f"{served}/demo/v1", api_key="none", max_retries=0) as client:
        yield client
    serve.delete("demo")


def ask(client: OpenAI, image_url: str, question: str) -> str:
    image = {"type": "image_url", "image_url": {"url": image_url}}
    answer = client.chat.completions.create(
        model="llava-ray-demo",
        messages=[{"role": "user", "content": [image, {"type": "text", "text": question}]}],
        temperature=0,
        max_tokens=40,
    )
    return answer.choices[0].message.content or ""


def test_the_embedded_model_talks_about_images_through_the_api(client: OpenAI) -> None:
    asked = right = 0
    for seed in range(6):
        rng = random.Random(f"app {seed}")
        scene = make_scene(rng, num_items=2)
        image = to_data_url(draw(scene))
        for turn in make_conversation(rng, [scene], num_turns=4):
            asked += 1
            right += ask(client, image, turn.question) == turn.answer
    assert right > asked / 2, f"{right} of {asked} answers are right"


def test_the_embedded_model_says_so_when_it_has_no_image(client: OpenAI) -> None:
    question = {"role": "user", "content": "How many objects are there?"}
    answer = client.chat.completions.create(
        model="llava-ray-demo", messages=[question], temperature=0, max_tokens=40
    )
    assert "no picture" in (answer.choices[0].message.content or "")


def test_an_example_comes_with_questions() -> None:
    image, questions = demo.make_example(1)
    assert image.size[0] >= 144
    assert len(questions) >= 3


def test_deployment_is_the_application_of_the_defaults() -> None:
    assert isinstance(app.deployment, serve.Application)
    with pytest.raises(AttributeError, match="deploymnt"):
        _ = app.deploymnt


def test_the_serve_config_file_is_what_serve_and_the_applications_take() -> None:
    schema = ServeDeploySchema.model_validate(yaml.safe_load(CONFIG.read_text()))
    api, page = schema.applications
    config = ServeConfig.model_validate(api.args)
    assert not config.page
    app.build_app(config)
    names = {deployment.name for deployment in api.deployments}
    assert names <= {"gateway", *(model.name for model in config.models)}
    assert PageConfig.model_validate(page.args).gateway_url.endswith(str(schema.http_options.port))


def test_the_health_of_a_replica_is_that_of_its_engine() -> None:
    async def check() -> None:
        config = ModelConfig(path=str(tiny_model()), dtype="float32", device="cpu")
        replica = Replica(config, LimitsConfig())
        await replica.check_health()
        await replica._engine.close()
        with pytest.raises(EngineError):
            await replica.check_health()

    asyncio.run(check())


def test_what_a_stuck_engine_has_begun_ends_when_serve_gives_it_up() -> None:
    async def check() -> None:
        replica = Replica(ModelConfig(path="echo", engine="echo", echo_delay_s=60), LimitsConfig())
        request = ChatRequest("r", "echo", (Message("user", (TextPart("one two"),)),))
        answer = asyncio.create_task(anext(replica.chat(request)))
        while not (await replica.stats())["num_running"]:
            await asyncio.sleep(0.01)
        await replica._engine.close()
        for _ in range(FAILED_CHECKS):
            assert not answer.done()
            with pytest.raises(EngineError):
                await replica.check_health()
        with pytest.raises(EngineError, match="is being replaced"):
            await asyncio.wait_for(answer, 10)

    asyncio.run(check())


@pytest.mark.parametrize(("messages_per_s", "num_pieces"), [(10**9, 7), (1, 2)])
def test_a_replica_joins_the_pieces_that_would_be_too_many(
    messages_per_s: int, num_pieces: int
) -> None:
    async def listen() -> list[str]:
        model = ModelConfig(path="echo", engine="echo", messages_per_s=messages_per_s)
        question = Message("user", (TextPart("one two three four five"),))
        request = ChatRequest("r", "echo", (question,))
        return [chunk.text async for chunk in Replica(model, LimitsConfig()).chat(request)]

    pieces = asyncio.run(listen())
    assert "".join(pieces) == "one two three four five (0 images)"
    assert len(pieces) == num_pieces
    assert pieces[0].strip() == "one"
