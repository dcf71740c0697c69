import gzip
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tyro
import zstandard
from array_record.python.array_record_module import ArrayRecordWriter

from efficient_lm.data import (
    ArrayRecordConfig,
    BytesConfig,
    DataConfig,
    HuggingFaceConfig,
    JsonlConfig,
    ParquetConfig,
    StdlibConfig,
    TextConfig,
    TokensConfig,
    TrainBPEConfig,
)

DOCUMENTS = [f"document {n}, ünïcode\n" * (n % 3 + 1) for n in range(30)]


def lines(documents):
    return "".join(json.dumps({"text": d, "n": 1}) + "\n" for d in documents).encode()


def text_directory(folder):
    for n, document in enumerate(DOCUMENTS):
        file = folder / f"sub{n // 10}" / f"{n:02}.txt"
        file.parent.mkdir(exist_ok=True)
        file.write_text(document)
    (folder / ".hidden").write_bytes(b"\xff")
    return TextConfig(path=str(folder))


def text_pattern(folder):
    text_directory(folder)
    (folder / "image.png").write_bytes(b"\xff")
    return TextConfig(path=str(folder / "**/*.txt"))


def text_separated(folder):
    (folder / "all.txt").write_text("<|endoftext|>".join(DOCUMENTS))
    return TextConfig(path=str(folder / "all.txt"), separator="<|endoftext|>")


def jsonl(folder):
    (folder / "a.jsonl").write_bytes(lines(DOCUMENTS).replace(b"\n", b"\n\n", 3))
    return JsonlConfig(path=str(folder / "a.jsonl"))


def jsonl_compressed(folder):
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(lines(DOCUMENTS[:10])))
    two_frames = [zstandard.compress(lines(part)) for part in (DOCUMENTS[10:15], DOCUMENTS[15:20])]
    (folder / "b.jsonl.zst").write_bytes(b"".join(two_frames))
    (folder / "c.jsonl").write_bytes(lines(DOCUMENTS[20:]))
    (folder / "readme.md").write_text("not data")
    return JsonlConfig(path=str(folder))


def parquet(folder):
    pq.write_table(pa.table({"body": DOCUMENTS[:20], "n": range(20)}), folder / "a.parquet", row_group_size=3)
    pq.write_table(pa.table({"n": range(10), "body": DOCUMENTS[20:]}), folder / "b.parquet")
    return ParquetConfig(path=str(folder), column="body")


def array_record(folder):
    for name, part in (("a", DOCUMENTS[:20]), ("b", DOCUMENTS[20:])):
        writer = ArrayRecordWriter(str(folder / f"{name}.array_record"), "group_size:4")
        for document in part:
            writer.write(document.encode())
        writer.close()
    return ArrayRecordConfig(path=str(folder))


def hugging_face_disk(folder):
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_dict({"text": DOCUMENTS, "n": list(range(30))})
    datasets.DatasetDict({"train": table, "test": table.select([0])}).save_to_disk(folder / "saved")
    return HuggingFaceConfig(name=str(folder / "saved"))


def hugging_face_files(folder):
    pytest.importorskip("datasets")
    (folder / "train.jsonl").write_bytes(lines(DOCUMENTS))
    return HuggingFaceConfig(name=str(folder))


def tokens_npy(folder):
    np.save(folder / "a.npy", np.concatenate([[256, *d.encode(), 257] for d in DOCUMENTS]).astype(np.uint32))
    return TokensConfig(path=str(folder / "a.npy"))


def tokens_bin(folder):
    tokens = np.concatenate([[*d.encode(), 257] for d in DOCUMENTS]).astype(np.uint16)
    tokens[:-1].tofile(folder / "a.bin")  # The last eos may be missing.
    return TokensConfig(path=str(folder / "a.bin"))


WRITERS = [
    text_directory,
    text_pattern,
    text_separated,
    jsonl,
    jsonl_compressed,
    parquet,
    array_record,
    hugging_face_disk,
    hugging_face_files,
    tokens_npy,
    tokens_bin,
]


@pytest.mark.parametrize("write", WRITERS, ids=lambda f: f.__name__)
@pytest.mark.filterwarnings("default:::(?!efficient_lm)")
def test_every_source_gives_the_documents_in_order(write, tmp_path):
    (tmp_path / "in").mkdir()
    source = write(tmp_path / "in").build()
    tokenizer = BytesConfig().build(tmp_path)
    for _ in range(2):  # The second time from the cache.
        corpus = source.corpus(tokenizer, tmp_path / "cache")
        assert [tokenizer.decode(corpus.content(i)) for i in range(len(corpus))] == DOCUMENTS
        assert corpus.num_targets == sum(len(d.encode()) + 1 for d in DOCUMENTS)


def test_the_cache_notices_a_change(tmp_path):
    config = jsonl(tmp_path)
    tokenizer = BytesConfig().build(tmp_path)
    assert len(config.build().corpus(tokenizer, tmp_path / "cache")) == 30
    (tmp_path / "a.jsonl").write_bytes(lines(DOCUMENTS[:7]))
    assert len(config.build().corpus(tokenizer, tmp_path / "cache")) == 7


def test_a_killed_run_leaves_no_half_cache(tmp_path):
    config, tokenizer = jsonl(tmp_path), BytesConfig().build(tmp_path)
    (tmp_path / "a.jsonl").write_bytes(lines(DOCUMENTS) + b"{")
    for _ in range(2):
        with pytest.raises(ValueError, match=r"a.jsonl:31 is not JSON"):
            config.build().corpus(tokenizer, tmp_path / "cache")


def test_one_cache_serves_many_runs(build, tmp_path, monkeypatch):
    cache = str(tmp_path / "cache")
    first = build(DOCUMENTS, cache_dir=cache)
    monkeypatch.setattr(type(first.tokenizer), "encode_batch", None)  # Whoever tokenises again breaks.
    source = first.config.sources[0]
    again = DataConfig(sources=(source,), cache_dir=cache, validation_fraction=0.2)
    data = again.build(run_dir=tmp_path / "another", batch_size=2, seq_len=8, seed=0)
    assert data.fingerprint == first.fingerprint


def test_documents_without_text_are_left_out(build):
    data = build(["", *DOCUMENTS, "", ""])
    assert sum(map(len, data.training)) + sum(map(len, data.held_out)) == len(DOCUMENTS)


def test_stdlib(tmp_path):
    data = DataConfig().build(run_dir=tmp_path, batch_size=2, seq_len=64, seed=0)
    held_out = b"".join(data.validation_documents())
    assert data.num_train_targets > 5_000_000
    assert 0.01 < len(held_out) / data.num_train_targets < 0.15
    texts = list(StdlibConfig().build().texts())
    assert any(b"class JSONDecoder" in text for text in texts)
    assert not any(b"import unittest.mock as idlelib" in text for text in texts)
    assert (next(data.train()).segment_ids > 0).all()


def test_token_files_have_the_split_of_their_content(tmp_path):
    (tmp_path / "in").mkdir()
    splits = []
    for write in (tokens_npy, tokens_bin):
        config = DataConfig(sources=(write(tmp_path / "in"),), validation_fraction=0.3)
        splits.append(list(config.build(run_dir=tmp_path, batch_size=2, seq_len=8, seed=0).validation_documents()))
    assert splits[0] == splits[1]


def bad(name, content=b""):
    """Writes a file that is wrong."""

    def write(folder):
        (folder / name).write_bytes(content)
        return folder / name

    return write


MISSING = lambda folder: folder / "missing"
FOLDER = lambda folder: folder
ONE = lines(["one"])

ERRORS = [
    (TextConfig, MISSING, {}, FileNotFoundError, "missing' does not exist; give a file, a directory or a pattern"),
    (TextConfig, lambda f: f / "*.txt", {}, FileNotFoundError, r"\*.txt' matches no files"),
    (TextConfig, FOLDER, {}, FileNotFoundError, "holds no text files"),
    (JsonlConfig, FOLDER, {}, FileNotFoundError, r"holds no .jsonl or .jsonl.gz or .jsonl.zst files"),
    (TextConfig, bad("a.txt", b"ok \xff"), {}, ValueError, r"a.txt is not UTF-8 at byte 3; convert it or leave it out"),
    (TextConfig, bad("a.txt"), {}, ValueError, "a.txt holds no text; point it at documents that are not empty"),
    (JsonlConfig, bad("a.jsonl", ONE + b"{]\n"), {}, ValueError, r"a.jsonl:2 is not JSON"),
    (JsonlConfig, bad("a.jsonl", ONE), {"field": "body"}, ValueError, r"a.jsonl:1 has no field 'body'; it has text, n"),
    (JsonlConfig, bad("a.jsonl", ONE + b"[1]"), {}, ValueError, r"a.jsonl:2 has no field 'text'; it is not an object"),
    (JsonlConfig, bad("a.jsonl", ONE), {"field": "n"}, ValueError, r"a.jsonl:1 is int, not text; choose the column"),
    (JsonlConfig, bad("a.jsonl", b'{"text": "\\ud800"}'), {}, ValueError, "a.jsonl:1 holds half of a surrogate pair"),
    (JsonlConfig, bad("a.jsonl", b'{"text": "\xff"}'), {}, ValueError, "a.jsonl:1 is not JSON"),
    (JsonlConfig, bad("a.jsonl.gz", ONE), {}, ValueError, "a.jsonl.gz is not a whole"),
    (JsonlConfig, bad("a.jsonl.gz", gzip.compress(ONE)[:-9]), {}, ValueError, "is not a whole .gz file"),
    (JsonlConfig, bad("a.jsonl.zst", ONE), {}, ValueError, "a.jsonl.zst is not a whole .zst file"),
    (ParquetConfig, bad("a.parquet", ONE), {}, ValueError, "a.parquet is not a Parquet file"),
    (ArrayRecordConfig, bad("a.array_record", ONE * 9), {}, ValueError, "a.array_record is not an ArrayRecord file"),
    (
        TokensConfig,
        bad("a.bin", b"\0\0\0"),
        {},
        ValueError,
        "a.bin has 3 bytes, no whole number of uint16; check dtype",
    ),
    (TokensConfig, bad("a.bin"), {}, ValueError, "a.bin is empty"),
    (TokensConfig, bad("a.bin", b"a\0b\0\xff\0"), {}, ValueError, r"a.bin has no end of document \(token 257\)"),
    (TokensConfig, bad("a.bin", b"aabb"), {}, ValueError, "a.bin holds token 25186, but the tokenizer has 258"),
    (TokensConfig, bad("a.bin", b"\1\1\1\1"), {}, ValueError, "a.bin holds no text"),
    (TokensConfig, bad("a.npy", b"aabb"), {}, ValueError, "a.npy is not a .npy file"),
]


@pytest.mark.parametrize(("config", "write", "fields", "error", "message"), ERRORS)
def test_bad_input_is_named_in_one_line(config, write, fields, error, message, tmp_path):
    (tmp_path / "in").mkdir()
    source = config(path=str(write(tmp_path / "in")), **fields)
    with pytest.raises(error, match=message) as raised:
        DataConfig(sources=(source,)).build(run_dir=tmp_path / "run", batch_size=1, seq_len=8, seed=0)
    assert "\n" not in str(raised.value)


def test_bad_tables(tmp_path):
    tokenizer = BytesConfig().build(tmp_path)
    pq.write_table(pa.table({"text": ["a", None], "n": [1, 2]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a.parquet has no column 'body'; it has text, n"):
        ParquetConfig(path=str(tmp_path), column="body").build()
    with pytest.raises(ValueError, match=r"a.parquet, row 1, column 'text' is NoneType, not text"):
        ParquetConfig(path=str(tmp_path)).build().corpus(tokenizer, tmp_path)
    with pytest.raises(ValueError, match=r"a.parquet, row 0, column 'n' is int, not text"):
        ParquetConfig(path=str(tmp_path), column="n").build().corpus(tokenizer, tmp_path)
    np.save(tmp_path / "a.npy", np.zeros((2, 3)))
    with pytest.raises(ValueError, match=r"a.npy holds float64\[2, 3\]; it has to be one row of token ids"):
        TokensConfig(path=str(tmp_path / "a.npy")).build()
    config = DataConfig(sources=(tokens_bin(tmp_path),), tokenizer=TrainBPEConfig())
    with pytest.raises(ValueError, match="is tokenised already; give the tokenizer that made it"):
        config.build(run_dir=tmp_path / "run", batch_size=1, seq_len=8, seed=0)


@pytest.mark.filterwarnings("default:::(?!efficient_lm)")
def test_bad_hugging_face(tmp_path, monkeypatch):
    source = hugging_face_disk(tmp_path)
    with pytest.raises(ValueError, match="has no column 'body'; it has text, n"):
        HuggingFaceConfig(name=source.name, column="body").build()
    with pytest.raises(ValueError, match="has no split 'dev'; it has train, test"):
        HuggingFaceConfig(name=source.name, split="dev").build()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'efficient_lm\[hf\]'"):
        source.build()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sources": ()}, "sources is empty"),
        ({"validation_fraction": 0.0}, "validation_fraction 0.0 is not between 0 and 1"),
        ({"validation_fraction": 1.0}, "validation_fraction 1.0 is not between 0 and 1"),
        ({"validation_fraction": float("nan")}, "validation_fraction nan"),
        ({"sources": (StdlibConfig(weight=0.0),)}, "weight 0.0 is not a positive number; drop the source"),
        ({"sources": (StdlibConfig(weight=float("inf")),)}, "weight inf is not a positive number"),
        ({"prefetch": -1}, "prefetch -1 is negative"),
    ],
)
def test_bad_settings(change, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        DataConfig(**change).build(run_dir=tmp_path, batch_size=1, seq_len=8, seed=0)


@pytest.mark.parametrize("sizes", [(0, 8), (8, 0)])
def test_bad_sizes(sizes, tmp_path):
    with pytest.raises(ValueError, match="have to be 1 or more"):
        DataConfig().build(run_dir=tmp_path, batch_size=sizes[0], seq_len=sizes[1], seed=0)


def test_one_sided_splits(tmp_path):
    (tmp_path / "a.txt").write_text("only one document")
    for fraction, message in (
        (1e-6, "none of the 1 documents is held out"),
        (1 - 1e-6, "all 1 documents are held out"),
    ):
        config = DataConfig(sources=(TextConfig(path=str(tmp_path / "a.txt")),), validation_fraction=fraction)
        with pytest.raises(ValueError, match=rf"{message}.*separator cuts"):
            config.build(run_dir=tmp_path / "run", batch_size=1, seq_len=8, seed=0)


@pytest.mark.parametrize("rows", [range(0), range(3, 5), range(-1, 2), [2, 0], [1, 1]])
def test_bad_rows(build, rows):
    data = build(DOCUMENTS)
    with pytest.raises(ValueError, match="are not rows of a batch of 4"):
        data.train(rows=rows)


def test_the_command_line_reaches_every_leaf():
    default = DataConfig(sources=(StdlibConfig(), JsonlConfig(path="a.jsonl")), tokenizer=TrainBPEConfig())
    flags = [
        "--sources.1.path",
        "b.jsonl",
        "--sources.0.weight",
        "2",
        "--tokenizer.vocab-size",
        "512",
        "--prefetch",
        "0",
    ]
    got = tyro.cli(DataConfig, default=default, args=flags, config=(tyro.conf.AvoidSubcommands,))
    assert got == DataConfig(
        sources=(StdlibConfig(weight=2.0), JsonlConfig(path="b.jsonl")),
        tokenizer=TrainBPEConfig(vocab_size=512),
        prefetch=0,
    )
