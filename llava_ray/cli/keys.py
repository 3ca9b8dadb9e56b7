"""`llava-ray keys new`: API keys for a server."""

import secrets
from typing import Annotated

import typer
from pydantic import ValidationError

from llava_ray.cli.console import notes, out
from llava_ray.config import KeyConfig, hash_key
from llava_ray.errors import ConfigError

app = typer.Typer(help="API keys for a server.")


@app.callback()
def _root() -> None: ...


@app.command()
def new(
    name: Annotated[
        str,
        typer.Argument(metavar="NAME", help="Whose key it is: letters, digits, and any of _ . -"),
    ],
) -> None:
    """Make an API key: its line for the key file on standard output, the key on standard error.

    The server stores only the hash, so the key is shown just this once:

    llava-ray keys new alice >> keys.yaml
    """
    key = f"lr-{secrets.token_urlsafe(32)}"
    try:
        entry = KeyConfig(name=name, sha256=hash_key(key))
    except ValidationError as error:
        raise ConfigError(
            f"{name!r} cannot name a key: use up to 64 letters, digits, and any of _ . -"
        ) from error
    notes.print(f"the key of {name}, to be sent as 'Authorization: Bearer ...':", markup=False)
    notes.print(key, markup=False)
    out.print(f'- {{name: "{entry.name}", sha256: "{entry.sha256}"}}', markup=False)
