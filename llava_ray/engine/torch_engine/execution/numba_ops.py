"""Operations that the engine's Numba kernels for CPUs share.

NumPy has no bfloat16, so kernels get such numbers as uint16: the upper half of a float32's bits.
They read numbers with `widen` and write them with `convert`, so one kernel serves both precisions.
"""

from collections.abc import Callable
from typing import Any

import numba
import numpy as np
import torch
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic, overload

OPTIONS: dict[str, Any] = {"nogil": True, "fastmath": True, "error_model": "numpy"}


_LINE_BYTES = 64  # a cache line


def compile_cached(function: Callable[..., None]) -> Callable[..., None]:
    """Compile a function at its first call, and cache the machine code.

    The cache is beside the function's file, or in the user's cache folder, or, where neither can be
    written, in this process only. Numba compiles again when that file changes, but not when this
    one does: remove the cache then.
    """
    try:
        return numba.njit(cache=True, **OPTIONS)(function)
    except RuntimeError:  # neither this package's folder nor the user's cache can be written
        return numba.njit(**OPTIONS)(function)


@numba.njit(inline="always", **OPTIONS)
def exp(x):  # Numba wants no annotations
    """Return e^x for x up to 88, exact but for the last two bits of a float32.

    It is 2^n times a polynomial with Cephes' coefficients. Unlike the C library's function it is
    vectorised in a loop.
    """
    x = max(x, np.float32(-87))
    n = np.floor(x * np.float32(1.44269504) + np.float32(0.5))
    rest = x - n * np.float32(0.693359375) + n * np.float32(2.12194440e-4)
    sum_ = np.float32(1.9875691500e-4)
    sum_ = sum_ * rest + np.float32(1.3981999507e-3)
    sum_ = sum_ * rest + np.float32(8.3334519073e-3)
    sum_ = sum_ * rest + np.float32(4.1665795894e-2)
    sum_ = sum_ * rest + np.float32(1.6666665459e-1)
    sum_ = sum_ * rest + np.float32(5.0000001201e-1)
    sum_ = sum_ * rest * rest + rest + np.float32(1)
    return sum_ * np.int32((np.int32(n) + np.int32(127)) << np.int32(23)).view(np.float32)


def is_supported(tensor: torch.Tensor) -> bool:
    """Whether kernels can read a tensor: float32 or bfloat16, on a CPU."""
    return tensor.device.type == "cpu" and tensor.dtype in (torch.float32, torch.bfloat16)


def to_numpy(tensor: torch.Tensor) -> np.ndarray:
    """Return a view of a tensor on a CPU; bfloat16 becomes uint16."""
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


def flatten(rows: torch.Tensor) -> tuple[np.ndarray, int]:
    """Return a flat array over the rows of all tokens, and the distance from one to the next.

    Rows that are slices of wider rows are not copied; rows whose own elements are apart are.
    """
    if not rows[:1].is_contiguous():
        rows = rows.contiguous()
    distance, size = rows.stride(0), rows[0].numel()
    return to_numpy(rows.as_strided(((len(rows) - 1) * distance + size,), (1,))), distance


def widen(number: np.generic) -> np.float32:
    """Return a float32, or a bfloat16 given as its bits, as float32."""
    raise NotImplementedError  # compiled code only


def convert(number: np.generic, like: np.ndarray) -> np.generic:
    """Return a float32 as `like` stores it: unchanged, or as the bits of the nearest bfloat16."""
    raise NotImplementedError  # compiled code only


@overload(widen, inline="always")
def _compile_widen(number):  # Numba wants no annotations
    if isinstance(number, types.Integer):
        return lambda number: np.uint32(np.uint32(number) << np.uint32(16)).view(np.float32)
    return lambda number: number


@overload(convert, inline="always")
def _compile_convert(number, like):
    is_rounded = isinstance(like.dtype, types.Integer)
    if is_rounded == isinstance(number, types.Integer):
        return lambda number, like: number
    return _to_bits if is_rounded else lambda number, like: widen(number)


def _to_bits(number, like):
    return np.uint16(np.uint32(round_bits(number) >> np.uint32(16)))


@numba.njit(inline="always", **OPTIONS)
def round_bits(number):
    """Return a float32's bits whose upper half is the nearest bfloat16 (ties to even)."""
    bits = np.float32(number).view(np.uint32)
    is_odd = np.uint32(np.uint32(bits >> np.uint32(16)) & np.uint32(1))
    return np.uint32(bits + np.uint32(np.uint32(0x7FFF) + is_odd))


def _build_prefetch_row(_, rows, index):
    """Generate a loop of prefetch instructions over the row's cache lines."""

    def generate(context, builder, signature, arguments):
        pointer, number = ir.IntType(8).as_pointer(), ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [pointer, number, number, number])
        prefetch = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        array_type, index_type = signature.args
        array = context.make_array(array_type)(context, builder, arguments[0])
        row = context.cast(builder, arguments[1], index_type, types.intp)
        distance = builder.extract_value(array.strides, 0)
        start = builder.gep(builder.bitcast(array.data, pointer), [builder.mul(row, distance)])
        num_bytes = builder.mul(builder.extract_value(array.shape, 1), array.itemsize)
        line = distance.type(_LINE_BYTES)
        num_lines = builder.sdiv(builder.add(num_bytes, distance.type(_LINE_BYTES - 1)), line)
        with cgutils.for_range(builder, num_lines) as loop:
            place = builder.gep(start, [builder.mul(loop.index, line)])
            is_written, nearness, is_data = number(0), number(3), number(1)
            builder.call(prefetch, [place, is_written, nearness, is_data])
        return context.get_dummy_value()

    return types.void(rows, index), generate


prefetch_row: Callable[..., None] = intrinsic(_build_prefetch_row)
"""prefetch_row(rows, index): prefetch a row of a 2-D array; it may lie beyond the array's end."""
