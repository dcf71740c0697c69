"""What a layer remembers of a sequence, in bytes, for every mixer of the library: `python -m benchmarks.state_bytes`.

The bytes are those of the states that decoding carries (`Mixer.init_state`), by shape: nothing is allocated. Every
mixer is that of a model of width 2048, in bfloat16, sized as models of about that width have it.
"""

import dataclasses
import json
import math
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import tyro
from flax import nnx
from matplotlib.figure import Figure

from efficient_lm.console import console
from efficient_lm.mixers import (
    AttentionConfig,
    CombaConfig,
    DeltaNetConfig,
    DifferentialAttentionConfig,
    ForgettingAttentionConfig,
    GatedDeltaNetConfig,
    GatedDeltaProductConfig,
    GLAConfig,
    GroupedTiedAttentionConfig,
    HGRN2Config,
    HGRNConfig,
    KimiDeltaAttentionConfig,
    LigerConfig,
    LightningConfig,
    LinearTransformerConfig,
    LoLCATsConfig,
    Mamba2Config,
    MambaConfig,
    MesaNetConfig,
    MixerConfig,
    MLAConfig,
    MLSTMConfig,
    MoBAConfig,
    NativeSparseAttentionConfig,
    ParallelMixerConfig,
    RetNetConfig,
    RGLRUConfig,
    RWKV6Config,
    RWKV7Config,
    S4DConfig,
)

D_MODEL = 2048
GROUPED: dict[str, Any] = {"num_heads": 16, "num_kv_heads": 4, "head_dim": 128}
MIXERS: dict[str, MixerConfig] = {
    "attention": AttentionConfig(num_heads=16, head_dim=128),
    "GQA": AttentionConfig(**GROUPED),
    "MQA": AttentionConfig(num_heads=16, num_kv_heads=1, head_dim=128),
    "window of 4096": AttentionConfig(**GROUPED, window_size=4096),
    "window of 1024, 4 sinks": AttentionConfig(**GROUPED, window_size=1024, sink_tokens=4),
    "MLA": MLAConfig(num_heads=16, latent_dim=512, key_dim=128, rotary_dim=64, value_dim=128),
    "grouped latent": MLAConfig(
        num_heads=16, num_latent_heads=2, latent_dim=256, key_dim=128, rotary_dim=64, value_dim=128
    ),
    "grouped tied": GroupedTiedAttentionConfig(**GROUPED, rotary_dim=64),
    "FoX": ForgettingAttentionConfig(**GROUPED),
    "differential": DifferentialAttentionConfig(num_heads=8, num_kv_heads=2, head_dim=128),
    "NSA": NativeSparseAttentionConfig(**GROUPED),
    "MoBA": MoBAConfig(**GROUPED, block_size=512, num_blocks=3),
    "GQA beside Mamba-2": ParallelMixerConfig(
        first=AttentionConfig(**GROUPED), second=Mamba2Config(num_heads=64, key_dim=128, value_dim=64)
    ),
    "LoLCATs": LoLCATsConfig(**GROUPED, feature_dim=64),
    "Liger": LigerConfig(**GROUPED),
    "Mamba-2": Mamba2Config(num_heads=64, key_dim=128, value_dim=64),
    "Mamba": MambaConfig(d_inner=4096, dt_rank=128),
    "S4D": S4DConfig(state_size=64),
    "RG-LRU": RGLRUConfig(width=2560, num_heads=10),
    "HGRN": HGRNConfig(width=2048),
    "HGRN2": HGRN2Config(num_heads=16, key_dim=128, value_dim=128),
    "RetNet": RetNetConfig(num_heads=8, key_dim=256, value_dim=512),
    "Lightning": LightningConfig(num_heads=16, key_dim=128, value_dim=128),
    "linear transformer": LinearTransformerConfig(num_heads=16, key_dim=128, value_dim=128),
    "GLA": GLAConfig(num_heads=4, key_dim=256, value_dim=512),
    "mLSTM": MLSTMConfig(num_heads=4, key_dim=256, value_dim=512),
    "RWKV-6": RWKV6Config(num_heads=32),
    "RWKV-7": RWKV7Config(num_heads=32),
    "DeltaNet": DeltaNetConfig(num_heads=16, key_dim=128, value_dim=128),
    "Gated DeltaNet": GatedDeltaNetConfig(num_heads=8, key_dim=192, value_dim=384),
    "Gated DeltaProduct": GatedDeltaProductConfig(num_heads=16, key_dim=128, value_dim=128),
    "Kimi Delta Attention": KimiDeltaAttentionConfig(num_heads=16),
    "Comba": CombaConfig(num_heads=16, key_dim=128, value_dim=128),
    "MesaNet": MesaNetConfig(num_heads=16, key_dim=128, value_dim=128),
}
CONTEXTS = [2**n for n in range(8, 21)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class StateBytes:
    """Draws the bytes of a layer's state against the context."""

    output: pathlib.Path = pathlib.Path(__file__).parent / "results"
    """Folder for the numbers and the plot."""


def main(cfg: StateBytes) -> dict[str, list[int]]:
    """Returns the bytes by mixer, at each of CONTEXTS."""
    sizes = {name: state_bytes(mixer) for name, mixer in MIXERS.items()}
    cfg.output.mkdir(parents=True, exist_ok=True)
    numbers, picture = cfg.output / "state_bytes.json", cfg.output / "state_bytes.png"
    numbers.write_text(json.dumps({"contexts": CONTEXTS, "bytes": sizes}) + "\n")
    plot(sizes).savefig(picture, dpi=120)
    console.print(f"numbers  {numbers}\nplot     {picture}")
    return sizes


def state_bytes(cfg: MixerConfig) -> list[int]:
    """Returns the bytes that one row's state takes at each of CONTEXTS."""
    mixer = jax.eval_shape(lambda: cfg.build(D_MODEL, rngs=nnx.Rngs(0)))
    states = [jax.eval_shape(lambda n=n: mixer.init_state(1, n, jnp.bfloat16)) for n in CONTEXTS]
    return [sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state)) for state in states]


def plot(sizes: dict[str, list[int]]) -> Figure:
    figure = Figure(figsize=(11, 4.8), layout="constrained")
    figure.suptitle(f"State of one layer of width {D_MODEL}, bfloat16, one sequence")
    left, right = figure.subplots(1, 2, width_ratios=[2, 1])
    fixed = {name: values[0] for name, values in sizes.items() if len(set(values)) == 1}
    growing = {name: values for name, values in sizes.items() if name not in fixed}

    together = {}  # What takes nearly as much shares a line.
    for name, values in sorted(growing.items(), key=lambda item: -item[1][-1]):
        near = [key for key in together if abs(math.log(growing[key][-1] / values[-1])) < 0.15]
        together.setdefault(near[0] if near else name, []).append(name)
    for i, (key, names) in enumerate(together.items()):
        left.plot(CONTEXTS, growing[key], color=f"C{i}")
        left.annotate(
            ", ".join(names),
            (CONTEXTS[-1], growing[key][-1]),
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
            color=f"C{i}",
            fontsize=9,
        )
    left.fill_between(CONTEXTS, min(fixed.values()), max(fixed.values()), color="0.85", zorder=0)
    left.annotate("states that do not grow", (CONTEXTS[-1], max(fixed.values())), ha="right", va="bottom", color="0.4")
    left.set_xscale("log", base=2)
    left.set_yscale("log", base=2)
    left.set_xticks(CONTEXTS[::2], [_short(n, "", "k", "M") for n in CONTEXTS[::2]])
    powers = [2**n for n in range(12, 34, 3)]
    left.set_yticks(powers, [_short(n, "B", "kB", "MB", "GB") for n in powers])
    left.set_xlim(CONTEXTS[0], CONTEXTS[-1])
    left.set(xlabel="tokens of context", title="Grow with the context")

    ordered = sorted(fixed.items(), key=lambda item: item[1])
    bars = right.barh([name for name, _ in ordered], [value for _, value in ordered], color="0.7")
    right.bar_label(bars, [_short(value, "B", "kB", "MB") for _, value in ordered], padding=3, fontsize=8)
    right.set_xscale("log", base=2)
    right.set_xticks(powers[:5:2], [_short(n, "B", "kB", "MB") for n in powers[:5:2]])
    right.set_xlim(min(fixed.values()) / 4, max(fixed.values()) * 8)
    right.set(title="Do not grow")
    right.tick_params(axis="y", labelsize=8)
    for axes in (left, right):
        axes.grid(alpha=0.3)
    return figure


def _short(value: float, *units: str) -> str:
    power = min(int(math.log2(value)) // 10, len(units) - 1)
    return f"{value / 1024**power:.3g} {units[power]}".strip()


if __name__ == "__main__":
    main(tyro.cli(StateBytes))
