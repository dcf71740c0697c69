"""Two mixers in a layer: which axes of the design are one and the same, and which are not."""

import dataclasses
from typing import Any

import contract
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from efficient_lm.layers import rms_normalize
from efficient_lm.mixers import AttentionConfig, Mamba2Config, MambaConfig, ParallelMixerConfig

D = contract.D_MODEL
ATTENTION = AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=8, value_dim=12)
MAMBA2 = Mamba2Config(num_heads=4, num_groups=2, key_dim=8, value_dim=16)
BLOCK = ParallelMixerConfig(first=ATTENTION, second=MAMBA2, scale="vector")
X_BTD = contract.inputs()


def build(**changes) -> Any:
    mixer = dataclasses.replace(BLOCK, **changes).build(D, rngs=nnx.Rngs(0))
    for i, scale in enumerate((mixer.first_scale, mixer.second_scale)):
        if scale is not None:
            scale[...] = jax.random.uniform(jax.random.key(i), scale.shape, minval=0.5, maxval=2.0)
    return mixer


def test_three_designs_are_one_function():
    """Concatenation and one projection, a sum of two projections, and their difference: weights in other places."""
    added, subtracted = build(fusion="add"), build(fusion="subtract")
    joined = build(fusion="concatenate", joint_projection=True)
    subtracted.second.o_proj.kernel[...] *= -1
    parts = [branch.o_proj.kernel[...].reshape(-1, D) for branch in (added.first, added.second)]
    joined.o_proj.kernel[...] = jnp.concatenate(parts)
    want_BTD, _ = contract.call(added, X_BTD)
    for mixer in (subtracted, joined):
        contract.assert_close(contract.call(mixer, X_BTD)[0], want_BTD, 1e-6, mixer.cfg.fusion)
    # Signs and weights matter.
    assert not np.allclose(contract.call(build(fusion="subtract"), X_BTD)[0], want_BTD, atol=1e-2)


@pytest.mark.parametrize(("norm", "scale"), [(None, "scalar"), ("head", None), ("branch", "vector")])
def test_norms_and_scales(norm, scale):
    mixer = build(norm=norm, scale=scale, fusion="add")
    want_BTD = 0.0
    for branch, factor in ((mixer.first, mixer.first_scale), (mixer.second, mixer.second_scale)):
        o_BTNP, _ = branch.heads(X_BTD)
        if norm is not None:
            o_BTNP = rms_normalize(o_BTNP, axes=(-1,) if norm == "head" else (-2, -1))
        want_BTD += branch.o_proj(o_BTNP * (1.0 if factor is None else factor[...]))
    contract.assert_close(mixer(X_BTD)[0], want_BTD, 1e-6, f"{norm} {scale}")


@pytest.mark.parametrize("joint", [False, True])
def test_gate(joint):
    """A gate that is open lets the first mixer through alone, one that is shut the second."""
    mixer = build(second=MambaConfig(d_inner=48, dt_rank=6), fusion="gate", joint_projection=joint)
    for sign, branch, scale in ((1, mixer.first, mixer.first_scale), (-1, mixer.second, mixer.second_scale)):
        # The input's first channel decides.
        mixer.gate_proj.kernel[...] = jnp.zeros_like(mixer.gate_proj.kernel[...]).at[0].set(1e3 * sign)
        o = mixer._scaled(branch.heads(X_BTD.at[:, :, 0].set(1.0))[0], scale)
        want_BTD = mixer.o_proj(o.reshape(*o.shape[:2], -1)) if joint else branch.o_proj(o)
        contract.assert_close(mixer(X_BTD.at[:, :, 0].set(1.0))[0], want_BTD, 1e-6, f"gate {sign}")


def test_joint_gate_on_a_mesh():
    """Channels of heads and channels without heads meet on the devices that have them."""
    cfg = dataclasses.replace(
        BLOCK, second=MambaConfig(d_inner=48, dt_rank=6), fusion="gate", joint_projection=True, norm="head"
    )
    contract.sharded_equals_single(cfg)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fusion": "concatenate"}, "needs joint_projection"),
        ({"fusion": "add", "joint_projection": True}, r"one width, not \[48, 64\]"),
        ({"second": BLOCK}, "must both be HeadsMixers"),
    ],
)
def test_what_does_not_fit(changes, message):
    with pytest.raises(ValueError, match=message):
        build(**changes)
