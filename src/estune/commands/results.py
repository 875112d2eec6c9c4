"""Results on stdout, as lines for people or as one JSON object; and `estune env`."""

from __future__ import annotations

from typing import Any

from estune.console import print_json, print_result, rounded
from estune.environment import environment


def print_values(result: dict[str, Any], as_json: bool) -> None:
    """Print a result's values, one line each, or the result as JSON; floats have twelve significant digits."""
    if as_json:
        print_json(rounded(result))
        return
    for name, value in result.items():
        if name == "accuracy":
            low, high = result["accuracy_ci95"]
            print_result(f"{name:20} {value:.1%}  (95 % interval {low:.1%} to {high:.1%})")
        elif name == "batch_check":
            size, other = value["prompts_per_batch"]
            print_result(
                f"{name:20} in batches of {other} instead of {size} prompts, {value['changed']} of {value['rows']} "
                "rows have other tokens"
            )
        elif name != "accuracy_ci95":
            print_result(f"{name:20} {value:.4g}" if isinstance(value, float) else f"{name:20} {value}")


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
