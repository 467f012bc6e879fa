"""Absolute and rotary positions: their formulas checked, drawn and tabulated, and what each lets a network learn.

Before training: a random matrix through each encoding, each claim about them compared with measured numbers, and
我爱你 / 你爱我 through one attention layer. Then three networks, alike but for the encoding (none, absolute, rotary),
learn who does what to whom from the order of words; after it, how far that generalises to longer sentences.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor, nn

from experiments.data import sentences
from experiments.data.sentences import FAMILY, LONGER, WORDS, Sentences
from experiments.nn.checks import at_least, divisible, within
from experiments.nn.encoder import ENCODINGS
from experiments.posenc_check import checks, figures
from experiments.posenc_check.sheets import write_spreadsheets
from runner.data import Batch, Data
from runner.task import Output, Run, Task

_MOVES, _MOVED_SENTENCES = (0, 4, 8, 16, 32, 48), 1000  # places that test sentences are moved back
_DISTANCES = (2, 16, 24, 32, 40, 64)  # of 我 and 你: the first group is what training has seen


class PosEncCheck(Task):
    """Check the encodings, and train `model` with each on `data` with `loss`.

    The spreadsheets show a random matrix (length, d_model), with live formulas for the first `formula_rows`
    positions. Networks have to have learnt the task from step `claims_from` on.

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
        if not isinstance(data, Sentences):
            given = type(data).__name__
            raise ValueError(f"data must be sentences, the task that this experiment is about, got {given}")
        divisible(2, d_model=d_model)
        within(2, 256, closed=True, d_model=d_model)  # a spreadsheet takes formulas of up to 8,192 letters
        at_least(1, length=length, claims_from=claims_from)
        within(0, length, closed=True, term="length", formula_rows=formula_rows)

        self.data: Sentences = data
        self.model, self.loss, self.claims_from = model, loss, claims_from
        self.length, self.d_model, self.formula_rows = length, d_model, formula_rows

    def build(self, run: Run) -> dict[str, nn.Module]:
        """Return one network per encoding, with the same initial weights."""
        sizes = {"num_tokens": len(WORDS), "num_classes": len(self.data.class_names)}
        self.networks: dict[str, nn.Module] = {
            encoding: self.model(**sizes, encoding=encoding) for encoding in ENCODINGS
        }
        first = self.networks[ENCODINGS[0]].state_dict()
        for network in self.networks.values():
            network.load_state_dict(first)
        return self.networks

    def train(self, batch: Batch) -> dict[str, Output]:
        """Return the loss of each network on a batch of sentences (B, L)."""
        logits = {name: network(batch.inputs) for name, network in self.networks.items()}  # (B, C) each
        return {name: Output(self.loss(z, batch.targets), z, batch.targets) for name, z in logits.items()}

    def before(self, run: Run) -> None:
        """Show and check what needs no training."""
        write_spreadsheets(run, self.length, self.d_model, self.formula_rows)
        checks.check_absolute(run)
        checks.check_rotary(run)
        checks.check_word_order(run)
        figures.draw_encoding(run)
        figures.draw_wavelengths(run)
        figures.draw_rotation(run)
        figures.draw_decay(run)

    def after(self, run: Run) -> None:
        """Show and check what the networks have learnt, and how far it generalises."""
        # answers on the test set
        names, inputs = self.data.class_names, run.splits["test"].inputs
        answers = {name: predictions.labels for name, predictions in run.predictions.items()}
        targets = run.predictions[ENCODINGS[0]].targets
        if run.step >= self.claims_from:
            checks.check_trained(run, {name: p.counts for name, p in run.predictions.items()})

        # those to its first two families
        labels = torch.stack([targets, *answers.values()], 1)[: 2 * FAMILY].tolist()
        rows = [
            [sentences.spell(x), *(names[c] for c in row)] for x, row in zip(inputs, labels, strict=False)
        ]
        run.table("answers", ["sentence", "says", *self.networks], rows)

        # longer sentences
        if self.data.lengths:
            self._show_generalisation(run)

    def _show_generalisation(self, run: Run) -> None:
        """Draw and tabulate accuracies over length, place and distance."""
        # longer sentences
        lengths, longest = self.data.lengths, max(self.data.lengths)
        hits = {n: self._hits(run, *self._evaluated(run, LONGER.format(n))) for n in lengths}
        by_length = {f"{n}": _means(hit) for n, hit in hits.items()}

        # test sentences further back, behind adverbs, each as long as before
        inputs, targets = (part[:_MOVED_SENTENCES] for part in self._evaluated(run, "test"))
        by_move = {}
        for places in _MOVES:
            moved = sentences.with_adverbs_in_front(inputs, places, run.generator("moved", places))
            by_move[f"{places}"] = _means(self._hits(run, moved, targets))

        # the longest sentences, by the distance of 我 and 你
        apart = sentences.persons_apart(self._evaluated(run, LONGER.format(longest))[0]).cpu()
        by_distance = {}
        for low, high in pairwise(_DISTANCES):
            selected = (apart >= low) & (apart < high)
            if selected.any():
                chosen = {name: hit[selected] for name, hit in hits[longest].items()}
                by_distance[f"{low}–{high - 1}"] = _means(chosen)

        longer = f"longer than in training ({self.data.max_length} at most)"
        far_apart = f"{longest} words, by the distance that counts"
        panels = {
            "length": (longer, "words in the sentence", by_length),
            "place": ("as in training, but further back", "adverbs put in front of it", by_move),
            "distance": (far_apart, "places from 我 to 你", by_distance),
        }
        figures.draw_generalisation(run, panels)

    def _evaluated(self, run: Run, name: str) -> tuple[Tensor, Tensor]:
        """Return a split's sentences (N, L), as many as an evaluation takes, and their classes (N,) on the CPU."""
        split = run.splits[name]
        assert split.targets is not None
        N = run.eval_limit and run.eval_limit * self.data.eval_batch_size  # None: all
        return split.inputs[:N], split.targets[:N].cpu()

    def _hits(self, run: Run, inputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Return which sentences (N,) each network classifies correctly, on the CPU."""
        return {name: answers == targets for name, answers in self._answers(run, inputs).items()}

    def _answers(self, run: Run, inputs: Tensor) -> dict[str, Tensor]:
        """Return the classes (N,) that each network answers to sentences (N, L), on the CPU."""
        batches = inputs.split(self.data.eval_batch_size)
        with run.inference("answers"):
            return {
                name: torch.cat([network(batch).argmax(1) for batch in batches]).cpu()
                for name, network in self.networks.items()
            }


def _means(hits: dict[str, Tensor]) -> dict[str, float]:
    return {name: float(hit.double().mean()) for name, hit in hits.items()}
