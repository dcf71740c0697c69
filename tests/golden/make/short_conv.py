"""Golden cases of `short_conv`, from the convolution of transformers' Qwen3-Next."""

from common import SEGMENT_IDS, draw, generator, per_document, record
from transformers.models.qwen3_next.modeling_qwen3_next import causal_conv1d_fn, causal_conv1d_update

HF = "transformers 5.23.0 qwen3_next "
B, T, D, W = 2, 67, 5, 4


def with_state(x, w, state, bias=None, activation=None):
    """The reference's state lies channels first and is overwritten."""
    new_state = state.transpose(1, 2).clone()
    y = causal_conv1d_update(x.transpose(1, 2), new_state, w, bias, activation)
    return y.transpose(1, 2), new_state.transpose(1, 2)


def plain(x, w):
    return {"y": causal_conv1d_fn(x.transpose(1, 2), w).transpose(1, 2), "state": x[:, 1 - W :]}


def silu(x, w, bias, state):
    y, state = with_state(x, w, state, bias, "silu")
    return {"y": y, "state": state}


def packed(x, w, bias, state):
    run = lambda x, state: with_state(x, w, state, bias, "silu")
    y, state = per_document(run, SEGMENT_IDS, state, x=x)
    return {"y": y, "state": state}


def main() -> None:
    rng = generator(name := "short_conv_plain")
    inputs = {"x": draw(rng, B, T, D), "w": draw(rng, D, W)}
    record(name, plain, inputs, settings={}, source=HF + "causal_conv1d_fn")

    rng = generator(name := "short_conv_silu")
    inputs = {"x": draw(rng, B, T, D), "w": draw(rng, D, W), "bias": draw(rng, D), "state": draw(rng, B, W - 1, D)}
    record(name, silu, inputs, settings={"activation": "silu"}, source=HF + "causal_conv1d_update")

    rng = generator(name := "short_conv_silu_packed")
    inputs = {"x": draw(rng, B, T, D), "w": draw(rng, D, W), "bias": draw(rng, D), "state": draw(rng, B, W - 1, D)}
    constants = {"segment_ids": SEGMENT_IDS.numpy().astype("int32")}
    source = HF + "causal_conv1d_update, each document by itself"
    record(name, packed, inputs, settings={"activation": "silu"}, source=source, constants=constants)


if __name__ == "__main__":
    main()
