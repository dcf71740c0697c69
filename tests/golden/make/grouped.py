"""Golden layers: grouped-tied and grouped latent attention, in torch.

Written from the paper (https://arxiv.org/abs/2505.21487, sections 3.3 and 3.4) and the semantics of its published code
(`modeling_llama_GTA.py`, `modeling_llama_GLA.py` of Dao-AILab/grouped-latent-attention, which need Hopper's kernels),
around the rotation of transformers' Llama and torch's attention. Head by head: nothing is absorbed, nothing shared.
"""

import torch
from common import draw, generator, module_case
from parameters import parameters
from torch.nn import Linear, RMSNorm
from torch.nn.functional import scaled_dot_product_attention
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

B, T, D = 2, 67, 12

TIED = {"hidden_size": D, "num_heads": 4, "num_kv_heads": 2, "head_dim": 10, "rope_dim": 6, "rope_theta": 337.0}
LATENT = {
    "hidden_size": D,
    "num_heads": 4,
    "query_rank": 9,
    "latent_dim": 7,
    "head_dim": 5,
    "rope_dim": 6,
    "rope_theta": 337.0,
}


def turn(q, k, settings):
    """Rotates `[B T heads rope_dim]`."""
    rope = {"rope_type": "default", "rope_theta": settings["rope_theta"]}
    rotary = LlamaRotaryEmbedding(config=LlamaConfig(head_dim=settings["rope_dim"], rope_parameters=rope))
    return apply_rotary_pos_emb(q, k, *rotary(q, torch.arange(T)[None]), unsqueeze_dim=2)


def attend(heads):
    """Runs each `(q, k, v)` of `[B T width]` by itself."""
    return torch.cat([scaled_dot_product_attention(q, k, v, is_causal=True) for q, k, v in heads], dim=-1)


class GroupedTied(torch.nn.Module):
    def __init__(self):
        super().__init__()
        N, K, H, R = (TIED[name] for name in ("num_heads", "num_kv_heads", "head_dim", "rope_dim"))
        self.q_proj = Linear(D, N * H, bias=False)
        self.kv_proj = Linear(D, K * H, bias=False)
        self.W_rope_k = Linear(D, R, bias=False)
        self.o_proj = Linear(N * H, D, bias=False)

    def forward(self, x):
        N, K, H, R = (TIED[name] for name in ("num_heads", "num_kv_heads", "head_dim", "rope_dim"))
        q, kv = self.q_proj(x).view(B, T, N, H), self.kv_proj(x).view(B, T, K, H)
        q_rope, k_rope = turn(q[..., H - R :], self.W_rope_k(x)[:, :, None], TIED)
        heads = []
        for n in range(N):
            tied = kv[:, :, n // (N // K)]
            query = torch.cat([q[:, :, n, : H - R], q_rope[:, :, n]], dim=-1)
            heads.append((query, torch.cat([tied[..., : H - R], k_rope[:, :, 0]], dim=-1), tied))
        return self.o_proj(attend(heads))


class GroupedLatent(torch.nn.Module):
    def __init__(self):
        super().__init__()
        N, U, R, H, rope = (LATENT[name] for name in ("num_heads", "query_rank", "latent_dim", "head_dim", "rope_dim"))
        self.W_dQ, self.q_norm = Linear(D, U, bias=False), RMSNorm(U, eps=1e-6)
        self.W_uQ_rope = Linear(U, N * (H + rope), bias=False)
        self.W_dKV = Linear(D, 2 * R + rope, bias=False)
        self.kv_norm_1, self.kv_norm_2 = RMSNorm(R, eps=1e-6), RMSNorm(R, eps=1e-6)
        self.W_ukv_1, self.W_ukv_2 = Linear(R, N * H, bias=False), Linear(R, N * H, bias=False)
        self.o_proj = Linear(N * H, D, bias=False)

    def forward(self, x):
        N, R, H, rope = (LATENT[name] for name in ("num_heads", "latent_dim", "head_dim", "rope_dim"))
        q = self.W_uQ_rope(self.q_norm(self.W_dQ(x))).view(B, T, N, H + rope)
        first, second, k_rope = self.W_dKV(x).split([R, R, rope], dim=-1)
        q_rope, k_rope = turn(q[..., H:], k_rope[:, :, None], LATENT)
        expanded = [self.W_ukv_1(self.kv_norm_1(first)), self.W_ukv_2(self.kv_norm_2(second))]
        kv = torch.cat([part.view(B, T, N // 2, 2 * H) for part in expanded], dim=2)
        heads = []
        for n in range(N):
            query = torch.cat([q[:, :, n, :H], q_rope[:, :, n]], dim=-1)
            heads.append((query, torch.cat([kv[:, :, n, :H], k_rope[:, :, 0]], dim=-1), kv[:, :, n, H:]))
        return self.o_proj(attend(heads))


def main() -> None:
    for name, layer, settings in (
        ("layer_grouped_tied_attention", GroupedTied, TIED),
        ("layer_grouped_latent_attention", GroupedLatent, LATENT),
    ):
        module_case(
            name,
            layer,
            lambda apply, x: apply(x),
            draw(generator(name), B, T, D),
            parameters,
            settings=settings,
            source="written in torch from arXiv 2505.21487",
        )


if __name__ == "__main__":
    main()
