"""What is measured of a cell: losses and answers of trained models, and the time that decoding takes."""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, Int32

from efficient_lm.config import TrainConfig
from efficient_lm.costs import model_costs
from efficient_lm.model import LanguageModel, ModelConfig
from efficient_lm.optimizer import MuonConfig, TrapezoidConfig
from efficient_lm.study import documents
from efficient_lm.study.cells import RATIOS, Budget, Cell, model_config
from efficient_lm.study.documents import PAIRS, Task, Text
from efficient_lm.training import init_state, make_train_step

NUM_BINS = 16  # Of positions up to twice the training length.
LENGTHS = (0.5, 1.0, 1.5, 2.0)  # Of texts with needles, in training lengths.
ROWS = 32  # Of one evaluation.
SETS = 4  # Of ROWS held-out windows.


@dataclasses.dataclass(frozen=True)
class Costs:
    parameters: int
    active_parameters: int
    flops_per_token: float
    num_steps: int
    training_flops: float
    state_bytes: tuple[int, ...]
    """Of one sequence, at each of the budget's contexts."""


def costs(cell: Cell, budget: Budget) -> Costs:
    vocab_size = budget.vocab_size + documents.NUM_SYNTHETIC
    model = lambda cell: model_config(cell, budget.d_model, vocab_size)
    flops = lambda cell: model_costs(model(cell), context=budget.seq_len).training_flops
    own, num_steps = flops(cell), budget.num_steps
    if cell.equal_flops:
        num_steps = round(num_steps * flops(RATIOS[0]) / own)
    whole = model_costs(model(cell), context=budget.seq_len)
    return Costs(
        parameters=whole.parameters,
        active_parameters=round(whole.active_parameters),
        flops_per_token=own,
        num_steps=num_steps,
        training_flops=own * num_steps * budget.batch_size * budget.seq_len,
        state_bytes=tuple(model_costs(model(cell), context=context).state_bytes for context in budget.contexts),
    )


class Trainer:
    """The compiled programs of a cell, which its seeds share."""

    def __init__(self, cell: Cell, budget: Budget, text: Text, num_steps: int):
        self.budget, self.text = budget, text
        schedule = TrapezoidConfig(warmup_steps=num_steps // 10, decay_steps=num_steps // 2)
        self.run = TrainConfig(
            model=model_config(cell, budget.d_model, budget.vocab_size + documents.NUM_SYNTHETIC),
            optimizer=MuonConfig(learning_rate=budget.learning_rate, schedule=schedule),
            num_steps=num_steps,
            batch_size=budget.batch_size,
            seq_len=budget.seq_len,
        )
        self.optimizer, _ = self.run.optimizer.build(num_steps)
        # On a CPU, more would take longer than it saves: a program runs for seconds.
        options = {"xla_backend_optimization_level": 1} if jax.devices()[0].platform == "cpu" else {}
        step = make_train_step(self.run, self.run.objective.build(), self.optimizer)
        self._step = jax.jit(step, donate_argnums=0, compiler_options=options)
        self._judge = jax.jit(judge, compiler_options=options)

    def train(self, task: Task, seed: int, advance: Callable[[], None]) -> dict[str, Any]:
        """Returns what was measured after training; calls `advance` after every step.

        Models of one seed read the same batches.
        """
        start, rng, budget = time.perf_counter(), np.random.default_rng(seed), self.budget
        state = init_state(dataclasses.replace(self.run, seed=seed), self.optimizer)
        for _ in range(self.run.num_steps):
            batch = documents.training_batch(rng, self.text, task, budget.batch_size, budget.seq_len)
            state, _ = self._step(state, batch)
            advance()
        results = self._loss(state.model) if task == "text" else self._answers(state.model)
        return results | {"seconds": round(time.perf_counter() - start, 1)}

    def _loss(self, model: LanguageModel) -> dict[str, Any]:
        rng, T = np.random.default_rng(2**32), self.budget.seq_len
        nll_BT = np.concatenate([self._judged(model, self._held_out(rng))[0] for _ in range(SETS)])
        by_position = nll_BT.mean(axis=0).reshape(NUM_BINS, -1).mean(axis=1)
        return {"loss": _digits(nll_BT[:, :T].mean()), "by_position": _digits(by_position)}

    def _answers(self, model: LanguageModel) -> dict[str, Any]:
        """Returns shares of right answers: of recall by the number of pairs, of needles by length and depth."""
        rng, T = np.random.default_rng(2**32), self.budget.seq_len
        recall, needle = [], []
        for n in PAIRS:
            _, right_BT = self._judged(model, documents.recall(rng, self.text, np.full(ROWS, n), 2 * T))
            recall.append(right_BT[:, :T][:, documents.answers(n, T)].mean())
        for length in LENGTHS:
            asked = int(length * T) - 2
            # A row for each place before the question, in turns.
            places_BK = np.stack([2 * (np.arange(2 * ROWS) * asked // (4 * ROWS)), np.full(2 * ROWS, asked)], axis=1)
            rows_BT = np.concatenate([self._held_out(rng) for _ in range(2)])
            rows_BT = documents.needles(rng, self.text, rows_BT, places_BK)
            right_B = [self._judged(model, half)[1][:, asked] for half in np.split(rows_BT, 2)]
            needle.append(np.mean(right_B))
        return {"recall": _digits(recall), "needle": _digits(needle)}

    def _held_out(self, rng: np.random.Generator) -> Int32[np.ndarray, "B T"]:
        return documents.windows(rng, self.text.held_out, ROWS, 2 * self.budget.seq_len)

    def _judged(self, model: LanguageModel, rows_BT: Int32[np.ndarray, "B T"]) -> tuple[np.ndarray, np.ndarray]:
        batch = documents.batch(rows_BT)
        return jax.device_get(self._judge(model, batch.tokens, batch.targets))


def _digits(values: Any) -> Any:
    return np.round(np.asarray(values, np.float64), 5).tolist()


def judge(
    model: LanguageModel, tokens: Int32[Array, "B T"], targets: Int32[Array, "B T"]
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """Returns how many nats each target costs, and 1 where it is the likeliest token."""
    logits_BTV, _ = model(tokens)
    nll_BT = optax.softmax_cross_entropy_with_integer_labels(logits_BTV, targets)
    return nll_BT, (jnp.argmax(logits_BTV, axis=-1) == targets).astype(jnp.float32)


def seconds_per_token(cfg: ModelConfig, context: int, batch_size: int = 4, num_tokens: int = 8) -> float:
    """Returns how long decoding one token takes, for a batch of sequences with room for `context` tokens each.

    A cache is read whole, however full it is; so it is left empty, and weights are as they are drawn.
    """

    def decode(model, state, tokens_B1):
        def one(carry, _):
            state, tokens_B1 = carry
            logits_BTV, state = model(tokens_B1, state)
            return (state, jnp.argmax(logits_BTV, axis=-1).astype(jnp.int32)), None

        return jax.lax.scan(one, (state, tokens_B1), length=num_tokens)[0]

    model = cfg.build(rngs=nnx.Rngs(0))
    state, tokens_B1 = model.init_state(batch_size, context), jnp.zeros((batch_size, 1), jnp.int32)
    run = jax.jit(decode, donate_argnums=1)
    times = []
    for _ in range(4):
        start = time.perf_counter()
        state, tokens_B1 = jax.block_until_ready(run(model, state, tokens_B1))
        times.append(time.perf_counter() - start)
    return min(times[1:]) / num_tokens
