"""Settings without plumbing: a dataclass field is a flag is a YAML key.

A section is a frozen, keyword-only dataclass that lives beside what it configures:

    @dataclass(frozen=True, kw_only=True)
    class SamplingConfig:
        batch_size: int = 16  # images per step and process

Its default is written once, the comment on the field's line is the flag's help, and its `__post_init__` checks the
value. Precedence: default < base (the run that a checkpoint came from) < recipe (`--config FILE`) < flag. Every value
passes through the same typed reader, so `lr: 1e-4` in YAML is the number that `--lr 1e-4` is.

This module is the mechanism only; it knows no setting but its own three flags.
"""

import argparse
import difflib
import inspect
import io
import os
import re
import sys
import tokenize
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

MAX_RECIPE_BYTES = 1 << 20  # a recipe is a page of text; anything larger is not a recipe
LARGEST = 1 << 63  # whole numbers are below it: those of PyTorch have 64 bits
MAX_DEPTH, MAX_WORD = 20, 10_000  # of a recipe's blocks; characters of one value
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the same in C: a megabyte in seconds, not minutes


# Exit codes: done, the user's input, the environment, training failed, a peer was lost, stopped on request and saved.
EXIT_DONE, EXIT_USER, EXIT_ENVIRONMENT, EXIT_TRAINING, EXIT_PEER, EXIT_STOPPED = 0, 2, 3, 4, 5, 75


class UserError(ValueError):
    """Something the user can mend: one line that names the flag, the value and the remedy; scripts exit with code 2."""


def first_few(words, count: int = 5, between: str = ", ") -> str:
    """The first words of a list, and how many more there are."""
    more = f" and {len(words) - count} more" if len(words) > count else ""
    return between.join(words[:count]) + more


def refuse_below(section, least: int, *names: str) -> None:
    """Raise if one of a section's numbers is below 0 or 1 (`least`), or not a number.

    Raises:
        UserError: names the flag and its value.
    """
    for name in names:
        if not getattr(section, name) >= least:
            bound = "at least 1" if least else "0 or more"
            raise UserError(f"--{name} is {getattr(section, name)}; it must be {bound}")


def str2bool(value: str | bool) -> bool:
    """Read a boolean flag as upstream does: yes/true/t/y/1 or no/false/f/n/0, in any case."""
    if isinstance(value, bool):
        return value
    if str(value).lower() in ("yes", "true", "t", "y", "1"):
        return True
    if str(value).lower() in ("no", "false", "f", "n", "0"):
        return False
    raise argparse.ArgumentTypeError("boolean value expected")


def reader_of(default: Any):
    """The type that a flag with this default is read with: None reads as str, bool as `str2bool`, a tuple as words."""
    if default is None:
        return str
    if isinstance(default, tuple):
        return words_of
    return str2bool if isinstance(default, bool) else type(default)


def words_of(text: Any) -> tuple[str, ...]:
    """`3,7` as its words."""
    return tuple(word.strip() for word in str(text).split(",") if word.strip())


def field_defaults(*sections) -> dict[str, Any]:
    """Flag name -> default, in the order in which the fields are written (the order of the flags)."""
    defaults = {}
    for section in sections:
        for field in fields(section):
            assert field.default is not MISSING, f"{section.__name__}.{field.name} has no default"
            known = defaults.setdefault(field.name, field.default)
            assert known == field.default, f"--{field.name} has two defaults: {known} and {field.default}"
    return defaults


def field_help(section) -> dict[str, str]:
    """Flag name -> the comment that stands on the field's line, or directly above it; also of what is inherited."""
    above, notes = [], {}
    for parent in filter(is_dataclass, section.__bases__):
        notes |= field_help(parent)
    try:
        source = inspect.getsource(section)
    except OSError:  # a frozen application ships no source; help texts are all that is lost
        return notes
    named = {field.name for field in fields(section)}
    by_line: dict[int, list[tokenize.TokenInfo]] = {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        by_line.setdefault(token.start[0], []).append(token)
    for tokens in by_line.values():
        words = [t for t in tokens if t.type not in (tokenize.INDENT, tokenize.DEDENT)]
        comment = next((t.string.lstrip("# ") for t in words if t.type == tokenize.COMMENT), None)
        if words and words[0].type == tokenize.COMMENT:
            above.append(comment)
            continue
        if words and words[0].string in named and len(words) > 1 and words[1].string == ":":
            notes[words[0].string] = comment or " ".join(above)
        above = []
    return notes


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line, and which suggests the nearest flag."""

    sections: tuple = ()  # whose fields are its flags
    elsewhere: set[str] = set()  # keys of recipes that are for other scripts

    def error(self, message: str):
        raise UserError(message)

    def parse_args(self, args=None, namespace=None):
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            raise UserError(f"unknown flag {unknown[0]}{self._nearest(unknown[0].split('=')[0])}; --help lists them")
        return parsed

    def _get_option_tuples(self, option_string: str):
        """What a flag cut short may stand for; two names of one flag are one."""
        found = super()._get_option_tuples(option_string)  # pyright: ignore[reportAttributeAccessIssue]  # argparse's own
        return found[:1] if len({id(match[0]) for match in found}) == 1 else found

    def _nearest(self, flag: str) -> str:
        return did_you_mean(flag, [name for action in self._actions for name in action.option_strings])


def did_you_mean(word: str, known) -> str:
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f" (did you mean {near[0]}?)" if near else ""


def add_dict_to_argparser(
    parser: argparse._ActionsContainer, default_dict: dict[str, Any], notes=None, aliases=None
) -> None:
    """Add one `--name` flag per entry, typed by its default (upstream's rule: None is a string).

    Args:
        notes: name -> help; aliases: name -> another name for the same flag.
    """
    for name, default in default_dict.items():
        help_text = (notes or {}).get(name, "").replace("%", "%%")
        shown = f"{help_text} (default: {default!r})".strip().replace("%%(", "%(")
        names = [f"--{name}", *(f"--{alias}" for alias in [(aliases or {}).get(name)] if alias)]
        words = {"nargs": "+", "action": _Words} if isinstance(default, tuple) else {}
        options = {"dest": name, "default": default, "type": reader_of(default), "help": shown, "metavar": "X"}
        parser.add_argument(*names, **options, **words)


class _Help(argparse.RawDescriptionHelpFormatter):
    """Help whose first line is the usage in brief: the flags have their own lines below, with what they mean."""

    def add_usage(self, usage, actions, groups, prefix=None):
        places = [str(action.metavar) for action in actions if not action.option_strings]
        super().add_usage(usage or " ".join(["%(prog)s", *places, "[--FLAG VALUE ...]"]), actions, groups, prefix)


class _Words(argparse.Action):
    """Collects `--users 1 2,3` as (1, 2, 3)."""

    def __call__(self, parser, namespace, values, option_string=None):
        setattr(namespace, self.dest, tuple(word for part in values or () for word in part))


def args_to_dict(args, keys) -> dict[str, Any]:
    """The named settings of parsed arguments, as keyword arguments for a `create_*` function."""
    return {key: getattr(args, key) for key in keys}


def create_argparser(
    *sections, description: str | None = None, aliases: dict[str, str] | None = None, elsewhere=()
) -> Parser:
    """A parser for the fields of all sections, plus `--config`, `--dry_run` and `--debug`.

    Args:
        aliases: flag -> another name for it.
        elsewhere: sections of the scripts that share recipes with this one; it passes their keys over.
    """
    parser = Parser(description=description, formatter_class=_Help)
    parser.sections, parser.elsewhere = sections, {field.name for section in elsewhere for field in fields(section)}
    for section in sections:
        group = parser.add_argument_group(section.__name__)
        add_dict_to_argparser(group, _new_fields(section, parser), field_help(section), aliases)
    own = parser.add_argument_group("every script")
    own.add_argument("--config", default="", metavar="FILE", help="a recipe: YAML of flag: value")
    own.add_argument("--dry_run", default=False, type=str2bool, metavar="X", help="print all settings and stop")
    own.add_argument("--debug", default=False, type=str2bool, metavar="X", help="show the traceback of an error")
    return parser


def _new_fields(section, parser) -> dict[str, Any]:
    taken = {action.dest for action in parser._actions}
    return {name: value for name, value in field_defaults(section).items() if name not in taken}


class Run:
    """A resolved run: every setting as an attribute, and each section as its dataclass."""

    def __init__(self, values: dict[str, Any], given: set[str], sections, control: argparse.Namespace):
        for name in (name for name, value in values.items() if isinstance(value, int) and abs(value) >= LARGEST):
            raise UserError(f"--{name} is {values[name]}; the largest number is {LARGEST - 1}")
        self.__dict__.update(values)
        self._names, self.given, self._sections = list(values), given, sections
        self.dry_run, self.debug, self.config = control.dry_run, control.debug, control.config
        for section in sections:
            self.section(section)  # its __post_init__ is the check

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...  # a setting: which there are, the sections say

    def section(self, cls):
        """The settings of one section as its (checked) dataclass."""
        return cls(**{field.name: getattr(self, field.name) for field in fields(cls)})

    def as_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self._names}

    @property
    def defaults(self) -> dict[str, Any]:
        """Flag name -> default."""
        return field_defaults(*self._sections)

    def replace(self, **values) -> "Run":
        """A copy with some settings replaced (values that the run itself worked out, such as a class list's length)."""
        control = argparse.Namespace(dry_run=self.dry_run, debug=self.debug, config=self.config)
        return Run({**self.as_dict(), **values}, self.given, self._sections, control)

    def __str__(self) -> str:
        """A recipe of this very run: all settings in a dry run, else those that were given or are not the default."""
        if self.dry_run:
            return in_yaml(self.as_dict())
        defaults, lines = self.defaults, []
        told = {k: v for k, v in self.as_dict().items() if k in self.given or v != defaults.get(k, v)}
        others = len(self._names) - len(told)
        for section in self._sections:
            own = {field.name: told.pop(field.name) for field in fields(section) if field.name in told}
            lines += [f"# {section.__name__}", in_yaml(own)] if own else []
        return "\n".join([*lines, f"# the other {others} settings have their defaults: --dry_run True prints all"])


def in_yaml(values: dict[str, Any]) -> str:
    """The values as lines of a recipe."""
    return yaml.safe_dump(plain(values), sort_keys=False, allow_unicode=True).rstrip()


def plain(values: dict[str, Any]) -> dict[str, Any]:
    """The values as YAML and JSON know them: words become a list."""
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def parse_run(parser: Parser, argv=None, base: dict[str, Any] | None = None, translate=None) -> Run:
    """Resolve a run from the flags, the recipe that `--config` names, and a base run.

    Args:
        parser: from `create_argparser`.
        argv: flags; None takes the command line's.
        base: settings of an earlier run (its `run.yaml`) to start from; keys that this script does not have are
            ignored, for a training run knows more than its sampler needs.
        translate: makes a recipe of what the file holds, where others' files are read, too.
    Raises:
        UserError: an unknown flag or key, or a value of the wrong type.
    """
    defaults = field_defaults(*parser.sections)
    control = {"config", "dry_run", "debug"} | parser.elsewhere
    unset = object()
    args = parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(defaults, unset)))
    flags = {name: getattr(args, name) for name in defaults if getattr(args, name) is not unset}
    recipe = read_recipe(args.config, defaults, ignore=control, translate=translate) if args.config else {}
    inherited = {k: typed(k, v, defaults[k], "run.yaml") for k, v in (base or {}).items() if k in defaults}
    return Run({**defaults, **inherited, **recipe, **flags}, set(recipe) | set(flags), parser.sections, args)


def read_recipe(path: str, defaults: dict[str, Any], ignore=(), translate=None) -> dict[str, Any]:
    """Read a YAML recipe; unknown keys and values of another type are errors that name the file and the key."""
    loaded = read_yaml(path)
    loaded = translate(loaded) if translate else loaded
    for key in loaded:
        if key not in defaults and key not in ignore:
            raise UserError(f"--config {path} has the unknown key {key!r}{did_you_mean(str(key), defaults)}")
    return {k: typed(k, v, defaults[k], f"--config {path}") for k, v in loaded.items() if k in defaults}


def typed(name: str, value: Any, default: Any, source: str) -> Any:
    """Pass a YAML value through the reader of its flag, so that `1e-4` is a number and 'yes' a boolean."""
    if value is None:
        return "" if isinstance(default, str) else default
    if isinstance(value, tuple):
        return value
    if isinstance(value, list):
        value = ",".join(str(item) for item in value)
    if isinstance(value, dict):
        raise UserError(f"{source}: {name} is a block; recipes are flat, one 'flag: value' a line")
    try:
        return reader_of(default)(value if isinstance(value, bool) else str(value))
    except (ValueError, argparse.ArgumentTypeError) as error:
        wanted = type(default).__name__
        raise UserError(f"{source}: {name} is {value!r}, which is not a {wanted}") from error


def read_yaml(path: str | os.PathLike) -> dict[str, Any]:
    """Read a flat YAML file of at most 1 MB safely: no tags, no aliases.

    Raises:
        UserError: the file is missing, too large, or not a flat YAML mapping.
    """
    path = Path(path)
    if not path.is_file():
        near = [str(file) for folder in {path.parent, Path("configs")} for file in sorted(folder.glob("*.yaml"))]
        raise UserError(f"--config {path} does not exist{did_you_mean(str(path), near)}")
    if path.stat().st_size > MAX_RECIPE_BYTES:
        raise UserError(f"--config {path} is larger than 1 MB; that is no recipe")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"--config {path} is not a text file; give a recipe (.yaml)") from error
    try:
        _refuse_traps(text, path)
        loaded = yaml.load(text, Loader=LOADER)
    except UserError:  # a ValueError, too
        raise
    except (yaml.YAMLError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        where = re.sub(r"\s+", " ", str(error))[:200]  # a tag's value (!!bool x) can raise any of these
        raise UserError(f"--config {path} is not valid YAML: {where}") from error
    if loaded is None:
        return {}
    if not isinstance(loaded, dict):
        raise UserError(f"--config {path} must be 'flag: value' lines, it is a {type(loaded).__name__}")
    return loaded


def _refuse_traps(text: str, path: Path) -> None:
    """Raise for what costs a loader memory or time beyond its length: aliases, deep nesting, endless words."""
    depth = 0
    for event in yaml.parse(text, Loader=LOADER):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if isinstance(event, yaml.AliasEvent):
            raise UserError(f"--config {path} uses YAML aliases (*name); write the values out")
        if depth > MAX_DEPTH:
            raise UserError(f"--config {path} is nested more than {MAX_DEPTH} deep; that is no recipe")
        if isinstance(event, yaml.ScalarEvent) and len(event.value) > MAX_WORD:
            raise UserError(f"--config {path} has a value of {len(event.value):,} characters; that is no recipe")


def debug_wanted(argv=None) -> bool:
    """Whether `--debug True` was given; looked up by hand, for the error may be in the flags themselves."""
    words = " ".join(sys.argv[1:] if argv is None else argv)
    found = re.search(r"--debug[ =](\S+)", words)
    return bool(found) and found.group(1).lower() in ("yes", "true", "t", "y", "1")
