"""`attention` of a sequence to itself on TPU: JAX's splash attention, https://arxiv.org/abs/2205.14135."""

import functools

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

from pallas_kernels.common.holes import hole_moves

INTERPRET = False  # Tests set it, to run the kernels on a CPU.


def unsupported(options, q, v, g, is_self_attention):
    """Returns why these arguments need another implementation, or None."""
    if not is_self_attention:
        return "keys that are not the queries' own tokens (T != S, positions or kv_segment_ids)"
    if options.sink_tokens > 0:
        return "sink_tokens"
    if g is not None:
        return "g"
    if q.shape[1] < 128:
        return f"fewer than 128 tokens, and here are {q.shape[1]}"
    if q.dtype not in (jnp.float32, jnp.bfloat16) or v.dtype != q.dtype:
        return f"q {q.dtype} with v {v.dtype}; both have to be float32, or both bfloat16"
    return None


def forward(options, q, k, v, g, sinks, segment_ids, kv_segment_ids, positions, kv_positions):
    """Returns `(o, lse)` and the same residuals as `xla.forward`."""
    inputs = q, k, v, g, sinks, segment_ids, kv_segment_ids, positions, kv_positions
    close, reopen = hole_moves(segment_ids)
    kernel = _kernel(options, q.shape[1], q.shape[2])
    o_BNTP, (lse_BNT,) = jax.vmap(kernel, in_axes=(0, 0, 0, 0, None))(
        _heads_first(close(_scaled(options, q))),
        _heads_first(close(k)),
        _heads_first(close(v)),
        _ids(close(segment_ids)),
        sinks,
    )
    # The kernel lets a query that sees nothing see everything; here that is padding, and only padding.
    is_real_BT = segment_ids > 0
    tokens_first = lambda a_BNT: reopen(jnp.moveaxis(a_BNT, 1, 2)[:, : q.shape[1]])
    o = jnp.where(is_real_BT[..., None, None], tokens_first(o_BNTP), 0)
    lse = jnp.where(is_real_BT[:, None], jnp.moveaxis(tokens_first(lse_BNT), 1, 2), -jnp.inf)
    return (o, lse), (*inputs, o, lse)


def backward(options, residuals, cotangents):
    """Returns the gradients of q, k, v, g (None) and sinks."""
    q, k, v, _, sinks, segment_ids, _, _, _, o, lse = residuals
    do, dlse = cotangents
    T = q.shape[1]
    close, reopen = hole_moves(segment_ids)
    is_real_BT1 = (segment_ids > 0)[..., None]
    # With no cotangent and a denominator of 1 = e^0, padding takes no part; the kernel's masked scores are finite.
    do = jnp.where(is_real_BT1[..., None], do, 0)
    lse_BTN = jnp.where(is_real_BT1, jnp.moveaxis(lse, 1, 2), 0)
    shift_BTN = jnp.sum(o.astype(jnp.float32) * do.astype(jnp.float32), axis=3) - jnp.moveaxis(dlse, 1, 2)
    shift_BTN = jnp.where(is_real_BT1, shift_BTN, 0)
    kernel = _kernel(options, T, q.shape[2])
    assert kernel.dq_mask_info is not None
    assert kernel.dkv_mask_info is not None
    dq_info, dkv_info, block = kernel.dq_mask_info, kernel.dkv_mask_info, _block(T)
    shared = {
        "bq": block,
        "bkv": block,
        "mask_value": splash.DEFAULT_MASK_VALUE,
        "is_mqa": False,
        "interpret": INTERPRET,
        "attn_logits_soft_cap": options.soft_cap,
        "mask_function": kernel.kwargs["mask_function"],
        **{f"{name}_layout": splash.QKVLayout.HEAD_DIM_MINOR for name in "qkv"},
    }

    def gradients(q, k, v, ids, lse, do, shift):
        # The public gradient of the kernel takes no cotangent of the log-sum-exp; in these two it is part of `shift`.
        args = q, k, v, ids, sinks, lse, do, shift
        _, dk, dv = splash._splash_attention_bwd_dkv(
            *args, bkv_compute=min(block, 512), mask_info=dkv_info, use_fused_bwd_kernel=False, **shared
        )
        return splash._splash_attention_bwd_dq(*args, mask_info=dq_info, **shared), dk, dv

    heads_first = lambda a: _heads_first(close(a))
    grads_BNTH = jax.vmap(gradients)(
        heads_first(_scaled(options, q)),
        heads_first(k),
        heads_first(v),
        _ids(close(segment_ids)),
        heads_first(lse_BTN),
        heads_first(do),
        heads_first(shift_BTN),
    )
    dq, dk, dv = (reopen(jnp.moveaxis(a, 1, 2)[:, :T]) for a in grads_BNTH)
    dq, dk, dv = (jnp.where(is_real_BT1[..., None], a, 0) for a in (dq, dk, dv))
    if sinks is None:
        return _scaled(options, dq), dk, dv, None, None
    p_BTN = jnp.where(is_real_BT1, jnp.exp(sinks.astype(jnp.float32)[None, None] - lse_BTN), 0)
    return _scaled(options, dq), dk, dv, None, -jnp.sum(p_BTN * shift_BTN, axis=(0, 1)).astype(sinks.dtype)


@functools.lru_cache
def _mask(options, size):
    window = None if options.window_size is None else options.window_size - 1
    if window is None:
        return masks.CausalMask((size, size)) if options.causal else masks.FullMask((size, size))
    return masks.LocalMask((size, size), (window, 0 if options.causal else window), 0)


def _kernel(options, T, N):
    block = _block(T)
    size = T + -T % block
    blocks = splash.BlockSizes(
        block_q=block,
        block_kv=block,
        block_kv_compute=min(block, 512),
        block_q_dkv=block,
        block_kv_dkv=block,
        block_kv_dkv_compute=min(block, 512),
        block_q_dq=block,
        block_kv_dq=block,
    )
    return splash.make_splash_mha(
        masks.MultiHeadMask([_mask(options, size)] * N),
        block_sizes=blocks,
        save_residuals=True,
        attn_logits_soft_cap=options.soft_cap,
        head_shards=1,
        q_seq_shards=1,
        interpret=INTERPRET,
    )


def _block(T):
    """The largest block that adds no more than an eighth to T."""
    return next((block for block in (1024, 512, 256) if 8 * (-T % block) <= T), 128)


def _heads_first(a_BTN):
    """Returns `[B N T ...]` with T a multiple of the block."""
    T = a_BTN.shape[1]
    padding = [(0, 0)] * (a_BTN.ndim - 2)
    return jnp.moveaxis(jnp.pad(a_BTN, [(0, 0), (0, -T % _block(T)), *padding]), 2, 1)


def _ids(ids_BT):
    """Padding sees only padding, whose outputs and gradients are replaced by zeros, overflow included."""
    ids_BT = jnp.pad(ids_BT, ((0, 0), (0, -ids_BT.shape[1] % _block(ids_BT.shape[1]))))
    return splash.SegmentIds(ids_BT, ids_BT)


def _scaled(options, q):
    return (options.scale * q.astype(jnp.float32)).astype(q.dtype)
