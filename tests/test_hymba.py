"""Hymba: two mixers in a layer behind meta tokens; values by tests/golden/make/hymba.py."""

import dataclasses
import json
import pathlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from from_torch import Arrays, Settings, heads_in, mamba, split
from test_golden_models import GOLDEN, Part, build, mlp, named, under

from efficient_lm.cli import load_config
from efficient_lm.costs import model_costs, num_parameters
from efficient_lm.data import Batch
from efficient_lm.mixers import AttentionConfig, ParallelMixerConfig
from efficient_lm.model import BlockConfig, LanguageModel, ModelConfig
from efficient_lm.objectives import NextTokenConfig
from efficient_lm.rotary import RotaryConfig
from efficient_lm.sampling import SamplingConfig, generate
from efficient_lm.sharding import make_mesh, shard
from efficient_lm.training import make_eval_step, target_bytes


def from_paper(s: Settings, p: Arrays) -> Part:
    def layer(i: int) -> Part:
        q = under(p, f"layers.{i}")
        r = under(q, "mamba")
        q_in, k_in, v_in, *scan_in = split(r["in_proj.weight"], N * H, K * H, 2 * K * H, 2 * D, 2 * D, axis=0)
        theirs = {"in_proj.weight": jnp.concatenate(scan_in), "out_proj.weight": jnp.zeros((D, 2 * D))}
        theirs |= {f"{x.lower()}_layernorm.weight": r[f"{x}_layernorm.weight"] for x in ("dt", "B", "C")}
        second, scan = mamba(s, r | theirs)
        del scan["o_proj.kernel"]  # One projection for both.
        window = {} if i in s["global_attn_idx"] else {"window_size": s["sliding_window"], "sink_tokens": M}
        rotary = RotaryConfig(theta=s["rope_theta"])
        first = AttentionConfig(num_heads=N, num_kv_heads=K, head_dim=H, value_dim=2 * H, rotary=rotary, **window)
        mixer = ParallelMixerConfig(first=first, second=second, scale="vector", fusion="add", joint_projection=True)
        arrays = {f"second.{name}": x for name, x in scan.items()} | {
            "first.q_proj.kernel": heads_in(q_in, N),
            "first.k_proj.kernel": heads_in(k_in, K),
            "first.v_proj.kernel": heads_in(v_in, K),
            "first_scale": r["pre_avg_layernorm1.weight"].reshape(N, 2 * H) / 2,
            "second_scale": r["pre_avg_layernorm2.weight"] / 2,
            "o_proj.kernel": r["out_proj.weight"].T,
        }
        ffn, weights = mlp({name: q[name] for name in q if name.split("_")[0] in ("gate", "up", "down")})
        norms = {"mixer_norm.scale": q["input_layernorm.weight"], "ffn_norm.scale": q["pre_moe_layernorm.weight"]}
        return BlockConfig(mixer=mixer, ffn=ffn), norms | named("mixer", arrays) | named("ffn", weights)

    D, N, K, M = (
        s[name] for name in ("hidden_size", "num_attention_heads", "num_key_value_heads", "num_memory_tokens")
    )
    H = D // N
    layers = [layer(i) for i in range(s["num_hidden_layers"])]
    arrays = {
        "embedding": p["embed_tokens.weight"],
        "meta": p["memory_tokens"],
        "norm.scale": p["final_layernorm.weight"],
    }
    for i, (_, q) in enumerate(layers):
        arrays |= named(f"prefix.{i}", q)
    config = ModelConfig(
        vocab_size=s["vocab_size"],
        d_model=D,
        blocks={f"L{i}": cfg for i, (cfg, _) in enumerate(layers)},
        prefix=" ".join(f"L{i}" for i in range(len(layers))),
        pattern="",
        num_periods=0,
        meta_tokens=M,
        dtype="float32",
    )
    return config, arrays


def load() -> tuple[dict[str, np.ndarray], Arrays, Callable[[Arrays], LanguageModel]]:
    file = dict(np.load(GOLDEN / "model_hymba.npz"))
    settings = json.loads(str(file["meta"]))["settings"]
    weights = {key.removeprefix("grad."): jnp.asarray(file[f"in.{key[5:]}"]) for key in file if key.startswith("grad.")}
    return file, weights, lambda inputs: build(settings, inputs, from_paper)


def relative_error(got: jax.Array | np.ndarray, want: np.ndarray) -> float:
    assert got.shape == want.shape
    return float(np.linalg.norm(np.asarray(got, np.float64) - want) / np.linalg.norm(want))


def is_text(file: dict[str, np.ndarray]) -> np.ndarray:
    return ((file["in.segment_ids"] > 0) & (file["in.tokens"] < file["out.logits"].shape[2]))[..., None]


def test_golden():
    """Logits and the gradient of every weight, of packed documents, each of which ran by itself there."""
    file, weights, make = load()

    @jax.jit
    def run(inputs, dlogits):
        tokens, ids = jnp.asarray(file["in.tokens"]), jnp.asarray(file["in.segment_ids"])
        logits, vjp = jax.vjp(lambda inputs: make(inputs)(tokens, segment_ids=ids)[0], inputs)
        return logits, vjp(dlogits)[0]

    logits, grads = run(weights, jnp.asarray(file["cotangent.logits"]))
    # Rounding in float32, of a whole model.
    errors = {"logits": relative_error(logits * is_text(file), file["out.logits"]) / 1e-5}
    errors |= {f"d{key}": relative_error(x, file[f"grad.{key}"]) / 1e-4 for key, x in grads.items()}
    assert all(error < 1 for error in errors.values()), f"errors as multiples of what is tolerated: {errors}"


def test_golden_in_pieces():
    """Rows cut inside meta tokens and inside documents, then token by token, past the window."""
    file, weights, make = load()

    @jax.jit
    def run(inputs, tokens, ids):
        lm = make(inputs)
        first, state = lm(tokens[:, :4], lm.init_state(*tokens.shape), segment_ids=ids[:, :4])
        second, state = lm(tokens[:, 4:43], state, segment_ids=ids[:, 4:43])

        def step(state, token):
            logits, state = lm(token[0][:, None], state, segment_ids=token[1][:, None])
            return state, logits[:, 0]

        _, rest = jax.lax.scan(step, state, (tokens[:, 43:].T, ids[:, 43:].T))
        return jnp.concatenate([first, second, jnp.moveaxis(rest, 0, 1)], axis=1)

    logits = run(weights, jnp.asarray(file["in.tokens"]), jnp.asarray(file["in.segment_ids"]))
    assert relative_error(logits * is_text(file), file["out.logits"]) < 1e-5


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    _, weights, make = load()
    return jax.jit(make)(weights)


def batch_of(model: LanguageModel, documents: list[list[int]], *, together: bool) -> Batch:
    """Returns documents behind their meta tokens, in one row, beside rows of padding, or in rows of their own."""
    meta, V = list(model.cfg.meta_ids), model.cfg.vocab_size
    parts = [(meta + d[:-1], [-1] * len(meta) + d[1:]) for d in documents]
    width = sum(len(tokens) for tokens, _ in parts)
    rows = np.zeros((3, len(parts), width), np.int32)
    rows[0] = V - 1  # Padding holds anything.
    begin = 0
    for i, (tokens, targets) in enumerate(parts):
        row, begin = (0, begin) if together else (i, 0)
        rows[:, row, begin : begin + len(tokens)] = tokens, targets, [i + 1 if together else 1] * len(tokens)
        begin += len(tokens)
    return Batch(*map(jnp.asarray, rows))


DOCUMENTS = [[3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7], [2, 7], [1, 8, 2, 8, 1, 8, 2]]


def test_packed_equals_separate(model):
    objective = NextTokenConfig(z_loss=1e-2).build()
    run = jax.jit(jax.value_and_grad(objective, has_aux=True))
    (loss, sums), grads = run(model, batch_of(model, DOCUMENTS, together=True))
    (want, want_sums), want_grads = run(model, batch_of(model, DOCUMENTS, together=False))
    assert sums["tokens"] == want_sums["tokens"] == sum(len(d) - 1 for d in DOCUMENTS)
    np.testing.assert_allclose(loss, want, rtol=1e-5)
    for got, expected in zip(jax.tree.leaves(grads), jax.tree.leaves(want_grads), strict=True):
        assert relative_error(got, np.asarray(expected)) < 1e-4


def test_meta_tokens_are_never_predicted(model):
    """What they predict and what padding holds is in no sum; positions are counted behind them."""
    batch = batch_of(model, DOCUMENTS, together=True)
    objective = NextTokenConfig(z_loss=1e-2).build()
    logits = jax.jit(lambda model: model(batch.tokens, segment_ids=batch.segment_ids)[0])(model)
    assert logits.shape[2] == model.cfg.vocab_size
    lse = jax.nn.logsumexp(logits, axis=-1)
    nll = lse - jnp.take_along_axis(logits, jnp.maximum(batch.targets, 0)[..., None], axis=-1)[..., 0]
    where = np.concatenate([[False] * 4 + [True] * (len(d) - 1) for d in DOCUMENTS])
    np.testing.assert_array_equal(batch.is_target[0], where)
    (loss, sums), token_nll = jax.jit(lambda model: (objective(model, batch), objective.token_nll(model, batch)))(model)
    np.testing.assert_allclose(sums["nll"], nll[0, where].sum(), rtol=1e-5)
    np.testing.assert_allclose(loss, (nll + 1e-2 * lse**2)[0, where].sum(), rtol=1e-5)
    np.testing.assert_allclose(token_nll[0], jnp.where(where, nll[0], 0), rtol=1e-4, atol=1e-6)
    # Bins of positions 0; 1; 2 and 3; 4 to 7; 8 to 15: of documents with 13, 1 and 6 targets.
    nll_of, tokens_of = make_eval_step(objective)(model, batch)
    assert tokens_of[:6].tolist() == [3, 2, 4, 6, 5, 0]
    np.testing.assert_allclose(nll_of.sum(), sums["nll"], rtol=1e-5)
    token_bytes = jnp.arange(model.cfg.vocab_size) + 1
    assert int(target_bytes(batch, token_bytes)) == sum(sum(t + 1 for t in d[1:]) for d in DOCUMENTS)


def test_sampling_begins_with_meta_tokens(model):
    """Prompts of different lengths go on as the full forward pass behind meta tokens says."""
    prompts, meta, num = [d[:9] for d in DOCUMENTS], list(model.cfg.meta_ids), 14
    cfg = SamplingConfig(max_tokens=num, temperature=0.0)
    new = np.concatenate(list(generate(model, prompts, jax.random.key(0), cfg, tokens_at_once=7)), axis=1)
    rows = np.zeros((3, 4 + 9 + num), np.int32)
    for row, prompt, continuation in zip(rows, prompts, new, strict=True):
        row[: 4 + len(prompt) + num] = [*meta, *prompt, *continuation]
    logits = jax.jit(lambda tokens: model(tokens)[0])(rows)
    for row, prompt in enumerate(prompts):
        begin = 4 + len(prompt) - 1
        assert new[row].tolist() == logits[row, begin : begin + num].argmax(-1).tolist()
    with pytest.raises(ValueError, match=r"token 29.*0\.\.28"):
        next(generate(model, [meta[:1]], jax.random.key(0), cfg))


def test_sharded_equals_single(model):
    """Rows and channels among eight devices; meta tokens have gradients from all of them."""
    cfg = dataclasses.replace(model.cfg, vocab_size=32, prefix="L1")

    def run():
        lm = jax.jit(lambda: cfg.build(rngs=nnx.Rngs(0)))()
        rows = batch_of(lm, [*DOCUMENTS, DOCUMENTS[0]], together=False)
        batch = jax.tree.map(lambda x: shard(x, "BT"), rows)
        return jax.device_get(jax.jit(jax.value_and_grad(NextTokenConfig().build(), has_aux=True))(lm, batch))

    (want, _), want_grads = run()
    with jax.set_mesh(make_mesh({"data": 4, "model": 2})):
        (loss, _), grads = run()
    np.testing.assert_allclose(loss, want, rtol=1e-5)
    for got, expected in zip(jax.tree.leaves(grads), jax.tree.leaves(want_grads), strict=True):
        assert relative_error(got, expected) < 1e-4


def test_sizes():
    """Of the published model: three layers see all; its number of parameters, but for shared keys and values."""
    path = pathlib.Path(__file__).parents[1] / "configs" / "hymba.py"
    cfg = load_config(str(path), []).model
    layers = cfg.layers.split()
    assert [i for i, letter in enumerate(layers) if letter == "F"] == [0, 15, 31]
    assert len(layers) == 32
    window = cfg.blocks["W"].mixer.first
    assert window.sink_tokens == cfg.meta_tokens == 128
    costs = model_costs(cfg, context=2048)
    # Of 14 groups of neighbours, one has three members; all but the first of each have no keys and values.
    assert round((costs.parameters - 15 * 1600 * (5 * 64 + 5 * 128)) / 1e9, 2) == 1.52


def test_costs_count_meta_tokens(model):
    costs, without = (
        model_costs(cfg, context=64) for cfg in (model.cfg, dataclasses.replace(model.cfg, meta_tokens=0))
    )
    assert costs.parameters == num_parameters(model) == without.parameters + 4 * 16
    assert costs.training_flops == without.training_flops  # Of a token, whatever it is.


def test_bad_configurations(model):
    with pytest.raises(ValueError, match="meta_tokens=-1 must not be negative"):
        dataclasses.replace(model.cfg, meta_tokens=-1)
    path = pathlib.Path(__file__).parents[1] / "configs" / "hymba.py"
    with pytest.raises(ValueError, match=r"seq_len=128 has no room .* meta_tokens=128"):
        dataclasses.replace(load_config(str(path), []), seq_len=128)
