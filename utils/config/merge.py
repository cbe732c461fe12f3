"""Reading and merging of YAML files and `key=value` words, with errors that name the key.

OmegaConf merges strictly; here its errors become readable, and a section of `models` may be a
pattern, so that one small file serves several variants.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from io import StringIO
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from utils.common.errors import UserError
from utils.common.readers import read_text

OVERRIDE_KEY = re.compile(r"[^\s.=\[\]-][^\s.=\[\]]*(\.[^\s.=\[\]]+)*")
#: What a value must be, by the type of its default.
EXPECTED = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    ListConfig: "a list",
}


def read_yaml(file: str | Path) -> DictConfig:
    """One configuration file.

    Raises:
        UserError: it does not exist, is not YAML, or holds no sections.
    """
    path = Path(file)
    if not path.is_file():
        shipped = Path(__file__).resolve().parents[2] / "configs"
        raise UserError(f"no configuration file {path}; the shipped ones are in {shipped}")
    try:
        content = OmegaConf.load(StringIO(_checked(read_text(path, "restore it"))))
    except (OSError, ValueError, yaml.YAMLError, OmegaConfBaseException) as error:
        raise UserError(f"{path} is not readable YAML ({error}); correct it") from None
    models = content.get("models") or {} if isinstance(content, DictConfig) else None
    if not isinstance(models, DictConfig | dict):
        raise UserError(f"{path} holds no sections; write some, such as dataset: and training:")
    return content


def _checked(text: str) -> str:
    """YAML that is not nested so deeply that its parser, which is written in C, would crash."""
    depth = 0
    for event in yaml.parse(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        if depth > 100:
            raise ValueError("more than 100 levels")
    return text


def parse_override(override: str) -> DictConfig:
    """`key=value` of the command line as a nested configuration of one leaf.

    Raises:
        UserError: it has another form.
    """
    key, separator, _ = override.partition("=")
    if not separator or not OVERRIDE_KEY.fullmatch(key) or key == "models":
        raise UserError(
            f"{override!r} is not an override; write key=value, such as training.epochs=20"
        )
    try:
        return OmegaConf.from_dotlist([override])
    except (yaml.YAMLError, OmegaConfBaseException, ValueError) as error:
        raise UserError(
            f"the value of {override!r} cannot be read ({first_line(error)}); it is YAML: put "
            "quotes around what holds special characters"
        ) from None


def plain_names(models: Any) -> list[str]:
    """The variants that `models` names without a pattern."""
    return [name for name in models or () if "*" not in str(name)]


def without_patterns(
    models: Mapping[str, Any], name: str, known: Mapping[str, Sequence[str]]
) -> dict[str, Any]:
    """`models` with its patterns, such as `"*"` or `"*film"`, put under the variant's name.

    A pattern's keys reach the variant if it matches and the variant has them; a later pattern wins.

    Args:
        models: sections, each a dictionary or None.
        name: the variant that is configured.
        known: variant -> its keys, of all variants.

    Raises:
        UserError: a pattern matches no variant, or none that it matches has the key.
    """
    out = {key: models[key] for key in plain_names(models)}
    for pattern in (key for key in models if key not in out):
        matching = [variant for variant in known if fnmatchcase(variant, pattern)]
        if not matching:
            raise UserError(unknown_key(f"models.{pattern}", list(known)))
        anywhere = {key for variant in matching for key in known[variant]}
        for key, value in (models[pattern] or {}).items():
            if key not in anywhere:
                raise UserError(unknown_key(f"models.{pattern}.{key}", sorted(anywhere)))
            if name in matching and key in known[name]:
                out[name] = {**(out.get(name) or {}), key: value}
    return out


def merge(base: DictConfig, new: Any, where: str, prefix: str = "") -> DictConfig:
    """OmegaConf.merge whose errors name the key.

    Args:
        where: where `new` comes from, for messages: "in FILE"; may be empty.
        prefix: dotted key of `base`, for messages.

    Raises:
        UserError: an unknown key, a wrong type.
    """
    try:
        return OmegaConf.merge(base, new)
    except (OmegaConfBaseException, TypeError) as error:  # TypeError: a section meets a list
        inner = getattr(error, "full_key", "") or _culprit(base, new)
        key = ".".join(part for part in (prefix, inner) if part)
        if type(error).__name__ in ("ConfigKeyError", "ConfigAttributeError"):
            parent = OmegaConf.select(base, inner.rpartition(".")[0]) or base
            raise UserError(unknown_key(key, list(parent))) from None
        given, default = OmegaConf.select(new, inner), OmegaConf.select(base, inner)
        if given is None:
            raise UserError(
                f"{key} has no value; give one, or leave the key out for its default"
            ) from None
        problem = first_line(error)
        if expected := EXPECTED.get(type(default)):
            example = "" if isinstance(default, bool) else f", such as {default}"
            problem = f"{expected} is expected{example}"
        raise UserError(f"{key}={given} cannot be{where and f' {where}'}: {problem}") from None


def _culprit(base: Any, new: Any) -> str:
    """Dotted key of the first leaf of `new` that does not merge into `base`."""
    for key in new:
        try:
            OmegaConf.merge(base, {key: new[key]})
        except TypeError:
            inside = isinstance(base[key], DictConfig) and isinstance(new[key], DictConfig)
            return f"{key}.{_culprit(base[key], new[key])}" if inside else str(key)
    return ""


def first_line(error: Exception) -> str:
    """What an error says, without the lines that show where."""
    return str(error).strip().splitlines()[0]


def unknown_key(key: str, known: Sequence[str]) -> str:
    """The sentence about a key that does not exist, with the nearest one that does."""
    parent, _, leaf = key.rpartition(".")
    near = difflib.get_close_matches(leaf, [str(k) for k in known], n=1)
    prefix = f"{parent}." if parent else ""
    hint = (
        f"did you mean {prefix}{near[0]}?"
        if near
        else f"known here: {', '.join(sorted(map(str, known)))}"
    )
    return f"unknown configuration key {key}; {hint}"
