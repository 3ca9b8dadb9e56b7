"""What the engine's own kernels for CPUs share; Numba compiles them."""

from collections.abc import Callable
from typing import Any

import numba
import numpy as np

OPTIONS: dict[str, Any] = {"nogil": True, "fastmath": True, "error_model": "numpy"}


def compile_kept(function: Callable[..., None]) -> Callable[..., None]:
    """Compile a function when it is first called, and keep what came out.

    It is kept beside the function's file, else in the user's cache, else for this process alone,
    and compiled again when that file changes. When `exp` does, remove what is kept.
    """
    try:
        return numba.njit(cache=True, **OPTIONS)(function)
    except RuntimeError:  # neither this package's folder nor the user's cache can be written
        return numba.njit(**OPTIONS)(function)


@numba.njit(inline="always", **OPTIONS)
def exp(x):  # Numba wants no annotations
    """e^x up to e^88, to float32's last two bits: 2^n times a polynomial, Cephes' coefficients.

    Unlike the C library's, a loop of it becomes vector instructions.
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
