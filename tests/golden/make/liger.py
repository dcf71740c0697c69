"""Golden layer: Liger with gated linear attention, in torch, its state token by token and its window's T x T scores.

Written from the paper (https://arxiv.org/abs/2503.01496) and the semantics of its published code: half of a softmax
over the window, rotated; half of linear attention of softmax(q) and softmax(k), not rotated, with decays
log_sigmoid(k) / 16. The rotation is that of transformers' Llama.
"""

import torch
from common import draw, generator, module_case
from parameters import parameters
from torch.nn import Linear
from torch.nn.functional import logsigmoid
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

B, T, D = 2, 67, 16

SETTINGS = {
    "hidden_size": D,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 6,
    "window_size": 8,
    "rope_theta": 337.0,
}


class Liger(torch.nn.Module):
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
        v = self.v_proj(x).view(B, T, K, H)
        turned_q, turned_k = apply_rotary_pos_emb(q, k, *rotary(q, torch.arange(T)[None]), unsqueeze_dim=2)
        heads = []
        for n in range(N):
            kv = n // (N // K)
            near = window(turned_q[:, :, n], turned_k[:, :, kv], v[:, :, kv])
            heads.append(0.5 * near + 0.5 * linear(q[:, :, n], k[:, :, kv], v[:, :, kv]))
        return self.o_proj(torch.cat(heads, dim=-1))


def window(q, k, v):
    distance = torch.arange(T)[:, None] - torch.arange(T)
    is_seen = (distance >= 0) & (distance < SETTINGS["window_size"])
    scores = (q @ k.mT * SETTINGS["head_dim"] ** -0.5).masked_fill(~is_seen, -torch.inf)
    return torch.softmax(scores, dim=-1) @ v


def linear(q, k, v):
    decay, q, k = torch.exp(logsigmoid(k) / 16), torch.softmax(q, dim=-1), torch.softmax(k, dim=-1)
    state, outputs = torch.zeros(B, q.shape[-1], v.shape[-1], dtype=q.dtype), []
    for t in range(T):
        state = decay[:, t, :, None] * state + k[:, t, :, None] * v[:, t, None, :]
        outputs.append((q[:, t, :, None] * state).sum(1))
    return torch.stack(outputs, dim=1)


def main() -> None:
    module_case(
        "layer_liger",
        Liger,
        lambda apply, x: apply(x),
        draw(generator("layer_liger"), B, T, D),
        parameters,
        settings=SETTINGS,
        source="written in torch from arXiv 2503.01496",
    )


if __name__ == "__main__":
    main()
