"""Attention taken apart: its five steps in numbers, why scores are divided by √d_k, and what heads are for.

Before training a random matrix goes through the five steps under every kind of mask, and each claim about them is
checked. Then networks that differ in their number of heads alone learn to look up two values at once, which one
head cannot do; their attention maps before and after, and each head taken out, show what the heads have learnt.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn

from experiments.data.lookups import Lookups, places_asked
from experiments.nn import attention_claims as claims
from experiments.nn.attention import AttentionSteps, MultiHeadAttention, attention_steps
from experiments.nn.exactness import largest, rounding
from experiments.nn.lookup_net import LookupNet, silence
from experiments.nn.masks import causal_mask
from runner import figures
from runner.data import Batch, Data
from runner.spreadsheet import Sheet, column_name
from runner.streams import reseed, seed_of
from runner.task import Output, Run, Task

SENTENCE = ("I", "love", "you", "very", "much")
PADDED = (*SENTENCE, "‹pad›", "‹pad›")
TARGET = ("我", "非常", "爱", "你")  # asks SENTENCE, as a translation does
STEPS = ("1 scores  q·k", "2 scaled  ÷ √$d_k$", "3 masked", "4 weights  softmax", "5 output  Σ weight · v")
KEYS = 8  # per query, where scores are drawn by chance
SIZES = (16, 32, 64, 128, 256, 512, 1024)  # d_k
ERRORS = 5  # standard errors that a mean over random scores may be off: one in two million would be
CEILING = 0.75  # of one head, see experiments/nn/lookup_net.py
QUESTIONS = ("the value at a position", "the value that a symbol marks")
SLOTS = ("the slot at the position asked for", "the slot that bears the symbol asked for")
COLOURS = (figures.ORANGE, figures.PURPLE)  # of the two questions; to be seen on white and on blue
Found = dict[int, claims.ScoreStatistics]  # by d_k


@dataclass(frozen=True)
class Case:
    """Who asks whom, and what is masked."""

    name: str
    title: str
    queries: tuple[str, ...]
    source: tuple[str, ...]
    padding: bool = False
    causal: bool = False

    @property
    def keys_from(self) -> str:
        """What the sheets of its keys and values are named by: the cases of self-attention share them."""
        return "cross" if self.queries == TARGET else "self"

    @property
    def masks(self) -> dict[str, Any]:
        """What the layer is told."""
        padding = torch.tensor([[token == PADDED[-1] for token in self.source]])  # (1, S)
        return {"key_padding_mask": padding if self.padding else None, "causal": self.causal}

    @property
    def blocked(self) -> Tensor:
        """(T, S), True where a query may not look."""
        T, S = len(self.queries), len(self.source)
        later = causal_mask(T, S) if self.causal else torch.zeros(T, S, dtype=torch.bool)
        return later | self.masks["key_padding_mask"] if self.padding else later


CASES = (
    Case("none", "no mask: every token looks at all tokens, at padding too", PADDED, PADDED),
    Case("padding", "padding mask: nobody looks at padding", PADDED, PADDED, padding=True),
    Case("causal", "causal mask: nobody looks ahead", PADDED, PADDED, causal=True),
    Case("both", "padding and causal mask: neither at padding nor ahead", PADDED, PADDED, True, True),
    Case(
        "cross",
        "cross-attention: a target sentence asks a source sentence of another length",
        TARGET,
        SENTENCE,
    ),
)


class MHADemo(Task):
    """Check attention, then train one `model` on `data` for each number of `heads`.

    `demo_heads` and `demo_d_model` shape the layer that is taken apart, `queries` are the random ones behind the
    figure on √d_k, and `claims_from` is the step from which networks are held to having learnt their task.
    """

    def __init__(
        self,
        model: Callable[..., nn.Module],
        data: Data,
        heads: list[int],
        demo_heads: int = 2,
        demo_d_model: int = 8,
        queries: int = 4000,
        claims_from: int = 500,
    ):
        if not isinstance(data, Lookups):
            raise ValueError(
                f"data must be lookups, the task that this experiment is about, not {type(data).__name__}"
            )
        if not heads or len(set(heads)) < len(heads) or min(heads) < 1:
            raise ValueError(f"heads must be different numbers from 1 on, not {heads}")
        if demo_heads < 2:
            raise ValueError(f"demo_heads must be at least 2, or there is nothing to split, not {demo_heads}")
        if demo_d_model % demo_heads or demo_d_model < 1:
            raise ValueError(f"demo_d_model must be divisible by demo_heads={demo_heads}, not {demo_d_model}")
        if queries < 500:
            raise ValueError(f"queries must be at least 500, for means that mean something, not {queries}")
        self.model, self.data, self.heads, self.slots = model, data, heads, data.slots
        with torch.device("meta"):  # for its width: the model is a call, which does not tell its arguments
            width = self.fresh(1).attention.d_model
        for number in heads:
            if width % number:
                raise ValueError(f"heads must divide model.d_model={width}, which {number} does not")
        self.demo_heads, self.demo_d_model, self.queries = demo_heads, demo_d_model, queries
        self.claims_from = claims_from
        self.seen: dict[str, Any] = {}  # what `before` saw, for `after` to compare with

    def build(self, run: Run) -> dict[str, nn.Module]:
        """One network per number of heads; all start with the same weights, which they only cut differently."""
        self.networks: dict[str, LookupNet] = {}
        for heads in self.heads:
            reseed(seed_of(run.seed, "weights"), torch.device("cpu"))
            self.networks[f"heads_{heads}"] = self.fresh(heads)
        return dict(self.networks)

    def fresh(self, heads: int) -> LookupNet:
        """A new network."""
        network = self.model(num_heads=heads, slots=self.slots)
        assert isinstance(network, LookupNet)
        return network

    def train(self, batch: Batch) -> dict[str, Output]:
        """Cross-entropy of the four answers; inputs are samples (B, 2 + 2S) of `Lookups`."""
        assert batch.targets is not None
        outputs = {}
        for name, network in self.networks.items():
            logits = network(batch.inputs)  # (B, 4)
            outputs[name] = Output(nn.functional.cross_entropy(logits, batch.targets), logits, batch.targets)
        return outputs

    def state_dict(self) -> dict[str, Any]:
        return {"seen": self.seen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.seen = state["seen"]

    def before(self, run: Run) -> None:
        """Everything that needs no training, and where the untrained heads look."""
        layer = self.demo_layer(run)
        x = torch.randn(1, len(PADDED), layer.d_model, generator=run.generator("source"), dtype=torch.float64)
        asking = torch.randn(
            1, len(TARGET), layer.d_model, generator=run.generator("target"), dtype=torch.float64
        )
        inputs = {
            case.name: (asking, x[:, : len(SENTENCE)]) if case.keys_from == "cross" else (x, x)
            for case in CASES
        }
        self.show_steps(run, layer, inputs)
        check_steps(run, layer, inputs)
        check_agreement(run, layer, inputs)
        check_layer(run, layer, x)
        check_split(run, layer, x)
        self.show_scale(run)
        self.seen = {"maps": self.maps(run), "looks": self.looks(run)}

    def demo_layer(self, run: Run) -> MultiHeadAttention:
        """A layer of random weights and biases in float64, on the CPU."""
        reseed(seed_of(run.seed, "layer"), torch.device("cpu"))
        layer = MultiHeadAttention(self.demo_d_model, self.demo_heads).double()
        for projection in (layer.q_proj, layer.k_proj, layer.v_proj, layer.out_proj):
            nn.init.normal_(projection.bias, std=0.5)  # zeros would hide a bias that is forgotten
        return layer

    # the five steps

    def show_steps(
        self, run: Run, layer: MultiHeadAttention, inputs: dict[str, tuple[Tensor, Tensor]]
    ) -> None:
        """A page of heat maps per case, and all of their numbers as a spreadsheet."""
        pages: dict[str, Sheet] = {}
        sources: dict[str, Sheet] = {}
        with torch.no_grad():
            for case in CASES:
                q, k, v = (x[0] for x in claims.projected(layer, *inputs[case.name]))  # (H, T or S, Dh)
                steps = attention_steps(q, k, v, case.blocked)
                draw_steps(run, case, steps)
                pages[case.name] = step_sheet(case, q, steps)
                sources |= source_sheets(case, k, v)
        run.spreadsheet("attention_steps", pages | sources)

    # why √d_k

    def show_scale(self, run: Run) -> None:
        """What the length of queries and keys does to scores and softmax, with and without the division."""
        raw, scaled = {}, {}
        for d_k in SIZES:
            random = run.generator("scores", d_k)
            one, other = claims.random_scores(attention_steps, d_k, self.queries, KEYS, random)
            raw[d_k], scaled[d_k] = claims.statistics(one), claims.statistics(other)
        normal = torch.randn(self.queries, KEYS, generator=run.generator("normal"), dtype=torch.float64)
        expected = {d_k: claims.statistics(normal * d_k**0.5) for d_k in (1, *SIZES)}
        draw_scale(run, raw, scaled, expected, self.queries)
        table_scale(run, raw, scaled, expected)
        check_scale(run, raw, scaled)

    # what heads are for

    def questions(self, run: Run) -> Tensor:
        """(S, 2 + 2S): the first memory of the test set, asked S times: for slot r, and the symbol 3 slots on."""
        memory = run.splits["test"].inputs[0].cpu()
        places, symbols = torch.arange(self.slots), memory[2 : 2 + self.slots]
        asked = torch.stack((places, symbols.roll(-min(3, self.slots - 1))), dim=1)  # (S, 2)
        return torch.cat((asked, memory[2:].expand(self.slots, -1)), dim=1)

    def maps(self, run: Run) -> dict[str, Tensor]:
        """Where the heads look when asked `questions`: (H, S questions, S slots) per network, on the CPU."""
        questions = self.questions(run).to(run.device)
        with run.inference("maps"):
            return {
                name: network.weights(questions).transpose(0, 1).float().cpu()
                for name, network in self.networks.items()
            }

    def looks(self, run: Run) -> dict[str, Tensor]:
        """Mean weight of each head on the slot at the position and on the one with the symbol, (H, 2) each."""
        inputs, _ = self.test_set(run)
        found = {}
        for name in self.networks:
            weights = self.exact(name).weights(inputs)  # (N, H, S)
            places = places_asked(inputs)[:, None].expand(-1, weights.shape[1], -1)  # (N, H, 2)
            found[name] = weights.gather(2, places).mean(0)
        return found

    def exact(self, name: str) -> LookupNet:
        """A copy of a network in float64 on the CPU, where rounding decides no answer; without gradients."""
        network = self.fresh(int(name.removeprefix("heads_")))
        network.load_state_dict(self.networks[name].state_dict())
        return network.double().eval().requires_grad_(False)

    def test_set(self, run: Run) -> tuple[Tensor, Tensor]:
        """Inputs (N, 2 + 2S) and targets (N,) of the test set on the CPU: all of it, for its blocks to be whole."""
        split = run.splits["test"]
        assert split.targets is not None
        return split.inputs.cpu(), split.targets.cpu()

    def after(self, run: Run) -> None:
        """What the heads have learnt, and what one head cannot."""
        inputs, targets = self.test_set(run)
        scores = {name: answered(self.exact(name), inputs, targets) for name in self.networks}
        alone = {name: self.ablated(name, inputs, targets) for name in self.networks}
        looks = self.looks(run)
        self.draw_maps(run, looks)
        draw_heads(run, scores)
        draw_ablation(run, scores, alone)
        table_heads(run, scores, alone, looks)
        self.check_heads(run, scores, alone)

    def ablated(self, name: str, inputs: Tensor, targets: Tensor) -> list[Tensor]:
        """`answered` with each head taken out in turn."""
        found = []
        for head in range(self.networks[name].attention.num_heads):
            network = self.exact(name)
            silence(network, head)
            found.append(answered(network, inputs, targets))
        return found

    def check_heads(self, run: Run, scores: dict[str, Tensor], alone: dict[str, list[Tensor]]) -> None:
        """One head's ceiling always; that several heads learn the task where they were given the time."""
        for name, network in self.networks.items():
            both, heads = float(scores[name][0]), network.attention.num_heads
            if heads == 1:
                claim = "one head answers at most 3 of 4 questions"
                run.check("one_head_ceiling", claim, both, CEILING)
            elif run.step >= self.claims_from:
                run.check(f"{name}_learnt", f"{heads} heads answer both questions", both, 0.99, at_least=True)
        if "heads_2" in alone and run.step >= self.claims_from:
            least = min(float(scores["heads_2"][0] - without[0]) for without in alone["heads_2"])
            claim = "without either of 2 heads the accuracy falls by"
            run.check("heads_2_needed", claim, least, 0.25, at_least=True)

    def draw_maps(self, run: Run, looks: dict[str, Tensor]) -> None:
        """The attention maps of the same questions before and after training, a page per network."""
        questions, maps = self.questions(run), self.maps(run)
        for name in self.networks:
            pages = {
                "before training": (self.seen["maps"][name], self.seen["looks"][name]),
                "after training": (maps[name], looks[name]),
            }
            run.figure(f"attention_{name}", attention_maps(questions, pages))


def attention_maps(questions: Tensor, pages: dict[str, tuple[Tensor, Tensor]]) -> Figure:
    """A line per page, a heat map per head: maps (H, questions, S) and mean weights (H, 2) on what is asked."""
    S = questions.shape[1] // 2 - 1
    names = [chr(ord("A") + s % 26) for s in questions[0, 2 : 2 + S].tolist()]  # of the symbols, by slot
    places = places_asked(questions)  # (S, 2)
    rows = [f"{p + 1}? {names[s]}?" for p, s in places.tolist()]
    H = len(next(iter(pages.values()))[0])
    figure, grid = figures.new(len(pages), H, (max(6.4, 1.62 * H + 0.9), 5.2), sharex=True, sharey=True)
    for line, (title, (maps, looks)) in zip(grid, pages.items(), strict=True):
        for head, axes in enumerate(line):
            slots = [f"{i + 1}{name}" for i, name in enumerate(names)]
            image = figures.heat_map(axes, maps[head], rows, slots, limits=(0, 1))
            mark_places(axes, places)
            position, symbol = looks[head].tolist()
            axes.set_title(f"head {head + 1}\n○ {position:.2f}  □ {symbol:.2f}", fontsize=8)
            axes.tick_params(labelsize=6.5)
        line[0].set_ylabel(f"{title}\nquestion: slot? symbol?")
    for axes in grid[-1]:
        axes.set_xlabel("slot and its symbol", fontsize=8)
    figure.colorbar(image, ax=grid, label="attention weight", fraction=0.05, aspect=30)
    title = "Where each head looks\nnumbers: its mean weight on the two slots, over the test set"
    figure.suptitle(title, x=0.01, ha="left", fontsize=10)
    figure.legend(grid[0, 0].lines, SLOTS, loc="outside lower center", ncols=2)
    return figure


# the five steps: pictures and numbers


def draw_steps(run: Run, case: Case, steps: AttentionSteps) -> None:
    """One page: a row of heat maps per head, a column per step; tensors of `steps` are (H, T, S or Dh)."""
    H, T, S = steps.scores.shape
    size = (2.9 * len(STEPS) + 0.6, max(1.6, 0.3 * T + 0.75) * H + 0.6)
    figure, grid = figures.new(H, len(STEPS), size)
    finite = steps.scaled.abs().max().item()
    limits = [None, (-finite, finite), (-finite, finite), (0.0, 1.0), None]
    legible = max(S, steps.output.shape[-1]) <= 8
    for head, line in enumerate(grid):
        for number, (axes, tensor) in enumerate(zip(line, steps, strict=True)):
            wide = number < 4
            figures.heat_map(
                axes,
                tensor[head],
                case.queries if number == 0 else [""] * T,
                case.source if wide else [str(c + 1) for c in range(tensor.shape[-1])],
                limits=limits[number],
                diverging=number != 3,
                numbers=legible,
                masked=case.blocked if number in (2, 3) else None,
            )
            if head == 0:
                masks = number != 2 or bool(case.blocked.any())
                axes.set_title(STEPS[number] if masks else "3 masked  nothing")
            if wide:
                axes.tick_params(axis="x", labelrotation=30)
            axes.tick_params(length=0)
        line[0].set_ylabel(f"head {head + 1}: query")
    for number, axes in enumerate(grid[-1]):
        axes.set_xlabel("key" if number < 4 else "component of the value")
    figure.suptitle(case.title, x=0.01, ha="left")
    run.figure(f"steps_{case.name}", figure)


def step_sheet(case: Case, q: Tensor, steps: AttentionSteps) -> Sheet:
    """A case's numbers as they are, and beside those of the first head the formulas that give them again."""
    layout = Columns(q.shape[-1], len(case.source), case.keys_from)
    rows: list[list[Any]] = []
    for head in range(len(q)):
        for t, token in enumerate(case.queries):
            stored = [q[head, t], *(step[head, t] for step in steps)]
            numbers = [number_or_text(x) for tensor in stored for x in tensor.tolist()]
            live = layout.formulas(len(rows) + 3) if head == 0 else []
            rows.append([head + 1, token, *numbers, *live])
    notes = [f"{case.name}: {case.title}. A row is a query of a head."]
    if case is CASES[-1]:
        notes += ["Blue cells are formulas: head 1's five steps again, from q, keys and values."]
        notes += ["The last column says how far their weights and outputs are from the stored ones."]
    return Sheet(layout.header(case.source), rows, 2, "0.0000", {layout.last: "0.0E+00"}, notes)


def source_sheets(case: Case, k: Tensor, v: Tensor) -> dict[str, Sheet]:
    """Keys and values (H, S, Dh) that a case looks at; a value's component is a row, as the weights are."""
    tokens, heads = case.source, range(len(k))
    keys = [[h + 1, token, *k[h, s].tolist()] for h in heads for s, token in enumerate(tokens)]
    values = [[h + 1, c + 1, *v[h, :, c].tolist()] for h in heads for c in range(v.shape[-1])]
    components = [str(c + 1) for c in range(k.shape[-1])]
    return {
        f"{case.keys_from} keys": Sheet([["head", "token", *components]], keys, 2, "0.0000"),
        f"{case.keys_from} values": Sheet([["head", "component", *tokens]], values, 2, "0.0000"),
    }


def number_or_text(x: float) -> float | str:
    """A cell: spreadsheets know no infinity."""
    return x if x > -torch.inf else "−∞"


class Columns:
    """Where a sheet of steps has its columns: head, query, q, the five steps, and the formulas."""

    def __init__(self, components: int, keys: int, source: str):
        self.Dh, self.S, self.source = components, keys, source
        steps = {"scores": keys, "scaled": keys, "masked": keys, "weights": keys, "output": components}
        again = {"=scores": keys, "=scaled": keys, "=exp": keys, "=weights": keys, "=output": components}
        blocks = {"q": components} | steps | again  # the width of each
        self.blocks, self.start, place = blocks, {}, 2
        for name, width in blocks.items():
            self.start[name] = place
            place += width
        self.last = place  # the column of the deviation

    def header(self, tokens: tuple[str, ...]) -> list[list[str]]:
        """Two rows: the block above its first column, then tokens or components."""
        above, below = ["", ""], ["head", "query"]
        for name, width in self.blocks.items():
            title = f"{name[1:]} again" if name[1:] in self.blocks else name.removeprefix("=")
            above += [title, *[""] * (width - 1)]
            by_component = name in ("q", "output", "=output")
            below += [str(c + 1) for c in range(width)] if by_component else tokens
        return [[*above, "deviation"], [*below, "of both"]]

    def cell(self, block: str, number: int, row: int) -> str:
        """Where a number of a block stands, such as G3."""
        return f"{column_name(self.start[block] + number)}{row}"

    def line(self, block: str, row: int) -> str:
        """A block's cells in a row, such as $G3:$M3."""
        first, last = self.start[block], self.start[block] + self.blocks[block] - 1
        return f"${column_name(first)}{row}:${column_name(last)}{row}"

    def formulas(self, row: int) -> list[str]:
        """The five steps of the first head's query in `row`, from q, the keys and the values."""
        keys = [f"'{self.source} keys'!$C{j + 2}:${column_name(1 + self.Dh)}{j + 2}" for j in range(self.S)]
        values = [
            f"'{self.source} values'!$C{c + 2}:${column_name(1 + self.S)}{c + 2}" for c in range(self.Dh)
        ]
        query, exps, weights = (self.line(name, row) for name in ("q", "=exp", "=weights"))
        found = [f"=SUMPRODUCT({query},{key})" for key in keys]
        found += [f"={self.cell('=scores', j, row)}/SQRT(COLUMNS({query}))" for j in range(self.S)]
        found += [
            f"=IF(ISNUMBER({self.cell('masked', j, row)}),EXP({self.cell('=scaled', j, row)}),0)"
            for j in range(self.S)
        ]
        found += [f"={self.cell('=exp', j, row)}/SUM({exps})" for j in range(self.S)]
        found += [f"=SUMPRODUCT({weights},{value})" for value in values]
        pairs = [(self.line(name, row), self.line(f"={name}", row)) for name in ("weights", "output")]
        return [*found, "=SQRT(" + "+".join(f"SUMXMY2({one},{other})" for one, other in pairs) + ")"]


# the checks


def check_steps(run: Run, layer: MultiHeadAttention, inputs: dict[str, tuple[Tensor, Tensor]]) -> None:
    """What every mask has to leave true."""
    sums, blocked, leaks, parts = [], [], [], []
    for case in CASES:
        query, source = inputs[case.name]
        q, k, v = claims.projected(layer, query, source)
        by_steps, by_layer = partial(step_output, q, case), partial(layer_output, layer, query, case)
        for weights in (
            attention_steps(q, k, v, case.blocked).weights,
            layer(query, source, source, **case.masks)[1],
        ):
            sums.append(claims.row_sum_error(weights))
            blocked.append(claims.largest_blocked(weights, case.blocked))
        leaks.append(claims.leak(by_steps, k, v, case.blocked))
        leaks.append(claims.leak(by_layer, source, source, case.blocked))
        parts.append(claims.layer_error(attention_steps, layer, query, source, case.blocked, **case.masks))
    S, D, Dh = len(PADDED), layer.d_model, layer.head_dim
    run.check("rows_sum_to_one", "Σ_j weight_ij = 1 under every mask", largest(sums), rounding(S))
    run.check("masked_is_zero", "a masked weight is exactly 0", largest(blocked), 0.0)
    run.check("masked_never_leaks", "masked keys and values of 1e10 change nothing", largest(leaks), 0.0)
    run.check(
        "steps_make_the_layer",
        "split, five steps, join = the layer",
        largest(parts),
        attention_rounding(D, Dh, S, D),
    )


def step_output(q: Tensor, case: Case, k: Tensor, v: Tensor) -> Tensor:
    """What the five steps put out."""
    return attention_steps(q, k, v, case.blocked).output


def layer_output(layer: MultiHeadAttention, query: Tensor, case: Case, key: Tensor, value: Tensor) -> Tensor:
    """What the layer puts out."""
    return layer(query, key, value, **case.masks)[0]


def attention_rounding(*terms: int) -> float:
    """The tolerance of sums of so many terms in a row, in float64, of which softmax doubles what comes before."""
    return 2 * rounding(*terms)


def check_agreement(run: Run, layer: MultiHeadAttention, inputs: dict[str, tuple[Tensor, Tensor]]) -> None:
    """The five steps against torch's fused kernel, the layer against torch's: the worst of the cases."""
    fused, theirs = [], []
    for case in CASES:
        q, k, v = claims.projected(layer, *inputs[case.name])
        fused.append(claims.fused_agreement(attention_steps, q, k, v, case.blocked))
        theirs.append(claims.torch_agreement(layer, *inputs[case.name], case.blocked, **case.masks))
    S, D, Dh = len(PADDED), layer.d_model, layer.head_dim
    for what in ("output", "weights", "gradients"):
        times = 2 if what == "gradients" else 1  # a way back is as long as the way there
        run.check(
            f"fused_{what}",
            f"{what} of the five steps = F.scaled_dot_product_attention's",
            largest(found[what] for found in fused),
            times * attention_rounding(Dh, S),
        )
        run.check(
            f"torch_{what}",
            f"{what} of the layer = nn.MultiheadAttention's, same weights",
            largest(found[what] for found in theirs),
            times * attention_rounding(D, Dh, S, D),
        )


def check_layer(run: Run, layer: MultiHeadAttention, x: Tensor) -> None:
    """Order, both ways through the layer, and a query that may look nowhere."""
    order = torch.randperm(x.shape[1], generator=run.generator("order"))
    tolerance = attention_rounding(layer.d_model, layer.head_dim, x.shape[1], layer.d_model)
    run.check(
        "permutation",
        "f(P x) = P f(x) without positions",
        claims.equivariance_error(layer, x, order),
        tolerance,
    )
    single = MultiHeadAttention(layer.d_model, layer.num_heads)
    single.load_state_dict(layer.state_dict())
    paths = largest(claims.paths_difference(single, x.float(), causal) for causal in (False, True))
    run.check("paths", "float32 output with weights = without (fused)", paths, 1e-6)
    rows = [claims.masked_row(layer, x, need_weights) for need_weights in (True, False)]
    nothing = largest(number for row in rows for number in (row.weight, row.output))
    run.check("masked_row", "all masked: zero weights, output of zeros", nothing, 0.0)
    bad = max(row.not_finite for row in rows)
    run.check("masked_row_finite", "all masked: numbers that are not finite, gradients too", bad, 0)


def check_split(run: Run, layer: MultiHeadAttention, x: Tensor) -> None:
    """How projecting before the split into heads relates to projecting after it."""
    tolerance = attention_rounding(layer.d_model, layer.head_dim, x.shape[1], layer.d_model)
    same = claims.split_difference(claims.block_diagonal(layer), x)
    run.check(
        "split_block_diagonal", "project-then-split = split-then-project, block-diagonal W", same, tolerance
    )
    other = claims.split_difference(layer, x)
    run.check("split_general", "… and another function for a full W", other, 0.1, at_least=True)


def check_scale(run: Run, raw: Found, scaled: Found) -> None:
    """Standard deviations within their standard errors of √d_k and 1; what softmax makes of them."""
    off = largest(abs(found.std - d_k**0.5) / found.std_error for d_k, found in raw.items())
    run.check("raw_std", "std of q·k = √d_k, off by standard errors", off, ERRORS)
    off = largest(abs(found.std - 1) / found.std_error for found in scaled.values())
    run.check("scaled_std", "std of q·k/√d_k = 1, off by standard errors", off, ERRORS)
    kept = min(found.gradient for found in scaled.values()) / max(found.gradient for found in scaled.values())
    run.check(
        "scaled_gradient", "softmax's gradient: least / most over d_k, scaled", kept, 0.95, at_least=True
    )
    left = raw[SIZES[-1]].gradient / raw[SIZES[0]].gradient
    # where one weight takes all, a gradient is left to the queries alone whose two best scores lie within
    # about 1 of each other, and their share falls as 1/√d_k: an eighth from 16 to 1024
    run.check("raw_gradient", "… and d_k = 1024 / d_k = 16, not scaled", left, 0.25)


# why √d_k: picture and table

PANELS = {
    "std": "standard deviation of the scores",
    "entropy": "entropy of the weights, nats",
    "largest": "largest weight",
    "gradient": "gradient of softmax ‖∂p/∂s‖",
}


def draw_scale(run: Run, raw: Found, scaled: Found, expected: Found, queries: int) -> None:
    """Each statistic over d_k: points are measured, lines predicted from normal scores of std √d_k and 1."""
    figure, grid = figures.new(1, len(PANELS), (14.0, 3.6))
    for axes, (name, title) in zip(grid.flat, PANELS.items(), strict=True):
        for found, colour, label in (
            (raw, figures.VERMILION, "q·k"),
            (scaled, figures.BLUE, "q·k / √$d_k$"),
        ):
            axes.plot(SIZES, [getattr(found[d], name) for d in SIZES], "o", color=colour, label=label)
        lines = (
            {d: getattr(expected[d], name) for d in SIZES} if name != "std" else {d: d**0.5 for d in SIZES}
        )
        axes.plot(
            SIZES, list(lines.values()), color=figures.VERMILION, linewidth=1, label="predicted: N(0, $d_k$)"
        )
        level = 1.0 if name == "std" else getattr(expected[1], name)
        axes.axhline(level, color=figures.BLUE, linewidth=1, label="predicted: N(0, 1)")
        axes.set_xscale("log", base=2)
        axes.set_xticks(SIZES, [str(d) for d in SIZES])
        axes.set(title=title, xlabel="$d_k$, components of a query")
        if name == "std":
            axes.set_yscale("log", base=2)
            axes.set_yticks((1, 2, 4, 8, 16, 32), ["1", "2", "4", "8", "16", "32"])
            axes.legend()
        else:
            axes.set_ylim(bottom=0)
    figure.suptitle(
        f"Why √$d_k$: {queries:,} random queries, {KEYS} keys each; undivided scores grow and softmax saturates",
        x=0.01,
        ha="left",
    )
    run.figure("scale", figure)


def table_scale(run: Run, raw: Found, scaled: Found, expected: Found) -> None:
    """The same as numbers, each beside its prediction."""
    header, rows = ["d_k"], []
    for label in ("q·k", "q·k/√d_k"):
        header += [f"{name} of {label}{what}" for name in PANELS for what in ("", ", predicted")]
    for d_k in SIZES:
        cells: list[float] = [d_k]
        for found, std, by in ((raw, d_k**0.5, d_k), (scaled, 1.0, 1)):
            for name in PANELS:
                cells += [getattr(found[d_k], name), std if name == "std" else getattr(expected[by], name)]
        rows.append(cells)
    run.table("scale", header, rows)


# what heads are for: pictures and table


def answered(network: LookupNet, inputs: Tensor, targets: Tensor) -> Tensor:
    """Shares of test samples whose both answers, first answer, second answer are right: (3,) float64."""
    right = torch.stack([network(inputs).argmax(1), targets])  # (2, N): 2 v(p) + v(s)
    first, second = (right // 2).diff(dim=0)[0] == 0, (right % 2).diff(dim=0)[0] == 0
    return torch.stack([first & second, first, second]).double().mean(1)


def mark_places(axes: Axes, places: Tensor) -> None:
    """Rings on the slot at the position, squares on the slot with the symbol: places (questions, 2)."""
    for marker, colour, column in zip("os", COLOURS, places.T.tolist(), strict=True):
        axes.plot(column, range(len(column)), marker, ms=8, mew=1.6, mfc="none", color=colour)


def counted(name: str) -> str:
    """A network's name as people say it: 2 heads for heads_2."""
    number = name.removeprefix("heads_")
    return f"{number} head{'s' * (number != '1')}"


def draw_heads(run: Run, scores: dict[str, Tensor]) -> None:
    """What each number of heads answers, beside a guess and the most that one head can answer."""
    figure, grid = figures.new(1, 1, (7.6, 4.0))
    axes = grid[0, 0]
    for number, (label, colour) in enumerate(
        zip(("both values", *QUESTIONS), (figures.GREY, *COLOURS), strict=True)
    ):
        places = [place + 0.27 * (number - 1) for place in range(len(scores))]
        bars = axes.bar(places, [float(s[number]) for s in scores.values()], 0.25, color=colour, label=label)
        axes.bar_label(bars, fmt="%.3f", fontsize=7, padding=1)
    for level, text in ((0.25, "a guess\nat both"), (CEILING, "the most\nof one head,\nboth values")):
        axes.axhline(level, color=figures.INK, linestyle="--", linewidth=1)
        axes.text(len(scores) - 0.5, level + 0.01, text, fontsize=8, va="bottom")
    axes.set_xlim(-0.6, len(scores) + 0.1)
    axes.set_xticks(range(len(scores)), [counted(name) for name in scores])
    axes.set(title="test accuracy by number of heads, at the same width", ylim=(0, 1.08), ylabel="accuracy")
    axes.grid(visible=False, axis="x")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    run.figure("heads", figure)


def draw_ablation(run: Run, scores: dict[str, Tensor], alone: dict[str, list[Tensor]]) -> None:
    """By how much each answer's accuracy falls without each head."""
    widths = [len(found) + 0.6 for found in alone.values()]
    figure, grid = figures.new(
        1, len(alone), (0.62 * sum(widths) + 1.8, 3.6), sharey=True, width_ratios=widths
    )
    for axes, (name, without) in zip(grid.flat, alone.items(), strict=True):
        for number, colour in enumerate(COLOURS, start=1):
            places = [head + 1 + 0.38 * (number - 1.5) for head in range(len(without))]
            drops = [float(scores[name][number] - found[number]) for found in without]
            axes.bar(places, drops, 0.36, color=colour, label=QUESTIONS[number - 1])
        axes.set_title(counted(name))
        axes.set_xticks(range(1, len(without) + 1))
        axes.set_xlabel("head taken out")
        axes.set_xlim(0.4, len(without) + 0.6)
        axes.grid(visible=False, axis="x")
    grid[0, 0].set_ylabel("fall of the accuracy")
    figure.suptitle("What each head was for: how far the test accuracy falls without it", x=0.01, ha="left")
    figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    run.figure("ablation", figure)


def table_heads(
    run: Run, scores: dict[str, Tensor], alone: dict[str, list[Tensor]], looks: dict[str, Tensor]
) -> None:
    """Where each head looks and what is answered without it."""
    header = ["network", "without head", "weight on the position's slot", "weight on the symbol's slot"]
    header += ["both right", *QUESTIONS, "fall of both", *(f"fall of {question}" for question in QUESTIONS)]
    rows: list[list[Any]] = []
    for name, whole in scores.items():
        rows.append([name, "none", "", "", *whole.tolist(), 0.0, 0.0, 0.0])
        for head, without in enumerate(alone[name]):
            falls = (whole - without).tolist()
            rows.append([name, head + 1, *looks[name][head].tolist(), *without.tolist(), *falls])
    run.table("heads", header, rows)
