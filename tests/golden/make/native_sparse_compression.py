"""Golden layer: native sparse attention whose compressed keys a network makes, in torch, one query at a time.

Written from the paper (https://arxiv.org/abs/2502.11089, equations 5 and 7 to 12), with blocks that overlap, around the
rotation of transformers' Llama. What the paper leaves open: keys are compressed rotated, the network has one hidden
layer with SiLU and an encoding of positions that is added, and branches share keys, as in flash-linear-attention.
"""

import torch
from common import draw, generator, module_case
from parameters import parameters
from torch.nn import Linear, ModuleList, Parameter
from torch.nn.functional import silu
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
    "compression_block_size": 6,
    "compression_stride": 2,
    "compression_hidden": 5,
    "rope_theta": 337.0,
}
N, K, H = (SETTINGS[name] for name in ("num_heads", "num_kv_heads", "head_dim"))
SIZE, COUNT = SETTINGS["block_size"], SETTINGS["block_counts"]
LENGTH, STRIDE, HIDDEN = (SETTINGS[f"compression_{name}"] for name in ("block_size", "stride", "hidden"))


class Phi(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.positions = Parameter(torch.zeros(LENGTH, H))
        self.up = Linear(LENGTH * H, HIDDEN, bias=False)
        self.down = Linear(HIDDEN, H, bias=False)

    def forward(self, block):
        return self.down(silu(self.up((block + self.positions).reshape(-1))))


class NativeSparseAttention(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj = Linear(D, N * H, bias=False)
        self.k_proj = Linear(D, K * H, bias=False)
        self.v_proj = Linear(D, K * H, bias=False)
        self.g_proj = Linear(D, N * 3, bias=False)
        self.o_proj = Linear(N * H, D, bias=False)
        self.k_phi = ModuleList([Phi() for _ in range(K)])
        self.v_phi = ModuleList([Phi() for _ in range(K)])

    def forward(self, x):
        rope = {"rope_type": "default", "rope_theta": SETTINGS["rope_theta"]}
        rotary = LlamaRotaryEmbedding(config=LlamaConfig(head_dim=H, rope_parameters=rope))
        q, k = self.q_proj(x).view(B, T, N, H), self.k_proj(x).view(B, T, K, H)
        q, k = apply_rotary_pos_emb(q, k, *rotary(q, torch.arange(T)[None]), unsqueeze_dim=2)
        v, gates = self.v_proj(x).view(B, T, K, H), self.g_proj(x).view(B, T, N, 3).sigmoid()
        rows = []
        for b in range(B):
            groups = [self.group(q[b], k[b, :, head], v[b, :, head], gates[b], head) for head in range(K)]
            rows.append(torch.cat(groups, dim=1).reshape(T, N * H))
        return self.o_proj(torch.stack(rows))

    def group(self, q, k, v, gates, head):
        """The query heads of one key/value head: `[T N/K H]`."""
        starts = range(0, T - LENGTH + 1, STRIDE)
        k_cmp = [self.k_phi[head](k[i : i + LENGTH]) for i in starts]
        v_cmp = [self.v_phi[head](v[i : i + LENGTH]) for i in starts]
        heads, outputs = range(head * (N // K), (head + 1) * (N // K)), []
        for t in range(T):
            num_seen = len([i for i in starts if i + LENGTH <= t + 1])
            compressed, shares = [], []
            for n in heads:
                p = torch.softmax(attend(q[t, n], k_cmp[:num_seen]), dim=0) if num_seen else torch.zeros(0)
                compressed.append(p @ torch.stack(v_cmp[:num_seen]) if num_seen else torch.zeros(H))
                shares.append(p)
            p = sum(shares)
            blocks = [range(j * SIZE, min((j + 1) * SIZE, t + 1)) for j in choose(p, t // SIZE)]
            chosen = [s for block in blocks for s in block]
            near = list(range(max(t - SETTINGS["window_size"] + 1, 0), t + 1))
            row = []
            for n, o in zip(heads, compressed, strict=True):
                selected, window = (torch.softmax(attend(q[t, n], k[at]), dim=0) @ v[at] for at in (chosen, near))
                row.append(gates[t, n, 0] * o + gates[t, n, 1] * selected + gates[t, n, 2] * window)
            outputs.append(torch.stack(row))
        return torch.stack(outputs)


def attend(q, keys):
    return (keys if isinstance(keys, torch.Tensor) else torch.stack(keys)) @ q / H**0.5


def choose(p_cmp, own):
    """The first block, a query's own, the one before, and the best of the others by equation 9, in order."""
    at = lambda i: p_cmp[i - 1].item() if 1 <= i <= len(p_cmp) else 0.0  # Counted from 1, as in the paper.
    share = lambda j: sum(
        at(SIZE // STRIDE * j - m - n) for m in range(SIZE // STRIDE) for n in range(LENGTH // STRIDE)
    )
    fixed = {0, max(own - 1, 0), own}
    others = sorted((j for j in range(own) if j not in fixed), key=lambda j: share(j + 1), reverse=True)
    return sorted(fixed | set(others[: COUNT - 3]))


def main() -> None:
    module_case(
        "layer_native_sparse_compression",
        NativeSparseAttention,
        lambda apply, x: apply(x),
        draw(generator("layer_native_sparse_compression"), B, T, D),
        parameters,
        settings=SETTINGS,
        source="written in torch from arXiv 2502.11089",
    )


if __name__ == "__main__":
    main()
