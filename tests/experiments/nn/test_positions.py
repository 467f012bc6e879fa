"""Positions against closed forms in plain float64, and where peers are known to break."""

from __future__ import annotations

import copy
import functools
import math
import pickle
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from experiments.nn import rotation
from experiments.nn.positions import AbsPosEncoding, RotaryPosEncoding, convert_layout, layout_permutation
from experiments.nn.rotation import LAYOUTS, Layout, pairs, rotate
from tests.experiments.nn.helpers import F64, all_near, near, randn, refusals, refused

FAR = [0, 1, 255, 257, 4095, 4096, 5000, 131_072, 1_000_000]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
BOTH_LAYOUTS = pytest.mark.parametrize("layout", LAYOUTS)


def thetas(dim: int, base: float = 10000.0) -> list[float]:
    return [base ** (-2 * i / dim) for i in range((dim + 1) // 2)]


def sinusoids(positions: Iterable[int], d_model: int) -> Tensor:
    """Vaswani et al. 2017, §3.5, in Python's own floats."""
    theta = thetas(d_model)
    rows = [[(math.cos if j % 2 else math.sin)(p * theta[j // 2]) for j in range(d_model)] for p in positions]
    return torch.tensor(rows, dtype=F64)


def turned(x: Tensor, positions: Tensor | None, R: int, layout: Layout, base: float = 10000.0) -> Tensor:
    """x (B, H, L, D) at positions (L,) or (B, L), pair by pair of the first R numbers, in float64."""
    x = x.double()
    positions = torch.arange(x.shape[2]) if positions is None else positions
    y, at = x.clone(), positions.double().expand(len(x), -1).unsqueeze(1)  # (B, 1, L)
    for i, theta in enumerate(thetas(R, base)):
        a, b = (2 * i, 2 * i + 1) if layout == "interleaved" else (i, i + R // 2)
        y[..., a] = x[..., a] * (at * theta).cos() - x[..., b] * (at * theta).sin()
        y[..., b] = x[..., b] * (at * theta).cos() + x[..., a] * (at * theta).sin()
    return y


# added


@pytest.mark.parametrize("d_model", [1, 2, 7, 64])
@pytest.mark.parametrize("offset", [0, 3, 9, 10, 37, 4998, 131_072, 1_000_000])
def test_table_is_the_closed_form(d_model: int, offset: int) -> None:
    encoding, expected = AbsPosEncoding(d_model, max_len=10), sinusoids(range(offset, offset + 5), d_model)
    x = randn(2, 5, d_model)
    near(encoding.table(5, offset), expected, 1e-9)
    near(encoding(x, offset), x + expected, 1e-9)
    assert encoding.table(5, offset).dtype == F64
    in_float32 = encoding.table(5, offset, dtype=torch.float32)
    assert in_float32.dtype == torch.float32
    near(in_float32, expected, 1e-7)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_adds_out_of_place_in_the_dtype_given_and_rounds_the_sum_once(dtype: torch.dtype) -> None:
    x = torch.randn(2, 300, 8).to(dtype)
    before, output = x.clone(), AbsPosEncoding(8)(x)
    assert torch.equal(x, before) and output.dtype == dtype
    near(output, x.double() + sinusoids(range(300), 8), 1e-7, rtol=torch.finfo(dtype).eps / 2)


def test_dropout_acts_in_training_alone() -> None:
    encoding, x = AbsPosEncoding(8, dropout=0.5), torch.randn(4, 50, 8)
    exact, dropped = x + encoding.table(50, dtype=torch.float32), encoding(x)
    kept = dropped != 0
    assert 0.4 < float(kept.float().mean()) < 0.6
    assert torch.equal(dropped, exact * 2 * kept) and torch.equal(encoding.eval()(x), exact)


# turned


@BOTH_LAYOUTS
@pytest.mark.parametrize("R", [None, 2, 6, 10])
@pytest.mark.parametrize("base", [10000.0, 500.0])
def test_rotation_is_the_closed_form(layout: Layout, R: int | None, base: float) -> None:
    x, rotary = randn(2, 3, 7, 10), RotaryPosEncoding(10, base, layout, rotary_dim=R)
    expected = turned(x, None, R or 10, layout, base)
    near(rotary(x), expected, 1e-13)
    cos, sin = rotary.tables(300)
    angle = torch.arange(300, dtype=F64)[:, None] * torch.tensor(thetas(R or 10, base), dtype=F64)
    all_near((cos, sin), (angle.cos(), angle.sin()), 1e-13)
    near(rotate(x[..., :R], cos[:7], sin[:7], layout), expected[..., :R], 1e-13)


@BOTH_LAYOUTS
def test_rotation_at_given_positions_near_and_far(layout: Layout) -> None:
    rotary, x = RotaryPosEncoding(8, layout=layout, max_len=16), randn(2, 3, len(FAR), 8)
    line, within = torch.tensor(FAR), torch.randint(16, (2, len(FAR)))
    packed = torch.stack((line, line.flip(0) // 3))
    for positions in (line, packed.int(), within, within[:1], within[0].int(), torch.arange(len(FAR))):
        near(rotary(x, positions), turned(x, positions, 8, layout), 1e-12 if positions.max() < 16 else 1e-8)


@BOTH_LAYOUTS
def test_sequences_of_every_length_from_none_to_past_max_len_and_back(layout: Layout) -> None:
    added, rotary = AbsPosEncoding(4, max_len=3), RotaryPosEncoding(4, layout=layout, max_len=3)
    for length in (1, 3, 4, 17, 2, 0):
        x = randn(2, 1, length, 4)
        near(rotary(x), turned(x, None, 4, layout), 1e-13)
        near(added(x[:, 0]), x[:, 0] + sinusoids(range(length), 4).view(length, 4), 1e-12)
    assert added.table(0).shape == (0, 4)
    assert rotary(torch.randn(0, 1, 3, 4), torch.zeros(0, 3, dtype=torch.int64)).shape == (0, 1, 3, 4)


@BOTH_LAYOUTS
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_reduced_precision_rounds_the_result_alone(layout: Layout, dtype: torch.dtype) -> None:
    """Both ways within half a unit in the last place of the exact rotation, and float32's own error."""
    positions = torch.tensor([*range(250, 266), 131_072, 1_000_000])
    x, gradient = torch.randn(2, 1, 2, len(positions), 64).to(dtype)
    output = RotaryPosEncoding(64, layout=layout)(x.requires_grad_(), positions)
    output.backward(gradient)
    assert x.grad is not None and output.dtype == x.grad.dtype == dtype
    rounding = torch.finfo(dtype).eps / 2 if dtype != torch.float32 else 0
    near(output, turned(x, positions, 64, layout), 1e-6, rtol=rounding)
    near(x.grad, turned(gradient, -positions, 64, layout), 1e-6, rtol=rounding)


@BOTH_LAYOUTS
@pytest.mark.parametrize("R", [6, 8])
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_input_of_any_layout_in_memory_is_left_as_it_is(layout: Layout, R: int, dtype: torch.dtype) -> None:
    rotary, (B, H, L, D) = RotaryPosEncoding(8, layout=layout, rotary_dim=R), (2, 3, 5, 8)
    for given in (
        torch.randn(B, H, L, D),
        torch.randn(B, L, H, D).transpose(1, 2),  # heads last
        torch.randn(B * H * L * D + 1)[1:].view(B, H, L, D),  # at an odd place of the storage
        torch.randn(B, H, L, D + 1)[..., 1:],  # odd strides
        torch.randn(B, H, L, 2 * D)[..., ::2],
        torch.randn(B, H, D, L).transpose(2, 3),
        torch.randn(1, H, L, D).expand(B, H, L, D),
    ):
        x = given.to(dtype)
        before = x.clone()
        near(rotary(x), turned(x, None, R, layout), {F64: 1e-13, torch.float32: 1e-6}.get(dtype, 2e-2))
        assert torch.equal(x, before)


@BOTH_LAYOUTS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("block", [1, 24, 40, 100])
def test_blocks_of_any_size_give_the_same(
    monkeypatch: pytest.MonkeyPatch, layout: Layout, dtype: torch.dtype, block: int
) -> None:
    x, rotary = torch.randn(3, 4, 5, 8).to(dtype), RotaryPosEncoding(8, layout=layout, rotary_dim=6)
    packed = torch.randint(99, (3, 5))
    cases = (None, torch.randint(99, (5,)), packed, packed[:1])
    expected = [rotary(x, positions) for positions in cases]
    monkeypatch.setattr(rotation, "BLOCK", block)
    all_near((rotary(x, p) for p in cases), expected, 1e-6, rtol=torch.finfo(dtype).eps)  # as kernels round


@BOTH_LAYOUTS
@pytest.mark.parametrize("R", [4, 6])
def test_gradients_of_first_and_second_order(layout: Layout, R: int) -> None:
    rotary, x = RotaryPosEncoding(6, layout=layout, rotary_dim=R), randn(2, 1, 2, 6, grad=True)
    for positions in (None, torch.tensor([7, 90]), torch.tensor([[7, 90], [5000, 2]])):
        assert torch.autograd.gradcheck(rotary, (x, positions), fast_mode=True)
    assert torch.autograd.gradgradcheck(rotary, (x, positions), fast_mode=True)
    assert torch.autograd.gradcheck(AbsPosEncoding(6), (x[:, 0], 4))


@BOTH_LAYOUTS
@pytest.mark.parametrize("shape", [None, (3,), (2, 3)], ids=str)
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # torch's own affair
def test_transforms_of_functions(layout: Layout, shape: tuple[int, ...] | None) -> None:
    """Per sample, forwards and backwards, beside the same transform of the closed form."""
    rotary, x = RotaryPosEncoding(6, layout=layout, rotary_dim=4), randn(2, 2, 2, 3, 6)
    positions = None if shape is None else torch.randint(9, shape)
    transforms: list[Callable[[Callable[[Tensor], Tensor]], Tensor]] = [
        lambda f: torch.func.jacrev(f)(x[0]),
        lambda f: torch.func.jacfwd(f)(x[0]),
        lambda f: torch.func.vmap(f)(x),
        lambda f: torch.func.vmap(f, in_dims=1)(x),
        lambda f: torch.func.vmap(torch.func.grad(lambda x: f(x).pow(3).sum()))(x),
        lambda f: torch.func.jvp(f, (x[0],), (x[1],))[1],
    ]
    for transform in transforms:
        expected = transform(lambda x: turned(x, positions, 4, layout))
        near(transform(lambda x: rotary(x, positions)), expected, 1e-13)


# between the layouts


@pytest.mark.parametrize("R", [None, 2, 6])
def test_layouts_agree_after_a_permutation(R: int | None) -> None:
    x = randn(2, 3, 9, 8)
    to_half, back = (layout_permutation(8, layout, R) for layout in ("half", "interleaved"))
    interleaved, half = (RotaryPosEncoding(8, layout=layout, rotary_dim=R) for layout in LAYOUTS)
    assert torch.equal(to_half[back], torch.arange(8))
    near(half(x[..., to_half]), interleaved(x)[..., to_half], 1e-15)
    assert R == 2 or float((half(x) - interleaved(x)).abs().max()) > 0.1  # with one pair there is one layout


def test_pairs_and_permutations_as_written_out() -> None:
    assert layout_permutation(6, "half").tolist() == [0, 2, 4, 1, 3, 5]
    assert layout_permutation(6, "interleaved").tolist() == [0, 3, 1, 4, 2, 5]
    assert layout_permutation(6, "half", 4).tolist() == [0, 2, 1, 3, 4, 5]
    assert [x.tolist() for x in pairs(torch.arange(6), "half")] == [[0, 1, 2], [3, 4, 5]]
    assert [x.tolist() for x in pairs(torch.arange(6), "interleaved")] == [[0, 2, 4], [1, 3, 5]]


@pytest.mark.parametrize("R", [None, 4])
@pytest.mark.parametrize("num_kv_heads", [4, 2])
def test_converted_projections_give_the_same_scores(R: int | None, num_kv_heads: int) -> None:
    x, counts = randn(2, 7, 12), (4, num_kv_heads)
    layers = [nn.Linear(12, heads * 8).double() for heads in counts]

    def scores(layout: Layout) -> Tensor:
        rotary = RotaryPosEncoding(8, layout=layout, rotary_dim=R)
        q, k = (rotary(layer(x).unflatten(-1, (-1, 8)).transpose(1, 2)) for layer in layers)
        return q @ k.repeat_interleave(4 // num_kv_heads, dim=1).mT

    expected, unconverted = scores("interleaved"), scores("half")
    for layer, heads in zip(layers, counts, strict=True):
        for weight in layer.parameters():
            before = weight.data
            weight.data = convert_layout(before, heads, "half", R)
            assert torch.equal(convert_layout(weight.data, heads, "interleaved", R), before)
    near(scores("half"), expected, 1e-12)
    assert float((unconverted - expected).detach().abs().max()) > 0.01


# free of the defects known from elsewhere


class Added(AbsPosEncoding):
    """Takes (B, H, L, D) and positions, which it ignores, as if it were rotary."""

    def forward(self, x: Tensor, positions: Tensor | None = None) -> Tensor:  # type: ignore[override]
        return super().forward(x.flatten(0, 1)).view_as(x)


ALL: dict[str, Callable[[int], nn.Module]] = {
    "added": Added,
    "interleaved": RotaryPosEncoding,
    "half": functools.partial(RotaryPosEncoding, layout="half"),
    "dynamic": functools.partial(RotaryPosEncoding, scaling={"type": "dynamic", "factor": 2.0}),
}
EACH = pytest.mark.parametrize("make", ALL.values(), ids=ALL.keys())


@EACH
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_casting_the_module_casts_no_table(make: Callable[[int], nn.Module], dtype: torch.dtype) -> None:
    for x in (torch.randn(1, 2, 600, 8), randn(1, 2, 600, 8)):
        expected, used = make(8)(x), make(8)
        used(x.to(dtype))
        assert all(torch.equal(encoding.to(dtype)(x), expected) for encoding in (used, make(8)))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(make(8)(x), expected) and make(8)(x.to(dtype)).dtype == dtype


@EACH
@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)
def test_a_table_handed_out_is_a_copy(make: Callable[[int], Any], dtype: torch.dtype) -> None:
    encoding, x = make(8), torch.randn(1, 2, 5, 8, dtype=dtype)
    for part in encoding.table(5, dtype=dtype) if make is Added else encoding.tables(5, dtype=dtype):
        part.zero_()  # a row, or cos or sin
    assert torch.equal(encoding(x), make(8)(x))


@EACH
def test_what_is_kept_while_evaluating_serves_a_backward_pass(make: Callable[[int], nn.Module]) -> None:
    encoding, x, cases = make(8), torch.randn(2, 1, 5, 8, requires_grad=True), (None, torch.arange(5))
    with torch.inference_mode():
        assert torch.equal(*(encoding(x, positions) for positions in cases))
    for positions in cases:
        encoding(x, positions).sum().backward()
    assert x.grad is not None and bool(x.grad.isfinite().all())


@EACH
def test_nothing_is_learnt_or_saved_and_copies_work(make: Callable[[int], nn.Module]) -> None:
    encoding, x = make(8), torch.randn(1, 2, 600, 8)
    expected, packed = encoding(x), pickle.dumps(encoding)
    assert not [*encoding.parameters(), *encoding.buffers(), *encoding.state_dict()]
    assert len(packed) < 5000  # tables are made again, not carried
    assert all(torch.equal(other(x), expected) for other in (pickle.loads(packed), copy.deepcopy(encoding)))


@BOTH_LAYOUTS
def test_the_table_alone_is_kept_for_the_backward_pass(layout: Layout) -> None:
    x, saved = torch.randn(1, 64, 5, 8, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()) or x, lambda x: x):
        RotaryPosEncoding(8, layout=layout)(x)
    assert sum(saved) == 5 * 8


@pytest.mark.slow
@BOTH_LAYOUTS
@pytest.mark.parametrize("R", [6, 8])
def test_compiled_whole_it_gives_the_same(layout: Layout, R: int) -> None:
    """Traced whole, without a break; what then generates code is the compiler's own concern."""
    added, rotary = Added(8, max_len=16), RotaryPosEncoding(8, layout=layout, rotary_dim=R, max_len=16)

    def model(x: Tensor, positions: Tensor | None) -> Tensor:
        return rotary(added(x), positions)

    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for length, shape in ((5, None), (40, (40,)), (40, (2, 40))):
        x = torch.randn(2, 3, length, 8, requires_grad=True)
        positions = None if shape is None else torch.randint(5000, shape)
        outputs = compiled(x, positions), model(x, positions)
        all_near(*([y, *torch.autograd.grad(y.square().sum(), x)] for y in outputs), 1e-5)


def test_a_tracers_stand_in_is_not_kept() -> None:
    rotary, x = RotaryPosEncoding(8), torch.ones(1, 1, 4, 8)
    with torch._subclasses.FakeTensorMode():
        rotary(torch.empty(1, 1, 4, 8))
    assert torch.equal(rotary(x), RotaryPosEncoding(8)(x))


# what is refused: refusals.txt speaks of these

X, Y = torch.zeros(2, 3, 4), torch.zeros(2, 1, 3, 4)
ADDED, ROTARY = AbsPosEncoding(4), RotaryPosEncoding(4)


@refusals("positions")
def test_what_is_wrong_is_named(call: str, message: str) -> None:
    with refused(message):
        eval(call)
