"""Loading beside the engine, on plain torch modules: what is noticed, and how a load ends."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from experts.staging import (
    LoadCancelled,
    StagedLoad,
    _mark_unfilled,
    _refuse_unfilled,
    _write_through,
)
from experts.weight_pool import PooledWeights, PoolError, TensorLayout, swappable_tensors


def entry_for(model: nn.Module) -> PooledWeights:
    tensors = swappable_tensors(model, ignore=lambda _name: False)
    return PooledWeights(TensorLayout.of(tensors), pin=False)


def model() -> nn.Module:
    return nn.ModuleDict({"one": nn.Linear(3, 2, bias=False), "two": nn.Linear(2, 4, bias=False)})


def test_what_a_checkpoint_does_not_fill_is_named() -> None:
    staged = model()
    entry = entry_for(staged)
    for view in entry.views.values():
        view.fill_(7.0)  # the buffer's former expert
    _write_through(staged, entry)
    _mark_unfilled(staged)
    staged["one"].weight.data.copy_(torch.ones(2, 3))
    with pytest.raises(PoolError, match=r"leaves two\.weight without numbers"):
        _refuse_unfilled(staged)
    staged["two"].weight.data[:3].fill_(1.0)  # three quarters of it
    with pytest.raises(PoolError, match=r"two\.weight"):
        _refuse_unfilled(staged)
    staged["two"].weight.data[3:].fill_(1.0)
    _refuse_unfilled(staged)
    assert all(bool((view == 1.0).all()) for view in entry.views.values()), "nothing held twice"


def test_a_load_ends_with_a_sealed_entry_or_with_its_reason() -> None:
    entry = entry_for(model())

    def fills(load: StagedLoad) -> None:
        for view in load.entry.views.values():
            view.fill_(1.0)

    def waits_to_be_called_off(load: StagedLoad) -> None:
        load.cancelled.wait()
        raise LoadCancelled("called off")

    done = StagedLoad("a", entry, fills)
    assert done.result() is entry
    assert done.done
    assert len(entry.digest) == 64
    called_off = StagedLoad("b", entry, waits_to_be_called_off)
    assert not called_off.done
    called_off.cancelled.set()
    with pytest.raises(PoolError, match="b: called off"):
        called_off.result()
