"""Named presets: models in `deployments/models/`, targets in `deployments/targets/`, or any file of the same form."""

from __future__ import annotations

import difflib
from importlib import resources
from pathlib import Path
from typing import TypeVar

import yaml
from pydantic import ValidationError

from rollout.errors import BadInput
from rollout.model import ModelRef
from rollout.serving import ServingSpec
from rollout.target import Target
from rollout.values import Value

PresetT = TypeVar("PresetT", bound=Value)

_ENDINGS = {".yaml", ".yml"}
"""By them a path is told from the name of a preset."""


class ModelPreset(Value):
    """A model and how it is served: one file in `deployments/models/`."""

    model: ModelRef
    serving: ServingSpec


def load_model(name_or_path: str) -> ModelPreset:
    """The preset of that name, or the YAML file at that path. Raises `BadInput` naming the nearest known preset."""
    return _load("models", name_or_path, ModelPreset)


def load_target(name_or_path: str) -> Target:
    """The target of that name, or the YAML file at that path. Raises `BadInput` naming the nearest known target."""
    return _load("targets", name_or_path, Target)


def model_title(name_or_path: str) -> str:
    """What runs call a model: its preset, or its file without folder and ending."""
    path = Path(name_or_path)
    return path.stem if path.suffix in _ENDINGS else name_or_path


def target_title(name_or_path: str) -> str:
    """What runs call a target: the name that its file gives it. A wrong file keeps its path: the flow says why."""
    try:
        return load_target(name_or_path).name
    except BadInput:
        return name_or_path


def known(folder: str) -> list[str]:
    """Names of the presets in `deployments/<folder>/`."""
    files = resources.files("deployments").joinpath(folder).iterdir()
    return sorted(Path(file.name).stem for file in files if file.name.endswith(".yaml"))


def validated(kind: type[PresetT], data: object, *, where: str) -> PresetT:
    """`data` as a `kind`; a `BadInput` that names every wrong field otherwise."""
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        raise BadInput(explain(error), where=where, resolution="Correct the field and run again.") from error


def explain(error: ValidationError) -> str:
    """Every wrong field with what is wrong, on one line; the input itself is left out, since it may be a secret."""
    return "; ".join(
        f"{'.'.join(str(part) for part in item['loc']) or 'value'}: {item['msg']}"
        for item in error.errors(include_input=False, include_url=False)
    )


def unreadable(error: OSError | UnicodeDecodeError) -> str:
    """Why a text file could not be read, in a few words."""
    return error.strerror or str(error) if isinstance(error, OSError) else "it is not UTF-8 text"


def _load(folder: str, name_or_path: str, kind: type[PresetT]) -> PresetT:
    path = Path(name_or_path)
    if path.suffix in _ENDINGS:
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise BadInput(
                f"cannot read the file: {unreadable(error)}.",
                where=name_or_path,
                resolution=f"Give a readable file, or one of: {', '.join(known(folder))}.",
            ) from error
    else:
        names = known(folder)
        if name_or_path not in names:
            nearest = difflib.get_close_matches(name_or_path, names, n=1)
            hint = f"Did you mean {nearest[0]!r}? " if nearest else ""
            raise BadInput(
                f"there is no preset {name_or_path!r} in deployments/{folder}/.",
                where=folder.rstrip("s"),
                resolution=f"{hint}Known are {', '.join(names)}; a path ending in .yaml works as well.",
            )
        text = resources.files("deployments").joinpath(folder, f"{name_or_path}.yaml").read_text(encoding="utf-8")
    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise BadInput(f"not valid YAML: {error}", where=name_or_path) from error
    return validated(kind, data, where=name_or_path)
