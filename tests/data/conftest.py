import dataclasses
import json
import random

import pytest

from efficient_lm.data import BytesConfig, DataConfig, JsonlConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Words:
    """Distinct documents of random words, with lengths from 1 byte to a few rows."""

    num: int = 40
    max_len: int = 60
    alphabet: str = "abcdefgh é"
    seed: int = 0

    def make(self):
        rng = random.Random(self.seed)
        length = lambda: int(self.max_len ** rng.random())
        return [f"{n}:" + "".join(rng.choices(self.alphabet, k=length())) for n in range(self.num)]


def write_jsonl(path, documents):
    path.write_text("".join(json.dumps({"text": d}) + "\n" for d in documents))
    return JsonlConfig(path=str(path))


@pytest.fixture
def build(tmp_path):
    """Builds the data of lists of documents, one list per source."""

    def build(*sources, weights=(), batch_size=4, seq_len=16, seed=0, meta_tokens=(), run="run", **config):
        configs = [write_jsonl(tmp_path / f"{run}{n}.jsonl", documents) for n, documents in enumerate(sources)]
        if weights:
            configs = [dataclasses.replace(c, weight=w) for c, w in zip(configs, weights, strict=True)]
        config = {"tokenizer": BytesConfig(), "validation_fraction": 0.2} | config
        return DataConfig(sources=tuple(configs), **config).build(
            run_dir=tmp_path / run, batch_size=batch_size, seq_len=seq_len, seed=seed, meta_tokens=meta_tokens
        )

    return build


@pytest.fixture
def documents():
    return Words().make()
