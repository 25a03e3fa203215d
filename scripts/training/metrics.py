"""Accuracy, top-k accuracy, macro F1, confusion matrices and perplexity for the `Trainer`.

Legend: `N` samples, `L` tokens, `V` classes or vocabulary.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from accelerate import PartialState
from common.saved_files import write_whole
from sklearn.metrics import ConfusionMatrixDisplay, f1_score
from torch import Tensor
from torch.nn import functional as F
from transformers import EvalPrediction


IGNORED = -100
TOP_K = 5
# The most classes whose confusion matrix has room for counts, and for names.
COUNTED, NAMED = 30, 100


def likeliest_classes(logits: Tensor | tuple[Tensor, ...], labels: Tensor) -> Tensor:
    """What the `Trainer` keeps of `[N, V]` logits: the likeliest classes `[N, at most 5]`, best first."""
    logits = logits[0] if isinstance(logits, tuple) else logits
    return logits.topk(min(TOP_K, logits.shape[-1])).indices


def image_metrics(num_labels: int) -> Callable[[EvalPrediction], dict[str, float]]:
    """Accuracy, macro F1, which is the mean F1 of all classes that occur, and top-5 accuracy where there are more than 5
    classes, of `likeliest_classes`.
    """

    def compute(prediction: EvalPrediction) -> dict[str, float]:
        likeliest, labels = np.asarray(prediction.predictions), np.asarray(prediction.label_ids)
        found = likeliest == labels[:, None]
        metrics = {
            "accuracy": float(found[:, 0].mean()),
            "macro_f1": float(f1_score(labels, likeliest[:, 0], average="macro")),
        }
        if num_labels > TOP_K:
            metrics[f"top_{TOP_K}_accuracy"] = float(found.any(axis=1).mean())
        return metrics

    return compute


def metrics_with_picture(names: Sequence[str], picture: Path) -> Callable[[EvalPrediction], dict[str, float]]:
    """`image_metrics`, which also draws the confusion matrix.

    Args:
        names: of the classes.
        picture: PNG file to write the confusion matrix to, by one process.
    """
    metrics = image_metrics(len(names))

    def compute(prediction: EvalPrediction) -> dict[str, float]:
        if PartialState().is_main_process:
            labels, likeliest = np.asarray(prediction.label_ids), np.asarray(prediction.predictions)[:, 0]
            write_whole(picture, confusion_matrix(labels, likeliest, names))
        return metrics(prediction)

    return compute


def confusion_matrix(labels: np.ndarray, likeliest: np.ndarray, names: Sequence[str]) -> bytes:
    """A PNG of the confusion matrix of all classes that occur, from true and predicted class indices `[N]`."""
    # Imported here: only the last evaluation draws.
    from matplotlib.figure import Figure

    classes = np.union1d(labels, likeliest)
    side = 3 + 0.4 * min(len(classes), NAMED)
    figure, file = Figure((side + 1, side), layout="constrained"), io.BytesIO()
    axes = figure.subplots()
    ConfusionMatrixDisplay.from_predictions(
        labels,
        likeliest,
        labels=classes,
        # Between dollars Matplotlib reads formulas.
        display_labels=[names[index].replace("$", r"\$") for index in classes],
        include_values=len(classes) <= COUNTED,
        xticks_rotation="vertical",
        ax=axes,
    )
    if len(classes) > NAMED:
        axes.set(xticks=[], yticks=[])
    figure.savefig(file, format="png")
    return file.getvalue()


def token_losses(logits: Tensor | tuple[Tensor, ...], labels: Tensor) -> Tensor:
    """What the `Trainer` keeps of `[N, L, V]` logits: for each block the sum of losses and of right guesses, `[N, 2]`."""
    logits = logits[0] if isinstance(logits, tuple) else logits
    logits, labels = logits[:, :-1], labels[:, 1:]
    losses = F.cross_entropy(logits.transpose(1, 2).float(), labels, ignore_index=IGNORED, reduction="none")
    right = logits.argmax(dim=-1) == labels
    return (losses.double().sum(dim=1, keepdim=True), right.double().sum(dim=1, keepdim=True))


def perplexity(loss: float, tokens: int) -> float:
    """Exponential of the mean loss of a token; `loss` is their sum."""
    mean = loss / tokens if tokens else math.nan
    # Beyond this a float is infinite, and `math.exp` raises.
    return math.inf if mean > 709 else math.exp(mean)


def text_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """Perplexity, and the share of tokens that are predicted right, of `token_losses`."""
    losses, right = (part[:, 0] for part in prediction.predictions)
    tokens = int((prediction.label_ids[:, 1:] != IGNORED).sum())
    accuracy = float(right.sum() / tokens) if tokens else math.nan
    return {"perplexity": perplexity(math.fsum(losses), tokens), "accuracy": accuracy}
