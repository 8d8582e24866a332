"""Make flags from settings. Which settings there are depends on the methods and kinds of judge in the command line.

Therefore the command line is read twice. The first reading looks only for plug-ins, methods and kinds of judge. The
settings that follow from these become the fields of a class, and in the second reading tyro parses this class. Values
are checked as settings only after that, so that errors are the same as for a settings file.
"""

from __future__ import annotations

import dataclasses
import re
import warnings
from collections.abc import Collection, Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar, get_type_hints

import tyro

from locaudit.behaviours import Behaviour, load_behaviour
from locaudit.cli.commands import read_flags
from locaudit.config import AuditConfig, JudgeChoice, read_over
from locaudit.config.choices import Frozen, choose_judge
from locaudit.config.validation import null_of, plain, renamed, validate
from locaudit.errors import ConfigError, DataError
from locaudit.registry import ASPECTS, JUDGES, METHODS, load_plugins

C = TypeVar("C")
_SETTINGS_OF = "settings_of_methods"
"""Field with the settings of each chosen method. The flags of this field and of the field with the methods' names both
begin with ``--methods``."""
_METHODS = "Methods that find edits. Each chosen method has flags for its own settings."
_KIND = (
    "Kind of judge. Each kind has flags for its own settings. default: the bundled judge if the behaviour has this "
    "aspect and answers are generated; otherwise none."
)
_ALL = (
    " --judge KIND sets the kind for every aspect of the behaviour at once, and --judge.SETTING (as in --judge.model) "
    "one of its settings. An aspect's own --judges.ASPECT.kind overrides both."
)
_PAIRS = ("prompt.template", "behaviour_columns")
"""Settings that are mappings from any names to values, given as ``--behaviour-columns KEY VALUE KEY VALUE``."""
SHORT = (
    "loading.dtype", "loading.device", "loading.device_map", "loading.revision", "split.max_train", "split.max_val",
    "split.max_test", "prompt.style", "prompt.primer", "probe.top_k", "evaluation.max_new_tokens", "ray.workers",
)  # fmt: skip
"""Settings that also have a short flag, their last part: ``--dtype`` for ``--loading.dtype``."""


COMMON = (
    "model", "behaviour", "data", "claim", "methods", "controls", "random_sets", "score", "loading.dtype",
    "loading.device", "split.max_test", "ray.workers",
)  # fmt: skip
"""Settings that ``--help`` shows; ``--help-all`` shows all."""


def take_config(base: C, arguments: Sequence[str]) -> tuple[C, list[str]]:
    """The settings before flags are applied, and the arguments that are left.

    If the first argument names a YAML file, its settings override `base`.
    """
    load_plugins(values_of(arguments, "plugins"))
    if arguments and not arguments[0].startswith("-"):
        return read_over(base, arguments[0]), list(arguments[1:])
    return base, list(arguments)


def parse(command: C, prog: str, description: str, arguments: Sequence[str], *, unused: Collection[str] = ()) -> C:
    """`command` with the values in the arguments. It is a dataclass of flags; a field ``config`` holds settings.

    ``--help`` does not show the `unused` settings.

    Raises `ConfigError` for a wrong setting or flag. Exits after ``--help`` or ``--help-all``.
    """
    load_plugins(values_of(arguments, "plugins"))
    config = getattr(command, "config", None)
    arguments = _renamed(arguments, is_audit=isinstance(config, AuditConfig))
    if hasattr(config, "judges"):
        arguments = _for_every_aspect(arguments, config)
    brief = config is not None and not {"-h", "--help"}.isdisjoint(arguments)
    if brief:
        description += " These are the most common flags; --help-all lists every setting."
    arguments = ["--help" if argument == "--help-all" else argument for argument in arguments]
    shown = [name for name in COMMON if name not in unused] if brief else None
    form = _form(command, "", arguments, shown)
    parsed = _plain(read_flags(type(form), prog, description, arguments, default=form))
    for name, value in parsed.items():
        if name == "config":
            parsed[name] = validate(type(config), value, source="the flags")
        elif isinstance(getattr(command, name), JudgeChoice):
            parsed[name] = choose_judge(value, name)
    return dataclasses.replace(command, **parsed)  # type: ignore[type-var]


def _form(value: Any, path: str, arguments: Sequence[str], shown: Collection[str] | None = None) -> Any:
    """The object that tyro parses in place of a settings object: the same fields and values, without checks.

    It has only the settings named in `shown` (None: all).
    """
    if isinstance(value, JudgeChoice):
        kind = [value.kind, *values_of(arguments, f"{path}.kind")][-1]
        names = Literal[("default", *JUDGES)]
        words = _KIND + (_ALL if path.startswith("judges.") else "")
        fields = {"kind": (Annotated[names, tyro.conf.arg(help=words)], kind)}
        cls = None if kind == "default" else JUDGES[kind].settings
        return _make(cls, plain(value) if kind == value.kind else {}, fields)
    if isinstance(value, Mapping):
        forms = {name: _form(item, f"{path}.{name}", arguments) for name, item in value.items()}
        return _make(None, {}, {name: (type(form), form) for name, form in forms.items()})
    fields, hints = {}, get_type_hints(type(value), include_extras=True)
    for name, item in vars(value).items():
        inside = path if name == "config" else f"{path}.{name}".removeprefix(".")
        is_common = hasattr(value, "config") or any(f"{x}.".startswith(f"{inside}.") for x in shown or ())
        if shown is not None and not is_common:
            fields[name] = (Annotated[hints[name], tyro.conf.Suppress], item)
        elif inside == "methods":
            fields |= _method_fields(item, arguments, brief=shown is not None)
        elif dataclasses.is_dataclass(item) or (isinstance(item, Frozen) and inside not in _PAIRS):
            form, metadata = _form(item, inside, arguments, shown), getattr(hints[name], "__metadata__", ())
            fields[name] = (Annotated[(type(form), *metadata)] if metadata else type(form), form)
        elif inside in SHORT:
            short = f"--{name.replace('_', '-')}"
            fields[name] = (Annotated[hints[name], tyro.conf.arg(aliases=[short])], item)
    return _make(type(value), vars(value), fields)


def _method_fields(methods: Mapping[str, Any], arguments: Sequence[str], *, brief: bool) -> dict[str, tuple[Any, Any]]:
    chosen = tuple(values_of(arguments, "methods") or methods)
    forms = {
        name: _form(methods[name], "", arguments) if name in methods else _make(METHODS[name].settings, {}, {})
        for name in chosen
    }
    form = _make(None, {}, {name: (type(form), form) for name, form in forms.items()})
    names = tuple[Literal[tuple(METHODS)], ...]
    return {
        "methods": (Annotated[names, tyro.conf.arg(help=_METHODS)], chosen),
        _SETTINGS_OF: (
            Annotated[type(form), tyro.conf.Suppress if brief else tyro.conf.arg(name="methods")],
            form,
        ),
    }


def _make(cls: type | None, values: Mapping[str, Any], fields: Mapping[str, tuple[Any, Any]]) -> Any:
    """An instance, with these values, of a subclass of `cls` without checks; `fields` (type, value) replace its own."""
    made = dataclasses.make_dataclass(
        cls.__name__ if cls else "Settings",
        [(name, hint) for name, (hint, _) in fields.items()],
        bases=(cls,) if cls else (),
        namespace={"__doc__": cls.__doc__ if cls else "", "__post_init__": lambda self: None},
        frozen=cls.__dataclass_params__.frozen if cls else True,  # type: ignore[attr-defined]
        kw_only=True,
    )
    given = dict(values) | {name: value for name, (_, value) in fields.items()}
    for field in dataclasses.fields(made):
        if field.default is field.default_factory is dataclasses.MISSING:
            given.setdefault(field.name, tyro.MISSING)
    return made(**given)


def _plain(parsed: Any) -> Any:
    """The parsed object as nested dicts of settings."""
    if not dataclasses.is_dataclass(parsed):
        return parsed
    values = {field.name: _plain(getattr(parsed, field.name)) for field in dataclasses.fields(parsed)}
    if _SETTINGS_OF in values:
        settings = values.pop(_SETTINGS_OF)
        values["methods"] = {name: settings[name] for name in values["methods"]}
    return values


def _for_every_aspect(arguments: Sequence[str], config: Any) -> list[str]:
    """Replace ``--judge KIND`` and ``--judge.SETTING VALUE`` by the same flags for each aspect of the behaviour.

    An aspect whose own kind is among the arguments keeps only its own flags.
    """
    parts: list[list[str]] = []  # each part is a flag and its values
    for argument in arguments:
        if argument.startswith("--") or not parts:
            parts.append([])
        parts[-1].append(argument)
    ours = [re.match(r"--judge(?:\.([\w.-]+))?(=.*)?$", part[0], re.DOTALL) for part in parts]
    if not any(ours):
        return list(arguments)
    name = "behaviour" if hasattr(config, "behaviour") else "data"
    source = [getattr(config, name), *values_of(arguments, name)]
    aspects = [x for x in _aspects_of(source[-1]) if not values_of(arguments, f"judges.{x}.kind")]
    out: list[str] = []
    for part, found in zip(parts, ours, strict=True):
        if not found:
            out += part
            continue
        for aspect in aspects:
            name = f"judges.{aspect}.{found[1] or 'kind'}{found[2] or ''}"
            out += [f"--{name}", *part[1:]]
    return out


def _aspects_of(source: str) -> Sequence[str]:
    """The aspects that judges assess in the behaviour. If it cannot be read, which is refused later, the usual ones."""
    try:
        with warnings.catch_warnings(action="ignore"):  # given again when the audit reads the behaviour
            aspects = load_behaviour(source).aspects
    except DataError:
        return Behaviour.aspects
    if not aspects:
        raise ConfigError(
            got=f"--judge for {source}, a behaviour that names nothing to judge",
            expected=f"a judge of one aspect: {', '.join(ASPECTS)}",
            remedy="write --judges.ASPECT.kind and --judges.ASPECT.prompt",
        )
    return aspects


def values_of(arguments: Sequence[str], flag: str) -> list[str]:
    """The values of a flag, given as ``--methods a b`` or ``--methods=a``. If given more than once, the last counts."""
    found: list[str] = []
    reading = False
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if argument.startswith("--"):
            reading = name.replace("_", "-") == f"--{flag.replace('_', '-')}"
            found = ([value] if equals else []) if reading else found
        elif reading:
            found.append(argument)
    return found


def _renamed(arguments: Sequence[str], *, is_audit: bool) -> list[str]:
    """The arguments with flags of an earlier version renamed. Raises `ConfigError` for a flag that no longer exists."""
    out: list[str] = []
    for argument, following in zip(arguments, [*arguments, ""][1:], strict=True):
        flag, equals, value = argument.partition("=")
        new = renamed(flag.removeprefix("--").replace("-", "_"), value or following) if flag.startswith("--") else ""
        if not is_audit and not new.startswith("judges."):
            new = ""  # a study has settings of these names
        if new and flag.endswith("match"):
            new = f"--nulls {null_of(value or following)}"
        if new.startswith("methods."):
            argument = f"--{new}{equals}{value}"
        elif new:
            raise ConfigError(
                got=f"{flag} {value or following}", expected=f"{new}, which replaces it", remedy="see --help"
            )
        out.append(argument)
    return out
