import json
import random

import numpy as np
import pytest
import tokenizers as hf

from efficient_lm.data import BytesConfig, FileConfig, StdlibConfig, TrainBPEConfig

TEXT = [(f"def function_{n}(argument, other):\n    return argument + other * {n}\n").encode() for n in range(200)]
HARD = [
    b"",
    b" ",
    b"\x00\xff\xfe",
    "é e\u0301 ﬁ 日本 \U0001f600".encode(),
    b"<|bos|><|eos|><|endoftext|></s><unk> and <0x41>",
    b"\xf0\x9f\x98 cut, \xed\xa0\x80 surrogate, \xc3(",
    b"  two  spaces\r\n\ttabs\n\n\n don't",
    "\u2581 the space of SentencePiece \u0120".encode(),
    *(random.Random(n).randbytes(300) for n in range(3)),
]


def byte_level(path, special):
    tokenizer = hf.Tokenizer(hf.models.BPE())
    tokenizer.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = hf.decoders.ByteLevel()
    trainer = hf.trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=hf.pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator((t.decode() for t in TEXT), trainer)
    tokenizer.save(str(path))
    return tokenizer


def byte_fallback(path):
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"<0x{b:02X}>": 3 + b for b in range(256)}
    vocab |= {c: 259 + n for n, c in enumerate("▁abcdefghijklmnopqrstuvwxyz")}
    tokenizer = hf.Tokenizer(hf.models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = hf.normalizers.Replace(" ", "▁")
    tokenizer.decoder = hf.decoders.Sequence(
        [hf.decoders.Replace("▁", " "), hf.decoders.ByteFallback(), hf.decoders.Fuse()]
    )
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.save(str(path))


@pytest.fixture(params=["bytes", "trained", "byte-level file", "byte-fallback file"])
def tokenizer(request, tmp_path):
    path = tmp_path / "tokenizer.json"
    if request.param == "bytes":
        return BytesConfig().build(tmp_path)
    if request.param == "trained":
        return TrainBPEConfig(vocab_size=320).build(tmp_path, lambda: iter(TEXT))
    if request.param == "byte-level file":
        byte_level(path, ["<|endoftext|>"])
    else:
        byte_fallback(path)
    return FileConfig(path=str(path)).build(tmp_path)


@pytest.mark.parametrize("content", HARD, ids=range(len(HARD)))
def test_round_trip(tokenizer, content):
    if tokenizer.encode("\u2581").tolist() == tokenizer.encode(" ").tolist():
        content = content.replace("\u2581".encode(), b" ")  # What byte fallback does, as documented.
    ids = tokenizer.encode(content)
    assert ids.dtype == np.int32
    assert not np.isin(ids, [tokenizer.bos_id, tokenizer.eos_id]).any()
    assert tokenizer.decode_bytes(ids) == content
    assert tokenizer.decode(ids) == content.decode(errors="replace")
    assert tokenizer.token_bytes[ids].sum() == len(content)
    stream = tokenizer.stream()
    assert "".join([stream.push(int(i)) for i in ids]) + stream.flush() == content.decode(errors="replace")


def test_text_and_bytes_are_the_same(tokenizer):
    np.testing.assert_array_equal(tokenizer.encode("naïve ☃"), tokenizer.encode("naïve ☃".encode()))
    got = tokenizer.encode_batch(TEXT[:3] + HARD)
    for ids, content in zip(got, TEXT[:3] + HARD, strict=True):
        np.testing.assert_array_equal(ids, tokenizer.encode(content))


def test_ids_are_in_the_vocabulary(tokenizer):
    assert tokenizer.token_bytes.shape == (tokenizer.vocab_size,)
    assert tokenizer.token_bytes[[tokenizer.bos_id, tokenizer.eos_id]].sum() == 0
    assert max(ids.max(initial=0) for ids in tokenizer.encode_batch(HARD)) <= np.iinfo(tokenizer.dtype).max


def test_a_character_waits_for_its_last_byte(tmp_path):
    tokenizer = BytesConfig().build(tmp_path)
    stream = tokenizer.stream()
    assert [stream.push(b) for b in "é😀".encode()] == ["", "é", "", "", "", "😀"]
    assert stream.push(0xC3) == ""
    assert stream.flush() == "\ufffd"


def test_training_is_deterministic_and_happens_once(tmp_path):
    config = TrainBPEConfig(vocab_size=320)
    a = config.build(tmp_path / "a", lambda: iter(TEXT))
    config.build(tmp_path / "b", lambda: iter(TEXT))
    assert (tmp_path / "a/tokenizer.json").read_bytes() == (tmp_path / "b/tokenizer.json").read_bytes()
    again = config.build(tmp_path / "a")  # Without any text.
    assert again.fingerprint == a.fingerprint
    assert a.vocab_size == 320
    assert len(a.encode(TEXT[7])) < len(TEXT[7]) / 3


def test_training_sees_training_documents_only(build, documents, tmp_path):
    config = TrainBPEConfig(vocab_size=270)
    data = build(documents, tokenizer=config, validation_fraction=0.5)
    training = [data.tokenizer.decode_bytes(c.content(i)) for c in data.training for i in range(len(c))]
    assert data.tokenizer.pieces == config.build(tmp_path / "part", lambda: iter(training)).pieces
    everything = [document.encode() for document in documents]
    assert data.tokenizer.pieces != config.build(tmp_path / "all", lambda: iter(everything)).pieces


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: setattr(t, "normalizer", hf.normalizers.Lowercase()), "loses text"),
        (lambda t: setattr(t, "pre_tokenizer", hf.pre_tokenizers.Whitespace()), "loses text"),
        (lambda t: setattr(t, "normalizer", hf.normalizers.NFKC()), "loses text"),
        (lambda t: setattr(t, "normalizer", hf.normalizers.NFC()), None),
        (lambda t: t.enable_truncation(5), None),
        (lambda t: t.enable_padding(length=500), None),
    ],
)
def test_a_file_that_loses_text_is_refused(tmp_path, change, message):
    path = tmp_path / "tokenizer.json"
    tokenizer = byte_level(path, ["<|endoftext|>"])
    change(tokenizer)
    tokenizer.save(str(path))
    if message:
        with pytest.raises(ValueError, match=message):
            FileConfig(path=str(path)).build(tmp_path)
    else:
        built = FileConfig(path=str(path)).build(tmp_path)
        for content in HARD:
            assert built.decode_bytes(built.encode(content)) == content


def test_special_tokens_of_a_file(tmp_path):
    path = tmp_path / "tokenizer.json"
    byte_level(path, ["[start]", "[end]"])
    with pytest.raises(ValueError, match=r"bos: the tokenizer has no token any of .*; name one that it has"):
        FileConfig(path=str(path)).build(tmp_path)
    with pytest.raises(ValueError, match=r"eos: the tokenizer has no token '\[stop\]'; name one that it has"):
        FileConfig(path=str(path), bos="[start]", eos="[stop]").build(tmp_path)
    tokenizer = FileConfig(path=str(path), bos="[start]", eos="[end]").build(tmp_path)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (0, 1)


@pytest.mark.parametrize(
    ("config", "content", "error", "message"),
    [
        (FileConfig(path="nowhere.json"), None, FileNotFoundError, "'nowhere.json' does not exist"),
        (TrainBPEConfig(vocab_size=258), None, ValueError, "vocab_size 258 is too small"),
        (TrainBPEConfig(vocab_size=320), None, FileNotFoundError, "written when training starts"),
        (TrainBPEConfig(vocab_size=10_000), TEXT, ValueError, "fewer than vocab_size 10000; lower it"),
    ],
)
def test_errors(tmp_path, config, content, error, message):
    with pytest.raises(error, match=message):
        config.build(tmp_path, (lambda: iter(content)) if content else None)


def test_a_broken_file_is_named(tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps({"no": "tokenizer"}))
    with pytest.raises(ValueError, match=r"tokenizer.json is not a tokenizer.json of the tokenizers library"):
        FileConfig(path=str(path)).build(tmp_path)


def test_a_run_keeps_its_tokenizer(tmp_path):
    path, run_dir = tmp_path / "somewhere.json", tmp_path / "run"
    config = FileConfig(path=str(path))
    byte_level(path, ["<|endoftext|>"])
    trained_with = config.build(run_dir, lambda: iter(TEXT))
    byte_level(path, ["<|endoftext|>", "<|pad|>"])
    with pytest.raises(ValueError, match="is not the tokenizer that the run began with"):
        config.build(run_dir, lambda: iter(TEXT))
    path.unlink()
    assert config.build(run_dir).fingerprint == trained_with.fingerprint


def test_another_vocabulary_in_the_run_folder(tmp_path):
    TrainBPEConfig(vocab_size=300).build(tmp_path, lambda: iter(TEXT))
    with pytest.raises(ValueError, match="has 300 tokens, not vocab_size 320; take another run folder"):
        TrainBPEConfig(vocab_size=320).build(tmp_path, lambda: iter(TEXT))


def test_learns_from_a_part_of_each_source(build, documents):
    """A sample is enough: the second source is heard although the first alone has more bytes."""
    first, second = ["xyxyxyxy" * 50] * 20, ["pqpqpqpq" * 50] * 20
    tokenizer = build(
        [f"{n}{d}" for n, d in enumerate(first)],
        [f"{n}{d}" for n, d in enumerate(second)],
        tokenizer=TrainBPEConfig(vocab_size=262, sample_bytes=2000),
    ).tokenizer
    assert {b"xy", b"pq"} <= set(tokenizer.pieces)


def test_stdlib_is_text(tmp_path):
    assert sum(map(len, StdlibConfig().build().texts())) > 5_000_000
