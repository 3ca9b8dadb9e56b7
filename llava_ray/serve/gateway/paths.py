"""The paths of the API, as clients spell them: with slashes too many, or without /v1."""

from starlette.types import ASGIApp, Receive, Scope, Send

ROOT_PATHS = (
    *("/healthz", "/readyz", "/health", "/openapi.json"),
    *("/usage", "/tokenize", "/detokenize"),
)
"""Paths of the API that are not below /v1; all others at the root are the page's."""

WITHOUT_V1 = (
    *("/chat/completions", "/completions", "/models", "/models/{name:path}"),
    *("/embeddings", "/responses", "/messages", "/files", "/batches", "/moderations"),
)
"""Paths that clients call whose base URL lacks /v1."""


class PathMiddleware:
    """Takes slashes away that mean nothing: `/v1//models/` is `/v1/models`.

    Only paths of the API are changed; the page, and LLaVA's protocol, have paths of their own.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            prefix = scope.get("root_path", "")
            path = scope["path"].removeprefix(prefix)
            cleaned = clean_path(path)
            if cleaned != path:
                scope = {**scope, "path": prefix + cleaned}
        await self._app(scope, receive, send)


def clean_path(path: str) -> str:
    """Return a path of the API in its usual spelling; any other path unchanged."""
    cleaned = "/" + "/".join(piece for piece in path.split("/") if piece)
    if cleaned == "/v1":
        return "/v1/"
    is_ours = cleaned.startswith("/v1/") or cleaned in (*ROOT_PATHS, *WITHOUT_V1)
    return cleaned if is_ours else path
