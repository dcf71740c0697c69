"""Golden cases of `attention`, from the eager attentions and the masks of transformers."""

from types import SimpleNamespace

import torch
from common import SEGMENT_IDS, draw, generator, record
from transformers import masking_utils as masks
from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward as gemma2_attention
from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward as gpt_oss_attention
from transformers.models.llama.modeling_llama import eager_attention_forward as llama_attention

HF = "transformers 5.23.0 "
B, N, K, H, P = 2, 4, 2, 6, 3


def eager(attention, q, k, v, mask_function, scale=None, soft_cap=None, sinks=None, attends=None):
    """Runs one of the eager attentions; the log-sum-exp is of the logits that its softmax sees."""
    T, S = q.shape[1], k.shape[1]
    mask = masks.eager_mask(B, T, S, q_offset=S - T, mask_function=mask_function, dtype=q.dtype)
    module = SimpleNamespace(num_key_value_groups=N // K, training=False, head_dim=H, sinks=sinks)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    scale = H**-0.5 if scale is None else scale
    kwargs = {} if soft_cap is None else {"softcap": soft_cap}
    o, _ = attention(module, q, k, v, mask, scaling=scale, **kwargs)

    logits = torch.einsum("bnth,bnsh->bnts", q, k.repeat_interleave(N // K, dim=1)) * scale
    if soft_cap is not None:
        logits = soft_cap * torch.tanh(logits / soft_cap)
    logits = logits.masked_fill(mask < 0, -torch.inf)
    if sinks is not None:
        logits = torch.cat([logits, sinks[None, :, None, None].expand(B, N, T, 1)], dim=-1)
    return {"o": o, "lse": torch.logsumexp(logits, dim=-1)}


def inputs_of(rng, T: int, S: int):
    return {"q": draw(rng, B, T, N, H), "k": draw(rng, B, S, K, H), "v": draw(rng, B, S, K, P)}


def causal(q, k, v):
    return eager(llama_attention, q, k, v, masks.causal_mask_function)


def bidirectional(q, k, v):
    return eager(llama_attention, q, k, v, masks.bidirectional_mask_function, scale=0.75)


def window(q, k, v):
    return eager(llama_attention, q, k, v, masks.sliding_window_causal_mask_function(7))


def window_and_sinks(q, k, v, sinks):
    return eager(gpt_oss_attention, q, k, v, masks.sliding_window_causal_mask_function(9), sinks=sinks)


def soft_cap(q, k, v):
    return eager(gemma2_attention, q, k, v, masks.causal_mask_function, soft_cap=1.5)


def sink_tokens(q, k, v):
    first = lambda batch, head, query, key: key < 3
    seen = masks.or_masks(masks.sliding_window_overlay(5), first)
    return eager(llama_attention, q, k, v, masks.and_masks(masks.causal_mask_function, seen))


def packed(q, k, v):
    same = masks.packed_sequence_mask_function(SEGMENT_IDS)
    mask_function = masks.and_masks(masks.causal_mask_function, same)
    return at_documents(eager(llama_attention, q, k, v, mask_function))


def packed_window(q, k, v):
    same = masks.packed_sequence_mask_function(SEGMENT_IDS)
    mask_function = masks.and_masks(masks.sliding_window_causal_mask_function(7), same)
    return at_documents(eager(llama_attention, q, k, v, mask_function))


def at_documents(outputs):
    """Zeros the outputs at padding, which the reference takes for a document."""
    real = SEGMENT_IDS > 0
    return {"o": outputs["o"] * real[:, :, None, None], "lse": outputs["lse"] * real[:, None, :]}


def main() -> None:
    llama, gemma2, gpt_oss = (HF + model + " eager_attention_forward" for model in ("llama", "gemma2", "gpt_oss"))

    rng = generator(name := "attention_causal")
    record(name, causal, inputs_of(rng, 35, 35), settings={}, source=llama)

    rng = generator(name := "attention_bidirectional")
    record(name, bidirectional, inputs_of(rng, 11, 35), settings={"causal": False, "scale": 0.75}, source=llama)

    rng = generator(name := "attention_window")
    record(name, window, inputs_of(rng, 19, 41), settings={"window_size": 7}, source=llama)

    rng = generator(name := "attention_window_sinks")
    inputs = inputs_of(rng, 35, 35) | {"sinks": draw(rng, N)}
    record(name, window_and_sinks, inputs, settings={"window_size": 9}, source=gpt_oss)

    rng = generator(name := "attention_soft_cap")
    record(name, soft_cap, inputs_of(rng, 35, 35), settings={"soft_cap": 1.5}, source=gemma2)

    rng = generator(name := "attention_sink_tokens")
    record(name, sink_tokens, inputs_of(rng, 19, 41), settings={"window_size": 5, "sink_tokens": 3}, source=llama)

    constants = {"segment_ids": SEGMENT_IDS.numpy().astype("int32")}
    padding = (SEGMENT_IDS == 0)[:, None].expand(B, N, -1).numpy()
    rng = generator(name := "attention_packed")
    inputs = inputs_of(rng, 67, 67)
    zero = {"lse": padding}
    record(name, packed, inputs, settings={}, source=llama, constants=constants, zero_cotangents=zero)

    rng = generator(name := "attention_window_packed")
    inputs = inputs_of(rng, 67, 67)
    settings = {"window_size": 7}
    record(name, packed_window, inputs, settings=settings, source=llama, constants=constants, zero_cotangents=zero)


if __name__ == "__main__":
    main()
