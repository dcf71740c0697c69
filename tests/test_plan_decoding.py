"""What decoding takes, against arithmetic by hand and against costs.py."""

import dataclasses
import json

import jaxtyping
import pytest

from efficient_lm.costs import model_costs
from efficient_lm.plan.decoding import make_decoding
from efficient_lm.plan.report import plot_decoding, print_decoding
from efficient_lm.topologies import CHIPS, parse_target
from tests.test_plan import EXPERTS, HYBRID, TINY
from tests.test_transformer_call import MODEL as CALLS

V, D, F, N, H, LAYERS = 64, 16, 32, 2, 8, 3
MATRICES, NORMS = V * D + LAYERS * (4 * D * N * H + 3 * D * F), D + LAYERS * 2 * D
BANDWIDTH, FLOPS, ROOM = CHIPS["v5e"].memory_bytes_per_second, CHIPS["v5e"].flops, CHIPS["v5e"].memory_bytes


@pytest.fixture(autouse=True)
def shapes_of_parts(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # States of shapes are not what annotations say.


def decoding(cfg=TINY.model, on="v5e:1x1", axes=None, contexts=(1000,), batches=(2,)):
    return make_decoding(cfg, parse_target(on), axes or {"model": 1}, contexts=contexts, batches=batches)


@pytest.mark.parametrize(("data", "model"), [(1, 1), (1, 2), (2, 1), (2, 2)])
def test_attention_by_hand(data, model):
    found = decoding(on=f"v5e:{data}x{model}", axes={"data": data, "model": model})
    held = 2 * (MATRICES // (data * model) + NORMS)
    # Keys and values in two bytes, split along heads; and how many tokens there are, which all heads count.
    state = lambda tokens: LAYERS * (2 * N * H * 2 * tokens // model + 4)
    (context,), token = found.contexts, found.tokens[0]
    assert (found.num_parameters, found.device_parameter_bytes) == (MATRICES + NORMS, held)
    assert context.state_bytes == LAYERS * (2 * N * H * 2 * 1000 + 4)
    # A device has the sequences of its row of the mesh.
    assert context.device_bytes == state(1000) / data
    assert context.largest_batch == (ROOM - held) // state(1000) * data
    assert (token.batch_size, token.peak_bytes) == (2, held + 2 * state(1000) // data)
    assert token.moved_bytes == held + 2 * (state(1000) + state(1)) // data
    assert token.seconds["memory"] == token.moved_bytes / BANDWIDTH
    # Two operations for a weight, four for a number of each key that is seen: a thousand, or one more.
    least, most = (2 * (2 * MATRICES + LAYERS * 4 * N * H * keys) for keys in (1000, 1001))
    assert least <= token.flops <= most
    assert token.seconds["computing"] == token.flops / (FLOPS * data * model)
    assert token.tokens_per_second == 2 / max(token.seconds.values())


UNTIED = dataclasses.replace(HYBRID, tied_embeddings=False)


@pytest.mark.parametrize("batch_size", [1, 8])
@pytest.mark.parametrize("cfg", [HYBRID, UNTIED, EXPERTS.model, CALLS], ids=["M", "head", "E", "calls"])
def test_one_device_moves_what_costs_say(cfg, batch_size):
    (token, *_) = decoding(cfg, on="tpu7x:2x2x1", contexts=(100,), batches=(batch_size,)).tokens
    said = model_costs(cfg, context=100, batch_size=batch_size)
    assert token.moved_bytes == pytest.approx(batch_size * said.decoding_bytes, rel=1e-12)


def test_what_fits_and_what_does_not(tmp_path):
    """The largest batch fits and one more does not; batches that the mesh cannot divide are left out."""
    found = decoding(on="v5e:2x2", axes={"data": 4}, contexts=(10**6, 10**8), batches=(1, 8, 64))
    assert found.rows == 4
    for context in found.contexts:
        sizes = {token.batch_size: token for token in found.tokens if token.context == context.context}
        assert 1 not in sizes
        more = decoding(
            on="v5e:2x2", axes={"data": 4}, contexts=(context.context,), batches=(context.largest_batch + 4,)
        )
        assert sizes.get(context.largest_batch, sizes[8]).fits == bool(context.largest_batch)
        assert not more.tokens[-1].fits
    print_decoding(found)
    plot_decoding(found, tmp_path / "decoding.png")
    assert (tmp_path / "decoding.png").stat().st_size > 1000
    saved = json.loads(json.dumps(found.to_json()))
    assert saved["tokens"][0]["bound"] == "memory"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"axes": {"model": 4}, "on": "v5e:2x2"}, "2 heads .* cannot be divided among model=4"),
        ({"contexts": (0,)}, "take numbers of at least 1"),
        (
            {"cfg": dataclasses.replace(TINY.model, vocab_size=2**30)},
            "parameters take 32.00 GiB of the 16.00 of a device",
        ),
    ],
)
def test_refuses_in_one_line(change, message):
    with pytest.raises(ValueError, match=message) as error:
        decoding(**change)
    assert "\n" not in str(error.value)
