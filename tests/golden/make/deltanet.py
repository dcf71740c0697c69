"""Golden layers: flash-linear-attention's DeltaNet around its naive recurrence, the rest by Triton's interpreter."""

import interpreter  # noqa: F401, before the kernels
from common import check_cache, draw, fla_naive, generator, module_case
from fla.layers import delta_net
from fla.models.utils import Cache
from parameters import parameters
from torch_norms import unit

B, T, D = 2, 67, 12

SETTINGS = {
    "hidden_size": D,
    "num_heads": 2,
    "expand_k": 0.5,
    "expand_v": 1.0,
    "conv_size": 4,
    "norm_eps": 1e-6,
    "layer_idx": 0,
}

naive = fla_naive("ops/delta_rule/naive.py").delta_rule_recurrence


def delta_rule(q, k, v, beta, initial_state=None, **_):
    heads_first = [x.transpose(1, 2) for x in (unit(q), unit(k), v, beta)]
    o, state = naive(*heads_first, initial_state=initial_state)
    return o.transpose(1, 2), state


def call(apply, x):
    y, cache = apply(x)[0], Cache()
    check_cache(y, lambda part: apply(part, past_key_values=cache, use_cache=True)[0], x)
    return y


def main() -> None:
    # The chunked kernel does not run in the interpreter; the one that decodes does, and is what the cache is for.
    delta_net.chunk_delta_rule = delta_rule
    for name, options in (
        ("layer_deltanet", {"use_short_conv": True, "allow_neg_eigval": True}),
        ("layer_deltanet_without_conv", {"use_short_conv": False, "allow_neg_eigval": False}),
    ):
        settings = SETTINGS | options
        module_case(
            name,
            lambda settings=settings: delta_net.DeltaNet(**settings),
            call,
            draw(generator(name), B, T, D),
            parameters,
            settings=settings,
            source="flash-linear-attention 0.6.0 DeltaNet with delta_rule_recurrence",
            precision="float32",
        )


if __name__ == "__main__":
    main()
