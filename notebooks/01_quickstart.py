# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # A hybrid language model from blocks
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/efficient-lm/efficient_lm/blob/main/notebooks/01_quickstart.ipynb)
#
# Build a model from blocks, train it a little on Python's own source code, look at its state, let it write.
# Everything here runs on a CPU in a few minutes; on a TPU or GPU nothing changes but the speed.

# %%
import importlib.util
import subprocess
import sys

if importlib.util.find_spec("efficient_lm") is None:
    source = "git+https://github.com/efficient-lm/efficient_lm"
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", source], check=True)

# %% tags=["parameters"]
STEPS = 200

# %% [markdown]
# ## Blocks
# A block is a sequence mixer and a feed-forward network. The pattern says how blocks follow one another: here two blocks
# of Gated DeltaNet, whose state has a fixed size, to one of softmax attention, whose cache grows with every token.

# %%
import jax
from flax import nnx

from efficient_lm.console import console
from efficient_lm.costs import model_table
from efficient_lm.ffns import MLPConfig
from efficient_lm.mixers import AttentionConfig, GatedDeltaNetConfig
from efficient_lm.model import BlockConfig, ModelConfig

ffn = MLPConfig(d_ff=256)
model_config = ModelConfig(
    vocab_size=258,
    d_model=96,
    blocks={
        "M": BlockConfig(mixer=GatedDeltaNetConfig(num_heads=3, key_dim=32, value_dim=32), ffn=ffn),
        "A": BlockConfig(mixer=AttentionConfig(num_heads=3, head_dim=32), ffn=ffn),
    },
    pattern="M M A",
    num_periods=1,
    dtype="float32",
    remat="nothing",
)
model = model_config.build(rngs=nnx.Rngs(0))
console.print(model_table(model_config, model))

# %% [markdown]
# ## Data
# The Python standard library, one document per file, as bytes. Rows are packed: several documents share a row, and
# `segment_ids` keep them apart in every mixer.

# %%
import tempfile

from efficient_lm.data import BytesConfig, DataConfig

data = DataConfig(tokenizer=BytesConfig()).build(run_dir=tempfile.mkdtemp(), batch_size=8, seq_len=256, seed=0)
batches = data.train()
batch = next(batches)
print(data.tokenizer.decode(batch.tokens[0][:200]))

# %% [markdown]
# ## Training
# A step is a function of the state and a batch. `train.py` wraps it in checkpoints, metrics and evaluation.

# %%
import matplotlib.pyplot as plt

from efficient_lm.config import TrainConfig
from efficient_lm.optimizer import CosineConfig, MuonConfig
from efficient_lm.training import init_state, make_train_step

config = TrainConfig(
    model=model_config,
    optimizer=MuonConfig(learning_rate=5e-3, schedule=CosineConfig(warmup_steps=STEPS // 10)),
    num_steps=STEPS,
    batch_size=8,
    seq_len=256,
)
optimizer, _ = config.optimizer.build(STEPS)
train_step = make_train_step(config, config.objective.build(), optimizer)
state = jax.jit(lambda: init_state(config, optimizer))()
losses = []
for _ in range(STEPS):
    state, metrics = train_step(state, next(batches))
    losses.append(metrics["loss"])
batches.close()

plt.plot([float(loss) / 0.6931 for loss in losses])
plt.xlabel("step")
plt.ylabel("bits per byte")
plt.show()

# %% [markdown]
# ## The state
# Feeding tokens one by one or all at once is the same: the state carries everything. Gated DeltaNet's is a matrix per
# head, here after a line of code. Attention keeps every key and value.

# %%
text = "def main(argv):\n    return"
tokens = data.tokenizer.encode(text)[None]
logits, decoding_state = state.model(tokens, state.model.init_state(batch_size=1, max_len=64))
memory = decoding_state.periods[0].S[0, 0]  # The first period's first block, the only row: N x H x P.
figure, axes = plt.subplots(1, len(memory), figsize=(9, 3))
for head, (S_HP, ax) in enumerate(zip(memory, axes, strict=True)):
    ax.imshow(S_HP, cmap="RdBu")
    ax.set(title=f"head {head}", xlabel="value channel", ylabel="key channel")
plt.show()

# %% [markdown]
# ## Sampling

# %%
import numpy as np

from efficient_lm.sampling import SamplingConfig, generate

prompt = [data.tokenizer.bos_id, *data.tokenizer.encode("def ").tolist()]
settings = SamplingConfig(max_tokens=128, temperature=0.7)
new = np.concatenate(list(generate(state.model, [prompt], jax.random.key(0), settings)), axis=1)[0]
print("def " + data.tokenizer.decode(new[new >= 0]))
