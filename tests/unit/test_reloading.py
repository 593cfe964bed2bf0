"""A reload into the running engine: what a checkpoint leaves out never stays another expert's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from experts.reloading import reload
from experts.weight_pool import PoolError

Tensors = dict[str, torch.Tensor]


class Runner:
    """vLLM's model runner, as far as it is asked for."""

    def __init__(self, load: Callable[[], None]) -> None:
        self._load = load

    def reload_weights(self, *, weights_path: str) -> None:
        self._load()


@pytest.fixture
def folder(tmp_path: Path) -> str:
    (tmp_path / "model.safetensors").touch()
    return str(tmp_path)


def engine_tensors() -> Tensors:
    return {
        "norm": torch.ones(4, dtype=torch.bfloat16),
        "fused": torch.ones(6, 2),
        "packed": torch.ones(3, dtype=torch.int32),
    }


def test_a_checkpoint_that_has_everything_is_what_the_engine_then_holds(folder: str) -> None:
    tensors = engine_tensors()

    def load() -> None:
        for tensor in tensors.values():
            tensor.fill_(2)

    reload(Runner(load), folder, tensors, quantised=False)
    assert all(bool((tensor == 2).all()) for tensor in tensors.values())


@pytest.mark.parametrize("lacking", ["norm", "packed"])
@pytest.mark.parametrize("quantised", [False, True])
def test_a_tensor_that_stays_as_it_was_is_named(folder: str, lacking: str, quantised: bool) -> None:
    tensors = engine_tensors()

    def load() -> None:
        for name, tensor in tensors.items():
            if name != lacking:
                tensor.fill_(2)

    with pytest.raises(PoolError, match=f"leaves {lacking} without numbers"):
        reload(Runner(load), folder, tensors, quantised=quantised)


def test_part_of_a_fused_tensor_is_missed_too_though_it_is_made_anew(folder: str) -> None:
    """vLLM loads into memory that it has just allocated, and copies that into the engine's."""
    tensors = engine_tensors()

    def load() -> None:
        made = torch.empty(6, 2)
        made[:4] = 2.0
        tensors["fused"].copy_(made)
        tensors["norm"].fill_(2)
        tensors["packed"].fill_(2)

    with pytest.raises(PoolError, match="leaves fused without numbers"):
        reload(Runner(load), folder, tensors, quantised=False)


def test_a_folder_without_weights_leaves_the_engine_as_it_is(tmp_path: Path) -> None:
    tensors = engine_tensors()
    with pytest.raises(PoolError, match=r"no \*.safetensors"):
        reload(Runner(lambda: None), str(tmp_path), tensors, quantised=False)
    assert bool((tensors["norm"] == 1).all())
