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
                if varied not in found and _fits_together(varied):
                    found.append(varied)
    assert all(option.keys() == first.keys() for option in found)
    return found[: 2 if fewer else MOST]


# Of kernels with a basis: they follow from how many factors there are and how wide a grid is.
FIXED = ("QUERY_FACTORS", "KEY_FACTORS", "VALUE_FACTORS", "PARTS", "COLUMNS")


def _is_size(name: str, size: int) -> bool:
    """Whether a tile may be of this size: heads are few, tokens that are not multiplied too, and a side of a product is at least 16."""
    if name in FIXED:
        return False
    return 1 <= size <= 32 if name in ("HEADS", "TOKENS") else LEAST <= size <= LARGEST


def _fits_together(option: dict[str, int]) -> bool:
    """Whether a tile's queries are whole rows of `COLUMNS`, and its keys no more than one."""
    columns = option.get("COLUMNS")
    return columns is None or option["KEYS"] <= columns <= option["QUERIES"]
