"""Every configuration is a run that can start: traced whole on an abstract mesh of 16 devices, nothing computed."""

import ast
import pathlib
import re

import jax
import jax.numpy as jnp
import jaxtyping
import pytest
from jax.sharding import AbstractMesh, AxisType
from jax.tree_util import keystr, tree_leaves_with_path

from efficient_lm.cli import load_config
from efficient_lm.data import Batch
from efficient_lm.sharding import spec
from efficient_lm.training import init_state, make_train_step

CONFIGS = sorted((pathlib.Path(__file__).parents[1] / "configs").glob("*.py"))
MESH = AbstractMesh((16,), ("data",), axis_types=(AxisType.Explicit,))


def layout(x):
    """Returns the mesh axes of each dimension; nothing if it is whole everywhere, declared or not."""
    return tuple(x.sharding.spec) if x.sharding is not None and any(x.sharding.spec) else ()


@pytest.mark.parametrize("path", CONFIGS, ids=[path.stem for path in CONFIGS])
def test_config(path, monkeypatch):
    monkeypatch.syspath_prepend(path.parent)
    # States made of shapes are not what their annotations say.
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    cfg = load_config(str(path), [])
    optimizer, _ = cfg.optimizer.build(cfg.num_steps)
    step = make_train_step(cfg, cfg.objective.build(), optimizer)
    with jax.sharding.use_abstract_mesh(MESH):
        state = jax.eval_shape(lambda: init_state(cfg, optimizer))

    # What its first lines promise is what it has, to the three digits they give.
    docstring = ast.get_docstring(ast.parse(path.read_text())) or ""
    (said, unit), *_ = re.findall(r"([\d.]+) ?([MB])[ -]param", docstring)
    count = sum(leaf.size for leaf in jax.tree.leaves(state.model))
    digits = len(said.partition(".")[2])
    assert round(count / {"M": 1e6, "B": 1e9}[unit], digits) == float(said)
    if "def config(size" in path.read_text():
        return  # Too long to trace; test_golden_models.py runs what they are made of.

    with jax.sharding.use_abstract_mesh(MESH):
        rows = max(cfg.batch_size, 16)  # The smallest runs have fewer rows than this mesh has devices.
        tokens = jax.ShapeDtypeStruct((rows, cfg.seq_len), jnp.int32, sharding=jax.NamedSharding(MESH, spec("BT")))
        after, metrics = jax.eval_shape(step, state, Batch(tokens, tokens, tokens))
    assert metrics["loss"].shape == ()
    for (where, old), new in zip(tree_leaves_with_path(state), jax.tree.leaves(after), strict=True):
        assert (old.shape, old.dtype) == (new.shape, new.dtype), keystr(where)
        assert layout(old) == layout(new), keystr(where)
