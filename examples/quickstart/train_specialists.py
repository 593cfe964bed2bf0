"""Train the quickstart's LoRA specialists on the CPU, on data that the tasks generate.

    python examples/quickstart/train_specialists.py [--only sql] [--steps N] [--seed 7]

Writes ``adapters/<name>/`` with the adapter, its configuration, and a card that holds only what
this run measured: accuracy of base and specialist on held-out questions, judged by the task's
verifier on the merged bfloat16 weights that ``prepare_models.py`` would serve.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

_HERE = Path(__file__).resolve().parent
if __package__ in (None, ""):  # run as a script from a checkout that is not installed
    sys.path.insert(0, str(_HERE.parents[1]))
    # On a shared machine threads that spin at a barrier burn the time of the one they wait for.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.progress import (  # noqa: E402
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from examples.quickstart.prepare_models import (  # noqa: E402
    ADAPTERS_DIR,
    CARD_FILE,
    default_cache_dir,
    prepare_base,
)
from examples.quickstart.tasks import TASKS, Example, Task  # noqa: E402
from experts.lora_merge import (  # noqa: E402
    ADAPTER_CARD_FILE,
    ADAPTER_CONFIG_FILE,
    ADAPTER_FILE,
    file_digest,
    merged_model,
    read_card,
)

BASE_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
BATCH = 8
BUCKET = 16 * BATCH
EVALUATION_BATCH = 48
IGNORED = -100
WIDTH_STEP = 8
LOG_EVERY = 10


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the outcome of a training run besides the task."""

    steps: int
    seed: int = 7
    heldout: int = 200
    rank: int = 8
    alpha: int = 16
    learning_rate: float = 2e-3
    warmup_share: float = 0.05


def training_examples(task: Task, recipe: Recipe) -> list[Example]:
    """``steps * BATCH`` distinct examples, the same for the same task, seed and steps."""
    rng = Random(f"{task.name}-train-{recipe.seed}")
    return task.generate(rng, "train", recipe.steps * BATCH)


def heldout_examples(task: Task, recipe: Recipe) -> list[Example]:
    """The questions that both models are judged on."""
    return task.generate(Random(f"{task.name}-heldout-{recipe.seed}"), "heldout", recipe.heldout)


def data_digest(examples: list[Example]) -> str:
    """SHA-256 over the conversations in order."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(json.dumps([example.messages, example.target]).encode() + b"\n")
    return digest.hexdigest()


def _prompt_text(tokenizer: Any, example: Example) -> str:
    text = tokenizer.apply_chat_template(
        list(example.messages), tokenize=False, add_generation_prompt=True
    )
    return str(text)


def _encode(tokenizer: Any, example: Example) -> tuple[list[int], int]:
    """(token ids of prompt and answer with its end mark, number of prompt tokens)."""
    prompt = tokenizer(_prompt_text(tokenizer, example), add_special_tokens=False)["input_ids"]
    answer = tokenizer(example.target, add_special_tokens=False)["input_ids"]
    return [*prompt, *answer, tokenizer.eos_token_id], len(prompt)


def _batches(
    encoded: list[tuple[list[int], int]], rng: Random
) -> list[list[tuple[list[int], int]]]:
    """Shuffled batches of similar length: padding is wasted work on a CPU."""
    order = list(encoded)
    rng.shuffle(order)
    batches = []
    for start in range(0, len(order), BUCKET):
        bucket = sorted(order[start : start + BUCKET], key=lambda e: len(e[0]))
        parts = [bucket[k : k + BATCH] for k in range(0, len(bucket), BATCH)]
        rng.shuffle(parts)
        batches += parts
    return batches


def _tensors(
    batch: list[tuple[list[int], int]], pad: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Right-padded ids, attention mask, and labels that cover the answer tokens only.

    Widths are multiples of ``WIDTH_STEP``: the matrix kernels are compiled and kept per shape.
    """
    width = -(-max(len(ids) for ids, _ in batch) // WIDTH_STEP) * WIDTH_STEP
    ids = torch.full((len(batch), width), pad)
    mask = torch.zeros((len(batch), width), dtype=torch.long)
    labels = torch.full((len(batch), width), IGNORED)
    for row, (tokens, prompt) in enumerate(batch):
        ids[row, : len(tokens)] = torch.tensor(tokens)
        mask[row, : len(tokens)] = 1
        labels[row, prompt : len(tokens)] = torch.tensor(tokens[prompt:])
    return ids, mask, labels


def shared_prefix(encoded: list[tuple[list[int], int]]) -> int:
    """Number of leading tokens that all prompts share: the chat template's system turn."""
    shortest, first = min(prompt for _, prompt in encoded), encoded[0][0]
    for n in range(shortest - 1):
        if any(ids[n] != first[n] for ids, _ in encoded):
            return n
    return shortest - 1


def _answer_loss(
    model: Any, ids: torch.Tensor, mask: torch.Tensor, labels: torch.Tensor, prefix: int
) -> Any:
    """Mean cross-entropy over answer tokens.

    The first ``prefix`` tokens, equal in all rows, run once and are shared through the key-value
    cache, gradients included. The vocabulary projection runs on the answer positions alone. Both
    change nothing but the time: a step takes little more than half of what it did.
    """
    causal = model.base_model.model
    shared = None
    if prefix:
        shared = causal.model(input_ids=ids[:1, :prefix], use_cache=True).past_key_values
        shared.batch_repeat_interleave(len(ids))
    hidden = causal.model(
        input_ids=ids[:, prefix:],
        attention_mask=mask,
        past_key_values=shared,
        use_cache=shared is not None,
    ).last_hidden_state[:, :-1]
    wanted = labels[:, prefix + 1 :]
    kept = wanted != IGNORED
    return torch.nn.functional.cross_entropy(causal.lm_head(hidden[kept]).float(), wanted[kept])


def _learning_rate(step: int, recipe: Recipe) -> float:
    """Linear warm-up, then linear decay to a tenth."""
    warmup = max(1, round(recipe.warmup_share * recipe.steps))
    if step < warmup:
        return recipe.learning_rate * (step + 1) / warmup
    left = (recipe.steps - step) / max(1, recipe.steps - warmup)
    return recipe.learning_rate * (0.1 + 0.9 * left)


def _bar(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )


def train(
    model: Any, tokenizer: Any, examples: list[Example], recipe: Recipe, console: Console
) -> float:
    """Train the adapter inside ``model`` in place; mean loss of the last ``LOG_EVERY`` steps."""
    encoded = [_encode(tokenizer, e) for e in examples]
    prefix, batches = shared_prefix(encoded), _batches(encoded, Random(recipe.seed))
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=recipe.learning_rate, weight_decay=0.0)
    losses: list[float] = []
    model.train()
    with _bar(console) as bar:
        job = bar.add_task("training", total=len(batches))
        for step, batch in enumerate(batches):
            for group in optimizer.param_groups:
                group["lr"] = _learning_rate(step, recipe)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                ids, mask, labels = _tensors(batch, tokenizer.pad_token_id)
                loss = _answer_loss(model, ids, mask, labels, prefix)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(loss.item())
            bar.update(job, advance=1, description=f"training, loss {losses[-1]:.3f}")
            if (step + 1) % LOG_EVERY == 0 and not console.is_terminal:
                recent = losses[-LOG_EVERY:]
                mean = sum(recent) / len(recent)
                console.print(f"step {step + 1}/{len(batches)}, loss {mean:.3f}")
    last = losses[-LOG_EVERY:]
    return sum(last) / len(last)


def answers(model: Any, tokenizer: Any, examples: list[Example], max_new_tokens: int) -> list[str]:
    """Greedy answers in the order of ``examples``."""
    tokenizer.padding_side = "left"
    texts: list[str] = []
    model.eval()
    for start in range(0, len(examples), EVALUATION_BATCH):
        chunk = examples[start : start + EVALUATION_BATCH]
        prompts = [_prompt_text(tokenizer, e) for e in chunk]
        inputs = tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False)
        with torch.inference_mode():
            output = model.generate(
                **inputs,
                do_sample=False,
                max_new_tokens=max_new_tokens,
                pad_token_id=tokenizer.pad_token_id,
            )
        new = output[:, inputs["input_ids"].shape[1] :]
        texts += tokenizer.batch_decode(new, skip_special_tokens=True)
    return texts


def _load(folder: Path, dtype: torch.dtype) -> Any:
    from transformers import AutoModelForCausalLM

    # Eager attention: the fused kernel of the CPU takes twice as long on sequences this short.
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, local_files_only=True, attn_implementation="eager"
    )


def _with_adapter(base_dir: Path, recipe: Recipe) -> Any:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(recipe.seed)
    config = LoraConfig(
        r=recipe.rank,
        lora_alpha=recipe.alpha,
        lora_dropout=0.0,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    # Frozen weights as they are stored, adapter in float32: autocast then converts nothing twice.
    return get_peft_model(_load(base_dir, torch.bfloat16), config)


def _save_adapter(model: Any, folder: Path) -> None:
    """Adapter in bfloat16, with no path of this machine in its configuration."""
    model.peft_config["default"].base_model_name_or_path = BASE_MODEL
    model.to(torch.bfloat16).save_pretrained(folder, save_embedding_layers=False)
    for extra in folder.iterdir():
        if extra.name not in (ADAPTER_FILE, ADAPTER_CONFIG_FILE):
            extra.unlink()


def _correct(task: Task, examples: list[Example], outputs: list[str]) -> int:
    return sum(task.verify(e, o) for e, o in zip(examples, outputs, strict=True))


def _publish(partial: Path, target: Path) -> None:
    if target.exists():
        shutil.rmtree(target)
    partial.chmod(0o755)
    for file in partial.iterdir():
        file.chmod(0o644)
    partial.rename(target)


def train_specialist(
    task: Task, base_dir: Path, adapters_dir: Path, recipe: Recipe, console: Console
) -> dict[str, Any]:
    """Train, save, merge and measure one specialist; its card."""
    from transformers import AutoTokenizer

    examples, heldout = training_examples(task, recipe), heldout_examples(task, recipe)
    tokenizer = AutoTokenizer.from_pretrained(base_dir, local_files_only=True)
    console.print(f"{task.name}: {task.summary}; {len(examples)} examples, {recipe.steps} steps")
    adapters_dir.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{task.name}-", suffix=".partial", dir=adapters_dir))
    started, cpu_started = time.monotonic(), time.process_time()
    model = _with_adapter(base_dir, recipe)
    loss = train(model, tokenizer, examples, recipe, console)
    minutes = (time.monotonic() - started) / 60
    cpu_minutes = (time.process_time() - cpu_started) / 60
    _save_adapter(model, partial)
    console.print(f"{task.name}: trained in {minutes:.1f} min; measuring {len(heldout)} questions")
    merged = merged_model(base_dir, partial)
    specialist = answers(merged, tokenizer, heldout, task.max_new_tokens)
    base = answers(_load(base_dir, torch.bfloat16), tokenizer, heldout, task.max_new_tokens)
    base_correct, correct = (_correct(task, heldout, texts) for texts in (base, specialist))
    card = {
        "format": 1,
        "name": task.name,
        "summary": task.summary,
        "base_model": BASE_MODEL,
        "base_digest": read_card(base_dir / CARD_FILE)["weights_digest"],
        "adapter_sha256": file_digest(partial / ADAPTER_FILE),
        "train_data_digest": data_digest(examples),
        "heldout_data_digest": data_digest(heldout),
        "train_examples": len(examples),
        "steps": recipe.steps,
        "batch": BATCH,
        "seed": recipe.seed,
        "rank": recipe.rank,
        "alpha": recipe.alpha,
        "learning_rate": recipe.learning_rate,
        "final_loss": round(loss, 4),
        "train_minutes": round(minutes, 1),
        "train_cpu_minutes": round(cpu_minutes, 1),
        "threads": torch.get_num_threads(),
        "heldout_questions": len(heldout),
        "base_correct": base_correct,
        "specialist_correct": correct,
        "base_accuracy": round(base_correct / len(heldout), 4),
        "specialist_accuracy": round(correct / len(heldout), 4),
        "versions": {"torch": torch.__version__},
    }
    (partial / ADAPTER_CARD_FILE).write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")
    _publish(partial, adapters_dir / task.name)
    _save_transcript(adapters_dir / task.name, heldout, base, specialist, task)
    return card


def _save_transcript(
    folder: Path, examples: list[Example], base: list[str], specialist: list[str], task: Task
) -> None:
    """Every held-out question with both answers and verdicts, for whoever doubts the figures."""
    with (folder / "heldout.jsonl").open("w", encoding="utf-8") as file:
        for example, theirs, ours in zip(examples, base, specialist, strict=True):
            row = {
                "prompt": example.messages[-1]["content"],
                "reference": example.target,
                "base": theirs,
                "base_correct": task.verify(example, theirs),
                "specialist": ours,
                "specialist_correct": task.verify(example, ours),
            }
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def main(argv: list[str] | None = None) -> int:
    """Command line; one specialist after the other."""
    parser = argparse.ArgumentParser(description="Train the quickstart's LoRA specialists.")
    parser.add_argument("--only", action="append", choices=tuple(TASKS), help="repeatable")
    parser.add_argument("--steps", type=int, help="default: the task's own")
    parser.add_argument("--seed", type=int, default=Recipe.seed)
    parser.add_argument("--heldout", type=int, default=Recipe.heldout)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cache-dir", type=Path, default=default_cache_dir())
    parser.add_argument("--out", type=Path, default=ADAPTERS_DIR)
    args = parser.parse_args(argv)
    console = Console(stderr=True)
    torch.set_num_threads(args.threads)
    base_dir = prepare_base(args.cache_dir, progress=console.print)
    for name in args.only or tuple(TASKS):
        task = TASKS[name]
        recipe = Recipe(args.steps or task.train_steps, seed=args.seed, heldout=args.heldout)
        card = train_specialist(task, base_dir, args.out, recipe, console)
        console.print(
            f"{name}: held-out accuracy {card['base_accuracy']:.0%} -> "
            f"{card['specialist_accuracy']:.0%} ({card['heldout_questions']} questions)"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
