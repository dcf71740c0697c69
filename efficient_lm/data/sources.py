"""Where documents come from."""

import abc
import dataclasses
import glob
import gzip
import importlib.util
import io
import json
import os
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import zstandard
from array_record.python.array_record_module import ArrayRecordReader

from efficient_lm.data.corpus import Corpus, from_texts, from_tokens
from efficient_lm.data.tokenizers import Tokenizer


class Source(abc.ABC):
    """Documents that were found and can be read."""

    @abc.abstractmethod
    def texts(self) -> Iterator[bytes]:
        """Yields the documents, always in the same order."""

    @abc.abstractmethod
    def corpus(self, tokenizer: Tokenizer, cache_dir: Path) -> Corpus:
        """Returns the documents as tokens."""


@dataclasses.dataclass(frozen=True)
class TextSource(Source):
    """Text, tokenised once. `stamp` says which version of which files it is."""

    name: str
    stamp: str
    read: Callable[[], Iterator[bytes]]

    def texts(self) -> Iterator[bytes]:
        return self.read()

    def corpus(self, tokenizer: Tokenizer, cache_dir: Path) -> Corpus:
        return from_texts(self.read(), tokenizer, name=self.name, stamp=self.stamp, cache_dir=cache_dir)


@dataclasses.dataclass(frozen=True)
class TokenSource(Source):
    """Tokens that somebody else made."""

    name: str
    stamp: str
    tokens: np.ndarray

    def texts(self) -> Iterator[bytes]:
        raise ValueError(f"{self.name} is tokenised already; give the tokenizer that made it, FileConfig(path=...)")

    def corpus(self, tokenizer: Tokenizer, cache_dir: Path) -> Corpus:
        return from_tokens(self.tokens, tokenizer, name=self.name, stamp=self.stamp, cache_dir=cache_dir)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SourceConfig(abc.ABC):
    """A set of documents. `weight` is its share of the training tokens, relative to the other sources."""

    weight: float = 1.0

    @abc.abstractmethod
    def build(self) -> Source:
        """Finds the documents.

        Raises:
          FileNotFoundError, ValueError: there are none, or they cannot be what the configuration says.
        """


@dataclasses.dataclass(frozen=True, kw_only=True)
class StdlibConfig(SourceConfig):
    """The source of the Python standard library, about 10 MB: always there. One document per file.

    Its tests are left out, and what differs between machines with the same Python.
    """

    def build(self) -> Source:
        root = Path(sysconfig.get_path("stdlib"))
        skip = {"test", "tests", "idlelib", "lib2to3", "turtledemo", "ensurepip", "site-packages", "dist-packages"}
        files = []
        for folder, subfolders, names in os.walk(root):
            subfolders[:] = sorted(set(subfolders) - skip - {"__pycache__"})
            files += [Path(folder, n) for n in names if n.endswith(".py") and not n.startswith("_sysconfigdata")]
        if not files:
            raise FileNotFoundError(f"{root} holds no .py files in this Python; name another source")
        files.sort()
        # Bytes as they are: a file may declare another encoding than UTF-8.
        return TextSource(str(root), _stamp(self, files), lambda: (file.read_bytes() for file in files))


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextConfig(SourceConfig):
    """UTF-8 text: a file, all files of a directory and its subdirectories, or a pattern such as "books/**/*.txt".

    A file is one document, or as many as `separator` cuts it into, e.g. "\\n\\n" or "<|endoftext|>".
    """

    path: str
    separator: str = ""

    def build(self) -> Source:
        files = _find(self.path, ())
        _check_fits_memory(files)

        def read() -> Iterator[bytes]:
            for file in files:
                content = file.read_bytes()
                _check_utf8(content, str(file))
                yield from content.split(self.separator.encode()) if self.separator else [content]

        return TextSource(self.path, _stamp(self, files), read)


@dataclasses.dataclass(frozen=True, kw_only=True)
class JsonlConfig(SourceConfig):
    """JSON lines with the text in one field: .jsonl, .jsonl.gz or .jsonl.zst, by file, directory or pattern."""

    path: str
    field: str = "text"

    def build(self) -> Source:
        files = _find(self.path, (".jsonl", ".jsonl.gz", ".jsonl.zst"))

        def read() -> Iterator[bytes]:
            for file in files:
                for number, line in enumerate(_lines(file), 1):
                    if line.strip():
                        yield _json_text(line, self.field, f"{file}:{number}")

        return TextSource(self.path, _stamp(self, files), read)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ParquetConfig(SourceConfig):
    """Rows of Parquet files with the text in one column, by file, directory or pattern."""

    path: str
    column: str = "text"

    def build(self) -> Source:
        files = _find(self.path, (".parquet",))
        for file in files:
            try:
                schema = pq.read_schema(file)
            except pa.ArrowInvalid as error:
                raise ValueError(f"{file} is not a Parquet file: {error}") from None
            _check_column(self.column, schema.names, str(file))

        def read() -> Iterator[bytes]:
            for file in files:
                with pq.ParquetFile(file) as table:
                    row = 0
                    for batch in table.iter_batches(batch_size=1024, columns=[self.column]):
                        for value in batch.column(0).to_pylist():
                            yield _as_text(value, f"{file}, row {row}, column {self.column!r}")
                            row += 1

        return TextSource(self.path, _stamp(self, files), read)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ArrayRecordConfig(SourceConfig):
    """ArrayRecord files whose records are UTF-8 text, by file, directory or pattern."""

    path: str

    def build(self) -> Source:
        files = _find(self.path, (".array_record", ".arrayrecord"))

        def read() -> Iterator[bytes]:
            for file in files:
                reader = ArrayRecordReader(str(file))
                if not reader.ok():
                    raise ValueError(f"{file} is not an ArrayRecord file; check that it was written whole")
                size = reader.num_records()
                for start in range(0, size, 1024):
                    records = reader.read(start, min(start + 1024, size))
                    for row, record in enumerate(records, start):
                        yield _as_text(record, f"{file}, record {row}")
                reader.close()

        return TextSource(self.path, _stamp(self, files), read)


@dataclasses.dataclass(frozen=True, kw_only=True)
class HuggingFaceConfig(SourceConfig):
    """A dataset of the Hugging Face hub, or a folder written by its `save_to_disk`. It is downloaded whole."""

    name: str
    config: str = ""
    split: str = "train"
    column: str = "text"

    def build(self) -> Source:
        if importlib.util.find_spec("datasets") is None:
            raise ValueError(f"{self.name!r} needs the datasets package: pip install 'efficient_lm[hf]'")
        import datasets

        if Path(self.name, "dataset_dict.json").exists() or Path(self.name, "state.json").exists():
            loaded: Any = datasets.load_from_disk(self.name)
            if isinstance(loaded, datasets.DatasetDict):
                if self.split not in loaded:
                    raise ValueError(f"{self.name} has no split {self.split!r}; it has {', '.join(map(str, loaded))}")
                loaded = loaded[self.split]
        else:
            loaded = datasets.load_dataset(self.name, self.config or None, split=self.split)
        _check_column(self.column, loaded.column_names, self.name)
        texts = loaded.select_columns([self.column]).with_format(None)

        def read() -> Iterator[bytes]:
            for row, example in enumerate(texts):
                yield _as_text(example[self.column], f"{self.name}, row {row}, column {self.column!r}")

        return TextSource(self.name, f"{loaded._fingerprint}|{self.column}", read)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokensConfig(SourceConfig):
    """A flat file of tokens in which every document ends with eos: .npy, or .bin with `dtype`. It is read in place."""

    path: str
    dtype: Literal["uint16", "uint32"] = "uint16"

    def build(self) -> Source:
        (file, *more) = _find(self.path, (".npy", ".bin"))
        if more:
            raise ValueError(f"{self.path} holds {1 + len(more)} token files; give a TokensConfig for each")
        size = file.stat().st_size
        if size == 0:
            raise ValueError(f"{file} is empty; write tokens to it")
        if file.suffix == ".npy":
            try:
                tokens = np.load(file, mmap_mode="r")
            except (ValueError, EOFError) as error:
                raise ValueError(f"{file} is not a .npy file: {error}; name raw tokens .bin") from None
        elif size % np.dtype(self.dtype).itemsize:
            raise ValueError(f"{file} has {size} bytes, no whole number of {self.dtype}; check dtype")
        else:
            tokens = np.memmap(file, self.dtype, mode="r")
        if tokens.ndim != 1 or tokens.dtype.kind not in "iu" or not len(tokens):
            raise ValueError(f"{file} holds {tokens.dtype}{list(tokens.shape)}; it has to be one row of token ids")
        return TokenSource(str(file), _stamp(self, [file]), tokens)


def _find(path: str, suffixes: tuple[str, ...]) -> list[Path]:
    """Returns the files that `path` names; of a directory those with one of the suffixes, hidden ones left out."""
    root = Path(path).expanduser()
    if root.is_file():
        return [root]
    if root.is_dir():
        files = [f for f in root.rglob("*") if not any(p.startswith(".") for p in f.relative_to(root).parts)]
        files = [f for f in files if f.is_file() and (not suffixes or f.name.endswith(suffixes))]
        if not files:
            raise FileNotFoundError(f"directory {path!r} holds no {' or '.join(suffixes) or 'text'} files")
    else:
        files = [Path(f) for f in glob.glob(str(root), recursive=True) if Path(f).is_file()]
        if not files:
            what = "matches no files" if glob.has_magic(path) else "does not exist"
            raise FileNotFoundError(f"{path!r} {what}; give a file, a directory or a pattern like 'texts/**/*.txt'")
    return sorted(files)


def _stamp(config: SourceConfig, files: list[Path]) -> str:
    stats = [(str(file.absolute()), file.stat()) for file in files]
    settings = dataclasses.replace(config, weight=1.0)
    return repr([settings, *((name, stat.st_size, stat.st_mtime_ns) for name, stat in stats)])


def _check_fits_memory(files: list[Path]) -> None:
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for file in files:
        # The text, its tokens as Python integers, and a copy on the way.
        if (size := file.stat().st_size) > memory / 8:
            raise ValueError(
                f"{file} has {size / 1e9:.1f} GB, and a text file is read whole: {memory / 1e9:.0f} GB of memory are "
                f"enough for {memory / 8e9:.1f} GB; cut it into files, or write its documents as JSON lines"
            )


def _check_utf8(content: bytes, where: str) -> None:
    try:
        content.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{where} is not UTF-8 at byte {error.start}; convert it or leave it out") from None


def _check_column(column: str, columns: list[str], where: str) -> None:
    if column not in columns:
        raise ValueError(f"{where} has no column {column!r}; it has {', '.join(columns)}")


def _as_text(value: Any, where: str) -> bytes:
    if isinstance(value, bytes):
        _check_utf8(value, where)
        return value
    if not isinstance(value, str):
        raise ValueError(f"{where} is {type(value).__name__}, not text; choose the column or field that holds the text")
    try:
        return value.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{where} holds half of a surrogate pair, which is not UTF-8; mend or drop it") from None


def _lines(file: Path) -> Iterator[bytes]:
    with file.open("rb") as raw:
        lines: BinaryIO | gzip.GzipFile | io.BufferedReader = raw
        if file.suffix == ".gz":
            lines = gzip.GzipFile(fileobj=raw)
        elif file.suffix == ".zst":
            lines = io.BufferedReader(zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True))  # pyright: ignore[reportArgumentType]
        try:
            yield from lines
        except (gzip.BadGzipFile, EOFError, zstandard.ZstdError) as error:
            raise ValueError(f"{file} is not a whole {file.suffix} file: {error}") from None


def _json_text(line: bytes, field: str, where: str) -> bytes:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where} is not JSON: {error}") from None
    if not isinstance(value, dict) or field not in value:
        has = f"it has {', '.join(value)}" if isinstance(value, dict) else "it is not an object"
        raise ValueError(f"{where} has no field {field!r}; {has}")
    return _as_text(value[field], where)
