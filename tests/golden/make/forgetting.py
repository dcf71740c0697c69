"""Golden cases of forget gates: flash-linear-attention's naive function, and its layer around it."""

import interpreter  # noqa: F401, before the kernels
import torch
from common import draw, fla_naive, generator, log_decay, module_case, record
from fla.layers import forgetting_attn
from parameters import parameters

B, T, N, K, H = 2, 67, 4, 2, 6
D = 16

SETTINGS = {"hidden_size": D, "num_heads": 4, "num_kv_heads": 2, "use_output_gate": True}

naive = fla_naive("ops/forgetting_attn/naive.py").naive_forgetting_attn


def forget(q, k, v, g):
    """The log-sum-exp, which the reference does not return, is of the logits that its softmax sees."""
    logits = torch.einsum("bthd,bshd->bhts", q, k.repeat_interleave(N // K, dim=2)) * H**-0.5
    c = g.cumsum(1).transpose(1, 2)
    logits = logits + c[..., :, None] - c[..., None, :]
    later = torch.ones(T, T, dtype=torch.bool).triu(1)
    return {"o": naive(q, k, v, g), "lse": torch.logsumexp(logits.masked_fill(later, -torch.inf), dim=-1)}


def main() -> None:
    rng = generator(name := "attention_forget")
    shapes = {"q": (B, T, N, H), "k": (B, T, K, H), "v": (B, T, K, H)}
    inputs = {key: draw(rng, *shape) for key, shape in shapes.items()} | {"g": log_decay(rng, B, T, N)}
    record(name, forget, inputs, settings={}, source="flash-linear-attention 0.6.0 naive_forgetting_attn")

    # The layer's own arithmetic is PyTorch's; only this kernel is not, and it does not do float64.
    forgetting_attn.parallel_forgetting_attn = lambda q, k, v, f, cu_seqlens: naive(q, k, v, f)
    module_case(
        "layer_forgetting_attention",
        lambda: forgetting_attn.ForgettingAttention(**SETTINGS),
        lambda apply, x: apply(x)[0],
        draw(generator("layer_forgetting_attention"), B, T, D),
        parameters,
        settings=SETTINGS,
        source="flash-linear-attention 0.6.0 ForgettingAttention with naive_forgetting_attn",
    )


if __name__ == "__main__":
    main()
