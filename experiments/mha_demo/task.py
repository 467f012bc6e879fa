"""Attention taken apart: its five steps in numbers, why scores are divided by √d_k, and what heads are for.

Before training a random matrix goes through the five steps under every kind of mask, and each claim about them is
checked. Then networks that differ in their number of heads alone learn to look up two values at once, which one
head cannot do; their attention maps before and after, and each head taken out, show what the heads have learnt.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from experiments.data.lookups import Lookups, places_asked
from experiments.mha_demo import claims
from experiments.mha_demo.cases import CASES, CEILING, KEYS, PADDED, SENTENCE, SIZES, TARGET
from experiments.mha_demo.checks import check_agreement, check_layer, check_scale, check_split, check_steps
from experiments.mha_demo.figures import (
    answered,
    attention_maps,
    draw_ablation,
    draw_heads,
    draw_scale,
    draw_steps,
    table_heads,
    table_scale,
)
from experiments.mha_demo.sheets import source_sheets, step_sheet
from experiments.nn.attention import MultiHeadAttention
from experiments.nn.attention_steps import attention_steps
from experiments.nn.lookup_net import LookupNet, silence
from runner.data import Batch, Data
from runner.spreadsheet import Sheet
from runner.streams import reseed, seed_of
from runner.task import Output, Run, Task


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
