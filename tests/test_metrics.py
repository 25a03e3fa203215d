"""The metrics against scikit-learn, and against arithmetic of their own, without a network."""

import importlib
import io
import math

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from sklearn.metrics import accuracy_score, top_k_accuracy_score
from torch.nn import functional as F
from transformers import EvalPrediction


@pytest.fixture(scope="module")
def metrics():
    return importlib.import_module("training.metrics")


def macro_f1(labels, guesses):
    """Counted class by class: twice the right guesses of a class by how often it occurs among labels and guesses."""
    pairs, scores = list(zip(labels, guesses, strict=True)), []
    for one in {*labels, *guesses}:
        scores.append(2 * pairs.count((one, one)) / (labels.count(one) + guesses.count(one)))
    return sum(scores) / len(scores)


@pytest.mark.parametrize("classes", [3, 5, 6, 20])
def test_accuracy_is_scikit_learns(metrics, classes):
    logits, labels = torch.randn(50, classes), torch.randint(classes, (50,))
    kept = metrics.likeliest_classes(logits, labels)
    found = metrics.image_metrics(classes)(EvalPrediction(kept.numpy(), labels.numpy()))
    assert found.pop("accuracy") == pytest.approx(accuracy_score(labels, logits.argmax(-1)), abs=1e-12)
    assert found.pop("macro_f1") == pytest.approx(macro_f1(labels.tolist(), logits.argmax(-1).tolist()), abs=1e-12)
    if classes > 5:
        expected = top_k_accuracy_score(labels, logits, k=5, labels=range(classes))
        assert found.pop("top_5_accuracy") == pytest.approx(expected, abs=1e-12)
    assert found == {}


def test_the_last_evaluation_draws_a_confusion_matrix(metrics, tmp_path, monkeypatch):
    names = ["cat", "$a$ $", "dog", "never"]
    labels, guesses = np.array([0, 0, 1, 2, 2, 2]), np.array([0, 1, 1, 2, 0, 2])
    drawn, save = [], Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *rest, **options: (drawn.append(self), save(self, *rest, **options))
    )
    compute = metrics.metrics_with_picture(names, tmp_path / "confusion.png")
    found = compute(EvalPrediction(np.stack((guesses, 3 - guesses), 1), labels))
    assert found == {
        "accuracy": pytest.approx(accuracy_score(labels, guesses), abs=1e-12),
        # 2/4, 2/3 and 4/5; the last class never occurs.
        "macro_f1": pytest.approx((2 / 4 + 2 / 3 + 4 / 5) / 3, abs=1e-12),
    }
    (figure,) = drawn
    counts = [int(cell.get_text()) for cell in figure.axes[0].texts]
    assert counts == [1, 1, 0, 0, 1, 0, 1, 0, 2]
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["cat", r"\$a\$ \$", "dog"]
    with Image.open(tmp_path / "confusion.png") as picture:
        assert picture.format == "PNG"
    assert len(list(tmp_path.iterdir())) == 1


def test_a_confusion_matrix_of_many_classes(metrics):
    """It stays a picture of bearable size."""
    classes = np.arange(300)
    picture = Image.open(io.BytesIO(metrics.confusion_matrix(classes, classes, list(map(str, classes)))))
    assert max(picture.size) <= 5000


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
