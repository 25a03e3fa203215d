"""Detects export, during which only operators that exist without this package may be used, and tracing of any kind."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from transformers.utils import logging


logger = logging.get_logger(__name__)

# PyTorch 2.6 does not have it.
_by_torch_export = getattr(torch.compiler, "is_exporting", None)


def is_exporting() -> bool:
    """Whether `torch.export`, `torch.onnx.export` or `torch.jit.trace` follows the forward pass."""
    by_export = _by_torch_export is not None and _by_torch_export()
    return by_export or torch.onnx.is_in_onnx_export() or torch.jit.is_tracing()


def can_look(tensor: Tensor) -> bool:
    """Whether a decision may depend on the values of a tensor.

    Looking at them waits for an accelerator, and a graph that is traced would hold what was decided for one input: plain
    tensors on a CPU alone can afford it.
    """
    traced = torch.compiler.is_compiling() or torch.jit.is_tracing() or isinstance(tensor, FakeTensor)
    return tensor.device.type == "cpu" and not traced and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)


@torch.compiler.assume_constant_result
def say_what_serves() -> bool:
    """Tells once what an exported model consists of. Returns whether it does, as a traced function has to return something."""
    logger.info_once(
        "Translution is exported as plain operations of PyTorch, which every runtime knows; its own operators, which need less "
        "memory, are left out."
    )
    return True


__all__ = ["can_look", "is_exporting", "say_what_serves"]
