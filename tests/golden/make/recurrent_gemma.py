"""Golden layer: the recurrent block of transformers' RecurrentGemma."""

import torch
from common import draw, generator, module_case
from parameters import parameters
from transformers import RecurrentGemmaConfig
from transformers.models.recurrent_gemma.modeling_recurrent_gemma import RecurrentGemmaRecurrentBlock

B, T, D = 2, 37, 12

SETTINGS = {
    "hidden_size": D,
    "lru_width": 20,
    "num_attention_heads": 4,
    "conv1d_width": 4,
    "hidden_activation": "gelu_pytorch_tanh",
}


def main() -> None:
    config = RecurrentGemmaConfig(**SETTINGS, num_hidden_layers=1, head_dim=4)
    positions = torch.arange(T).expand(B, T)
    module_case(
        "layer_recurrent_gemma",
        lambda: RecurrentGemmaRecurrentBlock(config, layer_idx=0),
        lambda apply, x: apply(x, positions, None, use_cache=False)[0],
        draw(generator("layer_recurrent_gemma"), B, T, D),
        parameters,
        settings=SETTINGS,
        source="transformers 5.23.0 RecurrentGemmaRecurrentBlock",
    )


if __name__ == "__main__":
    main()
