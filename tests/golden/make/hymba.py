"""Golden model: Hymba whole, tiny, in torch, from tokens to logits.

Written from the paper (https://arxiv.org/abs/2411.13676), head by head and token by token, without any cache; names and
details (norms of dt, B and C, values twice as wide as keys, the mean before one projection) are those of its published
code. Layers do not share keys and values. Documents run by themselves, each behind the meta tokens, whose outputs are
dropped.
"""

import torch
from common import generator, record
from parameters import parameters
from torch.nn import Conv1d, Embedding, Linear, Module, ModuleList, Parameter, RMSNorm
from torch.nn.functional import pad, silu, softmax, softplus

V, M, D, F, N, K = 29, 4, 16, 20, 4, 2
C, H, P = 2 * D, D // N, 2 * D // N  # Channels of Mamba; widths of keys and of values.
R, S, W = 3, 5, 4  # Rank of dt, state, convolution.
EPS = 1e-6

SETTINGS = {
    "vocab_size": V,
    "num_memory_tokens": M,
    "hidden_size": D,
    "intermediate_size": F,
    "num_attention_heads": N,
    "num_key_value_heads": K,
    "num_hidden_layers": 3,
    "global_attn_idx": [0, 2],
    "sliding_window": 7,
    "rope_theta": 337.0,
}
# With meta tokens. Padding on the left, between documents and on the right; one has a single token behind them.
SEGMENT_IDS = torch.tensor([[0] * 2 + [1] * 20 + [0] * 3 + [2] * 5 + [3] * 26 + [0] * 3, [1] * 39 + [2] * 20])


def turn(x: torch.Tensor) -> torch.Tensor:
    """Multiplies channels i + 1j (i + H / 2) of `x [T H]` by e^(1j n angle_i) at position n."""
    left, right = x.chunk(2, dim=1)
    angles = SETTINGS["rope_theta"] ** -(torch.arange(0, H, 2, dtype=x.dtype) / H)
    turns = torch.polar(torch.ones_like(left), torch.arange(len(x))[:, None] * angles)
    turned = torch.complex(left, right) * turns
    return torch.cat([turned.real, turned.imag], dim=1)


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int) -> torch.Tensor:
    """One head: a token sees so many of the last, itself among them, and all meta tokens up to itself."""
    far = torch.arange(len(q))[:, None] - torch.arange(len(q))
    seen = (far >= 0) & ((far < window) | (torch.arange(len(q)) < M))
    return softmax((turn(q) @ turn(k).T / H**0.5).masked_fill(~seen, -torch.inf), dim=1) @ v


class HymbaBlock(Module):
    def __init__(self, window: int | None):
        super().__init__()
        self.window = window
        self.in_proj = Linear(D, N * H + K * H + K * P + 2 * C, bias=False)
        self.conv1d = Conv1d(C, C, W, groups=C)
        self.x_proj, self.dt_proj = Linear(C, R + 2 * S, bias=False), Linear(R, C)
        self.A_log, self.D = Parameter(torch.empty(C, S)), Parameter(torch.empty(C))
        self.dt_layernorm, self.B_layernorm, self.C_layernorm = (RMSNorm(size, eps=EPS) for size in (R, S, S))
        self.pre_avg_layernorm1, self.pre_avg_layernorm2 = RMSNorm(C, eps=EPS), RMSNorm(C, eps=EPS)
        self.out_proj = Linear(C, D, bias=False)

    def forward(self, x):
        q, k, v, u, gate = self.in_proj(x).split([N * H, K * H, K * P, C, C], dim=1)
        window = len(x) if self.window is None else self.window
        q, k, v = q.chunk(N, dim=1), k.chunk(K, dim=1), v.chunk(K, dim=1)
        heads = [attend(q[n], k[n * K // N], v[n * K // N], window) for n in range(N)]
        mean = self.pre_avg_layernorm1(torch.cat(heads, dim=1)) + self.pre_avg_layernorm2(self.scan(u, gate))
        return self.out_proj(mean / 2)

    def scan(self, u, gate):
        u = silu(self.conv1d(pad(u.T, (W - 1, 0))).T)
        dt, k, q = self.x_proj(u).split([R, S, S], dim=1)
        dt, k, q = softplus(self.dt_proj(self.dt_layernorm(dt))), self.B_layernorm(k), self.C_layernorm(q)
        h, outputs = u.new_zeros(C, S), []
        for t in range(len(u)):
            decay = (-self.A_log.exp() * dt[t, :, None]).exp()
            h = decay * h + (dt[t] * u[t])[:, None] * k[t]
            outputs.append(h @ q[t] + self.D * u[t])
        return torch.stack(outputs) * silu(gate)


class Layer(Module):
    def __init__(self, window: int | None):
        super().__init__()
        self.mamba = HymbaBlock(window)
        self.input_layernorm, self.pre_moe_layernorm = RMSNorm(D, eps=EPS), RMSNorm(D, eps=EPS)
        self.gate_proj, self.up_proj, self.down_proj = (
            Linear(*sizes, bias=False) for sizes in ((D, F), (D, F), (F, D))
        )

    def forward(self, x):
        x = x + self.mamba(self.input_layernorm(x))
        y = self.pre_moe_layernorm(x)
        return x + self.down_proj(silu(self.gate_proj(y)) * self.up_proj(y))


class Hymba(Module):
    def __init__(self):
        super().__init__()
        self.embed_tokens, self.memory_tokens = Embedding(V, D), Parameter(torch.empty(M, D))
        windows = [None if i in SETTINGS["global_attn_idx"] else SETTINGS["sliding_window"] for i in range(3)]
        self.layers = ModuleList([Layer(window) for window in windows])
        self.final_layernorm = RMSNorm(D, eps=EPS)

    def forward(self, tokens):
        """One document: tokens [T] to logits [T V]; the head is the embedding."""
        x = torch.cat([self.memory_tokens, self.embed_tokens(tokens)])
        for layer in self.layers:
            x = layer(x)
        return self.final_layernorm(x)[M:] @ self.embed_tokens.weight.T


def main() -> None:
    tokens = torch.tensor(generator("hymba tokens").integers(1, V, size=SEGMENT_IDS.shape))
    is_text = SEGMENT_IDS > 0
    documents = []
    for row, ids in enumerate(SEGMENT_IDS):
        for document in range(1, int(ids.max()) + 1):
            where = torch.nonzero(ids == document)[:, 0]
            tokens[row, where[:M]] = torch.arange(V, V + M)
            is_text[row, where[:M]] = False
            documents.append((row, where[M:]))
    model = Hymba()
    rng = generator("model_hymba parameters")

    def run(**weights):
        logits = weights["embed_tokens.weight"].new_zeros(*SEGMENT_IDS.shape, V)
        for row, where in documents:
            logits[row, where] = torch.func.functional_call(model, weights, (tokens[row, where],))
        return {"logits": logits}

    record(
        "model_hymba",
        run,
        {key: parameters(key, rng, p.shape) for key, p in model.named_parameters()},
        settings=SETTINGS,
        source="written in torch from arXiv 2411.13676",
        constants={"tokens": tokens.numpy(), "segment_ids": SEGMENT_IDS.numpy()},
        zero_cotangents={"logits": (~is_text).numpy()},
    )


if __name__ == "__main__":
    main()
