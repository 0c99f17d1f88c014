"""Arguments of the scripts: dataclasses, from the command line and from a recipe file."""

import argparse
import difflib
import json
from collections.abc import Sequence
from pathlib import Path

import yaml
from transformers import HfArgumentParser


def parse_arguments(
    types: Sequence[type], argv: Sequence[str] | None = None, defaults: dict | None = None, description: str = ""
) -> tuple:
    """Fills dataclasses from the command line, over a recipe (`--config FILE`), over `defaults`.

    Args:
        types: Dataclasses, as for `HfArgumentParser`.
        argv: Command line; default: the process's own.
        defaults: Values that differ from the dataclasses' own.
        description: Text of `--help`.

    Returns:
        One object of each type.

    Raises:
        FileNotFoundError: There is no such recipe.
        ValueError: A recipe is no mapping, or has an unknown field.
    """
    parser = HfArgumentParser(types, description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", help="Recipe: a YAML file of arguments; those of the command line go before it.")
    recipe_parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    recipe_parser.add_argument("--config")
    path, rest = recipe_parser.parse_known_args(argv)
    values = dict(defaults or {})
    if path.config is not None:
        recipe = yaml.safe_load(Path(path.config).read_text(encoding="utf-8"))
        if not isinstance(recipe, dict):
            raise ValueError(f"'{path.config}' is no mapping of arguments, such as `max_length: 512`")
        values.update(recipe)
    known = {action.dest for action in parser._actions}
    flags = []
    for name, value in values.items():
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            raise ValueError(f"there is no argument `{name}`{f'; did you mean `{near[0]}`?' if near else ''}")
        if value is None:
            continue
        if value == []:
            parser.set_defaults(**{name: []})
        elif isinstance(value, list):
            flags += [f"--{name}", *map(str, value)]
        else:
            flags.append(f"--{name}={json.dumps(value) if isinstance(value, dict) else value}")
    *parsed, _ = parser.parse_args_into_dataclasses([*flags, *rest])
    return tuple(parsed)
