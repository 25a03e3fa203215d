"""Where the Triton kernels are tested, in which precision, and a device on which large tiles do not fit."""

import inspect
from functools import lru_cache

import torch
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.errors import OutOfResources


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Triton's tensor cores have no float64; its interpreter has.
EXACT, TOLERANCE = (torch.float32, 1e-4) if DEVICE == "cuda" else (torch.float64, 1e-10)


@lru_cache
def _builtins(package):
    return [(name, member) for name, member in inspect.getmembers(package) if tl.core.is_builtin(member)]


def _replace_builtins(package, builder, scope):
    found = _builtins(package)
    # A function that a kernel calls finds them replaced.
    if found and tl.core.is_builtin(getattr(package, found[0][0])):
        for name, member in found:
            interpreter._patch_attr(package, name, member, builder, scope)


if hasattr(interpreter, "_patch_builtin"):
    # The interpreter looks through all of Triton's language whenever a kernel calls a function: a quarter of the tests' time.
    interpreter._patch_builtin = _replace_builtins


class TightDevice:
    """A kernel on a device that holds tiles of at most `rows`."""

    __name__ = "tight"

    def __init__(self, rows):
        self.rows, self.tried = rows, []

    def __getitem__(self, programs):
        def start(ROWS, **arguments):  # noqa: N803
            self.tried.append(ROWS)
            if self.rows < ROWS:
                raise OutOfResources(ROWS, self.rows, "shared memory")

        return start
