"""Options of a command line: what the fields of its dataclasses are called, say and default to, which one a misspelt
word meant, and the parsing of a whole line."""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import difflib
import functools
import inspect
import io
import itertools
import sys
import textwrap
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar, get_args, get_origin, get_type_hints

import tyro

T = TypeVar("T")
NEEDED = dataclasses.MISSING
"""Default of an option that must be given."""


@dataclass(frozen=True)
class Option:
    """One field of a dataclass, however deep, as a command line names it."""

    path: str
    """data.max_bad_fraction, phases.last.loss.gamma."""
    owner: type
    """The dataclass that has the field."""
    kind: Any
    """The field's type, with what is said about it to tyro."""
    default: Any

    @property
    def flag(self) -> str:
        """--data.max-bad-fraction."""
        return f"--{hyphenated(self.path)}"

    @property
    def negated(self) -> str:
        """--eval.no-baselines, what turns a switch off; empty for others."""
        start, dot, name = hyphenated(self.path).rpartition(".")
        return f"--{start}{dot}no-{name}" if isinstance(self.default, bool) else ""

    @property
    def positional(self) -> bool:
        """Whether it is given by its place instead of its name."""
        return tyro.conf.Positional in getattr(self.kind, "__metadata__", ())

    @property
    def text(self) -> str:
        """The field's docstring in one line."""
        return field_texts(self.owner).get(self.path.rpartition(".")[2], "")


def options(kind: type, values: Any = NEEDED, prefix: str = "") -> Iterator[Option]:
    """The options that a dataclass gives a command line, with the defaults that an instance, or the class, has.

    Dataclasses in a tuple are told apart by their names: phases.last.lr.
    """
    hints = get_type_hints(kind, include_extras=True)
    for field in dataclasses.fields(kind):
        hint, value = hints[field.name], _default(field) if values is NEEDED else getattr(values, field.name)
        plain, *extras = get_args(hint) if get_origin(hint) is Annotated else (hint,)
        path = prefix + field.name
        if dataclasses.is_dataclass(plain) and isinstance(plain, type):
            nameless = any(getattr(extra, "name", None) == "" for extra in extras)  # tyro.conf.arg(name="")
            yield from options(plain, value, prefix if nameless else f"{path}.")
        elif get_origin(plain) is tuple and dataclasses.is_dataclass(get_args(plain)[0]):
            for part in value:
                yield from options(type(part), part, f"{path}.{part.name}.")
        else:
            yield Option(path, kind, hint, value)


def _default(field: dataclasses.Field[Any]) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


@functools.cache
def field_texts(kind: type) -> dict[str, str]:
    """What the docstrings below a dataclass's fields say, in one line each; inherited fields count."""
    texts = {}
    for base in reversed(kind.__mro__[:-1]):
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        assert isinstance(tree, ast.ClassDef)
        for field, text in zip(tree.body, tree.body[1:], strict=False):
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
                texts[ast.unparse(field.target)] = " ".join(str(text.value.value).split())
    return texts


def hyphenated(word: str) -> str:
    """The part of a word before its = with hyphens for underscores: tyro takes both."""
    name, equals, value = word.partition("=")
    return name.replace("_", "-") + equals + value


def nearest(word: str, known: Iterable[str]) -> list[str]:
    """The known word that one misspells, if any is near; the dotted ones that an option is the end of.

    --image.siez is near --image.size, and --size is the end of it.
    """
    known = list(known)
    ends = [name for name in known if word.startswith("-") and name.endswith(f".{word.lstrip('-')}")]
    return ends or difflib.get_close_matches(word, known, 1)


def group_of(flag: str, known: Iterable[str], shown: int = 4) -> str:
    """What to say of a word that is the beginning or the middle of options' names, as --data is of --data.root and
    --loss of --phases.last.loss.gamma; "" for any other."""
    known = list(known)
    middle = f".{flag.lstrip('-')}"
    groups = [flag, *(name[: name.index(f"{middle}.")] + middle for name in known if f"{middle}." in name)]
    for group in groups:
        inside = [name for name in known if name.startswith(f"{group}.")]
        if inside:
            more = f" and {len(inside) - shown} more" if len(inside) > shown else ""
            return f"{group} is a group of options: {', '.join(inside[:shown])}{more}"
    return ""


def did_you_mean(words: Iterable[str]) -> str:
    """ "; did you mean a or b?", nothing for no words."""
    words = list(words)
    return f"; did you mean {one_of(words)}?" if words else ""


def one_of(words: Iterable[str]) -> str:
    """a, b or c."""
    *first, last = words
    return f"{', '.join(first)} or {last}" if first else last


SHORT_DETECT = ("--detect", "--data.detect")
"""One name in every command: those that take a data set have it among what is known of that."""


def in_full(word: str) -> str:
    """--data.detect for --detect."""
    flag, equals, value = word.partition("=")
    return SHORT_DETECT[1] + equals + value if flag == SHORT_DETECT[0] else word


def parse(kind: type[T], arguments: list[str] | None, command: str) -> T:
    """A command's line, or the process's own where `arguments` is None.

    Raises:
        ValueError: an option that the command does not have.
        SystemExit: help was wanted and printed, or a value that is missing or not of its option's type.
    """
    known = [option for option in options(kind) if not option.positional]
    words = _words(kind, arguments)
    taken = {"--help", *(option.flag for option in known), *(option.negated for option in known)}
    for flag in _flags(words):
        # Names before values: tyro would rather say which ones are missing, and knows no --thread=3 for --threads 3.
        if flag not in taken and not flag.startswith("--tyro-"):
            if text := group_of(flag, [option.flag for option in known]):
                raise ValueError(f"{text} (facefast {command} --help lists all of them)")
            near = did_you_mean(nearest(flag, ["--help", *(option.flag for option in known)]))
            raise ValueError(f"there is no option {flag}{near} (facefast {command} --help lists all of them)")
    with quoting_errors():
        return tyro.cli(kind, args=words, prog=f"facefast.{command}")


@contextlib.contextmanager
def quoting_errors() -> Iterator[None]:
    """Within it what tyro says of a wrong value is the text of its SystemExit instead of being printed: whoever prints
    it can escape what was typed."""
    encoding = getattr(sys.stderr, "encoding", None) or "utf-8"  # tyro draws its frames from what this has
    said = io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="backslashreplace")
    try:
        with contextlib.redirect_stderr(said):
            yield
    except SystemExit as error:
        if error.code in (0, None):
            raise
        said.flush()
        text = said.buffer.getvalue().decode(encoding)
        raise SystemExit(text.strip("\n") or error.code) from None


def typed(kind: type[Any], arguments: list[str] | None) -> frozenset[str]:
    """Paths of the options that stand on a command's line, which a value cannot tell: one may be typed that is the
    default."""
    flags = set(_flags(_words(kind, arguments)))
    return frozenset(option.path for option in options(kind) if flags & {option.flag, option.negated or option.flag})


def _words(kind: type[Any], arguments: list[str] | None) -> list[str]:
    words = sys.argv[1:] if arguments is None else arguments
    has_data = any(option.flag == SHORT_DETECT[1] for option in options(kind))
    return [in_full(word) for word in words] if has_data else list(words)


def _flags(words: list[str]) -> list[str]:
    """Names of options, hyphenated, without what is given to them; after -- come none."""
    before = itertools.takewhile(lambda word: word != "--", words)
    return [hyphenated(word).partition("=")[0] for word in before if word.startswith("--")]
