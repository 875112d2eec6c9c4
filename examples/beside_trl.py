"""One dataset, one reward: TRL's GRPOTrainer and estune's ESTrainer differ by their names. Needs trl.

python examples/beside_trl.py
"""

import sys

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from estune import ESConfig, ESTrainer
from estune.tasks import countdown

MODEL = sys.argv[1] if len(sys.argv) > 1 else "tiny"
DATASET = Dataset.from_list([{"prompt": row["prompt"]} for row in countdown.load("train")[:8]])


def thinks(completions, **kwargs):
    return [float(text.startswith("<think>")) for text in completions]


def run(trainer_class, config_class, model, processing_class=None, **own):
    args = config_class(output_dir=f"runs/{trainer_class.__name__}", max_steps=2, max_completion_length=16, seed=0,
                        logging_steps=1, report_to=["none"], **own)  # fmt: skip
    trainer = trainer_class(model=model, reward_funcs=thinks, args=args, train_dataset=DATASET,
                            processing_class=processing_class)  # fmt: skip
    trainer.train()
    return trainer


if __name__ == "__main__":
    run(ESTrainer, ESConfig, MODEL, population_size=8, sigma=0.01)
    from trl import GRPOConfig, GRPOTrainer

    from estune.models.names import local_directory

    place = local_directory(MODEL) or MODEL
    model, tokenizer = AutoModelForCausalLM.from_pretrained(place), AutoTokenizer.from_pretrained(place)
    run(
        GRPOTrainer,
        GRPOConfig,
        model,
        tokenizer,
        num_generations=4,
        per_device_train_batch_size=4,
        bf16=False,
        use_cpu=True,
    )
