"""Golden layer: flash-linear-attention's `NativeSparseAttention` around its naive functions of each branch.

Its naive whole asks for Triton's pooling and for flash-attn's window: these two, and the rotation, are torch's here.
"""

import interpreter  # noqa: F401, before the kernels
import torch
from common import draw, fla_naive, generator, module_case
from fla.layers import nsa
from parameters import parameters
from torch.nn.functional import scaled_dot_product_attention
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

B, T, D = 2, 67, 16

SETTINGS = {
    "hidden_size": D,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 6,
    "block_size": 8,
    "block_counts": 4,
    "window_size": 11,
    "rope_theta": 337.0,
}

naive = fla_naive("ops/nsa/naive.py")


class Rotary(torch.nn.Module):
    def forward(self, q, k, **_):
        rope = {"rope_type": "default", "rope_theta": SETTINGS["rope_theta"]}
        rotary = LlamaRotaryEmbedding(config=LlamaConfig(head_dim=q.shape[3], rope_parameters=rope))
        return apply_rotary_pos_emb(q, k, *rotary(q, torch.arange(T)[None]), unsqueeze_dim=2)


def sparse(q, k, v, g_cmp, g_slc, g_swa, block_size, block_counts, window_size, cu_seqlens):
    assert cu_seqlens is None
    scale, whole = q.shape[3] ** -0.5, T // block_size * block_size
    k_cmp, v_cmp = (x[:, :whole].unflatten(1, (-1, block_size)).mean(2) for x in (k, v))
    # A last block that is not full: no query sees its mean, but the choice may be of it.
    k_cmp, v_cmp = (torch.cat([c, x[:, whole:].mean(1, keepdim=True)], dim=1) for c, x in ((k_cmp, k), (v_cmp, v)))
    ids = naive.naive_nsa_topk(q, k_cmp, block_counts, block_size, scale)
    compressed, _ = naive.naive_nsa_compression(q, k_cmp, v_cmp, block_size, scale)
    selected = naive.naive_nsa_selection(q, k, v, ids, block_size, scale)
    behind = torch.arange(T)[:, None] - torch.arange(T)
    heads_first = (x.transpose(1, 2) for x in (q, k, v))
    near = scaled_dot_product_attention(
        *heads_first, attn_mask=(behind >= 0) & (behind < window_size), enable_gqa=True
    ).transpose(1, 2)
    branches = (g_cmp, compressed), (g_slc, selected), (g_swa, near)
    return sum(gate[..., None] * o for gate, o in branches)


def build():
    layer = nsa.NativeSparseAttention(**SETTINGS)
    layer.rotary = Rotary()
    return layer


def main() -> None:
    nsa.parallel_nsa = sparse
    module_case(
        "layer_native_sparse_attention",
        build,
        lambda apply, x: apply(x)[0],
        draw(generator("layer_native_sparse_attention"), B, T, D),
        parameters,
        settings=SETTINGS,
        source="flash-linear-attention 0.6.0 NativeSparseAttention with naive_nsa_{topk,compression,selection}",
    )


if __name__ == "__main__":
    main()
