"""Which implementation of an op runs."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

# The names of implementations, and the platforms that JAX lowers them for. "xla" runs everywhere.
PLATFORMS = {"tpu": "tpu", "gpu": "cuda"}


def check_impl(op: str, impl: str | None, available: tuple[str, ...]) -> None:
    """Raises ValueError unless `impl` is None or one of those available."""
    if impl is not None and impl not in available:
        raise ValueError(f"{op} has no implementation {impl!r}; it has {', '.join(available)}")


def supported(op: str, impl: str | None, unsupported: str | None) -> str | None:
    """Returns the implementation to take, given why that for TPUs does not support the arguments (None: it does).

    Raises:
      ValueError: it is the one that was asked for.
    """
    if unsupported is None:
        return impl
    if impl == "tpu":
        raise ValueError(f"{op}: impl 'tpu' does not support {unsupported}; use impl=None")
    return impl or "xla"


def dispatch(impl: str | None, implementations: Mapping[str, Callable[..., Any]], *args: Any) -> Any:
    """Calls the named implementation; None takes the best one on the platform being lowered for.

    The platform is that of the lowering, not of this process: a program lowered on a laptop for a TPU must hold TPU
    kernels.
    """
    if impl is not None:
        return implementations[impl](*args)
    branches = {PLATFORMS[name]: fn for name, fn in implementations.items() if name in PLATFORMS}
    if not branches:
        return implementations["xla"](*args)
    return jax.lax.platform_dependent(*args, **branches, default=implementations["xla"])


def differentiable(forwards: Mapping[str, Callable[..., Any]], backwards: Mapping[str, Callable[..., Any]]) -> Any:
    """Returns `op(impl, option, *args)`, dispatched, whose gradients are those of `backwards`.

    Each platform keeps what its own backward needs. `forward(keep, option, *args)` returns its outputs and what it
    keeps; `backward(option, (*args, *kept), cotangents)` the gradients of all arguments but the last, segment ids.
    The option is known when the program is made: a scale, a direction, or None.
    """

    @functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
    def op(impl: str | None, option: Any, *args: Any) -> Any:
        outputs = lambda forward: lambda *args: forward(False, option, *args)[0]
        return dispatch(impl, {name: outputs(forward) for name, forward in forwards.items()}, *args)

    def forward(impl: str | None, option: Any, *args: Any) -> Any:
        names = forwards if impl is None else [impl]
        keeping = {name: functools.partial(forwards[name], True, option) for name in names}
        outputs, kept = dispatch(impl, _keep_apart(keeping, *args), *args)
        return outputs, (args, kept)

    def backward(impl: str | None, option: Any, residuals: Any, cotangents: Any) -> Any:
        def of(name: str) -> Callable[..., Any]:
            return lambda args, kept, cotangents: backwards[name](option, (*args, *kept[name]), cotangents)

        return *dispatch(impl, {name: of(name) for name in backwards}, *residuals, cotangents), None

    op.defvjp(forward, backward)
    return op


def _keep_apart(forwards: Mapping[str, Callable[..., Any]], *args: Any) -> dict[str, Callable[..., Any]]:
    """Returns forwards, each `(outputs, kept)`, whose `kept` is a dictionary by name: what each platform keeps.

    A program may be lowered for any platform, so all must return the same arrays. In the place of what others would
    keep are zeros, which nobody reads, and which XLA leaves out where forward and backward are one program, out of
    scanned layers too.
    """
    shapes = {name: jax.eval_shape(forward, *args)[1] for name, forward in forwards.items()}
    zeros = {name: lambda kept=kept: jax.tree.map(jnp.zeros_like, kept) for name, kept in shapes.items()}

    def apart(name: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            outputs, kept = forward(*args)
            return outputs, {other: kept if other == name else zeros[other]() for other in forwards}

        return run

    return {name: apart(name, forward) for name, forward in forwards.items()}
