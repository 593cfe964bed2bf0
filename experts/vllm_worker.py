"""What runs inside vLLM's worker processes: the weight pool of that worker's shard, and the swap.

vLLM adds the methods of ``WeightPoolExtension`` to its worker class (engine argument
``worker_extension_cls``); the engine adapter calls them through ``collective_rpc``, so tensors
never cross a process boundary and each tensor-parallel rank pools and swaps its own shard.

Why linear layers keep plain weights on CPU: by default vLLM's CPU build packs every linear weight
into an opaque oneDNN handle and empties the parameter. A packed handle cannot be overwritten, and
the tied output head would go on using the pack of an earlier expert. Keeping the parameter as it is
makes a CPU engine like a GPU engine: what is copied is what is read. The price is speed of
generation on CPU, which `bench/swap.py` reports against the packed kernels.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import torch

from experts.owner_watch import OWNER_ENV, watch_owner
from experts.weight_pool import PoolError, TensorLayout, WeightPool, swappable_tensors


def _keep_plain_weight(layer: torch.nn.Module, remove_weight: bool) -> None:
    """Stands in for vLLM's packing dispatch: same contract, no pack, the weight stays in place."""
    layer.cpu_linear = torch.nn.functional.linear


def _keep_plain_weights_on_cpu() -> None:
    from vllm.model_executor.layers import utils
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        utils.dispatch_cpu_unquantized_gemm = _keep_plain_weight


def _watch_owner() -> None:
    if owner := os.environ.get(OWNER_ENV):
        watch_owner(int(owner))


# Importing this module is the only hook that vLLM offers between the start of a worker process and
# the loading of the model. Engines without this extension never import it and are left alone.
_keep_plain_weights_on_cpu()
_watch_owner()


_COST_UNKNOWN_S = 1.0  # the engine loaded its first expert itself, with much else


def _is_engine_state(name: str) -> bool:
    """Tensors that an engine keeps on modules which are not weights."""
    return name.startswith("kv_cache") or name.endswith(("_range", "range"))


class WeightPoolExtension:
    """Methods added to a vLLM worker. Names carry a prefix because vLLM refuses collisions."""

    def coe_open_pool(self, limit_bytes: int, loaded_expert: str) -> dict[str, Any]:
        """Make the pool and pool the expert whose weights the engine started with."""
        self._coe_refuse_unsupported()
        tensors = self._coe_tensors()
        on_cuda = next(iter(tensors.values())).is_cuda
        # Each tensor-parallel rank pools its shard, so each gets its share of the host's bound.
        share = limit_bytes // max(1, self.vllm_config.parallel_config.tensor_parallel_size)  # type: ignore[attr-defined]
        self._coe_pool = WeightPool(TensorLayout.of(tensors), limit_bytes=share, pin=on_cuda)
        return self._coe_snapshot(loaded_expert, cost_s=_COST_UNKNOWN_S)

    def coe_make_resident(self, expert: str, path: str) -> dict[str, Any]:
        """Put ``expert``'s weights into the running engine, from the pool or else from disk.

        The engine must be idle. From the pool it is one copy per tensor. From disk, vLLM's own
        loading (which knows fusing, sharding and padding) overwrites the parameters, and the result
        is pooled, in place of the least valuable entry when the pool is full. After an error the
        parameters are a mixture; another call puts them right.
        """
        tensors = self._coe_tensors()
        started = time.perf_counter()
        if expert in self._coe_pool:
            copied = self._coe_pool.copy_into(expert, tensors)
            seconds = time.perf_counter() - started
            return {"source": "pool", "bytes": copied, "seconds": seconds}
        self._coe_load(path)
        result = self._coe_snapshot(expert, cost_s=time.perf_counter() - started)
        result["seconds"] = time.perf_counter() - started
        return result

    def coe_plain_copy_seconds(self, repeats: int) -> list[float]:
        """Seconds of ``repeats`` plain copies of one entry's bytes: the floor a swap is held to."""
        size = self._coe_pool.layout.payload_bytes
        device = next(iter(self._coe_tensors().values())).device
        source = torch.zeros(size, dtype=torch.uint8, pin_memory=device.type == "cuda")
        target = torch.zeros(size, dtype=torch.uint8, device=device)
        seconds: list[float] = []
        for _ in range(repeats):
            started = time.perf_counter()
            target.copy_(source, non_blocking=True)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds.append(time.perf_counter() - started)
        return seconds

    def coe_corrupt(self, expert: str, tensor_index: int) -> str:
        """Fault injection for tests: negate one pooled tensor so that the canary must object."""
        views = self._coe_pool.views(expert)
        name = sorted(views)[tensor_index % len(views)]
        views[name].neg_()
        return name

    # --- not called from outside ---

    def _coe_model(self) -> torch.nn.Module:
        model: torch.nn.Module = self.model_runner.get_model()  # type: ignore[attr-defined]
        return model

    def _coe_tensors(self) -> dict[str, torch.Tensor]:
        # Found once: names, shapes and addresses of a running engine's parameters never change.
        if not hasattr(self, "_coe_found"):
            self._coe_found = swappable_tensors(self._coe_model(), ignore=_is_engine_state)
        return self._coe_found

    def _coe_refuse_unsupported(self) -> None:
        config = self.vllm_config  # type: ignore[attr-defined]
        if config.model_config.quantization is not None:
            raise PoolError(
                f"quantised checkpoints ({config.model_config.quantization}) are not swapped in "
                "place yet: their kernels repack weights after loading"
            )
        if config.lora_config is not None:
            raise PoolError("an engine with LoRA slots is not swapped in place; merge the adapter")

    def _coe_load(self, path: str) -> None:
        import copy

        from vllm.config import set_current_vllm_config
        from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

        if not any(Path(path).glob("*.safetensors")):
            raise PoolError(f"{path}: no *.safetensors file")
        config = self.vllm_config  # type: ignore[attr-defined]
        model_config = copy.copy(config.model_config)
        model_config.model = path
        with set_current_vllm_config(config), torch.no_grad():
            # load_weights also checks that the checkpoint filled every parameter.
            DefaultModelLoader(config.load_config).load_weights(self._coe_model(), model_config)

    def _coe_snapshot(self, expert: str, *, cost_s: float) -> dict[str, Any]:
        entry = self._coe_pool.snapshot(expert, self._coe_tensors(), cost_s=cost_s)
        return {
            "source": "disk",
            "seconds": 0.0,
            "bytes": self._coe_pool.layout.payload_bytes,
            "digest": entry.digest(),
            "pooled": list(self._coe_pool),
            "entries_max": self._coe_pool.entries_max,
        }
