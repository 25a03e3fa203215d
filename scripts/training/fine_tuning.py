"""Which parameters of a trained model are trained further, and how fast those of each layer are."""

from __future__ import annotations

import re
from collections.abc import Iterable

from common.command import require
from torch import Tensor
from torch.optim import Optimizer
from transformers import PreTrainedModel

from training.arguments import ModelArguments
from translution.modeling.models.trunks import layers_of


def parameter_depths(model: PreTrainedModel) -> tuple[dict[int, int], int]:
    """How deep in a model each parameter is, by its id, and the number of layers.

    The embedding has depth 0, layers count from 1, and what comes after the last layer, the final norm and the head, is one
    deeper. A head that is tied to the embedding is the embedding.
    """
    base = model.base_model
    trunk = base if base.trunk is None else base.trunk
    layers = base.layers if base.trunk is None else layers_of(trunk)
    count = len(layers)
    of_layers = {id(parameter): depth for depth, layer in enumerate(layers, 1) for parameter in layer.parameters()}
    depths, outside = dict(of_layers), 0
    for parameter in trunk.parameters():
        if id(parameter) in of_layers:
            # A trunk has its modules in the order in which it runs them.
            outside = count + 1
        else:
            depths[id(parameter)] = outside
    for parameter in model.parameters():
        depths.setdefault(id(parameter), count + 1)
    return depths, count


def freeze(model: PreTrainedModel, args: ModelArguments, fresh: Iterable[str]) -> None:
    """Sets `requires_grad` of all parameters to what `freeze`, `freeze_layers` and `freeze_pattern` say together.

    Args:
        model: all of whose parameters are trained.
        args: the options. A parameter is frozen where one of them freezes it.
        fresh: names of parameters without trained weights, such as those of a new head. They would stay random, so that only
            a pattern freezes them.

    Raises:
        ValueError: if the model has fewer layers than are to be frozen or nothing that depends on the offset, if the pattern
            matches no parameter or all of them, or if no parameter would be trained.
    """
    if args.freeze is not None:
        model.freeze_all_but_offsets()
    if args.freeze_layers is not None:
        depths, count = parameter_depths(model)
        require(args, "freeze_layers", lambda layers: 0 <= layers <= count, f"an integer from 0 to {count}")
        for parameter in model.parameters():
            if depths[id(parameter)] <= args.freeze_layers:
                parameter.requires_grad_(False)
    for name in fresh:
        model.get_parameter(name).requires_grad_(True)
    if args.freeze_pattern is not None:
        # Tied parameters have several names.
        named = dict(model.named_parameters(remove_duplicate=False))
        matched = [name for name in named if re.search(args.freeze_pattern, name)]
        if not matched:
            raise ValueError(
                f"`freeze_pattern` must match names of parameters, such as {next(iter(named))!r}, and "
                f"{args.freeze_pattern!r} matches none."
            )
        for name in matched:
            named[name].requires_grad_(False)
        if len({id(named[name]) for name in matched}) == len(set(map(id, named.values()))):
            raise ValueError(
                f"`freeze_pattern` must leave parameters to train, and {args.freeze_pattern!r} matches all of them."
            )
    if not any(parameter.requires_grad for parameter in model.parameters()):
        told = ", ".join(f"`{name}` {getattr(args, name)!r}" for name in args.freezing())
        raise ValueError(f"At least one parameter must be trained, and together {told} freeze all.")


def decay_learning_rates(optimizer: Optimizer, model: PreTrainedModel, factor: float) -> None:
    """Splits the groups of an optimizer by depth: one step towards the embedding multiplies the learning rate by a factor.

    What comes after the last layer keeps the rate, and is first, so that its rate is the one that is logged. All else that a
    group has, such as its weight decay, stays the same for each part.

    Args:
        optimizer: without state, and without a scheduler.
        model: whose parameters it trains.
        factor: more than 0 and at most 1.

    Raises:
        ValueError: if the optimizer has other tensors than the model, as with the first version of FSDP.
    """
    depths, count = parameter_depths(model)
    groups = list(optimizer.param_groups)
    trained: list[Tensor] = [parameter for group in groups for parameter in group["params"]]
    if any(id(parameter) not in depths for parameter in trained):
        raise ValueError(
            "`layer_lr_decay` needs the parameters of the model, and the optimizer has others: FSDP's first version "
            "flattens them, its second does not."
        )
    optimizer.param_groups.clear()
    for depth in range(count + 1, -1, -1):
        for group in groups:
            part = [parameter for parameter in group["params"] if depths[id(parameter)] == depth]
            if part:
                rate = group["lr"] * factor ** (count + 1 - depth)
                optimizer.add_param_group({**group, "params": part, "lr": rate})
