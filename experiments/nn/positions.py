"""Where a token stands: the sinusoids that are added to it, and the rotation that turns its query and its key.

    θ_i = base^(−2i/D)        i = 0 … D/2 − 1                     one angular frequency per pair of dimensions   (1)
    PE(p)_{2i} = sin(p θ_i)        PE(p)_{2i+1} = cos(p θ_i)                       Vaswani et al. 2017, §3.5   (2)
    y_a = x_a cos(p θ_i) − x_b sin(p θ_i)        y_b = x_b cos(p θ_i) + x_a sin(p θ_i)                         (3)
                                              (a, b) the i-th pair: Su et al. 2021 (RoFormer), eqs 13 to 16, 34

The i-th pair is (2i, 2i + 1) in the `interleaved` layout of RoFormer, (i, i + R/2) in the `half` layout, that of
the checkpoints of LLaMA in transformers. Read as a complex number x_a + j x_b, (3) is a product with cos + j sin.

Every angle p θ_i is a product in float64, and what is cast is its sine or cosine, once: in bfloat16 the position
257 does not exist, and in float32 the angles of position 10⁶ are off by hundredths of a radian.

Letters in shapes: B batch, H heads, L length, D size of a model or of a head, R the part of it that is rotated.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from experiments.nn.checks import at_least, divisible, floating, one_of, shaped, within
from experiments.nn.rope_scaling import Scaling, checked_scaling, scaled_base, scaled_frequencies
from experiments.nn.rotation import LAYOUTS, Layout, Rotation, pairs, rotate


def inverse_frequencies(dim: int, base: float = 10000.0, device: torch.device | str = "cpu") -> Tensor:
    """θ_i of equation (1), in radians per position: (⌈dim/2⌉,) float64."""
    return base ** -(torch.arange(0, dim, 2, dtype=torch.float64, device=device) / dim)


def angles(positions: Tensor, frequencies: Tensor) -> Tensor:
    """p θ_i: positions (...) and frequencies (n,) on one device → (..., n) float64."""
    return positions.double().unsqueeze(-1) * frequencies


class _TableCache:
    """The rows of positions 0, 1, … of a table, cast once for each (dtype, device).

    `rows` gives them in float64 for positions (n,). A module keeps this as a plain attribute: no cast of the
    module rounds it, no checkpoint holds it, no first caller decides its dtype. Copies and pickles start empty.
    """

    def __init__(self, rows: Callable[[Tensor], Tensor], max_len: int):
        self.rows, self.max_len = rows, max_len
        self.tables: dict[tuple[torch.dtype, torch.device], Tensor] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "tables": {}}

    @torch.inference_mode(False)  # what is made while evaluating is saved for a backward pass later
    @torch.no_grad()
    def first(self, length: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return the rows of at least the first `length` positions: (≥ length, ...)."""
        table = self.tables.get((dtype, device))
        if table is None or len(table) < length:
            size = self.max_len if length <= self.max_len else 1 << (length - 1).bit_length()
            table = self.rows(torch.arange(size, device="cpu")).to(dtype).to(device)
            if type(table) is Tensor:  # not the stand-in of a tracer
                self.tables[dtype, device] = table
        return table


class AbsPosEncoding(nn.Module):
    """Adds the sinusoids of equation (2), then drops out. Nothing is learnt, and `state_dict()` is empty.

    `max_len` is the length that tables are prepared for; longer ones are right too. An odd `d_model` has one
    sine more than cosines.

    Raises:
        ValueError: a size below 1, or a dropout outside [0, 1).
    """

    def __init__(self, d_model: int, max_len: int = 5000, dropout: float = 0.0):
        super().__init__()
        _check_whole(1, d_model=d_model, max_len=max_len)
        within(0, 1, dropout=dropout)
        self.d_model = d_model
        self.dropout = nn.Dropout(dropout)

        # tables of cos and sin
        self._cache = _TableCache(self._rows, max_len)

    def extra_repr(self) -> str:
        return f"{self.d_model}, max_len={self._cache.max_len}"

    def forward(self, x: Tensor, offset: int = 0) -> Tensor:
        """x (B, L, d_model), whose first token stands at position `offset` → x + PE, of x's dtype, not in place.

        Raises:
            ValueError: x has another shape or is not floating, or the offset is negative.
        """
        shaped("x", x, "B", "L", self.d_model)
        floating(x=x)
        _check_whole(0, offset=offset)
        table = self._slice(x.shape[1], offset, torch.promote_types(x.dtype, torch.float32), x.device)
        output: Tensor = self.dropout((x + table).to(x.dtype))  # the sum is rounded, not its parts
        return output

    def table(
        self,
        length: int,
        offset: int = 0,
        dtype: torch.dtype = torch.float64,
        device: torch.device | str = "cpu",
    ) -> Tensor:
        """PE of positions offset … offset + length − 1: (length, d_model), a copy.

        Raises:
            ValueError: a negative length or offset.
        """
        _check_whole(0, length=length, offset=offset)
        return self._slice(length, offset, dtype, torch.device(device)).clone()

    def _slice(self, length: int, offset: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        end = offset + length
        if offset > self._cache.max_len:  # far out: these alone
            return self._rows(torch.arange(offset, end, device="cpu")).to(dtype).to(device)
        return self._cache.first(end, dtype, device)[offset:end]

    def _rows(self, positions: Tensor) -> Tensor:
        """Equation (2) for positions (n,): (n, d_model) float64."""
        angle = angles(positions, inverse_frequencies(self.d_model))  # (n, ⌈d_model/2⌉)
        return torch.stack((angle.sin(), angle.cos()), dim=-1).flatten(1)[:, : self.d_model]


class RotaryPosEncoding(nn.Module):
    """Turns the pairs of queries and keys by equation (3), so that their product knows how far apart they stand.

    The first `rotary_dim` of the `dim` numbers of a head (all, unless given) are rotated, with θ_i over
    `rotary_dim`; the others pass. `scaling` stretches the frequencies for contexts longer than those of training,
    with the keys of a transformers checkpoint's `rope_scaling`: `rope_type` (or `type`) is

        linear    factor
        dynamic   factor, and original_max_position_embeddings (max_len unless given)
        yarn      factor, original_max_position_embeddings; beta_fast, beta_slow, truncate, attention_factor,
                  mscale and mscale_all_dim where they are not the paper's
        llama3    factor, original_max_position_embeddings, low_freq_factor, high_freq_factor

    `dynamic` depends on the length of the call, the highest position + 1, and on nothing before it (transformers
    goes on with the longest so far: the same while a sequence grows). To read that position from another device
    waits for it. Nothing is learnt, and `state_dict()` is empty. `max_len` is the length that tables are prepared
    for; any other is right.

    Raises:
        ValueError: an odd or too small `dim` or `rotary_dim`, `rotary_dim` above `dim`, a base not above 1, an
            unknown layout, a key of `scaling` that is missing, unknown or out of range.
    """

    def __init__(
        self,
        dim: int,
        base: float = 10000.0,
        layout: Layout = "interleaved",
        rotary_dim: int | None = None,
        scaling: Scaling | None = None,
        max_len: int = 4096,
    ):
        super().__init__()
        rotary_dim = dim if rotary_dim is None else rotary_dim
        _check_whole(1, dim=dim, rotary_dim=rotary_dim, max_len=max_len)
        divisible(2, dim=dim, rotary_dim=rotary_dim)  # whose numbers are turned in pairs
        within(2, dim, closed=True, term="dim", rotary_dim=rotary_dim)
        if not 1 < base < math.inf:
            raise ValueError(f"base must be a number above 1, got {base}")
        one_of(LAYOUTS, layout=layout)

        self.dim, self.base, self.rotary_dim, self.max_len = dim, float(base), rotary_dim, max_len
        self.layout: Layout = layout
        self.scaling = checked_scaling(scaling or {"rope_type": "default"}, self.base, rotary_dim)
        self.original_len = self.scaling.get("original_max_position_embeddings", max_len)

        # tables of cos and sin
        self._cache = _TableCache(self._rows, max_len)
        self._stretched: _TableCache | None = None

    def extra_repr(self) -> str:
        sizes = f"{self.dim}, base={self.base:g}, {self.layout}, rotary_dim={self.rotary_dim}"
        return f"{sizes}, scaling={self.scaling['rope_type']}"

    def frequencies(self, length: int = 0, device: torch.device | str = "cpu") -> tuple[Tensor, float]:
        """θ_i (R/2,) float64 for a call of that length, and the factor on cos and sin (1 but for YaRN)."""
        base = scaled_base(self.rotary_dim, self.base, self.scaling, self.original_len, length)
        theta = inverse_frequencies(self.rotary_dim, base, device)
        return scaled_frequencies(theta, self.base, self.scaling)

    def tables(
        self, length: int, dtype: torch.dtype = torch.float64, device: torch.device | str = "cpu"
    ) -> tuple[Tensor, Tensor]:
        """cos and sin of positions 0 … length − 1, each (length, R/2), copies.

        Raises:
            ValueError: a negative length.
        """
        _check_whole(0, length=length)
        cos, sin = pairs(self._first(length, dtype, torch.device(device)), self.layout)
        return cos.clone(), sin.clone()

    def forward(self, x: Tensor, positions: Tensor | None = None) -> Tensor:
        """Rotate queries or keys x (B, H, L, dim); the result has x's shape and dtype.

        `positions`, integers (L,) or (B, L), are 0 … L − 1 unless given. Their values are checked on the CPU
        alone: to read them from another device would make the program wait for it in every layer. There a
        negative position turns backwards, as equation (3) says.

        Raises:
            ValueError: x or the positions have another shape or dtype, or a position is negative.
        """
        shaped("x", x, "B", "H", "L", self.dim)
        floating(x=x)

        # cos and sin: float32 also for bfloat16 and float16
        dtype = torch.promote_types(x.dtype, torch.float32)
        if positions is None:
            table = self._first(x.shape[2], dtype, x.device)
        else:
            positions = positions[0] if positions.ndim == 2 and len(positions) == 1 else positions
            _check_positions(positions, x)
            table = self._at(positions, dtype, x.device)

        # the kernel
        if x.device.type in ("cpu", "cuda") and not torch.compiler.is_compiling():
            output: Tensor = Rotation.apply(x, table, self.layout, False)
            return output

        # the formula, which a compiler fuses, and which every device knows
        R = self.rotary_dim
        turned = rotate(x[..., :R].to(dtype), *pairs(table, self.layout), self.layout).to(x.dtype)
        return turned if self.dim == R else torch.cat((turned, x[..., R:]), dim=-1)

    def _first(self, length: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return the rows of positions 0 … length − 1: (length, R)."""
        if self.scaling["rope_type"] != "dynamic" or length <= self.original_len:
            return self._cache.first(length, dtype, device)[:length]
        if self._stretched is None or self._stretched.max_len != length:  # such a length has its own tables
            self._stretched = _TableCache(functools.partial(self._rows, length=length), length)
        return self._stretched.first(length, dtype, device)

    def _at(self, positions: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return the rows of given positions (L,) or (B, L): (L, R) or (B, 1, L, R)."""
        # the highest position + 1, where it is cheap: another device would have to finish first, a compiler has none
        length, cheap = 0, positions.device.type == "cpu" and not torch.compiler.is_compiling()
        if (cheap or self.scaling["rope_type"] == "dynamic") and positions.numel():
            lowest, highest = (int(extreme) for extreme in positions.aminmax())
            if lowest < 0:
                raise ValueError(f"positions must not be negative, got {lowest}")
            length = highest + 1

        # their rows
        if device.type == "cpu" and 0 < length <= self.max_len:
            table = self._first(length, dtype, device)[positions.to(device, torch.int64)]
        else:  # far out, or not known: these alone
            source = positions.cpu() if positions.device.type == "mps" else positions  # MPS has no float64
            table = self._rows(source, length).to(dtype).to(device)
        return table if positions.ndim == 1 else table.unsqueeze(1)

    def _rows(self, positions: Tensor, length: int = 0) -> Tensor:
        """cos and sin of positions (...), each where the layout has the pair's members: (..., R) float64."""
        # θ made where the positions are: to move it would wait
        theta, factor = self.frequencies(length, positions.device)
        angle = angles(positions, theta)
        cos_sin = (angle.cos() * factor, angle.sin() * factor)
        if self.layout == "interleaved":
            return torch.stack(cos_sin, dim=-1).flatten(-2)
        return torch.cat(cos_sin, dim=-1)


def layout_permutation(dim: int, to: Layout, rotary_dim: int | None = None) -> Tensor:
    """Where each number of a head comes from when its layout becomes `to` from the other: (dim,) int64.

    `x[..., layout_permutation(dim, "half")]` has in the half layout what x has interleaved; `rotary_dim` as in
    `RotaryPosEncoding`, the numbers behind it stay.
    """
    R = dim if rotary_dim is None else rotary_dim
    _check_whole(1, dim=dim, rotary_dim=R)
    divisible(2, rotary_dim=R)
    within(2, dim, closed=True, term="dim", rotary_dim=R)
    one_of(LAYOUTS, to=to)
    grid = torch.arange(R).view(-1, 2) if to == "half" else torch.arange(R).view(2, -1)
    return torch.cat((grid.t().flatten(), torch.arange(R, dim)))


def convert_layout(weight: Tensor, num_heads: int, to: Layout, rotary_dim: int | None = None) -> Tensor:
    """Permute the weight (num_heads · dim, ...) or bias (num_heads · dim,) of a query or key projection to layout `to`.

    With both projections converted, the scores of a rotary attention in the other layout are those of before.

    Raises:
        ValueError: the rows are no whole number of heads, or an odd or too large `rotary_dim`.
    """
    _check_whole(1, num_heads=num_heads)
    divisible(num_heads, "num_heads", **{"len(weight)": len(weight)})
    dim = len(weight) // num_heads
    order = layout_permutation(dim, to, rotary_dim).to(weight.device)
    output: Tensor = weight.unflatten(0, (num_heads, dim))[:, order].flatten(0, 1)
    return output


def _check_whole(least: int, **numbers: int) -> None:
    for name, number in numbers.items():
        if not hasattr(number, "__index__"):  # what range() and slices take: also numpy's, and a tracer's
            raise ValueError(f"{name} must be an integer, got {number!r}")
    at_least(least, **numbers)


def _check_positions(positions: Tensor, x: Tensor) -> None:
    """Raise ValueError unless they are integers (L,) or (B, L) for x (B, H, L, D)."""
    B, _, L, _ = x.shape
    if tuple(positions.shape) not in ((L,), (B, L)):
        raise ValueError(f"positions must be ({L},) or ({B}, {L}), got {tuple(positions.shape)}")
    if positions.is_floating_point() or positions.is_complex() or positions.dtype == torch.bool:
        raise ValueError(f"positions must be integers, got {positions.dtype}")
