"""Positions against closed forms in plain float64, by algebra, and where peers are known to break."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
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
from tests.experiments.nn.helpers import F64, all_near, near, randn, refused

FAR = [0, 1, 255, 257, 4095, 4096, 5000, 131_072, 1_000_000]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
BOTH_LAYOUTS = pytest.mark.parametrize("layout", LAYOUTS)


def thetas(dim: int, base: float = 10000.0) -> list[float]:
    return [base ** (-2 * i / dim) for i in range((dim + 1) // 2)]


def sinusoids(positions: list[int], d_model: int) -> Tensor:
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


@pytest.mark.parametrize("dim", [1, 2, 7, 64])
@pytest.mark.parametrize("base", [10000.0, 500000.0])
def test_inverse_frequencies(dim: int, base: float) -> None:
    theta = inverse_frequencies(dim, base)
    assert theta.dtype == F64 and theta.device.type == "cpu"
    near(theta, torch.tensor(thetas(dim, base), dtype=F64), 0, rtol=1e-15)


@pytest.mark.parametrize("d_model", [1, 2, 7, 64])
@pytest.mark.parametrize("offset", [0, 3, 9, 10, 37, 4998, 131_072, 1_000_000])
def test_table_is_the_closed_form(d_model: int, offset: int) -> None:
    encoding, expected = AbsPosEncoding(d_model, max_len=10), sinusoids([*range(offset, offset + 5)], d_model)
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
    near(output, x.double() + sinusoids([*range(300)], 8), 1e-7, rtol=torch.finfo(dtype).eps / 2)


def test_dropout_acts_in_training_alone() -> None:
    encoding, x = AbsPosEncoding(8, dropout=0.5), torch.randn(4, 50, 8)
    exact, dropped = x + encoding.table(50, dtype=torch.float32), encoding(x)
    kept = dropped != 0
    assert 0.4 < float(kept.float().mean()) < 0.6
    assert torch.equal(dropped, exact * 2 * kept) and torch.equal(encoding.eval()(x), exact)


def test_a_shift_is_linear_and_products_know_the_distance_alone() -> None:
    """PE(p + k) = M_k PE(p), with M_k of the pairs' rotations by k θ_i, for the same M_k wherever p."""
    table = AbsPosEncoding(16).table(5000)
    for k in (1, 7, 1000):
        turns = [
            [[math.cos(a), math.sin(a)], [-math.sin(a), math.cos(a)]] for a in (k * t for t in thetas(16))
        ]
        near(table[k:], table[:-k] @ torch.block_diag(*torch.tensor(turns, dtype=F64)).t())
        expected = math.fsum(math.cos(k * t) for t in thetas(16))
        near((table[k:] * table[:-k]).sum(1), torch.full((5000 - k,), expected, dtype=F64))


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
    for positions in (line, packed, packed.int(), within, within[0].int()):
        near(rotary(x, positions), turned(x, positions, 8, layout), 1e-12 if positions.max() < 16 else 1e-8)
    counted = torch.arange(len(FAR))
    assert torch.equal(rotary(x, within[:1]), rotary(x, within[0]))
    assert torch.equal(rotary(x, counted), rotary(x))
    assert torch.equal(rotary(x, counted.expand(2, -1)), rotary(x))


@BOTH_LAYOUTS
def test_sequences_of_every_length_from_none_to_past_max_len_and_back(layout: Layout) -> None:
    added, rotary = AbsPosEncoding(4, max_len=3), RotaryPosEncoding(4, layout=layout, max_len=3)
    for length in (1, 3, 4, 17, 2, 0):
        x = randn(2, 1, length, 4)
        near(rotary(x), turned(x, None, 4, layout), 1e-13)
        near(added(x[:, 0]), x[:, 0] + sinusoids([*range(length)], 4).view(length, 4), 1e-12)
    assert added.table(0).shape == (0, 4)
    assert rotary(torch.randn(0, 1, 3, 4), torch.zeros(0, 3, dtype=torch.int64)).shape == (0, 1, 3, 4)


@BOTH_LAYOUTS
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_reduced_precision_rounds_the_result_alone(layout: Layout, dtype: torch.dtype) -> None:
    """Within half a unit in the last place of the exact rotation of the numbers given, and float32's own error."""
    positions = torch.tensor([*range(250, 266), 131_072, 1_000_000])
    x = torch.randn(1, 2, len(positions), 64).to(dtype)
    output = RotaryPosEncoding(64, layout=layout)(x, positions)
    assert output.dtype == dtype
    rounding = torch.finfo(dtype).eps / 2 if dtype != torch.float32 else 0
    near(output, turned(x, positions, 64, layout), 1e-6, rtol=rounding)


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
        x = given.to(dtype) if dtype != torch.float32 else given
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
    assert all(torch.equal(rotary(x, p), y) for p, y in zip(cases, expected, strict=True))


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
@pytest.mark.filterwarnings(
    "ignore:`torch.jit.script` is deprecated"
)  # torch's own, on its way to a transform
def test_transforms_of_functions(layout: Layout, shape: tuple[int, ...] | None) -> None:
    """Per sample, forwards and backwards, beside the same transform of the plain formula."""
    rotary, x = RotaryPosEncoding(6, layout=layout, rotary_dim=4), randn(3, 2, 2, 3, 6)
    positions = None if shape is None else torch.randint(9, shape)
    line = torch.arange(3) if positions is None else positions
    angle = line.double()[..., None] * inverse_frequencies(4)
    cos, sin = (table if line.ndim == 1 else table.unsqueeze(1) for table in (angle.cos(), angle.sin()))

    def ours(x: Tensor) -> Tensor:
        return rotary(x, positions)

    def plainly(x: Tensor) -> Tensor:
        return torch.cat((rotate(x[..., :4], cos, sin, layout), x[..., 4:]), dim=-1)

    def cubes(f: Callable[[Tensor], Tensor]) -> Tensor:
        return torch.func.vmap(torch.func.grad(lambda x: f(x).pow(3).sum()))(x)

    for transform in (torch.func.jacrev, torch.func.jacfwd):
        near(transform(ours)(x[0]), transform(plainly)(x[0]), 1e-14)
    for in_dim in (0, 1) if line.ndim == 1 else (0,):
        near(torch.func.vmap(ours, in_dims=in_dim)(x), torch.func.vmap(plainly, in_dims=in_dim)(x), 1e-14)
    near(cubes(ours), cubes(plainly), 1e-13)
    near(torch.func.jvp(ours, (x[0],), (x[1],))[1], plainly(x[1]), 1e-14)


@BOTH_LAYOUTS
def test_gradient_of_reduced_precision_is_the_rotation_backwards(layout: Layout) -> None:
    x, gradient = torch.randn(2, 2, 300, 8).bfloat16().requires_grad_(), torch.randn(2, 2, 300, 8).bfloat16()
    RotaryPosEncoding(8, layout=layout)(x).backward(gradient)
    assert x.grad is not None and x.grad.dtype == torch.bfloat16
    exact = turned(gradient, -torch.arange(300), 8, layout)
    near(x.grad, exact, 1e-6, rtol=torch.finfo(torch.bfloat16).eps / 2)


@BOTH_LAYOUTS
@pytest.mark.parametrize("start", [1000, 131_072])
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_scores_know_the_distance_alone(layout: Layout, start: int, dtype: torch.dtype) -> None:
    """Over all (m, n) of a window, also far out, relative to ‖q‖‖k‖: the spread along each diagonal."""
    rotary, (q, k) = RotaryPosEncoding(64, layout=layout), torch.randn(2, 64, dtype=dtype)

    def scores(first: int) -> Tensor:
        where = torch.arange(first, first + 64)
        rows = [rotary(x.expand(1, 1, 64, 64), where)[0, 0].double() for x in (q, k)]
        return rows[0] @ rows[1].t() / float(q.norm() * k.norm())

    both = torch.stack((scores(start), scores(0)))
    for offset in range(-63, 64):
        along = both.diagonal(offset, 1, 2)
        assert float(along.max() - along.min()) < (1e-9 if dtype == F64 else 1e-6)
    assert float(both.std()) > 1e-3  # and they do differ


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
    for layout, expected in zip(LAYOUTS, ([1, 2] * 3, [1] * 3 + [2] * 3), strict=True):
        x = torch.zeros(2, 6)
        for number, members in enumerate(pairs(x, layout), 1):
            members.fill_(number)  # they are views
        assert x[0].tolist() == expected


@pytest.mark.parametrize("R", [None, 4])
@pytest.mark.parametrize("num_kv_heads", [4, 2])
def test_converted_projections_give_the_same_scores(R: int | None, num_kv_heads: int) -> None:
    dim, heads, d_model = 8, 4, 12
    x, counts = randn(2, 7, d_model), {"q": heads, "k": num_kv_heads}
    projections = {name: nn.Linear(d_model, count * dim).double() for name, count in counts.items()}

    def scores(layout: Layout, layers: dict[str, nn.Linear]) -> Tensor:
        rotary = RotaryPosEncoding(dim, layout=layout, rotary_dim=R)
        q, k = (rotary(layers[n](x).unflatten(-1, (-1, dim)).transpose(1, 2)) for n in "qk")
        return q @ k.repeat_interleave(heads // num_kv_heads, dim=1).mT

    converted = copy.deepcopy(projections)
    for name, layer in converted.items():
        for weight in layer.parameters():
            mine = weight.data
            weight.data = convert_layout(mine, counts[name], "half", R)
            assert torch.equal(convert_layout(weight.data, counts[name], "interleaved", R), mine)
    expected = scores("interleaved", projections)
    near(scores("half", converted), expected, 1e-12)
    assert float((scores("half", projections) - expected).detach().abs().max()) > 0.01


# free of the defects known from elsewhere


def encodings() -> list[nn.Module]:
    return [AbsPosEncoding(8), RotaryPosEncoding(8), RotaryPosEncoding(8, layout="half")]


def given(dtype: torch.dtype = torch.float32, length: int = 600) -> list[Tensor]:
    """An input for each of the encodings."""
    x = torch.randn(1, length, 8, dtype=dtype)
    return [x, x[None].repeat(1, 2, 1, 1), x[None]]


def outputs(modules: list[nn.Module], inputs: list[Tensor]) -> list[Tensor]:
    return [module(x) for module, x in zip(modules, inputs, strict=True)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_casting_the_module_casts_no_table(dtype: torch.dtype) -> None:
    for inputs in (given(), given(F64)):
        expected, used = outputs(encodings(), inputs), encodings()
        outputs(used, [x.to(dtype) for x in inputs])
        for models in (used, encodings()):
            assert all(map(torch.equal, outputs([model.to(dtype) for model in models], inputs), expected))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert all(map(torch.equal, outputs(encodings(), inputs), expected))
            assert all(y.dtype == dtype for y in outputs(encodings(), [x.to(dtype) for x in inputs]))


@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)
def test_a_table_handed_out_is_a_copy(dtype: torch.dtype) -> None:
    modules, inputs = encodings(), given(dtype, 5)
    for table in (modules[0].table(5, dtype=dtype), *modules[1].tables(5, dtype=dtype)):
        table.zero_()
    assert all(map(torch.equal, outputs(modules, inputs), outputs(encodings(), inputs)))


@BOTH_LAYOUTS
def test_what_is_kept_while_evaluating_serves_a_backward_pass(layout: Layout) -> None:
    added, rotary = AbsPosEncoding(8), RotaryPosEncoding(8, layout=layout)
    x, cases = torch.randn(2, 5, 8, requires_grad=True), (None, torch.arange(5))
    with torch.inference_mode():
        for positions in cases:
            rotary(added(x).unsqueeze(1), positions)
    for positions in cases:
        rotary(added(x).unsqueeze(1), positions).sum().backward()
    assert x.grad is not None and bool(x.grad.isfinite().all())


def test_nothing_is_learnt_or_saved_and_copies_work() -> None:
    dynamic = RotaryPosEncoding(8, scaling={"type": "dynamic", "factor": 2.0})
    for encoding, x in zip([*encodings(), dynamic], [*given(), given()[1]], strict=True):
        expected = encoding(x)
        assert not list(encoding.parameters()) and not list(encoding.buffers()) and not encoding.state_dict()
        packed = pickle.dumps(encoding)
        assert len(packed) < 5000  # tables are made again, not carried
        for other in (pickle.loads(packed), copy.deepcopy(encoding)):
            assert torch.equal(other(x), expected)


@BOTH_LAYOUTS
def test_the_table_alone_is_kept_for_the_backward_pass(layout: Layout) -> None:
    x, saved = torch.randn(1, 64, 5, 8, requires_grad=True), []
    keep = torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()) or x, lambda x: x)
    with keep:
        RotaryPosEncoding(8, layout=layout)(x)
    assert sum(saved) == 5 * 8


@pytest.mark.slow
@BOTH_LAYOUTS
@pytest.mark.parametrize("R", [6, 8])
def test_compiled_whole_it_gives_the_same(layout: Layout, R: int) -> None:
    """Traced whole, without a break; what then generates code is the compiler's own concern."""
    rotary = RotaryPosEncoding(8, layout=layout, rotary_dim=R, max_len=16)
    added = AbsPosEncoding(8, max_len=16)

    def model(x: Tensor, positions: Tensor | None) -> Tensor:
        return rotary(added(x.flatten(0, 1)).view_as(x), positions)

    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for length, shape in ((5, None), (40, (40,)), (40, (2, 40))):
        x = torch.randn(2, 3, length, 8, requires_grad=True)
        positions = None if shape is None else torch.randint(5000, shape)
        results = []
        for way in (compiled, model):
            y = way(x, positions)
            results.append([y, *torch.autograd.grad(y.square().sum(), x)])
        all_near(*results, 1e-5)


def test_a_tracers_stand_in_is_not_kept() -> None:
    rotary, x = RotaryPosEncoding(8), torch.ones(1, 1, 4, 8)
    with torch._subclasses.FakeTensorMode():
        rotary(torch.empty(1, 1, 4, 8))
    assert torch.equal(rotary(x), RotaryPosEncoding(8)(x))


# what users get wrong

X, Y = torch.zeros(2, 3, 4), torch.zeros(2, 1, 3, 4)
ADDED, ROTARY = AbsPosEncoding(4), RotaryPosEncoding(4)
WRONG: list[tuple[Callable[[], Any], str]] = [
    (lambda: AbsPosEncoding(0), "d_model.*0"),
    (lambda: AbsPosEncoding(4, max_len=0), "max_len.*0"),
    (lambda: AbsPosEncoding(4, dropout=1.0), "dropout.*1.0"),
    (lambda: ADDED(X[0]), r"x .*length, 4\).*\(3, 4\)"),
    (lambda: ADDED(X[..., :3]), r"x .*length, 4\).*\(2, 3, 3\)"),
    (lambda: ADDED(X.long()), "x .*floating.*int64"),
    (lambda: ADDED(X, -1), "offset.*-1"),
    (lambda: ADDED.table(-1), "length.*-1"),
    (lambda: ADDED.table(1, -2), "offset.*-2"),
    (lambda: ROTARY.tables(-1), "length.*-1"),
    (lambda: ADDED(X, 1.5), "offset.*integer.*1.5"),  # type: ignore[arg-type]
    (lambda: RotaryPosEncoding(4.0), "dim.*integer.*4.0"),  # type: ignore[arg-type]
    (lambda: RotaryPosEncoding(5), "dim.*even.*5"),
    (lambda: RotaryPosEncoding(0), "dim.*0"),
    (lambda: RotaryPosEncoding(4, rotary_dim=3), "rotary_dim.*even.*3"),
    (lambda: RotaryPosEncoding(4, rotary_dim=0), "rotary_dim.*0"),
    (lambda: RotaryPosEncoding(4, rotary_dim=6), r"rotary_dim.*dim.*4.*6"),
    (lambda: RotaryPosEncoding(4, base=1.0), "base.*1.0"),
    (lambda: RotaryPosEncoding(4, base=math.nan), "base.*nan"),
    (lambda: RotaryPosEncoding(4, layout="neox"), "layout.*interleaved, half.*neox"),  # type: ignore[arg-type]
    (lambda: ROTARY(X), r"x .*heads, length, 4\).*\(2, 3, 4\)"),
    (lambda: ROTARY(Y[..., :2]), r"x .*heads, length, 4\).*\(2, 1, 3, 2\)"),
    (lambda: ROTARY(Y.int()), "x .*floating.*int32"),
    (lambda: ROTARY(Y, torch.arange(4)), r"positions.*\(3,\).*\(2, 3\).*\(4,\)"),
    (lambda: ROTARY(Y, torch.zeros(3, 3).long()), r"positions.*\(3,\).*\(2, 3\).*\(3, 3\)"),
    (lambda: ROTARY(Y, torch.tensor(3)), r"positions.*\(\)"),
    (lambda: ROTARY(Y, torch.tensor([0, -7, 2])), "positions.*-7"),
    (lambda: ROTARY(Y, torch.tensor([[0, 1, 2], [0, 1, -1]])), "positions.*-1"),
    (lambda: ROTARY(Y, torch.arange(3.0)), "positions.*integer.*float32"),
    (lambda: ROTARY(Y, torch.ones(3).bool()), "positions.*integer.*bool"),
    (lambda: convert_layout(torch.zeros(6, 2), 4, "half"), r"4 heads.*\(6, 2\)"),
    (lambda: convert_layout(torch.zeros(6, 2), 0, "half"), "num_heads.*0"),
    (lambda: convert_layout(torch.zeros(6, 2), 2, "half"), r"rotary_dim.*even.*3"),
    (lambda: convert_layout(torch.zeros(8, 2), 2, "neox"), "to.*interleaved, half.*neox"),  # type: ignore[arg-type]
    (lambda: layout_permutation(4, "half", 6), r"rotary_dim.*dim.*4.*6"),
]


@pytest.mark.parametrize(("call", "message"), WRONG, ids=[message for _, message in WRONG])
def test_what_is_wrong_is_named(call: Callable[[], Any], message: str) -> None:
    with refused(message):
        call()
