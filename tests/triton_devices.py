"""Where the Triton kernels are tested, in which precision, and a device on which large tiles do not fit."""

import torch
from triton.runtime.errors import OutOfResources


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Triton's tensor cores have no float64; its interpreter has.
EXACT, TOLERANCE = (torch.float32, 1e-4) if DEVICE == "cuda" else (torch.float64, 1e-10)


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
