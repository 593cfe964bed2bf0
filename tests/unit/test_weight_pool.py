"""The weight pool on plain torch modules: what is copied, what is refused, what stays exact."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from experts.weight_pool import (
    PoolError,
    TensorLayout,
    WeightPool,
    chunk_pairs,
    swappable_tensors,
)


class Tied(nn.Module):
    """Embedding and head share one storage; a rotary-like table is derived, not learned."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(7, 4)
        self.inner = nn.Linear(4, 4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("table", torch.arange(3.0), persistent=False)
        self.register_buffer("scale", torch.full((2,), float(seed)))


def everything(_name: str) -> bool:
    return False


def tensors_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return swappable_tensors(model, ignore=everything)


def pool_of(*models: tuple[str, nn.Module], limit_bytes: int = 1 << 20) -> WeightPool:
    layout = TensorLayout.of(tensors_of(models[0][1]))
    pool = WeightPool(layout, limit_bytes=limit_bytes, pin=False)
    for name, model in models:
        pool.snapshot(name, tensors_of(model), cost_s=1.0)
    return pool


def test_tied_weights_are_pooled_once_and_derived_buffers_not_at_all() -> None:
    assert set(tensors_of(Tied(1))) == {"embed.weight", "inner.weight", "inner.bias", ".scale"}


def test_a_swap_changes_values_and_keeps_addresses() -> None:
    a, b = Tied(1), Tied(2)
    pool = pool_of(("a", a), ("b", b))
    engine = Tied(3)
    live = tensors_of(engine)
    addresses = {name: tensor.data_ptr() for name, tensor in live.items()}
    for name, expert in (("b", b), ("a", a), ("b", b)):
        copied = pool.copy_into(name, live)
        assert copied == sum(t.numel() * t.element_size() for t in live.values())
        for tensor_name, tensor in tensors_of(expert).items():
            assert torch.equal(live[tensor_name], tensor)
    assert {name: tensor.data_ptr() for name, tensor in live.items()} == addresses
    assert torch.equal(engine.head.weight, b.embed.weight)


def test_the_pool_keeps_its_own_copy() -> None:
    a = Tied(1)
    before = a.inner.weight.detach().clone()
    pool = pool_of(("a", a))
    with torch.no_grad():
        a.inner.weight.zero_()
    engine = Tied(3)
    pool.copy_into("a", tensors_of(engine))
    assert torch.equal(engine.inner.weight, before)


def test_the_digest_tells_weights_apart_to_the_bit() -> None:
    a = Tied(1)
    pool = pool_of(("a", a))
    first = pool.snapshot("a", tensors_of(a), cost_s=1.0).digest
    assert pool.snapshot("again", tensors_of(Tied(1)), cost_s=1.0).digest == first
    with torch.no_grad():
        a.inner.bias[0] = torch.nextafter(a.inner.bias[0], torch.tensor(9.0))
    assert pool.snapshot("a", tensors_of(a), cost_s=1.0).digest != first


def test_a_full_pool_gives_up_its_least_valuable_entry_and_reuses_the_buffer() -> None:
    models = {name: Tied(seed) for seed, name in enumerate("abc", start=1)}
    size = TensorLayout.of(tensors_of(models["a"])).total_bytes
    pool = pool_of(("a", models["a"]), ("b", models["b"]), limit_bytes=2 * size + 1)
    engine = Tied(9)
    pool.copy_into("a", tensors_of(engine))  # b is the one less used
    buffer = pool.views("b")["embed.weight"].data_ptr()
    pool.snapshot("c", tensors_of(models["c"]), cost_s=1.0)
    assert sorted(pool) == ["a", "c"]
    assert pool.used_bytes == 2 * size
    assert pool.views("c")["embed.weight"].data_ptr() == buffer
    with pytest.raises(PoolError, match="not in the weight pool"):
        pool.copy_into("b", tensors_of(engine))
    for name in ("a", "c"):
        pool.copy_into(name, tensors_of(engine))
        assert torch.equal(engine.inner.weight, models[name].inner.weight)


def test_a_replacement_needs_no_room_and_too_small_a_bound_is_refused() -> None:
    a = Tied(1)
    size = TensorLayout.of(tensors_of(a)).total_bytes
    pool = pool_of(("a", a), limit_bytes=size)
    pool.snapshot("a", tensors_of(Tied(2)), cost_s=1.0)
    assert list(pool) == ["a"]
    with pytest.raises(PoolError, match="holds no expert"):
        WeightPool(pool.layout, limit_bytes=size - 1, pin=False)


def test_another_shape_is_refused_with_the_difference() -> None:
    pool = pool_of(("a", Tied(1)))
    other = Tied(2)
    other.inner = nn.Linear(4, 5)
    with pytest.raises(PoolError, match=r"inner\.weight"):
        pool.snapshot("other", tensors_of(other), cost_s=1.0)


def test_a_weight_outside_parameters_and_buffers_is_refused() -> None:
    hidden = Tied(1)
    hidden.inner.packed = torch.ones(4, 4)  # as quantised kernels leave it after loading
    with pytest.raises(PoolError, match=r"inner\.packed"):
        tensors_of(hidden)
    assert swappable_tensors(hidden, ignore=lambda name: name == "packed")


def test_entries_are_aligned_for_the_device() -> None:
    layout = TensorLayout.of(tensors_of(Tied(1)))
    assert all(slot.offset_bytes % 256 == 0 for slot in layout.slots)
    assert layout.payload_bytes <= layout.total_bytes


def test_chunks_cover_every_byte_once_whatever_their_size() -> None:
    a, b = tensors_of(Tied(1)), tensors_of(Tied(2))
    for chunk_bytes in (3, 16, 1 << 20):
        for tensor in b.values():
            tensor.zero_()
        pairs = list(chunk_pairs(a, b, chunk_bytes))
        assert max(place.numel() for _, place in pairs) <= chunk_bytes
        assert sum(place.numel() for _, place in pairs) == sum(t.nbytes for t in b.values())
        for chunk, place in pairs:
            place.copy_(chunk)
        assert all(torch.equal(a[name], b[name]) for name in a)


def test_room_for_another_comes_from_the_least_valuable_and_never_from_what_is_kept() -> None:
    a, b = Tied(1), Tied(2)
    size = TensorLayout.of(tensors_of(a)).total_bytes
    pool = pool_of(("a", a), ("b", b), limit_bytes=2 * size)
    assert pool.reserve(keep=("a", "b")) is None
    lent = pool.reserve(keep=("a",))
    assert lent is not None
    assert set(pool) == {"a"}, "b gave way"
    assert pool.used_bytes == 2 * size
    assert pool.reserve(keep=("a",)) is None, "what is lent is not lent twice"
    pool.give_back(lent)
    again = pool.reserve(keep=("a",))
    assert again is lent, "memory is page-locked once"
    pool.install("c", again, cost_s=1.0)
    assert set(pool) == {"a", "c"}
