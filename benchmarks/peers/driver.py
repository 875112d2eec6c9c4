"""Times one peer through its public interface; `peers.py` runs this program in the peer's environment.

    python driver.py PEER JOB.json RESULT.json

The job holds the model's directory, the prompts as token ids, the number of new tokens, the members of a measurement,
and the number of measurements. Each function below is the shortest use of a peer that fine-tunes the model on a reward
of its greedy completions. It returns the seconds per member of each measurement, with the peer's work for a whole
population (noise, update) included. The first measurement is a warm-up, which `peers.py` leaves out.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

SIGMA, LEARNING_RATE = 0.01, 1e-9  # so small that every measurement is of the same model


class Task:
    """A model, prompts as one left-padded batch, and a reward: how near a completion is to a length of 5 characters."""

    def __init__(self, job: dict[str, Any]) -> None:
        torch.set_num_threads(job["num_threads"])
        auto_model: Any = AutoModelForCausalLM
        self.model: Any = auto_model.from_pretrained(job["model"], dtype=torch.float32).eval()
        self.tokenizer: Any = AutoTokenizer.from_pretrained(job["model"])
        pad = self.tokenizer.pad_token_id
        self.model.generation_config = GenerationConfig(eos_token_id=None, pad_token_id=pad)  # no completion ends early
        length = max(map(len, job["prompts"]))
        self.batch = {
            "input_ids": torch.tensor([[pad] * (length - len(row)) + row for row in job["prompts"]]),
            "attention_mask": torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in job["prompts"]]),
        }  # (B, P)
        self.tokens, self.members, self.measurements = job["tokens"], job["members"], job["measurements"]
        self.evaluated = 0

    @torch.no_grad()
    def reward(self, *_: Any) -> float:
        """Return the mean reward of the model's present weights.

        Raises:
            RuntimeError: a completion has another length than the job's.
        """
        output = self.model.generate(**self.batch, do_sample=False, max_new_tokens=self.tokens)
        new = output[:, self.batch["input_ids"].shape[1] :]  # (B, T)
        if new.shape[1] != self.tokens:
            raise RuntimeError(f"completions of {new.shape[1]} tokens, not {self.tokens}")
        self.evaluated += 1
        texts = self.tokenizer.batch_decode(new, skip_special_tokens=True)
        return -sum(abs(len(text) - 5) for text in texts) / len(texts)

    def timed(self, measure: Callable[[], Any], members: int) -> list[float]:
        """Call ``measure`` once for each measurement; return seconds per member.

        Raises:
            RuntimeError: a call evaluated another number of members.
        """
        seconds = []
        for _ in range(self.measurements):
            before, started = self.evaluated, time.perf_counter()
            measure()
            seconds.append((time.perf_counter() - started) / members)
            if self.evaluated - before != members:
                raise RuntimeError(f"{self.evaluated - before} members were evaluated, not {members}")
        return seconds


def eggroll_es(task: Task) -> list[float]:
    """Time EggrollTrainer; a measurement is one generation of the population."""
    from eggroll import CustomReward, EggrollConfig, EggrollTrainer

    config = EggrollConfig(
        population_size=task.members,
        rank=1,
        sigma=SIGMA,
        lr=LEARNING_RATE,
        generations=1,
        antithetic=False,
        fitness_shaping="normalized",
        device="cpu",
    )
    trainer = EggrollTrainer(task.model, config, CustomReward(task.reward), task.tokenizer)
    return task.timed(lambda: trainer.evolve([task.batch]), task.members)


def torcheggroll(task: Task) -> list[float]:
    """Time TorchEggrollES; every member's parameters are copied into the model before it generates."""
    from torcheggroll import TorchEggrollES

    es = TorchEggrollES(
        task.model,
        pop_size=task.members,
        sigma=SIGMA,
        lr=LEARNING_RATE,
        rank=1,
        antithetic=False,
        device=torch.device("cpu"),
    )
    parameters = dict(task.model.named_parameters())

    @torch.no_grad()
    def member(values: dict[str, torch.Tensor]) -> float:
        for name, parameter in parameters.items():
            parameter.copy_(values[name])
        return task.reward()

    def step() -> None:
        es.apply_fitness_scores(torch.tensor([member(values) for values in es.prepare_population()]))

    return task.timed(step, task.members)


def mezo(task: Task) -> list[float]:
    """Time MeZO's update by a mirrored pair of members; the loss is the negative reward."""
    from mezo import update

    seeds = iter(range(task.measurements))

    def pair() -> None:
        update(
            task.model,
            task.batch,
            lambda *_: torch.tensor(-task.reward()),
            epsilon=SIGMA,
            learning_rate=LEARNING_RATE,
            random_seed=next(seeds),
        )

    return task.timed(pair, 2)


def evotorch(task: Task) -> list[float]:
    """Time PGPE over the model's parameters as one vector, mirrored, with a fixed standard deviation."""
    from evotorch.algorithms import PGPE
    from evotorch.neuroevolution import NEProblem

    problem = NEProblem("max", task.model, network_eval_func=lambda _: task.reward(), num_actors=0)
    center = torch.nn.utils.parameters_to_vector(task.model.parameters()).detach()
    searcher = PGPE(
        problem,
        popsize=task.members,
        center_learning_rate=LEARNING_RATE,
        stdev_learning_rate=0.0,
        stdev_init=SIGMA,
        center_init=center,
    )
    return task.timed(searcher.step, task.members)


PEERS = {"eggroll-es": eggroll_es, "torcheggroll": torcheggroll, "mezo": mezo, "evotorch": evotorch}


def main() -> None:
    """Run one peer and write its times to a file, because peers print to stdout."""
    name, job, result = sys.argv[1:]
    seconds = PEERS[name](Task(json.loads(Path(job).read_text(encoding="utf-8"))))
    Path(result).write_text(json.dumps({"seconds_per_member": seconds}), encoding="utf-8")


if __name__ == "__main__":
    main()
