"""Golden layers: the lightning attention of transformers' MiniMax, a layer within the stack and its last."""

from common import draw, generator, module_case
from parameters import parameters
from transformers import MiniMaxConfig
from transformers.models.minimax.modeling_minimax import MiniMaxLightningAttention

B, T, D = 2, 67, 12

SETTINGS = {
    "hidden_size": D,
    "num_attention_heads": 4,
    "head_dim": 6,
    "block_size": 16,
    "hidden_act": "silu",
    "num_hidden_layers": 4,
    "layer_types": ["linear_attention"] * 4,
}


def main() -> None:
    config = MiniMaxConfig(**SETTINGS)
    for name, layer in (("layer_lightning", 1), ("layer_lightning_last", 3)):
        module_case(
            name,
            lambda layer=layer: MiniMaxLightningAttention(config, layer_idx=layer),
            lambda apply, x: apply(x, position_embeddings=None, attention_mask=None)[0],
            draw(generator(name), B, T, D),
            parameters,
            settings=SETTINGS | {"layer": layer},
            source="transformers 5.23.0 MiniMaxLightningAttention",
        )


if __name__ == "__main__":
    main()
