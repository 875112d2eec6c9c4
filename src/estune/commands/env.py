"""`estune env`: versions and machine."""

from __future__ import annotations

from estune.console import print_json, print_result
from estune.environment import environment


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
