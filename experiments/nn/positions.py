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
import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

Layout = Literal["interleaved", "half"]
LAYOUTS: tuple[Layout, ...] = get_args(Layout)
Scaling = Mapping[str, Any]


# frequencies


def inverse_frequencies(dim: int, base: float = 10000.0, device: torch.device | str = "cpu") -> Tensor:
    """θ_i of equation (1), in radians per position: (⌈dim/2⌉,) float64."""
    return base ** -(torch.arange(0, dim, 2, dtype=torch.float64, device=device) / dim)


def angles(positions: Tensor, frequencies: Tensor) -> Tensor:
    """p θ_i: positions (...) and frequencies (n,) on one device → (..., n) float64."""
    return positions.double().unsqueeze(-1) * frequencies


REQUIRED = {
    "default": set(),
    "linear": {"factor"},
    "dynamic": {"factor"},
    "yarn": {"factor", "original_max_position_embeddings"},
    "llama3": {"factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"},
}
OPTIONAL = {
    "dynamic": {"original_max_position_embeddings"},
    "yarn": {"attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"},
}


def checked_scaling(scaling: Scaling, base: float, dim: int) -> dict[str, Any]:
    """The keys of `scaling` with `rope_type` first; a ValueError names the key that is wrong and what may be."""
    given = {key: value for key, value in scaling.items() if key != "type" and value is not None}
    kind = given.setdefault("rope_type", scaling.get("type"))
    if kind not in REQUIRED:
        raise ValueError(f"scaling's rope_type must be one of {', '.join(REQUIRED)}, not {kind!r}")
    required, optional = REQUIRED[kind], OPTIONAL.get(kind, set())
    keys = set(given) - {"rope_type", "rope_theta"}
    if missing := required - keys:
        raise ValueError(f"scaling of type {kind} lacks {', '.join(sorted(missing))}")
    if unknown := keys - required - optional:
        allowed = ", ".join(["rope_type", *sorted(required), *sorted(optional)])
        raise ValueError(f"scaling of type {kind} knows no {', '.join(sorted(unknown))}; it takes {allowed}")
    if given.setdefault("rope_theta", base) != base:
        raise ValueError(f"scaling's rope_theta is {given['rope_theta']}, but base is {base}")
    for key in keys - {"truncate"}:
        least = 1.0 if key in ("factor", "original_max_position_embeddings") else 0.0
        value = given[key]
        if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value < math.inf:
            raise ValueError(f"scaling's {key} must be a number of at least {least:g}, not {value!r}")
    if not isinstance(given.get("truncate", True), bool):
        raise ValueError(f"scaling's truncate must be true or false, not {given['truncate']!r}")
    if kind == "llama3" and given["high_freq_factor"] <= given["low_freq_factor"]:
        low, high = given["low_freq_factor"], given["high_freq_factor"]
        raise ValueError(f"scaling's high_freq_factor ({high}) must be above low_freq_factor ({low})")
    if kind == "dynamic" and dim == 2:
        raise ValueError(
            "scaling of type dynamic needs a rotary_dim above 2: its exponent is dim / (dim − 2)"
        )
    return given


def dynamic_base(dim: int, base: float, factor: float, original: float, length: int) -> float:
    """ "Dynamic NTK" (bloc97, emozilla 2023): base · (s·L/L₀ − (s − 1))^(D/(D−2)) once L exceeds L₀."""
    stretch = factor * max(length, original) / original - (factor - 1)
    return base * stretch ** (dim / (dim - 2))


def llama3_frequencies(
    theta: Tensor, factor: float, original: float, low_freq_factor: float, high_freq_factor: float
) -> Tensor:
    """Llama 3.1 (Dubey et al. 2024): waves longer than the context are stretched, short ones kept, a ramp between."""
    turns = original * theta / (2 * math.pi)  # within the context that the model was trained on
    keep = ((turns - low_freq_factor) / (high_freq_factor - low_freq_factor)).clamp(0, 1)
    return keep * theta + (1 - keep) * theta / factor


def yarn_frequencies(
    theta: Tensor,
    base: float,
    factor: float,
    original: float,
    beta_fast: float,
    beta_slow: float,
    truncate: bool,
) -> Tensor:
    """YaRN's "NTK by parts" (Peng et al. 2023, §3.2), its ramp over i as in the authors' code."""
    dim = 2 * len(theta)

    def pair_that_turns(times: float) -> float:  # within the context that the model was trained on
        return dim * math.log(original / (times * 2 * math.pi)) / (2 * math.log(base))

    low, high = pair_that_turns(beta_fast), pair_that_turns(beta_slow)
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    i = torch.arange(len(theta), dtype=torch.float64, device=theta.device)
    keep = 1 - ((i - low) / (high - low if high != low else 0.001)).clamp(0, 1)
    return keep * theta + (1 - keep) * theta / factor


def yarn_attention_factor(
    factor: float, mscale: float | None = None, mscale_all_dim: float | None = None
) -> float:
    """√(1/t) = 0.1 ln s + 1 (Peng et al. 2023, eq. 22); the two weights of the logarithm are DeepSeek's."""

    def temperature(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1

    if mscale and mscale_all_dim:
        return temperature(mscale) / temperature(mscale_all_dim)
    return temperature(1.0)


def scaled_frequencies(
    dim: int, base: float, scaling: Scaling, length: int, max_len: int, device: torch.device | str
) -> tuple[Tensor, float]:
    """θ_i (dim/2,) float64 under checked `scaling`, and the factor on cos and sin (1 but for YaRN).

    `length` is the present one (the highest position + 1): `dynamic` alone depends on it.
    """
    kind, factor = scaling["rope_type"], scaling.get("factor", 1.0)
    original = scaling.get("original_max_position_embeddings", max_len)
    if kind == "dynamic":
        return inverse_frequencies(dim, dynamic_base(dim, base, factor, original, length), device), 1.0
    theta = inverse_frequencies(dim, base, device)
    if kind == "llama3":
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        return llama3_frequencies(theta, factor, original, low, high), 1.0
    if kind == "yarn":
        fast, slow = scaling.get("beta_fast") or 32, scaling.get("beta_slow") or 1
        inferred = yarn_attention_factor(factor, scaling.get("mscale"), scaling.get("mscale_all_dim"))
        theta = yarn_frequencies(theta, base, factor, original, fast, slow, scaling.get("truncate", True))
        return theta, scaling.get("attention_factor", inferred)
    return theta / factor, 1.0


# tables


class TableCache:
    """The rows of positions 0, 1, … of a table, cast once for each (dtype, device) and kept.

    `rows` gives them in float64 for positions (n,). A module keeps this as a plain attribute: no cast of the
    module rounds it, no checkpoint holds it, no first caller decides its dtype. Copies and pickles start empty.
    """

    def __init__(self, rows: Callable[[Tensor], Tensor], max_len: int):
        self.rows, self.max_len = rows, max_len
        self.kept: dict[tuple[torch.dtype, torch.device], Tensor] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "kept": {}}

    @torch.inference_mode(False)  # what is made while evaluating is saved for a backward pass later
    @torch.no_grad()
    def first(self, length: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """The rows of at least the first `length` positions: (≥ length, ...)."""
        table = self.kept.get((dtype, device))
        if table is None or len(table) < length:
            size = self.max_len if length <= self.max_len else 1 << (length - 1).bit_length()
            table = self.rows(torch.arange(size, device="cpu")).to(dtype).to(device)
            if type(table) is Tensor:  # not the stand-in of a tracer
                self.kept[dtype, device] = table
        return table


def computed_in(dtype: torch.dtype) -> torch.dtype:
    """The dtype of tables and of arithmetic for an input's: float32 also for bfloat16 and float16."""
    return torch.float64 if dtype == torch.float64 else torch.float32


# added


class AbsPosEncoding(nn.Module):
    """Adds the sinusoids of equation (2), then drops out. Nothing is learnt, and `state_dict()` is empty.

    `max_len` is the length that tables are prepared for; longer ones are right too. An odd `d_model` has one
    sine more than cosines.

    Raises:
        ValueError: a size below 1, or a dropout outside [0, 1).
    """

    def __init__(self, d_model: int, max_len: int = 5000, dropout: float = 0.0):
        super().__init__()
        check_sizes(d_model=d_model, max_len=max_len)
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must lie in [0, 1), not {dropout}")
        self.d_model = d_model
        self.dropout = nn.Dropout(dropout)
        self._cache = TableCache(self._rows, max_len)

    def extra_repr(self) -> str:
        return f"{self.d_model}, max_len={self._cache.max_len}"

    def forward(self, x: Tensor, offset: int = 0) -> Tensor:
        """x (B, L, d_model), whose first token stands at position `offset` → x + PE, of x's dtype, not in place.

        Raises:
            ValueError: x has another shape or is not floating, or the offset is negative.
        """
        if x.ndim != 3 or x.shape[-1] != self.d_model:
            raise ValueError(f"x must be (batch, length, {self.d_model}), not {tuple(x.shape)}")
        check_floating(x)
        check_not_negative(offset=offset)
        table = self._slice(x.shape[1], offset, computed_in(x.dtype), x.device)
        return self.dropout((x + table).to(x.dtype))  # the sum is rounded, not its parts

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
        check_not_negative(length=length, offset=offset)
        return self._slice(length, offset, dtype, torch.device(device)).clone()

    def _slice(self, length: int, offset: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        end = offset + length
        if offset <= self._cache.max_len:
            return self._cache.first(end, dtype, device)[offset:end]
        return (
            self._rows(torch.arange(offset, end, device="cpu")).to(dtype).to(device)
        )  # far out: these alone

    def _rows(self, positions: Tensor) -> Tensor:
        """Equation (2) for positions (n,): (n, d_model) float64."""
        angle = angles(positions, inverse_frequencies(self.d_model))  # (n, ⌈d_model/2⌉)
        return torch.stack((angle.sin(), angle.cos()), dim=-1).flatten(1)[:, : self.d_model]


# turned


def rotate(x: Tensor, cos: Tensor, sin: Tensor, layout: Layout) -> Tensor:
    """Equation (3) as it reads, the reference: x (..., R), cos and sin (..., R/2) → (..., R)."""
    a, b = pairs(x, layout)
    turned = (a * cos - b * sin, b * cos + a * sin)
    return torch.stack(turned, dim=-1).flatten(-2) if layout == "interleaved" else torch.cat(turned, dim=-1)


def pairs(x: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    """The first and the second members of all pairs: x (..., R) → two views (..., R/2)."""
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
        if layout == "interleaved" and not is_complex_viewable(x):
            x = x.clone(memory_format=torch.contiguous_format)
        (B, H, L, D), R = x.shape, table.shape[-1]
        out = torch.empty_like(x)
        if D > R:
            out[..., R:] = x[..., R:]
        turn = turn_interleaved if layout == "interleaved" else turn_half
        rounds = x.dtype != table.dtype
        one_pass = layout == "interleaved" and not rounds
        size = x.numel() if one_pass or x.is_cuda else max(BLOCK, D)
        spare = table.new_empty(2, min(size, B * H * L * R) if rounds else 0)
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
        """A linear function is its own derivative."""
        (table,) = ctx.saved_tensors
        return Rotation.apply(tangent, table, ctx.layout, ctx.backwards)

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
    """What `turn_interleaved` or `turn_half` multiplies by; `backwards` turns by the negative angle."""
    if layout == "interleaved":
        cis = as_complex(table)
        return (cis.conj().resolve_conj() if backwards else cis,)
    cos, sin = pairs(table, layout)
    return torch.cat((cos, cos), dim=-1), -sin if backwards else sin


def turn_interleaved(x: Tensor, factors: tuple[Tensor, ...], out: Tensor) -> None:
    """(x_a + j x_b)(cos + j sin) into `out`: one pass."""
    (cis,) = factors
    torch.mul(as_complex(x), cis, out=as_complex(out))


def turn_half(x: Tensor, factors: tuple[Tensor, ...], out: Tensor) -> None:
    """x cos, then −x_b sin and x_a sin added to its halves, into `out`: three passes.

    The first takes rows (..., R) as they lie in memory, which is faster than two halves.
    """
    cos, sin = factors
    (x_a, x_b), (out_a, out_b) = pairs(x, "half"), pairs(out, "half")
    torch.mul(x, cos, out=out)
    out_a.addcmul_(x_b, sin, value=-1)
    out_b.addcmul_(x_a, sin)


def as_complex(x: Tensor) -> Tensor:
    """(..., R) → (..., R/2), a view: neighbours are the real and the imaginary part."""
    return torch.view_as_complex(x.unflatten(-1, (-1, 2)))


def is_complex_viewable(x: Tensor) -> bool:
    """Whether neighbours lie side by side and each pair starts at an even place of the storage."""
    *others, last = x.stride()
    return last == 1 and not any(place % 2 for place in (x.storage_offset(), *others))


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
        check_sizes(dim=dim, rotary_dim=rotary_dim, max_len=max_len)
        for name, size in (("dim", dim), ("rotary_dim", rotary_dim)):
            if size % 2:
                raise ValueError(f"{name} must be even, since its numbers are turned in pairs, not {size}")
        if rotary_dim > dim:
            raise ValueError(f"rotary_dim must be at most dim ({dim}), not {rotary_dim}")
        if not 1 < base < math.inf:
            raise ValueError(f"base must be a number above 1, not {base}")
        check_layout(layout=layout)
        self.dim, self.base, self.rotary_dim, self.max_len = dim, float(base), rotary_dim, max_len
        self.layout: Layout = layout
        self.scaling = checked_scaling(scaling or {"rope_type": "default"}, self.base, rotary_dim)
        self._cache = TableCache(self._rows, max_len)
        self._stretched: TableCache | None = None

    def extra_repr(self) -> str:
        scaling = self.scaling["rope_type"]
        return (
            f"{self.dim}, base={self.base:g}, {self.layout}, rotary_dim={self.rotary_dim}, scaling={scaling}"
        )

    def frequencies(self, length: int = 0, device: torch.device | str = "cpu") -> tuple[Tensor, float]:
        """θ_i (R/2,) float64 for a call of that length, and the factor on cos and sin (1 but for YaRN)."""
        return scaled_frequencies(self.rotary_dim, self.base, self.scaling, length, self.max_len, device)

    def tables(
        self, length: int, dtype: torch.dtype = torch.float64, device: torch.device | str = "cpu"
    ) -> tuple[Tensor, Tensor]:
        """cos and sin of positions 0 … length − 1, each (length, R/2), copies.

        Raises:
            ValueError: a negative length.
        """
        check_not_negative(length=length)
        cos, sin = pairs(self._first(length, dtype, torch.device(device)), self.layout)
        return cos.clone(), sin.clone()

    def forward(self, x: Tensor, positions: Tensor | None = None) -> Tensor:
        """Queries or keys x (B, H, L, dim) → the same, turned, of x's dtype, not in place.

        `positions`, integers (L,) or (B, L), are 0 … L − 1 unless given. Their values are looked at on the CPU
        alone: to read them from another device would make the program wait for it in every layer. There a
        negative position turns backwards, as equation (3) says.

        Raises:
            ValueError: x or the positions have another shape or dtype, or a position is negative.
        """
        if x.ndim != 4 or x.shape[-1] != self.dim:
            raise ValueError(f"x must be (batch, heads, length, {self.dim}), not {tuple(x.shape)}")
        check_floating(x)
        dtype = computed_in(x.dtype)
        if positions is None:
            table = self._first(x.shape[2], dtype, x.device)
        else:
            check_positions(positions, x)
            positions = positions[0] if positions.shape[0] == 1 < positions.ndim else positions
            table = self._at(positions, dtype, x.device)
        if torch.compiler.is_compiling() or x.device.type not in ("cpu", "cuda"):
            return self._reference(x, table)  # which a compiler fuses, and which every device knows
        return Rotation.apply(x, table, self.layout, False)

    def _reference(self, x: Tensor, table: Tensor) -> Tensor:
        """Equation (3) by `rotate`, the rest of the head behind it."""
        R = self.rotary_dim
        turned = rotate(x[..., :R].to(table.dtype), *pairs(table, self.layout), self.layout).to(x.dtype)
        return turned if self.dim == R else torch.cat((turned, x[..., R:]), dim=-1)

    def _cache_for(self, length: int) -> TableCache:
        """The tables of a call of this length; under `dynamic` a length past the original has its own."""
        original = self.scaling.get("original_max_position_embeddings", self.max_len)
        if self.scaling["rope_type"] != "dynamic" or length <= original:
            return self._cache
        if self._stretched is None or self._stretched.max_len != length:
            self._stretched = TableCache(functools.partial(self._rows, length=length), length)
        return self._stretched

    def _first(self, length: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """The rows of positions 0 … length − 1: (length, R)."""
        return self._cache_for(length).first(length, dtype, device)[:length]

    def _at(self, positions: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
        """The rows of given positions (L,) or (B, L): (L, R) or (B, 1, L, R)."""
        length = 0
        if reads_for_free(positions) or self.scaling["rope_type"] == "dynamic":
            length = checked_length(positions)
        if device.type == "cpu" and 0 < length <= self.max_len:
            table = self._first(length, dtype, device)[positions.to(device, torch.int64)]
        else:  # far out, or not known: these alone
            there = positions.cpu() if positions.device.type == "mps" else positions  # MPS has no float64
            table = self._rows(there, length).to(dtype).to(device)
        return table if positions.ndim == 1 else table.unsqueeze(1)

    def _rows(self, positions: Tensor, length: int = 0) -> Tensor:
        """cos and sin of positions (...), each where the layout has the pair's members: (..., R) float64."""
        theta, factor = self.frequencies(length, positions.device)  # made there: to move it would wait
        angle = angles(positions, theta)
        cos_sin = (angle.cos() * factor, angle.sin() * factor)
        if self.layout == "interleaved":
            return torch.stack(cos_sin, dim=-1).flatten(-2)
        return torch.cat(cos_sin, dim=-1)


# between the layouts


def layout_permutation(dim: int, to: Layout, rotary_dim: int | None = None) -> Tensor:
    """Where each number of a head comes from when its layout becomes `to` from the other: (dim,) int64.

    `x[..., layout_permutation(dim, "half")]` has in the half layout what x has interleaved; `rotary_dim` as in
    `RotaryPosEncoding`, the numbers behind it stay.
    """
    R = dim if rotary_dim is None else rotary_dim
    check_sizes(dim=dim, rotary_dim=R)
    if R % 2 or dim < R:
        raise ValueError(f"rotary_dim must be even and at most dim ({dim}), not {R}")
    check_layout(to=to)
    grid = torch.arange(R).view(-1, 2) if to == "half" else torch.arange(R).view(2, -1)
    return torch.cat((grid.t().flatten(), torch.arange(R, dim)))


def convert_layout(weight: Tensor, num_heads: int, to: Layout, rotary_dim: int | None = None) -> Tensor:
    """The weight (num_heads · dim, ...) or bias (num_heads · dim,) of a query or key projection, for layout `to`.

    With both projections converted, the scores of a rotary attention in the other layout are those of before.

    Raises:
        ValueError: the rows are no whole number of heads, or an odd or too large `rotary_dim`.
    """
    check_sizes(num_heads=num_heads)
    if weight.ndim < 1 or weight.shape[0] % num_heads or not weight.shape[0]:
        raise ValueError(
            f"weight must be (num_heads · dim, ...) with {num_heads} heads, not {tuple(weight.shape)}"
        )
    dim = weight.shape[0] // num_heads
    order = layout_permutation(dim, to, rotary_dim).to(weight.device)
    return weight.unflatten(0, (num_heads, dim))[:, order].flatten(0, 1)


# what users get wrong


def check_sizes(**sizes: int) -> None:
    for name, size in sizes.items():
        check_whole(name, size)
        if size < 1:
            raise ValueError(f"{name} must be at least 1, not {size}")


def check_not_negative(**numbers: int) -> None:
    for name, number in numbers.items():
        check_whole(name, number)
        if number < 0:
            raise ValueError(f"{name} must not be negative, and is {number}")


def check_whole(name: str, number: int) -> None:
    if not hasattr(number, "__index__"):  # what range() and slices take: also numpy's, and a tracer's
        raise ValueError(f"{name} must be an integer, not {number!r}")


def check_layout(**given: str) -> None:
    for name, layout in given.items():
        if layout not in LAYOUTS:
            raise ValueError(f"{name} must be {' or '.join(LAYOUTS)}, not {layout!r}")


def check_floating(x: Tensor) -> None:
    if not x.is_floating_point():
        raise ValueError(f"x must be of a floating dtype, not {x.dtype}")


def check_positions(positions: Tensor, x: Tensor) -> None:
    """Integers (L,) or (B, L) for x (B, H, L, D); (1, L) stands for the same in all of a batch."""
    B, _, L, _ = x.shape
    if tuple(positions.shape) not in ((L,), (B, L), (1, L)):
        allowed = f"({L},) or ({B}, {L}) for x of shape {tuple(x.shape)}"
        raise ValueError(f"positions must be {allowed}, not {tuple(positions.shape)}")
    if positions.is_floating_point() or positions.is_complex() or positions.dtype == torch.bool:
        raise ValueError(f"positions must be integers, not {positions.dtype}")


def reads_for_free(positions: Tensor) -> bool:
    """Whether the values are at hand: another device would have to finish first, a compiler has none yet."""
    return positions.device.type == "cpu" and not torch.compiler.is_compiling()


def checked_length(positions: Tensor) -> int:
    """The highest position + 1, none of them negative."""
    if not positions.numel():
        return 0
    lowest, highest = (int(found) for found in positions.aminmax())
    if lowest < 0:
        raise ValueError(f"positions must not be negative, and the lowest is {lowest}")
    return highest + 1
