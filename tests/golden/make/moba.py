"""Golden layer: mixture of block attention, in torch, one query at a time.

Written from the paper (https://arxiv.org/abs/2502.13189, equations 2 to 8), which takes a block by the mean of its keys
and counts a query's own block among those that it takes, around the rotation of transformers' Llama.
"""

import torch
from common import draw, generator, module_case
from parameters import parameters
from torch.nn import Linear
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

B, T, D = 2, 67, 16

SETTINGS = {
    "hidden_size": D,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 6,
    "block_size": 8,
    "top_k": 3,
    "rope_theta": 337.0,
}


class MoBA(torch.nn.Module):
    def __init__(self):
        super().__init__()
        N, K, H = (SETTINGS[name] for name in ("num_heads", "num_kv_heads", "head_dim"))
        self.q_proj = Linear(D, N * H, bias=False)
        self.k_proj = Linear(D, K * H, bias=False)
        self.v_proj = Linear(D, K * H, bias=False)
        self.o_proj = Linear(N * H, D, bias=False)

    def forward(self, x):
        N, K, H = (SETTINGS[name] for name in ("num_heads", "num_kv_heads", "head_dim"))
        rope = {"rope_type": "default", "rope_theta": SETTINGS["rope_theta"]}
        rotary = LlamaRotaryEmbedding(config=LlamaConfig(head_dim=H, rope_parameters=rope))
        q, k = self.q_proj(x).view(B, T, N, H), self.k_proj(x).view(B, T, K, H)
        q, k = apply_rotary_pos_emb(q, k, *rotary(q, torch.arange(T)[None]), unsqueeze_dim=2)
        v = self.v_proj(x).view(B, T, K, H)
        rows = []
        for b in range(B):
            heads = [attend(q[b, :, n], k[b, :, n // (N // K)], v[b, :, n // (N // K)]) for n in range(N)]
            rows.append(torch.cat(heads, dim=-1))
        return self.o_proj(torch.stack(rows))


def attend(q, k, v):
    """One head: `[T H]` of queries, keys and values."""
    size, outputs = SETTINGS["block_size"], []
    for t in range(T):
        own = t // size
        means = [k[c * size : (c + 1) * size].mean(0) for c in range(own)]
        likes = torch.tensor([(q[t] @ mean).item() for mean in means])
        best = likes.topk(min(SETTINGS["top_k"] - 1, own)).indices.tolist()
        seen = [s for c in sorted(best) for s in range(c * size, (c + 1) * size)] + list(range(own * size, t + 1))
        weights = torch.softmax(k[seen] @ q[t] / SETTINGS["head_dim"] ** 0.5, dim=0)
        outputs.append(weights @ v[seen])
    return torch.stack(outputs)


def main() -> None:
    module_case(
        "layer_moba",
        MoBA,
        lambda apply, x: apply(x),
        draw(generator("layer_moba"), B, T, D),
        parameters,
        settings=SETTINGS,
        source="written in torch from arXiv 2502.13189",
    )


if __name__ == "__main__":
    main()
