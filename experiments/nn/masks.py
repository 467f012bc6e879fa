"""Masks of attention: made, merged, checked, and kept from making 0/0 or 0·∞.

A boolean mask is True where a query may not attend, as in `nn.MultiheadAttention`; a float one is added to the scores,
and −∞ is what blocks. (`F.scaled_dot_product_attention` has its booleans the other way round.)

Letters in shapes: B batch, H heads, T queries, S source (keys and values), D size of a token.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from experiments.nn.checks import shaped


def causal_mask(T: int, S: int, device: torch.device | None = None) -> Tensor:
    """(T, S) boolean, True above the diagonal that ends in the lower right corner.

    The last query belongs to the last key: query t may attend to keys 0 … t + S − T, as a chunk of queries after
    those of a cache does; of T > S queries the first T − S have no key.
    """
    return torch.ones(T, S, dtype=torch.bool, device=device).triu(S - T + 1)


def merge_masks(
    B: int,
    H: int,
    T: int,
    S: int,
    key_padding_mask: Tensor | None = None,
    attn_mask: Tensor | None = None,
    causal: bool = False,
    device: torch.device | None = None,
) -> Tensor | None:
    """One mask that broadcasts to (B, H, T, S), boolean unless `attn_mask` is float, or None.

    Args:
        key_padding_mask: (B, S) boolean, True is padding
        attn_mask: (T, S), (B, T, S) or (B, H, T, S); boolean: True is blocked; float: added to the scores
        causal: a query attends to no later key, see `causal_mask`
        device: where the causal mask is to be

    Raises:
        ValueError: a mask of another shape or dtype.
    """
    # the boolean ones
    blocked: Tensor | None = None
    if key_padding_mask is not None:
        if (dtype := key_padding_mask.dtype) != torch.bool:
            raise ValueError(f"key_padding_mask must be boolean, True for padding, got {dtype}: call .bool()")
        shaped("key_padding_mask", key_padding_mask, B, S)
        blocked = key_padding_mask[:, None, None, :]  # (B, 1, 1, S)
    if causal and T > 1:  # a single query is the last one, and attends to all keys
        later = causal_mask(T, S, device)
        blocked = later if blocked is None else blocked | later

    # the caller's, which may be float
    if attn_mask is None:
        return blocked
    attn_mask = _with_heads(attn_mask, B, H, T, S)
    if attn_mask.dtype == torch.bool:
        return attn_mask if blocked is None else attn_mask | blocked
    return attn_mask if blocked is None else attn_mask.masked_fill(blocked, -math.inf)


def _with_heads(attn_mask: Tensor, B: int, H: int, T: int, S: int) -> Tensor:
    """`attn_mask` so that it broadcasts to (B, H, T, S)."""
    check_mask("attn_mask", attn_mask)
    shape = tuple(attn_mask.shape)
    if shape in ((T, S), (B, T, S), (B, H, T, S)):
        return attn_mask[:, None] if attn_mask.ndim == 3 else attn_mask

    hint = ""
    if shape == (B * H, T, S):
        hint = f"; for nn.MultiheadAttention's (B·H, T, S) call attn_mask.view({B}, {H}, {T}, {S})"
    allowed = f"(T, S) = {(T, S)}, (B, T, S) = {(B, T, S)} or (B, H, T, S) = {(B, H, T, S)}"
    raise ValueError(f"attn_mask must be {allowed}, got {shape}{hint}")


def open_rows(mask: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return the mask without its rows that block everything, and where they were (…, T, 1), None if nowhere.

    In such a row a softmax would be 0/0, and what a fused kernel makes of it differs between devices: so it
    is worked out as if nothing were masked, and then overwritten with zeros, which also stops its gradient.
    """
    blocked = mask if mask.dtype == torch.bool else mask == -math.inf
    nowhere = blocked.all(-1, keepdim=True)
    reading_waits = mask.device.type != "cpu" or torch.compiler.is_compiling()
    if not reading_waits and not nowhere.any():
        return mask, None
    return mask.masked_fill(nowhere, 0), nowhere


def without_padding(key: Tensor, value: Tensor, padding: Tensor) -> tuple[Tensor, Tensor]:
    """key and value with zeros for padding (B, S): a weight of zero does not hide ∞, whose product is NaN."""
    hidden = padding[:, :, None]
    clean = key.masked_fill(hidden, 0)
    return clean, clean if value is key else value.masked_fill(hidden, 0)


def check_mask(name: str, mask: Tensor) -> None:
    """Raise ValueError where a mask is neither boolean nor float."""
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise ValueError(
            f"{name} must be boolean (True is blocked) or float (added to the scores), got {mask.dtype}: "
            "call .bool() on a mask of zeros and ones"
        )
