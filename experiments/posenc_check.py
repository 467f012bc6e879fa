"""Absolute and rotary positions proved by numbers, seen in pictures and spreadsheets, and learnt with and without.

Before training: a random matrix through each encoding, what is claimed of them held against measured numbers, and
我爱你 / 你爱我 through one attention layer. Then three networks, alike but for the encoding (none, absolute, rotary),
learn who does what to whom from the order of words; after it, how far what they learnt carries to longer sentences.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from matplotlib.axes import Axes
from torch import Tensor, nn

from experiments.data.sentences import (
    FAMILY,
    LONGER,
    WORDS,
    Sentences,
    persons_apart,
    spell,
    with_adverbs_in_front,
)
from experiments.nn import position_claims as claims
from experiments.nn.attention import MultiHeadAttention
from experiments.nn.encoder import ENCODINGS
from experiments.nn.exactness import largest, unit_roundoff
from experiments.nn.positions import AbsPosEncoding, RotaryPosEncoding, inverse_frequencies
from runner import figures
from runner.data import Batch, Data, Split
from runner.metrics import Classification
from runner.spreadsheet import Sheet, column_name
from runner.task import Output, Run, Task

DTYPES = (torch.float64, torch.float32, torch.bfloat16)
BASE = 10000.0
# what the claims are held at
TABLE_LENGTH, CLAIM_DIM = 5000, 64
SHIFTS = (1, 7, 100, 4000)
STARTS, WINDOW = (0, 1000, 32_768, 131_072), 64
LAST = STARTS[-1] + WINDOW
FAR = (0, 1, 2, 63, 1000, 4095, 4096, 32_768, 131_072)  # positions of single vectors
# 我爱你 through one layer
SENTENCE = ("我", "爱", "你")
ORDER = (2, 1, 0)  # 你爱我: which word of 我爱你 stands at each place
WORD_DIM, WORD_HEADS = 16, 2
TELL_APART = 0.01  # the least difference of pooled outputs, relative to an output, that counts as one
EXACT = 1000 * unit_roundoff(torch.float64)  # sums of 16 numbers and a softmax: a few hundred roundings
LEARNT = 0.99  # accuracy
STANDARD_ERRORS = 4.0
MOVES, MOVED_SENTENCES = (0, 4, 8, 16, 32, 48), 1000  # places that test sentences are moved back
DISTANCES = (2, 16, 24, 32, 40, 64)  # of 我 and 你: the first group is what training has seen
COLOURS = dict(zip(ENCODINGS, figures.PALETTE, strict=False))  # those of the curves


Accuracies = dict[str, dict[str, float]]  # by setting, by encoding


class PosEncCheck(Task):
    """Hold the encodings to their claims, and train `model` with each on `data` with `loss`.

    The spreadsheets show a random matrix (length, d_model), with live formulas for the first `formula_rows`
    positions. The claims about trained networks are held from step `claims_from` on.

    Raises:
        ValueError: a size out of range, or data other than `Sentences`.
    """

    def __init__(
        self,
        model: Callable[..., nn.Module],
        data: Data,
        loss: nn.Module,
        length: int = 64,
        d_model: int = 32,
        formula_rows: int = 8,
        claims_from: int = 400,
    ):
        self.model, self.data, self.loss = model, data, loss
        if not isinstance(data, Sentences):
            raise ValueError(
                f"data must be sentences, the task that this experiment is about, not {type(data).__name__}"
            )
        if d_model % 2 or not 2 <= d_model <= 256:  # a spreadsheet takes formulas of up to 8,192 letters
            raise ValueError(f"d_model must be an even number from 2 to 256, not {d_model}")
        for name, value in (("length", length), ("claims_from", claims_from)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")
        if not 0 <= formula_rows <= length:
            raise ValueError(f"formula_rows must lie in [0, length={length}], not {formula_rows}")
        self.length, self.d_model = length, d_model
        self.formula_rows, self.claims_from = formula_rows, claims_from

    def build(self, run: Run) -> dict[str, nn.Module]:
        """One network per encoding, from the same initial weights."""
        assert self.data is not None
        sizes = {"num_tokens": len(WORDS), "num_classes": len(self.data.class_names)}
        self.networks: dict[str, nn.Module] = {
            encoding: self.model(**sizes, encoding=encoding) for encoding in ENCODINGS
        }
        first = self.networks[ENCODINGS[0]].state_dict()
        for network in self.networks.values():
            network.load_state_dict(first)
        return self.networks

    def train(self, batch: Batch) -> dict[str, Output]:
        """The loss of each network on a batch of sentences (B, L)."""
        logits = {name: network(batch.inputs) for name, network in self.networks.items()}  # (B, C) each
        return {name: Output(self.loss(z, batch.targets), z, batch.targets) for name, z in logits.items()}

    def before(self, run: Run) -> None:
        """What holds without any training."""
        self.write_spreadsheets(run)
        check_absolute(run)
        check_rotary(run)
        check_word_order(run)
        draw_encoding(run)
        draw_similarity(run)
        draw_wavelengths(run)
        draw_rotation(run)
        draw_decay(run)

    def after(self, run: Run) -> None:
        """What the networks have learnt, and how far it carries."""
        counts = self.confusions(run, "test")
        if run.step >= self.claims_from:
            self.check_trained(run, counts)
        assert self.data is not None
        names = self.data.class_names
        panels = {f"{name}: accuracy {accuracy(c):.3f}": c for name, c in counts.items()}
        run.figure("confusion", figures.confusion_matrices(panels, names))
        self.show_answers(run)
        self.draw_generalisation(run)

    def write_spreadsheets(self, run: Run) -> None:
        """The random matrix through each encoding, with formulas."""
        x = torch.randn(self.length, self.d_model, dtype=torch.float64, generator=run.generator("matrix"))
        absolute = AbsPosEncoding(self.d_model, max_len=self.length)
        rotary = RotaryPosEncoding(self.d_model, BASE, max_len=self.length)
        theta, positions = inverse_frequencies(self.d_model, BASE), torch.arange(self.length)
        rows = self.formula_rows
        run.spreadsheet(
            "abs_pos_encoding",
            table_sheets(absolute.table(self.length), theta.repeat_interleave(2), ("SIN", "COS"), rows)
            | {"x": matrix_sheet(x), "x + encoding": matrix_sheet(absolute(x[None])[0])},
        )
        cos, sin = rotary.tables(self.length)
        run.spreadsheet("cos_pos_encoding", table_sheets(cos, theta, ("COS",), rows))
        run.spreadsheet("sin_pos_encoding", table_sheets(sin, theta, ("SIN",), rows))
        turned = claims.turn(rotary, x, positions)
        run.spreadsheet(
            "rotary_example",
            {
                "rotation": rotation_sheet(x[:rows], turned[:rows], cos, sin),
                "x": matrix_sheet(x),
                "x rotated": matrix_sheet(turned),
            },
        )

    def confusions(self, run: Run, split: str) -> dict[str, Tensor]:
        """Confusion counts (C, C) of each network on a split."""
        assert self.data is not None
        classes = len(self.data.class_names)
        meters = {name: Classification(classes).to(run.device) for name in self.networks}
        with run.inference("confusions", split):
            for batch in run.batches(split):
                assert batch.targets is not None
                for name, output in self.train(batch).items():
                    assert output.logits is not None
                    meters[name].update(output.logits, batch.targets)
        return {name: meter.confusion.cpu() for name, meter in meters.items()}

    def check_trained(self, run: Run, counts: dict[str, Tensor]) -> None:
        """Without positions there is nothing to learn; with either encoding the task is learnt."""
        chance = 1 / len(counts["none"])
        error = math.sqrt(chance * (1 - chance) / float(counts["none"].sum()))
        run.check(
            "trained_none",
            f"without positions nothing is learnt: |test accuracy − chance, {chance:.2f}|",
            abs(accuracy(counts["none"]) - chance),
            STANDARD_ERRORS * error,
        )
        for name in ("absolute", "rotary"):
            claim = f"with {name} positions who does what to whom is learnt: test accuracy"
            run.check(f"trained_{name}", claim, accuracy(counts[name]), LEARNT, at_least=True)

    def show_answers(self, run: Run) -> None:
        """What each network says of the first two families of the test set."""
        assert self.data is not None
        names, split = self.data.class_names, run.splits["test"]
        tokens = split.inputs[: 2 * FAMILY]
        assert split.targets is not None
        with run.inference("answers"):
            answers = [network(tokens).argmax(1).tolist() for network in self.networks.values()]
        rows = [
            [spell(sentence), names[target], *(names[answer] for answer in said)]
            for sentence, target, *said in zip(
                tokens, split.targets[: 2 * FAMILY].tolist(), *answers, strict=True
            )
        ]
        run.table("answers", ["sentence", "says", *self.networks], rows)

    def by_length(self, run: Run) -> Accuracies:
        """Accuracy on sentences of each length, longer than those of training."""
        assert isinstance(self.data, Sentences)
        return {f"{n}": means(self.hits(run, run.splits[LONGER.format(n)])) for n in self.data.lengths}

    def by_move(self, run: Run) -> Accuracies:
        """Accuracy on test sentences that stand further back, behind adverbs, each as long as before."""
        test, found = run.splits["test"], {}
        count = FAMILY * (MOVED_SENTENCES // FAMILY)
        for places in MOVES:
            inputs = with_adverbs_in_front(test.inputs[:count], places, run.generator("moved", places))
            assert test.targets is not None
            found[f"{places}"] = means(self.hits(run, Split(inputs, test.targets[:count])))
        return found

    def by_distance(self, run: Run) -> Accuracies:
        """Accuracy on the longest sentences by how far 我 and 你 are apart."""
        assert isinstance(self.data, Sentences)
        split = run.splits[LONGER.format(max(self.data.lengths))]
        hits, apart = self.hits(run, split), persons_apart(split.inputs).cpu()
        found = {}
        for low, high in pairwise(DISTANCES):
            there = (apart >= low) & (apart < high)
            if there.any():
                found[f"{low}–{high - 1}"] = means({name: hit[there] for name, hit in hits.items()})
        return found

    def hits(self, run: Run, split: Split) -> dict[str, Tensor]:
        """Which sentences (N,) each network understands, on the CPU."""
        assert self.data is not None and split.targets is not None
        size, found = self.data.eval_batch_size, {}
        with run.inference("hits"):
            for name, network in self.networks.items():
                answers = [network(inputs).argmax(1) for inputs in split.inputs.split(size)]
                found[name] = (torch.cat(answers) == split.targets).cpu()
        return found

    def draw_generalisation(self, run: Run) -> None:
        """How far what was learnt carries: in length, in place, in distance."""
        assert isinstance(self.data, Sentences)
        if not self.data.lengths:
            return
        panels = {
            "length": (self.by_length(run), "words in the sentence"),
            "place": (self.by_move(run), "adverbs put in front of it"),
            "distance": (self.by_distance(run), "places from 我 to 你"),
        }
        titles = (
            f"longer than in training ({self.data.max_length} at most)",
            "as in training, but further back",
            f"{max(self.data.lengths)} words, by the distance that counts",
        )
        figure, [row] = figures.new(1, 3, (12.6, 4.0), sharey=True)
        for axes, title, (name, (found, label)) in zip(row, titles, panels.items(), strict=True):
            draw_accuracies(axes, found)
            axes.set(title=title, xlabel=label)
            rows = [[x, *(values[e] for e in ENCODINGS)] for x, values in found.items()]
            run.table(f"{name}_generalisation", [label, *ENCODINGS], rows)
        row[0].set_ylabel("accuracy")
        figure.legend(*row[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(ENCODINGS))
        run.figure("length_generalisation", figure)


def means(hits: dict[str, Tensor]) -> dict[str, float]:
    """The share of True in each."""
    return {name: float(hit.double().mean()) for name, hit in hits.items()}


def draw_accuracies(axes: Axes, found: Accuracies) -> None:
    """A line per encoding over the settings in `found`, numbers or ranges such as 2–15, drawn in their middle."""
    ranges = [[float(end) for end in setting.split("–")] for setting in found]
    places = [(ends[0] + ends[-1]) / 2 for ends in ranges]
    for name in ENCODINGS:
        colour, heights = COLOURS[name], [values[name] for values in found.values()]
        axes.plot(places, heights, "o-", color=colour, label=name)
        lows, highs = [ends[0] for ends in ranges], [ends[-1] for ends in ranges]
        axes.hlines(heights, lows, highs, color=colour, linewidth=4, alpha=0.3)
    axes.set_xticks(places, list(found))
    axes.set_ylim(0, 1.04)


def accuracy(confusion: Tensor) -> float:
    """The share of counts (C, C) on the diagonal."""
    return float(confusion.diagonal().sum().double() / confusion.sum())


# checks


def check_absolute(run: Run) -> None:
    """Equations (1) and (2) of position_claims, and the closed form in each dtype."""
    encoding = AbsPosEncoding(CLAIM_DIM, max_len=TABLE_LENGTH).eval()
    wanted = claims.sinusoids(TABLE_LENGTH, CLAIM_DIM)
    for dtype in DTYPES:
        run.check(
            f"absolute_closed_form_{short(dtype)}",
            f"PE is sin and cos of p θ_i, p < {TABLE_LENGTH:,}",
            claims.table_error(encoding, wanted, dtype, device_of(run, dtype)),
            claims.table_tolerance(dtype, TABLE_LENGTH),
        )
    table = encoding.table(TABLE_LENGTH)
    exact = claims.table_tolerance(torch.float64, TABLE_LENGTH)
    # PE(p), the entries of M_k and PE(p + k) are each off by `exact` at most: (1 + 2 √2) of it
    claim = f"PE(p + k) = M_k PE(p), k = {', '.join(map(str, SHIFTS))}"
    run.check("absolute_shift", claim, claims.shift_error(table, SHIFTS), 4 * exact)
    # a sum over D products, relative to D / 2
    claim = "PE(p)·PE(q) = Σ cos((p − q) θ_i), and so ‖PE‖² = D/2"
    tolerance = 4 * exact + CLAIM_DIM * unit_roundoff(torch.float64)
    run.check("absolute_similarity", claim, claims.similarity_error(table[:512]), tolerance)


def check_rotary(run: Run) -> None:
    """Equations (3) and (4) of position_claims in each dtype, and the two layouts."""
    interleaved = RotaryPosEncoding(CLAIM_DIM, BASE)
    half = RotaryPosEncoding(CLAIM_DIM, BASE, layout="half")
    far = torch.tensor(FAR)
    x = torch.randn(len(FAR), CLAIM_DIM, dtype=torch.float64, generator=run.generator("vectors"))
    for dtype in DTYPES:
        name, y = short(dtype), x.to(device_of(run, dtype), dtype)
        tolerance = claims.rotation_tolerance(dtype, LAST)
        found = [claims.rotation_error(rotary, y, far, BASE, rotary.layout) for rotary in (interleaved, half)]
        run.check(f"rotary_closed_form_{name}", "R_m x is the matrix times x", largest(found), tolerance)
        error = claims.norm_error(interleaved, y, far)
        run.check(f"rotary_norm_{name}", "‖R_m x‖ = ‖x‖", error, tolerance)
    # R_m R_n x and R_{m+n} x: three rotations
    error = claims.composition_error(interleaved, x, far, far.flip(0))
    tolerance = 3 * claims.rotation_tolerance(torch.float64, LAST)
    run.check("rotary_composition", "R_m R_n = R_{m+n}", error, tolerance)
    same, apart = claims.layout_errors(interleaved, half, x, far)
    tolerance = 2 * claims.rotation_tolerance(torch.float64, LAST)
    run.check("rotary_layouts", "interleaved = half after the permutation", same, tolerance)
    run.check("rotary_layouts_differ", "and without it they are not", apart, TELL_APART, at_least=True)
    check_relative(run, interleaved, half)


def check_relative(run: Run, interleaved: RotaryPosEncoding, half: RotaryPosEncoding) -> None:
    """⟨R_m q, R_n k⟩ over all (m, n) of every window depends on m − n alone, per dtype; and the picture of it."""
    q, k = torch.randn(2, CLAIM_DIM, dtype=torch.float64, generator=run.generator("query and key"))
    errors = {}
    for dtype in DTYPES:
        q_, k_ = (vector.to(device_of(run, dtype), dtype) for vector in (q, k))
        scores = [claims.window_scores(rotary, q_, k_, STARTS, WINDOW) for rotary in (interleaved, half)]
        run.check(
            f"rotary_relative_{short(dtype)}",
            f"⟨R_m q, R_n k⟩ depends on m − n alone: spread over windows at 0 to {STARTS[-1]:,}",
            largest(float(claims.relative_spread(found).max()) for found in scores),
            4 * claims.rotation_tolerance(dtype, LAST),  # two scores, and two turned vectors in each
        )
        exact = claims.exact_scores(interleaved, q_, k_, WINDOW)  # of the operands as the dtype has them
        rotations = {"float64": scores[0]}
        if dtype != torch.float64:
            naive = claims.angles_in_dtype(CLAIM_DIM, BASE)
            rotations[short(dtype)] = claims.window_scores(naive, q_, k_, STARTS, WINDOW)
        for angles, found in rotations.items():
            errors[short(dtype), angles] = (found - exact).abs().amax((1, 2)).tolist()
    header = ["dtype", "angles in", *(f"window at {start:,}" for start in STARTS)]
    run.table("relative_position", header, [[*names, *values] for names, values in errors.items()])
    draw_relative(run, claims.window_scores(interleaved, q, k, STARTS, WINDOW), errors)


@dataclass(frozen=True)
class Reordered:
    """What one layer makes of three words, in both orders."""

    title: str
    outputs: Tensor  # (L, D) of 我爱你
    reordered: Tensor  # (L, D) of 你爱我

    @property
    def pooled(self) -> float:
        return claims.pooled_difference(self.outputs, self.reordered)

    @property
    def tokens(self) -> Tensor:
        return claims.token_differences(self.outputs, self.reordered, ORDER)


def check_word_order(run: Run) -> None:
    """我爱你 and 你爱我 through one attention layer: equation (5), and what breaks it."""
    setups = {setup.title: setup for setup in reordered_setups(run)}
    none = setups.pop("no positions")
    run.check(
        "order_none_tokens",
        "no positions, no mask: 你爱我 gives the vectors of 我爱你 in other places",
        float(none.tokens.max()),
        EXACT,
    )
    run.check("order_none_pooled", "and so the same mean", none.pooled, EXACT)
    for title, setup in setups.items():
        name = f"order_{title.split()[0]}"
        run.check(name, f"{title}: the means differ", setup.pooled, TELL_APART, at_least=True)
    draw_word_order(run, [none, *setups.values()])


@torch.no_grad()
def reordered_setups(run: Run) -> Iterator[Reordered]:
    """The two orders without positions, with either encoding, and with a causal mask alone."""
    words = torch.randn(len(SENTENCE), WORD_DIM, dtype=torch.float64, generator=run.generator("words"))
    plain = seeded_attention(run)
    turning = seeded_attention(run, RotaryPosEncoding(WORD_DIM // WORD_HEADS, BASE))
    adding = AbsPosEncoding(WORD_DIM).eval()

    def both(title: str, layer: Callable[[Tensor], Tensor]) -> Reordered:
        return Reordered(title, layer(words[None])[0], layer(words[list(ORDER)][None])[0])

    def attend(attention: MultiHeadAttention, x: Tensor, causal: bool = False) -> Tensor:
        output, _ = attention(x, x, x, causal=causal, need_weights=False)
        return output

    yield both("no positions", lambda x: attend(plain, x))
    yield both("absolute positions", lambda x: attend(plain, adding(x)))
    yield both("rotary positions", lambda x: attend(turning, x))
    yield both("causal mask alone", lambda x: attend(plain, x, causal=True))


def seeded_attention(run: Run, rotary: nn.Module | None = None) -> MultiHeadAttention:
    """A float64 layer with random weights, the same at every call."""
    attention = MultiHeadAttention(WORD_DIM, WORD_HEADS, rotary=rotary).double().eval()
    random = run.generator("attention")
    for parameter in attention.parameters():
        parameter.copy_(torch.randn(parameter.shape, dtype=torch.float64, generator=random))
        parameter.div_(math.sqrt(WORD_DIM))
    return attention


def short(dtype: torch.dtype) -> str:
    """float32 for torch.float32."""
    return str(dtype).removeprefix("torch.")


def device_of(run: Run, dtype: torch.dtype) -> torch.device:
    """Where a claim in `dtype` is measured: float64, which not every device has, on the CPU."""
    return torch.device("cpu") if dtype == torch.float64 else run.device


# spreadsheets


def table_sheets(values: Tensor, theta: Tensor, functions: Sequence[str], rows: int) -> dict[str, Sheet]:
    """A table (L, n) of functions of p θ_c, θ (n,): whole, and its first rows with a formula beside each number."""
    n, D = values.shape[1], 2 * values.shape[1] // len(functions)
    names = [functions[c % len(functions)] for c in range(n)]
    pairs = [c // len(functions) for c in range(n)]
    top = [["dimension", *range(n)]] if len(functions) == 2 else []
    table = Sheet(
        header=[
            *top,
            ["pair i", *pairs],
            ["θ_i", *theta.tolist()],
            ["wavelength 2π/θ_i", *(2 * math.pi / theta).tolist()],
            ["position", *(name.lower() for name in names)],
        ],
        rows=[[p, *row] for p, row in enumerate(values.tolist())],
        notes=[
            f"table: a row per position; each number is the sine or cosine of position · θ_i. D = {D}.",
            "θ_i = 10000^(−2i/D) are the radians per position; a pair has turned once after 2π/θ_i positions.",
            "recompute: the first positions, with a formula beside each stored number; column B sums what is between.",
        ],
    )
    return {"table": table, "recompute": recompute_sheet(values[:rows], names, pairs, top, D)}


def recompute_sheet(
    values: Tensor, names: Sequence[str], pairs: Sequence[int], top: list[list[Any]], D: int
) -> Sheet:
    """Two columns per column of a table (P, n): the stored numbers, and formulas from θ_i in the header."""
    n = len(names)
    columns = [(column_name(2 * c + 2), column_name(2 * c + 3)) for c in range(n)]  # stored and formula
    pair, theta = len(top) + 1, len(top) + 2  # their lines
    header: list[list[Any]] = [
        *([row[0], None, *spaced(row[1:])] for row in top),
        ["pair i", None, *spaced(pairs)],
        ["θ_i", None, *spaced([f"={BASE:.0f}^(-2*{stored}{pair}/{D})" for stored, _ in columns])],
        ["wavelength 2π/θ_i", None, *spaced([f"=2*PI()/{stored}{theta}" for stored, _ in columns])],
        [
            "position",
            "Σ |stored − formula|",
            *(f"{name.lower()}{end}" for name in names for end in ("", ", formula")),
        ],
    ]
    body = []
    for p, row in enumerate(values.tolist()):
        line = len(header) + 1 + p
        total = "+".join(f"ABS({stored}{line}-{formula}{line})" for stored, formula in columns)
        cells = [
            (value, f"={name}($A{line}*{stored}${theta})")
            for value, name, (stored, _) in zip(row, names, columns, strict=True)
        ]
        body.append([p, f"={total}", *(cell for both in cells for cell in both)])
    return Sheet(header, body, frozen_columns=2, formats={1: "0.0E+00"})


def rotation_sheet(x: Tensor, turned: Tensor, cos: Tensor, sin: Tensor) -> Sheet:
    """Each pair of x (P, D) and what it is turned to (P, D), a line per position and pair, with formulas."""
    twice = [name for name in ("cos", "sin", "rotated 2i", "rotated 2i+1") for _ in range(2)]
    header: list[list[Any]] = [
        ["position", "pair i", "θ_i", "angle", "x_2i", "x_2i+1", *twice, "largest difference"],
        [None, None, "formula", "formula", "stored", "stored", *("stored", "formula") * 4, None],
    ]
    D = x.shape[1]
    body = [
        rotation_line(p, i, len(header) + 1 + p * (D // 2) + i, x, turned, cos, sin)
        for p in range(len(x))
        for i in range(D // 2)
    ]
    notes = [
        "rotation: a line per position p and pair i of x; the pair (x_2i, x_2i+1) is turned by the angle p θ_i:",
        "    rotated 2i = x_2i cos − x_2i+1 sin        rotated 2i+1 = x_2i+1 cos + x_2i sin",
        "x and x rotated: the whole matrix before and after, a line per position.",
    ]
    return Sheet(header, body, frozen_columns=2, formats={14: "0.0E+00"}, notes=notes)


def rotation_line(
    p: int, i: int, line: int, x: Tensor, turned: Tensor, cos: Tensor, sin: Tensor
) -> list[Any]:
    """Line `line` of the sheet: pair i of position p."""
    a, b = 2 * i, 2 * i + 1
    differences = ",".join(
        f"ABS({stored}{line}-{formula}{line})" for stored, formula in ("GH", "IJ", "KL", "MN")
    )
    return [
        *(p, i, f"={BASE:.0f}^(-2*B{line}/{x.shape[1]})", f"=A{line}*C{line}"),
        *(float(x[p, a]), float(x[p, b])),
        *(float(cos[p, i]), f"=COS(D{line})", float(sin[p, i]), f"=SIN(D{line})"),
        *(float(turned[p, a]), f"=E{line}*G{line}-F{line}*I{line}"),
        *(float(turned[p, b]), f"=F{line}*G{line}+E{line}*I{line}"),
        f"=MAX({differences})",
    ]


def matrix_sheet(values: Tensor) -> Sheet:
    """A matrix (L, D), a row per position."""
    body = [[p, *row] for p, row in enumerate(values.tolist())]
    return Sheet([["position", *range(values.shape[1])]], body)


def spaced(cells: Sequence[Any]) -> list[Any]:
    """Each cell with an empty one behind it."""
    return [cell for value in cells for cell in (value, None)]


# pictures


def draw_encoding(run: Run) -> None:
    """The table as a heat map, and four of its columns as waves."""
    D, L = CLAIM_DIM, 100
    table = AbsPosEncoding(D).table(L)
    figure, [[left, right]] = figures.new(1, 2, (11.0, 4.2), gridspec_kw={"width_ratios": (1.25, 1)})
    image = figures.heat_map(left, table, limits=(-1, 1), diverging=True)
    figure.colorbar(image, ax=left, pad=0.02)
    left.set(title="PE(p): fast waves left, slow ones right", xlabel="dimension (even: sin, odd: cos)")
    left.set_ylabel("position p")
    for number, (c, style) in enumerate({0: ".-", 8: "-", 16: "-", 32: "-"}.items()):  # dots are positions
        wavelength = float(2 * math.pi / inverse_frequencies(D)[c // 2])
        label = f"{c}, wavelength {wavelength:.3g}"
        right.plot(table[:, c], style, color=figures.PALETTE[number], label=label, linewidth=1.2)
    right.set(title="four of its dimensions", xlabel="position p", ylim=(-1.1, 1.6), yticks=(-1, 0, 1))
    right.legend(ncols=2, loc="upper center")
    run.figure("encoding_table", figure)


def draw_similarity(run: Run) -> None:
    """PE(p) · PE(q): a function of the distance alone."""
    D, L = CLAIM_DIM, 100
    table = AbsPosEncoding(D).table(L)
    similarity = table @ table.t() / (D / 2)
    figure, [[left, right]] = figures.new(1, 2, (10.4, 4.2), gridspec_kw={"width_ratios": (1.1, 1)})
    image = figures.heat_map(left, similarity)
    figure.colorbar(image, ax=left, pad=0.02)
    left.set(title="PE(p)·PE(q) over D/2: the same along each diagonal")
    left.set(xlabel="position q", ylabel="position p")
    for number, p in enumerate((0, 25, 50, 99)):
        right.plot(
            torch.arange(L) - p, similarity[p], color=figures.PALETTE[number], label=f"p = {p}", linewidth=1.2
        )
    right.set(title="rows as a function of the distance lie on each other", xlabel="distance q − p")
    right.legend()
    run.figure("encoding_similarity", figure)


def draw_wavelengths(run: Run) -> None:
    """2π/θ_i per pair, against lengths that matter."""
    theta = inverse_frequencies(CLAIM_DIM, BASE)
    waves = 2 * math.pi / theta
    figure, [[axes]] = figures.new(size=(6.8, 4.0))
    axes.plot(waves, "o", color=figures.BLUE)
    for length in (16, 512, TABLE_LENGTH):
        whole = int((waves <= length).sum())
        axes.axhline(length, color=figures.GREY, linewidth=1, linestyle=":")
        left = whole > len(waves) / 3  # room for a note where the points are not
        axes.annotate(
            f"{whole} of {len(waves)} pairs turn within {length:,} positions",
            (-0.5 if left else len(waves) - 0.5, length),
            (0, 3),
            textcoords="offset points",
            fontsize=8,
            ha="left" if left else "right",
        )
    axes.set(title="wavelengths in a geometric series, from 6 positions to 47,000")
    axes.set(
        xlabel=f"pair i of D/2 = {len(waves)}", ylabel=r"2π/$\theta_i$, positions per turn", yscale="log"
    )
    run.figure("wavelengths", figure)


HANDS = (0, 2, 4, 6)  # pairs of 32 dimensions: a turn in 6, 20, 63 and 199 positions
HANDS_DIM = 32
APART = 3  # positions between query and key in the animation


def unit_turns(positions: Tensor) -> Tensor:
    """Where the encoding takes (1, 0) of each pair: positions (L,) → (L, D/2, 2)."""
    x = torch.tensor([1.0, 0.0], dtype=torch.float64).repeat(len(positions), HANDS_DIM // 2)
    return claims.turn(RotaryPosEncoding(HANDS_DIM, BASE), x, positions).unflatten(1, (-1, 2))


def circle(axes: Axes, title: str) -> None:
    """A unit circle to draw on."""
    turn = torch.linspace(0, 2 * math.pi, 200)
    axes.plot(turn.cos(), turn.sin(), color=figures.FAINT, linewidth=1.5, zorder=0)
    axes.set(title=title, xlim=(-1.25, 1.25), ylim=(-1.25, 1.25), aspect="equal", xticks=(), yticks=())
    axes.spines[["left", "bottom"]].set_visible(False)


def draw_rotation(run: Run) -> None:
    """One pair in the plane over positions, for four pairs; and the same as clocks that run."""
    L = 16
    points = unit_turns(torch.arange(L))
    figure, [row] = figures.new(1, len(HANDS), (12.0, 3.5))
    for axes, i in zip(row, HANDS, strict=True):
        theta = float(inverse_frequencies(HANDS_DIM, BASE)[i])
        circle(axes, f"pair {i}: θ = {theta:.3g}, a turn in {2 * math.pi / theta:.0f}")
        x, y = points[:, i].unbind(1)
        axes.plot(x, y, color=figures.GREY, linewidth=0.6)
        dots = axes.scatter(x, y, c=range(L), cmap="viridis", s=42, zorder=3)
        for p in (0, L - 1):
            axes.annotate(
                str(p), (1.14 * float(x[p]), 1.14 * float(y[p])), ha="center", va="center", fontsize=8
            )
    figure.colorbar(dots, ax=row, label="position p", pad=0.01)
    run.figure("rotation", figure)
    animate_rotation(run)


def animate_rotation(run: Run) -> None:
    """Left, a query and a key 3 positions apart turn together; right, four pairs as the hands of a clock."""
    frames = 20  # a whole turn of the pair on the left
    turns = unit_turns(torch.arange(frames + APART))
    figure, [[left, right]] = figures.new(1, 2, (7.2, 4.1), layout=None)
    figure.subplots_adjust(0.02, 0.09, 0.98, 0.92, wspace=0.08)
    circle(left, "")
    circle(right, "")
    shown = HANDS[1]
    query, key = (
        left.plot([], [], "o-", linewidth=2.5, markersize=6, color=colour, label=label)[0]
        for colour, label in ((figures.INK, "query, $R_m q$"), (figures.PURPLE, "key, $R_n k$"))
    )
    left.legend(loc="lower center", ncols=2, bbox_to_anchor=(0.5, -0.1))
    hands = [
        right.plot([], [], "o-", linewidth=2, markersize=4, color=figures.PALETTE[n], label=f"pair {i}")[0]
        for n, i in enumerate(HANDS)
    ]
    right.legend(loc="lower center", ncols=4, bbox_to_anchor=(0.5, -0.1), columnspacing=1, handlelength=1)

    def draw(p: int) -> None:
        for line, place in ((query, p + APART), (key, p)):
            point = turns[place, shown]
            line.set_data([0, float(point[0])], [0, float(point[1])])
        for hand, i in zip(hands, HANDS, strict=True):
            hand.set_data([0, float(turns[p, i, 0])], [0, float(turns[p, i, 1])])
        score = float(turns[p + APART, shown] @ turns[p, shown])
        left.set_title(f"pair {shown}, m = {p + APART:2d}, n = {p:2d}: score {score:.3f}")
        right.set_title(f"four pairs, position {p:2d}")

    run.animation("turning", figure, draw, frames, fps=6)


def draw_relative(run: Run, scores: Tensor, errors: dict[tuple[str, str], list[float]]) -> None:
    """Scores (S, W, W) of a window near and one far out, and how exact they are by dtype and dtype of the angles."""
    figure, [row] = figures.new(1, 3, (13.2, 4.2), gridspec_kw={"width_ratios": (1, 1, 1.25)})
    limit = float(scores.abs().max())
    for axes, window in zip(row, (0, -1), strict=False):
        start = STARTS[window]
        image = figures.heat_map(axes, scores[window], limits=(-limit, limit), diverging=True)
        axes.set(title=rf"$\langle R_m q, R_n k\rangle$, window at {start:,}")
        axes.set(xlabel=f"n − {start:,}" if start else "n", ylabel=f"m − {start:,}" if start else "m")
    figure.colorbar(image, ax=row[1], pad=0.02)
    colours = dict(zip(map(short, DTYPES), (figures.INK, figures.BLUE, figures.VERMILION), strict=True))
    for (dtype, angles), values in errors.items():
        style, label = "o-" if angles == "float64" else "x--", f"{dtype}, angles in {angles}"
        row[2].plot(range(len(STARTS)), values, style, color=colours[dtype], label=label)
    row[2].set_xticks(range(len(STARTS)), [f"{start:,}" for start in STARTS])
    row[2].set(title="what the score is off at most", xlabel="start of the window", yscale="log")
    row[2].set(ylabel="error / ‖q‖‖k‖", ylim=(1e-17, 1e4))
    row[2].legend(loc="upper left", ncols=2, fontsize=7)
    run.figure("relative_position", figure)


def draw_decay(run: Run) -> None:
    """The score over the distance: of a query that equals its key, and of two that are independent."""
    D, N, L = CLAIM_DIM, 200, 257
    rotary, distances = RotaryPosEncoding(D, BASE), torch.arange(L)
    q, k = torch.randn(2, N, D, dtype=torch.float64, generator=run.generator("decay"))
    alike = claims.scores_by_distance(rotary, q, q, distances)  # (N, L)
    independent = claims.scores_by_distance(rotary, q, k, distances)
    figure, [[left, right]] = figures.new(1, 2, (11.0, 4.0), sharey=True)
    for axes, scores, colour in ((left, alike, figures.BLUE), (right, independent, figures.VERMILION)):
        low, high = scores.quantile(torch.tensor([0.05, 0.95], dtype=torch.float64), dim=0)
        axes.fill_between(distances, low, high, color=colour, alpha=0.2, label=f"90 % of {N} pairs")
        axes.plot(distances, scores.mean(0), color=colour, label="mean")
        axes.set_xlabel("distance m − n")
    left.plot(
        distances,
        claims.decay_bound(D, distances),
        color=figures.INK,
        linewidth=1,
        linestyle="--",
        label="shape of RoFormer's bound: mean $|S_j|$",
    )
    left.set(title="key = query: the score decays", ylabel=r"$\langle R_m q, R_n k\rangle$ / ‖q‖‖k‖")
    right.set(title="independent key and query: nothing decays")
    for axes in (left, right):
        axes.legend(loc="upper right")
    run.figure("rotary_decay", figure)


def draw_word_order(run: Run, setups: Sequence[Reordered]) -> None:
    """The outputs of both orders as rows, a line from each word to itself in the other order."""
    figure, grid = figures.new(2, 2, (11.0, 6.4))
    for axes, setup in zip(grid.flat, setups, strict=True):
        draw_reordered(axes, setup)
    figure.suptitle("我爱你 and 你爱我 through one attention layer with random weights", x=0.01, ha="left")
    run.figure("word_order", figure)


def draw_reordered(axes: Axes, setup: Reordered) -> None:
    """One panel: 我爱你 left, 你爱我 right, green lines between equal vectors, red ones between others."""
    L, D = setup.outputs.shape
    gap = D // 2
    space = torch.full((L, gap), math.nan, dtype=torch.float64)
    figures.heat_map(axes, torch.cat((setup.outputs, space, setup.reordered), 1), diverging=True)
    for place, word in enumerate(ORDER):
        difference = float(setup.tokens[word])
        equal = difference <= EXACT
        colour = figures.GREEN if equal else figures.VERMILION
        axes.plot((D - 0.4, D + gap - 0.6), (word, place), color=colour, linewidth=2)
        for x, y, side in ((-0.9, word, "right"), (2 * D + gap - 0.1, place, "left")):
            axes.text(x, y, SENTENCE[word], ha=side, va="center", fontsize=13)
        text = "=" if equal else f"≠ {difference:.2f}"
        axes.text(*(2 * D + gap + 2.2, place, text), color=colour, va="center", fontsize=9, fontweight="bold")
    axes.set(title=setup.title, xticks=(), yticks=(), xlim=(-2.5, 2 * D + gap + 7))
    axes.spines[["left", "bottom"]].set_visible(False)
    verdict = "the order is lost" if setup.pooled <= EXACT else "the order is seen"
    apart = f"{setup.pooled:.2f}" if setup.pooled > TELL_APART else f"{setup.pooled:.0e}"
    axes.set_xlabel(f"{verdict}: the means over the words are {apart} of a vector apart", loc="left")
