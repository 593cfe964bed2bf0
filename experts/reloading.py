"""vLLM's own reload into the running engine, for models that cannot be built beside it.

It processes a checkpoint layer by layer and copies the result into the tensors that the engine
reads. Two things about it would let one expert answer with the weights of another:

- Where a checkpoint lacks a weight, vLLM logs a warning and leaves what was there, or what happened
  to be in memory. So every tensor is spoiled first, and so is all memory that is allocated
  meanwhile; what is still spoiled afterwards refuses the checkpoint.
- Where it fails in the middle, the layers that it has not come to are left without tensors. They
  get theirs back, so that the next expert can be copied in.

After a failure the tensors hold nobody's weights. Runs inside vLLM's worker processes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from experts.weight_pool import PoolError

_SPOILED = 0xFF  # as every byte: "not a number" in all floating-point formats, -1 in integers
_ALLOCATORS = (torch.empty, torch.empty_like, torch.empty_strided)


def reload(runner: Any, path: str, tensors: Mapping[str, torch.Tensor], *, quantised: bool) -> None:
    """Load the checkpoint in the folder ``path`` into ``tensors``, those of the engine's model.

    ``runner`` is vLLM's model runner; its engine must be idle. Raises PoolError for a checkpoint
    that leaves something out, and whatever vLLM raises.
    """
    if not any(Path(path).glob("*.safetensors")):
        raise PoolError(f"{path}: no *.safetensors file")
    for tensor in tensors.values():
        _bytes_of(tensor).fill_(_SPOILED)
    try:
        with _AllocationsSpoiled():
            runner.reload_weights(weights_path=path)
    except BaseException:
        _put_back(runner.get_model())
        raise
    unfilled = [n for n, tensor in tensors.items() if _is_spoiled(tensor, quantised=quantised)]
    if unfilled:
        more = f" and {len(unfilled) - 3} more" if len(unfilled) > 3 else ""
        raise PoolError(f"the checkpoint leaves {', '.join(unfilled[:3])}{more} without numbers")


def _bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(-1).view(torch.uint8)


def _is_spoiled(tensor: torch.Tensor, *, quantised: bool) -> bool:
    """Whether something of it was not written. Of a quantised model, only whether nothing was:
    kernels pad its tensors with what they like (``experts.compat.missing_tensors`` does the rest).
    """
    if tensor.is_floating_point() and not quantised:
        return bool(torch.isnan(tensor).any())
    return bool((_bytes_of(tensor) == _SPOILED).all())


class _AllocationsSpoiled(TorchFunctionMode):  # type: ignore[misc]
    """Numbers that ``torch.empty`` gives are spoiled meanwhile, instead of whatever was there."""

    def __torch_function__(
        self,
        function: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        made = function(*args, **(kwargs or {}))
        if function in _ALLOCATORS and made.is_floating_point() and not made.is_meta:
            made.detach().fill_(math.nan)
        return made


def _put_back(model: torch.nn.Module) -> None:
    """Give layers that a broken reload has not come to the tensors that the engine reads."""
    from vllm.model_executor.model_loader.reload.layerwise import (
        LOADING_LAYERS,
        _place_kernel_tensors,
        get_layerwise_info,
    )

    for layer in model.modules():
        info = get_layerwise_info(layer)
        if info.can_load():
            _place_kernel_tensors(layer, info)
            info.reset()
    LOADING_LAYERS.clear()
