"""Trains from Python on the rows of ./case.json: ``fuzz_python_run.py DIRECTORY MAX_STEPS [resume]``."""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from fuzz_values import arrow_array, rows_of


def dataset(case):
    """Return the case's rows, as a list of dicts or a `datasets.Dataset`."""
    if case["source"] == "list of dicts":
        return rows_of(case["columns"])
    import datasets
    import pyarrow as pa

    if case["source"] == "Dataset of dicts":
        return datasets.Dataset.from_list(rows_of(case["columns"]))
    arrays = [arrow_array(column["kind"], column["values"]) for column in case["columns"]]
    return datasets.Dataset(pa.table(arrays, names=[column["name"] for column in case["columns"]]))


def main():
    case = json.loads(Path("case.json").read_text())
    directory, max_steps, *resume = sys.argv[1:]
    try:
        rows = dataset(case)
    except Exception as error:  # the rows fit no dataset, so the case does not test estune
        print(f"estune: error: NO DATASET: {type(error).__name__}", file=sys.stderr)
        sys.exit(2)
    from estune import ESConfig, ESTrainer
    from estune.errors import UserError

    try:
        options = dict(case["options"], output_dir=directory, max_steps=int(max_steps), resume=bool(resume))
        ESTrainer(args=ESConfig(**options), train_dataset=rows).train()
    except UserError as error:
        print(f"estune: error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
