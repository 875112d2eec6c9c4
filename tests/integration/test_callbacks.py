"""What a script for transformers' `Trainer` calls: callbacks, state, evaluate, save_model, resume_from_checkpoint."""

import json
import re
from pathlib import Path

import command_line
import pytest
import torch
import transformers
from command_line import length, vowels
from tiny_models import save_tiny
from transformers import EarlyStoppingCallback, TrainerCallback

from estune import ESConfig, ESTrainer
from estune.errors import UserError

pytestmark = pytest.mark.miniature

ROWS = [{"prompt": f"count to {i}: ", "bonus": i / 10} for i in range(6)]
SMALL = {
    "max_steps": 4,
    "population_size": 4,
    "batch_size": 3,
    "max_completion_length": 8,
    "sigma": 0.05,
    "num_threads": 1,
    "report_to": ["none"],
    "reward_isolation": "inline",
}


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    directory = tmp_path_factory.mktemp("models") / "llama"
    save_tiny("llama", directory)
    return directory


@pytest.fixture(autouse=True)
def somewhere(place, monkeypatch):
    monkeypatch.chdir(place)


def trainer_of(llama, output_dir="run", callbacks=None, eval_dataset=ROWS, **changes):
    return ESTrainer(
        model=str(llama),
        reward_funcs=vowels,
        args=ESConfig(output_dir=output_dir, **{**SMALL, **changes}),
        train_dataset=ROWS,
        eval_dataset=eval_dataset,
        callbacks=callbacks,
    )


class Recorder(TrainerCallback):
    """Notes its events, and sets the flags of `TrainerControl` that ``wishes`` names at a step."""

    def __init__(self, wishes=None):
        self.events, self.wishes, self.seen = [], wishes or {}, {}

    def note(self, event, args, state, control, **values):
        self.events.append((event, state.global_step))
        self.seen.setdefault(event, []).append((args, state, values))
        for flag in self.wishes.get((event, state.global_step), ()):
            setattr(control, flag, True)

    def on_train_begin(self, args, state, control, **values):
        self.note("train_begin", args, state, control, **values)

    def on_step_begin(self, args, state, control, **values):
        self.note("step_begin", args, state, control, **values)

    def on_step_end(self, args, state, control, **values):
        self.note("step_end", args, state, control, **values)

    def on_log(self, args, state, control, logs, **values):
        self.note("log", args, state, control, logs=logs, **values)

    def on_evaluate(self, args, state, control, metrics, **values):
        self.note("evaluate", args, state, control, metrics=metrics, **values)

    def on_save(self, args, state, control, **values):
        self.note("save", args, state, control, **values)

    def on_train_end(self, args, state, control, **values):
        self.note("train_end", args, state, control, **values)


def metrics(run_dir):
    return command_line.metrics(Path(run_dir))


def steps(run_dir):
    return command_line.steps(Path(run_dir))


def exact(run_dir):
    """Return what callbacks must not change: the journal and the weights."""
    return (Path(run_dir) / "journal.jsonl").read_bytes(), command_line.weights(Path(run_dir))


@pytest.mark.parametrize("noise", ["full", "lowrank"])
def test_callbacks_see_a_run_in_the_order_of_transformers_and_change_no_byte(llama, noise):
    settings = {"noise": noise, "eval_steps": 2, "save_steps": 2, "max_steps": 3}
    trainer_of(llama, "quiet", **settings).train()
    recorder = Recorder()
    trainer = trainer_of(llama, callbacks=[recorder], **settings)
    trainer.train()
    assert exact("run") == exact("quiet")
    assert recorder.events == [
        ("train_begin", 0), ("log", 0), ("evaluate", 0),
        ("step_begin", 0), ("step_end", 1), ("log", 1),
        ("step_begin", 1), ("step_end", 2), ("log", 2), ("log", 2), ("evaluate", 2), ("save", 2),
        ("step_begin", 2), ("step_end", 3), ("log", 3), ("log", 3), ("evaluate", 3),
        ("save", 3), ("train_end", 3),
    ]  # fmt: skip
    args, state, values = recorder.seen["evaluate"][1]
    assert (args.max_steps, args.output_dir, state.max_steps, state.epoch) == (3, "run", 3, 1.5)
    written = [record for record in metrics("run") if "eval_reward" in record]
    assert values["metrics"]["eval_reward"] == written[1]["eval_reward"]
    assert values["processing_class"].get_vocab() == trainer.processing_class.get_vocab()
    logged = [record["step"] for record in state.log_history]
    assert logged == [record["step"] for record in metrics("run")]
    assert trainer.state.log_history[1]["reward"] == metrics("run")[1]["reward"]
    assert (trainer.state.global_step, trainer.state.max_steps, trainer.state.epoch) == (3, 3, 1.5)
    with pytest.raises(Exception, match="cannot assign"):
        args.sigma = 1.0


def test_callbacks_ask_for_records_evaluations_checkpoints_and_the_end(llama, capsys):
    wishes = {
        ("step_end", 1): ["should_log", "should_evaluate"],
        ("step_end", 2): ["should_save"],
        ("evaluate", 3): ["should_training_stop"],
    }
    recorder = Recorder(wishes)
    settings = {"logging_steps": 10, "eval_steps": 3, "save_steps": 0, "max_steps": 6}
    trainer = trainer_of(llama, callbacks=[recorder], **settings)
    output = trainer.train()
    records = metrics("run")
    assert [record["step"] for record in records if "eval_reward" in record] == [0, 1, 3]
    assert [record["step"] for record in records if "reward" in record] == [1, 2, 3]
    assert (Path("run/checkpoint-2") / "model.safetensors").exists()
    assert "a callback ended the run after 3 steps" in capsys.readouterr().out
    assert (output.global_step, len(steps("run"))) == (3, 3)
    trainer_of(llama, "quiet", **settings).train()
    trainer_of(llama, **settings).train(resume_from_checkpoint=True)  # without the callback: to the end
    assert exact("run")[1] == exact("quiet")[1]
    with pytest.raises(ZeroDivisionError):  # an error of a callback ends the run, which a resume continues
        trainer_of(llama, "broken", callbacks=[Dividing], **settings).train()
    trainer_of(llama, "broken", **settings).train(resume_from_checkpoint=True)
    assert exact("broken") == exact("quiet")


def test_a_checkpoint_that_a_callback_asked_for_outlives_a_resume(llama):
    settings = {"save_steps": 4, "save_total_limit": 1, "max_steps": 8, "eval_dataset": None}
    wishes = {("step_end", 3): ["should_save"], ("step_end", 5): ["should_training_stop"]}
    trainer_of(llama, callbacks=[Recorder(wishes)], **{**settings, "save_total_limit": 0}).train()
    trainer_of(llama, resume=True, **{**settings, "save_total_limit": 0}).train()
    assert sorted(path.name for path in Path("run").glob("checkpoint-*")) == [f"checkpoint-{n}" for n in (3, 4, 8)]


class Dividing(TrainerCallback):
    def on_step_end(self, args, state, control, **_):
        if state.global_step == 2:
            raise ZeroDivisionError


class Meddling(TrainerCallback):
    def on_step_end(self, args, state, control, model=None, **_):
        for parameter in model.parameters():
            parameter.data.mul_(0.5)


def test_a_callback_cannot_move_theta_unnoticed(llama):
    """With full noise theta lies apart from the model's memory, which is written again; else the run ends in time."""
    trainer_of(llama, "quiet").train()
    trainer_of(llama, "restored", callbacks=[Meddling()]).train()
    assert exact("restored") == exact("quiet")
    trainer_of(llama, "quiet-lowrank", noise="lowrank").train()
    with pytest.raises(UserError, match="a callback changed the model's weights"):
        trainer_of(llama, callbacks=[Meddling()], noise="lowrank").train()
    assert len(steps("run")) == 1
    trainer_of(llama, noise="lowrank").train(resume_from_checkpoint=True)
    assert exact("run") == exact("quiet-lowrank")


def test_early_stopping_is_an_option_of_the_run_and_other_objects_are_refused(llama, capsys):
    trainer = trainer_of(llama, callbacks=[EarlyStoppingCallback(2, 0.5)], eval_steps=1, load_best_model_at_end=True)
    assert (trainer.args.early_stopping_patience, trainer.args.early_stopping_threshold) == (2, 0.5)
    with pytest.raises(UserError, match="set early_stopping_patience in ESConfig"):
        trainer.add_callback(EarlyStoppingCallback)
    with pytest.raises(UserError, match=r"a callback must be a transformers\.TrainerCallback, not str"):
        trainer_of(llama, callbacks=["print"])

    class OfEpochs(TrainerCallback):
        def on_epoch_end(self, args, state, control, **_):
            raise AssertionError

    trainer.add_callback(OfEpochs)
    assert "OfEpochs: on_epoch_end will not be called" in capsys.readouterr().err
    assert type(trainer.pop_callback(OfEpochs)) is OfEpochs
    assert trainer.pop_callback(OfEpochs) is None


def test_the_calls_of_a_transformers_script(llama, place, monkeypatch):
    trainer = trainer_of(llama, "run", max_steps=2)  # eval_steps is 0
    with pytest.raises(UserError, match="save_model needs a finished run in run: call train"):
        trainer.save_model()
    before = trainer.evaluate()
    assert set(before) >= {"eval_reward", "eval_rows", "eval_mean_length_tokens", "epoch"}
    assert not Path("run").exists()
    output = trainer.train()
    assert output == Path("run")
    assert json.loads((output / "es_state.json").read_text())["step"] == output.global_step == 2
    assert output.metrics["reward"] == metrics("run")[-1]["reward"]
    assert output.metrics["train_runtime"] > 0 and output.metrics["epoch"] == 1.0
    after = command_line.tree(Path("run"))
    trainer.save_model()
    evaluated = trainer.evaluate(ROWS[:2], metric_key_prefix="test")
    assert (evaluated["test_rows"], evaluated["epoch"]) == (2, 1.0)
    assert [record.get("eval_rows") for record in trainer.state.log_history] == [None, None, 2]
    assert command_line.tree(Path("run")) == after
    saved = transformers.AutoModelForCausalLM.from_pretrained("run")
    for name, parameter in trainer.model.named_parameters():
        assert torch.equal(parameter, saved.get_parameter(name)), name
    assert trainer.is_world_process_zero()
    assert trainer.args.to_dict()["max_steps"] == 2
    with pytest.raises(AttributeError, match="ESConfig has no option 'num_train_epochs'; use max_steps"):
        trainer.args.num_train_epochs  # noqa: B018
    uploaded = {}
    monkeypatch.setattr(
        "huggingface_hub.HfApi.create_repo", lambda self, name, **_: type("R", (), {"repo_id": f"me/{name}"})
    )
    monkeypatch.setattr(
        "huggingface_hub.HfApi.upload_folder", lambda self, **options: uploaded.update(options) or "url"
    )
    assert trainer.push_to_hub("done") == "url"
    assert (uploaded["repo_id"], uploaded["commit_message"]) == ("me/run", "done")


def test_a_finished_run_is_what_the_trainer_then_answers_for(llama):
    first = trainer_of(llama, max_steps=2)
    first.train()
    tuned, files = first.evaluate()["eval_reward"], exact("run")
    again = trainer_of(llama, max_steps=2, resume=True)
    assert (again.state.global_step, again.evaluate()["epoch"]) == (0, 0)  # the base, until `train` is called
    steps_done, loss, numbers = again.train()
    assert (steps_done, numbers["epoch"], loss != loss) == (2, 1.0, True)
    assert again.evaluate(None, None, "eval")["eval_reward"] == tuned
    again.save_model("run")  # where the model is already
    assert exact("run") == files


def test_a_second_train_begins_at_the_base(llama):
    trainer = trainer_of(llama, max_steps=2, overwrite=True)
    trainer.train()
    first = exact("run")
    for parameter in trainer.model.parameters():
        parameter.data = parameter.data * 0.5
    trainer.train()
    assert exact("run") == first
    stopping = trainer_of(
        llama, "stopped", max_steps=4, callbacks=Recorder({("step_end", 2): ["should_training_stop"]})
    )
    assert stopping.train().global_step == 2
    stopping.pop_callback(Recorder)
    assert stopping.train(resume_from_checkpoint=True).global_step == 4
    with pytest.raises(UserError, match="holds another run"):
        trainer_of(llama, "stopped", max_steps=4, seed=1).train()
    other = trainer_of(llama, "stopped", max_steps=4, seed=1)
    with pytest.raises(UserError, match="push_to_hub needs a finished run"):
        other.push_to_hub()


class Replacing(TrainerCallback):
    def on_step_end(self, args, state, control, model=None, **_):
        for parameter in model.parameters():
            parameter.data = parameter.data * 0.5


def test_weights_in_other_memory_end_the_run(llama):
    with pytest.raises(UserError, match="a callback changed the model's weights in on_step_end"):
        trainer_of(llama, callbacks=Replacing()).train()


def test_a_run_that_will_be_overwritten_is_not_this_trainers(llama):
    trainer_of(llama, max_steps=1, eval_steps=1).train()
    trainer = trainer_of(llama, max_steps=1, eval_steps=1, overwrite=True)
    assert (trainer.state.global_step, trainer.state.log_history) == (0, [])
    assert trainer.evaluate()["epoch"] == 0
    trainer.train()
    assert trainer.state.global_step == 1


def test_resume_from_checkpoint_holds_for_one_call(llama, place):
    trainer = trainer_of(llama, overwrite=True)
    trainer.train()
    before = (place / "run" / "journal.jsonl").stat().st_mtime_ns
    trainer.train(resume_from_checkpoint=True)
    assert (place / "run" / "journal.jsonl").stat().st_mtime_ns == before  # finished: nothing to do
    trainer.train(resume_from_checkpoint=False)
    assert (place / "run" / "journal.jsonl").stat().st_mtime_ns > before and trainer.args.overwrite


def test_arguments_that_a_method_of_the_trainer_does_not_have(llama, place):
    trainer = trainer_of(llama)
    for call, told in (
        (lambda: trainer.train(max_steps=3), "ESTrainer.train has an unknown argument 'max_steps'; give it as args="),
        (lambda: trainer.train(num_train_epochs=3), "ESTrainer.train has an unknown argument 'num_train_epochs'; "),
        (lambda: trainer.evaluate(max_new_tokens=3), "ESTrainer.evaluate has an unknown argument 'max_new_tokens'; "),
        (lambda: trainer.save_model("x", safe=True), "ESTrainer.save_model has an unknown argument 'safe'"),
    ):
        with pytest.raises(UserError, match=re.escape(told)):
            call()
    trainer.train(trial=None, ignore_keys_for_eval=[])
    trainer.save_model("saved", _internal_call=True)
    assert (place / "saved" / "config.json").exists()


class Writing(TrainerCallback):
    """Writes into what it can reach in the events that have no model."""

    trainer = None

    def on_train_begin(self, args, state, control, **kwargs):
        args.stop_strings.append("a")
        assert json.loads(args.to_json_string()) and args.to_sanitized_dict()["stop_strings"] == "['a']"

    def on_log(self, args, state, control, **kwargs):
        for parameter in self.trainer.model.parameters():
            parameter.data.mul_(1.5)

    on_step_begin = on_log


def test_what_a_callback_writes_between_the_events_of_the_model_is_undone_or_refused(llama, place):
    settings = dict(load_best_model_at_end=True, eval_steps=1)
    trainer_of(llama, "plain", **settings).train()
    writing = Writing()
    writing.trainer = trainer_of(llama, "written", callbacks=[writing], **settings)
    writing.trainer.train()
    assert exact("plain") == exact("written")
    writing.trainer = trainer_of(llama, "lowrank", callbacks=[writing], noise="lowrank", **settings)
    with pytest.raises(UserError, match="is not what the journal says"):  # theta is in the model's own memory
        writing.trainer.train()


def test_a_trainer_that_chose_its_directory_resumes_in_it(llama, place):
    trainer = trainer_of(llama, None, max_steps=1)
    first = trainer.train()
    assert trainer.train(resume_from_checkpoint=True) == first


def test_a_failing_reward_of_weight_0_is_logged_and_changes_no_evaluation(llama, place):
    def broken(completions, **kwargs):
        raise ValueError("no")

    args = ESConfig(output_dir="run", reward_weights=[1, 0], max_completion_length=8, num_threads=1)
    rows = [{"prompt": f"count to {i}: "} for i in range(4)]
    found = ESTrainer(str(llama), [length, broken], args, rows).evaluate(rows)
    assert found["eval_reward"] == found["eval_rewards/length/mean"] and found["eval_reward_failures"] == 0
    assert found["eval_rewards/broken/mean"] is None


def test_a_reward_without_rows_is_refused(place):
    with pytest.raises(UserError, match="a reward without rows: give train_dataset, or dataset_name or task"):
        ESTrainer("tiny", length)


def test_resume_from_checkpoint(llama, place):
    trainer_of(llama, "whole", eval_dataset=None).train()
    with pytest.raises(UserError, match="run holds no run to continue"):
        trainer_of(llama).train(resume_from_checkpoint=True)
    trainer_of(llama, max_steps=2, save_steps=1).train()
    with pytest.raises(UserError, match="is not in output_dir run"):
        trainer_of(llama).train(resume_from_checkpoint="whole")
    with pytest.raises(UserError, match="needs output_dir"):
        trainer_of(llama, None).train(resume_from_checkpoint=True)
    output = trainer_of(llama, save_steps=1).train(resume_from_checkpoint="run/checkpoint-1")
    assert output.global_step == 4
    assert exact("run")[1] == exact("whole")[1]
