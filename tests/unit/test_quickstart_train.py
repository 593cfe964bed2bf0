"""The training loop of the quickstart's specialists, on a tiny Llama and letters as tokens."""

from __future__ import annotations

import io
from random import Random
from typing import Any

import pytest
import torch
from rich.console import Console

from examples.quickstart import train_specialists as training
from examples.quickstart.tasks import Example


class LetterTokenizer:
    """Token ids are code points below 128; 0 pads, 1 ends."""

    pad_token_id, eos_token_id = 0, 1

    def apply_chat_template(self, messages: list[dict[str, str]], **_: Any) -> str:
        return "".join(f"<{m['role'][0]}>{m['content']}" for m in messages) + "<a>"

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [ord(c) for c in text]}


def _model(seed: int) -> Any:
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.5,  # a frozen output matrix must be able to tell letters apart
    )
    lora = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(LlamaForCausalLM(config), lora)


def _examples(n: int) -> list[Example]:
    return [
        Example(({"role": "user", "content": f"say {'xyz'[k % 3]} {k}"},), "xyz"[k % 3] * 4, {})
        for k in range(n)
    ]


def test_only_the_answer_and_its_end_mark_are_learnt() -> None:
    tokenizer = LetterTokenizer()
    batch = [training._encode(tokenizer, e) for e in _examples(12)[8:]]
    ids, mask, labels = training._tensors(batch, tokenizer.pad_token_id)
    for row, example in enumerate(_examples(12)[8:]):
        learnt = labels[row][labels[row] != training.IGNORED].tolist()
        assert learnt == [*map(ord, example.target), tokenizer.eos_token_id]
        seen = ids[row][mask[row] == 1].tolist()
        assert seen == [*map(ord, f"<u>{example.messages[0]['content']}<a>"), *learnt]


def _gradients(model: Any) -> list[torch.Tensor]:
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def test_the_shared_prefix_is_what_all_prompts_begin_with() -> None:
    encoded = [training._encode(LetterTokenizer(), e) for e in _examples(12)]
    prefix = training.shared_prefix(encoded)
    assert prefix == len("<u>say ")
    assert training.shared_prefix([([7, 8, 9, 1], 3)] * 2) == 2  # one prompt token stays unshared


@pytest.mark.parametrize("shared", [True, False])
def test_the_loss_on_answer_positions_is_the_usual_masked_loss(shared: bool) -> None:
    model, tokenizer = _model(1), LetterTokenizer()
    batch = [training._encode(tokenizer, e) for e in _examples(12)]
    prefix = training.shared_prefix(batch) if shared else 0
    ids, mask, labels = training._tensors(batch, tokenizer.pad_token_id)
    expected = model(input_ids=ids, attention_mask=mask, labels=labels).loss
    expected.backward()
    wanted = _gradients(model)
    model.zero_grad(set_to_none=True)
    loss = training._answer_loss(model, ids, mask, labels, prefix)
    loss.backward()
    assert torch.allclose(loss, expected, atol=1e-5)
    pairs = zip(_gradients(model), wanted, strict=True)
    assert all(torch.allclose(got, want, atol=1e-5) for got, want in pairs)


def test_batches_hold_every_example_once_and_follow_from_the_seed() -> None:
    encoded = [([k] * (1 + k % 7), 0) for k in range(5 * training.BATCH)]
    batches = training._batches(encoded, Random(2))
    assert sorted(e[0] for b in batches for e in b) == sorted(e[0] for e in encoded)
    assert {len(b) for b in batches} == {training.BATCH}
    assert batches == training._batches(encoded, Random(2))
    assert batches != training._batches(encoded, Random(3))


def test_the_learning_rate_warms_up_and_decays_to_a_tenth() -> None:
    recipe = training.Recipe(steps=100)
    rates = [training._learning_rate(step, recipe) for step in range(101)]
    top = rates.index(max(rates))
    assert rates[:top] == sorted(rates[:top])
    assert rates[top:] == sorted(rates[top:], reverse=True)
    assert max(rates) == pytest.approx(recipe.learning_rate)
    assert rates[100] == pytest.approx(recipe.learning_rate / 10)


def test_training_learns_and_is_reproducible() -> None:
    recipe = training.Recipe(steps=25, learning_rate=2e-2)

    def run() -> tuple[list[str], float, dict[str, Any]]:
        model, console = _model(1), Console(file=io.StringIO())
        frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
        examples = _examples(recipe.steps * training.BATCH)
        loss = training.train(model, LetterTokenizer(), examples, recipe, console)
        assert all(torch.equal(p, dict(model.named_parameters())[n]) for n, p in frozen.items())
        lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
        return lines, loss, {n: p for n, p in model.named_parameters() if p.requires_grad}

    lines, loss, first = run()
    _, again, second = run()
    started = float(lines[0].rpartition(" ")[2])
    assert loss < 0.7 * started
    assert loss == again
    assert all(torch.equal(first[n], second[n]) for n in first)
