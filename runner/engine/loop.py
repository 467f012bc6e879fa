"""The training loop: it counts optimiser steps, and knows neither the experiment nor the config files."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from runner.data import Batch, train_batch
from runner.engine.monitor import Monitor, profiled
from runner.engine.state import Objective, PruneCallback, Schedule, TrainingState
from runner.errors import memory_for
from runner.outputs import Output, hook_error, outputs_of
from runner.streams import reseed, seed_of
from runner.task import Interrupted


@dataclass
class Trainer:
    """Train the networks of one run, from where its state stands until its `config` says stop."""

    state: TrainingState  # changed in place
    schedule: Schedule  # (step, steps) → factor on the learning rate
    objective: Objective
    save: Callable[[str], None]  # write the state to the checkpoint of that name
    should_prune: PruneCallback | None = None

    def fit(self) -> None:
        """Train, evaluate, record and save until the last step, or until the objective no longer improves.

        Raises:
            Interrupted: the user asked to stop; the state is saved.
            Pruned: the pruner stops this run; the state is saved.
            NonFinite: a loss, a gradient or a weight is no longer finite; the last good checkpoint stays.
            UserError: a step does not fit into memory; the last good checkpoint stays.
        """
        state, run, config, progress = self.state, self.state.run, self.state.config, self.state.progress
        if not run.networks or run.data is None or "train" not in run.splits:
            return
        monitor = Monitor(state, self.objective, self.save, self.should_prune)
        steps, eval_every = monitor.steps, monitor.eval_every
        save_every = config.save_every or eval_every
        for network in run.networks.values():
            network.train()

        try:
            # the last evaluation goes to the pruner, which a kill may have prevented
            monitor.report_last_evaluation()

            with profiled(config.profile, run) as profile_step:
                while True:
                    # evaluation, unless a resumed run has done it
                    due = progress.step % eval_every == 0 or progress.step == steps
                    if due and progress.evaluated < progress.step:
                        monitor.evaluate()

                    # the end: all steps are done, or patience has run out
                    impatient = config.patience is not None and progress.stale >= config.patience
                    if progress.step >= steps or impatient:
                        return

                    # one optimiser step
                    with memory_for("data.batch_size", run.data.batch_size):
                        self.train_step(steps)
                    monitor.bar.update()
                    profile_step()

                    # the training metrics, before a stop: their row is due now, not after the resume
                    if progress.step % config.log_every == 0:
                        monitor.record()

                    # a checkpoint between evaluations
                    if progress.step % save_every == 0 and progress.step % eval_every:
                        self.save("last")

                    if run.stop_requested:
                        raise Interrupted
        except Interrupted:
            monitor.clock.read(progress)
            self.save("last")
            raise
        finally:
            monitor.bar.close()

    def train_step(self, steps: int) -> None:
        """Take one optimiser step of a run of `steps`, without waiting for the device.

        The batches, the learning rate and the random numbers depend on nothing but the seed and the step.
        """
        state, run, config = self.state, self.state.run, self.state.config
        assert run.data is not None
        step = state.progress.step

        # learning rate
        factor = self.schedule(step, steps)
        for name, optimizer in state.optimizers.items():
            for group, rate in zip(optimizer.param_groups, state.learning_rates[name], strict=True):
                group["lr"] = rate * factor

        # random stream of this step, such as dropout's
        reseed(seed_of(run.seed, "step", step, run.rank), run.device)

        # gradient accumulation: forward and backward
        for optimizer in state.optimizers.values():
            optimizer.zero_grad(set_to_none=True)
        losses = dict.fromkeys(run.networks, torch.zeros((), device=run.device))
        for part in range(config.accumulate):
            index = step * config.accumulate + part
            if config.repeat_batches is not None:
                index %= config.repeat_batches
            batch = train_batch(run.data, run.splits["train"], run.seed, index, run.rank, run.world_size)
            with run.compute.autocast():
                outputs = self._forward(batch)
            # the variants share no parameters: one backward pass serves them all
            torch.autograd.backward([output.loss / config.accumulate for output in outputs.values()])
            state.meters.update(outputs, len(batch.inputs))
            losses = {name: losses[name] + outputs[name].loss.detach() for name in losses}

        for name, network in run.networks.items():
            # clip
            if not any(parameter.grad is not None for parameter in network.parameters()):
                expected = "a loss that depends on the network that build returned"
                raise hook_error(state.task.train, expected, "one that does not: no parameter has a gradient")
            norm, clipped = clip(network.parameters(), config.clip_norm)
            state.gradients.update(name, step, losses[name], norm, clipped)

            # optimizer step
            state.optimizers[name].step()

            # average
            if name in state.emas:
                state.emas[name].update(step)

        state.gradients.steps += 1
        state.progress.step = run.step = step + 1

    def _forward(self, batch: Batch) -> dict[str, Output]:
        train, names = self.state.task.train, self.state.run.networks.keys()
        outputs = outputs_of(train, batch)
        if outputs.keys() != names:
            shown = [", ".join(keys) or "one" for keys in (names, outputs)]
            raise hook_error(train, f"an Output per network of build ({shown[0]})", shown[1])
        return outputs


def clip(parameters: Iterable[nn.Parameter], limit: float | None) -> tuple[Tensor, Tensor]:
    """Scale the gradients so that their global 2-norm is at most `limit` (Pascanu et al. 2013, algorithm 1).

    Returns the norm before and after, scalars on the device.
    """
    with_gradient = [parameter for parameter in parameters if parameter.grad is not None]
    norm = nn.utils.get_total_norm([p.grad for p in with_gradient if p.grad is not None])
    if limit is None:
        return norm, norm
    nn.utils.clip_grads_with_norm_(with_gradient, limit, norm)
    return norm, norm.clamp(max=limit)
