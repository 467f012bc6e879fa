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
from experiments.mha_demo import checks, claims, figures
from experiments.mha_demo.cases import CASES, KEYS, PADDED, SENTENCE, SIZES, TARGET, Inputs
from experiments.mha_demo.sheets import source_sheets, step_sheet
from experiments.nn.attention import MultiHeadAttention
from experiments.nn.attention_steps import attention_steps
from experiments.nn.checks import at_least, divisible
from experiments.nn.lookup_net import LookupNet, silence
from runner.data import Batch, Data
from runner.spreadsheet import Sheet
from runner.streams import reseed, seed_of
from runner.task import Output, Run, Task


class MHADemo(Task):
    """Check attention, then train one `model` on `data` for each number of `heads`.

    `demo_heads` and `demo_d_model` shape the layer that is taken apart, `queries` is the number of random queries
    in the figure on √d_k, and networks have to have learnt their task from step `claims_from` on.
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
        # arguments
        if not isinstance(data, Lookups):
            given = type(data).__name__
            raise ValueError(f"data must be lookups, the task that this experiment is about, got {given}")
        if not heads or len(set(heads)) < len(heads) or min(heads) < 1:
            raise ValueError(f"heads must be different numbers from 1 on, got {heads}")
        at_least(2, demo_heads=demo_heads)  # or there is nothing to split
        at_least(1, demo_d_model=demo_d_model)
        divisible(demo_heads, "demo_heads", demo_d_model=demo_d_model)
        at_least(500, queries=queries)  # for means that mean something

        self.model, self.data, self.heads, self.slots = model, data, heads, data.slots
        self.demo_heads, self.demo_d_model, self.queries = demo_heads, demo_d_model, queries
        self.claims_from = claims_from
        # attention before training, for `after` to compare with
        self.untrained: dict[str, dict[str, Tensor]] = {}

        # the width of the network, which the factory `model` does not tell
        with torch.device("meta"):
            width = self._new_network(1).attention.d_model
        if wrong := [number for number in heads if width % number]:
            raise ValueError(f"heads must divide model.d_model={width}, which {wrong[0]} does not")

    def build(self, run: Run) -> dict[str, nn.Module]:
        """Return a network per number of heads; all start with the same weights, which they only cut differently."""
        self.networks: dict[str, LookupNet] = {}
        for heads in self.heads:
            reseed(seed_of(run.seed, "weights"), torch.device("cpu"))
            self.networks[f"heads_{heads}"] = self._new_network(heads)
        return dict(self.networks)

    def _new_network(self, heads: int) -> LookupNet:
        network = self.model(num_heads=heads, slots=self.slots)
        assert isinstance(network, LookupNet)
        return network

    def train(self, batch: Batch) -> dict[str, Output]:
        """Return the cross-entropy of the four answers; inputs are samples (B, 2 + 2S) of `Lookups`."""
        assert batch.targets is not None
        outputs = {}
        for name, network in self.networks.items():
            logits = network(batch.inputs)  # (B, 4)
            outputs[name] = Output(nn.functional.cross_entropy(logits, batch.targets), logits, batch.targets)
        return outputs

    def state_dict(self) -> dict[str, Any]:
        return {"seen": self.untrained}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.untrained = state["seen"]

    def before(self, run: Run) -> None:
        """Show and check what needs no training; keep the attention of the untrained networks."""
        # the five steps
        reseed(seed_of(run.seed, "layer"), torch.device("cpu"))
        layer = MultiHeadAttention(self.demo_d_model, self.demo_heads).double()
        for projection in (layer.q_proj, layer.k_proj, layer.v_proj, layer.out_proj):
            nn.init.normal_(projection.bias, std=0.5)  # zeros would hide a bias that is forgotten
        source, target = (
            torch.randn(1, length, self.demo_d_model, generator=run.generator(purpose), dtype=torch.float64)
            for purpose, length in (("source", len(PADDED)), ("target", len(TARGET)))
        )
        inputs = {
            case.name: (target, source[:, : len(SENTENCE)]) if case.keys_from == "cross" else (source, source)
            for case in CASES
        }
        self._show_steps(run, layer, inputs)
        checks.check_steps(run, layer, inputs)
        checks.check_agreement(run, layer, inputs)

        # the layer
        checks.check_layer(run, layer, source)
        checks.check_split(run, layer, source)

        # why √d_k
        self._show_scale(run)

        # attention before training
        self.untrained = {"maps": self._attention_maps(run), "looks": self._mean_weights(run)}

    @torch.no_grad()
    def _show_steps(self, run: Run, layer: MultiHeadAttention, inputs: Inputs) -> None:
        """Draw a page of heat maps per case, and write all of their numbers as a spreadsheet."""
        pages, sources = dict[str, Sheet](), dict[str, Sheet]()
        for case in CASES:
            q, k, v = (x[0] for x in claims.projected(layer, *inputs[case.name]))  # (H, T or S, Dh)
            steps = attention_steps(q, k, v, case.blocked)
            figures.draw_steps(run, case, steps)
            pages[case.name] = step_sheet(case, q, steps)
            sources |= source_sheets(case, k, v)
        run.spreadsheet("attention_steps", pages | sources)

    def _show_scale(self, run: Run) -> None:
        """Show how d_k changes scores and softmax, with and without the division by √d_k."""
        raw, scaled = {}, {}
        for d_k in SIZES:
            random = run.generator("scores", d_k)
            scores = claims.random_scores(attention_steps, d_k, self.queries, KEYS, random)
            raw[d_k], scaled[d_k] = map(claims.statistics, scores)
        normal = torch.randn(self.queries, KEYS, generator=run.generator("normal"), dtype=torch.float64)
        expected = {d_k: claims.statistics(normal * d_k**0.5) for d_k in (1, *SIZES)}
        figures.draw_scale(run, raw, scaled, expected, self.queries)
        checks.check_scale(run, raw, scaled)

    def after(self, run: Run) -> None:
        """Show and check what the heads have learnt, and what one head cannot."""
        # attention, before training and after
        maps, mean_weights = self._attention_maps(run), self._mean_weights(run)
        for name in self.networks:
            rows = {
                "before training": (self.untrained["maps"][name], self.untrained["looks"][name]),
                "after training": (maps[name], mean_weights[name]),
            }
            figures.draw_attention(run, name, self._questions(run), rows)

        # answers, with each head taken out in turn
        inputs, targets = self._test_set(run)
        shares = {name: _shares_right(self._exact(name), inputs, targets) for name in self.networks}
        ablated: dict[str, list[Tensor]] = {name: [] for name in self.networks}
        for name, network in self.networks.items():
            for head in range(network.attention.num_heads):
                without = self._exact(name)
                silence(without, head)
                ablated[name].append(_shares_right(without, inputs, targets))
        figures.draw_heads(run, shares)
        figures.draw_ablation(run, shares, ablated)
        figures.table_heads(run, shares, ablated, mean_weights)
        checks.check_heads(run, shares, ablated, trained=run.step >= self.claims_from)

    def _questions(self, run: Run) -> Tensor:
        """Return the first memory of the test set with S questions, for slot r and the symbol 3 on: (S, 2 + 2S)."""
        memory = run.splits["test"].inputs[0].cpu()
        places, symbols = torch.arange(self.slots), memory[2 : 2 + self.slots]
        asked = torch.stack((places, symbols.roll(-min(3, self.slots - 1))), dim=1)  # (S, 2)
        return torch.cat((asked, memory[2:].expand(self.slots, -1)), dim=1)

    def _attention_maps(self, run: Run) -> dict[str, Tensor]:
        """Return each network's attention to `_questions`, (H, S questions, S slots) on the CPU."""
        questions = self._questions(run).to(run.device)
        with run.inference("maps"):
            return {
                name: network.weights(questions).transpose(0, 1).float().cpu()
                for name, network in self.networks.items()
            }

    def _mean_weights(self, run: Run) -> dict[str, Tensor]:
        """Return each head's mean weight on the slot at the position and on the one with the symbol, (H, 2)."""
        inputs, _ = self._test_set(run)
        means = {}
        for name in self.networks:
            weights = self._exact(name).weights(inputs)  # (N, H, S)
            places = places_asked(inputs)[:, None].expand(-1, weights.shape[1], -1)  # (N, H, 2)
            means[name] = weights.gather(2, places).mean(0)
        return means

    def _exact(self, name: str) -> LookupNet:
        """Return a copy of a network in float64 on the CPU, where rounding decides no answer; without gradients."""
        network = self._new_network(int(name.removeprefix("heads_")))
        network.load_state_dict(self.networks[name].state_dict())
        return network.double().eval().requires_grad_(False)

    def _test_set(self, run: Run) -> tuple[Tensor, Tensor]:
        """Return inputs (N, 2 + 2S) and targets (N,) of the whole test set, on the CPU."""
        split = run.splits["test"]
        assert split.targets is not None
        return split.inputs.cpu(), split.targets.cpu()


def _shares_right(network: LookupNet, inputs: Tensor, targets: Tensor) -> Tensor:
    """Return the shares of samples with both answers, the first and the second right: (3,) float64."""
    answers = torch.stack([network(inputs).argmax(1), targets])  # (2, N): 2 v(p) + v(s)
    first, second = (answers // 2).diff(dim=0)[0] == 0, (answers % 2).diff(dim=0)[0] == 0
    return torch.stack([first & second, first, second]).double().mean(1)
