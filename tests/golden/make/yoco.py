"""Golden models: YOCO whole, tiny, in torch, from tokens to logits, with each of its two self-decoders.

Written from the paper (https://arxiv.org/abs/2405.05254, equations 1 to 8), head by head and without any cache: gated
retention in its parallel form, attention by a softmax over a mask. From its published code come a scale of the keys and
of the embeddings, the norm of the output, and which channels turn together. Documents run by themselves.
"""

import sys

import torch
from common import SEGMENT_IDS, generator, record
from parameters import parameters
from torch.nn import Embedding, Linear, Module, ModuleList, RMSNorm
from torch.nn.functional import logsigmoid, silu, softmax

V, D, F, L = 29, 24, 20, 4  # L layers, half of them a self-decoder.
EPS = 1e-6

SETTINGS = {
    "vocab_size": V,
    "dim": D,
    "hidden_dim": F,
    "n_layers": L,
    "n_self_heads": 3,
    "n_attn_heads": 4,
    "n_attn_kv_heads": 2,
    "rope_theta": 337.0,
    "norm_eps": EPS,
}
CASES = {"model_yoco_gated_retention": {"tau": 4.0}, "model_yoco_window": {"window": 7}}


def turn(x: torch.Tensor) -> torch.Tensor:
    """Multiplies channels 2i + 1j of `x [T H]` by e^(1j n angle_i) at position n."""
    T, H = x.shape
    angles = SETTINGS["rope_theta"] ** -torch.linspace(0, 1, H // 2, dtype=x.dtype)
    turns = torch.polar(torch.ones(T, H // 2, dtype=x.dtype), torch.arange(T)[:, None] * angles)
    pairs = torch.view_as_complex(x.reshape(T, H // 2, 2).contiguous())
    return torch.view_as_real(pairs * turns).reshape(T, H)


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int) -> torch.Tensor:
    """One head: `[T H]` of queries, keys and values; a token sees so many of the last, itself among them."""
    far = torch.arange(len(q))[:, None] - torch.arange(len(q))
    scores = (turn(q) @ turn(k).T / q.shape[1] ** 0.5).masked_fill((far < 0) | (far >= window), -torch.inf)
    return softmax(scores, dim=1) @ v


def split(x: torch.Tensor, num_heads: int) -> list[torch.Tensor]:
    return list(x.chunk(num_heads, dim=1))


class WindowAttention(Module):
    def __init__(self, window: int):
        super().__init__()
        self.window = window
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (Linear(D, D, bias=False) for _ in range(4))

    def forward(self, x):
        projected = (split(f(x), SETTINGS["n_self_heads"]) for f in (self.q_proj, self.k_proj, self.v_proj))
        heads = zip(*projected, strict=True)
        return self.out_proj(torch.cat([attend(q, k, v, self.window) for q, k, v in heads], dim=1))


class GatedRetention(Module):
    def __init__(self, tau: float):
        super().__init__()
        self.tau = tau
        self.q_proj, self.k_proj, self.v_proj, self.g_proj, self.out_proj = (Linear(D, D, bias=False) for _ in range(5))
        self.gt_proj = Linear(D, SETTINGS["n_self_heads"], bias=False)

    def forward(self, x):
        log_gamma = logsigmoid(self.gt_proj(x)) / self.tau
        projected = (split(f(x), SETTINGS["n_self_heads"]) for f in (self.q_proj, self.k_proj, self.v_proj))
        outputs = []
        for head, (q, k, v) in enumerate(zip(*projected, strict=True)):
            total = log_gamma[:, head].cumsum(0)
            decay = (total[:, None] - total).masked_fill(torch.ones(len(x), len(x)).triu(1).bool(), -torch.inf).exp()
            o = ((turn(q) @ turn(k).T / q.shape[1] ** 0.5) * decay) @ v
            outputs.append(o / (o.square().mean(1, keepdim=True) + EPS).sqrt())
        return self.out_proj(silu(self.g_proj(x)) * torch.cat(outputs, dim=1))


class CrossAttention(Module):
    def __init__(self):
        super().__init__()
        self.q_proj, self.out_proj = Linear(D, D, bias=False), Linear(D, D, bias=False)

    def forward(self, x, keys, values):
        N, K = SETTINGS["n_attn_heads"], SETTINGS["n_attn_kv_heads"]
        heads = [
            attend(q, keys[n * K // N], values[n * K // N], len(x)) for n, q in enumerate(split(self.q_proj(x), N))
        ]
        return self.out_proj(torch.cat(heads, dim=1))


class Layer(Module):
    def __init__(self, mixer: Module):
        super().__init__()
        self.mixer = mixer
        self.mixer_layer_norm, self.final_layer_norm = RMSNorm(D, eps=EPS), RMSNorm(D, eps=EPS)
        self.gate_proj, self.fc1, self.fc2 = (Linear(*sizes, bias=False) for sizes in ((D, F), (D, F), (F, D)))

    def forward(self, x, *shared):
        y = self.mixer(self.mixer_layer_norm(x), *shared) + x
        z = self.final_layer_norm(y)
        return self.fc2(silu(self.gate_proj(z)) * self.fc1(z)) + y


class YOCO(Module):
    def __init__(self, **self_attention):
        super().__init__()
        mixer = WindowAttention if "window" in self_attention else GatedRetention
        self.embed_tokens, self.output_projection = Embedding(V, D), Linear(D, V, bias=False)
        self.self_decoder = ModuleList([Layer(mixer(**self_attention)) for _ in range(L // 2)])
        width = D // SETTINGS["n_attn_heads"] * SETTINGS["n_attn_kv_heads"]
        self.kv_layer_norm = RMSNorm(D, eps=EPS)
        self.k_proj, self.v_proj = Linear(D, width, bias=False), Linear(D, width, bias=False)
        self.cross_decoder = ModuleList([Layer(CrossAttention()) for _ in range(L // 2)])
        self.layer_norm = RMSNorm(D, eps=EPS)

    def forward(self, tokens):
        """One document: tokens [T] to logits [T V]."""
        x = D**0.5 * self.embed_tokens(tokens)
        for layer in self.self_decoder:
            x = layer(x)
        normed = self.kv_layer_norm(x)
        keys, values = (split(f(normed), SETTINGS["n_attn_kv_heads"]) for f in (self.k_proj, self.v_proj))
        for layer in self.cross_decoder:
            x = layer(x, keys, values)
        return self.output_projection(self.layer_norm(x))


def main() -> None:
    tokens = torch.tensor(generator("yoco tokens").integers(1, V, size=SEGMENT_IDS.shape))
    for name in sys.argv[1:] or CASES:
        model = YOCO(**CASES[name])
        rng = generator(f"{name} parameters")
        inputs = {key: parameters(key, rng, p.shape) for key, p in model.named_parameters()}

        def run(model=model, **weights):
            logits = weights["output_projection.weight"].new_zeros(*SEGMENT_IDS.shape, V)
            for row, ids in enumerate(SEGMENT_IDS):
                for document in range(1, int(ids.max()) + 1):
                    where = torch.nonzero(ids == document)[:, 0]
                    logits[row, where] = torch.func.functional_call(model, weights, (tokens[row, where],))
            return {"logits": logits}

        record(
            name,
            run,
            inputs,
            settings=SETTINGS | CASES[name],
            source="written in torch from arXiv 2405.05254",
            constants={"tokens": tokens.numpy(), "segment_ids": SEGMENT_IDS.numpy()},
            zero_cotangents={"logits": (SEGMENT_IDS == 0).numpy()},
        )


if __name__ == "__main__":
    main()
