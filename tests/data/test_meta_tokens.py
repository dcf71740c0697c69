"""Meta tokens come before every piece of a document in a row; without them, it is the same stream of targets."""

import itertools
import json

import jax
import numpy as np
import pytest

META = range(300, 304)


def take(batches, num):
    return list(itertools.islice(batches, num))


def texts(batches, row=slice(None)):
    """Returns what is read and what is predicted, one after another, without meta tokens and padding."""
    parts = [(b.tokens[row][b.is_target[row]], b.targets[row][b.is_target[row]]) for b in batches]
    return [np.concatenate(part) for part in zip(*parts, strict=True)]


def check_rows(batches):
    """Every document begins with the meta tokens, which predict nothing, and nothing else is without a target."""
    for tokens, targets, ids in (row for b in batches for row in zip(b.tokens, b.targets, b.segment_ids, strict=True)):
        for document in range(1, ids.max() + 1):
            (where,) = np.nonzero(ids == document)
            assert len(where) > len(META)
            np.testing.assert_array_equal(tokens[where[: len(META)]], META)
            assert (targets[where[: len(META)]] == -1).all()
            assert (targets[where[len(META) :]] >= 0).all()
            assert (tokens[where[len(META) :]] < META.start).all()


@pytest.mark.parametrize("seq_len", [5, 16, 61])
def test_training_stream(build, documents, seq_len):
    plain, meta = (build(documents, seq_len=seq_len, meta_tokens=tokens) for tokens in ((), META))
    batches = take(meta.train(), 60)
    check_rows(batches)
    for row in range(4):
        got, want = texts(batches, row), texts(take(plain.train(), 60), row)
        for a, b in zip(got, want, strict=True):
            np.testing.assert_array_equal(a, b[: len(a)])
    # Where a document ends too near to the end of a row, padding is left, never more than that.
    padding = [np.sum(b.segment_ids == 0, axis=1) for b in batches]
    assert np.max(padding) <= len(META)
    assert seq_len == 5 or np.max(padding) > 0


@pytest.mark.parametrize(("batch_size", "seq_len"), [(1, 5), (4, 16), (16, 61)])
def test_validation_holds_every_target_once(build, documents, batch_size, seq_len):
    plain, meta = (
        build(documents, batch_size=batch_size, seq_len=seq_len, meta_tokens=tokens) for tokens in ((), META)
    )
    batches = list(meta.validation())
    assert len(batches) == len(meta.validation())
    check_rows(batches)
    for got, want in zip(texts(batches), texts(plain.validation()), strict=True):
        assert len(got) == meta.num_validation_targets
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("which", ["train", "validation"])
def test_the_number_of_hosts_changes_nothing(build, documents, which):
    data = build(documents, meta_tokens=META)
    parts = [take(getattr(data, which)(rows=rows), 12) for rows in (range(3), range(3, 4))]
    for batch, *split in zip(take(getattr(data, which)(), 12), *parts, strict=True):
        jax.tree.map(lambda want, *got: np.testing.assert_array_equal(np.concatenate(got), want), batch, *split)


def test_resume(build, documents):
    """The position is in the documents: meta tokens are no part of it."""
    plain, meta = (build(documents, meta_tokens=tokens) for tokens in ((), META))
    whole, batches = take(meta.train(), 12), meta.train()
    for step in range(12):
        state = json.loads(json.dumps(batches.get_state()))
        resumed = meta.train()
        resumed.set_state(state)
        for got, want in zip(take(resumed, 12 - step), whole[step:], strict=True):
            jax.tree.map(np.testing.assert_array_equal, got, want)
        without = plain.train()
        without.set_state(state)
        for got, want in zip(texts(take(without, 3), 0), texts(whole[step:], 0), strict=True):
            num = min(len(got), len(want))
            np.testing.assert_array_equal(got[:num], want[:num])
        next(batches)


def test_an_epoch_in_slots(build, documents):
    data = build(documents, batch_size=1, seq_len=16, meta_tokens=META)
    assert build(documents).num_train_slots == build(documents).num_train_targets
    batches = take(data.train(), 400)
    per_target = 400 * 16 / sum(int(b.is_target.sum()) for b in batches)
    # Rows that begin with a new document have no part of another, and some end with padding.
    np.testing.assert_allclose(data.num_train_slots / data.num_train_targets, per_target, rtol=0.05)
