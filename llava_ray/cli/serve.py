"""`llava-ray serve`: the application on Ray, until Ctrl-C or SIGTERM."""

from typing import Annotated

import typer

from llava_ray.cli.settings import collect_settings, make_command_class, read_words
from llava_ray.config import DtypeName, EngineName, QuantizationName, ServeConfig
from llava_ray.config.files import build_config
from llava_ray.errors import ConfigError

IN_SHORT = ("model", "name", "engine", "dtype", "quantization", "num_gpus")
"""Settings that describe one model; `models` describes several at length."""

ServeCommand = make_command_class(ServeConfig)


def serve(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="MODEL|CONFIG.yaml|KEY=VALUE",
            show_default=False,
            help="Folder or hub name of the weights (default: the embedded model), or a YAML file "
            "of settings; then settings.",
        ),
    ] = None,
    name: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Name of the model in the API and on the page."),
    ] = None,
    engine: Annotated[EngineName | None, typer.Option(help="What computes.")] = None,
    dtype: Annotated[DtypeName | None, typer.Option(help="Precision of the weights.")] = None,
    quantization: Annotated[
        QuantizationName | None, typer.Option(help="int8: computes in 8 bits, on CPUs.")
    ] = None,
    num_gpus: Annotated[
        float | None, typer.Option(metavar="N", min=0, help="GPUs of each replica.")
    ] = None,
    host: Annotated[
        str, typer.Option(metavar="ADDRESS", help="0.0.0.0 lets other machines in.")
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(metavar="N", min=1, max=65535, help="Port of the page and the API.")
    ] = 8000,
    page: Annotated[
        bool | None, typer.Option("--page/--no-page", help="Serve the page with the API.")
    ] = None,
    config: Annotated[
        str | None, typer.Option(metavar="CONFIG.yaml", help="The same as the argument.")
    ] = None,
) -> None:
    """Serve models on Ray, with a page and the OpenAI API, until Ctrl-C or SIGTERM.

    Settings are taken from flags first, then from KEY=VALUE, CONFIG.yaml and LLAVA_RAY_* in the
    environment.
    """
    given = read_words([*(words or ()), *([config] if config else ())])
    if config and given.file is None:  # of another ending
        given = read_words(words)._replace(file=config)
    flags = {
        "model": given.name,
        "name": name,
        "engine": engine,
        "dtype": dtype,
        "quantization": quantization,
        "num_gpus": num_gpus,
        "page": page,
    }
    settings = collect_settings(given, flags)
    if "applications" in settings:
        raise ConfigError(
            f"{given.file} is a Serve config file, without fields of ServeConfig at its top: run "
            f"it with `serve run {given.file}`"
        )
    named = [name for name in IN_SHORT if flags[name] is not None]
    named += [name for name in IN_SHORT if any(w.startswith(f"{name}=") for w in given.overrides)]
    if named and settings.get("models"):
        raise ConfigError(
            f"{given.file or 'models='} describes `models`, so {', '.join(named)} would have no "
            "effect: set it there"
        )
    described = build_config(ServeConfig, settings)

    from llava_ray.serve import serve_models

    serve_models(described, host=host, port=port)
