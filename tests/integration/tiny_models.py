"""Small random Llama models with a byte-level tokenizer, written as a hub folder would look."""

from __future__ import annotations

from pathlib import Path

CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def write_tiny_llama(folder: Path, *, seed: int, tied: bool, hidden: int = 128) -> Path:
    """A two-layer Llama with random float32 weights drawn from ``seed``."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    tokenizer = byte_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=2,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
        max_position_embeddings=512,
        tie_word_embeddings=tied,
        initializer_range=0.3,  # far enough from zero for greedy answers to differ
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def quantise(folder: Path, *, bits: int) -> Path:
    """Turn a tiny Llama's linear weights into compressed-tensors integers, in place.

    ``bits`` 4: weights only, groups of 32, packed eight to a word (W4A16). 8: one scale per output
    channel, activations quantised as they come (W8A8).
    """
    import json

    import torch
    from safetensors.torch import load_file, save_file

    file = folder / "model.safetensors"
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(file).items():
        if "_proj." in name:
            tensors |= _integers(name.removesuffix("weight"), tensor, bits)
        else:
            tensors[name] = tensor.bfloat16()
    save_file(tensors, file, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["dtype"] = "bfloat16"
    config["quantization_config"] = _compressed_tensors(bits)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def _integers(prefix: str, weight, bits: int):  # type: ignore[no-untyped-def]
    import torch

    outputs, inputs = weight.shape
    group = 32 if bits == 4 else inputs
    top = 2 ** (bits - 1) - 1
    grouped = weight.float().view(outputs, inputs // group, group)
    scale = grouped.abs().amax(-1, keepdim=True) / top
    whole = (grouped / scale).round().clamp(-top - 1, top).view(outputs, inputs).to(torch.int64)
    if bits == 8:
        return {f"{prefix}weight": whole.to(torch.int8), f"{prefix}weight_scale": scale.squeeze(-1)}
    places = torch.arange(8) * 4
    words = ((whole + 8).view(outputs, inputs // 8, 8) << places).sum(-1)
    return {
        f"{prefix}weight_packed": torch.where(words >= 2**31, words - 2**32, words).int(),
        f"{prefix}weight_scale": scale.squeeze(-1).bfloat16(),
        f"{prefix}weight_shape": torch.tensor([outputs, inputs]),
    }


def _compressed_tensors(bits: int) -> dict[str, object]:
    weights = {"num_bits": bits, "type": "int", "symmetric": True, "dynamic": False}
    inputs = None
    if bits == 4:
        weights |= {"strategy": "group", "group_size": 32}
    else:
        weights |= {"strategy": "channel"}
        inputs = {**weights, "strategy": "token", "dynamic": True}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized" if bits == 4 else "int-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }


def byte_tokenizer():  # type: ignore[no-untyped-def]
    """One token per byte plus the two specials: no training, no download."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: at for at, token in enumerate(["<s>", "</s>", *alphabet])}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token="<s>",
        eos_token="</s>",
        chat_template=CHAT_TEMPLATE,
    )
