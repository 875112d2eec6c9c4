"""Rows of one's own, some held out, with a column that the reward reads: python examples/custom_dataset.py"""

from datasets import Dataset

from estune import ESConfig, ESTrainer


def rows(targets):
    prompt = (
        "Use each of the numbers {0}, 2, 3 exactly once, with + - * / and parentheses, to make {1}. "
        "Work it out inside <think></think>, then write only the final expression inside <answer></answer>.\n"
    )
    return Dataset.from_list([{"prompt": prompt.format(n, n + 6), "target": n + 6} for n in targets])


def names_the_target_at_length(completions, target, **kwargs):
    """Columns arrive as lists, one value for each completion."""
    return [float(str(wanted) in text) + len(text) / 100 for text, wanted in zip(completions, target, strict=True)]


trainer = ESTrainer(
    model="tiny",
    reward_funcs=names_the_target_at_length,
    args=ESConfig(
        output_dir="runs/custom_dataset",
        max_steps=4,
        population_size=16,
        sigma=0.02,
        eval_steps=4,
        max_completion_length=32,
    ),
    train_dataset=rows(range(4, 10)),
    eval_dataset=rows(range(10, 14)),
)
trainer.train()
