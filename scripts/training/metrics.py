"""Accuracy, top-k accuracy and perplexity as metrics of `evaluate` that need no network.

`evaluate.load` fetches a script from the Hub; these are subclasses of the same `evaluate.Metric` and work with `add_batch` and
`evaluate.combine` alike. Legend: `N` samples, `L` tokens, `V` classes or vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import datasets
import evaluate
import numpy as np
from torch import Tensor
from torch.nn import functional as F
from transformers import EvalPrediction


IGNORED = -100
TOP_K = 5


class Accuracy(evaluate.Metric):
    """Share of `predictions` (class indices) that are the `references`."""

    def _info(self) -> evaluate.MetricInfo:
        return _info("Share of predictions that are right.", datasets.Value("int64"), datasets.Value("int64"))

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        return {"accuracy": float(np.mean(np.asarray(predictions) == np.asarray(references)))}


class TopKAccuracy(evaluate.Metric):
    """Share of `references` (class indices) that are among the `predictions`, the k likeliest classes of each sample."""

    def _info(self) -> evaluate.MetricInfo:
        several = datasets.Sequence(datasets.Value("int64"))
        return _info("Share of classes among the k likeliest.", several, datasets.Value("int64"))

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        likeliest = np.asarray(predictions)
        found = (likeliest == np.asarray(references)[:, None]).any(axis=1)
        return {f"top_{likeliest.shape[1]}_accuracy": float(np.mean(found))}


class Perplexity(evaluate.Metric):
    """Exponential of the mean loss of a token: `predictions` are sums of losses, `references` the numbers of tokens."""

    def _info(self) -> evaluate.MetricInfo:
        return _info("Exponential of a token's mean loss.", datasets.Value("float64"), datasets.Value("int64"))

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        tokens = sum(references)
        mean = math.fsum(predictions) / tokens if tokens else math.nan
        # Beyond this a float is infinite, and `math.exp` raises.
        return {"perplexity": math.inf if mean > 709 else math.exp(mean)}


def _info(description: str, predictions: Any, references: Any) -> evaluate.MetricInfo:
    features = datasets.Features({"predictions": predictions, "references": references})
    return evaluate.MetricInfo(description=description, citation="", features=features)


def likeliest_classes(logits: Tensor | tuple[Tensor, ...], labels: Tensor) -> Tensor:
    """What the `Trainer` keeps of `[N, V]` logits: the likeliest classes `[N, at most 5]`, best first."""
    logits = logits[0] if isinstance(logits, tuple) else logits
    return logits.topk(min(TOP_K, logits.shape[-1])).indices


def image_metrics(num_labels: int) -> Callable[[EvalPrediction], dict[str, float]]:
    """Accuracy, and top-5 accuracy where there are more than 5 classes, of `likeliest_classes`."""
    # In memory: every process computes the same, and would write to the same file.
    accuracy, top_k = Accuracy(keep_in_memory=True), TopKAccuracy(keep_in_memory=True)

    def compute(prediction: EvalPrediction) -> dict[str, float]:
        classes, labels = prediction.predictions, prediction.label_ids
        metrics = accuracy.compute(predictions=classes[:, 0], references=labels)
        if num_labels > TOP_K:
            metrics |= top_k.compute(predictions=classes, references=labels)
        return metrics

    return compute


def token_losses(logits: Tensor | tuple[Tensor, ...], labels: Tensor) -> Tensor:
    """What the `Trainer` keeps of `[N, L, V]` logits: for each block the sum of losses and of right guesses, `[N, 2]`."""
    logits = logits[0] if isinstance(logits, tuple) else logits
    logits, labels = logits[:, :-1], labels[:, 1:]
    losses = F.cross_entropy(logits.transpose(1, 2).float(), labels, ignore_index=IGNORED, reduction="none")
    right = logits.argmax(dim=-1) == labels
    return (losses.double().sum(dim=1, keepdim=True), right.double().sum(dim=1, keepdim=True))


def text_metrics() -> Callable[[EvalPrediction], dict[str, float]]:
    """Perplexity, and the share of tokens that are guessed, of `token_losses`."""
    perplexity = Perplexity(keep_in_memory=True)

    def compute(prediction: EvalPrediction) -> dict[str, float]:
        losses, right = (part[:, 0] for part in prediction.predictions)
        tokens = (prediction.label_ids[:, 1:] != IGNORED).sum(axis=1)
        metrics = perplexity.compute(predictions=losses, references=tokens)
        return metrics | {"accuracy": float(right.sum() / tokens.sum()) if tokens.sum() else math.nan}

    return compute
