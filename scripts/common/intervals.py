"""What results with different seeds say of all seeds: Student's 95 % interval of their mean."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from scipy import stats


CONFIDENCE = 0.95


def student_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """Both ends of the interval; None for fewer than two results, which say nothing of their spread."""
    if len(values) < 2:
        return None
    mean, std = statistics.fmean(values), statistics.stdev(values)
    reach = float(stats.t.ppf((1 + CONFIDENCE) / 2, len(values) - 1)) * std / math.sqrt(len(values))
    return mean - reach, mean + reach


def interval_words(interval: Sequence[float] | None, form: str, unit: str = "") -> str:
    """An interval in a table, each end in a format such as `".4g"`; a dash if there is none."""
    if interval is None:
        return "–"
    low, high = interval
    return f"{low:{form}} … {high:{form}}{unit}"
