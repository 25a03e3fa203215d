"""Streams of samples without end."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch.utils.data import get_worker_info


def endless(data: Any) -> Iterator[Any]:
    """A stream's epochs one after the other, each shuffled anew.

    A resumed run thus only skips to its position in the stream. A worker without a part, where there are fewer files
    than workers, yields nothing.

    Raises:
        ValueError: if the stream is empty.
    """
    epoch, count = 0, 0
    while True:
        data.set_epoch(epoch)
        for row in data:
            count += 1
            yield row
        if count == 0:
            _require_other_parts(data)
            return
        epoch += 1


def _require_other_parts(data: Any):
    """Checks that a stream that is empty in this worker has rows for another one."""
    worker = get_worker_info()
    if worker is not None:
        # One process looks for all; a single part is always the first one's.
        parts = data.num_shards if worker.id == 0 else 0
        if worker.id > 0 or any(True for index in range(parts) for _ in data.shard(parts, index)):
            return
    raise ValueError("The stream to train on is empty.")
