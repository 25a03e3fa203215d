"""Memory that parameters and what AdamW keeps of them take, of models that are never allocated.

Mixed precision in bfloat16, as the Trainer and the launch files have it. Activations and temporary memory of products come on top.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.distributed import DistributedConfig
from transformers.initialization import no_tie_weights

from translution import TranslutionConfig, TranslutionForCausalLM, TranslutionForImageClassification


# Bytes of a parameter: itself, its gradient and two moments in float32, and a copy in bfloat16 to compute with.
KEPT, COPY = 16, 2


def unallocated(config: TranslutionConfig) -> PreTrainedModel:
    """A classifier of images or a language model without memory, on the device "meta"."""
    head = TranslutionForImageClassification if config.modality == "image" else TranslutionForCausalLM
    with torch.device("meta"):
        return head(config)


def bytes_alone(model: PreTrainedModel) -> int:
    """On one GPU."""
    return (KEPT + COPY) * sum(parameter.numel() for parameter in model.parameters())


def bytes_tensor_parallel(config: TranslutionConfig, gpus: int) -> int:
    """On each GPU where the heads of a model are shared.

    Raises:
        ValueError: if `gpus` do not divide the heads.
    """
    # In the order of `from_pretrained`, which ties weights last.
    with no_tie_weights():
        model = unallocated(config)
    with _pretended_processes(gpus):
        distributed, _, mesh = model.prepare_distribute_model(DistributedConfig(tp_plan="auto", tp_size=gpus))
        model.maybe_distribute_model(model, distributed, mesh)
        model.tie_weights()
        # Rank 0 has the largest share where one is not a whole number.
        own = [p.to_local() if isinstance(p, DTensor) else p for p in model.parameters()]
        return (KEPT + COPY) * sum(parameter.numel() for parameter in own)


def bytes_fully_sharded(model: PreTrainedModel, gpus: int) -> int:
    """On each GPU with FSDP2: a share of every parameter, and one layer whole, its weights and gradients in bfloat16."""
    # Parameters are divided along their first axis.
    own = sum(-(-len(parameter) // gpus) * parameter[0].numel() for parameter in model.parameters())
    return KEPT * own + _bytes_of_whole_layer(model)


def bytes_zero2(model: PreTrainedModel, gpus: int) -> int:
    """On each GPU with DeepSpeed's ZeRO-2: all weights in bfloat16 to compute with, and a share of all that is in float32."""
    count = sum(parameter.numel() for parameter in model.parameters())
    # As one long vector.
    return COPY * count + KEPT * -(-count // gpus)


def bytes_zero3(model: PreTrainedModel, gpus: int) -> int:
    """On each GPU with DeepSpeed's ZeRO-3: a share of every parameter, its copy in bfloat16 included, and one layer whole, its
    weights and gradients in bfloat16.
    """
    # Of each parameter as a vector.
    own = sum(-(-parameter.numel() // gpus) for parameter in model.parameters())
    return (KEPT + COPY) * own + _bytes_of_whole_layer(model)


def _bytes_of_whole_layer(model: PreTrainedModel) -> int:
    """The weights and gradients in bfloat16 of the largest layer."""
    return 2 * COPY * max(sum(parameter.numel() for parameter in layer.parameters()) for layer in model.model.layers)


@contextmanager
def _pretended_processes(count: int) -> Iterator[None]:
    """This process as the first of several that do not exist: nothing can be sent, and everything can be divided."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=count)
    try:
        yield
    finally:
        dist.destroy_process_group()
