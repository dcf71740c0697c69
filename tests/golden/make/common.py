"""What the scripts here share: exact inputs, references run in float64, and the layout of the files."""

import contextlib
import importlib.util
import json
import pathlib
import zlib
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

import numpy as np
import torch

FOLDER = pathlib.Path(__file__).parent.parent

# Rows of 67 tokens: padding on the left, between documents and on the right; a document of one token.
SEGMENT_IDS = torch.tensor(
    [
        [0] * 2 + [1] * 19 + [0] * 3 + [2] * 1 + [3] * 36 + [0] * 6,
        [1] * 45 + [2] * 22,
    ]
)


def generator(name: str) -> np.random.Generator:
    return np.random.default_rng(zlib.crc32(name.encode()))


def draw(rng: np.random.Generator, *shape: int, scale: float = 1.0) -> np.ndarray:
    """Returns normal numbers on a grid of 1/64: exact in float32, and small when compressed."""
    return np.round(rng.normal(size=shape) * scale * 64) / 64


def uniform(rng: np.random.Generator, *shape: int, low: float, high: float) -> np.ndarray:
    """Returns uniform numbers on a grid of 1/64."""
    return np.round(rng.uniform(low, high, size=shape) * 64) / 64


def log_decay(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Returns log-decays <= 0: most of them mild, some zero, some that forget everything."""
    g = -np.abs(draw(rng, *shape, scale=0.5))
    g[rng.random(shape) < 0.02] = 0.0
    g[rng.random(shape) < 0.02] = -30.0
    return g


def fla_naive(path: str) -> ModuleType:
    """Loads one file of flash-linear-attention by its path: importing the package would ask for Triton and a GPU."""
    package = importlib.util.find_spec("fla")
    assert package is not None, "run this script in the environment that has fla-core"
    assert package.submodule_search_locations is not None
    file = pathlib.Path(package.submodule_search_locations[0], path)
    spec = importlib.util.spec_from_file_location("naive_" + path.replace("/", "_").removesuffix(".py"), file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def double_precision():
    """Makes code that asks for float32 get float64: the references cast to it by name, wherever they compute."""
    saved = torch.float32, torch.float, torch.Tensor.float, torch.get_default_dtype()
    torch.float32 = torch.float = torch.float64
    torch.Tensor.float = torch.Tensor.double
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.float32, torch.float, torch.Tensor.float = saved[:3]
        torch.set_default_dtype(saved[3])


def record(
    name: str,
    run: Callable[..., Mapping[str, torch.Tensor]],
    inputs: Mapping[str, np.ndarray],
    *,
    settings: Mapping[str, Any],
    source: str,
    constants: Mapping[str, np.ndarray] | None = None,
    zero_cotangents: Mapping[str, np.ndarray] | None = None,
    precision: str = "float64",
) -> None:
    """Writes NAME.npz: `run(inputs)` -> outputs, with random cotangents for all of them and the gradients of `inputs`.

    `constants` are inputs without a gradient: stored, while `run` has them in its closure. Where
    `zero_cotangents` of an output holds, its cotangent is zero: the output is not defined there.
    """
    if precision == "float64":
        with double_precision():
            tensors, outputs, cotangents = _outputs(name, run, inputs, zero_cotangents, torch.float64)
            grads = _gradients(tensors, outputs, cotangents)
        # The same code, with nothing replaced, gives the same numbers to float32's precision.
        for key, got in _outputs(name, run, inputs, zero_cotangents, torch.float32)[1].items():
            error = (got.to(outputs[key].dtype) - outputs[key]).norm() / outputs[key].norm()
            assert error < 1e-5, f"{name}: {key} is off by {error:.1e} from the unmodified reference"
    else:
        tensors, outputs, cotangents = _outputs(name, run, inputs, zero_cotangents, torch.float32)
        grads = _gradients(tensors, outputs, cotangents)

    meta = {"source": source, "torch": torch.__version__, "precision": precision, "settings": dict(settings)}
    arrays = {f"in.{key}": _exact_float32(x) for key, x in inputs.items()}
    arrays |= {f"in.{key}": x for key, x in (constants or {}).items()}
    double = lambda x: x.detach().to(torch.complex128 if x.is_complex() else torch.float64).numpy()
    arrays |= {f"out.{key}": double(x) for key, x in outputs.items()}
    arrays |= {f"cotangent.{key}": _exact_float32(double(x)) for key, x in cotangents.items()}
    arrays |= {f"grad.{key}": double(x) for key, x in grads.items()}
    path = FOLDER / f"{name}.npz"
    np.savez_compressed(path, allow_pickle=False, meta=np.array(json.dumps(meta)), **arrays)
    print(f"{path.name:40} {path.stat().st_size / 1024:6.1f} KiB  {' '.join(arrays)}")


def module_case(
    name: str,
    build: Callable[[], torch.nn.Module],
    call: Callable[[Callable[[torch.Tensor], Any], torch.Tensor], torch.Tensor],
    x: np.ndarray,
    parameters: Callable[[str, np.random.Generator, torch.Size], np.ndarray],
    *,
    settings: Mapping[str, Any],
    source: str,
    precision: str = "float64",
) -> None:
    """Writes NAME.npz for a layer with every parameter drawn anew, under its own name and in torch's layout."""
    rng = generator(name + " parameters")
    inputs = {"x": x} | {key: parameters(key, rng, p.shape) for key, p in build().named_parameters()}

    def run(x: torch.Tensor, **parameters: torch.Tensor) -> dict[str, torch.Tensor]:
        module = build().to(x.dtype).eval()
        assert set(parameters) == set(dict(module.named_parameters()))
        apply = lambda *args, **kwargs: torch.func.functional_call(module, parameters, args, kwargs)
        return {"y": call(apply, x)}

    record(name, run, inputs, settings=settings, source=source, precision=precision)


def check_cache(whole: torch.Tensor, step: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> None:
    """Asserts that a layer gives `whole` again when `step`, which keeps a cache, reads a prompt and then each token."""
    prompt = 2 * x.shape[1] // 3
    with torch.no_grad():
        parts = [step(part) for part in (x[:, :prompt], *x[:, prompt:].split(1, dim=1))]
    error = (torch.cat(parts, dim=1) - whole).norm() / whole.norm()
    assert error < 1e-5, f"with its cache, the reference is off by {error:.1e} from what it gives without"


def per_document(
    run: Callable[..., tuple[torch.Tensor, torch.Tensor]],
    segment_ids: torch.Tensor,
    state: torch.Tensor,
    **sequences: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Runs every document by itself: the first of a row from `state`, the others from zero; padding gives zeros."""
    rows, states = [], []
    for b, ids in enumerate(segment_ids):
        row, last = None, state[b : b + 1]
        for n, document in enumerate(sorted(set(ids.tolist()) - {0})):
            where = torch.nonzero(ids == document)[:, 0]
            start = last if n == 0 else torch.zeros_like(last)
            o, last = run(**{key: x[b : b + 1, where] for key, x in sequences.items()}, state=start)
            if row is None:
                row = o.new_zeros(1, len(ids), *o.shape[2:])
            row = row.index_copy(1, where, o)
        assert row is not None
        rows.append(row)
        states.append(last)
    return torch.cat(rows), torch.cat(states)


def _outputs(name, run, inputs, zero_cotangents, dtype):
    kind = lambda x: dtype.to_complex() if x.dtype.kind == "c" else dtype
    tensors = {key: torch.tensor(x, dtype=kind(x), requires_grad=True) for key, x in inputs.items()}
    outputs = run(**tensors)
    rng = generator(name + " cotangents")
    parts = lambda x: draw(rng, *x.shape) + 1j * draw(rng, *x.shape) if x.is_complex() else draw(rng, *x.shape)
    cotangents = {key: torch.tensor(parts(x), dtype=x.dtype) for key, x in outputs.items()}
    for key, where in (zero_cotangents or {}).items():
        cotangents[key][torch.tensor(where)] = 0
    for key, x in outputs.items():
        assert x.dtype in (dtype, dtype.to_complex()), f"{name}: {key} is {x.dtype}"
    return tensors, outputs, cotangents


def _gradients(tensors, outputs, cotangents):
    # JAX multiplies complex cotangents with derivatives, torch with the conjugates of these.
    cotangents = [x.conj() for x in cotangents.values()]
    grads = torch.autograd.grad(list(outputs.values()), list(tensors.values()), cotangents)
    return {key: x.conj().resolve_conj() for key, x in zip(tensors, grads, strict=True)}


def _exact_float32(x: np.ndarray) -> np.ndarray:
    dtype = np.complex64 if np.iscomplexobj(x) else np.float32
    assert np.array_equal(x.astype(dtype), x)
    return x.astype(dtype)
