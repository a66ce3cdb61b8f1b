"""Writes docs/api.md, the public Python names, from their signatures and docstrings.

    python docs/generate_api.py

A name is added here with an example; the examples of the page go on from each other, and the tests run them.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

PAGE = Path(__file__).with_name("api.md")
WIDTH = 100
"""Columns of a signature on one line."""
SECTIONS = ("Args", "Returns", "Raises", "Attributes", "Example")


class Name(NamedTuple):
    """A public name and how it is used."""

    path: str
    example: str = ""
    members: tuple[str, ...] = ()
    """Methods of a class that have a paragraph of their own."""
    made: bool = False
    """Whether functions make it, so that nobody calls its constructor."""


class Part(NamedTuple):
    """A part of the page."""

    title: str
    text: str
    names: tuple[Name, ...]


INTRODUCTION = """\
# Python names

Made from the docstrings by `python docs/generate_api.py`: change them there. What is not on this page may change
without a word. Shapes: B pictures of H x W pixels, N rows, C classes, D numbers of an embedding. The examples go on
from each other and begin with

```python
import facefast
import torch
from facefast import ops
from facefast.data import make_loader, make_sampler, oracle, read_index
from facefast.models import build_model
from facefast.recipe import AugmentSpec, ImageSpec, ModelConfig
```
"""
PARTS = (
    Part(
        "A trained model",
        "A model knows its pictures (`model.image`, an `ImageSpec`), its people (`model.class_names`, "
        "`model.num_classes`) and the length of its embeddings (`model.embedding_size`). As `facefast.load` gives it, "
        "it takes photographs, in which it finds faces; any `FaceModel` takes tensors of aligned faces of its size.",
        (
            Name(
                "facefast.load",
                """\
                model = facefast.load("runs/mine")  # or a checkpoint, a package, an ONNX file, a weights file
                print(model.image.shape, model.embedding_size, model.class_names)""",
            ),
            Name("facefast.deploy.photographs.PhotographModel", members=("embed", "predict"), made=True),
            Name(
                "facefast.models.FaceModel", members=("embed", "predict", "preprocess", "encode", "classify"), made=True
            ),
            Name("facefast.models.Prediction"),
            Name(
                "facefast.models.build_model",
                """\
                fresh = build_model(ModelConfig(backbone="mobilefacenet", head="cosine"), 10, ImageSpec(size=64))""",
            ),
        ),
    ),
    Part(
        "Photographs to batches",
        "",
        (
            Name(
                "facefast.data.read_index",
                """\
                index = read_index("people").scanned().sound()  # people/NAME/*.jpg""",
            ),
            Name(
                "facefast.data.FaceIndex",
                """\
                train, test = index.split_per_identity(0.2, seed=0)
                print(len(train), index.num_classes, train.path(0))""",
                (
                    "build",
                    "scanned",
                    "sound",
                    "select",
                    "compact",
                    "split_per_identity",
                    "split_identities",
                    "save",
                    "load",
                ),
            ),
            Name(
                "facefast.data.make_loader",
                """\
                loader = make_loader(train, ImageSpec(size=64), batch_size=4, augment=AugmentSpec(flip=0.5))
                shapes = [batch.images.shape for batch in loader]  # [4, 3, 64, 64] each""",
            ),
            Name(
                "facefast.data.make_sampler",
                """\
                sampler = make_sampler("epoch", labels=train.labels, batch_size=4, seed=0)
                loader = make_loader(train, ImageSpec(size=64), sampler=sampler)""",
            ),
            Name(
                "facefast.data.Loader",
                """\
                loader.set_epoch(1)  # another order, other augmentation
                loader.close()""",
                ("set_epoch", "stream", "close"),
                made=True,
            ),
            Name(
                "facefast.data.Batch",
                """\
                with make_loader(test, ImageSpec(size=64), batch_size=2) as loader:
                    names = [test.path(row) for batch in loader for row in batch.rows.tolist() if row >= 0]""",
            ),
            Name("facefast.data.oracle.decode", "picture = oracle.decode(train.path(0))  # [H, W, 3]"),
            Name("facefast.faces.detect.find_detector"),
            Name("facefast.faces.detect.Detector", members=("find",)),
            Name("facefast.faces.found.Faces", members=("main",)),
        ),
    ),
    Part(
        "Losses",
        "Kernels on the CPU and on GPUs that they were built for, else the readable reference after a warning; "
        "[focal.md](focal.md) has the mathematics.",
        (
            Name(
                "facefast.ops.focal_loss",
                """\
                logits, target = torch.randn(3, 10, requires_grad=True), torch.tensor([1, 7, -100])
                ops.focal_loss(logits, target, gamma=2.0).backward()  # the third row counts for nothing""",
            ),
            Name(
                "facefast.ops.sigmoid_focal_loss",
                """\
                attributes = torch.tensor([[1.0, 0.0], [0.0, torch.nan]])  # NaN is unknown
                loss = ops.sigmoid_focal_loss(torch.randn(2, 2), attributes, gamma=2.0, alpha=0.25)""",
            ),
            Name(
                "facefast.ops.linear_focal_loss",
                """\
                x, weight = torch.randn(3, 128, requires_grad=True), torch.randn(10, 128, requires_grad=True)
                ops.linear_focal_loss(x, weight, target, normalize=True, margin=ops.Arc(0.3), scale=32).backward()""",
            ),
            Name(
                "facefast.ops.sharded_focal_loss",
                """\
                own = ops.class_block(10, ranks=1, rank=0)  # of several ranks each has its own rows and classes
                held = weight[own.start : own.stop]
                ops.sharded_focal_loss(x, held, target, first=own.start, num_classes=10).loss.backward()""",
            ),
            Name("facefast.ops.class_block"),
            Name("facefast.ops.Cos", "loss = ops.focal_loss(torch.rand(3, 10), target, margin=ops.Cos(0.2), scale=32)"),
            Name("facefast.ops.Arc", "loss = ops.focal_loss(torch.rand(3, 10), target, margin=ops.Arc(0.3), scale=32)"),
            Name("facefast.ops.Combined", "margin = ops.Combined(m1=1.0, m2=0.3, m3=0.1)"),
            Name(
                "facefast.ops.AdaFace",
                """\
                adaface = ops.AdaFace(m=0.4)  # a module: put it where the optimiser's state is saved
                loss = ops.focal_loss(torch.rand(3, 10), target, margin=adaface(x.norm(dim=1)), scale=32)""",
            ),
            Name("facefast.ops.backend", 'print(ops.backend("cpu"), ops.backend("cuda"))'),
            Name("facefast.ops.FallbackWarning"),
            Name(
                "facefast.ops.reference.focal_loss",
                "same = ops.reference.focal_loss(logits, target, gamma=2.0)",
            ),
            Name("facefast.ops.reference.sigmoid_focal_loss"),
            Name("facefast.ops.reference.linear_focal_loss"),
        ),
    ),
    Part(
        "What they are given",
        "Frozen dataclasses; every field is also an option of `facefast train`.",
        (
            Name("facefast.recipe.ImageSpec"),
            Name("facefast.recipe.AugmentSpec"),
            Name("facefast.recipe.ModelConfig"),
        ),
    ),
    Part(
        "Errors",
        "Whatever else a user can mend is a `ValueError`.",
        (Name("facefast.runtime.exits.DataError"), Name("facefast.runtime.exits.StorageError")),
    ),
)


def page() -> str:
    """The whole document."""
    lines = [INTRODUCTION]
    for part in PARTS:
        lines += [f"## {part.title}", ""]
        if part.text:
            lines += [*wrapped(part.text), ""]
        for name in part.names:
            lines += described(name)
    return "\n".join(lines).rstrip() + "\n"


def examples() -> Iterator[str]:
    """The examples in the order of the page."""
    yield INTRODUCTION.partition("```python\n")[2].partition("```")[0]
    for part in PARTS:
        for name in part.names:
            yield from filter(None, (textwrap.dedent(name.example), *(example_of(name.path, m) for m in name.members)))


def example_of(path: str, member: str) -> str:
    """That of a class's method, else that of any method of the name."""
    return EXAMPLES.get(f"{path.rpartition('.')[2]}.{member}", EXAMPLES.get(member, ""))


EXAMPLES = {
    "PhotographModel.embed": """\
aligned = facefast.load("runs/mine", detect="none")  # for photographs that are aligned already
vectors = aligned.embed("people")  # a row for each; also a list of files, or of arrays [H, W, 3]""",
    "PhotographModel.predict": """\
for answer in aligned.predict("people", threshold="none"):
    print(answer["path"], answer.get("fault"), [face["names"] for face in answer.get("faces", ())])""",
    "embed": """\
images = torch.zeros(2, 3, *model.image.shape, dtype=torch.uint8)  # aligned faces
cosines = model.embed(images) @ model.embed(images).T  # [2, 2]""",
    "predict": """\
found = model.predict(images)
print(found.names, found.probabilities.max(dim=1).values)""",
    "encode": "embeddings = model.encode(torch.randn(2, 3, *model.image.shape))",
    "classify": "logits = model.classify(embeddings) * model.scale",
}
"""Of methods."""


def described(name: Name) -> Iterator[str]:
    """A name's heading, signature, docstring, fields and example."""
    thing = resolve(name.path)
    yield from (f"### `{name.path}`", "")
    is_class, own_fields = inspect.isclass(thing), fields(thing)
    plain = not is_class or not (own_fields or issubclass(thing, Exception) or name.made)
    if plain:
        yield from fenced(signature(name.path, thing))
    yield from prose(inspect.getdoc(thing) or "", without=("Example",) if plain else ("Example", "Args", "Raises"))
    if own_fields:
        yield from ("| field | type, default | |", "|---|---|---|")
        yield from own_fields
        yield ""
    yield from fenced(textwrap.dedent(name.example))
    for member in name.members:
        method = inspect.getattr_static(thing, member)
        method = method.__func__ if isinstance(method, classmethod | staticmethod) else method
        yield from (f"#### `{thing.__name__}.{member}`", "")
        yield from fenced(signature(f"{thing.__name__}.{member}", method, bound=True))
        yield from prose(inspect.getdoc(method) or "")
        yield from fenced(example_of(name.path, member))


def resolve(path: str) -> Any:
    """What a dotted name stands for."""
    parts = path.split(".")
    for size in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:size]))
        except ModuleNotFoundError:
            continue
        for part in parts[size:]:
            found = getattr(found, part)
        return found
    raise ModuleNotFoundError(path)


def signature(name: str, function: Any, bound: bool = False) -> str:
    """NAME(parameter: type = default, ...) -> type, a parameter a line where it is long."""
    given = inspect.signature(function)
    parts, starred = [], False
    for parameter in list(given.parameters.values())[bound:]:
        if parameter.kind is parameter.KEYWORD_ONLY and not starred:
            parts.append("*")
            starred = True
        default = "" if parameter.default is parameter.empty else f" = {parameter.default!r}"
        kind = getattr(parameter.annotation, "__forward_arg__", parameter.annotation)
        stars = "**" if parameter.kind is parameter.VAR_KEYWORD else ""
        parts.append(f"{stars}{parameter.name}: {kind}{default}".replace("'", '"'))
    result = given.return_annotation
    end = f" -> {result}" if result not in (given.empty, "None", None) and not inspect.isclass(function) else ""
    line = f"{name}({', '.join(parts)}){end}"
    return line if len(line) <= WIDTH else "\n".join([f"{name}(", *(f"    {part}," for part in parts), f"){end}"])


def fields(kind: Any) -> list[str]:
    """Rows of a table: each field of a dataclass or named tuple with the text below it; none where it has no such
    text."""
    if not inspect.isclass(kind) or not (dataclasses.is_dataclass(kind) or issubclass(kind, tuple)):
        return []
    body = ast.parse(textwrap.dedent(inspect.getsource(kind))).body[0]
    assert isinstance(body, ast.ClassDef)
    rows, texts = [], 0
    for node, after in zip(body.body, [*body.body[1:], None], strict=True):
        if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name):
            continue
        text = ""
        if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
            text = " ".join(str(after.value.value).split())
            texts += 1
        what = ast.unparse(node.annotation) + (f" = {ast.unparse(node.value)}" if node.value else "")
        rows.append(f"| `{node.target.id}` | `{what}` | {text} |".replace(" | None", " or None"))
    return [row.replace("|  |", "| |") for row in rows] if texts else []


def prose(text: str, without: tuple[str, ...] = ("Example",)) -> Iterator[str]:
    """A docstring as Markdown, but for some of its sections."""
    for block in re.split(r"\n\s*\n", text.strip()):
        head, _, rest = block.partition("\n")
        section = head[:-1] if head.endswith(":") and head[:-1] in SECTIONS else ""
        items = entries(textwrap.dedent(rest) if section else block)
        if not block or section in without:
            continue
        if section == "Returns":
            yield from wrapped(f"Returns: {' '.join(items)}")
        elif section or is_list(items):
            yield from (f"{section}:", "") if section else ()
            for item in items:
                names, _, what = item.partition(": ")
                quoted = ", ".join(f"`{name.strip()}`" for name in names.split(","))
                yield from wrapped(f"- {quoted}: {what}", "  ")
        else:
            yield from wrapped(block)
        yield ""


def is_list(items: list[str]) -> bool:
    """Whether a paragraph is a list of names, each with what it means."""
    return len(items) > 1 and all(re.match(r"\w+: ", item) for item in items)


def entries(block: str) -> list[str]:
    """Entries of a section, continued on lines that are indented."""
    found: list[str] = []
    for line in block.split("\n"):
        if found and line.startswith(" "):
            found[-1] += "\n" + line
        else:
            found.append(line)
    return found


def wrapped(text: str, indent: str = "") -> list[str]:
    """A paragraph in lines that fit."""
    return textwrap.wrap(
        " ".join(text.split()), 118, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )


def fenced(code: str) -> Iterator[str]:
    """A block of Python."""
    if code:
        yield from ("```python", code, "```", "")


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
