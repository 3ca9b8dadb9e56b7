"""Computes a step of many sequences as two halves side by side, one thread each, on two cores.

Threads that share every operation wait for each other after each, some hundred times a step: when
other processes (Ray's, the gateway) use the same cores, a moment that one thread does not run is
lost to both. Halves of a step meet only at its end.
"""

from llava_ray.engine.runner import Runner
from llava_ray.engine.scheduler import Piece, Plan
from llava_ray.engine.threads import start_single_threaded_executor

NUM_HALVES = 2
MIN_PIECES = 8
"""With fewer sequences, and no two prompts, both threads together read the weights only once."""

_MAX_SHARE = 0.7
_COST_OF_DECODING = 2  # of one token, in tokens of a prompt: it reads all keys and values


class HalvingRunner:
    """Runs large plans as two halves, and others as they are.

    Args:
        runner: computes plans, in several threads at once if they have no sequence in common.
    """

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self._threads = [start_single_threaded_executor(f"half-{i}") for i in range(NUM_HALVES)]

    def run(self, plan: Plan) -> list[int]:
        """Return the next token of each complete piece of the plan, in order."""
        halves = split(plan.pieces)
        if halves is None:
            return self._runner.run(plan)
        if plan.copies:
            self._runner.run(Plan([], plan.copies))
        running = [
            thread.submit(self._runner.run, Plan(half))
            for thread, half in zip(self._threads, halves, strict=True)
        ]
        tokens = {}
        for half, each in zip(halves, running, strict=True):
            complete = Plan(half).complete
            tokens |= zip((piece.sequence for piece in complete), each.result(), strict=True)
        return [tokens[piece.sequence] for piece in plan.complete]

    def check(self) -> None:
        """Compute something small, away from all sequences; raise if that fails."""
        self._runner.check()

    def close(self) -> None:
        """End the threads."""
        for thread in self._threads:
            thread.shutdown()
        self._runner.close()


def split(pieces: list[Piece]) -> tuple[list[Piece], list[Piece]] | None:
    """Return two halves that take about as long, or None where that cannot be or does not pay.

    Neighbours in the cache, which come one after the other, stay together: attention serves them
    in one call.
    """
    prompts = [piece for piece in pieces if piece.num_tokens > 1]
    singles = [piece for piece in pieces if piece.num_tokens == 1]
    if len(pieces) < MIN_PIECES and len(prompts) < NUM_HALVES:
        return None
    halves: tuple[list[Piece], list[Piece]] = ([], [])
    loads = [0, 0]
    for piece in sorted(prompts, key=lambda piece: -piece.num_tokens):
        side = int(loads[1] < loads[0])
        halves[side].append(piece)
        loads[side] += piece.num_tokens
    lead = (loads[1] - loads[0]) / _COST_OF_DECODING
    middle = min(max(round((len(singles) + lead) / 2), 0), len(singles))
    halves[0][:0], halves[1][:0] = singles[:middle], singles[middle:]
    loads[0] += _COST_OF_DECODING * middle
    loads[1] += _COST_OF_DECODING * (len(singles) - middle)
    return halves if max(loads) <= _MAX_SHARE * sum(loads) else None
