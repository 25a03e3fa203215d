"""Weights in 8 bits, by torchao: those of Linear layers, and the matrices of offsets."""

from __future__ import annotations

import importlib.util
from collections import OrderedDict
from collections.abc import Iterator

import torch
from torch import nn
from transformers import PreTrainedModel, TorchAoConfig
from transformers.quantizers import AutoHfQuantizer

from ..mixers.mixer import Mixer


# Of weights that torchao quantises.
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def quantize_int8(model: PreTrainedModel) -> PreTrainedModel:
    """Stores the weights of a model as int8, with float32 scales; activations and what is computed stay as they are.

    Quantised are the weights of `nn.Linear`, one scale for each output, and the matrices of offsets, `{q,k,v}_bank`
    `[num_offsets, in, out]` and `{q,k,v}_factors` `[n, in, out]` of a basis, one scale for each offset and output. All
    else stays as it is: embeddings, the output head of a language model, norms, biases, coefficients, kernels of
    convolutions.

    Saved by `save_pretrained` and loaded by `from_pretrained`, which needs torchao, the model stays quantised. A bank in
    use is computed anew from its integers: the memory of weights falls, and time does not. A quantised model can be
    neither trained nor resized.

    Args:
        model: of this package, float32, float16 or bfloat16, on any device. It is changed in place.

    Returns:
        The model.

    Raises:
        ImportError: if torchao is missing.
        ValueError: for a model that is quantised already, of another dtype, or without anything to quantise.
    """
    if importlib.util.find_spec("torchao") is None:
        raise ImportError("`quantize_int8` needs torchao, of the extra quantize: pip install '.[quantize]'")
    if getattr(model.config, "quantization_config", None) is not None:
        raise ValueError(
            f"`model` must not be quantised yet, got `quantization_config` {model.config.quantization_config}."
        )
    from torchao.quantization import FqnToConfig, Int8WeightOnlyConfig, PerRow, quantize_

    # A scale for all that is summed over: a Linear has it last, a bank in the middle.
    int8 = {axis: Int8WeightOnlyConfig(granularity=PerRow(axis), set_inductor_config=False) for axis in (-1, 1)}
    names = OrderedDict((name, int8[axis]) for name, axis in _summed_axes(model))
    if not names:
        raise ValueError("`model` must have Linear layers or matrices of offsets, got none.")
    for name in names:
        if (dtype := model.get_parameter(name).dtype) not in DTYPES:
            raise ValueError(f"`model` must have weights of {', '.join(map(str, DTYPES))}, got {dtype} for {name}.")
    each = FqnToConfig(names)
    model.requires_grad_(False)
    quantize_(model, each, filter_fn=None)
    # As if it had been loaded so: by these Transformers knows how to save it.
    model.config.quantization_config = TorchAoConfig(each)
    model.hf_quantizer = AutoHfQuantizer.from_config(model.config.quantization_config, pre_quantized=True)
    model.is_quantized, model.quantization_method = True, model.config.quantization_config.quant_method
    return model


def _summed_axes(model: PreTrainedModel) -> Iterator[tuple[str, int]]:
    """The name of each weight to quantise, and the axis that a product with tokens sums over."""
    head = model.get_output_embeddings()
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        if isinstance(module, nn.Linear) and module is not head:
            yield f"{prefix}weight", -1
        elif isinstance(module, Mixer):
            for name in module.offset_matrices():
                yield f"{prefix}{name}", 1


__all__ = ["quantize_int8"]
