"""Figures and tables of a run's classifiers: confusion matrix, scores per class, mistakes, precision and recall."""

from __future__ import annotations

from torch import Tensor

from runner import figures
from runner.metrics import accuracy, per_class
from runner.outputs import Predictions
from runner.task import Run

_MOST_DRAWN = 100  # classes in a picture; the table holds them all
_SHOWN = 32  # mistakes


def counts_to_keep(run: Run) -> dict[str, Tensor]:
    """Return the confusion matrices (C, C) that pictures of the trained networks compare with, by variant."""
    counts = {variant: answers.counts for variant, answers in run.predictions.items()}
    return {variant: matrix for variant, matrix in counts.items() if len(matrix) <= _MOST_DRAWN}


def draw_pr_curves(run: Run, split: str) -> None:
    """Draw a precision-recall curve per class and classifier in TensorBoard."""
    for variant, answers in run.predictions.items():
        if run.draws and len(answers.counts) <= _MOST_DRAWN:
            run.pr_curves(split, answers.targets, answers.probabilities, variant)


def show(run: Run, split: str, before: dict[str, Tensor]) -> None:
    """Draw and tabulate the classifiers' answers on a split.

    One network is compared with itself `before` training, if its counts (C, C) are there, several with each other.
    """
    counts = {variant: answers.counts for variant, answers in run.predictions.items()}
    if len(counts) == 1:
        [(variant, after)] = counts.items()
        counts = {"before": before[variant], "after": after} if variant in before else {"after": after}
    sizes = {len(matrix) for matrix in counts.values()}
    if len(sizes) == 1:  # networks with classes of their own are not compared
        _show_counts(run, counts, *sizes)
    draw_pr_curves(run, split)
    for variant, answers in run.predictions.items():
        _draw_mistakes(run, split, variant, answers)


def _show_counts(run: Run, counts: dict[str, Tensor], num_classes: int) -> None:
    """Draw confusion matrices (C, C) side by side; draw and tabulate scores per class."""
    # table
    names = run.class_names(num_classes)
    tables = {label: per_class(matrix) for label, matrix in counts.items()}
    last = list(tables.values())[-1]
    scores = [name for name in last if name != "support"]
    columns = {f"{score} {label}": table[score] for score in scores for label, table in tables.items()}
    rows = zip(names, *(values.tolist() for values in [*columns.values(), last["support"]]), strict=True)
    run.table("per_class", ["class", *columns, "support"], [list(row) for row in rows])

    # pictures
    if not run.draws or num_classes > _MOST_DRAWN:
        return
    titles = {"before": "before training", "after": "after training"}
    panels = {f"{titles.get(label, label)}: accuracy {accuracy(n):.3f}": n for label, n in counts.items()}
    run.figure("confusion", figures.confusion_matrices(panels, names))
    labelled = {titles.get(label, label): table for label, table in tables.items()}
    run.figure("per_class", figures.per_class_scores(labelled, names))


def _draw_mistakes(run: Run, split: str, variant: str, answers: Predictions) -> None:
    """Draw the most confident wrong predictions; nothing where there are none, or where inputs are no images."""
    inputs = run.splits[split].inputs
    if not (run.draws and answers.of_samples and figures.are_images(inputs)):
        return

    # the most confident
    targets, places = answers.targets, answers.places
    if places.max() >= len(inputs):  # a task that counts every pixel as a sample
        return
    certainty, labels = answers.probabilities.max(1)
    wrong = (labels != targets).nonzero().squeeze(1)
    shown = wrong[certainty[wrong].argsort(descending=True)][:_SHOWN]
    if len(shown) == 0:
        return

    # picture
    names = run.class_names(len(answers.counts))
    captions = [
        figures.label_caption(names, int(labels[i]), int(targets[i]), f" {certainty[i]:.0%}") for i in shown
    ]
    title = f"the most confident of {len(wrong):,} mistakes on {len(targets):,} {split} images"
    images = inputs[places[shown].to(inputs.device)].cpu()
    name = f"mistakes_{variant}".rstrip("_")
    run.figure(name, figures.image_grids({title: images}, [captions], columns=8))
