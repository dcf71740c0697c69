"""Configurations as plain data: written, read back, and compared."""

import dataclasses
import importlib
from collections.abc import Iterator, Sequence
from typing import Any


def config_to_dict(config: Any) -> dict[str, Any]:
    """Returns a tree of dataclasses, dicts and tuples as plain data; `class` says the class of each dataclass.

    Raises:
      ValueError: names the field that is no plain data.
    """
    return _to_plain(config, type(config).__name__)


def config_from_dict(data: Any, *, packages: Sequence[str] = ("efficient_lm",)) -> Any:
    """Returns the configuration that `config_to_dict` gave as `data`. Lists become tuples; new fields, their defaults.

    Only classes of `packages` are imported.

    Raises:
      ValueError: a class that is not there or not allowed, or a field that it does not have.
    """
    if isinstance(data, list):
        return tuple(config_from_dict(x, packages=packages) for x in data)
    if not isinstance(data, dict):
        return data
    fields = {key: config_from_dict(value, packages=packages) for key, value in data.items() if key != "class"}
    if "class" not in data:
        return fields
    cls = _import_class(data["class"], packages)
    known = {field.name for field in dataclasses.fields(cls) if field.init}
    if unknown := sorted(fields.keys() - known):
        raise ValueError(f"{data['class']} has no field {', '.join(unknown)}; was this written by another version?")
    return cls(**fields)


def differences(saved: dict[str, Any], config: Any) -> list[str]:
    """Says in a line per field how `config` differs from what `config_to_dict` gave for another one.

    Left out are fields declared with `dataclasses.field(metadata={"resumable": True})` with all below them, and
    fields that the saved one did not have yet and that have their default here.
    """
    old, new = _leaves(saved), _leaves(config_to_dict(config))
    excused = []
    for path, field, value in _fields(config):
        is_new = not any(_is_under(leaf, path) for leaf in old)
        if field.metadata.get("resumable") or (is_new and value == _default(field)):
            excused.append(path)
    show = lambda leaves, path: repr(leaves[path]) if path in leaves else "nothing"
    return [
        f"{path}: {show(old, path)} in the run, {show(new, path)} now"
        for path in {**old, **new}
        if show(old, path) != show(new, path) and not any(_is_under(path, top) for top in excused)
    ]


def _to_plain(x: Any, where: str) -> Any:
    if dataclasses.is_dataclass(x) and not isinstance(x, type):
        name = f"{type(x).__module__}:{type(x).__qualname__}"
        if "<locals>" in name:
            raise ValueError(f"{where} is a {name}, which cannot be imported; define the class in a module")
        fields = [field.name for field in dataclasses.fields(x) if field.init]
        return {"class": name} | {key: _to_plain(getattr(x, key), f"{where}.{key}") for key in fields}
    if isinstance(x, dict):
        for key in x:
            if not isinstance(key, str) or key == "class":
                raise ValueError(f"{where} has the key {key!r}; keys must be strings other than 'class'")
        return {key: _to_plain(value, f"{where}.{key}") for key, value in x.items()}
    if isinstance(x, tuple):
        return [_to_plain(value, f"{where}.{i}") for i, value in enumerate(x)]
    if x is None or type(x) in (bool, int, float, str):
        return x
    raise ValueError(f"{where} is {x!r}; it must be None, bool, int, float or str, or a tuple or dict of these")


def _import_class(name: str, packages: Sequence[str]) -> type:
    module_name, _, qualname = name.partition(":")
    if module_name.partition(".")[0] not in packages:
        raise ValueError(f"the class {name} is not one of {', '.join(packages)}")
    try:
        cls: Any = importlib.import_module(module_name)
        for part in qualname.split("."):
            cls = getattr(cls, part)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"there is no class {name}; was this written by another version?") from error
    # A module also holds what it imported; those names are not its own.
    if not (isinstance(cls, type) and dataclasses.is_dataclass(cls) and cls.__module__ == module_name):
        raise ValueError(f"{name} is no dataclass of that module")
    return cls


def _leaves(plain: Any, path: str = "") -> dict[str, Any]:
    """Returns the leaves by dotted path; a list of plain values is a leaf."""
    if isinstance(plain, list) and any(isinstance(x, dict | list) for x in plain):
        plain = {str(i): x for i, x in enumerate(plain)}
    if not isinstance(plain, dict) or not plain:
        return {path: plain}
    leaves = [_leaves(value, f"{path}.{key}" if path else key) for key, value in plain.items()]
    return {key: value for part in leaves for key, value in part.items()}


def _fields(x: Any, path: str = "") -> Iterator[tuple[str, dataclasses.Field, Any]]:
    """Yields the path, field and value of each field of each dataclass in the tree."""
    start = f"{path}." if path else ""
    children: dict[str, Any] = {}
    if dataclasses.is_dataclass(x):
        for field in dataclasses.fields(x):
            children[field.name] = getattr(x, field.name)
            yield start + field.name, field, children[field.name]
    elif isinstance(x, dict):
        children = x
    elif isinstance(x, tuple):
        children = {str(i): value for i, value in enumerate(x)}
    for key, value in children.items():
        yield from _fields(value, start + key)


def _default(field: dataclasses.Field) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def _is_under(path: str, top: str) -> bool:
    return path == top or path.startswith(f"{top}.")
