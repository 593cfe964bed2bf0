"""From a checkpoint to an engine's own tensors, on the host and beside the running engine.

vLLM knows how a checkpoint becomes what its kernels read: names fused, matrices sharded over
tensor-parallel ranks, padded, repacked. So a second, weightless model of the same class is built in
host memory, vLLM loads and post-processes it exactly as at its own start, and the result is what
the pool keeps. The running model is not touched: an expert can be loaded while another generates,
and a checkpoint that proves bad in the middle has spoiled nothing.

Whether the result really is what the engine would hold is not assumed but proved, at start, with
the expert that vLLM loaded itself (``experts.vllm_worker``).

Runs inside vLLM's worker processes.
"""

from __future__ import annotations

import copy
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from experts.weight_pool import PooledWeights, PoolError, TensorLayout, swappable_tensors


class LoadCancelled(PoolError):
    """The load was called off because another expert is needed now."""


def staging_config(config: Any, path: str) -> tuple[Any, Any]:
    """The engine's VllmConfig and ModelConfig, for a second model of weights at ``path``.

    vLLM keeps a register of layers by name in the configuration, for its attention kernels to find
    their caches; a second model must not enter itself there.
    """
    staged = copy.copy(config)
    staged.compilation_config = copy.copy(config.compilation_config)
    staged.compilation_config.static_forward_context = {}
    staged.compilation_config.static_all_moe_layers = []
    staged.model_config = copy.copy(config.model_config)
    staged.model_config.model = path
    return staged, staged.model_config


class Staging:
    """Builds host models of the engine's class. ``ignore``: as for ``swappable_tensors``."""

    def __init__(self, config: Any, *, ignore: Callable[[str], bool]) -> None:
        self._config = config
        self._ignore = ignore

    def load(self, expert: str, path: str, entry: PooledWeights) -> StagedLoad:
        """Begin to load the checkpoint in ``path`` into ``entry``, in a thread of its own.

        Building the model sets process-wide defaults of torch, so that happens here, in the
        caller's thread, and must not overlap with a forward pass; the rest may.
        """
        from vllm.model_executor.model_loader.utils import initialize_model
        from vllm.utils.torch_utils import set_default_torch_dtype

        if not any(Path(path).glob("*.safetensors")):
            raise PoolError(f"{path}: no *.safetensors file")
        config, model_config = staging_config(self._config, path)
        with set_default_torch_dtype(model_config.dtype), torch.device("cpu"):
            model = initialize_model(vllm_config=config, model_config=model_config)
        _write_through(model, entry)
        if model_config.quantization is None:
            _mark_unfilled(model)
        return StagedLoad(expert, entry, lambda load: self._fill(load, config, model))

    def _fill(self, load: StagedLoad, config: Any, model: torch.nn.Module) -> None:
        from vllm.config import set_current_vllm_config
        from vllm.model_executor.model_loader.utils import process_weights_after_loading

        loader = _loader(config.load_config, load)
        with set_current_vllm_config(config), torch.no_grad():
            loader.load_weights(model, config.model_config)
            if config.model_config.quantization is None:
                _refuse_unfilled(model)
            process_weights_after_loading(model, config.model_config, torch.device("cpu"))
        tensors = swappable_tensors(model, ignore=self._ignore)
        differences = load.entry.layout.differences(TensorLayout.of(tensors))
        if differences:
            raise PoolError(f"its tensors are not the engine's: {differences}")
        for name, tensor in tensors.items():
            if tensor.data_ptr() != load.entry.views[name].data_ptr():
                load.entry.views[name].copy_(tensor)


def _write_through(model: torch.nn.Module, entry: PooledWeights) -> None:
    """Let parameters live in the entry from the start where they fit, so that nothing is held
    twice. Those that vLLM replaces while post-processing are copied at the end."""
    for name, parameter in model.named_parameters():
        view = entry.views.get(name)
        if view is not None and (view.shape, view.dtype) == (parameter.shape, parameter.dtype):
            parameter.data = view


def _mark_unfilled(model: torch.nn.Module) -> None:
    """vLLM does not miss a linear layer's weight that the checkpoint lacks, and the buffer may hold
    another expert's. So every number begins as none."""
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data.fill_(float("nan"))


def _refuse_unfilled(model: torch.nn.Module) -> None:
    unfilled = [
        name
        for name, parameter in model.named_parameters()
        if parameter.is_floating_point() and bool(torch.isnan(parameter).any())
    ]
    if unfilled:
        more = f" and {len(unfilled) - 3} more" if len(unfilled) > 3 else ""
        raise PoolError(f"the checkpoint leaves {', '.join(unfilled[:3])}{more} without numbers")


def _loader(load_config: Any, load: StagedLoad) -> Any:
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    class CountingLoader(DefaultModelLoader):  # type: ignore[misc]
        """vLLM's loader of safetensors, with a count of bytes and a way out."""

        def get_all_weights(self, *args: Any) -> Iterator[tuple[str, torch.Tensor]]:
            for name, tensor in super().get_all_weights(*args):
                if load.cancelled.is_set():
                    raise LoadCancelled("called off: another expert is needed now")
                load.read_bytes += tensor.numel() * tensor.element_size()
                yield name, tensor

    quiet = copy.copy(load_config)
    quiet.use_tqdm_on_load = False
    return CountingLoader(quiet)


class StagedLoad:
    """One load under way. ``seconds`` holds once it is done."""

    def __init__(
        self, expert: str, entry: PooledWeights, work: Callable[[StagedLoad], None]
    ) -> None:
        self.expert = expert
        self.entry = entry
        self.cancelled = threading.Event()
        self.read_bytes = 0
        self.seconds = 0.0
        self._failure: BaseException | None = None
        self._work = work
        self._thread = threading.Thread(target=self._run, name=f"load {expert}", daemon=True)
        self._thread.start()

    @property
    def done(self) -> bool:
        return not self._thread.is_alive()

    def result(self) -> PooledWeights:
        """Wait for the end; the filled entry, or what went wrong (PoolError)."""
        self._thread.join()
        if self._failure is not None:
            raise PoolError(f"{self.expert}: {self._failure}") from self._failure
        return self.entry

    def _run(self) -> None:
        started = time.perf_counter()
        try:
            self._work(self)
            self.entry.seal()
        # The thread's outermost frame: whatever went wrong is told by ``result``.
        except Exception as error:  # noqa: BLE001
            self._failure = error
        finally:
            self.seconds = time.perf_counter() - started
            del self._work  # and with it the staged model
