"""Tiles to try of a kernel."""

from __future__ import annotations

from gpu.recording import Launch


MOST = 12
LEAST, LARGEST = 16, 256
WARPS, STAGES = (4, 8), (1, 2, 3, 4)


def candidates(launch: Launch, fewer: bool = False) -> list[dict[str, int]]:
    """Options of a launch, at most `MOST`: those of the kernel's own list, then each of the first's numbers doubled and halved.

    Args:
        launch: whose first option is the one to vary.
        fewer: two of them, for a dry run.
    """
    first = launch.options[0]
    found = list(launch.options[:4])
    for option in launch.options[:2]:
        for name, value in option.items():
            if name == "num_warps":
                values = [warps for warps in WARPS if warps != value]
            elif name == "num_stages":
                values = [stages for stages in STAGES if abs(stages - value) == 1]
            else:
                values = [size for size in (value // 2, value * 2) if _is_size(name, size)]
            for one in values:
                varied = option | {name: one}
                if varied not in found:
                    found.append(varied)
    assert all(option.keys() == first.keys() for option in found)
    return found[: 2 if fewer else MOST]


def _is_size(name: str, size: int) -> bool:
    """Whether a tile may be of this size: heads are few, and a side of a product is at least 16."""
    return 1 <= size <= 8 if name == "HEADS" else LEAST <= size <= LARGEST
