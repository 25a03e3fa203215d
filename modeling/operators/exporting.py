"""Detects export, during which only operators that exist without this package may be used."""

from __future__ import annotations

import torch
from transformers.utils import logging


logger = logging.get_logger(__name__)

# PyTorch 2.6 does not have it.
_by_torch_export = getattr(torch.compiler, "is_exporting", None)


def is_exporting() -> bool:
    """Whether `torch.export` or `torch.onnx.export` follows the forward pass."""
    return (_by_torch_export is not None and _by_torch_export()) or torch.onnx.is_in_onnx_export()


@torch.compiler.assume_constant_result
def say_what_serves() -> bool:
    """Tells once what an exported model consists of. Returns whether it does, as a traced function has to return something."""
    logger.info_once(
        "Translution is exported as plain operations of PyTorch, which every runtime knows; its own operators, which need less "
        "memory, are left out."
    )
    return True


__all__ = ["is_exporting", "say_what_serves"]
