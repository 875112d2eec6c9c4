"""ESTrainer: the training loop. `ESTrainer.train` implements evolution strategies (arXiv 2509.24372):

    theta += learning_rate / N * sum_m utilities_m * sign_m * eps(seed_m)

`estune.train.session` holds the parts of an open run. `estune.run` writes the run's files. An engine of
`estune.engines` generates completions, and `estune.rewards` scores them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from estune.config import ESConfig
from estune.console import counted, say
from estune.es.fitness import fill_failures, shape_fitness, weigh
from estune.es.types import Interrupted
from estune.models.hub import push
from estune.run.best import described, evaluations_of, stops_early
from estune.run.card import CARD_FILE, write_card
from estune.run.checkpoint import read_state
from estune.run.directory import is_finished
from estune.train.base_trainer import BaseTrainer
from estune.train.opening import hub_repository, open_session
from estune.train.output import TrainOutput


class ESTrainer(BaseTrainer):
    """Fine-tunes all parameters of a language model with evolution strategies.

    The arguments have TRL's names and order. If ``model``, ``reward_funcs`` or a dataset is omitted, the configuration
    ``args`` names it.

    Args:
        model: a directory, a hub id, ``tiny``, or an ``AutoModelForCausalLM`` in memory.
        reward_funcs: one TRL reward function or a list of them; a string names ``package.module:function``.
        args: the configuration.
        train_dataset: rows with a ``prompt`` or another layout (`estune.data.layouts`): a list of dicts, a
            ``datasets.Dataset``, a data frame, a stream that ends, or a dict of these by split.
        eval_dataset: held-out rows for ``eval_steps`` and `evaluate`. Default: a split of a dict ``train_dataset``.
        processing_class: the tokenizer of a ``model`` in memory.
        callbacks: `transformers.TrainerCallback` objects or classes; see `estune.train.callbacks`.

    Raises:
        UserError: the input is invalid; the message gives the reason in one sentence.
    """

    def train(
        self,
        resume_from_checkpoint: str | Path | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: Any = None,
        *,
        theta_joins_first_step: bool = True,
        **unknown: Any,
    ) -> TrainOutput:
        """Train (or resume) until ``max_steps``, write the model, and return the run directory with its metrics.

        SIGINT, SIGTERM or SIGHUP stops the run early: it saves a checkpoint and returns.

        Args:
            resume_from_checkpoint: True or the path of a checkpoint in ``output_dir``: continue the run there, from
                the last step of its journal, as the option ``resume`` does.
            trial: has no effect; transformers has it.
            ignore_keys_for_eval: has no effect; transformers has it.
            theta_joins_first_step: whether theta also answers the first step's rows, so that warnings can compare the
                members with theta.

        Raises:
            UserError: the input is invalid, or there is no run to continue.
        """
        request = self.begin(resume_from_checkpoint, unknown)
        run_dir = request.make_run_directory()
        if self.args.resume and is_finished(run_dir, self.args, request.given_args):
            complete_finished_run(run_dir, self.args)
            return self.found_finished(run_dir)
        with open_session(request, theta_joins_first_step=theta_joins_first_step) as session:
            args, weights = session.args, request.rewards.weights
            try:
                session.begin_callbacks(session.run.steps_done)
                session.evaluate_and_save()  # what is due: before the first step, or after a crash
                while not session.ended:
                    step = session.plan()  # rows (B,), members (N,), noise, learning rate
                    rollouts = session.evaluate_population(step)  # rewards (N, B, G, F)
                    theta = session.evaluate_theta(step, rollouts)  # if due
                    rewards = fill_failures(rollouts.rewards, rollouts.failed, weights)  # (N, B, G, F)
                    weighed = weigh(rewards, weights)  # (N, B, G)
                    fitness, utilities = shape_fitness(weighed, args.fitness_shaping)  # (N,), (N,)
                    step = session.control(step, weighed, fitness, utilities, theta)  # a smaller learning rate, or not
                    update = step.update(utilities)
                    measured = session.measure(step, rewards, fitness, rollouts, theta)  # metrics, warnings
                    session.journal(step, fitness, rollouts, update, measured)  # on disk before theta moves
                    applied = session.apply(update)  # theta moves
                    session.log(measured, applied)  # metrics; evaluation and checkpoint if due
                session.finish()
            except Interrupted:
                self.stopped = True
                session.save_interrupted()
            self._steps_done = session.run.steps_done
        return self.output()


def complete_finished_run(run_dir: Path, args: ESConfig) -> None:
    """Write a finished run's model card if a kill prevented it, and upload the model with ``push_to_hub``."""
    state = read_state(run_dir)
    best = state.get("best") if state is not None else None
    steps = best["global_step"] if best is not None else state["step"] if state is not None else args.max_steps
    early = ", stopped early: a larger early_stopping_patience continues it" if _is_early(run_dir, args, steps) else ""
    model = f"; {described(best)}" if best is not None else ""
    say(f"estune: {run_dir} is finished ({counted(steps, 'step')}{early}){model}; nothing to do")
    if not (run_dir / CARD_FILE).exists():  # the run was killed between the last checkpoint and the card
        write_card(run_dir)
    if args.push_to_hub:
        say(f"estune: {push(run_dir, hub_repository(args))}")


def _is_early(run_dir: Path, args: ESConfig, steps_done: int) -> bool:
    """Return whether early stopping ended a finished run, and more patience continues it."""
    return (
        steps_done < args.max_steps and not args.max_time_s and stops_early(args, evaluations_of(run_dir), steps_done)
    )
