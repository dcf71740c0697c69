"""A run from its configuration to its last checkpoint."""

import contextlib
import dataclasses
import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from efficient_lm.checkpoint import Checkpoints
from efficient_lm.config import TrainConfig, parse_profile
from efficient_lm.config_data import config_to_dict
from efficient_lm.console import TrainingProgress, console, count
from efficient_lm.costs import model_costs, model_table
from efficient_lm.data import Batch, Data
from efficient_lm.devices import peak_flops
from efficient_lm.evaluation import HeldOut, compressed_bits_per_byte, evaluate
from efficient_lm.metrics import MetricsLog, check_logging
from efficient_lm.plots import plot_run
from efficient_lm.processes import first_alone
from efficient_lm.run_folder import RunFolder, open_run
from efficient_lm.sampling import generate
from efficient_lm.sharding import assemble, local_rows, make_mesh, sharding, undivided
from efficient_lm.signals import stop_signals
from efficient_lm.starting import check_start, starting_model
from efficient_lm.training import TrainState, abstract_state, init_state, make_eval_step, make_train_step, target_bytes

# Held-out text up to this size is compressed for comparison; xz takes a second per megabyte.
COMPARE_BYTES = 32 * 2**20


class Diverged(RuntimeError):
    """Too many steps in a row gave gradients that cannot be trusted."""


def fit(cfg: TrainConfig) -> Path:
    """Trains, or goes on with what the run folder holds; returns the folder.

    Raises:
      ValueError, FileNotFoundError: the configuration, the data or the run folder do not fit; nothing was changed.
      SaveFailed, DamagedCheckpoint: the disk failed us.
      Diverged: training went wrong; the checkpoints from before are there.
    """
    check(cfg)
    mesh = make_mesh(cfg.mesh) if cfg.mesh else None
    with (
        jax.set_mesh(mesh) if mesh is not None else contextlib.nullcontext(),
        open_run(cfg.run_dir, cfg, fresh=cfg.fresh) as folder,
    ):
        data = first_alone(
            lambda: cfg.data.build(
                run_dir=folder.path,
                batch_size=cfg.batch_size,
                seq_len=cfg.seq_len,
                seed=cfg.seed,
                meta_tokens=cfg.model.meta_ids,
            )
        )
        if data.tokenizer.vocab_size > cfg.model.vocab_size:
            raise ValueError(
                f"the tokenizer has {data.tokenizer.vocab_size} tokens, the model only "
                f"vocab_size={cfg.model.vocab_size}; set --model.vocab-size {data.tokenizer.vocab_size} or more"
            )
        with Run(cfg, folder, data) as run:
            run.train()
        return folder.path


def check(cfg: TrainConfig) -> None:
    """Raises ValueError for what can be known to fail before anything is read, written or compiled."""
    if jax.process_count() > 1 and not cfg.mesh:
        raise ValueError(f"{jax.process_count()} processes have no mesh over their devices; set e.g. --mesh data -1")
    check_logging(cfg.logging)
    has_begun = any(Path(cfg.run_dir, "checkpoints").glob("*")) and not cfg.fresh
    if cfg.start_from and not has_begun:
        check_start(cfg)
    abstract_state(cfg, cfg.optimizer.build(cfg.num_steps)[0], make_mesh(cfg.mesh) if cfg.mesh else None)


class Run:
    """What lives from the first step to the last: compiled functions, open files, the state."""

    def __init__(self, cfg: TrainConfig, folder: RunFolder, data: Data):
        self.cfg, self.folder, self.data = cfg, folder, data
        self._rows = local_rows(cfg.batch_size)
        self._writes = jax.process_index() == 0  # One process writes what people read; all write checkpoints.
        self._token_bytes = jax.device_put(data.tokenizer.token_bytes, sharding(""))
        objective = cfg.objective.build()
        optimizer, self.learning_rate = cfg.optimizer.build(cfg.num_steps)
        self._train_step = make_train_step(cfg, objective, optimizer)
        self._eval_step = make_eval_step(objective)
        self.batches = data.train(self._rows)
        self.checkpoints = Checkpoints(folder.checkpoints, cfg.checkpoint)

        # It runs once: on a CPU, optimising it takes a minute and saves a second.
        options = {"xla_backend_optimization_level": 0} if jax.devices()[0].platform == "cpu" else {}
        init = jax.jit(lambda: init_state(cfg, optimizer), compiler_options=options)
        restored = self.checkpoints.restore(jax.eval_shape(init), self.batches)
        self.first_step, self.state = restored or (0, self._begin(init))
        self._log = None
        if self._writes:
            self._log = MetricsLog(folder, cfg.logging, self.first_step, config_to_dict(cfg))
        self._flops_per_token = model_costs(cfg.model, context=cfg.seq_len).training_flops
        self._started, self._productive = time.perf_counter(), 0.0

    def _begin(self, init: Callable[[], TrainState]) -> TrainState:
        """Returns the state before the first step."""
        state = init()
        if self.cfg.start_from:
            model = starting_model(self.cfg, self.data.tokenizer)
            state = dataclasses.replace(
                state, model=jax.device_put(model, jax.tree.map(lambda x: x.sharding, state.model))
            )
        return state

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *_) -> None:
        self.batches.close()
        if self._log is not None:
            self._log.close()
        self.checkpoints.close()

    def train(self) -> None:
        cfg, last = self.cfg, self.cfg.num_steps
        console.print(model_table(cfg.model, self.state.model))
        self._say_where_it_starts()
        step, interval = self.first_step, Interval()
        with (
            stop_signals() as should_stop,
            TrainingProgress(last, step) as progress,
            Profiler(cfg.profile if self._writes else None, self.folder.path) as profiler,
        ):
            while step < last:
                profiler.before(step)
                with interval.waiting():
                    batch = self._put(next(self.batches))
                self.state, metrics = self._train_step(self.state, batch)
                interval.add(batch.tokens.size, metrics | {"bytes": target_bytes(batch, self._token_bytes)})
                step += 1
                progress.advance(step)
                is_last, stop = step == last, should_stop(step)
                if step % cfg.logging.every == 0 or is_last or stop:
                    self._report(step, interval, progress)
                    interval = Interval()
                if self.checkpoints.is_due(step) or is_last or stop:
                    self.checkpoints.save(step, self.state, self.batches)
                self.checkpoints.check()
                if stop and not is_last:
                    break
                if step % cfg.evaluation.every == 0 and not is_last:
                    self._evaluate(step, cfg.evaluation.max_batches)
                    interval = Interval()
        self.checkpoints.wait()
        if step < last:
            console.print(f"stopped and saved after step {step}; the same command goes on from there")
        else:
            self._finish(step)

    def _say_where_it_starts(self) -> None:
        cfg = self.cfg
        epochs = cfg.num_steps * cfg.batch_size * cfg.seq_len / self.data.num_train_slots
        console.print(
            f"{count(self.data.num_train_targets)} tokens to train on ({epochs:.2g} epochs), "
            f"{count(self.data.num_validation_targets)} held out; {devices_used()}"
        )
        if self.first_step:
            console.print(f"going on from step {self.first_step} of {self.folder.path}")
        else:
            weights = f" with the weights of {cfg.start_from}" if cfg.start_from else ""
            console.print(f"starting in {self.folder.path}{weights}")

    def _report(self, step: int, interval: "Interval", progress: TrainingProgress) -> None:
        values = interval.summary()
        self._productive += values["seconds"] * (1 - values["data_wait"])
        values |= {
            "learning_rate": float(np.asarray(self.learning_rate(step - 1))),
            "goodput": self._productive / (time.perf_counter() - self._started),
        }
        if (peak := peak_flops()) is not None:
            values["mfu"] = self._flops_per_token * values["tokens_per_second"] / peak
        self._write(step, values)
        text = (
            f"loss {values['loss']:.3f}  {values['bits_per_byte']:.3f} bits/byte  "
            f"{count(values['tokens_per_second'])} tokens/s"
        )
        progress.report(step, text + (f"  {values['mfu']:.0%} MFU" if "mfu" in values else ""))
        if values["skipped_in_a_row"] >= self.cfg.guard.patience:
            raise Diverged(
                f"{values['skipped_in_a_row']:.0f} steps in a row up to step {step} had gradients that were not finite "
                f"or spiked; lower the learning rate ({self.cfg.optimizer.learning_rate}) and go on from a checkpoint "
                f"in {self.checkpoints.folder}"
            )

    def _put(self, batch: Batch) -> Batch:
        return put(batch, self._rows, self.cfg.batch_size)

    def _write(self, step: int, values: dict[str, Any]) -> None:
        if self._log is not None:
            self._log.write(step, values)

    def _evaluate(self, step: int, max_batches: int | None) -> tuple[HeldOut, str]:
        """Returns the loss on held-out text, and a sample."""
        batches = map(self._put, itertools.islice(self.data.validation(self._rows), max_batches))
        result = evaluate(self._eval_step, self.state.model, batches, self._token_bytes)
        sample = self.sample()
        self._write(
            step,
            {
                "held_out_loss": result.loss,
                "held_out_bits_per_byte": result.bits_per_byte,
                "held_out_loss_by_position": result.by_position,
                "sample": sample,
            },
        )
        if self._writes:
            plot_run(self.folder, {})
        console.print(f"step {step}: held out {result.bits_per_byte:.4f} bits/byte, loss {result.loss:.4f}")
        console.print(_indent(sample), style="dim", markup=False)
        return result, sample

    def sample(self) -> str:
        """Returns the evaluation's prompt and how the model goes on."""
        settings, tokenizer = self.cfg.evaluation, self.data.tokenizer
        prompt = [tokenizer.bos_id, *tokenizer.encode(settings.prompt).tolist()]
        step = int(self.state.step)
        with undivided(self.state.model) as model:
            key = jax.random.fold_in(jax.random.key(self.cfg.seed), step)
            chunks = generate(
                model, [prompt], key, settings.sampling, stop_tokens=[tokenizer.eos_id], tokens_at_once=32
            )
            new = np.concatenate([chunk[0] for chunk in chunks])
        return settings.prompt + tokenizer.decode(new[(new >= 0) & (new != tokenizer.eos_id)])

    def _finish(self, step: int) -> None:
        result, sample = self._evaluate(step, None)
        if not self._writes:
            return
        baselines, size = {}, sum(len(document) for document in self.data.validation_documents())
        if size <= COMPARE_BYTES:
            baselines = compressed_bits_per_byte(self.data.validation_documents())
        plot = plot_run(self.folder, baselines)
        sample_file = self.folder.samples / f"{step}.txt"
        sample_file.write_text(sample)
        console.print(f"\nheld-out text, {count(size)} bytes never trained on:")
        numbers = {"this model": result.bits_per_byte, **baselines}
        for name, value in sorted(numbers.items(), key=lambda item: item[1]):
            style = "bold" if name == "this model" else None
            console.print(f"  {name:<12} {value:.4f} bits per byte", style=style)
        for name, path in (
            ("metrics", self.folder.metrics),
            ("plot", plot),
            ("sample", sample_file),
            ("checkpoint", self.checkpoints.folder / str(step)),
        ):
            console.print(f"{name:<12} {path}")
        console.print(
            f"talk to it   python -m efficient_lm.sample {self.folder.path} --prompt {self.cfg.evaluation.prompt!r}"
        )


def put(batch: Batch, rows: Sequence[int], num_rows: int) -> Batch:
    """Lays `rows` out over the devices of this process, as parts of the batch of `num_rows` of all processes."""
    return jax.tree.map(lambda x: assemble(x, "BT", rows, num_rows), batch)


def devices_used() -> str:
    """Says what computes, e.g. `8 x cpu as data=4 model=2, in 2 processes`."""
    mesh, device = jax.sharding.get_mesh(), jax.devices()[0]
    if mesh.empty:
        idle = f" of {jax.device_count()}; --mesh data -1 takes all" if jax.device_count() > 1 else ""
        return f"1 x {device.device_kind}{idle}"
    axes = " ".join(f"{name}={size}" for name, size in mesh.shape.items())
    processes = f", in {jax.process_count()} processes" if jax.process_count() > 1 else ""
    return f"{mesh.size} x {device.device_kind} as {axes}{processes}"


class Interval:
    """What happened since the last report."""

    def __init__(self):
        self._start, self._waited, self._slots = time.perf_counter(), 0.0, 0
        self._metrics: list[dict[str, jax.Array]] = []

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self._waited += time.perf_counter() - start

    def add(self, slots: int, metrics: dict[str, jax.Array]) -> None:
        self._slots += slots
        self._metrics.append(metrics)

    def summary(self) -> dict[str, float]:
        """Returns means over the steps; waits for the last one to be computed."""
        steps: list[dict[str, Any]] = jax.device_get(self._metrics)
        seconds = time.perf_counter() - self._start
        tokens, num_bytes = (sum(float(m[name]) for m in steps) for name in ("tokens", "bytes"))
        means = {name: float(np.mean([m[name] for m in steps])) for name in steps[0] if name not in ("tokens", "bytes")}
        nats = sum(float(m["nll"]) * float(m["tokens"]) for m in steps)
        return means | {
            "bits_per_byte": nats / math.log(2) / max(num_bytes, 1),
            "skipped": float(steps[-1]["skipped"]),
            "skipped_in_a_row": float(steps[-1]["skipped_in_a_row"]),
            "seconds": seconds,
            "seconds_per_step": seconds / len(steps),
            "tokens_per_second": tokens / seconds,
            "data_wait": self._waited / seconds,
            "padding": 1 - tokens / self._slots,  # And meta tokens: what there is nothing to predict at.
        }


class Profiler:
    """Traces a window of steps for XProf and Perfetto."""

    def __init__(self, window: str | None, run_dir: Path):
        self._window = (-1, -1) if window is None else parse_profile(window)
        self._dir, self._on = run_dir / "profile", False

    def __enter__(self) -> "Profiler":
        return self

    def before(self, step: int) -> None:
        if step == self._window[0]:
            jax.profiler.start_trace(str(self._dir))
            self._on = True
        if self._on and step >= self._window[1]:
            self._stop()

    def _stop(self) -> None:
        jax.profiler.stop_trace()
        self._on = False
        console.print(f"profile of steps {self._window[0]} to {self._window[1]} in {self._dir}")

    def __exit__(self, *_) -> None:
        if self._on:
            self._stop()


def _indent(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.splitlines())
