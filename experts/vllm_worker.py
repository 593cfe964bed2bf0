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

import contextlib
import os
import time
from typing import Any

import torch

from experts.owner_watch import OWNER_ENV, watch_owner
from experts.reloading import reload
from experts.staging import StagedLoad, Staging
from experts.weight_pool import (
    PooledWeights,
    PoolError,
    TensorLayout,
    WeightPool,
    swappable_tensors,
)


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


_BITS_PER_WEIGHT_MIN = 1.5  # the smallest formats have ternary weights
_COST_UNKNOWN_S = 1.0  # the engine loaded its first expert itself, with much else


def _is_engine_state(name: str) -> bool:
    """Tensors that an engine keeps on modules which are not weights."""
    return name.startswith("kv_cache") or name.endswith(("_range", "range"))


class WeightPoolExtension:
    """Methods added to a vLLM worker. Names carry a prefix because vLLM refuses collisions."""

    def coe_open_pool(self, limit_bytes: int, loaded_expert: str, path: str) -> dict[str, Any]:
        """Make the pool, pool the expert whose weights the engine started with, and find the way in
        which others can be loaded: one that gives this expert's tensors bit for bit.

        ``loading`` in the result is "staged" (on the host, beside the running engine) or "reloaded"
        (by vLLM into the engine itself, which must be idle); ``loading_note`` says why not staged.
        Raises PoolError when neither reproduces what the engine holds.
        """
        refuse_unswappable(self._coe_model())
        if self.vllm_config.lora_config is not None:  # type: ignore[attr-defined]
            raise PoolError("an engine with LoRA slots is not swapped in place; merge the adapter")
        tensors = self._coe_tensors()
        on_cuda = next(iter(tensors.values())).is_cuda
        # Each tensor-parallel rank pools its shard, so each gets its share of the host's bound.
        share = limit_bytes // max(1, self.vllm_config.parallel_config.tensor_parallel_size)  # type: ignore[attr-defined]
        self._coe_pool = WeightPool(TensorLayout.of(tensors), limit_bytes=share, pin=on_cuda)
        self._coe_load: StagedLoad | None = None
        self._coe_staging = Staging(self.vllm_config, ignore=_is_engine_state)  # type: ignore[attr-defined]
        entry = self._coe_pool.snapshot(loaded_expert, tensors, cost_s=_COST_UNKNOWN_S)
        note = self._coe_staging_flaw(loaded_expert, path, entry.digest)
        self._coe_staged = not note
        if note:
            self._coe_prove_reload(loaded_expert, path, entry.digest, note)
        loading = "staged" if self._coe_staged else "reloaded"
        return self._coe_report(loading=loading, loading_note=note)

    def coe_make_resident(self, expert: str, path: str, keep: list[str]) -> dict[str, Any]:
        """Put ``expert``'s weights into the running engine, from the pool or else from disk.

        The engine must be idle. From the pool it is one copy per tensor. What the pool does not
        hold is loaded into it first, in place of the least valuable entry outside ``keep`` when it
        is full; a load of this expert that is under way is waited for, another is called off.
        After an error of copying the parameters are a mixture; another call puts them right.
        """
        started = time.perf_counter()
        source = "pool"
        if expert not in self._coe_pool:
            source = "disk"
            if not self._coe_bring_in(expert, path, keep):
                # Whatever would better be kept, somebody is waiting for this expert now.
                self._coe_bring_in(expert, path, [])
        self._coe_pool.copy_into(expert, self._coe_tensors())
        return self._coe_report(source=source, seconds=time.perf_counter() - started)

    def coe_prefetch(self, expert: str, path: str, keep: list[str]) -> dict[str, Any]:
        """Begin to load ``expert`` into the pool while the engine goes on. ``started`` is False
        when that is not possible: no room beside ``keep``, a load under way, or no staging."""
        free = self._coe_load is None and expert not in self._coe_pool
        started = self._coe_staged and free and self._coe_begin(expert, path, keep)
        return self._coe_report(started=started)

    def coe_prefetched(self) -> dict[str, Any]:
        """How the load in the background stands: ``done``, and the ``failure`` if it failed."""
        load, failure = self._coe_load, ""
        if load is not None and load.done:
            try:
                self._coe_finish()
            except PoolError as error:
                failure = str(error)
        return self._coe_report(done=self._coe_load is None, failure=failure)

    def coe_evict(self, expert: str) -> dict[str, Any]:
        """Give up ``expert``'s entry and its memory; nothing happens when the pool has none."""
        self._coe_pool.drop(expert)
        return self._coe_report()

    def coe_device_memory(self) -> tuple[int, int] | None:
        """Free and total bytes of this rank's device; None where memory is the host's."""
        if not next(iter(self._coe_tensors().values())).is_cuda:
            return None
        free, total = torch.cuda.mem_get_info()
        return int(free), int(total)

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
        """Fault injection for tests: invert one pooled tensor's bits so that the canary objects."""
        views = self._coe_pool.views(expert)
        name = sorted(views)[tensor_index % len(views)]
        views[name].view(torch.uint8).bitwise_not_()
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

    def _coe_staging_flaw(self, expert: str, path: str, digest: str) -> str:
        """Why staging does not give the tensors that the engine holds; empty when it does."""
        scratch = PooledWeights(self._coe_pool.layout, pin=False)
        try:
            load = self._coe_staging.load(expert, path, scratch)
            load.result()
        # Whatever goes wrong says the same: vLLM cannot build this model on the host.
        except Exception as error:  # noqa: BLE001
            return f"{type(error).__name__}: {error}"
        return "" if scratch.digest == digest else "staged tensors differ from the engine's"

    def _coe_prove_reload(self, expert: str, path: str, digest: str, note: str) -> None:
        self._coe_reload(path)
        entry = self._coe_pool.snapshot(expert, self._coe_tensors(), cost_s=_COST_UNKNOWN_S)
        if entry.digest != digest:
            raise PoolError(
                "loading this model twice does not give the same tensors, so experts cannot be "
                f"exchanged in place (reloading differs; staging: {note})"
            )

    def _coe_reload(self, path: str) -> None:
        reload(
            self.model_runner,  # type: ignore[attr-defined]
            path,
            self._coe_tensors(),
            quantised=self.vllm_config.model_config.quantization is not None,  # type: ignore[attr-defined]
        )

    def _coe_bring_in(self, expert: str, path: str, keep: list[str]) -> bool:
        """Load from disk into the pool now; False when ``keep`` leaves no room."""
        if not self._coe_staged:
            started = time.perf_counter()
            self._coe_reload(path)
            took_s = time.perf_counter() - started
            self._coe_pool.snapshot(expert, self._coe_tensors(), cost_s=took_s)
            return True
        if self._coe_load is not None and self._coe_load.expert != expert:
            self._coe_load.cancelled.set()
            with contextlib.suppress(PoolError):  # of an expert that nobody needs now
                self._coe_finish()
        if self._coe_load is None and not self._coe_begin(expert, path, keep):
            return False
        self._coe_finish()
        return True

    def _coe_begin(self, expert: str, path: str, keep: list[str]) -> bool:
        entry = self._coe_pool.reserve(keep)
        if entry is None:
            return False
        try:
            self._coe_load = self._coe_staging.load(expert, path, entry)
        except BaseException:
            self._coe_pool.give_back(entry)
            raise
        return True

    def _coe_finish(self) -> None:
        """Wait for the load and pool what it brought. Raises PoolError when it failed."""
        load, self._coe_load = self._coe_load, None
        assert load is not None
        try:
            entry = load.result()
        except PoolError:
            self._coe_pool.give_back(load.entry)
            raise
        self._coe_pool.install(load.expert, entry, cost_s=load.seconds)

    def _coe_report(self, **more: Any) -> dict[str, Any]:
        return {
            "source": "disk",
            "seconds": 0.0,
            "bytes": self._coe_pool.layout.payload_bytes,
            "pooled": self._coe_pool.digests(),
            "entries_max": self._coe_pool.entries_max,
            "entry_bytes": self._coe_pool.layout.total_bytes,
            **more,
        }


def refuse_unswappable(model: torch.nn.Module) -> None:
    """Raise PoolError when a layer's weights are where no copy reaches them.

    Quantised layers are fine as long as their kernels read tensors that are parameters. Some
    kernels pack a matrix into an opaque handle instead and drop the parameter (8-bit products of
    oneDNN on CPU); copying the rest would leave the matrix of an earlier expert in use.
    """
    from vllm.model_executor.layers.linear import LinearBase

    for name, module in model.named_modules():
        if isinstance(module, LinearBase) and _bits_per_weight(module) < _BITS_PER_WEIGHT_MIN:
            scheme = getattr(module, "scheme", None) or module.quant_method
            raise PoolError(
                f"{name}: {type(scheme).__name__} keeps its weights in a kernel handle that cannot "
                "be overwritten; use another format, or serve the model as a remote expert by a "
                "vLLM of its own"
            )


def _bits_per_weight(layer: Any) -> float:
    """Of what a copy of its parameters reaches; scales alone are a fraction of a bit."""
    inputs: int = getattr(layer, "input_size_per_partition", layer.input_size)
    outputs: int = getattr(layer, "output_size_per_partition", layer.output_size)
    reached: int = sum(p.numel() * p.element_size() for p in layer.parameters(recurse=False))
    return 8.0 * reached / (inputs * outputs)
