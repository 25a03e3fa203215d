"""The metrics against scikit-learn, and against arithmetic of their own, without a network."""

import importlib
import math

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, top_k_accuracy_score
from torch.nn import functional as F
from transformers import EvalPrediction


@pytest.fixture(scope="module")
def metrics():
    return importlib.import_module("training.metrics")


@pytest.mark.parametrize("classes", [3, 5, 6, 20])
def test_accuracy_is_scikit_learns(metrics, classes):
    logits, labels = torch.randn(50, classes), torch.randint(classes, (50,))
    kept = metrics.likeliest_classes(logits, labels)
    found = metrics.image_metrics(classes)(EvalPrediction(kept.numpy(), labels.numpy()))
    assert found.pop("accuracy") == pytest.approx(accuracy_score(labels, logits.argmax(-1)), abs=1e-12)
    if classes > 5:
        expected = top_k_accuracy_score(labels, logits, k=5, labels=range(classes))
        assert found.pop("top_5_accuracy") == pytest.approx(expected, abs=1e-12)
    assert found == {}


def test_perplexity_counts_every_token_once(metrics):
    logits = torch.randn(4, 7, 11)
    labels = torch.randint(11, (4, 7))
    labels[2, 3:] = -100
    labels[3, 1:] = -100
    kept = metrics.token_losses((logits, "cache"), labels)
    found = metrics.text_metrics(EvalPrediction(tuple(part.numpy() for part in kept), labels.numpy()))
    predicted, wanted = logits[:, :-1].reshape(-1, 11), labels[:, 1:].reshape(-1)
    losses = [
        F.cross_entropy(row[None].double(), label[None])
        for row, label in zip(predicted, wanted, strict=True)
        if label >= 0
    ]
    assert found["perplexity"] == pytest.approx(math.exp(sum(losses).item() / len(losses)), rel=1e-6)
    right = sum(int(row.argmax() == label) for row, label in zip(predicted, wanted, strict=True) if label >= 0)
    assert found["accuracy"] == pytest.approx(right / len(losses))


def test_perplexity_of_nothing_and_of_too_much(metrics):
    assert math.isnan(metrics.perplexity(0.0, 0))
    assert metrics.perplexity(1e6, 1) == np.inf
