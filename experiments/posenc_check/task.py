"""Absolute and rotary positions proved by numbers, seen in pictures and spreadsheets, and learnt with and without.

Before training: a random matrix through each encoding, what is claimed of them held against measured numbers, and
我爱你 / 你爱我 through one attention layer. Then three networks, alike but for the encoding (none, absolute, rotary),
learn who does what to whom from the order of words; after it, how far what they learnt carries to longer sentences.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import torch
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
from experiments.nn.encoder import ENCODINGS
from experiments.nn.positions import AbsPosEncoding, RotaryPosEncoding, inverse_frequencies
from experiments.posenc_check import claims
from experiments.posenc_check.checks import check_absolute, check_rotary, check_word_order
from experiments.posenc_check.figures import (
    accuracy,
    draw_accuracies,
    draw_decay,
    draw_encoding,
    draw_rotation,
    draw_similarity,
    draw_wavelengths,
)
from experiments.posenc_check.setups import (
    BASE,
    DISTANCES,
    LEARNT,
    MOVED_SENTENCES,
    MOVES,
    STANDARD_ERRORS,
    Accuracies,
)
from experiments.posenc_check.sheets import matrix_sheet, rotation_sheet, table_sheets
from runner import figures
from runner.data import Batch, Data, Split
from runner.metrics import Classification
from runner.task import Output, Run, Task


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
