"""An estimate of the hours that a training takes on one H100, from the operations of its model. Nothing is allocated or measured."""

from __future__ import annotations

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from translution import TranslutionConfig, TranslutionForCausalLM, TranslutionForImageClassification
from translution.modeling.operators.registration import namespace


# Operations per second of an H100 SXM with dense matrices in bfloat16, from its data sheet; an H200 has the same, and more memory.
PEAK = 989e12
# Shares of it that are assumed: what well-tuned training of Transformers reaches, and less for Translution's own operators, whose
# kernels have not been timed on a GPU.
SHARE, TRANSLUTION_SHARE = 0.4, 0.1


def operations_per_sample(config: TranslutionConfig) -> tuple[int, int]:
    """Floating-point operations of a forward and a backward pass of one image, or one text of `max_position_embeddings` tokens.

    Returns:
        Those of Translution's own operators, and all others.
    """
    # Fake tensors have no memory; attention is computed by products that the counter knows.
    with FakeTensorMode(), sdpa_kernel(SDPBackend.MATH):
        if config.modality == "image":
            model = TranslutionForImageClassification(config)
            inputs = {"pixel_values": torch.empty(1, config.num_channels, *config.image_height_width)}
        else:
            model = TranslutionForCausalLM(config)
            inputs = {"input_ids": torch.zeros(1, config.max_position_embeddings, dtype=torch.long)}
        with FlopCounterMode(display=False) as counter:
            model(**inputs).logits.sum().backward()
    counts = counter.get_flop_counts()["Global"]
    own = sum(count for operator, count in counts.items() if str(operator).startswith(f"{namespace()}."))
    return own, sum(counts.values()) - own


def estimate_hours(config: TranslutionConfig, samples: float) -> float:
    """Hours on one H100 for that many samples, each seen once.

    Reading data, evaluation, normalisation, the optimizer and the launches of kernels, which matter most for small models, are
    left out.
    """
    own, others = operations_per_sample(config)
    return samples * (own / TRANSLUTION_SHARE + others / SHARE) / PEAK / 3600
