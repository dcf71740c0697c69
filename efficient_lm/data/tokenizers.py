"""From text to token ids and back, without losing a byte."""

import abc
import codecs
import dataclasses
import functools
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import tokenizers as hf
from jaxtyping import Int32, Integer

BOS, EOS = "<|bos|>", "<|eos|>"
_USUAL_BOS = (BOS, "<s>", "<bos>", "<|begin_of_text|>", "<|startoftext|>", "<|endoftext|>")
_USUAL_EOS = (EOS, "</s>", "<eos>", "<|end_of_text|>", "<|endoftext|>")


class Tokenizer(abc.ABC):
    """Text as integers. `pieces[i]` are the bytes that token i stands for, none for a special token."""

    def __init__(self, pieces: Sequence[bytes], *, bos_id: int, eos_id: int, fingerprint: str):
        self.pieces = pieces
        self.bos_id = bos_id
        self.eos_id = eos_id
        self.fingerprint = fingerprint
        self.vocab_size = len(pieces)
        self.token_bytes = np.array([len(piece) for piece in pieces], np.int32)

    @property
    def dtype(self) -> np.dtype:
        """The smallest type that holds every token that text can contain."""
        return np.min_scalar_type(self.vocab_size - 1)

    @abc.abstractmethod
    def encode_batch(self, texts: Sequence[bytes]) -> list[Int32[np.ndarray, "_"]]:
        """Returns the tokens of each text, without bos and eos."""

    def encode(self, text: str | bytes) -> Int32[np.ndarray, "T"]:
        """Returns the tokens of `text`, without bos and eos. Bytes need not be valid UTF-8."""
        return self.encode_batch([text.encode() if isinstance(text, str) else text])[0]

    def decode_bytes(self, ids: Iterable[int] | Integer[np.ndarray, "T"]) -> bytes:
        """Returns the bytes that were encoded."""
        return b"".join([self.pieces[i] for i in ids])

    def decode(self, ids: Iterable[int] | Integer[np.ndarray, "T"]) -> str:
        """Returns the text; bytes that are not UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode(errors="replace")

    def stream(self) -> "StreamDecoder":
        """Returns a decoder for tokens that arrive one by one."""
        return StreamDecoder(self)


class StreamDecoder:
    """Text as it comes: a character is given out when its last byte has arrived."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, *ids: int) -> str:
        """Returns the characters that these tokens complete."""
        return self._utf8.decode(self._tokenizer.decode_bytes(ids))

    def flush(self) -> str:
        """Returns what is left: U+FFFD for a character that was never completed."""
        return self._utf8.decode(b"", final=True)


class ByteTokenizer(Tokenizer):
    """The 256 bytes, then bos and eos."""

    def __init__(self):
        super().__init__([bytes([i]) for i in range(256)] + [b"", b""], bos_id=256, eos_id=257, fingerprint="bytes")

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(np.uint8)

    def encode_batch(self, texts: Sequence[bytes]) -> list[Int32[np.ndarray, "_"]]:
        return [np.frombuffer(text, np.uint8).astype(np.int32) for text in texts]


class FileTokenizer(Tokenizer):
    """A tokenizer.json of the `tokenizers` library that is lossless: byte-level, or with byte fallback.

    With byte fallback, the character U+2581 is read as the space that it stands for.
    """

    # Bytes that are not UTF-8 come out of `bytes.decode(errors="surrogateescape")` as these characters.
    _INVALID = re.compile("([\udc80-\udcff])")
    # Every way in which tokenizers are known to lose text: leading and double spaces, line ends, case, accents.
    _PROBE = " a  B\t\r\n\n\x00\x7f é e\u0301 ﬁ ½ 日本 \U0001f600 <unk> don't"

    def __init__(self, path: Path, *, bos: str = "", eos: str = ""):
        try:
            self._hf = hf.Tokenizer.from_str(path.read_text())
        except FileNotFoundError:
            raise
        except Exception as error:  # The library raises bare Exception.
            raise ValueError(f"{path} is not a tokenizer.json of the tokenizers library: {error}") from None
        # Unicode normalisation loses text. A literal "<|eos|>" in a document is text, not the end of the document.
        if json.loads(self._hf.to_str())["normalizer"] == {"type": "NFC"}:
            self._hf.normalizer = None  # pyright: ignore[reportAttributeAccessIssue]
        self._hf.encode_special_tokens = True
        self._hf.no_truncation()
        self._hf.no_padding()
        pieces = _pieces(self._hf)
        super().__init__(
            pieces,
            bos_id=_special_id(self._hf, bos, _USUAL_BOS, f"{path}, bos"),
            eos_id=_special_id(self._hf, eos, _USUAL_EOS, f"{path}, eos"),
            fingerprint=hashlib.blake2b(f"{self._hf.to_str()}{bos}|{eos}".encode(), digest_size=8).hexdigest(),
        )
        self._byte_ids = {piece: i for i, piece in enumerate(pieces) if len(piece) == 1}
        if len(self._byte_ids) < 256 or self.decode_bytes(self.encode(self._PROBE)) != self._PROBE.encode():
            raise ValueError(f"{path} loses text, so bits per byte mean nothing; take a byte-level tokenizer")

    def encode_batch(self, texts: Sequence[bytes]) -> list[Int32[np.ndarray, "_"]]:
        parts = [self._INVALID.split(text.decode(errors="surrogateescape")) for text in texts]
        valid = iter(self._hf.encode_batch_fast([p for split in parts for p in split[::2]], add_special_tokens=False))
        invalid = lambda char: [self._byte_ids[char.encode(errors="surrogateescape")]]
        ids = [
            [np.array(next(valid).ids if n % 2 == 0 else invalid(part), np.int32) for n, part in enumerate(split)]
            for split in parts
        ]
        return [np.concatenate(pieces) for pieces in ids]


@functools.cache
def _byte_of_char() -> dict[str, int]:
    """Byte-level vocabularies write each byte as a printable character (the table of GPT-2)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + n): b for n, b in enumerate(others)}


def _pieces(tokenizer: hf.Tokenizer) -> list[bytes]:
    """Returns the bytes of each token; ids that the vocabulary leaves out have none."""
    byte_level = '"ByteLevel"' in json.dumps(json.loads(tokenizer.to_str())["decoder"])
    table = _byte_of_char()
    vocab = tokenizer.get_vocab(with_added_tokens=True)
    pieces = [b""] * (max(vocab.values()) + 1)
    for token, i in vocab.items():
        if byte_level:
            # A token of other characters can only have been added; whether it is special is settled below.
            pieces[i] = bytes([table[c] for c in token]) if all(c in table for c in token) else token.encode()
        elif re.fullmatch("<0x[0-9A-F]{2}>", token):
            pieces[i] = bytes([int(token[3:5], 16)])
        else:
            pieces[i] = token.replace("▁", " ").encode()
    for i, token in tokenizer.get_added_tokens_decoder().items():
        pieces[i] = b"" if token.special else token.content.encode()
    return pieces


def _special_id(tokenizer: hf.Tokenizer, name: str, usual: Sequence[str], what: str) -> int:
    for token in [name] if name else usual:
        if (i := tokenizer.token_to_id(token)) is not None:
            return i
    tried = repr(name) if name else f"any of {', '.join(usual)}"
    raise ValueError(f"{what}: the tokenizer has no token {tried}; name one that it has")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenizerConfig(abc.ABC):
    """How text becomes tokens."""

    @abc.abstractmethod
    def build(self, run_dir: Path, texts: Callable[[], Iterator[bytes]] | None = None) -> Tokenizer:
        """Returns the tokenizer. `texts` gives the documents to learn it from, if it is not in `run_dir` yet."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class BytesConfig(TokenizerConfig):
    """Bytes: nothing to train, and bits per byte compare across all models."""

    def build(self, run_dir: Path, texts: Callable[[], Iterator[bytes]] | None = None) -> Tokenizer:
        return ByteTokenizer()


@dataclasses.dataclass(frozen=True, kw_only=True)
class FileConfig(TokenizerConfig):
    """A tokenizer.json, of which the run folder keeps a copy.

    `bos` and `eos` name its special tokens; empty: the usual names are tried.
    """

    path: str
    bos: str = ""
    eos: str = ""

    def build(self, run_dir: Path, texts: Callable[[], Iterator[bytes]] | None = None) -> Tokenizer:
        path, copy = Path(self.path).expanduser(), run_dir / "tokenizer.json"
        if texts is None and copy.exists():
            path = copy
        if not path.is_file():
            raise FileNotFoundError(f"tokenizer {self.path!r} does not exist; give the path of a tokenizer.json")
        tokenizer = FileTokenizer(path, bos=self.bos, eos=self.eos)
        if copy.exists() and copy.read_text() != path.read_text():
            raise ValueError(f"{path} is not the tokenizer that the run began with, {copy}; take another run folder")
        if texts is not None and not copy.exists():
            _keep(copy, path.read_text())
        return tokenizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainBPEConfig(TokenizerConfig):
    """A byte-level BPE, trained once on the training documents and kept as tokenizer.json in the run folder.

    It learns from the first `sample_bytes` bytes, taken in equal parts from the sources.
    """

    vocab_size: int = 4096
    sample_bytes: int = 50_000_000

    def build(self, run_dir: Path, texts: Callable[[], Iterator[bytes]] | None = None) -> Tokenizer:
        if self.vocab_size < 259:
            raise ValueError(f"vocab_size {self.vocab_size} is too small; 256 bytes, bos and eos need 259 or more")
        path = run_dir / "tokenizer.json"
        if not path.exists():
            if texts is None:
                raise FileNotFoundError(f"{path} does not exist; it is written when training starts")
            _train_bpe(path, texts(), self.vocab_size)
        tokenizer = FileTokenizer(path, bos=BOS, eos=EOS)
        if tokenizer.vocab_size != self.vocab_size:
            raise ValueError(
                f"{path} has {tokenizer.vocab_size} tokens, not vocab_size {self.vocab_size}; take another run folder"
            )
        return tokenizer


def _train_bpe(path: Path, texts: Iterator[bytes], vocab_size: int) -> None:
    tokenizer = hf.Tokenizer(hf.models.BPE())
    tokenizer.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.decoder = hf.decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    trainer = hf.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS],
        initial_alphabet=hf.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((text.decode(errors="replace") for text in texts), trainer)
    if tokenizer.get_vocab_size() < vocab_size:
        raise ValueError(
            f"the text gives {tokenizer.get_vocab_size()} tokens, fewer than vocab_size {vocab_size}; lower it"
        )
    _keep(path, tokenizer.to_str())


def _keep(path: Path, text: str) -> None:
    """Writes a file that several hosts may share: it appears whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}.partial")
    partial.write_text(text)
    partial.replace(path)
