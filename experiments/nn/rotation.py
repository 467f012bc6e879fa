"""Rotary rotation of pairs of features: formula and fast kernel."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, Literal, get_args

import torch
from torch import Tensor

Layout = Literal["interleaved", "half"]
LAYOUTS: tuple[Layout, ...] = get_args(Layout)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, layout: Layout) -> Tensor:
    """Equation (3) as it reads, the reference: x (..., R), cos and sin (..., R/2) → (..., R)."""
    a, b = pairs(x, layout)
    turned = (a * cos - b * sin, b * cos + a * sin)
    return torch.stack(turned, dim=-1).flatten(-2) if layout == "interleaved" else torch.cat(turned, dim=-1)


def pairs(x: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    """Return the first and the second members of all pairs: x (..., R) → two views (..., R/2)."""
    if layout == "interleaved":
        return x[..., 0::2], x[..., 1::2]
    half = x.shape[-1] // 2
    return x[..., :half], x[..., half:]


BLOCK = 1 << 19  # numbers, 2 MB in float32: several passes over a block find it in the cache


class Rotation(torch.autograd.Function):
    """Equation (3) in few passes over the memory, on the CPU or CUDA; its gradient is the rotation backwards.

    What is kept for the backward pass is the table alone, not x.
    """

    @staticmethod
    def forward(x: Tensor, table: Tensor, layout: Layout, backwards: bool) -> Tensor:
        """x (B, H, L, D) and its positions' rows (L, R) or (B, 1, L, R), of the dtype to compute in."""
        if layout == "interleaved" and not _is_complex_viewable(x):
            x = x.clone(memory_format=torch.contiguous_format)

        # the features past R stay as they are
        (B, H, L, D), R = x.shape, table.shape[-1]
        out = torch.empty_like(x)
        if D > R:
            out[..., R:] = x[..., R:]

        # half precision computes in the table's dtype, through two spare buffers
        turn = _turn_interleaved if layout == "interleaved" else _turn_half
        rounds = x.dtype != table.dtype
        one_pass = layout == "interleaved" and not rounds
        size = x.numel() if one_pass or x.is_cuda else max(BLOCK, D)
        spare = table.new_empty(2, min(size, B * H * L * R) if rounds else 0)

        # block by block, so that several passes over one find it in the cache
        for rows, parts in blocks(x.shape, size):
            by = factors(table[..., rows, :], layout, backwards)
            for b, h in parts:
                source, target = x[b, h, rows, :R], out[b, h, rows, :R]
                here = tuple(factor if factor.ndim == 2 else factor[b] for factor in by)
                if not rounds:
                    turn(source, here, target)
                    continue
                wide, turned = (buffer[: source.numel()].view(source.shape) for buffer in spare)
                turn(wide.copy_(source), here, turned)
                target.copy_(turned)  # rounded here, and nowhere else
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Layout, bool], output: Tensor) -> None:
        _, table, ctx.layout, ctx.backwards = inputs
        ctx.save_for_backward(table)
        ctx.save_for_forward(table)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (table,) = ctx.saved_tensors
        return Rotation.apply(grad, table, ctx.layout, not ctx.backwards), None, None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:
        """Rotate the tangent: a linear function is its own derivative."""
        (table,) = ctx.saved_tensors
        output: Tensor = Rotation.apply(tangent, table, ctx.layout, ctx.backwards)
        return output

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int, ...], x: Tensor, table: Tensor, layout: Layout, backwards: bool
    ) -> tuple[Tensor, int]:
        """N calls with the same positions are one with N times the batch."""
        x = x.movedim(in_dims[0], 0)  # (N, B, H, L, D)
        rows = table if table.ndim == 2 else table.repeat(len(x), 1, 1, 1)
        return Rotation.apply(x.flatten(0, 1), rows, layout, backwards).view(x.shape), 0


def blocks(shape: torch.Size, size: int) -> Iterator[tuple[slice, list[tuple[slice, slice]]]]:
    """Cuts (B, H, L, D) into pieces of at most about `size` numbers: slices of L, for each those of B and H."""
    B, H, L, D = shape
    length = max(1, min(L, size // D))
    heads = max(1, min(H, size // (D * length)))
    batch = max(1, min(B, size // (D * length * heads)))

    def cut(total: int, step: int) -> list[slice]:
        return [slice(begin, begin + step) for begin in range(0, total, step)]

    for rows in cut(L, length):
        yield rows, list(itertools.product(cut(B, batch), cut(H, heads)))


def factors(table: Tensor, layout: Layout, backwards: bool) -> tuple[Tensor, ...]:
    """Return what `_turn_interleaved` or `_turn_half` multiplies by; `backwards` turns by the negative angle."""
    if layout == "interleaved":
        cis = _as_complex(table)
        return (cis.conj().resolve_conj() if backwards else cis,)
    cos, sin = pairs(table, layout)
    return torch.cat((cos, cos), dim=-1), -sin if backwards else sin


def _turn_interleaved(x: Tensor, factors: tuple[Tensor, ...], out: Tensor) -> None:
    """(x_a + j x_b)(cos + j sin) into `out`: one pass."""
    (cis,) = factors
    torch.mul(_as_complex(x), cis, out=_as_complex(out))


def _turn_half(x: Tensor, factors: tuple[Tensor, ...], out: Tensor) -> None:
    """x cos, then −x_b sin and x_a sin added to its halves, into `out`: three passes.

    The first takes rows (..., R) as they lie in memory, which is faster than two halves.
    """
    cos, sin = factors
    (x_a, x_b), (out_a, out_b) = pairs(x, "half"), pairs(out, "half")
    torch.mul(x, cos, out=out)
    out_a.addcmul_(x_b, sin, value=-1)
    out_b.addcmul_(x_a, sin)


def _as_complex(x: Tensor) -> Tensor:
    """(..., R) → (..., R/2), a view: neighbours are the real and the imaginary part."""
    return torch.view_as_complex(x.unflatten(-1, (-1, 2)))


def _is_complex_viewable(x: Tensor) -> bool:
    """Whether neighbours lie side by side and each pair starts at an even place of the storage."""
    *others, last = x.stride()
    return last == 1 and not any(place % 2 for place in (x.storage_offset(), *others))
