"""What a model is, as one digest: of all its files, or of the address that is asked."""

import hashlib
from pathlib import Path

from llava_ray.config import EvaluateConfig
from llava_ray.data.files import hash_file


def digest_model(config: EvaluateConfig, model: str) -> str:
    """Return the digest of the model that answers.

    Of a folder the content of every file counts. Of a server only its address and the model's name
    are known: weights that change behind these are not noticed.

    Raises:
        ConfigError: there is no such model.
    """
    if config.endpoint or config.app:
        address = f"{config.endpoint or config.app} {model}"
        return hashlib.sha256(address.encode()).hexdigest()
    if config.engine == "echo":
        return hashlib.sha256(b"echo").hexdigest()
    from llava_ray.model.folder import find_folder

    return digest_folder(find_folder(config.model))


def digest_folder(folder: Path) -> str:
    """Return the SHA-256 of the names and contents of the files in a folder."""
    whole = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        whole.update(f"{path.relative_to(folder).as_posix()} {hash_file(path)}\n".encode())
    return whole.hexdigest()
