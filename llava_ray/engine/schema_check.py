"""Whether a JSON schema becomes a grammar within bounds: a program, and the call that runs it.

`structured_output.GrammarCompiler` asks before it compiles. Compiling some short
schemas takes hours or all memory (`multipleOf: 1000003`, or a dozen patterns that must hold at
once), and llguidance cannot be interrupted. A process can: it compiles the schema for the 256
bytes, which takes as long as for a model's tokens, and is killed when it exceeds its bounds.
"""

import asyncio
import json
import os
import resource
import sys
from pathlib import Path
from subprocess import PIPE

from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper

MAX_CPU_S = 2
MAX_MEMORY_BYTES = 512 << 20
MAX_WAIT_S = 30.0
"""Bounds of the check of one schema; the wait is for a machine that has no core to spare."""

TOO_COMPLEX = (
    f"compiling it takes more than {MAX_CPU_S} s: leave out large multipleOf, long repetitions, "
    "and patterns that must hold at once"
)


def make_grammar(schema: str) -> str:
    """Return llguidance's grammar of a JSON schema.

    Raises:
        ValueError: the schema is not a JSON object.
    """
    # At most one space between JSON tokens: weak models would go on for ever.
    return LLMatcher.grammar_from_json_schema(schema, overrides={"whitespace_pattern": " "})


async def find_problem(schema: str) -> str:
    """Return why a schema cannot be enforced, as a process of its own finds out; "" if it can.

    Raises:
        RuntimeError: the process did not start as it should.
    """
    process = await asyncio.create_subprocess_exec(
        # -P: the modules beside this file are none that the program may import by their bare names.
        *(sys.executable, "-P", str(Path(__file__).resolve())),
        stdin=PIPE,
        stdout=PIPE,
        stderr=PIPE,
    )
    try:
        async with asyncio.timeout(MAX_WAIT_S):
            output, errors = await process.communicate(schema.encode("utf-8", "surrogatepass"))
    except TimeoutError:
        return TOO_COMPLEX
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode is not None
    if process.returncode < 0:  # ended by a signal: it exceeded a bound
        return TOO_COMPLEX
    if process.returncode:
        raise RuntimeError(f"the check of a JSON schema failed: {errors.decode()[-500:]}")
    return json.loads(output)


def main() -> None:
    """Read a schema from standard input; write its problem as JSON text."""
    os.nice(10)
    resource.setrlimit(resource.RLIMIT_CPU, (MAX_CPU_S, MAX_CPU_S))
    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))
    schema = sys.stdin.buffer.read().decode("utf-8", "surrogatepass")
    try:
        tokenizer = LLTokenizer(TokenizerWrapper(_Bytes()))
        matcher = LLMatcher(tokenizer, make_grammar(schema), log_level=0)
        if not matcher.is_error():
            matcher.compute_bitmask()
        problem = matcher.get_error()
    except ValueError as error:
        problem = str(error)
    except MemoryError:
        problem = TOO_COMPLEX
    json.dump(problem, sys.stdout)


class _Bytes:
    """A tokenizer with one token for each byte, in the form that llguidance wraps."""

    eos_token_id = 256
    bos_token_id = None
    tokens = (*(bytes([byte]) for byte in range(256)), b"</s>")
    special_token_ids = (eos_token_id,)

    def __call__(self, text: str | bytes) -> list[int]:
        return list(text.encode() if isinstance(text, str) else text)


if __name__ == "__main__":
    main()
