"""Golden layer: LoLCATs, in torch, with all T x T weights of both of its attentions.

Written from the paper (https://arxiv.org/abs/2410.10254) and the semantics of its published code with the window that
slides, `hybrid_attention_quadratic`: rotation first, features of each query head, the window's scores less the largest,
a learned factor of the window's weights and none of the others. The rotation is that of transformers' Llama.
"""

import torch
from common import draw, generator, module_case
from parameters import parameters
from torch.nn import Linear, Parameter
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

B, T, D = 2, 67, 16

SETTINGS = {
    "hidden_size": D,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 6,
    "feature_dim": 5,
    "window_size": 8,
    "rope_theta": 337.0,
}


class LoLCATs(torch.nn.Module):
    def __init__(self):
        super().__init__()
        N, K, H, F = (SETTINGS[name] for name in ("num_heads", "num_kv_heads", "head_dim", "feature_dim"))
        self.q_proj = Linear(D, N * H, bias=False)
        self.k_proj = Linear(D, K * H, bias=False)
        self.v_proj = Linear(D, K * H, bias=False)
        self.o_proj = Linear(N * H, D, bias=False)
        self.q_map = Parameter(torch.zeros(N, H, F))
        self.k_map = Parameter(torch.zeros(N, H, F))
        self.window_factors = Parameter(torch.zeros(N))

    def forward(self, x):
        N, K, H = (SETTINGS[name] for name in ("num_heads", "num_kv_heads", "head_dim"))
        rope = {"rope_type": "default", "rope_theta": SETTINGS["rope_theta"]}
        rotary = LlamaRotaryEmbedding(config=LlamaConfig(head_dim=H, rope_parameters=rope))
        q, k = self.q_proj(x).view(B, T, N, H), self.k_proj(x).view(B, T, K, H)
        q, k = apply_rotary_pos_emb(q, k, *rotary(q, torch.arange(T)[None]), unsqueeze_dim=2)
        v = self.v_proj(x).view(B, T, K, H)
        heads = []
        for n in range(N):
            kv = n // (N // K)
            heads.append(self.attend(n, q[:, :, n], k[:, :, kv], v[:, :, kv]))
        return self.o_proj(torch.cat(heads, dim=-1))

    def attend(self, n, q, k, v):
        """One head: `[B T H]` of queries, keys and values."""
        distance = torch.arange(T)[:, None] - torch.arange(T)
        near = (distance >= 0) & (distance < SETTINGS["window_size"])
        far = distance >= SETTINGS["window_size"]
        scores = (q @ k.mT * SETTINGS["head_dim"] ** -0.5).masked_fill(~near, -torch.inf)
        softmax = torch.sigmoid(self.window_factors[n]) * torch.exp(scores - scores.amax(-1, keepdim=True))
        linear = (features(q @ self.q_map[n]) @ features(k @ self.k_map[n]).mT).masked_fill(~far, 0)
        weights = softmax + linear
        return weights @ v / weights.sum(-1, keepdim=True)


def features(x):
    return torch.cat([torch.softmax(x, dim=-1), torch.softmax(-x, dim=-1)], dim=-1)


def main() -> None:
    module_case(
        "layer_lolcats",
        LoLCATs,
        lambda apply, x: apply(x),
        draw(generator("layer_lolcats"), B, T, D),
        parameters,
        settings=SETTINGS,
        source="written in torch from arXiv 2410.10254",
    )


if __name__ == "__main__":
    main()
