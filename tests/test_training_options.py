"""What saves memory or time in training changes neither gradients nor weights."""

import distributed_worker as worker
import pytest
import torch
from torch._dynamo.utils import counters


# The name that every version from 5.17 on knows.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated")

MODALITIES = ("image", "text")


def gradients(model, batch):
    """The gradient of every parameter, and how many times a mixer ran."""
    runs = 0

    def count(*_):
        nonlocal runs
        runs += 1

    for layer in model.model.layers:
        layer.mixer.register_forward_hook(count)
    torch.manual_seed(1)
    model.train()(**batch).loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}, runs


@pytest.mark.parametrize("modality", MODALITIES)
@pytest.mark.parametrize("variant", worker.VARIANTS)
def test_activation_checkpointing(modality, variant):
    batch = next(worker.batches(modality, 4, epochs=1))
    # Dropout too is the same when it is computed again.
    fields = {**worker.VARIANTS[variant], "hidden_dropout_prob": 0.1, "attention_dropout": 0.1}
    model, checkpointed = (worker.model_for(modality, **fields).double() for _ in range(2))
    expected, runs = gradients(model, batch)
    checkpointed.gradient_checkpointing_enable()
    found, more_runs = gradients(checkpointed, batch)
    assert more_runs == 2 * runs
    # Transformers computes the loss of a text in float32.
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12 if modality == "image" else 1e-7)


@pytest.mark.parametrize("modality", MODALITIES)
def test_compiled_training(modality, tmp_path):
    samples = worker.samples_for(modality, 16)
    found = []
    for compiled in (False, True):
        torch._dynamo.reset()
        counters.clear()
        run = worker.trainer(
            tmp_path,
            worker.model_for(modality, num_hidden_layers=1),
            samples,
            torch_compile=compiled,
            # Everything but the writing of machine code, which takes a minute.
            torch_compile_backend="aot_eager" if compiled else None,
        )
        found.append(worker.train_and_evaluate(run))
        assert bool(counters["stats"]["unique_graphs"]) == compiled
        assert sum(counters["graph_break"].values()) == 0
    expected, found = found
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10 if modality == "image" else 1e-6)
