"""Golden cases of `linear_attention`, from flash-linear-attention's naive references."""

import torch
from common import SEGMENT_IDS, double_precision, draw, fla_naive, generator, log_decay, per_document, record

simple_gla = fla_naive("ops/simple_gla/naive.py").naive_recurrent_simple_gla
gla = fla_naive("ops/gla/naive.py").naive_recurrent_gla
rwkv6 = fla_naive("ops/rwkv6/recurrent_naive.py").naive_recurrent_rwkv6
linear_attn = fla_naive("ops/linear_attn/naive.py").naive_recurrent_linear_attn
retention = fla_naive("ops/retention/naive.py").naive_retention

FLA = "fla-core 0.6.0 "
B, T, N, K, H, P = 2, 67, 2, 1, 5, 3


def sequences(name: str, num_heads: int = N, num_key_heads: int = N):
    rng = generator(name)
    inputs = {
        "q": draw(rng, B, T, num_key_heads, H),
        "k": draw(rng, B, T, num_key_heads, H),
        "v": draw(rng, B, T, num_heads, P),
        "state": draw(rng, B, num_heads, H, P),
    }
    return rng, inputs


def head_first(function, q, k, v, g, bonus, state):
    """rwkv6 has the head before the tokens."""
    q, k, v, g = (x.transpose(1, 2) for x in (q, k, v, g))
    o, state = function(q, k, v, g, bonus, initial_state=state, output_final_state=True)
    return o.transpose(1, 2), state


def no_decay(q, k, v, state):
    o, state = linear_attn(q, k, v, initial_state=state, output_final_state=True)
    return {"o": o, "state": state}


def head_decay(q, k, v, g, state):
    g = g.expand(q.shape[:3])
    o, state = simple_gla(q, k, v, g, initial_state=state)
    return {"o": o, "state": state}


def token_decay(q, k, v, g, state):
    q, k = (x.repeat_interleave(N // K, dim=2) for x in (q, k))
    o, state = simple_gla(q, k, v, g, scale=0.75, initial_state=state)
    return {"o": o, "state": state}


def channel_decay(q, k, v, g, state):
    o, state = gla(q, k, v, g, initial_state=state, output_final_state=True)
    return {"o": o, "state": state}


def bonus(q, k, v, g, bonus, state):
    o, state = head_first(rwkv6, q, k, v, g, bonus, state)
    return {"o": o, "state": state}


def packed_channel_decay(q, k, v, g, state):
    run = lambda q, k, v, g, state: gla(q, k, v, g, initial_state=state, output_final_state=True)
    o, state = per_document(run, SEGMENT_IDS, state, q=q, k=k, v=v, g=g)
    return {"o": o, "state": state}


def packed_token_decay(q, k, v, g, state):
    run = lambda q, k, v, g, state: simple_gla(q, k, v, g, initial_state=state)
    o, state = per_document(run, SEGMENT_IDS, state, q=q, k=k, v=v, g=g)
    return {"o": o, "state": state}


def packed_bonus(q, k, v, g, bonus, state):
    run = lambda q, k, v, g, state: head_first(rwkv6, q, k, v, g, bonus, state)
    o, state = per_document(run, SEGMENT_IDS, state, q=q, k=k, v=v, g=g)
    return {"o": o, "state": state}


def check_retention() -> None:
    """RetNet's own parallel form agrees with the per-head decay used here."""
    _, inputs = sequences("retention")
    with double_precision():
        q, k, v = (torch.tensor(inputs[key]) for key in "qkv")
        g = torch.log1p(-torch.exp2(-5.0 - torch.arange(N)))
        want = retention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)
        got = head_decay(q, k, v, g, torch.zeros(B, N, H, P))["o"]
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


def main() -> None:
    check_retention()
    constants = {"segment_ids": SEGMENT_IDS.numpy().astype("int32")}

    rng, inputs = sequences(name := "linear_attention_no_decay")
    record(name, no_decay, inputs, settings={}, source=FLA + "naive_recurrent_linear_attn")

    rng, inputs = sequences(name := "linear_attention_head_decay")
    inputs["g"] = -abs(draw(rng, N, scale=0.2)) - 1 / 64
    record(name, head_decay, inputs, settings={}, source=FLA + "naive_recurrent_simple_gla, g the same at every token")

    rng, inputs = sequences(name := "linear_attention_token_decay", num_key_heads=K)
    inputs["g"] = log_decay(rng, B, T, N)
    source = FLA + "naive_recurrent_simple_gla, q and k repeated"
    record(name, token_decay, inputs, settings={"scale": 0.75}, source=source)

    rng, inputs = sequences(name := "linear_attention_channel_decay")
    inputs["g"] = log_decay(rng, B, T, N, H)
    record(name, channel_decay, inputs, settings={}, source=FLA + "naive_recurrent_gla")

    rng, inputs = sequences(name := "linear_attention_bonus")
    inputs |= {"g": log_decay(rng, B, T, N, H), "bonus": draw(rng, N, H)}
    record(name, bonus, inputs, settings={}, source=FLA + "naive_recurrent_rwkv6")

    rng, inputs = sequences(name := "linear_attention_token_decay_packed")
    inputs["g"] = log_decay(rng, B, T, N)
    source = FLA + "naive_recurrent_simple_gla, each document by itself"
    record(name, packed_token_decay, inputs, settings={}, source=source, constants=constants)

    rng, inputs = sequences(name := "linear_attention_channel_decay_packed")
    inputs["g"] = log_decay(rng, B, T, N, H)
    source = FLA + "naive_recurrent_gla, each document by itself"
    record(name, packed_channel_decay, inputs, settings={}, source=source, constants=constants)

    rng, inputs = sequences(name := "linear_attention_bonus_packed")
    inputs |= {"g": log_decay(rng, B, T, N, H), "bonus": draw(rng, N, H)}
    source = FLA + "naive_recurrent_rwkv6, each document by itself"
    record(name, packed_bonus, inputs, settings={}, source=source, constants=constants)


if __name__ == "__main__":
    main()
