"""Stands in for SGLang's package of compiled kernels where there is no CUDA.

Every name can be imported; calling one raises. With attention in plain torch, SGLang calls none.
"""

__version__ = "0.0.0+absent"


def __getattr__(name: str):
    if name.startswith("__"):
        raise AttributeError(name)

    def absent(*args, **kwargs):
        raise NotImplementedError(f"sgl_kernel.{name} needs CUDA")

    absent.__name__ = name
    return absent
