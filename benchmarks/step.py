"""Times a whole ES step on SmolLM2-135M: the paper's loop, full and low-rank noise, and pure generation.

    estune fetch smollm2-135m
    python benchmarks/step.py --model models/smollm2-135m          # about 40 minutes on 2 cores

There are two cases with N = 30 members: the 2 conciseness prompts with 32 tokens, and 24 Countdown prompts with 64
tokens. To make the work equal, every completion has exactly that many tokens in every variant. The model is read from a
directory of links to its files, none of which names an end-of-text token, and a completion of another length is an
error. All variants run in one process, one after another in every repetition. The first repetition is a warm-up,
and medians are reported.

* paper: `paper_loop.py`; one member a repetition, times N.
* full: an estune session (perturb, generate, score); one member a repetition, times N, plus the update of all N.
* lowrank: the lines of the loop in `ESTrainer.train`. In the first case a whole step; in the second one forward pass
  of several members, times the passes of a step, plus the update of all N.
* pure: generation alone for as many rows as a low-rank forward pass has, by transformers and by estune's decoding. The
  faster of the two is the limit. estune's decoding takes the rows in groups, one for each member. Groups do not share
  the reading of equal prompts, because members with different weights cannot. It is timed before and after the low-rank
  step, and the mean counts.
* pure_shared: estune's decoding of the same rows by one model that reads equal prompts once. It is no limit for
members;
  it shows the cost of different weights.

Utilities are a fixed ramp, and the learning rate is so small that theta keeps its values although every update does its
whole work. The result is written to `benchmarks/results/step.json`.

    python benchmarks/memory.py --model 1.5B --save models/random-1.5b     # on a GPU: a larger, random model in 16 bits
    python benchmarks/step.py --model models/random-1.5b --device cuda --dtype bfloat16 --members_per_batch 30 \\
        --task countdown --name step_gpu

With a GPU every variant runs there, and clocks are read after the device has finished.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from paper_loop import PaperLoop, now
from record import write_result
from transformers import AutoModelForCausalLM, GenerationConfig

from estune import ESConfig, ESTrainer
from estune.engines.hf import decoding
from estune.engines.hf.allocator import keep_freed_memory
from estune.engines.hf.callers import AttentionCaller, left_pad
from estune.es.fitness import fill_failures, shape_fitness, weigh
from estune.es.update import Update, make_update
from estune.train.opening import open_session
from estune.train.session import Session
from estune.train.step import Step, plan_step, sampling_of

LEARNING_RATE = 1e-12  # so small that theta keeps its values
MAX_STEPS = 1_000_000  # never reached
NAME_END_TOKENS = ("generation_config.json", "tokenizer_config.json", "special_tokens_map.json")


@dataclasses.dataclass(frozen=True)
class Case:
    """The work of a step: ``prompts`` rows for each member, ``tokens`` new tokens for each row."""

    name: str
    prompts: int
    tokens: int
    members_per_batch: int | str  # members in one low-rank forward pass
    whole_step: bool  # whether the low-rank variant runs all N members
    repetitions: int
    task: str


CASES = (
    Case("conciseness", 2, 32, "auto", True, 9, "conciseness"),
    Case("countdown", 24, 64, 6, False, 5, "countdown"),
)


def endless_model(model: Path, directory: Path) -> Path:
    """Create a directory of links to a model's files, but with copies of `NAME_END_TOKENS` that name no such token."""
    directory.mkdir()
    for file in model.iterdir():
        if file.name not in NAME_END_TOKENS:
            (directory / file.name).symlink_to(file.resolve())
    for name in NAME_END_TOKENS:
        settings = json.loads((model / name).read_text(encoding="utf-8")) if (model / name).is_file() else {}
        settings = {key: value for key, value in settings.items() if not key.startswith("eos_token")}
        if name == "generation_config.json":
            settings["eos_token_id"] = []
        (directory / name).write_text(json.dumps(settings), encoding="utf-8")
    return directory


@dataclasses.dataclass(frozen=True)
class Place:
    """Threads, device and dtype of the model."""

    num_threads: int | str = "auto"
    device: str = "cpu"
    dtype: str = "float32"


def es_config(case: Case, noise: str, model: Path, run: Path, population_size: int, place: Place) -> ESConfig:
    """Return the configuration of a case's run."""
    lowrank = {"members_per_batch": case.members_per_batch} if noise == "lowrank" else {}
    return ESConfig(
        model=str(model),
        output_dir=str(run),
        noise=noise,
        population_size=population_size,
        sigma=0.01,
        learning_rate=LEARNING_RATE,
        step_control="none",
        batch_size=case.prompts,
        max_completion_length=case.tokens,
        max_steps=MAX_STEPS,
        report_to=["none"],
        num_threads=place.num_threads,
        device=place.device,
        dtype=place.dtype,
        task=case.task,
        **lowrank,
    )


class Bench:
    """A case with the open sessions and models of its variants."""

    def __init__(
        self,
        case: Case,
        stack: ExitStack,
        model: Path,
        directory: Path,
        population_size: int,
        place: Place,
    ) -> None:
        self.case, self.population_size = case, population_size
        self.sessions: dict[str, Session] = {}
        for noise in ("full", "lowrank"):
            run = directory / f"{case.name}-{noise}"
            request = ESTrainer(args=es_config(case, noise, model, run, population_size, place)).request
            request.make_run_directory()
            self.sessions[noise] = stack.enter_context(open_session(request))
        lowrank = self.sessions["lowrank"]
        engine: Any = lowrank.engine
        if not engine.facts.header["shared_forward"]:
            raise RuntimeError(
                "low-rank members do not share a forward pass with this model; the fallback is not measured"
            )
        torch.set_num_threads(int(lowrank.args.num_threads))  # the paper's loop uses as many as the engine
        keep_freed_memory()  # as in a process of the command line
        self.step = plan_step(lowrank.args, lowrank.batches, 0)
        self.prompts = [lowrank.train_prompts[row] for row in self.step.rows]  # (B,)
        self.members_per_batch = min(int(lowrank.args.members_per_batch), population_size)
        self.batch_prompts = self.prompts * self.members_per_batch  # the rows of one low-rank forward pass
        auto_model: Any = AutoModelForCausalLM
        self.hf_model = auto_model.from_pretrained(model, dtype=engine.model.dtype).eval().to(engine.device)
        pad = engine.assets.tokenizer.pad_token_id
        self.hf_model.generation_config = GenerationConfig(eos_token_id=None, pad_token_id=pad)
        self.pad = pad
        self.paper = PaperLoop(self.hf_model, *self._batch(self.prompts), case.tokens)
        self.members_timed = 0  # by the paper's loop and with full noise; every repetition times another member

    def _batch(self, prompts: list[Any]) -> tuple[torch.Tensor, torch.Tensor]:
        return left_pad([prompt.token_ids for prompt in prompts], self.pad, self.hf_model.device)

    def paper_member(self) -> dict[str, float]:
        """Time one member of the paper's loop."""
        return self.paper.time_member(self.members_timed, self.step.sigma, 1e-12)

    def full_member(self) -> dict[str, float]:
        """Time one member with full noise (perturb, generate, score), and the update by all N."""
        session = self.sessions["full"]
        step = plan_step(session.args, session.batches, 0)
        member = step.members[self.members_timed % len(step.members)]
        times = self._evaluate(session, dataclasses.replace(step, members=[member]))
        started = now()
        session.apply(ramp_update(step))
        return times | {"update": now() - started}

    def lowrank_step(self) -> dict[str, float]:
        """Time a step with low-rank noise as in `ESTrainer.train`, except for its utilities."""
        session = self.sessions["lowrank"]
        started = now()
        step = session.plan()
        rollouts = session.evaluate_population(step)
        evaluated = now()
        theta = session.evaluate_theta(step, rollouts)
        weights = session.rewards.weights
        rewards = fill_failures(rollouts.rewards, rollouts.failed, weights)
        fitness, _ = shape_fitness(weigh(rewards, weights), session.args.fitness_shaping)
        update = ramp_update(step)
        measured = session.measure(step, rewards, fitness, rollouts, theta)
        session.journal(step, fitness, rollouts, update, measured)
        session.log(measured, session.apply(update))
        ended = now()
        self._check(rollouts.lengths)
        return _parts(rollouts) | {
            "evaluate": evaluated - started,
            "update": ended - evaluated,
            "step": ended - started,
        }

    def lowrank_pass(self) -> dict[str, float]:
        """Time one forward pass of low-rank members with scoring, and the update by all N."""
        session = self.sessions["lowrank"]
        step = plan_step(session.args, session.batches, 0)
        times = self._evaluate(session, dataclasses.replace(step, members=step.members[: self.members_per_batch]))
        started = now()
        session.apply(ramp_update(step))
        return times | {"update": now() - started}

    def pure_transformers(self) -> dict[str, float]:
        """Time `generate` of transformers on the rows of a low-rank forward pass."""
        ids, mask = self._batch(self.batch_prompts)
        started = now()
        with torch.inference_mode():
            output = self.hf_model.generate(
                input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=self.case.tokens
            )
        seconds = now() - started
        self._check([output.shape[1] - ids.shape[1]])
        return {"generate": seconds}

    def pure_estune(self) -> dict[str, float]:
        """Time estune's decoding with theta on the rows of a low-rank forward pass, without sharing equal prompts."""
        session = self.sessions["lowrank"]
        engine: Any = session.engine
        engine.load_theta()
        rows = [decoding.Row(prompt.token_ids, prompt.row_id, 0) for prompt in self.prompts]
        groups, sampling = self.members_per_batch, sampling_of(session.args, 0)
        lengths = []
        started = now()
        with engine.working.in_use():
            for cut in decoding.cut(rows, engine.prompts_per_batch):
                caller = AttentionCaller(engine.model, engine._wide_mask, groups=groups)
                batch = [rows[i] for _ in range(groups) for i in cut]
                done = decoding.complete(
                    caller,
                    batch,
                    sampling,
                    engine.assets.end_tokens,
                    engine.assets.pad,
                    engine._stop,
                    lambda: False,
                    engine.device,
                )
                lengths += [len(completion.token_ids) for completion in done]
        seconds = now() - started
        self._check(lengths)
        return {"generate": seconds}

    def pure_shared(self) -> dict[str, float]:
        """Time estune's decoding with theta on the same rows; equal prompts are read once."""
        session = self.sessions["lowrank"]
        engine: Any = session.engine
        engine.load_theta()
        kept, engine.prompts_per_batch = engine.prompts_per_batch, len(self.batch_prompts)
        started = now()
        answers = engine.generate(None, self.batch_prompts, sampling_of(session.args, 0))
        seconds = now() - started
        engine.prompts_per_batch = kept
        self._check([len(completion.token_ids) for row in answers for completion in row])
        return {"generate": seconds}

    def _evaluate(self, session: Session, step: Step) -> dict[str, float]:
        started = now()
        rollouts = session.evaluate_population(step)
        seconds = now() - started
        session.run.pending.clear()  # else the next call would take the rewards of these members from it
        self._check(rollouts.lengths)
        return _parts(rollouts) | {"evaluate": seconds}

    def _check(self, lengths: Any) -> None:
        counts = torch.as_tensor(lengths)
        if not bool((counts == self.case.tokens).all()):
            raise RuntimeError(f"completions of {counts.min()} to {counts.max()} tokens, not {self.case.tokens}")

    def repetition(self) -> dict[str, dict[str, float]]:
        """Time every variant once."""
        paper, full = self.paper_member(), self.full_member()
        transformers, shared = self.pure_transformers(), self.pure_shared()
        # Before and after the step that it is compared with, because the machine's speed drifts.
        before = self.pure_estune()["generate"]
        lowrank = self.lowrank_step() if self.case.whole_step else self.lowrank_pass()
        after = self.pure_estune()["generate"]
        measured = {
            "paper": paper,
            "full": full,
            "lowrank": lowrank,
            "pure_transformers": transformers,
            "pure_estune": {"generate": (before + after) / 2, "before": before, "after": after},
            "pure_shared": shared,
        }
        self.members_timed += 1
        return measured

    def step_seconds(self, measured: dict[str, dict[str, float]]) -> dict[str, float]:
        """Return the seconds of a step of N members for each variant, from the times of one repetition."""
        n = self.population_size
        passes = n / self.members_per_batch
        full, lowrank = measured["full"], measured["lowrank"]

        def several(times: dict[str, float], count: float) -> float:
            """Return the seconds of ``count`` groups; a step waits for the scores of its last group only."""
            return count * (times["evaluate"] - times["score_wait"]) + times["score_wait"] + times["update"]

        return {
            "paper": n * measured["paper"]["member"],
            "full": several(full, n),
            "lowrank": lowrank["step"] if self.case.whole_step else several(lowrank, passes),
            "pure_transformers": passes * measured["pure_transformers"]["generate"],
            "pure_estune": passes * measured["pure_estune"]["generate"],
            "pure_shared": passes * measured["pure_shared"]["generate"],
        }

    def how(self) -> dict[str, str]:
        """Return for each variant a description: what was timed, and the factor to a whole step."""
        n, m = self.population_size, self.members_per_batch
        passes = f"one forward pass of {m * self.case.prompts} rows, times {n / m:g}"
        return {
            "paper": f"torch.randn, full rank: one member a repetition (perturb, generate, restore, update), times {n}",
            "full": f"full rank: one member a repetition (perturb, generate, score), times {n}, plus the update of {n}",
            "lowrank": f"rank 1: the whole step of {n} members, {m} in a forward pass"
            if self.case.whole_step
            else f"rank 1: one forward pass of {m} members, scored, times {n / m:g}, plus the update of {n} members",
            "pure_transformers": f"generate of transformers: {passes}",
            "pure_estune": f"estune's decoding, equal prompts of {m} groups read apart: {passes}",
            "pure_shared": f"one model, equal prompts read once: not available to members: {passes}",
        }


def ramp_update(step: Step) -> Update:
    """Return an update with evenly spread utilities, none of which is 0, independent of the rewards."""
    n = len(step.members)
    utilities = [(2 * index - n + 0.5) / n for index in range(n)]
    return make_update(
        step.members, utilities, step.learning_rate, distribution=step.noise.distribution, rank=step.noise.rank
    )


def _parts(rollouts: Any) -> dict[str, float]:
    return {
        "perturb": sum(group.perturb_s for group in rollouts.groups),
        "generate": sum(group.generate_s for group in rollouts.groups),
        "score_wait": rollouts.score_wait_s,
    }


def measure_case(case: Case, model: Path, directory: Path, population_size: int, place: Place) -> dict[str, Any]:
    """Return medians, ratios and the times of every repetition of one case."""
    with ExitStack() as stack:
        bench = Bench(case, stack, model, directory, population_size, place)
        bench.repetition()  # warm-up
        samples = []
        for index in range(case.repetitions):
            samples.append(bench.repetition())
            seconds_by_name = {name: round(seconds, 2) for name, seconds in bench.step_seconds(samples[-1]).items()}
            print(f"{case.name} {index + 1}/{case.repetitions}: seconds a step {seconds_by_name}", flush=True)
        steps = [bench.step_seconds(sample) for sample in samples]
        how, members_per_batch = bench.how(), bench.members_per_batch
    tokens = population_size * case.prompts * case.tokens
    variants = {}
    for name in samples[0]:
        seconds = statistics.median(step[name] for step in steps)
        variants[name] = {
            "how": how[name],
            "step_seconds": seconds,
            "tokens_per_s": tokens / seconds,
            "timed_seconds": {
                part: statistics.median(sample[name][part] for sample in samples) for part in samples[0][name]
            },
            "step_seconds_of_each_repetition": [step[name] for step in steps],
        }
    limits = [min(step["pure_transformers"], step["pure_estune"]) for step in steps]
    ratios = {
        "paper / lowrank": [step["paper"] / step["lowrank"] for step in steps],
        "paper / full": [step["paper"] / step["full"] for step in steps],
        "full / lowrank": [step["full"] / step["lowrank"] for step in steps],
        "pure / lowrank": [limit / step["lowrank"] for limit, step in zip(limits, steps, strict=True)],
        "pure / full": [limit / step["full"] for limit, step in zip(limits, steps, strict=True)],
        "pure_shared / lowrank": [step["pure_shared"] / step["lowrank"] for step in steps],
    }
    return {
        "prompts": case.prompts,
        "tokens": case.tokens,
        "repetitions": case.repetitions,
        "population_size": population_size,
        "members_per_batch": members_per_batch,
        "num_threads": torch.get_num_threads(),
        "variants": variants,
        "ratios": {name: {"median": statistics.median(values), "each": values} for name, values in ratios.items()},
    }


def measure(
    model: str | Path,
    population_size: int = 30,
    cases: tuple[Case, ...] = CASES,
    place: Place = Place(),
) -> dict[str, Any]:
    """Measure some cases; return their results by name. ``model`` is a directory, such as SmolLM2-135M-Instruct's."""
    source = Path(model).expanduser().resolve()
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        endless = endless_model(source, directory / "model")
        return {case.name: measure_case(case, endless, directory, population_size, place) for case in cases}


def table(results: dict[str, Any]) -> str:
    """Return the results as text."""
    lines = []
    for name, case in results.items():
        lines.append(
            f"{name}: {case['prompts']} prompts, {case['tokens']} tokens, N {case['population_size']}, "
            f"{case['num_threads']} threads"
        )
        for variant, row in case["variants"].items():
            lines.append(
                f"  {variant:<18}{row['step_seconds']:9.2f} s a step {row['tokens_per_s']:8.1f} tokens/s   {row['how']}"
            )
        lines.append("  " + ", ".join(f"{ratio} {row['median']:.2f}" for ratio, row in case["ratios"].items()))
    return "\n".join(lines)


def main() -> int:
    """Measure, print and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="directory of SmolLM2-135M-Instruct")
    parser.add_argument("--cases", nargs="+", choices=[case.name for case in CASES])
    parser.add_argument("--repetitions", type=int, help="repetitions instead of the case's, for trials")
    parser.add_argument("--population_size", type=int, default=30)
    parser.add_argument("--tokens", type=int, help="tokens a completion instead of the case's, for trials")
    parser.add_argument("--num_threads", default="auto", help="auto: the number of cores")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument(
        "--members_per_batch", type=int, help="low-rank members in a forward pass instead of the case's"
    )
    parser.add_argument("--task", help="task of the prompts instead of the case's, for models without a chat template")
    parser.add_argument("--name", default="step", help="of the result file")
    parser.add_argument("--no_record", action="store_true", help="print only")
    options = parser.parse_args()
    cases = tuple(case for case in CASES if not options.cases or case.name in options.cases)
    if options.tokens:
        cases = tuple(dataclasses.replace(case, tokens=options.tokens) for case in cases)
    if options.repetitions:
        cases = tuple(dataclasses.replace(case, repetitions=options.repetitions) for case in cases)
    if options.members_per_batch:
        cases = tuple(dataclasses.replace(case, members_per_batch=options.members_per_batch) for case in cases)
    if options.task:
        cases = tuple(dataclasses.replace(case, task=options.task) for case in cases)
    place = Place(options.num_threads, options.device, options.dtype)
    results = measure(options.model, options.population_size, cases, place)
    print(table(results))
    if not options.no_record:
        gpu = torch.cuda.get_device_name() if options.device == "cuda" else None
        write_result(
            options.name, {"model": Path(options.model).name, "dtype": options.dtype, "gpu": gpu, "cases": results}
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
