"""Talks to a trained model: python -m efficient_lm.sample runs/quickstart --prompt "def " """

from efficient_lm.allocator import keep_freed_memory

if __name__ == "__main__":
    keep_freed_memory()

import dataclasses
import sys
from pathlib import Path
from typing import Annotated

import jax
import numpy as np
import tyro
from flax import nnx

from efficient_lm.checkpoint import DamagedCheckpoint, load_weights
from efficient_lm.cli import one_line_errors
from efficient_lm.config import TrainConfig
from efficient_lm.data import Tokenizer
from efficient_lm.leaves import unflatten
from efficient_lm.model import LanguageModel
from efficient_lm.run_folder import read_config
from efficient_lm.sampling import SamplingConfig, generate


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    run: Annotated[Path, tyro.conf.Positional]
    """Folder of a run."""
    prompt: tuple[str, ...] = ("",)
    """What to go on from; several prompts make a batch."""
    step: int | None = None
    """Checkpoint to take; the newest if not given."""
    seed: int = 0
    stop: tuple[str, ...] = ()
    """Texts of one token at which to stop, beside the end of the document."""
    sampling: Annotated[SamplingConfig, tyro.conf.arg(name="")] = SamplingConfig(temperature=0.8, top_p=0.95)


def load_run(run_dir: Path, step: int | None = None) -> tuple[LanguageModel, Tokenizer, TrainConfig]:
    """Returns the model of a run with the weights of a checkpoint, its tokenizer and its configuration.

    Raises:
      FileNotFoundError: it is not the folder of a run, or has no such checkpoint.
      DamagedCheckpoint: the weights are not what was saved.
    """
    cfg = read_config(run_dir)
    assert isinstance(cfg, TrainConfig)
    _, leaves = load_weights(run_dir / "checkpoints", step, prefix="model")
    abstract = jax.eval_shape(lambda: cfg.model.build(rngs=nnx.Rngs(0)))
    return unflatten(abstract, leaves), cfg.data.load_tokenizer(run_dir), cfg


def stop_tokens(tokenizer: Tokenizer, texts: tuple[str, ...]) -> list[int]:
    """Returns the tokens that end a sample.

    Raises:
      ValueError: a text is more than one token.
    """
    tokens = [tokenizer.eos_id]
    for text in texts:
        ids = tokenizer.encode(text).tolist()
        if len(ids) != 1:
            raise ValueError(f"stop {text!r} is {len(ids)} tokens of this tokenizer; it must be one")
        tokens += ids
    return tokens


def main(args: Arguments) -> None:
    model, tokenizer, _ = load_run(args.run, args.step)
    prompts = [[tokenizer.bos_id, *tokenizer.encode(prompt).tolist()] for prompt in args.prompt]
    stops = stop_tokens(tokenizer, args.stop)
    chunks = generate(model, prompts, jax.random.key(args.seed), args.sampling, stop_tokens=stops)
    is_text = lambda ids: (ids >= 0) & (ids != tokenizer.eos_id)
    if len(prompts) == 1:
        sys.stdout.write(args.prompt[0])
        decoder = tokenizer.stream()
        for chunk in chunks:
            sys.stdout.write(decoder.push(*chunk[0][is_text(chunk[0])].tolist()))
            sys.stdout.flush()
        sys.stdout.write(decoder.flush() + "\n")
        return
    for prompt, ids in zip(args.prompt, np.concatenate(list(chunks), axis=1), strict=True):
        print(f"--- {prompt!r}\n{prompt}{tokenizer.decode(ids[is_text(ids)])}")


if __name__ == "__main__":
    with one_line_errors(ValueError, OSError, DamagedCheckpoint):
        main(tyro.cli(Arguments, prog="python -m efficient_lm.sample", description=__doc__))
