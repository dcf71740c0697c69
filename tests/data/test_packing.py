import collections
import itertools

import jax
import numpy as np
import pytest

from efficient_lm.data import Batch

BOS, EOS = 256, 257


def take(batches, num):
    return list(itertools.islice(batches, num))


def joined(batches, row):
    """Returns tokens, targets and segment ids of a row over many batches, one after another."""
    return [np.concatenate([getattr(b, f.name)[row] for b in batches]) for f in Batch.__dataclass_fields__.values()]


def documents_of(tokens, targets):
    """Cuts a stream back into whole documents and checks that what is read is what is predicted, one later."""
    cuts = np.flatnonzero(tokens == BOS)
    assert cuts[0] == 0
    found = []
    for begin, end in itertools.pairwise(cuts):
        assert targets[end - 1] == EOS
        np.testing.assert_array_equal(tokens[begin + 1 : end], targets[begin : end - 1])
        found.append(bytes(targets[begin : end - 1].astype(np.uint8)).decode())
    return found


def split_of(data):
    held_out = [d.decode() for d in data.validation_documents()]
    training = [data.tokenizer.decode(c.content(i)) for c in data.training for i in range(len(c))]
    return training, held_out


def growing():
    return ["z" * (n + 1) for n in range(50)]


@pytest.mark.parametrize(("batch_size", "seq_len"), [(1, 1), (1, 16), (3, 7), (4, 64), (8, 1000)])
def test_an_epoch_holds_every_token_once(build, documents, batch_size, seq_len):
    data = build(documents, batch_size=batch_size, seq_len=seq_len)
    training, _ = split_of(data)
    num_batches = 3 * data.num_train_targets // (batch_size * seq_len) + 3
    batches = take(data.train(), num_batches)
    rows = [documents_of(*joined(batches, r)[:2]) for r in range(batch_size)]
    # Document n of the shuffled order is document n // batch_size of row n % batch_size.
    order = [d for layer in zip(*rows, strict=False) for d in layer]
    epochs = [order[n : n + len(training)] for n in range(0, len(order) - len(training) + 1, len(training))]
    assert len(epochs) >= 2
    for epoch in epochs:
        assert sorted(epoch) == sorted(training)
    assert epochs[0] != epochs[1]


def test_segments_count_the_documents_of_a_row(build, documents):
    for batch in take(build(documents).train(), 50):
        begins = batch.tokens == BOS
        np.testing.assert_array_equal(batch.segment_ids, np.cumsum(begins, axis=1) + ~begins[:, :1])


def test_without_a_document_mask_a_row_is_one_segment(build, documents):
    masked, plain = build(documents), build(documents, document_mask=False)
    for a, b in zip(take(masked.train(), 5), take(plain.train(), 5), strict=True):
        np.testing.assert_array_equal(a.tokens, b.tokens)
        assert (b.segment_ids == 1).all()
    for a, b in zip(masked.validation(), plain.validation(), strict=True):
        np.testing.assert_array_equal(b.segment_ids, a.segment_ids > 0)


@pytest.mark.parametrize(("batch_size", "seq_len"), [(1, 5), (4, 16), (64, 64)])
def test_validation_holds_every_target_once(build, documents, batch_size, seq_len):
    data = build(documents, batch_size=batch_size, seq_len=seq_len)
    batches = list(data.validation())
    assert len(batches) == len(data.validation())
    assert {b.tokens.shape for b in batches} == {(batch_size, seq_len)}
    tokens, targets, segment_ids = (
        np.concatenate([getattr(b, name).ravel() for b in batches]) for name in ("tokens", "targets", "segment_ids")
    )
    real = segment_ids > 0
    num = data.num_validation_targets
    assert real.sum() == num
    assert real[:num].all()
    _, held_out = split_of(data)
    assert documents_of(np.append(tokens[real], BOS), np.append(targets[real], 0)) == held_out
    assert data.tokenizer.token_bytes[targets[real]].sum() == sum(len(d.encode()) for d in held_out)
    for again, batch in zip(data.validation(), batches, strict=True):
        np.testing.assert_array_equal(again.tokens, batch.tokens)


@pytest.mark.parametrize("num_hosts", [2, 4])
@pytest.mark.parametrize("which", ["train", "validation"])
def test_the_number_of_hosts_changes_nothing(build, documents, num_hosts, which):
    data = build(documents, growing(), weights=(1.0, 2.0), batch_size=8)
    per_host = 8 // num_hosts
    hosts = [getattr(data, which)(rows=range(n * per_host, (n + 1) * per_host)) for n in range(num_hosts)]
    parts = [take(host, 12) for host in hosts]
    whole = take(getattr(data, which)(), 12)
    for batch, *split in zip(whole, *parts, strict=True):
        jax.tree.map(lambda want, *got: np.testing.assert_array_equal(np.concatenate(got), want), batch, *split)


@pytest.mark.parametrize("weights", [(1.0, 1.0), (3.0, 1.0), (0.1, 0.9)])
def test_weights_are_shares_of_tokens_whatever_the_lengths(build, weights):
    short = [f"{n:03}" + "a" * 46 for n in range(100)]
    long = [f"{n:03}" + "b" * (200 + 60 * n) for n in range(20)]
    data = build(short, long, weights=weights, batch_size=4, seq_len=512)
    counts = collections.Counter()
    for batch in take(data.train(), 60):
        counts.update(dict(zip(*np.unique(batch.targets, return_counts=True), strict=True)))
    a, b = (counts[ord(letter)] for letter in "ab")
    # The letter is 46 of the 50 targets of a short document, and nearly all of a long one.
    share = a * 50 / 46 / (a * 50 / 46 + b)
    np.testing.assert_allclose(share, weights[0] / sum(weights), atol=0.015)


def test_rows_do_not_begin_with_the_same_source(build):
    data = build(["a" * (20 + n) for n in range(30)], ["b" * (20 + n) for n in range(30)], batch_size=32)
    first = next(data.train()).targets[:, 0]
    assert 8 <= (first == ord("a")).sum() <= 24


def test_seed_decides_the_order(build, documents):
    tokens = [next(build(documents, seed=seed, seq_len=128).train()).tokens for seed in (0, 0, 1)]
    np.testing.assert_array_equal(tokens[0], tokens[1])
    assert (tokens[0] != tokens[2]).any()


def test_a_batch_is_a_pytree(build, documents):
    batch = next(build(documents).train())
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), batch)
    assert [x.dtype for x in jax.tree.leaves(shapes)] == [np.int32] * 3
    assert jax.jit(lambda b: b)(batch).tokens.shape == (4, 16)


def test_split_depends_on_content_only(build, documents):
    training, held_out = split_of(build(documents))
    assert held_out
    assert sorted(training + held_out) == sorted(documents)
    again, held_again = split_of(build([*documents[::-1], "one more"], documents[:20], run="other"))
    assert set(held_again) - {"one more"} == set(held_out)
    assert not set(again) & set(held_again)
    _, more = split_of(build(documents, run="third", validation_fraction=0.5))
    assert set(held_out) < set(more)
