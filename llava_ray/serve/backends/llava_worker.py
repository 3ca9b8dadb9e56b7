"""A model served by LLaVA's own workers, as the gateway sees it.

    Request -> WorkerRequest -> POST /worker_generate_stream -> JSON objects -> Chunk

`WorkerRegistry` chooses the worker.
"""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing

import httpx

from llava_ray.engine.detokenizer import Detokenizer
from llava_ray.errors import EngineError, RequestError, UnreachableError, UnsupportedError
from llava_ray.serve.backends.replicas import Backend, BackendResponse
from llava_ray.serve.llava.protocol import END, OK, AnswerBody, parse
from llava_ray.serve.llava.worker_request import WorkerRequest, build_worker_request
from llava_ray.serve.request_context import RequestContext
from llava_ray.types import Chunk, CompletionRequest, Request, TokenizeRequest, Tokens

MAX_TRIES = 3
SILENCE_S = 120.0
"""A worker that is silent for this long is considered to have lost the request."""

_CONNECT_S = 5.0
_OBJECT_BYTES = 16 << 20


class LlavaWorkerBackend(Backend):
    """A model of one or several registered workers; see `Backend`.

    Its handle is that of the `WorkerRegistry` deployment.
    """

    async def tokenize(self, request: TokenizeRequest) -> Tokens:
        raise self._cannot("tokenize")

    async def detokenize(self, token_ids: Sequence[int]) -> str:
        raise self._cannot("detokenize")

    async def find_context_length(self) -> int | None:
        return None

    async def describe_engine(self) -> dict[str, str]:
        return {}

    def _cannot(self, what: str) -> UnsupportedError:
        return UnsupportedError(
            f"{self.name!r} is served by one of LLaVA's own workers, which cannot {what}: "
            "use /v1/chat/completions",
            param="model",
        )

    async def _start_once(
        self, request: Request | CompletionRequest, context: RequestContext, num_slots: int
    ) -> BackendResponse:
        """Return the response once it has begun; a worker that cannot be reached is removed."""
        if isinstance(request, CompletionRequest):
            raise self._cannot("continue plain text")
        call = build_worker_request(request)
        trouble = "it is no longer registered"
        for _ in range(MAX_TRIES):
            address = await self._handle.choose.remote(self.name)
            if not address:
                break
            reply = WorkerStream(address, call)
            try:
                first = await anext(reply)
            except UnreachableError as error:
                trouble = error.message
                await self._handle.forget.remote(address, trouble)
            else:
                context.note_first_chunk()
                return BackendResponse(
                    self, first, reply, context, num_answers=1, num_slots=num_slots
                )
        raise UnreachableError(f"no worker of {self.name!r} is available: {trouble}; try again")


class WorkerStream:
    """The chunks of one answer from a worker."""

    def __init__(self, address: str, call: WorkerRequest) -> None:
        objects = read_objects(address, call)
        self._chunks = read_chunks(objects, call, address)
        self._closing: asyncio.Future[None] | None = None

    def __aiter__(self) -> AsyncIterator[Chunk]:
        return self

    async def __anext__(self) -> Chunk:
        return await anext(self._chunks)

    def cancel(self) -> None:
        """Disconnect. LLaVA's workers generate the rest of the answer nevertheless."""
        self._closing = asyncio.ensure_future(self._chunks.aclose())


async def read_objects(address: str, call: WorkerRequest) -> AsyncGenerator[AnswerBody]:
    """Yield the JSON objects of a worker's response.

    Raises:
        UnreachableError: the worker cannot be reached, disconnects, or violates the protocol.
        EngineError: the worker reports an error.
    """
    timeout = httpx.Timeout(SILENCE_S, connect=_CONNECT_S)
    url = f"{address}/worker_generate_stream"
    is_tls = not address.startswith("http:")  # loading certificates takes 40 ms
    try:
        async with (
            httpx.AsyncClient(timeout=timeout, trust_env=False, verify=is_tls) as client,
            client.stream("POST", url, json=call.body) as reply,
        ):
            reply.raise_for_status()
            rest = b""
            async for piece in reply.aiter_bytes():
                *objects, rest = (rest + piece).split(END)
                if len(rest) > _OBJECT_BYTES:
                    raise RequestError(f"it sent an object of more than {_OBJECT_BYTES:,} bytes")
                for item in objects:
                    yield _check(parse(AnswerBody, item), address)
            if rest:
                raise RequestError("it disconnected in the middle of an object")
    except (httpx.HTTPError, httpx.InvalidURL, RequestError) as error:
        raise UnreachableError(
            f"LLaVA's worker at {address} did not respond as expected: {str(error) or repr(error)}"
        ) from error


def _check(item: AnswerBody, address: str) -> AnswerBody:
    if item.error_code == OK:
        return item
    raise EngineError(
        f"LLaVA's worker at {address} reports error {item.error_code}, {item.text[:500]!r}: its "
        "log says why"
    )


async def read_chunks(
    objects: AsyncGenerator[AnswerBody], call: WorkerRequest, address: str
) -> AsyncGenerator[Chunk]:
    """Yield the answer as chunks without token counts, which these workers do not report.

    Raises:
        UnreachableError: the worker sent nothing; see also `read_objects`.
    """
    pieces: list[str] = []
    text = Detokenizer(lambda ids: "".join(pieces[i] for i in ids), stop=call.stop)
    said = ""
    is_at_beginning = call.is_chat
    async with aclosing(objects):
        async for item in objects:
            answer = item.text[len(call.body["prompt"]) :]
            if not answer.startswith(said):  # the worker removed a stop text from the end
                yield Chunk("", "stop", 0, 0, 0)
                return
            pieces.append(answer[len(said) :])
            said = answer
            piece = text.push(len(pieces) - 1)
            if is_at_beginning:
                piece = piece.lstrip()
                is_at_beginning = not piece
            yield Chunk(piece, "stop" if text.is_stopped else None, 0, 0, 0)
            if text.is_stopped:
                return
    if not pieces:
        raise UnreachableError(f"LLaVA's worker at {address} sent an empty response")
    yield Chunk(text.flush(), "stop", 0, 0, 0)
