"""How large a key-value cache fits beside the weights and the largest step.

On a GPU this is asked, not guessed: the weights are loaded, a step of the largest size is run once,
and what then remains is the cache's. A CPU shares its memory with everything else on the machine,
so its cache has a fixed size unless one is set.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch

from llava_ray.engine.torch_engine.scheduling.scheduler import GRANULE
from llava_ray.errors import ConfigError

CPU_CACHE_TOKENS = 16384
CPU_BATCH_SIZE = 32
MOST_SEQUENCES = 256
"""Largest batch that is chosen: beyond it a step takes long, and each stream slows down."""

_USABLE = 0.9
"""Part of a GPU's memory that is planned for; the rest is for graphs, holes and libraries."""
_TOKENS_EACH = 256
"""Tokens of the cache for each sequence of the batch: fewer would make most of it wait anyway."""
_GIB = 1 << 30


class DeviceMemory(NamedTuple):
    """Bytes of a GPU: all of it, what nobody has taken, and what this process has."""

    total: int
    free: int
    used: int


def can_measure(device: torch.device) -> bool:
    """Return whether a device's memory is its own, so that a step can be measured in it."""
    return device.type == "cuda"


def measure_step(device: torch.device, compute: Callable[[], None]) -> tuple[int, DeviceMemory]:
    """Run a step; return the bytes that it took and gave back, and the memory after it."""
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    compute()
    torch.cuda.synchronize(device)
    step_bytes = torch.cuda.max_memory_allocated(device) - before
    return step_bytes, read_memory(device)


def read_memory(device: torch.device) -> DeviceMemory:
    """Return a GPU's memory, once torch has given back what it only keeps for later."""
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    return DeviceMemory(total, free, torch.cuda.memory_reserved(device))


def choose_cache_tokens(
    memory: DeviceMemory, *, step_bytes: int, token_bytes: int, share: float, most: int
) -> int:
    """Return the size of a cache, in tokens.

    Args:
        memory: with the weights in it, and nothing else of this process.
        step_bytes: of the largest step.
        token_bytes: of one token's keys and values, over all layers.
        share: of the GPU that belongs to this process; below 1 where Ray gave a part of it.
        most: tokens that could be used at once.

    Raises:
        ConfigError: less is left than one step needs.
    """
    mine = _USABLE * share * memory.total - memory.used
    left = min(mine, memory.free - (1 - _USABLE) * share * memory.total) - step_bytes
    num_tokens = min(int(left // token_bytes), most) // GRANULE * GRANULE
    if num_tokens < GRANULE:
        raise ConfigError(
            f"no memory is left for the key-value cache: of the GPU's {_gib(memory.total)} this "
            f"replica may use {_gib(_USABLE * share * memory.total)}, its weights take "
            f"{_gib(memory.used)}, the largest step {_gib(step_bytes)}, and {_gib(memory.free)} "
            "are free. Take a larger GPU, raise num_gpus, or spread the model over several GPUs "
            "with engine=vllm"
        )
    return num_tokens


def check_cache_tokens(memory: DeviceMemory, *, num_tokens: int, token_bytes: int) -> None:
    """Raise a ConfigError if a cache of a size that was set has no room."""
    if num_tokens * token_bytes > memory.free:
        most = memory.free // token_bytes // GRANULE * GRANULE
        raise ConfigError(
            f"cache_tokens={num_tokens} takes {_gib(num_tokens * token_bytes)}, and beside the "
            f"weights {_gib(memory.free)} of the GPU's {_gib(memory.total)} are free: set "
            f"cache_tokens below {most}, or auto"
        )


def choose_batch_size(cache_tokens: int) -> int:
    """Return the largest batch for a cache of this size."""
    return max(1, min(MOST_SEQUENCES, cache_tokens // _TOKENS_EACH))


def _gib(num_bytes: float) -> str:
    return f"{num_bytes / _GIB:.2f} GiB"
