"""Golden cases of `delta_rule`, from flash-linear-attention's naive references."""

import numpy as np
from common import SEGMENT_IDS, draw, fla_naive, generator, log_decay, per_document, record, uniform

delta = fla_naive("ops/delta_rule/naive.py").delta_rule_recurrence
gated_delta = fla_naive("ops/gated_delta_rule/naive.py").naive_recurrent_gated_delta_rule
kda = fla_naive("ops/kda/naive.py").naive_recurrent_kda

FLA = "fla-core 0.6.0 "
B, T, N, K, H, P = 2, 67, 2, 1, 5, 3


def sequences(name: str, num_key_heads: int = N, max_beta: float = 1.0):
    rng = generator(name)
    k = rng.normal(size=(B, T, num_key_heads, H))
    beta = uniform(rng, B, T, N, low=0.0, high=max_beta)
    beta[rng.random(beta.shape) < 0.05] = 0.0
    beta[rng.random(beta.shape) < 0.05] = max_beta
    inputs = {
        "q": draw(rng, B, T, num_key_heads, H),
        # Keys of (nearly) unit length, as the delta rule wants them.
        "k": np.round(k / np.linalg.norm(k, axis=-1, keepdims=True) * 64) / 64,
        "v": draw(rng, B, T, N, P),
        "beta": beta,
        "state": draw(rng, B, N, H, P),
    }
    return rng, inputs


def no_decay(q, k, v, beta, state):
    q, k, v, beta = (x.transpose(1, 2) for x in (q, k, v, beta))
    o, state = delta(q, k, v, beta, initial_state=state)
    return {"o": o.transpose(1, 2), "state": state}


def token_decay(q, k, v, beta, g, state):
    q, k = (x.repeat_interleave(N // K, dim=2) for x in (q, k))
    o, state = gated_delta(q, k, v, beta, g, initial_state=state, output_final_state=True)
    return {"o": o, "state": state}


def channel_decay(q, k, v, beta, g, state):
    o, state = kda(q, k, v, g, beta, scale=0.75, initial_state=state, output_final_state=True)
    return {"o": o, "state": state}


def packed_token_decay(q, k, v, beta, g, state):
    run = lambda q, k, v, beta, g, state: gated_delta(q, k, v, beta, g, initial_state=state, output_final_state=True)
    o, state = per_document(run, SEGMENT_IDS, state, q=q, k=k, v=v, beta=beta, g=g)
    return {"o": o, "state": state}


def packed_channel_decay(q, k, v, beta, g, state):
    run = lambda q, k, v, beta, g, state: kda(q, k, v, g, beta, initial_state=state, output_final_state=True)
    o, state = per_document(run, SEGMENT_IDS, state, q=q, k=k, v=v, beta=beta, g=g)
    return {"o": o, "state": state}


def main() -> None:
    constants = {"segment_ids": SEGMENT_IDS.numpy().astype("int32")}

    rng, inputs = sequences(name := "delta_rule_no_decay")
    record(name, no_decay, inputs, settings={}, source=FLA + "delta_rule_recurrence")

    rng, inputs = sequences(name := "delta_rule_token_decay", num_key_heads=K)
    inputs["g"] = log_decay(rng, B, T, N)
    source = FLA + "naive_recurrent_gated_delta_rule, q and k repeated"
    record(name, token_decay, inputs, settings={}, source=source)

    # beta up to 2: negative eigenvalues. Here the reference itself takes fewer key heads than value heads.
    rng, inputs = sequences(name := "delta_rule_channel_decay", num_key_heads=K, max_beta=2.0)
    inputs["g"] = log_decay(rng, B, T, N, H)
    record(name, channel_decay, inputs, settings={"scale": 0.75}, source=FLA + "naive_recurrent_kda")

    rng, inputs = sequences(name := "delta_rule_token_decay_packed")
    inputs["g"] = log_decay(rng, B, T, N)
    source = FLA + "naive_recurrent_gated_delta_rule, each document by itself"
    record(name, packed_token_decay, inputs, settings={}, source=source, constants=constants)

    rng, inputs = sequences(name := "delta_rule_channel_decay_packed")
    inputs["g"] = log_decay(rng, B, T, N, H)
    source = FLA + "naive_recurrent_kda, each document by itself"
    record(name, packed_channel_decay, inputs, settings={}, source=source, constants=constants)


if __name__ == "__main__":
    main()
