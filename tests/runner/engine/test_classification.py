"""What every classifier gets without asking: its counts per class, pictures of them, and its mistakes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure
from sklearn.metrics import confusion_matrix, f1_score, precision_recall_fscore_support
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.nn.functional import cross_entropy, one_hot

from runner import figures
from runner.data import Split
from runner.engine import classification
from runner.outputs import Meters, Output
from runner.records.tracker import Tracker
from tests.conftest import TOYS
from tests.runner.engine.helpers import summary, table
from tests.runner.test_task import make_run

GALLERY = ("experiment=gallery", "threads=1", "loop.epochs=2")
PAD = -100


def answered(targets: torch.Tensor, seed: int = 0) -> Output:
    """Return the output of a classifier of four classes that is right more often than not."""
    logits = torch.randn(*targets.shape, 4, generator=torch.Generator().manual_seed(seed))
    logits += 2 * one_hot(targets.clamp(min=0), 4)
    loss = cross_entropy(logits.flatten(0, -2), targets.flatten())
    return Output(loss, logits, targets)


def sequences(count: int = 6) -> torch.Tensor:
    """Return targets (count, 5), the last two of every second sequence padding."""
    targets = torch.randint(4, (count, 5), generator=torch.Generator().manual_seed(1))
    targets[::2, 3:] = PAD
    return targets


def test_a_classifier_is_tabulated_and_drawn_without_asking_unless_figures_are_off(cli, last_run):
    def left(*overrides):
        assert cli(*GALLERY, *overrides, config_dir=TOYS).status == 0
        folder = last_run()
        tags = EventAccumulator(str(folder), size_guidance={"tensors": 0}).Reload().Tags()
        tables = {path.name: path.read_bytes() for path in (folder / "tables").glob("*.csv")}
        pictures = {path.name for path in folder.rglob("*") if path.suffix in (".png", ".gif")}
        return pictures, set(tags["images"]), set(tags["tensors"]), tables, summary(folder)["metrics"]["test"]

    # without asking
    names = ["Ankle boot", "T-shirt/top", "裙子"]
    drawn, metrics = left(), summary(last_run())["metrics"]
    assert drawn[0] >= {"confusion.png", "per_class.png"} and drawn[1] >= {"confusion", "per_class"}
    rows = table(last_run() / "tables" / "per_class.csv")
    assert [row["class"] for row in rows] == names and [row["support"] for row in rows] == ["20"] * 3
    for when, values in (("before", metrics["before"]["test"]), ("after", metrics["test"])):
        for score in ("precision", "recall", "f1"):
            assert sum(float(row[f"{score} {when}"]) for row in rows) / 3 == pytest.approx(values[score])

    # without figures
    plain = left("figures=false")
    assert not plain[0] and not plain[1] and plain[3:] == drawn[3:]
    assert drawn[2] - plain[2] == {f"test/{name}" for name in names}


@pytest.mark.parametrize("targets", [sequences(), sequences().flatten(), sequences()[:, None]], ids="T1H")
def test_sequences_count_by_their_elements_without_the_padding(targets):
    meters = Meters(keep=True)
    for number, part in enumerate(targets.split(4)):
        meters.update({"": answered(part, number)}, len(part))
    outputs = [answered(part, number) for number, part in enumerate(targets.split(4))]
    logits, counted = torch.cat([o.logits for o in outputs]), targets != PAD
    expected, found = targets[counted], logits.argmax(-1)[counted]
    values, kept = meters.compute(), meters.predictions[""]
    assert values["accuracy"] == pytest.approx(float((expected == found).double().mean()))
    assert values["f1"] == pytest.approx(f1_score(expected, found, average="macro"))
    assert values["loss"] == pytest.approx(float(cross_entropy(logits[counted], expected)), rel=1e-6)
    assert kept.counts.tolist() == confusion_matrix(expected, found, labels=range(4)).tolist()
    assert torch.equal(kept.targets, expected) and torch.equal(kept.labels, found)
    torch.testing.assert_close(kept.probabilities, logits[counted].softmax(1))


def test_words_have_a_loss_and_an_accuracy_alone():
    targets = torch.tensor([[5, 1200, PAD]])
    logits = one_hot(torch.tensor([[5, 3, 0]]), 1201).float()
    meters = Meters(keep=True)
    meters.update({"": Output(torch.tensor(1.5), logits, targets)}, 1)
    assert meters.compute() == {"loss": 1.5, "accuracy": 0.5} and not meters.predictions


def shown(tmp_path: Path, outputs: dict[str, Output], inputs: torch.Tensor) -> dict[str, Figure]:
    """Return the pictures of a run whose classifiers answered this, not drawn."""
    meters, pictures = Meters(keep=True), {}
    meters.update(outputs, len(inputs))
    tracker = Tracker(tmp_path)
    tracker.figure = lambda name, figure, step: pictures.update({name: figure})
    classification.show(
        make_run(splits={"test": Split(inputs)}, predictions=meters.predictions, tracker=tracker), "test", {}
    )
    tracker.close()
    return pictures


def test_variants_are_compared_with_each_other(tmp_path):
    targets = torch.arange(40) % 4
    outputs = {"small": answered(targets, 1), "large": answered(targets, 2)}
    assert set(shown(tmp_path, outputs, torch.zeros(40, 2))) == {"confusion", "per_class"}
    for number, (variant, output) in enumerate(outputs.items()):
        theirs = precision_recall_fscore_support(targets, output.logits.argmax(1))
        for score, column in zip(("precision", "recall", "f1"), theirs, strict=False):
            rows = table(tmp_path / "tables" / "per_class.csv")
            assert [float(row[f"{score} {variant}"]) for row in rows] == pytest.approx(column.tolist()), (
                number
            )


@pytest.mark.parametrize(
    ("inputs", "drawn"),
    [
        (torch.arange(40)[:, None, None].expand(-1, 6, 5).byte(), True),
        (torch.rand(40, 1, 6, 5), True),
        (torch.rand(40, 3, 6, 5), True),
        (torch.zeros(40, 6, 5), False),
        (torch.zeros(40, 2, 6, 5), False),
    ],
    ids=lambda value: str(tuple(value.shape)) if isinstance(value, torch.Tensor) else "",
)
def test_mistakes_on_images_are_drawn(tmp_path, monkeypatch, inputs, drawn):
    """The most confident first, each with what it was taken for."""
    grids = []
    monkeypatch.setattr(figures, "image_grids", lambda *args, **_: grids.append(args) or figures.new()[0])
    targets = torch.arange(40) % 4
    targets[::3] = PAD
    output = answered(targets)
    wrong = ((output.logits.argmax(1) != targets) & (targets != PAD)).nonzero().flatten().tolist()
    assert ("mistakes" in shown(tmp_path, {"": output}, inputs)) == drawn
    if drawn:
        [(panels, [captions])] = grids
        [(title, images)] = panels.items()
        assert f"{len(wrong)} mistakes on 26 test images" in title and len(captions) == len(wrong)
        assert sorted(map(float, images.flatten(1)[:, 0])) == sorted(map(float, inputs.flatten(1)[wrong, 0]))
        order = [int(text.partition("\n")[0].split()[1].rstrip("%")) for text, _ in captions]
        assert order == sorted(order, reverse=True)


@pytest.mark.parametrize("classes", [40, 101])
def test_many_classes_are_drawn_smaller_and_at_last_only_tabulated(tmp_path, classes):
    targets = torch.arange(2 * classes) % classes
    logits = one_hot(targets, classes).float()
    output = Output(torch.zeros(()), logits, targets)
    pictures = shown(tmp_path, {"": output}, logits)
    assert set(pictures) == ({"confusion", "per_class"} if classes < 100 else set())
    assert len(table(tmp_path / "tables" / "per_class.csv")) == classes
    assert all(max(figure.get_size_inches()) < 15 for figure in pictures.values())


def test_evaluation_measures_the_splits_that_there_are(cli, last_run):
    """What is shown of val, without a test split, is not recorded twice."""
    assert cli("experiment=toy_paced", "data.splits=[train,val]", config_dir=TOYS).status == 0
    run = last_run()
    rows = [row for row in table(run / "metrics.csv") if row["split"] == "val"]
    assert [int(row["step"]) for row in rows] == [0, 3, 6, 9, 10]
    assert {row["support"] for row in table(run / "tables" / "per_class.csv")} == {"40"}
    for splits, measured in {"train,val": "val", "train": "train", "train,other": "other"}.items():
        again = ("mode=eval", f"checkpoint={run}/checkpoints/best.pt", f"data.splits=[{splits}]")
        done = cli(*again, config_dir=TOYS)
        assert done.status == 0 and re.search(rf"^metric +{measured}$", done.out, re.MULTILINE)
        newest = max((run / "eval").iterdir(), key=lambda path: path.stat().st_ctime_ns)
        assert set(summary(newest)["metrics"]) == {measured}


def test_evaluation_of_nothing_says_so(cli, last_run):
    assert cli("experiment=toy_checks", "threads=1", config_dir=TOYS).status == 0
    done = cli("mode=eval", f"checkpoint={last_run()}/checkpoints/last.pt", config_dir=TOYS)
    assert done.status == 0 and "No metrics: toy_checks builds no network." in done.out
