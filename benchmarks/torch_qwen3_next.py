"""The PyTorch half of `benchmarks/cpu.py`: transformers' Qwen3-Next without experts, trained and sampled on a CPU.

Runs under an interpreter of its own (tests/golden/make/README.md says how to make one). Takes the sizes as JSON and
prints one line of JSON:

    {"versions": {...}, "num_parameters": int, "seconds": {"train": [...], "tiny_step": [...], "decode_8": [...]}}

with one number per measurement: seconds of one training step of `batch_size * seq_len` tokens, of one of a tiny model,
and of `decode_tokens` decoding steps after a prompt, at batch 8.
"""

# pyright: reportMissingImports=false
import argparse
import json
import os
import platform
import time
from collections.abc import Callable
from typing import Any

import torch
import transformers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", required=True, type=json.loads, help="the fields of benchmarks.cpu.Sizes")
    parser.add_argument("--tiny-sizes", required=True, type=json.loads, help="the same, of the model of the tiny steps")
    parser.add_argument("--decode-batch-sizes", required=True, type=json.loads)
    parser.add_argument("--num-measurements", required=True, type=int)
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.manual_seed(0)

    model, tiny_model = build(args.sizes), build(args.tiny_sizes)
    seconds = {
        "train": measure(training_step(model, args.sizes), args.num_measurements),
        "tiny_step": measure(training_step(tiny_model, args.tiny_sizes), 10 * args.num_measurements),
    }
    for batch_size in args.decode_batch_sizes:
        seconds[f"decode_{batch_size}"] = measure(decoding(model, args.sizes, batch_size), args.num_measurements)
    result = {
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "num_parameters": sum(p.numel() for p in model.parameters()),
        "seconds": seconds,
    }
    print(json.dumps(result))


def build(sizes: dict[str, Any]) -> torch.nn.Module:
    """Returns a model of one Gated DeltaNet layer and one layer of attention, float32."""
    config = transformers.Qwen3NextConfig(
        vocab_size=sizes["vocab_size"],
        hidden_size=sizes["d_model"],
        intermediate_size=sizes["d_ff"],
        num_hidden_layers=2,
        layer_types=["linear_attention", "full_attention"],
        linear_num_key_heads=sizes["num_key_heads"],
        linear_num_value_heads=sizes["num_value_heads"],
        linear_key_head_dim=sizes["key_dim"],
        linear_value_head_dim=sizes["value_dim"],
        linear_conv_kernel_dim=4,
        num_attention_heads=sizes["num_heads"],
        num_key_value_heads=sizes["num_kv_heads"],
        head_dim=sizes["head_dim"],
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.25},
        max_position_embeddings=sizes["seq_len"],
        # Dense feed-forward networks.
        num_experts=0,
        mlp_only_layers=[0, 1],
        tie_word_embeddings=True,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
        # torch's own fused kernel: the fastest that runs on a CPU.
        attn_implementation="sdpa",
    )
    return transformers.Qwen3NextForCausalLM(config).to(torch.float32)


def training_step(model: torch.nn.Module, sizes: dict[str, Any]) -> Callable[[], None]:
    """Returns a function that takes one step of AdamW on random tokens."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    tokens = torch.randint(sizes["vocab_size"], (sizes["batch_size"], sizes["seq_len"] + 1))

    def step() -> None:
        logits = model(tokens[:, :-1], use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        assert torch.isfinite(loss)

    return step


def decoding(model: torch.nn.Module, sizes: dict[str, Any], batch_size: int) -> Callable[[], float]:
    """Returns a function that reads a prompt, then decodes greedily, and says how long the decoding took."""
    model.eval()
    prompt = torch.randint(sizes["vocab_size"], (batch_size, sizes["prompt_tokens"]))

    @torch.inference_mode()
    def decode() -> float:
        output = model(prompt, use_cache=True)
        tokens = output.logits[:, -1:].argmax(-1)
        start = time.perf_counter()
        for _ in range(sizes["decode_tokens"]):
            output = model(tokens, past_key_values=output.past_key_values, use_cache=True)
            tokens = output.logits[:, -1:].argmax(-1)
        return time.perf_counter() - start

    return decode


def measure(run: Callable[[], float | None], num_measurements: int) -> list[float]:
    """Returns seconds per call after one call that warms up: those that `run` returns, or those that it takes."""
    seconds = []
    for _ in range(num_measurements + 1):
        start = time.perf_counter()
        own = run()
        seconds.append(time.perf_counter() - start if own is None else own)
    return seconds[1:]


if __name__ == "__main__":
    main()
