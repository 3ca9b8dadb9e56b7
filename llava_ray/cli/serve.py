"""`llava-ray serve`: the application on Ray, until Ctrl-C or SIGTERM."""

import signal
from pathlib import Path
from typing import Annotated, Any

import typer

from llava_ray.cli.console import explain_settings, notes
from llava_ray.config import DtypeName, EngineName, QuantizationName, ServeConfig
from llava_ray.errors import ConfigError


def serve(
    model: Annotated[
        str | None,
        typer.Argument(help="Folder or hub name of the weights; by default the embedded model."),
    ] = None,
    engine: Annotated[EngineName | None, typer.Option(help="What computes.")] = None,
    dtype: Annotated[DtypeName | None, typer.Option(help="Precision of the weights.")] = None,
    quantization: Annotated[
        QuantizationName | None, typer.Option(help="int8: computed in 8 bits, on CPUs.")
    ] = None,
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
    """Serve models on Ray, with the page and the OpenAI API, until Ctrl-C or SIGTERM.

    What is not given here comes from --config, then from LLAVA_RAY_* in the environment.
    """
    given = {
        "model": model,
        "engine": engine,
        "dtype": dtype,
        "quantization": quantization,
        "page": page,
    }
    settings = _read_settings(config) | {k: v for k, v in given.items() if v is not None}
    in_short = [name for name in ("model", "engine", "dtype", "quantization") if given[name]]
    if in_short and settings.get("models"):
        raise ConfigError(
            f"{config} describes `models`: {', '.join(in_short)} would be passed over; set it there"
        )
    try:
        described = ServeConfig(**settings)
    except ValueError as error:
        raise ConfigError(explain_settings(error)) from error

    from ray import serve as ray_serve

    from llava_ray.app import build_app

    application = build_app(described)
    ray_serve.start(http_options={"host": host, "port": port})
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # Ray's own, of `start`, aborts
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
