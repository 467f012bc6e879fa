"""Positions against closed forms in plain float64, by algebra, and where peers are known to break."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from experiments.nn import rotation
from experiments.nn.positions import (
    AbsPosEncoding,
    RotaryPosEncoding,
    convert_layout,
    inverse_frequencies,
    layout_permutation,
)
from experiments.nn.rotation import LAYOUTS, Layout, pairs, rotate

F64 = torch.float64
FAR = [0, 1, 255, 257, 4095, 4096, 5000, 131_072, 1_000_000]


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def sinusoid(position: int, dimension: int, d_model: int, base: float = 10000.0) -> float:
    """Vaswani et al. 2017, §3.5, in Python's own floats."""
    angle = position / base ** (2 * (dimension // 2) / d_model)
    return math.cos(angle) if dimension % 2 else math.sin(angle)


def sinusoids(where: list[int], d_model: int) -> Tensor:
    return torch.tensor([[sinusoid(p, j, d_model) for j in range(d_model)] for p in where], dtype=F64)


def turned(x: list[float], position: int, R: int, layout: Layout, base: float = 10000.0) -> list[float]:
    """One head's numbers at one position, turned pair by pair in Python's own floats."""
    y = list(x)
    for i in range(R // 2):
        a, b = (2 * i, 2 * i + 1) if layout == "interleaved" else (i, i + R // 2)
        angle = position * base ** (-2 * i / R)
        y[a] = x[a] * math.cos(angle) - x[b] * math.sin(angle)
        y[b] = x[b] * math.cos(angle) + x[a] * math.sin(angle)
    return y


def turned_everywhere(x: Tensor, where: Tensor, R: int, layout: Layout) -> Tensor:
    """x (B, H, L, D) at positions (B, L) by `turned`."""
    rows = [
        [
            [turned(x[b, h, t].tolist(), int(where[b, t]), R, layout) for t in range(x.shape[2])]
            for h in range(x.shape[1])
        ]
        for b in range(len(x))
    ]
    return torch.tensor(rows, dtype=F64)


def error(found: Tensor, wanted: Tensor) -> float:
    assert found.shape == wanted.shape
    return float((found.detach().double() - wanted.detach().double()).abs().max())


# frequencies


@pytest.mark.parametrize("dim", [1, 2, 7, 64])
@pytest.mark.parametrize("base", [10000.0, 500000.0])
def test_inverse_frequencies(dim: int, base: float) -> None:
    theta = inverse_frequencies(dim, base)
    assert theta.dtype == F64 and theta.device.type == "cpu"
    wanted = [base ** (-2 * i / dim) for i in range((dim + 1) // 2)]
    assert error(theta / torch.tensor(wanted, dtype=F64), torch.ones(len(wanted))) < 1e-15


# added


@pytest.mark.parametrize("d_model", [1, 2, 7, 64])
def test_table_is_the_closed_form(d_model: int) -> None:
    table = AbsPosEncoding(d_model).table(5001)
    where = [0, 1, 2, 500, 4999, 5000]
    assert table.shape == (5001, d_model) and table.dtype == F64
    assert error(table[where], sinusoids(where, d_model)) < 1e-11


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_table_in_the_dtype_asked_for(dtype: torch.dtype) -> None:
    where = [0, 257, 4999, 5000]
    table = AbsPosEncoding(64).table(5001, dtype=dtype)
    assert table.dtype == dtype
    assert error(table[where], sinusoids(where, 64)) < (1e-7 if dtype == torch.float32 else 1e-11)


@pytest.mark.parametrize("offset", [0, 3, 9, 10, 37, 131_072, 1_000_000])
def test_offset_goes_on_counting_also_past_max_len(offset: int) -> None:
    encoding = AbsPosEncoding(6, max_len=10)
    where = list(range(offset, offset + 5))
    assert error(encoding.table(5, offset), sinusoids(where, 6)) < 1e-9
    x = torch.randn(2, 5, 6, dtype=F64)
    assert error(encoding(x, offset), x + sinusoids(where, 6)) < 1e-9


def test_adds_out_of_place_in_the_dtype_given_and_rounds_the_sum_once() -> None:
    encoding = AbsPosEncoding(8)
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        x = torch.randn(2, 300, 8).to(dtype)
        before = x.clone()
        found = encoding(x)
        assert torch.equal(x, before) and found.dtype == dtype
        exact = x.double() + sinusoids(list(range(300)), 8)
        assert torch.all((found.double() - exact).abs() <= torch.finfo(dtype).eps / 2 * exact.abs() + 1e-7)


def test_sequences_of_every_length_from_none_to_past_max_len() -> None:
    encoding = AbsPosEncoding(4, max_len=3)
    for length in (1, 3, 4, 5, 17, 2):
        found = encoding(torch.zeros(1, length, 4, dtype=F64))
        assert error(found[0], sinusoids(list(range(length)), 4)) < 1e-12
    assert encoding(torch.zeros(2, 0, 4)).shape == (2, 0, 4) and encoding.table(0).shape == (0, 4)


def test_dropout_acts_in_training_alone() -> None:
    encoding = AbsPosEncoding(8, dropout=0.5)
    x = torch.randn(4, 50, 8)
    exact = x + encoding.table(50, dtype=torch.float32)
    dropped = encoding(x)
    assert 0.4 < float((dropped == 0).float().mean()) < 0.6
    kept = dropped != 0
    assert torch.equal(dropped[kept], (exact * 2)[kept])
    assert torch.equal(encoding.eval()(x), exact)


def test_a_shift_is_linear() -> None:
    """PE(p + k) = M_k PE(p), with M_k of the pairs' rotations by k θ_i, for the same M_k wherever p."""
    d_model, theta = 16, inverse_frequencies(16)
    encoding = AbsPosEncoding(d_model)
    for k in (1, 7, 1000):
        M = torch.zeros(d_model, d_model, dtype=F64)
        for i, angle in enumerate((k * theta).tolist()):
            s, c = math.sin(angle), math.cos(angle)
            M[2 * i : 2 * i + 2, 2 * i : 2 * i + 2] = torch.tensor([[c, s], [-s, c]], dtype=F64)
        for p in (0, 5, 4000):
            assert error(encoding.table(64, p + k), encoding.table(64, p) @ M.t()) < 1e-10


def test_products_know_the_distance_alone() -> None:
    table = AbsPosEncoding(32).table(200)
    gram = table @ table.t()
    assert error(gram.diagonal(), torch.full((200,), 16.0)) < 1e-12
    for k in range(0, 200, 17):
        assert float(gram.diagonal(k).max() - gram.diagonal(k).min()) < 1e-11


# turned


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("R", [None, 2, 6, 10])
def test_rotation_is_the_closed_form(layout: Layout, R: int | None) -> None:
    x = torch.randn(2, 3, 7, 10, dtype=F64)
    where = torch.arange(7).expand(2, 7)
    found = RotaryPosEncoding(10, layout=layout, rotary_dim=R)(x)
    assert error(found, turned_everywhere(x, where, R or 10, layout)) < 1e-13


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rotation_at_given_positions_near_and_far(layout: Layout) -> None:
    rotary = RotaryPosEncoding(8, layout=layout)
    x = torch.randn(2, 3, len(FAR), 8, dtype=F64)
    line = torch.tensor(FAR)
    packed = torch.stack((line, line.flip(0) // 3))
    assert error(rotary(x, line), turned_everywhere(x, line.expand(2, -1), 8, layout)) < 1e-8
    assert error(rotary(x, packed), turned_everywhere(x, packed, 8, layout)) < 1e-8
    for dtype in (torch.int32, torch.int64):
        assert error(rotary(x, packed.to(dtype)), turned_everywhere(x, packed, 8, layout)) < 1e-8


@pytest.mark.parametrize("layout", LAYOUTS)
def test_positions_within_the_tables_and_one_row_for_all(layout: Layout) -> None:
    rotary = RotaryPosEncoding(8, layout=layout, max_len=16)
    x = torch.randn(3, 2, 6, 8, dtype=F64)
    ids = torch.tensor([[5, 0, 15, 7, 2, 15], [10, 3, 9, 1, 12, 9], [0, 0, 0, 1, 1, 1]])
    assert error(rotary(x, ids), turned_everywhere(x, ids, 8, layout)) < 1e-12
    assert torch.equal(rotary(x, ids[:1]), rotary(x, ids[0]))
    assert torch.equal(rotary(x, torch.arange(6)), rotary(x))
    assert torch.equal(rotary(x, torch.arange(6).expand(3, 6)), rotary(x))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_lengths_past_max_len_and_back(layout: Layout) -> None:
    rotary = RotaryPosEncoding(4, layout=layout, max_len=3)
    for length in (2, 3, 4, 9, 1):
        x = torch.randn(1, 1, length, 4, dtype=F64)
        where = torch.arange(length).view(1, -1)
        assert error(rotary(x), turned_everywhere(x, where, 4, layout)) < 1e-13
    assert rotary(torch.randn(2, 1, 0, 4)).shape == (2, 1, 0, 4)
    assert rotary(torch.randn(0, 1, 3, 4), torch.zeros(0, 3, dtype=torch.int64)).shape == (0, 1, 3, 4)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_tables(layout: Layout) -> None:
    cos, sin = RotaryPosEncoding(10, layout=layout, rotary_dim=6).tables(300)
    assert cos.shape == sin.shape == (300, 3) and cos.dtype == sin.dtype == F64
    for p in (0, 1, 257, 299):
        for i in range(3):
            angle = p * 10000 ** (-2 * i / 6)
            assert abs(float(cos[p, i]) - math.cos(angle)) < 1e-13
            assert abs(float(sin[p, i]) - math.sin(angle)) < 1e-13


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_reduced_precision_rounds_the_result_alone(layout: Layout, dtype: torch.dtype) -> None:
    """Within half a unit in the last place of the exact rotation of the numbers given, and float32's own error."""
    rotary = RotaryPosEncoding(64, layout=layout)
    where = torch.tensor([*range(250, 266), 131_072, 1_000_000])
    x = torch.randn(1, 2, len(where), 64).to(dtype)
    found = rotary(x, where)
    assert found.dtype == dtype
    angle = where.double()[:, None] * inverse_frequencies(64)
    exact = rotate(x.double(), angle.cos(), angle.sin(), layout)
    allowed = (torch.finfo(dtype).eps / 2 if dtype != torch.float32 else 0) * exact.abs() + 1e-6
    assert torch.all((found.double() - exact).abs() <= allowed)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("R", [6, 8])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_input_of_any_layout_in_memory_is_left_as_it_is(layout: Layout, R: int, dtype: torch.dtype) -> None:
    rotary = RotaryPosEncoding(8, layout=layout, rotary_dim=R)
    B, H, L, D = 2, 3, 5, 8
    inputs = {
        "contiguous": torch.randn(B, H, L, D),
        "heads last": torch.randn(B, L, H, D).transpose(1, 2),
        "an odd place of the storage": torch.randn(B * H * L * D + 1)[1:].view(B, H, L, D),
        "odd strides": torch.randn(B, H, L, D + 1)[..., 1:],
        "every second": torch.randn(B, H, L, 2 * D)[..., ::2],
        "transposed": torch.randn(B, H, D, L).transpose(2, 3),
        "expanded": torch.randn(1, H, L, D).expand(B, H, L, D),
    }
    where = torch.arange(L).expand(B, L)
    for name, given in inputs.items():
        x = given.to(dtype) if dtype != torch.float32 else given
        before = x.clone()
        exact = turned_everywhere(x, where, R, layout)
        assert error(rotary(x), exact) < {F64: 1e-13, torch.float32: 1e-6}.get(dtype, 2e-2), name
        assert torch.equal(x, before), name


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("block", [1, 24, 40, 100, 1 << 19])
def test_blocks_of_any_size_give_the_same(
    monkeypatch: pytest.MonkeyPatch, layout: Layout, dtype: torch.dtype, block: int
) -> None:
    x = torch.randn(3, 4, 5, 8).to(dtype)
    line, packed = torch.randint(99, (5,)), torch.randint(99, (3, 5))
    rotary = RotaryPosEncoding(8, layout=layout, rotary_dim=6)
    wanted = [rotary(x), rotary(x, line), rotary(x, packed), rotary(x, packed[:1])]
    monkeypatch.setattr(rotation, "BLOCK", block)
    found = [rotary(x), rotary(x, line), rotary(x, packed), rotary(x, packed[:1])]
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("R", [4, 6])
def test_gradients_of_first_and_second_order(layout: Layout, R: int) -> None:
    rotary = RotaryPosEncoding(6, layout=layout, rotary_dim=R)
    x = torch.randn(2, 2, 3, 6, dtype=F64, requires_grad=True)
    for where in (None, torch.tensor([7, 0, 90]), torch.tensor([[7, 0, 90], [1, 5000, 2]])):
        assert torch.autograd.gradcheck(rotary, (x, where))
        assert torch.autograd.gradgradcheck(rotary, (x, where))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.filterwarnings(
    "ignore:`torch.jit.script` is deprecated"
)  # torch's own, on its way to a transform
def test_transforms_of_functions(layout: Layout) -> None:
    """Per sample, forwards and backwards, beside the same transform of the plain formula."""
    rotary = RotaryPosEncoding(6, layout=layout, rotary_dim=4)
    x = torch.randn(3, 2, 2, 5, 6, dtype=F64)
    for where in (None, torch.tensor([3, 0, 9, 1, 1]), torch.tensor([[3, 0, 9, 1, 1], [0, 1, 2, 3, 4]])):

        def ours(x: Tensor, where: Tensor | None = where) -> Tensor:
            return rotary(x, where)

        line = torch.arange(5) if where is None else where
        angle = line.double()[..., None] * inverse_frequencies(4)
        cos, sin = (table if line.ndim == 1 else table.unsqueeze(1) for table in (angle.cos(), angle.sin()))

        def plainly(x: Tensor, cos: Tensor = cos, sin: Tensor = sin) -> Tensor:
            return torch.cat((rotate(x[..., :4], cos, sin, layout), x[..., 4:]), dim=-1)

        for transform in (torch.func.jacrev, torch.func.jacfwd):
            assert error(transform(ours)(x[0]), transform(plainly)(x[0])) < 1e-14
        for in_dim in (0, 1):
            if where is None or where.ndim == 1 or in_dim == 0:
                found = torch.func.vmap(ours, in_dims=in_dim)(x)
                assert error(found, torch.func.vmap(plainly, in_dims=in_dim)(x)) < 1e-14
        squares = [torch.func.grad(lambda x, f=f: f(x).pow(3).sum()) for f in (ours, plainly)]
        assert error(torch.func.vmap(squares[0])(x), torch.func.vmap(squares[1])(x)) < 1e-13
        tangent = torch.randn_like(x[0])
        assert error(torch.func.jvp(ours, (x[0],), (tangent,))[1], plainly(tangent)) < 1e-14


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradient_of_reduced_precision_is_the_rotation_backwards(layout: Layout) -> None:
    rotary = RotaryPosEncoding(8, layout=layout)
    x, gradient = torch.randn(2, 2, 300, 8).bfloat16().requires_grad_(), torch.randn(2, 2, 300, 8).bfloat16()
    rotary(x).backward(gradient)
    assert x.grad is not None and x.grad.dtype == torch.bfloat16
    cos, sin = rotary.tables(300)
    exact = rotate(gradient.double(), cos, -sin, layout)
    assert torch.all(
        (x.grad.double() - exact).abs() <= torch.finfo(torch.bfloat16).eps / 2 * exact.abs() + 1e-6
    )


def test_gradient_of_the_sum_that_is_added() -> None:
    encoding = AbsPosEncoding(5, dropout=0.0)
    assert torch.autograd.gradcheck(encoding, (torch.randn(2, 3, 5, dtype=F64, requires_grad=True), 4))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_norms_are_kept_and_rotations_add_up(layout: Layout) -> None:
    rotary = RotaryPosEncoding(16, layout=layout)
    x = torch.randn(1, 1, 50, 16, dtype=F64)
    m, n = torch.randint(5000, (50,)), torch.randint(5000, (50,))
    assert error(rotary(x, m).norm(dim=-1), x.norm(dim=-1)) < 1e-12
    assert error(rotary(rotary(x, m), n), rotary(x, m + n)) < 1e-10


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("start", [0, 1000, 32_768, 131_072])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_scores_know_the_distance_alone(layout: Layout, start: int, dtype: torch.dtype) -> None:
    """Over all (m, n) of a window, also far out, relative to ‖q‖‖k‖: the spread along each diagonal."""
    rotary = RotaryPosEncoding(64, layout=layout)
    q, k = torch.randn(64, dtype=dtype), torch.randn(64, dtype=dtype)
    where = torch.arange(start, start + 64)
    scores = (
        rotary(q.expand(1, 1, 64, 64), where)[0, 0].double()
        @ rotary(k.expand(1, 1, 64, 64), where)[0, 0].double().t()
    )
    near = rotary(q.expand(1, 1, 64, 64))[0, 0].double() @ rotary(k.expand(1, 1, 64, 64))[0, 0].double().t()
    scale, tolerance = float(q.norm() * k.norm()), 1e-9 if dtype == F64 else 1e-6
    for offset in range(-63, 64):
        along = torch.cat((scores.diagonal(offset), near.diagonal(offset)))
        assert float(along.max() - along.min()) / scale < tolerance
    assert float(scores.std()) / scale > 1e-3  # and they do differ


# between the layouts


@pytest.mark.parametrize("R", [None, 2, 6])
def test_layouts_agree_after_a_permutation(R: int | None) -> None:
    x = torch.randn(2, 3, 9, 8, dtype=F64)
    to_half, back = (layout_permutation(8, layout, R) for layout in ("half", "interleaved"))
    interleaved = RotaryPosEncoding(8, rotary_dim=R)
    half = RotaryPosEncoding(8, layout="half", rotary_dim=R)
    assert torch.equal(to_half[back], torch.arange(8))
    assert error(half(x[..., to_half]), interleaved(x)[..., to_half]) < 1e-15
    if R != 2:  # with one pair there is one layout
        assert error(half(x), interleaved(x)) > 0.1


def test_permutation_as_written_out() -> None:
    assert layout_permutation(6, "half").tolist() == [0, 2, 4, 1, 3, 5]
    assert layout_permutation(6, "interleaved").tolist() == [0, 3, 1, 4, 2, 5]
    assert layout_permutation(6, "half", 4).tolist() == [0, 2, 1, 3, 4, 5]


@pytest.mark.parametrize("R", [None, 4])
@pytest.mark.parametrize("num_kv_heads", [4, 2])
def test_converted_projections_give_the_same_scores(R: int | None, num_kv_heads: int) -> None:
    dim, heads, d_model = 8, 4, 12
    x = torch.randn(2, 7, d_model, dtype=F64)
    projections = {"q": nn.Linear(d_model, heads * dim), "k": nn.Linear(d_model, num_kv_heads * dim)}

    def scores(layout: Layout, layers: dict[str, nn.Linear]) -> Tensor:
        rotary = RotaryPosEncoding(dim, layout=layout, rotary_dim=R)
        q, k = (rotary(layers[n].double()(x).unflatten(-1, (-1, dim)).transpose(1, 2)) for n in "qk")
        return q @ k.repeat_interleave(heads // num_kv_heads, dim=1).mT

    wanted = scores("interleaved", projections)
    for layout, same in (("half", True), ("interleaved", True), ("half", True)):
        converted = copy.deepcopy(projections)
        for name, count in (("q", heads), ("k", num_kv_heads)):
            for part in ("weight", "bias"):
                mine = getattr(projections[name], part).data
                theirs = convert_layout(mine, count, "half", R)
                if layout == "interleaved":  # there and back
                    theirs = convert_layout(theirs, count, "interleaved", R)
                    assert torch.equal(theirs, mine)
                getattr(converted[name], part).data = theirs
        assert (error(scores(layout, converted), wanted) < 1e-12) == same
    assert error(scores("half", projections), wanted) > 0.01


# free of the defects known from elsewhere


@pytest.mark.parametrize("cast", [nn.Module.bfloat16, nn.Module.half, nn.Module.double])
def test_casting_the_module_casts_no_table(cast: Callable[[nn.Module], nn.Module]) -> None:
    x, y = torch.randn(1, 600, 8), torch.randn(1, 2, 600, 8)
    added, rotary = AbsPosEncoding(8), RotaryPosEncoding(8)
    wanted = added(x), rotary(y)
    model = cast(nn.ModuleList((added, rotary)))
    assert torch.equal(model[0](x), wanted[0]) and torch.equal(model[1](y), wanted[1])
    fresh = cast(nn.ModuleList((AbsPosEncoding(8), RotaryPosEncoding(8))))
    assert torch.equal(fresh[0](x), wanted[0]) and torch.equal(fresh[1](y), wanted[1])


@pytest.mark.parametrize("first", [torch.bfloat16, torch.float16, torch.float32])
def test_the_first_caller_decides_nothing(first: torch.dtype) -> None:
    x, y = torch.randn(1, 600, 8, dtype=F64), torch.randn(1, 2, 600, 8, dtype=F64)
    wanted = AbsPosEncoding(8)(x), RotaryPosEncoding(8)(y), RotaryPosEncoding(8, layout="half")(y)
    models = AbsPosEncoding(8), RotaryPosEncoding(8), RotaryPosEncoding(8, layout="half")
    for model, given in zip(models, (x, y, y), strict=True):
        model(given.to(first))
    found = [model(given) for model, given in zip(models, (x, y, y), strict=True)]
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_a_table_handed_out_is_a_copy() -> None:
    added, rotary = AbsPosEncoding(8), RotaryPosEncoding(8)
    for dtype in (torch.float32, F64):
        added.table(5, dtype=dtype).zero_()
        for table in rotary.tables(5, dtype=dtype):
            table.zero_()
    assert error(added.table(5), sinusoids(list(range(5)), 8)) < 1e-13
    assert error(rotary(torch.ones(1, 1, 5, 8)), RotaryPosEncoding(8)(torch.ones(1, 1, 5, 8))) == 0


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_kept_while_evaluating_serves_a_backward_pass(layout: Layout) -> None:
    added, rotary = AbsPosEncoding(8), RotaryPosEncoding(8, layout=layout)
    x = torch.randn(2, 5, 8, requires_grad=True)
    with torch.inference_mode():
        rotary(added(x).unsqueeze(1), torch.arange(5))
        rotary(added(x).unsqueeze(1))
    for where in (None, torch.arange(5)):
        rotary(added(x).unsqueeze(1), where).sum().backward()
    assert x.grad is not None and bool(x.grad.isfinite().all())


def test_nothing_is_learnt_or_saved_and_copies_work() -> None:
    for encoding in (AbsPosEncoding(8), RotaryPosEncoding(8, scaling={"type": "dynamic", "factor": 2.0})):
        x = torch.randn(1, 9, 8) if isinstance(encoding, AbsPosEncoding) else torch.randn(1, 1, 9, 8)
        wanted = encoding(x)
        assert not list(encoding.parameters()) and not list(encoding.buffers()) and not encoding.state_dict()
        packed = pickle.dumps(encoding)
        assert len(packed) < 5000  # tables are made again, not carried
        for other in (pickle.loads(packed), copy.deepcopy(encoding)):
            assert torch.equal(other(x), wanted)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_table_alone_is_kept_for_the_backward_pass(layout: Layout) -> None:
    x = torch.randn(1, 64, 5, 8, requires_grad=True)
    saved: list[int] = []

    def pack(kept: Tensor) -> Tensor:
        saved.append(kept.numel())
        return kept

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept):
        RotaryPosEncoding(8, layout=layout)(x)
    assert sum(saved) == 5 * 8


def test_under_autocast_the_dtype_is_that_of_the_input() -> None:
    x = torch.randn(1, 2, 300, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for layout in LAYOUTS:
            rotary = RotaryPosEncoding(8, layout=layout)
            assert torch.equal(rotary(x), RotaryPosEncoding(8, layout=layout)(x))
            assert rotary(x).dtype == torch.float32 and rotary(x.bfloat16()).dtype == torch.bfloat16
        assert AbsPosEncoding(8)(x[0]).dtype == torch.float32


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("R", [6, 8])
def test_compiled_whole_it_gives_the_same(layout: Layout, R: int) -> None:
    """Traced whole, without a break; what then generates code is the compiler's own concern."""
    rotary, added = (
        RotaryPosEncoding(8, layout=layout, rotary_dim=R, max_len=16),
        AbsPosEncoding(8, max_len=16),
    )

    def model(x: Tensor, where: Tensor | None) -> Tensor:
        return rotary(added(x.flatten(0, 1)).view_as(x), where)

    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for length in (5, 40):
        x = torch.randn(2, 3, length, 8, requires_grad=True)
        for where in (None, torch.randint(5000, (length,)), torch.randint(5000, (2, length))):
            gradients = []
            for way in (compiled, model):
                x.grad = None
                y = way(x, where)
                y.square().sum().backward()
                gradients.append((y, x.grad))
            for mine, wanted in zip(*gradients, strict=True):
                assert mine is not None and wanted is not None and error(mine, wanted) < 1e-5


def test_a_tracers_stand_in_is_not_kept() -> None:
    rotary = RotaryPosEncoding(8)
    with torch._subclasses.FakeTensorMode():
        rotary(torch.empty(1, 1, 4, 8))
    assert error(rotary(torch.ones(1, 1, 4, 8)), RotaryPosEncoding(8)(torch.ones(1, 1, 4, 8))) == 0


# what users get wrong

X, Y = torch.zeros(2, 3, 4), torch.zeros(2, 1, 3, 4)
ABSOLUTE, ROTARY = AbsPosEncoding(4), RotaryPosEncoding(4)


WRONG: dict[str, tuple[Callable[[], Any], str]] = {
    "d_model": (lambda: AbsPosEncoding(0), "d_model must be at least 1, not 0"),
    "max_len": (lambda: AbsPosEncoding(4, max_len=0), "max_len must be at least 1, not 0"),
    "dropout": (lambda: AbsPosEncoding(4, dropout=1.0), r"dropout must lie in \[0, 1\), not 1.0"),
    "rank": (lambda: ABSOLUTE(X[0]), r"x must be \(batch, length, 4\), not \(3, 4\)"),
    "width": (lambda: ABSOLUTE(X[..., :3]), r"x must be \(batch, length, 4\), not \(2, 3, 3\)"),
    "tokens": (lambda: ABSOLUTE(X.long()), "x must be of a floating dtype, not torch.int64"),
    "offset": (lambda: ABSOLUTE(X, -1), "offset must not be negative, and is -1"),
    "table's length": (lambda: ABSOLUTE.table(-1), "length must not be negative, and is -1"),
    "table's offset": (lambda: ABSOLUTE.table(1, -2), "offset must not be negative, and is -2"),
    "tables' length": (lambda: ROTARY.tables(-1), "length must not be negative, and is -1"),
    "half a token": (lambda: ABSOLUTE(X, 1.5), "offset must be an integer, not 1.5"),  # type: ignore[arg-type]
    "half a size": (lambda: RotaryPosEncoding(4.0), "dim must be an integer, not 4.0"),  # type: ignore[arg-type]
    "odd dim": (lambda: RotaryPosEncoding(5), "dim must be even.* not 5"),
    "no dim": (lambda: RotaryPosEncoding(0), "dim must be at least 1, not 0"),
    "odd rotary_dim": (lambda: RotaryPosEncoding(4, rotary_dim=3), "rotary_dim must be even.* not 3"),
    "no rotary_dim": (lambda: RotaryPosEncoding(4, rotary_dim=0), "rotary_dim must be at least 1, not 0"),
    "large rotary_dim": (
        lambda: RotaryPosEncoding(4, rotary_dim=6),
        r"rotary_dim must be at most dim \(4\), not 6",
    ),
    "base": (lambda: RotaryPosEncoding(4, base=1.0), "base must be a number above 1, not 1.0"),
    "base nan": (lambda: RotaryPosEncoding(4, base=math.nan), "base must be a number above 1, not nan"),
    "layout": (lambda: RotaryPosEncoding(4, layout="neox"), "layout must be interleaved or half, not 'neox'"),  # type: ignore[arg-type]
    "rotary rank": (lambda: ROTARY(X), r"x must be \(batch, heads, length, 4\), not \(2, 3, 4\)"),
    "rotary width": (
        lambda: ROTARY(Y[..., :2]),
        r"x must be \(batch, heads, length, 4\), not \(2, 1, 3, 2\)",
    ),
    "rotary dtype": (lambda: ROTARY(Y.int()), "x must be of a floating dtype, not torch.int32"),
    "positions' length": (
        lambda: ROTARY(Y, torch.arange(4)),
        r"positions must be \(3,\) or \(2, 3\) for x of shape \(2, 1, 3, 4\), not \(4,\)",
    ),
    "positions' batch": (
        lambda: ROTARY(Y, torch.zeros(3, 3).long()),
        r"positions must be \(3,\) or \(2, 3\) for x of shape \(2, 1, 3, 4\), not \(3, 3\)",
    ),
    "positions' rank": (lambda: ROTARY(Y, torch.tensor(3)), r"positions must be .* not \(\)"),
    "negative position": (
        lambda: ROTARY(Y, torch.tensor([0, -7, 2])),
        "positions must not be negative, and the lowest is -7",
    ),
    "negative packed": (lambda: ROTARY(Y, torch.tensor([[0, 1, 2], [0, 1, -1]])), "the lowest is -1"),
    "float positions": (
        lambda: ROTARY(Y, torch.arange(3.0)),
        "positions must be integers, not torch.float32",
    ),
    "boolean positions": (
        lambda: ROTARY(Y, torch.ones(3).bool()),
        "positions must be integers, not torch.bool",
    ),
    "heads": (lambda: convert_layout(torch.zeros(6, 2), 4, "half"), r"with 4 heads, not \(6, 2\)"),
    "no heads": (lambda: convert_layout(torch.zeros(6, 2), 0, "half"), "num_heads must be at least 1, not 0"),
    "heads' size": (
        lambda: convert_layout(torch.zeros(6, 2), 2, "half"),
        r"rotary_dim must be even and at most dim \(3\), not 3",
    ),
    "to": (
        lambda: convert_layout(torch.zeros(8, 2), 2, "neox"),
        "to must be interleaved or half, not 'neox'",
    ),  # type: ignore[arg-type]
    "permutation": (
        lambda: layout_permutation(4, "half", 6),
        r"rotary_dim must be even and at most dim \(4\), not 6",
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_is_wrong_is_named(wrong: str) -> None:
    call, message = WRONG[wrong]
    with pytest.raises(ValueError, match=message):
        call()


def test_pairs_are_views() -> None:
    x = torch.zeros(2, 6)
    for layout in LAYOUTS:
        first, second = pairs(x, layout)
        first.fill_(1)
        second.fill_(2)
        assert x[0].tolist() == ([1, 2] * 3 if layout == "interleaved" else [1] * 3 + [2] * 3)
