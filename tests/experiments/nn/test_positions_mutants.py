"""Deliberately broken copies of positions and of their scaling, caught by a few proofs that the true ones pass.

A mutant is the source of one of the two modules with one text replaced, which stands in both exactly once.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from experiments.nn import positions, rope_scaling

pytestmark = pytest.mark.slow
SOURCES = {
    module.__name__: Path(str(module.__file__)).read_text(encoding="utf-8")
    for module in (rope_scaling, positions)  # the second imports from the first
}
F64 = torch.float64
Proof = Callable[[ModuleType], None]


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def close(found: Tensor, wanted: Tensor, tolerance: float) -> bool:
    return found.shape == wanted.shape and bool((found.double() - wanted).abs().max() <= tolerance)


def thetas(dim: int, base: float = 10000.0) -> list[float]:
    return [base ** (-2 * i / dim) for i in range((dim + 1) // 2)]


def sinusoids(where: list[int], d_model: int) -> Tensor:
    def at(p: int, j: int) -> float:
        return (math.cos if j % 2 else math.sin)(p * thetas(d_model)[j // 2])

    return torch.tensor([[at(p, j) for j in range(d_model)] for p in where], dtype=F64)


def turned(x: Tensor, where: Tensor, theta: list[float], layout: str) -> Tensor:
    """x (B, H, L, D) at positions (B, L), its first pairs by the angles p θ_i: pair by pair, in float64."""
    x, R = x.double(), 2 * len(theta)
    y = x.clone()
    for i, t in enumerate(theta):
        a, b = (2 * i, 2 * i + 1) if layout == "interleaved" else (i, i + R // 2)
        angle = (where.double() * t).unsqueeze(1)  # (B, 1, L)
        y[..., a] = x[..., a] * angle.cos() - x[..., b] * angle.sin()
        y[..., b] = x[..., b] * angle.cos() + x[..., a] * angle.sin()
    return y


# the proofs


def proof_table(module: ModuleType) -> None:
    """Equation (2), also for an odd size, an offset, past max_len and far out."""
    for d_model in (7, 8):
        encoding = module.AbsPosEncoding(d_model, max_len=10)
        for offset in (0, 4, 9, 500, 1_000_000):
            where = list(range(offset, offset + 5))
            assert close(encoding.table(5, offset), sinusoids(where, d_model), 1e-9)


def proof_sum(module: ModuleType) -> None:
    """x + PE, out of place, rounded once."""
    for dtype in (F64, torch.float32, torch.bfloat16):
        x = torch.randn(2, 300, 8).to(dtype)
        before, found = x.clone(), module.AbsPosEncoding(8)(x)
        exact = before.double() + sinusoids(list(range(300)), 8)
        assert torch.equal(x, before) and found.dtype == dtype
        assert bool(((found - exact).abs() <= torch.finfo(dtype).eps / 2 * exact.abs() + 1e-7).all())


def proof_rotation(module: ModuleType) -> None:
    """Equation (3) in both layouts, in part, with another base, and its tables."""
    x, where = torch.randn(2, 3, 9, 8, dtype=F64), torch.arange(9).expand(2, 9)
    for layout in ("interleaved", "half"):
        for R in (8, 6):
            for base in (10000.0, 500.0):
                theta = thetas(R, base)
                rotary = module.RotaryPosEncoding(8, base, layout, rotary_dim=R)
                assert close(rotary(x), turned(x, where, theta, layout), 1e-13)
                angle = torch.arange(9, dtype=F64)[:, None] * torch.tensor(theta, dtype=F64)
                cos, sin = rotary.tables(9)
                assert close(cos, angle.cos(), 1e-14) and close(sin, angle.sin(), 1e-14)
                reference = module.rotate(x[..., :R], angle.cos(), angle.sin(), layout)
                assert close(reference, turned(x, where, theta, layout)[..., :R], 1e-13)


def proof_positions(module: ModuleType) -> None:
    """Positions of one's own, per sequence, past max_len and far out; cut into small blocks too."""
    x = torch.randn(2, 3, 4, 8, dtype=F64)
    line, packed = torch.tensor([3, 17, 257, 1_000_000]), torch.tensor([[3, 0, 7, 3], [9, 8, 1, 0]])
    for layout in ("interleaved", "half"):
        rotary = module.RotaryPosEncoding(8, layout=layout, max_len=16)
        for block in (8, 1 << 19):
            module.BLOCK = block
            assert close(rotary(x, line), turned(x, line.expand(2, 4), thetas(8), layout), 1e-8)
            assert close(rotary(x, packed), turned(x, packed, thetas(8), layout), 1e-12)


def proof_precision(module: ModuleType) -> None:
    """In bfloat16 and float32 the result alone is rounded, whoever called first."""
    where = torch.arange(250, 1000, 50)
    for layout in ("interleaved", "half"):
        rotary = module.RotaryPosEncoding(16, layout=layout)
        for dtype, eps in ((torch.bfloat16, 2.0**-8), (torch.float32, 0.0), (F64, 0.0)):
            x = torch.randn(1, 2, len(where), 16).to(dtype)
            exact = turned(x, where.view(1, -1), thetas(16), layout)
            allowed = eps * exact.abs() + (1e-11 if dtype == F64 else 1e-6)
            assert bool(((rotary(x, where).double() - exact).abs() <= allowed).all())


def proof_far_angles(module: ModuleType) -> None:
    """Angles are right in float32 at the millionth position."""
    where = torch.tensor([131_072, 1_000_000])
    x = torch.randn(1, 2, 2, 16)
    for layout in ("interleaved", "half"):
        found = module.RotaryPosEncoding(16, layout=layout)(x, where)
        assert close(found, turned(x, where.view(1, -1), thetas(16), layout), 1e-6)


def proof_first_caller(module: ModuleType) -> None:
    """A call in bfloat16, or a cast of the module, leaves a later one in float64 exact."""
    x = torch.randn(1, 1, 30, 8, dtype=F64)
    added, rotary = module.AbsPosEncoding(8), module.RotaryPosEncoding(8)
    for encoding in (added, rotary):
        encoding.bfloat16()
        encoding(x[0].bfloat16() if encoding is added else x.bfloat16())
    assert close(added(x[0]), x[0] + sinusoids(list(range(30)), 8), 1e-12)
    assert close(rotary(x), turned(x, torch.arange(30).view(1, -1), thetas(8), "interleaved"), 1e-12)


def proof_gradient(module: ModuleType) -> None:
    for layout in ("interleaved", "half"):
        rotary = module.RotaryPosEncoding(6, layout=layout, rotary_dim=4)
        x = torch.randn(1, 2, 3, 6, dtype=F64, requires_grad=True)
        assert torch.autograd.gradcheck(rotary, (x,), raise_exception=False)
        assert torch.autograd.gradgradcheck(rotary, (x,), raise_exception=False)


def proof_evaluate_then_train(module: ModuleType) -> None:
    x = torch.randn(1, 1, 3, 4, requires_grad=True)
    rotary = module.RotaryPosEncoding(4)
    with torch.inference_mode():
        rotary(x)
    rotary(x).sum().backward()
    assert x.grad is not None


def proof_tables_are_copies(module: ModuleType) -> None:
    added, rotary = module.AbsPosEncoding(4), module.RotaryPosEncoding(4)
    for table in (added.table(3), *rotary.tables(3)):
        table.fill_(7)
    assert close(added.table(3), sinusoids([0, 1, 2], 4), 1e-12)
    assert close(rotary.tables(3)[0].square() + rotary.tables(3)[1].square(), torch.ones(3, 2), 1e-12)


def proof_layouts(module: ModuleType) -> None:
    """The two layouts give the same scores once the projections are converted."""
    x, w = torch.randn(1, 5, 6, dtype=F64), torch.randn(2 * 8, 6, dtype=F64)
    for R in (8, 6):

        def scores(layout: str, weight: Tensor, R: int = R) -> Tensor:
            q = module.RotaryPosEncoding(8, layout=layout, rotary_dim=R)
            heads = q((x @ weight.t()).unflatten(-1, (2, 8)).transpose(1, 2))
            return heads @ heads.flip(1).mT

        converted = module.convert_layout(w, 2, "half", R)
        assert close(scores("half", converted), scores("interleaved", w), 1e-12)
        assert torch.equal(module.convert_layout(converted, 2, "interleaved", R), w)


def proof_scaling(module: ModuleType) -> None:
    """The closed forms of linear, dynamic, YaRN and Llama 3."""

    def theta(length: int = 0, **scaling: object) -> tuple[Tensor, float]:
        return module.RotaryPosEncoding(64, scaling=scaling).frequencies(length)

    plain = torch.tensor(thetas(64), dtype=F64)
    assert close(theta(type="linear", factor=4.0)[0] / plain, torch.full((32,), 0.25), 1e-12)
    found, _ = theta(40, type="dynamic", factor=2.0, original_max_position_embeddings=8)
    assert close(found / torch.tensor(thetas(64, 10000 * 9 ** (64 / 62))), torch.ones(32), 1e-6)
    llama = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    turns = 64 * plain / (2 * math.pi)
    found = theta(type="llama3", factor=8.0, **llama)[0] / plain
    smooth = ((turns - 1) / 3).clamp(0, 1)
    assert close(found, smooth + (1 - smooth) / 8, 1e-12)
    found, factor = theta(type="yarn", factor=4.0, original_max_position_embeddings=4096)
    low, high = (64 * math.log(4096 / (n * 2 * math.pi)) / (2 * math.log(10000)) for n in (32, 1))
    ramp = ((torch.arange(32) - math.floor(low)) / (math.ceil(high) - math.floor(low))).clamp(0, 1).double()
    assert close(found / plain, 1 - ramp * 0.75, 1e-6) and math.isclose(factor, 0.1 * math.log(4) + 1)


def proof_dynamic_forgets(module: ModuleType) -> None:
    """`dynamic` depends on the present length, not on an earlier one."""
    scaling = {"type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 4}
    rotary, x = module.RotaryPosEncoding(8, scaling=scaling), torch.randn(1, 1, 20, 8, dtype=F64)
    for length in (20, 10, 3, 20):
        base = 10000 * (2 * max(length, 4) / 4 - 1) ** (8 / 6)
        where = torch.arange(length).view(1, -1)
        assert close(
            rotary(x[:, :, :length]), turned(x[:, :, :length], where, thetas(8, base), "interleaved"), 1e-12
        )


def proof_yarn_norm(module: ModuleType) -> None:
    scaling = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "attention_factor": 1.5}
    x = torch.randn(1, 1, 5, 8, dtype=F64)
    assert close(module.RotaryPosEncoding(8, scaling=scaling)(x).norm(dim=-1), 1.5 * x.norm(dim=-1), 1e-12)


def proof_refusals(module: ModuleType) -> None:
    """A negative position, an odd size and a misspelt key are refused."""
    x = torch.zeros(1, 1, 2, 4)
    scaling = {"type": "linear", "factor": 2.0, "beta_fast": 1.0}
    refused: list[Callable[[], object]] = [
        lambda: module.RotaryPosEncoding(4)(x, torch.tensor([0, -1])),
        lambda: module.RotaryPosEncoding(4)(x, torch.tensor([0.0, 1.0])),
        lambda: module.RotaryPosEncoding(4)(x, torch.tensor([0, 1, 2])),
        lambda: module.AbsPosEncoding(4)(x[0], -1),
        lambda: module.RotaryPosEncoding(3),
        lambda: module.RotaryPosEncoding(4, scaling=scaling),
    ]
    for call in refused:
        try:
            call()
        except ValueError:
            continue
        raise AssertionError("was taken")


PROOFS: list[Proof] = [value for name, value in list(globals().items()) if name.startswith("proof_")]


# the mutants: what is replaced, by what

CIS = "cis.conj().resolve_conj() if backwards else cis"
GATHER = "length, dtype, device)[positions.to(device, torch.int64)]"
MUTANTS: dict[str, tuple[str, str]] = {
    "exponent over D + 2": ("device=device) / dim)", "device=device) / (dim + 2))"),
    "exponent one pair further": ("torch.arange(0, dim, 2, dtype", "torch.arange(2, dim + 2, 2, dtype"),
    "exponent without its 2": ("device=device) / dim)", "device=device) / (2 * dim))"),
    "base ignored": ("return base ** -(", "return 10000.0 ** -("),
    "angle from bfloat16": (
        "positions.double().unsqueeze(-1)",
        "positions.bfloat16().double().unsqueeze(-1)",
    ),
    "angle in float32": (
        "positions.double().unsqueeze(-1) * frequencies",
        "positions.float().unsqueeze(-1) * frequencies.float()",
    ),
    "sine and cosine swapped in the table": ("(angle.sin(), angle.cos())", "(angle.cos(), angle.sin())"),
    "the table by halves": (
        "torch.stack((angle.sin(), angle.cos()), dim=-1).flatten(1)",
        "torch.cat((angle.sin(), angle.cos()), dim=-1)",
    ),
    "embedding scaled by √d_model": ("(x + table)", "(x * math.sqrt(self.d_model) + table)"),
    "added in place": ("(x + table)", "x.add_(table)"),
    "table cast before the addition": ("(x + table).to(x.dtype)", "x + table.to(x.dtype)"),
    "offset ignored": ("[offset:end]", "[:length]"),
    "far positions wrapped": (
        'self._rows(torch.arange(offset, end, device="cpu"))',
        'self._rows(torch.arange(offset, end, device="cpu") % self._cache.max_len)',
    ),
    "tables kept for no dtype": ("self.kept.get((dtype, device))", "next(iter(self.kept.values()), None)"),
    "tables in the dtype of the input": (
        "return torch.float64 if dtype == torch.float64 else torch.float32",
        "return dtype",
    ),
    "tables in float32 throughout": (
        "return torch.float64 if dtype == torch.float64 else torch.float32",
        "return torch.float32",
    ),
    "a table that is a view": ("torch.device(device)).clone()", "torch.device(device))"),
    "kept as inference tensors": ("@torch.inference_mode(False)", "@torch.inference_mode(True)"),
    "sign of the sine, half": ("out_a.addcmul_(x_b, sin, value=-1)", "out_a.addcmul_(x_b, sin)"),
    "turned backwards, interleaved": (f"({CIS},)", "(cis.conj().resolve_conj(),)"),
    "sign of the sine in the reference": ("b * cos + a * sin)", "b * cos - a * sin)"),
    "gradient without the conjugate": (f"({CIS},)", "(cis,)"),
    "gradient without the sign, half": ("-sin if backwards else sin", "sin"),
    "gradient turned forwards": ("not ctx.backwards", "ctx.backwards"),
    "layouts swapped": (
        'if layout == "interleaved":\n        return x[..., 0::2]',
        'if layout == "half":\n        return x[..., 0::2]',
    ),
    "cosine and sine swapped": (
        "(angle.cos() * factor, angle.sin() * factor)",
        "(angle.sin() * factor, angle.cos() * factor)",
    ),
    "attention factor forgotten": (
        "(angle.cos() * factor, angle.sin() * factor)",
        "(angle.cos(), angle.sin())",
    ),
    "θ over dim": (
        "inverse_frequencies(self.rotary_dim, base, device)",
        "inverse_frequencies(self.dim, base, device)[: self.rotary_dim // 2]",
    ),
    "the rest of a head dropped": ("out[..., R:] = x[..., R:]", "out[..., R:] = 0"),
    "positions ignored": ("table = self._at(positions, dtype", "table = self._first(x.shape[2], dtype"),
    "positions wrapped at max_len": (
        f"0 < length <= self.max_len:\n            table = self._first({GATHER}",
        f"length:\n            table = self._first(self.max_len, {GATHER[8:-1]} % self.max_len]",
    ),
    "all sequences at the first one's positions": ("else factor[b] for factor", "else factor[:1] for factor"),
    "every block at the first positions": ("table[..., rows, :]", "table[..., : rows.stop - rows.start, :]"),
    "negative positions taken": ("if lowest < 0:", "if lowest < -1:"),
    "linear scaling upside down": (
        "return theta / factor, 1.0",
        "return theta * factor, 1.0",
    ),
    "dynamic without its exponent": ("stretch ** (dim / (dim - 2))", "stretch"),
    "dynamic that remembers": (
        "self._stretched is None or self._stretched.max_len != length",
        "self._stretched is None",
    ),
    "Llama 3's ramp from the wrong end": ("turns - low_freq_factor", "high_freq_factor - turns"),
    "YaRN's ramp rounded inwards": ("math.floor(low), math.ceil(high)", "math.ceil(low), math.floor(high)"),
    "YaRN's temperature without its tenth": ("0.1 * weight", "weight"),
    "conversion the other way round": ('.view(-1, 2) if to == "half"', '.view(-1, 2) if to != "half"'),
    "conversion across heads": ("[:, order].flatten(0, 1)", "[:, order].transpose(0, 1).flatten(0, 1)"),
    "an unknown key taken": ("if unknown := keys - required - optional:", "if unknown := set():"),
}


def load(sources: dict[str, str]) -> ModuleType:
    """The module of the last source, which finds those before it where it imports them from."""
    with pytest.MonkeyPatch.context() as patch:
        for name, source in sources.items():
            made = ModuleType(name)
            exec(compile(source, name, "exec"), made.__dict__)
            patch.setitem(sys.modules, name, made)
    return made


@pytest.mark.parametrize("proof", PROOFS, ids=lambda proof: proof.__name__)
def test_the_true_module_passes(proof: Proof) -> None:
    proof(load(SOURCES))


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_is_caught(name: str) -> None:
    old, new = MUTANTS[name]
    found = sum(source.count(old) for source in SOURCES.values())
    assert found == 1, f"{old!r} stands in the modules {found} times"
    # which imports: what catches it is a proof
    mutant = load({name: source.replace(old, new) for name, source in SOURCES.items()})
    assert any(fails(proof, mutant) for proof in PROOFS), f"no proof noticed: {name}"


def fails(proof: Proof, mutant: ModuleType) -> bool:
    try:
        proof(mutant)
    except (AssertionError, RuntimeError):  # the latter is torch's own complaint about what the mutant did
        return True
    return False
