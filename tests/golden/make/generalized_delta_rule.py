"""Golden cases of `generalized_delta_rule`, from flash-linear-attention's naive references."""

import numpy as np
from common import SEGMENT_IDS, draw, fla_naive, generator, log_decay, per_document, record, uniform

iplr = fla_naive("ops/generalized_delta_rule/iplr/naive.py").iplr_recurrence
dplr = fla_naive("ops/generalized_delta_rule/dplr/naive.py").dplr_recurrence

FLA = "fla-core 0.6.0 "
B, T, N, K, H, P = 2, 67, 2, 1, 5, 3


def sequences(name: str, num_key_heads: int = N):
    """As in RWKV-7, b is -a times rates, for a of (nearly) unit length."""
    rng = generator(name)
    heads = B, T, num_key_heads, H
    a = rng.normal(size=heads)
    a = np.round(a / np.linalg.norm(a, axis=-1, keepdims=True) * 64) / 64
    b = np.round(-a * uniform(rng, *heads, low=0.0, high=2.0) * 64) / 64
    inputs = {"q": draw(rng, *heads), "k": draw(rng, *heads), "v": draw(rng, B, T, N, P), "a": a, "b": b}
    return rng, inputs | {"state": draw(rng, B, N, H, P)}


def heads_first(*arrays):
    """The references want heads before tokens, and as many of keys as of values."""
    return [x.repeat_interleave(N // x.shape[2], dim=2).transpose(1, 2) for x in arrays]


def no_decay(q, k, v, a, b, state):
    o, state = iplr(*heads_first(q, k, v, a, b), initial_state=state)
    return {"o": o.transpose(1, 2), "state": state}


def run(q, k, v, a, b, g, state):
    if g.ndim == 3:
        g = g[..., None].expand(*g.shape, H)
    o, state = dplr(*heads_first(q, k, v, a, b, g), initial_state=state)
    return o.transpose(1, 2), state


def decay(q, k, v, a, b, g, state):
    o, state = run(q, k, v, a, b, g, state)
    return {"o": o, "state": state}


def packed(q, k, v, a, b, g, state):
    o, state = per_document(run, SEGMENT_IDS, state, q=q, k=k, v=v, a=a, b=b, g=g)
    return {"o": o, "state": state}


def main() -> None:
    constants = {"segment_ids": SEGMENT_IDS.numpy().astype("int32")}

    rng, inputs = sequences(name := "generalized_delta_rule_no_decay")
    record(name, no_decay, inputs, settings={}, source=FLA + "iplr_recurrence")

    source = FLA + "dplr_recurrence"
    rng, inputs = sequences(name := "generalized_delta_rule_token_decay", num_key_heads=K)
    inputs["g"] = log_decay(rng, B, T, N)
    record(name, decay, inputs, settings={}, source=source + ", keys repeated for each head, decays for each channel")

    rng, inputs = sequences(name := "generalized_delta_rule_channel_decay", num_key_heads=K)
    inputs["g"] = log_decay(rng, B, T, N, H)
    record(name, decay, inputs, settings={}, source=source + ", keys repeated for each head")

    rng, inputs = sequences(name := "generalized_delta_rule_channel_decay_packed")
    inputs["g"] = log_decay(rng, B, T, N, H)
    record(name, packed, inputs, settings={}, source=source + ", each document by itself", constants=constants)


if __name__ == "__main__":
    main()
