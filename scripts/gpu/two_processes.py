"""One of two processes that train a small model together; prints how far their losses are from those of one process.

torchrun --nproc_per_node 2 scripts/gpu/two_processes.py DDP|FSDP2 gloo|nccl cuda|cpu
"""

from __future__ import annotations

import sys

import torch
from torch import distributed, nn

from translution import TranslutionConfig, TranslutionForImageClassification
from translution.modeling.operators.dispatch import TRITON


STEPS, BATCH = 3, 8


def make_model(device: str) -> nn.Module:
    torch.manual_seed(0)
    fields = {
        "hidden_size": 32,
        "num_attention_heads": 2,
        "head_dim": 16,
        "num_hidden_layers": 1,
        "intermediate_size": 32,
    }
    config = TranslutionConfig(**fields, image_size=32, patch_size=16, num_labels=4, relative_projections="kv")
    model = TranslutionForImageClassification(config).to(device)
    model.set_attn_implementation(TRITON)
    return model


def losses(model: nn.Module, part: slice, device: str) -> list[torch.Tensor]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    generator = torch.Generator().manual_seed(1)
    found = []
    for _ in range(STEPS):
        pixels = torch.randn(BATCH, 3, 32, 32, generator=generator)[part].to(device)
        labels = torch.randint(4, (BATCH,), generator=generator)[part].to(device)
        loss = model(pixel_values=pixels, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.detach())
    return found


def main(way: str, backend: str, device: str) -> None:
    distributed.init_process_group(backend)
    rank, model = distributed.get_rank(), make_model(device)
    if way == "DDP":
        model = nn.parallel.DistributedDataParallel(model)
    else:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        fully_shard(model, mesh=init_device_mesh(device, (2,)))
    half = BATCH // 2
    mean = torch.stack(losses(model, slice(rank * half, (rank + 1) * half), device))
    distributed.all_reduce(mean)
    alone = torch.stack(losses(make_model(device), slice(None), device))
    if rank == 0:
        print("error", ((mean / 2 - alone).abs() / alone).max().item(), flush=True)
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
