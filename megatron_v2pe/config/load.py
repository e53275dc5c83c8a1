"""From a YAML file and `section.key=value` overrides to a `RunConfig`, and back.

    run.yaml --OmegaConf--> untyped tree --names, curriculum--> structured merge --> frozen dataclasses
    overrides, one by one, take the same way

A relative path in the file is looked up beside the file first, then in the current folder, as paths in a meta json are.
What a run writes (runtime.run_dir, data.cache_dir) is relative to the current folder. `~/` is the home folder.

OmegaConf appears in this file only, so that it can be replaced in a day. What it raises is turned into
`ConfigError` here: where the mistake was made, the full key, the rule, the way out.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from megatron_v2pe.config.key_names import SYNONYMS
from megatron_v2pe.config.position_modes import POSITION_MODES
from megatron_v2pe.config.schema import CurriculumStage, RunConfig
from megatron_v2pe.core.errors import ConfigError
from megatron_v2pe.core.excerpt import shortened

_COMMAND_LINE = "command line"
_READ_PATHS = (
    ("model", "checkpoint"),
    ("model", "hf_path"),
    ("data", "meta"),
    ("data", "validation"),
    ("data", "retrieval"),
)
_WRITTEN_PATHS = (("runtime", "run_dir"), ("data", "cache_dir"))


def load_run_config(path: str | Path | None, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a run's YAML file and apply overrides in order.

    Args:
        path: YAML file whose top-level keys are sections of `RunConfig`; None starts from the defaults.
        overrides: `section.key=value`, the value in YAML: `optim.lr=5e-6`,
            `data.curriculum=[{from_step: 0, max_sample_tokens: 512}]`.

    Raises:
        ConfigError: the file cannot be read or parsed, a key is unknown, a value has the wrong type or
            breaks a rule of its section; the message names file or command line, key and way out.
    """
    merged: Any = OmegaConf.structured(RunConfig)
    curriculum: tuple[CurriculumStage, ...] | None = None
    sources = [(str(path), _located(_read_yaml(Path(path)), Path(path).parent))] if path is not None else []
    sources += [(_COMMAND_LINE, _parse_override(text)) for text in overrides]
    for source, tree in sources:
        _check_texts(tree, source)
        _expand_home(tree)
        stages = _take_curriculum(tree, source)
        curriculum = curriculum if stages is None else stages
        merged = _merge(merged, tree, source)
    try:
        config = OmegaConf.to_object(merged)
        assert isinstance(config, RunConfig)
        if curriculum is not None:
            config = dataclasses.replace(config, data=dataclasses.replace(config.data, curriculum=curriculum))
    except ConfigError as error:
        origin = f"{path}{' with overrides' if overrides else ''}" if path is not None else _COMMAND_LINE
        raise ConfigError(f"{origin}: {error}") from None
    except OmegaConfBaseException as error:
        _raise_as_config_error(error, str(path or _COMMAND_LINE))
    return config


def dump_run_config(config: RunConfig) -> str:
    """The whole resolved configuration as YAML; `load_run_config` of it gives an equal object."""
    return OmegaConf.to_yaml(OmegaConf.create(_plain(dataclasses.asdict(config))))


def known_keys() -> list[str]:
    """Full names of all fields, `section.key`, in the order of the schema."""
    return [
        f"{section.name}.{field.name}"
        for section in dataclasses.fields(RunConfig)
        for field in dataclasses.fields(section.default_factory)  # type: ignore[arg-type]
    ]


def _plain(value: Any) -> Any:
    """Tuples to lists, all the way down: YAML has one kind of sequence."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def _read_yaml(path: Path) -> dict[Any, Any]:
    try:
        tree = OmegaConf.load(path)
        plain = _to_dict(tree) if isinstance(tree, DictConfig) else None
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot be read ({error.strerror or error}); give the path of a run's YAML file"
        ) from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark is not None else ""
        raise ConfigError(f"{path}{line}: not valid YAML ({getattr(error, 'problem', error)})") from None
    except (OmegaConfBaseException, ValueError, RecursionError) as error:
        full_key = getattr(error, "full_key", None)
        key = f" {full_key}:" if full_key else ""
        reason = str(error).splitlines()[0][:200]
        raise ConfigError(f"{path}:{key} {reason}; docs/configuration.md lists all keys") from None
    if plain is None:
        raise ConfigError(f"{path}: must hold sections (model:, data:, ...), found a list")
    return plain


def _check_texts(tree: Any, source: str, key: str = "") -> None:
    """Refuse what no path or name can hold, and keys that are no names."""
    for name, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
        if isinstance(tree, dict) and not isinstance(name, str):
            raise ConfigError(f"{source}: unknown key {key}{name}; docs/configuration.md lists all keys")
        if isinstance(value, (dict, list)):
            _check_texts(value, source, f"{key}{name}.")
        elif isinstance(value, str) and (
            "\0" in value or any("\ud800" <= sign <= "\udfff" for sign in value)
        ):
            raise ConfigError(
                f"{source}: {key}{name} is {value!r}, which has a null character, or bytes that are no UTF-8"
            )


def _expand_home(tree: dict[Any, Any]) -> None:
    """`~/` of paths, which a shell expands in `cd ~/a`, but neither in a file nor after `key=`."""
    for section, key in (*_READ_PATHS, *_WRITTEN_PATHS):
        values = tree.get(section)
        if not isinstance(values, dict):
            continue
        value = values.get(key)
        if isinstance(value, str) and value.startswith("~/"):
            values[key] = os.path.expanduser(value)


def _located(tree: dict[Any, Any], folder: Path) -> dict[Any, Any]:
    """The tree with paths of what is there beside the file as absolute ones: a run's `config.yaml` is elsewhere."""
    if folder.resolve() == Path.cwd():
        return tree
    for section, key in _READ_PATHS:
        values = tree.get(section)
        if not isinstance(values, dict):
            continue
        value = values.get(key)
        if isinstance(value, str) and value and "${" not in value and (folder / value).exists():
            values[key] = str((folder / value).absolute())
    return tree


def _parse_override(text: str) -> dict[Any, Any]:
    key, equals, value = text.partition("=")
    if not equals or not all(key.split(".")):
        raise ConfigError(f"{_COMMAND_LINE}: {shortened(text)} is not an override; write section.key=value")
    if not value:  # a shell removes the quotes of section.key=''
        text = f"{key}=''"
    try:
        return _to_dict(OmegaConf.from_dotlist([text]))
    except (yaml.YAMLError, OmegaConfBaseException, ValueError, RecursionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"{_COMMAND_LINE}: the value of {shortened(text)} is not valid YAML ({reason})"
        ) from None


def _to_dict(tree: DictConfig) -> dict[Any, Any]:
    """Plain containers, interpolations (`${data.meta}`) kept as they are written."""
    plain = OmegaConf.to_container(tree, resolve=False)
    assert isinstance(plain, dict)
    return plain


def _merge(base: Any, tree: dict[Any, Any], source: str) -> Any:
    """Structured merge of an untyped tree; OmegaConf checks names and types."""
    for section, values in tree.items():
        if section in RunConfig.__dataclass_fields__ and not isinstance(values, dict):
            raise ConfigError(
                f"{source}: {section} is a section and needs keys below it, such as {_example(section)}"
            )
        for key in values if isinstance(values, dict) else ():
            if values[key] == "???":  # OmegaConf's mark for a missing value, which its merge passes over
                raise ConfigError(f"{source}: {section}.{key} is '???'; give a value")
    position = tree.get("position", {})
    if isinstance(position.get("mode"), str):
        position["mode"] = POSITION_MODES.get(position["mode"], position["mode"])
    _check_numbers(tree.get("optim", {}).get("batch_rampup"), f"{source}: optim.batch_rampup")
    try:
        return OmegaConf.merge(base, OmegaConf.create(tree))
    except OmegaConfBaseException as error:
        _raise_as_config_error(error, source)


def _check_numbers(values: Any, key: str) -> None:
    """Refuse a list with anything but whole numbers: OmegaConf 2.4 would name neither the key nor the value."""
    if values is not None and not isinstance(values, list) and "${" not in str(values):
        raise ConfigError(f"{key} is {values!r}, but must be a list of whole numbers")
    for value in values if isinstance(values, list) else ():
        if type(value) is not int:
            raise ConfigError(f"{key} holds {value!r}, but must be a list of whole numbers")


def _take_curriculum(tree: dict[Any, Any], source: str) -> tuple[CurriculumStage, ...] | None:
    """Remove data.curriculum from the tree and build it: OmegaConf 2.4 does not type a tuple's elements."""
    data = tree.get("data")
    if not isinstance(data, dict) or "curriculum" not in data:
        return None
    rows = data.pop("curriculum")
    if not isinstance(rows, list):
        raise ConfigError(
            f"{source}: data.curriculum is {rows!r}, but must be a list of stages such as "
            "[{from_step: 0, max_sample_tokens: 512}]"
        )
    return tuple(_stage(row, f"data.curriculum[{index}]", source) for index, row in enumerate(rows))


def _stage(row: Any, path: str, source: str) -> CurriculumStage:
    if not isinstance(row, dict):
        raise ConfigError(f"{source}: {path} is {row!r}, but needs keys: from_step, max_sample_tokens")
    try:
        stage = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(CurriculumStage), row))
    except OmegaConfBaseException as error:
        _raise_as_config_error(error, source, prefix=f"{path}.")
    assert isinstance(stage, CurriculumStage)
    return stage


def _raise_as_config_error(error: OmegaConfBaseException, source: str, *, prefix: str = "") -> NoReturn:
    key = prefix + (error.full_key or "")
    if isinstance(error, ConfigKeyError):
        raise ConfigError(f"{source}: unknown key {key}{_nearest(key, prefix)}") from None
    raise ConfigError(f"{source}: {key}: {str(error).splitlines()[0]}") from None


def _nearest(key: str, prefix: str) -> str:
    """`; did you mean ...?`: the same name in another section first, then another program's, then the closest one."""
    if prefix:
        candidates = [prefix + field.name for field in dataclasses.fields(CurriculumStage)]
    else:
        sections = [field.name for field in dataclasses.fields(RunConfig)]
        candidates = known_keys() if "." in key else sections + known_keys()
    same_name = [name for name in candidates if name.rpartition(".")[2] == key.rpartition(".")[2]]
    foreign = SYNONYMS.get(key.rpartition(".")[2].lower().replace("-", "_"))
    close = (
        same_name
        or ([foreign] if foreign else [])
        or difflib.get_close_matches(key, candidates, n=1, cutoff=0.6)
    )
    return f"; did you mean {close[0]}?" if close else "; docs/configuration.md lists all keys"


def _example(section: Any) -> str:
    return next(name for name in known_keys() if name.startswith(f"{section}."))
