"""A model that one of LLaVA's own workers serves, as the gateway sees it.

Request -> worker_call.Call -> the worker's HTTP -> objects of the protocol -> Chunk
Which worker answers, `Workers` says.
"""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing

import httpx

from llava_ray.engine.detokenizer import Detokenizer
from llava_ray.errors import EngineError, RequestError, UnreachableError, UnsupportedError
from llava_ray.serve.backends.replicas import Answer, Backend
from llava_ray.serve.llava.protocol import END, OK, AnswerBody, parse
from llava_ray.serve.llava.worker_request import Call, build_call
from llava_ray.serve.request_context import Visit
from llava_ray.types import Chunk, CompletionRequest, Request, TokenizeRequest, Tokens

MAX_TRIES = 3
SILENCE_S = 120.0
"""A worker that says nothing for so long has lost the request."""

_CONNECT_S = 5.0
_OBJECT_BYTES = 16 << 20


class WorkerBackend(Backend):
    """A model of one or several registered workers; see `Backend`.

    Its handle is that of the deployment of `Workers`.
    """

    async def tokenize(self, request: TokenizeRequest) -> Tokens:
        raise self._cannot("tokenize")

    async def detokenize(self, token_ids: Sequence[int]) -> str:
        raise self._cannot("detokenize")

    async def find_context_length(self) -> int | None:
        return None

    def _cannot(self, what: str) -> UnsupportedError:
        return UnsupportedError(
            f"{self.name!r} is served by one of LLaVA's own workers, which cannot {what}: "
            "use /v1/chat/completions",
            param="model",
        )

    async def _start_once(self, request: Request | CompletionRequest, visit: Visit) -> Answer:
        """Return the answer once it has begun; a worker that does not begin is forgotten."""
        if isinstance(request, CompletionRequest):
            raise self._cannot("continue plain texts")
        call = build_call(request)
        trouble = "it has left"
        for _ in range(MAX_TRIES):
            address = await self._handle.choose.remote(self.name)
            if not address:
                break
            reply = WorkerReply(address, call)
            try:
                first = await anext(reply)
            except UnreachableError as error:
                trouble = error.message
                await self._handle.forget.remote(address, trouble)
            else:
                visit.note_first()
                return Answer(self, first, reply, visit, num_answers=1)
        raise UnreachableError(f"no worker of {self.name!r} answers: {trouble}; try again")


class WorkerReply:
    """The chunks of one answer, as they come from a worker."""

    def __init__(self, address: str, call: Call) -> None:
        objects = read_objects(address, call)
        self._chunks = read_chunks(objects, call, address)
        self._closing: asyncio.Future[None] | None = None

    def __aiter__(self) -> AsyncIterator[Chunk]:
        return self

    async def __anext__(self) -> Chunk:
        return await anext(self._chunks)

    def cancel(self) -> None:
        """Hang up. LLaVA's workers do not notice before they have finished."""
        self._closing = asyncio.ensure_future(self._chunks.aclose())


async def read_objects(address: str, call: Call) -> AsyncGenerator[AnswerBody]:
    """Yield what a worker answers, object by object.

    Raises:
        UnreachableError: it cannot be reached, breaks off, or does not speak the protocol.
        EngineError: it reports an error.
    """
    timeout = httpx.Timeout(SILENCE_S, connect=_CONNECT_S)
    url = f"{address}/worker_generate_stream"
    is_tls = not address.startswith("http:")  # or no certificates are read, which takes 40 ms
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
                    raise RequestError(f"an object of more than {_OBJECT_BYTES:,} bytes")
                for item in objects:
                    yield _check(parse(AnswerBody, item), address)
            if rest:
                raise RequestError("it broke off within an object")
    except (httpx.HTTPError, httpx.InvalidURL, RequestError) as error:
        raise UnreachableError(
            f"LLaVA's worker at {address} does not answer as it should: {str(error) or repr(error)}"
        ) from error


def _check(item: AnswerBody, address: str) -> AnswerBody:
    if item.error_code == OK:
        return item
    raise EngineError(
        f"LLaVA's worker at {address} reports error {item.error_code}, {item.text[:500]!r}: its "
        "log says why"
    )


async def read_chunks(
    objects: AsyncGenerator[AnswerBody], call: Call, address: str
) -> AsyncGenerator[Chunk]:
    """Yield the answer piece by piece; how many tokens it has, such workers do not tell.

    Raises:
        UnreachableError: the worker said nothing at all; and see `read_objects`.
    """
    pieces: list[str] = []
    text = Detokenizer(lambda ids: "".join(pieces[i] for i in ids), stop=call.stop)
    said = ""
    is_at_beginning = call.is_chat
    async with aclosing(objects):
        async for item in objects:
            answer = item.text[len(call.body["prompt"]) :]
            if not answer.startswith(said):  # the worker has taken a stop text off its end
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
        raise UnreachableError(f"LLaVA's worker at {address} ended before it said anything")
    yield Chunk(text.flush(), "stop", 0, 0, 0)
