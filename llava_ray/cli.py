"""The command line: `llava-ray chat | serve | demo`.

Everything heavy is imported by the command that needs it, so that `--help` is there at once.
A `UserError` ends a command with its message and exit code 2, any other of ours with 1.
"""

import asyncio
import random
import signal
import sys
import uuid
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import aclosing
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

import llava_ray
from llava_ray.client import DEFAULT_URL, Client, shrink_picture
from llava_ray.config import DEMO_MODEL, EngineName, LimitsConfig, ModelConfig, ServeConfig
from llava_ray.errors import ConfigError, ImageError, LlavaRayError, UserError
from llava_ray.types import ChatRequest, Chunk, ImagePart, Message, Sampling, TextPart

app = typer.Typer(
    help="Talk about pictures with LLaVA, and serve it on Ray.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
demo_app = typer.Typer(help="The embedded model: its scenes, training and scores.")
app.add_typer(demo_app, name="demo", no_args_is_help=True)

out = Console(highlight=False, soft_wrap=True)
notes = Console(stderr=True, highlight=False, soft_wrap=True)

Answerer = Callable[[ChatRequest], AsyncGenerator[Chunk]]

COMMANDS = "/image PATH adds a picture, /clear starts anew, /quit leaves; Ctrl-C stops an answer"


def main() -> None:
    """The entry point of the `llava-ray` command."""
    try:
        app()
    except LlavaRayError as error:
        notes.print(f"error: {error.message}", markup=False, style="red")
        sys.exit(2 if isinstance(error, UserError) else 1)


def _print_version(wanted: bool) -> None:
    if wanted:
        out.print(f"llava-ray {llava_ray.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None: ...


@app.command()
def chat(
    pictures: Annotated[
        list[Path] | None, typer.Argument(metavar="[IMAGE]...", help="Pictures to talk about.")
    ] = None,
    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", help="Ask this, print the answer and exit.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="Name of a served model, by default the first; with --local a folder or hub name."
        ),
    ] = None,
    url: Annotated[
        str | None,
        typer.Option(help=f"Address of a server; by default {DEFAULT_URL}, if one answers there."),
    ] = None,
    local: Annotated[
        bool, typer.Option("--local", help="Load the model in this process; ask no server.")
    ] = False,
    engine: Annotated[EngineName, typer.Option(help="What computes, without a server.")] = "torch",
    temperature: Annotated[float, typer.Option(min=0, max=2, help="0 is greedy.")] = 0.2,
    top_p: Annotated[float, typer.Option(min=0.01, max=1, help="Nucleus sampling.")] = 0.7,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 512,
    seed: Annotated[int | None, typer.Option(help="Makes sampling repeatable.")] = None,
) -> None:
    """Talk about pictures in the terminal, with a server or without one.

    If a server answers, it is asked; otherwise the model is loaded in this process.
    """
    sampling = Sampling(max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed)
    shown = [_read_picture(path) for path in pictures or []]
    with asyncio.Runner() as runner:
        name, answer, close = runner.run(_connect(model, url=url, local=local, engine=engine))
        try:
            talk = Talk(runner, answer, name, sampling)
            if prompt is not None:
                sys.exit(0 if talk.say(prompt, shown) else 130)
            talk.run(shown)
        finally:
            runner.run(close())


class Talk:
    """A conversation in the terminal; a turn without an answer leaves no trace in it."""

    def __init__(
        self, runner: asyncio.Runner, answer: Answerer, model: str, sampling: Sampling
    ) -> None:
        self._runner, self._answer, self._model, self._sampling = runner, answer, model, sampling
        self._turns: tuple[Message, ...] = ()

    def run(self, pictures: list[ImagePart]) -> None:
        """Read and answer until the end of the input."""
        notes.print(f"{self._model}: {_count(pictures)}. {COMMANDS}.", style="dim")
        while (line := _read_line()) is not None and line not in ("/quit", "/exit"):
            try:
                if line == "/clear":
                    self._turns, pictures = (), []
                    notes.print("a new conversation, without pictures", style="dim")
                elif line == "/image" or line.startswith("/image "):
                    pictures.append(_read_picture(Path(line.removeprefix("/image").strip())))
                    notes.print(_count(pictures), style="dim")
                elif line.startswith("/"):
                    notes.print(f"no such command: {line}; {COMMANDS}", markup=False)
                elif line and self.say(line, pictures):
                    pictures = []
            except LlavaRayError as error:
                notes.print(f"error: {error.message}", markup=False, style="red")

    def say(self, text: str, pictures: list[ImagePart]) -> bool:
        """Print the answer as it comes; False if it was stopped before it began."""
        asked = Message("user", (*pictures, TextPart(text)))
        request = ChatRequest(
            f"cli-{uuid.uuid4().hex}", self._model, (*self._turns, asked), self._sampling
        )
        pieces: list[str] = []
        try:
            self._runner.run(self._print_answer(request, pieces))
        except KeyboardInterrupt:
            notes.print("(stopped)", style="dim")
        if not (answer := "".join(pieces)):
            return False
        self._turns = (*request.messages, Message("assistant", (TextPart(answer),)))
        return True

    async def _print_answer(self, request: ChatRequest, pieces: list[str]) -> None:
        try:
            async with aclosing(self._answer(request)) as chunks:
                async for chunk in chunks:
                    pieces.append(chunk.text)
                    out.print(chunk.text, end="", markup=False)
        finally:
            if pieces:
                out.print()


async def _connect(
    model: str | None, *, url: str | None, local: bool, engine: EngineName
) -> tuple[str, Answerer, Callable[[], Coroutine[Any, Any, None]]]:
    """Find who answers: the name of the model, how to ask, how to end."""
    if local and url:
        raise UserError("--local asks no server and --url names one: give one of them")
    client = Client(url or DEFAULT_URL)
    if not local and (url or await client.is_up()):
        names = await client.list_models()
        if not names:
            raise UserError(f"the server at {client.base_url} serves no model yet: try again")
        return model or names[0], client.stream, client.close
    await client.close()
    config = ModelConfig(path=model or DEMO_MODEL, engine=engine)
    return await _load(config)


async def _load(
    config: ModelConfig,
) -> tuple[str, Answerer, Callable[[], Coroutine[Any, Any, None]]]:
    """Load a model in this process."""
    from llava_ray.engine.chat import chat
    from llava_ray.engine.load import load_engine

    with notes.status(f"loading {config.path} with the {config.engine} engine"):
        engine = load_engine(config)

    def answer(request: ChatRequest) -> AsyncGenerator[Chunk]:
        return chat(engine, request, limits=LimitsConfig())

    return config.name, answer, engine.close


def _read_picture(path: Path) -> ImagePart:
    try:
        data = path.expanduser().read_bytes()
    except OSError as error:
        raise ImageError(f"cannot read {str(path)!r} ({error.strerror}): give a file") from error
    return ImagePart(shrink_picture(data, name=str(path)), param=path.name)


def _read_line() -> str | None:
    """The next line, without blanks around it; None at the end of the input."""
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return None
    except KeyboardInterrupt:
        notes.print(f"\n{COMMANDS}", style="dim")
        return ""


def _count(pictures: list[ImagePart]) -> str:
    return {0: "no picture yet", 1: "1 picture"}.get(len(pictures), f"{len(pictures)} pictures")


@app.command()
def serve(
    model: Annotated[
        str | None,
        typer.Argument(help="Folder or hub name of the weights; by default the embedded model."),
    ] = None,
    engine: Annotated[EngineName | None, typer.Option(help="What computes.")] = None,
    host: Annotated[str, typer.Option(help="0.0.0.0 lets other machines in.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port of page and API.")] = 8000,
    page: Annotated[
        bool | None, typer.Option("--page/--no-page", help="Serve the page with the API.")
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(help="YAML file with the fields of ServeConfig, for example `models`."),
    ] = None,
) -> None:
    """Serve models on Ray, with the page and the OpenAI API, until Ctrl-C.

    What is not given here comes from --config, then from LLAVA_RAY_* in the environment.
    """
    given = {"model": model, "engine": engine, "page": page}
    settings = _read_settings(config) | {k: v for k, v in given.items() if v is not None}
    try:
        described = ServeConfig(**settings)
    except ValueError as error:
        raise ConfigError(_explain(error)) from error

    from ray import serve as ray_serve

    from llava_ray.app import build_app

    application = build_app(described)
    ray_serve.start(http_options={"host": host, "port": port})
    try:
        ray_serve.run(application)
        notes.print(f"ready: http://{host}:{port}; Ctrl-C ends it")
        signal.pause()
    except KeyboardInterrupt:
        ray_serve.shutdown()


def _read_settings(path: Path | None) -> dict[str, Any]:
    if path is None:
        return {}
    import yaml

    try:
        settings = yaml.safe_load(path.read_text()) or {}
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"cannot read {str(path)!r}: {error}") from error
    if not isinstance(settings, dict) or "applications" in settings:
        raise ConfigError(
            f"{path} has no fields of ServeConfig at its top; run a Serve config file "
            f"with `serve run {path}`"
        )
    return settings


def _explain(error: ValueError) -> str:
    """One line a problem, with the field in front."""
    problems = getattr(error, "errors", list)()
    lines = [f"{'.'.join(map(str, p['loc']))}: {p['msg']}".lstrip(": ") for p in problems]
    return "; ".join(lines) or str(error)


@demo_app.command()
def scene(
    path: Annotated[Path, typer.Argument(help="PNG file to write.")],
    seed: Annotated[int | None, typer.Option(help="The same seed, the same scene.")] = None,
) -> None:
    """Draw a new scene and print questions about it."""
    from llava_ray.demo import make_example

    picture, questions = make_example(random.randrange(1 << 31) if seed is None else seed)
    try:
        picture.save(path, format="PNG")
    except OSError as error:
        raise UserError(
            f"cannot write {str(path)!r} ({error.strerror}): give a new file"
        ) from error
    out.print(*questions, sep="\n", markup=False)


@demo_app.command()
def train(
    output_dir: Annotated[Path, typer.Argument(help="Folder to write the weights to.")],
    minutes: Annotated[
        float | None, typer.Option(min=0.1, help="About how long; by default as it was shipped.")
    ] = None,
    seed: Annotated[int, typer.Option(help="The same seed, the same scenes.")] = 0,
    threads: Annotated[int, typer.Option(min=1, help="CPU cores to use.")] = 2,
) -> None:
    """Train the embedded model from nothing, on the CPU."""
    from llava_ray.demo import recipe

    recipe.train(
        output_dir,
        budget_minutes=recipe.BUDGET_MINUTES if minutes is None else minutes,
        seed=seed,
        threads=threads,
    )


@demo_app.command()
def evaluate(
    model_dir: Annotated[
        Path | None, typer.Argument(help="Folder of the weights; by default the embedded ones.")
    ] = None,
    scenes: Annotated[int, typer.Option(min=1, help="How many held-out scenes.")] = 1000,
    seed: Annotated[int, typer.Option(help="The same seed, the same scenes.")] = 0,
    write: Annotated[Path | None, typer.Option(help="JSON file for the scores.")] = None,
) -> None:
    """Print how well the embedded model answers, with the picture and without it."""
    from llava_ray.demo import MODEL_DIR

    folder = model_dir or MODEL_DIR
    if not (folder / "config.json").is_file():
        raise UserError(f"no weights in {str(folder)!r}: give the folder that has the config.json")

    from llava_ray.demo import evaluate as scoring

    scores = scoring.evaluate(folder, num_scenes=scenes, seed=seed)
    if write is not None:
        scores.write(write)


if __name__ == "__main__":
    main()
