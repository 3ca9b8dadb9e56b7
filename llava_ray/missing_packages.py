"""Which extra installs a package that is missing; the command line and the lazy imports ask here.

The plain install holds only the client, the configuration and the command line.
"""

from llava_ray.errors import MissingPackageError

PACKAGES = {
    "engine": (
        "accelerate",
        "huggingface_hub",
        "jinja2",
        "llguidance",
        "llvmlite",
        "numba",
        "safetensors",
        "sentencepiece",
        "tokenizers",
        "torch",
        "transformers",
    ),
    "serve": ("fastapi", "gradio", "ray", "starlette"),
    "data": ("pyarrow",),
    "train": ("deepspeed", "peft"),
}
"""Each extra, and the packages that it adds."""


def explain_missing(
    error: ModuleNotFoundError, extra: str | None = None
) -> MissingPackageError | None:
    """Return an error that says what to install, or None if no extra holds what is missing.

    Args:
        extra: the extra that holds all that the caller's task needs, where the caller knows it.
    """
    missing = (error.name or "").partition(".")[0]
    found = next((name for name, packages in PACKAGES.items() if missing in packages), None)
    if found is None:
        return None
    return MissingPackageError(
        f"this needs the package {missing!r}, which is not installed: "
        f"pip install 'llava-ray[{extra or found}]'"
    )
