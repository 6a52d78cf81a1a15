"""Processes of `torch.distributed` that train one model together, as `DistributedDataParallel`."""

from __future__ import annotations

import keras

from masked_layers.inspection import refs_with_masks


def broadcast_state(model: keras.Model, source: int = 0) -> int:
    """Copies all variables of a model from one process of `torch.distributed` to all others.

    `torch.nn.parallel.DistributedDataParallel` averages gradients and nothing else: Keras registers
    masks and moving statistics as parameters without a gradient, and the wrapper copies these only
    when it is created. Whatever a process changes afterwards stays in that process. Call this on
    all processes, after everything that changes masks or weights outside of the optimizer:
    `update_masks`, `rewind`, `treat`, `set_masks`, and `advance` of a schedule. The values that the
    source decided on are then the same everywhere.

    Variables of a Keras optimizer with which the model is compiled are copied as well. Those of a
    `torch.optim.Optimizer` are not.

    Args:
        model: The Keras model, not its wrapper. All processes must have called the same functions
            before, so that all have the same variables.
        source: Rank of the process whose values are kept.

    Returns:
        The number of elements of binary masks that were different in this process. 0 on the
        source, and everywhere if all processes had decided alike.

    Raises:
        ValueError: If the backend is not torch, no process group was initialized, or the processes
            have different variables. In that case nothing is changed.
    """
    if keras.backend.backend() != "torch":
        raise ValueError(
            "`broadcast_state` is for processes of `torch.distributed`. On "
            f"{keras.backend.backend()}, variables are distributed by the backend itself."
        )
    import torch
    from torch import distributed

    if not (distributed.is_available() and distributed.is_initialized()):
        raise ValueError(
            "`broadcast_state` needs processes that know each other. Call "
            "`torch.distributed.init_process_group(...)` first."
        )
    variables = {id(variable): variable for variable in model.variables}
    if isinstance(optimizer := getattr(model, "optimizer", None), keras.Optimizer):
        variables |= {id(variable): variable for variable in optimizer.variables}
    _check_alike([[*v.shape, v.dtype] for v in variables.values()])
    masks = [ref.mask for ref in refs_with_masks(model) if not ref.mask.learned]
    before = [mask.to_numpy() for mask in masks]
    with torch.no_grad():
        for variable in variables.values():
            # Made contiguous, because a collective operation requires it.
            values = variable.value.detach().contiguous()
            distributed.broadcast(values, source)
            variable.value.copy_(values)
    return sum(int((own != mask.to_numpy()).sum()) for own, mask in zip(before, masks, strict=True))


def _check_alike(description: list[list[int | str]]) -> None:
    """Raises an error on all processes if they do not have the same variables."""
    from torch import distributed

    found: list[list[list[int | str]] | None] = [None] * distributed.get_world_size()
    distributed.all_gather_object(found, description)
    for rank, other in enumerate(found):
        if other != found[0]:
            raise ValueError(
                f"The model of process {rank} has other variables than that of process 0 "
                f"({len(other or [])} and {len(found[0] or [])}, or other shapes). All processes "
                "must make the same model, and call the same functions before `broadcast_state`."
            )
