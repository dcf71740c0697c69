"""YOCO: a self-decoder makes keys and values once, a cross-decoder reads them; values by tests/golden/make/yoco.py."""

import dataclasses
import json
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from from_torch import Arrays, Settings, heads_in, heads_out
from test_golden_models import GOLDEN, Part, build, mlp, named, under

from efficient_lm.costs import model_costs
from efficient_lm.ffns import MLPConfig
from efficient_lm.hlo import Program, collectives
from efficient_lm.mixers import AttentionConfig, CrossAttentionConfig, KeyValuesConfig, RetNetConfig
from efficient_lm.model import BlockConfig, LanguageModel, ModelConfig
from efficient_lm.rotary import RotaryConfig
from efficient_lm.sharding import make_mesh, shard

KEYS = KeyValuesConfig(num_kv_heads=2, head_dim=8)
FFN = MLPConfig(d_ff=16)
YOCO = ModelConfig(
    vocab_size=32,
    d_model=16,
    blocks={
        "R": BlockConfig(mixer=RetNetConfig(num_heads=2, key_dim=8, value_dim=8, decay_temperature=16.0), ffn=FFN),
        "K": BlockConfig(mixer=KEYS, ffn=None),
        "C": BlockConfig(mixer=CrossAttentionConfig(num_heads=4, keys=KEYS), ffn=FFN),
    },
    prefix="R K",
    pattern="C",
    num_periods=2,
    dtype="float32",
)
B, T = 4, 16
TOKENS = jax.random.randint(jax.random.key(1), (B, T), 0, 32)
IDS = jnp.asarray([[1] * 5 + [2] * 9 + [0] * 2] * B, jnp.int32)


def from_paper(s: Settings, p: Arrays, *, scanned: bool) -> Part:
    def rotary(head_dim: int) -> RotaryConfig:
        # Theirs goes from 1 to 1 / theta, both included.
        return RotaryConfig(theta=s["rope_theta"] ** (head_dim / (head_dim - 2)))

    def turned(w: jax.Array, num_heads: int) -> jax.Array:
        """Pairs of channels that turn together: side by side there, half a head apart here."""
        w_DNH = heads_in(w, num_heads)
        return jnp.concatenate([w_DNH[..., ::2], w_DNH[..., 1::2]], axis=-1)

    def layer(q: Arrays, mixer: Arrays) -> Arrays:
        ours = {"gate_proj": "gate_proj", "fc1": "up_proj", "fc2": "down_proj"}
        _, ffn = mlp({f"{our}.weight": q[f"{their}.weight"] for their, our in ours.items()})
        norms = {"mixer_norm.scale": q["mixer_layer_norm.weight"], "ffn_norm.scale": q["final_layer_norm.weight"]}
        return norms | named("mixer", mixer) | named("ffn", ffn)

    D, M, N, K = (s[name] for name in ("dim", "n_self_heads", "n_attn_heads", "n_attn_kv_heads"))
    H, num_self = D // M, s["n_layers"] // 2
    if "window" in s:
        mixer = AttentionConfig(num_heads=M, head_dim=H, rotary=rotary(H), window_size=s["window"])
    else:
        mixer = RetNetConfig(num_heads=M, key_dim=H, value_dim=H, rotary=rotary(H), decay_temperature=s["tau"])
    keys = KeyValuesConfig(num_kv_heads=K, head_dim=D // N, rotary=rotary(D // N))

    arrays = {"embedding": p["embed_tokens.weight"], "norm.scale": p["layer_norm.weight"]}
    arrays["head"] = p["output_projection.weight"].T
    for i in range(num_self):
        q = under(p, f"self_decoder.{i}")
        own = {f"{name}_proj.kernel": turned(q[f"mixer.{name}_proj.weight"], M) for name in "qk"}
        own["v_proj.kernel"] = heads_in(q["mixer.v_proj.weight"], M)
        own["o_proj.kernel"] = heads_out(q["mixer.out_proj.weight"], M)
        if "tau" in s:
            own["gate_proj.kernel"] = heads_in(q["mixer.g_proj.weight"], M)
            own["decay_proj.kernel"] = q["mixer.gt_proj.weight"].T
            own["norm.norm.scale"] = jnp.ones(H)  # Theirs has none.
        arrays |= named(f"prefix.{i}", layer(q, own))
    arrays |= {
        f"prefix.{num_self}.mixer_norm.scale": p["kv_layer_norm.weight"],
        f"prefix.{num_self}.mixer.k_proj.kernel": turned(p["k_proj.weight"], K),
        f"prefix.{num_self}.mixer.v_proj.kernel": heads_in(p["v_proj.weight"], K),
    }
    cross = []
    for i in range(num_self):
        q = under(p, f"cross_decoder.{i}")
        q_proj, o_proj = turned(q["mixer.q_proj.weight"], N), heads_out(q["mixer.out_proj.weight"], N)
        cross.append(layer(q, {"q_proj.kernel": q_proj, "o_proj.kernel": o_proj}))
    if scanned:
        walk: dict[str, Any] = {"pattern": "C", "num_periods": num_self}
        arrays |= named("periods.0", jax.tree.map(lambda *x: jnp.stack(x), *cross))
    else:
        walk = {"pattern": "", "num_periods": 0, "tail": " ".join("C" * num_self), "remat": "nothing"}
        for i, q in enumerate(cross):
            arrays |= named(f"tail.{i}", q)
    ffn = MLPConfig(d_ff=s["hidden_dim"])
    mixers = {"S": mixer, "C": CrossAttentionConfig(num_heads=N, keys=keys)}
    config = ModelConfig(
        vocab_size=s["vocab_size"],
        d_model=D,
        blocks={"K": BlockConfig(mixer=keys, ffn=None)}
        | {letter: BlockConfig(mixer=mixer, ffn=ffn) for letter, mixer in mixers.items()},
        prefix=" ".join("S" * num_self + "K"),
        **walk,
        tied_embeddings=False,
        embedding_scale=D**0.5,
        dtype="float32",
    )
    return config, arrays


@pytest.mark.parametrize(("case", "scanned"), [("gated_retention", True), ("window", False)])
def test_golden(case, scanned):
    """Logits, and the gradient of every weight, of packed documents; a scan and remat, and neither."""
    file, make = load(case, scanned=scanned)

    @jax.jit
    def run(inputs, dlogits):
        tokens, ids = jnp.asarray(file["in.tokens"]), jnp.asarray(file["in.segment_ids"])
        logits, vjp = jax.vjp(lambda inputs: make(inputs)(tokens, segment_ids=ids)[0], inputs)
        return logits, vjp(dlogits)[0]

    logits, grads = run(weights(file), jnp.asarray(file["cotangent.logits"]))
    # Rounding in float32, of a whole model.
    errors = {"logits": relative_error(logits * is_real(file), file["out.logits"]) / 1e-5}
    errors |= {f"d{key}": relative_error(x, file[f"grad.{key}"]) / 1e-4 for key, x in grads.items()}
    assert all(error < 1 for error in errors.values()), f"errors as multiples of what is tolerated: {errors}"


def test_golden_in_pieces():
    """Rows cut inside documents, then token by token."""
    file, make = load("gated_retention", scanned=True)

    @jax.jit
    def run(inputs, tokens, ids):
        lm = make(inputs)
        first, state = lm(tokens[:, :10], lm.init_state(*tokens.shape), segment_ids=ids[:, :10])
        second, state = lm(tokens[:, 10:50], state, segment_ids=ids[:, 10:50])

        def step(state, token):
            logits, state = lm(token[0][:, None], state, segment_ids=token[1][:, None])
            return state, logits[:, 0]

        _, rest = jax.lax.scan(step, state, (tokens[:, 50:].T, ids[:, 50:].T))
        return jnp.concatenate([first, second, jnp.moveaxis(rest, 0, 1)], axis=1)

    logits = run(weights(file), jnp.asarray(file["in.tokens"]), jnp.asarray(file["in.segment_ids"]))
    assert relative_error(logits * is_real(file), file["out.logits"]) < 1e-5


def load(case: str, *, scanned: bool) -> tuple[dict[str, np.ndarray], Callable[[Arrays], LanguageModel]]:
    file = dict(np.load(GOLDEN / f"model_yoco_{case}.npz"))
    settings = json.loads(str(file["meta"]))["settings"]
    return file, lambda inputs: build(settings, inputs, lambda s, p: from_paper(s, p, scanned=scanned))


def weights(file: dict[str, np.ndarray]) -> Arrays:
    names = [key.removeprefix("grad.") for key in file if key.startswith("grad.")]
    return {name: jnp.asarray(file[f"in.{name}"]) for name in names}


def is_real(file: dict[str, np.ndarray]) -> np.ndarray:
    return (file["in.segment_ids"] > 0)[..., None]


def relative_error(got: jax.Array, want: np.ndarray) -> float:
    assert got.shape == want.shape
    return float(np.linalg.norm(np.asarray(got, np.float64) - want) / np.linalg.norm(want))


def logits_and_grads():
    def loss(model):
        logits = model(shard(TOKENS, "BT"), segment_ids=shard(IDS, "BT"))[0]
        return jnp.sum(jnp.sin(logits) * shard(IDS > 0, "BT")[..., None]), logits

    cfg = dataclasses.replace(YOCO, prefix="K")
    model = jax.jit(lambda: cfg.build(rngs=nnx.Rngs(0)))()
    return jax.device_get(jax.jit(jax.grad(loss, has_aux=True))(model))


def test_sharded_equals_single():
    """Rows, heads and tokens among eight devices; gradients of the keys are sums over all readers and parts."""
    want = logits_and_grads()
    with jax.set_mesh(make_mesh({"data": 2, "model": 2, "context": 2})):
        got = logits_and_grads()
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert relative_error(a, b) < 1e-4


def test_keys_are_sent_once():
    """However many layers read them: forward to all parts of a sequence, and their gradients back."""

    def sent(num_periods):
        mesh = make_mesh({"context": 8})
        cfg = dataclasses.replace(YOCO, num_periods=num_periods, prefix="K", remat="nothing")
        with jax.set_mesh(mesh):
            model = jax.eval_shape(lambda: cfg.build(rngs=nnx.Rngs(0)))
            grad = jax.jit(jax.grad(lambda model: jnp.sum(jnp.sin(model(shard(TOKENS, "BT"))[0]))))
            found = collectives(Program(grad.lower(model).compile().as_text() or ""), mesh.shape)
        return [c for c in found if c.kind in ("all-gather", "reduce-scatter")]

    keys_and_values = 7 / 8 * B * T * 2 * 2 * 8 * 4  # Of two heads of eight channels in float32.
    few = sent(1)
    assert sum(c.bytes for c in few if c.kind == "reduce-scatter") == keys_and_values
    assert sum(c.bytes for c in few if c.kind == "all-gather") >= keys_and_values
    assert sent(3) == few


def state_nbytes(cfg):
    state = jax.eval_shape(lambda: cfg.build(rngs=nnx.Rngs(0)).init_state(2, T))
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))


def test_one_cache_counts_once():
    deep = dataclasses.replace(YOCO, num_periods=12)
    few, many = (model_costs(cfg, context=T, batch_size=2) for cfg in (YOCO, deep))
    assert few.state_bytes == many.state_bytes == state_nbytes(YOCO) == state_nbytes(deep)
    # Each reader reads all of it, beside its own weights.
    cache, added = 2 * 2 * 8 * 4 * T + 4, many.parameters - few.parameters
    assert many.decoding_bytes - few.decoding_bytes == 4 * added / 2 + 10 * cache
    # Each of four heads of width 8 has a product with a key and one with a value, for (T + 1) / 2 tokens on average.
    norms = 10 * 2 * 16
    assert many.training_flops - few.training_flops == 6 * (added - norms) + 10 * 3 * 4 * 4 * 8 * (T + 1) / 2


def test_prompts_exit_early():
    """A program that returns the state alone does not run the cross-decoder."""

    def flops(cfg):
        model = jax.eval_shape(lambda: cfg.build(rngs=nnx.Rngs(0)))
        fill = jax.jit(lambda model, tokens: model(tokens, model.init_state(B, T))[1])
        return (fill.lower(model, TOKENS).compile().cost_analysis() or {})["flops"]

    assert flops(YOCO) == flops(dataclasses.replace(YOCO, num_periods=0))


def test_errors():
    def run(cfg, *sizes):
        def trace(tokens):
            model = cfg.build(rngs=nnx.Rngs(0))
            return model(tokens, model.init_state(*sizes) if sizes else None)[0]

        jax.eval_shape(trace, shard(TOKENS, "BT"))

    with pytest.raises(ValueError, match="put a block of these before it"):
        run(dataclasses.replace(YOCO, prefix=""))
    other = CrossAttentionConfig(num_heads=4, keys=KeyValuesConfig(num_kv_heads=4, head_dim=8))
    blocks = {**YOCO.blocks, "C": BlockConfig(mixer=other, ffn=FFN)}
    with pytest.raises(ValueError, match=r"for num_kv_heads=4 and head_dim=8, the keys before it have 2 and 8"):
        run(dataclasses.replace(YOCO, blocks=blocks))
    with pytest.raises(ValueError, match="num_heads=3 is not a multiple of num_kv_heads=2"):
        CrossAttentionConfig(num_heads=3, keys=KEYS).build(16, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"head_dim=7 .* must be even"):
        dataclasses.replace(KEYS, head_dim=7).build(16, rngs=nnx.Rngs(0))
    with jax.set_mesh(make_mesh({"context": 8})), pytest.raises(ValueError, match="decode without that axis"):
        run(dataclasses.replace(YOCO, prefix="K"), B, T)
