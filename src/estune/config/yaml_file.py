"""Read the values of options from a YAML file or a preset."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from estune.config.options import canonical
from estune.errors import UserError

PRESETS = Path(__file__).parents[1] / "presets"


def read_config_file(name: str) -> dict[str, Any]:
    """Read a YAML file, or a preset by its name (``demo``), into field names and raw values.

    Raises:
        UserError: the file is missing, not YAML, not a mapping, or has an unknown name or one name twice.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        """Refuses a repeated key; YAML's own loader would drop the first value."""

        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
            seen: dict[str, int] = {}
            for key, _ in node.value:
                line = key.start_mark.line + 1
                if isinstance(key, yaml.ScalarNode) and key.value in seen:
                    raise UserError(
                        f"config {name!r} gives {key.value!r} in line {seen[key.value]} and again in line {line}"
                    )
                seen[str(key.value)] = line
            return super().construct_mapping(node, deep)

    path = Path(name)
    if not path.suffix and not path.exists() and (PRESETS / f"{name}.yaml").exists():
        path = PRESETS / f"{name}.yaml"
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader)
    except OSError as error:
        presets = ", ".join(sorted(p.stem for p in PRESETS.glob("*.yaml")))
        raise UserError(f"config {name!r} cannot be read ({error.strerror}); presets: {presets}") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: not UTF-8, or a date such as 2026-99-99
        raise UserError(f"config {name!r} is not YAML: {' '.join(str(error).split())}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UserError(f"config {name!r} must be a mapping of option names to values")
    return canonical(values, f"config {name!r}")
