"""The embedded model learns a built-in task: python examples/quickstart.py"""

from estune import ESConfig, ESTrainer

trainer = ESTrainer(
    model="tiny",
    args=ESConfig(
        task="countdown",
        output_dir="runs/quickstart",
        sigma=0.01,
        learning_rate=0.005,
        population_size=12,
        batch_size=8,
        max_steps=3,
        max_completion_length=48,
        eval_steps=3,
        eval_rows=40,
    ),
)
print("the model is in", trainer.train())
