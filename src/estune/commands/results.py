"""Results on stdout, as lines for people or as one JSON object; and `estune env`."""

from __future__ import annotations

import json
import math
from typing import Any

from estune.console import print_json, print_result, rounded
from estune.environment import environment

POINTS = ("accuracy", "mean_at_k", "pass_at_k")  # measures that are printed in per cent
# The measures of a model and of its reference that are printed side by side.
SIDE_BY_SIDE = (
    "accuracy mean_at_k pass_at_k reward sample_reward answer_entropy token_entropy mean_length_tokens "
    "median_length_tokens max_length_tokens sample_mean_length_tokens empty_ratio finished_ratio clipped_ratio "
    "sample_clipped_ratio"
).split()
NESTED = ("reference", "against_reference", "completions")  # parts of a result that are printed by themselves
OF_REWARDS = ("accuracy", "reward", "sample_reward", "sample_reward_failures")  # empty in a result without rewards
NAME_WIDTH, VALUE_WIDTH = 25, 12  # characters of the columns
SHOWN_LENGTH = 400  # characters of a question or completion on the terminal


def print_values(result: dict[str, Any], as_json: bool) -> None:
    """Print a result's values, one line each, or the result as JSON; floats have twelve significant digits."""
    if as_json:
        print_json(rounded(result))
        return
    width = NAME_WIDTH if "n_samples" in result else 20  # names of samples are longer
    for name, value in result.items():
        if not name.endswith("_ci95") and name != "answer_entropy_of":
            print_result(f"{name:{width}} {_value_text(name, value, result)}")


def print_evaluation(result: dict[str, Any], as_json: bool) -> None:
    """Print the result of an evaluation, as lines and a table of model and reference, or as JSON.

    Without rewards, the lines end with the completions of a few rows.
    """
    if as_json:
        print_values(result, True)
        return
    is_scored = "completions" not in result
    values = {name: value for name, value in result.items() if name not in NESTED}
    if not is_scored:
        values = {name: value for name, value in values.items() if name not in OF_REWARDS}
    print_values(values, False)
    if "reference" in result:
        _print_reference(values, result["reference"], result["against_reference"])
    if not is_scored:
        _print_completions(result["completions"], result.get("reference", {}).get("completions"))


def _value_text(name: str, value: Any, result: dict[str, Any]) -> str:
    """Return the text of one value of a result."""
    if name in ("accuracy", "mean_at_k"):
        low, high = result[f"{name}_ci95"]
        how = f"; k = {result['n_samples']}" if name == "mean_at_k" else "; greedy answers" * ("n_samples" in result)
        return f"{value:.1%}  (95 % interval {low:.1%} to {high:.1%}{how})"
    if name == "pass_at_k":
        return ", ".join(f"{share:.1%} for k = {k}" for k, share in value.items())
    if name in ("rewards", "sample_rewards"):
        return ", ".join(f"{function} {'none' if mean is None else f'{mean:.4g}'}" for function, mean in value.items())
    if name == "answer_entropy":
        most = math.log(result["n_samples"])
        return f"{value:.4g} nats, at most {most:.3g}  (of {result['answer_entropy_of']})"
    if name == "batch_check":
        size, other = value["prompts_per_batch"]
        return (
            f"in batches of {other} instead of {size} prompts, {value['changed']} of {value['rows']} rows have other "
            "tokens"
        )
    return f"{value:.4g}" if isinstance(value, float) else f"{value}"


def _print_reference(result: dict[str, Any], reference: dict[str, Any], against: dict[str, Any]) -> None:
    """Print the model and the reference side by side, and the rows won and lost."""
    print_result(f"\nagainst {reference['model']}, on the same rows:\n")
    print_result(f"{'':{NAME_WIDTH}} {'model':>{VALUE_WIDTH}}{'reference':>{VALUE_WIDTH}}  difference (95 % interval)")
    for name in SIDE_BY_SIDE:
        if name in result and name in reference:
            both = zip(*(_cells(name, values[name]) for values in (result, reference)), strict=True)
            for (label, here), (_, there) in both:
                print_result(
                    f"{label:{NAME_WIDTH}} {here:>{VALUE_WIDTH}}{there:>{VALUE_WIDTH}}"
                    f"{_difference(name, against.get(name))}".rstrip()
                )
    print_result("")
    for name, found in against.items():
        if "progressions" in found:
            text = (
                f"{found['progressions']} won (wrong to right), {found['regressions']} lost (right to wrong), "
                f"{found['both_right']} right in both, {found['both_wrong']} wrong in both; "
                f"p = {found['p_value']:.2g} (McNemar, exact)"
            )
        elif "wins" in found:
            text = (
                f"higher in {found['wins']} rows, lower in {found['losses']}, equal in {found['ties']}; "
                f"p = {found['p_value']:.2g} (sign test, exact)"
            )
        elif "changed" in found:
            text = f"{found['changed']} of {found['n']} rows have other completions than the reference's"
        else:
            continue
        print_result(f"{name:{NAME_WIDTH}} {text}")


def _print_completions(of_model: list[dict[str, Any]], of_reference: list[dict[str, Any]] | None) -> None:
    """Print a few rows with the model's completion, and the reference's if there is one, each on one line."""
    for number, row in enumerate(of_model):
        print_result(f"\nrow {row['row_id']}: {_on_one_line(row['question'])}")
        for label, rows in (("model", of_model), ("reference", of_reference)):
            if rows is not None:
                its = rows[number]
                end = "finished" if its["finished"] else "cut off"
                text = f"{_on_one_line(its['completion'])} ({its['length_tokens']} tokens, {end})"
                print_result(f"  {label if of_reference is not None else 'completion':10} {text}")


def _on_one_line(text: str) -> str:
    """Return a text as a JSON string of at most about `SHOWN_LENGTH` characters."""
    return json.dumps(text if len(text) <= SHOWN_LENGTH else f"{text[:SHOWN_LENGTH]}...", ensure_ascii=False)


def _cells(name: str, value: Any) -> list[tuple[str, str]]:
    """Return the labels and texts of a measure in the table: one, or for pass@k one for each k."""
    if isinstance(value, dict):
        return [(f"pass_at_k, k = {k}", f"{share:.1%}") for k, share in value.items() if k != "1"]  # 1: mean_at_k
    if value is None:
        return [(name, "none")]
    return [(name, f"{value:.1%}" if name in POINTS else f"{value:.4g}")]


def _difference(name: str, found: dict[str, Any] | None) -> str:
    """Return the text of a paired difference and its interval; empty if the measure has none."""
    if found is None:
        return ""
    scale, form, unit = (100, "+.1f", " points") if name in POINTS else (1, "+.3g", "")
    text = f"  {scale * found['difference']:{form}}{unit}"
    if found["difference_ci95"] is None:
        return text
    low, high = found["difference_ci95"]
    return f"{text} ({scale * low:{form}} to {scale * high:{form}})"


def or_none(value: float) -> float | None:
    """Return the value, or None for NaN."""
    return None if value != value else value


def env_command(as_json: bool) -> int:
    """Print versions and machine."""
    facts = environment()
    if as_json:
        print_json(facts)
        return 0
    for name, value in facts.items():
        if isinstance(value, dict):
            for package, version in value.items():
                print_result(f"{package:20} {version}")
        else:
            print_result(f"{name:20} {value}")
    return 0
