"""A reward of one's own: python examples/custom_reward.py"""

from estune import ESConfig, ESTrainer
from estune.tasks import countdown


def thinks_and_is_brief(completions, **kwargs):
    return [float(text.startswith("<think>")) - 0.001 * len(text) for text in completions]


ESTrainer(
    model="tiny",
    reward_funcs=thinks_and_is_brief,
    args=ESConfig(
        output_dir="runs/custom_reward", max_steps=3, population_size=8, sigma=0.01, max_completion_length=32
    ),
    train_dataset=countdown.load("train")[:4],
).train()
