"""Write docs/api.md, the page of public names, from the signatures and docstrings of `arlon`.

    python docs/make_api.py            # write the page
    python docs/make_api.py --check    # fail if it is not what the sources say

Sources are parsed, not imported, so the page is the same with every version of Python and of PyTorch.
"""

from __future__ import annotations

import ast
import inspect
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "api.md"
MODULES = (
    "arlon",
    "arlon.film.storyboard",
    "arlon.film.settings",
    "arlon.film.plan",
    "arlon.errors",
    "arlon.checkpoint",
    "arlon.components",
    "arlon.protocols",
    "arlon.backbones",
    "arlon.diffusion.samplers",
    "arlon.diffusion.solvers",
    "arlon.diffusion.steps",
    "arlon.attention",
    "arlon.plugins",
)
ONLY = {
    "arlon.film.storyboard": ("Storyboard", "Shot"),
    "arlon.film.settings": ("Settings",),
    "arlon.film.plan": ("Plan", "ShotSpan", "Take", "Segment"),
    "arlon.errors": (
        "ArlonError",
        "UsageError",
        "StoryboardError",
        "ConfigError",
        "CheckpointError",
        "VideoError",
        "ManifestError",
    ),
    "arlon.checkpoint": ("resolve_model", "ModelFolder"),
    "arlon.components": ("Component",),
}
"""Names shown of modules of which the rest is internal."""
INTRODUCTION = """# Python API

Written by `python docs/make_api.py` from the docstrings; change those, not this page. Tensors are named by their axes:
B batch, C channels, T frames, H rows, W columns; `(B, C, T, H, W)` is the shape of a batch of latents. What is not on
this page may change without notice.
"""
SECTIONS = {
    "Args": "Arguments",
    "Attributes": "Attributes",
    "Returns": "Returns",
    "Yields": "Yields",
    "Raises": "Raises",
}
WIDTH = 100
"""Columns from which a signature takes a line for each argument."""

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Entry:
    """A public name with the syntax that defines it."""

    name: str
    node: ast.stmt
    note: str | None = None
    """Docstring of an assigned name."""


def source(module: str) -> ast.Module:
    """Syntax tree of a module of this repository."""
    path = ROOT.joinpath(*module.split("."))
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return ast.parse(file.read_text(encoding="utf-8"))


def public_entries(module: str) -> list[Entry]:
    """Public names of a module in order: those of `ONLY`, else of `__all__`, else all that it defines."""
    tree = source(module)
    own = {entry.name: entry for entry in defined(tree.body)}
    if module in ONLY:
        return [own[name] for name in ONLY[module]]
    exported = own.get("__all__")
    if exported is None:
        return [entry for name, entry in own.items() if not name.startswith("_") and has_text(entry)]
    assert isinstance(exported.node, ast.Assign)
    origins = {
        alias.asname or alias.name: node.module
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module
        for alias in node.names
    }
    found = []
    for name in ast.literal_eval(exported.node.value):
        home = own if name in own else {entry.name: entry for entry in defined(source(origins[name]).body)}
        found.append(home[name])
    return found


def defined(body: list[ast.stmt]) -> Iterator[Entry]:
    """Functions, classes and assigned names of a module or class, assigned ones with the string that follows them."""
    for node, after in zip(body, [*body[1:], None], strict=True):
        if isinstance(node, ast.ClassDef | Function):
            yield Entry(node.name, node)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            target = node.targets[0] if isinstance(node, ast.Assign) else node.target
            if isinstance(target, ast.Name):
                value = (
                    after.value.value if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant) else None
                )
                note = value if isinstance(value, str) else None
                yield Entry(target.id, node, note)


def has_text(entry: Entry) -> bool:
    """Whether a name is worth a place: a function or class, or an assigned name that is documented or a registry."""
    if isinstance(entry.node, ast.ClassDef | Function):
        return True
    return entry.note is not None or "Registry[" in ast.unparse(entry.node)


def page() -> str:
    """Text of the whole page."""
    parts = [INTRODUCTION]
    listed = {module: public_entries(module) for module in MODULES}
    for module, entries in listed.items():
        links = ", ".join(f"[{entry.name}](#{anchor(f'{module}.{entry.name}')})" for entry in entries)
        parts.append(f"- [{module}](#{anchor(module)}): {links}")
    for module, entries in listed.items():
        parts.append(f"\n## {module}\n\n{markdown(ast.get_docstring(source(module)))}")
        parts += [entry_text(entry, module) for entry in entries]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(parts)).rstrip() + "\n"


def anchor(heading: str) -> str:
    """Link target that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def entry_text(entry: Entry, owner: str, level: int = 3) -> str:
    """Heading, signature and docstring of a name, and its public methods if it is a class."""
    node = entry.node
    title = f"\n{'#' * level} `{owner}.{entry.name}`\n\n"  # between backticks, or `__call__` would be bold
    if isinstance(node, Function):
        return title + fenced(function_signature(node)) + markdown(ast.get_docstring(node))
    if not isinstance(node, ast.ClassDef):
        return title + fenced(ast.unparse(node)) + markdown(entry.note)
    members = list(defined(node.body))
    constructor = next((member.node for member in members if member.name == "__init__"), None)
    text = title + fenced(class_signature(node, constructor)) + markdown(ast.get_docstring(node))
    if isinstance(constructor, Function):
        text += markdown(constructor_text(constructor))
    public = [member for member in members if not member.name.startswith("_") or member.name == "__call__"]
    fields = [member for member in public if isinstance(member.node, ast.AnnAssign)]
    properties = [member for member in public if is_property(member.node)]
    if fields or properties:
        text += (
            f"\n{'Attributes' if fields else 'Properties'}:\n\n"
            + "\n".join(map(attribute_line, [*fields, *properties]))
            + "\n"
        )
    methods = [member for member in public if isinstance(member.node, Function) and member not in properties]
    return text + "".join(entry_text(method, entry.name, level + 1) for method in methods)


def constructor_text(node: Function) -> str | None:
    """Docstring of a constructor without its first sentence, which repeats that of the class."""
    text = ast.get_docstring(node) or ""
    return text[text.index("Args:") :] if "Args:" in text else None


def is_property(node: ast.stmt) -> bool:
    """Whether a method is read like an attribute."""
    names = {ast.unparse(decorator) for decorator in getattr(node, "decorator_list", [])}
    return bool(names & {"property", "cached_property"})


def attribute_line(member: Entry) -> str:
    """List entry of a field or property."""
    node = member.node
    if isinstance(node, ast.AnnAssign):
        kind, text = ast.unparse(node.annotation), member.note
    else:
        assert isinstance(node, Function)
        kind, text = ast.unparse(node.returns) if node.returns else "", ast.get_docstring(node)
    first = escaped(" ".join((text or "").split()))
    return f"- `{member.name}: {kind}`" + (f": {first}" if first else "")


def function_signature(node: Function) -> str:
    """Call of a function with annotations and defaults, without `self`."""
    decorators = {ast.unparse(decorator).split(".")[-1] for decorator in node.decorator_list}
    lines = [f"@{name}" for name in ("classmethod", "staticmethod", "contextmanager") if name in decorators]
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    return "\n".join([*lines, call(node.name, arguments(node), returns)])


def class_signature(node: ast.ClassDef, constructor: ast.stmt | None) -> str:
    """Call that builds an object if the class has a constructor of its own, else the class with its bases."""
    if isinstance(constructor, Function) and arguments(constructor):
        return call(f"class {node.name}", arguments(constructor), "")
    bases = ", ".join(map(ast.unparse, node.bases))
    return f"class {node.name}({bases})" if bases else f"class {node.name}"


def arguments(node: Function) -> list[str]:
    """Arguments as they are written, with the mark `*`, without `self` and `cls`."""
    given = node.args
    positional = [*given.posonlyargs, *given.args]
    defaults = [None] * (len(positional) - len(given.defaults)) + given.defaults
    parts = [argument(arg, default) for arg, default in zip(positional, defaults, strict=True)]
    if positional and positional[0].arg in ("self", "cls"):
        del parts[0]
    if given.vararg or given.kwonlyargs:
        parts.append("*" + (argument(given.vararg, None) if given.vararg else ""))
    parts += [argument(arg, default) for arg, default in zip(given.kwonlyargs, given.kw_defaults, strict=True)]
    return parts + (["**" + argument(given.kwarg, None)] if given.kwarg else [])


def argument(arg: ast.arg, default: ast.expr | None) -> str:
    """One argument with annotation and default."""
    text = f"{arg.arg}: {ast.unparse(arg.annotation)}" if arg.annotation else arg.arg
    return text if default is None else f"{text} = {ast.unparse(default)}"


def call(name: str, parts: list[str], returns: str) -> str:
    """Call in one line, or a line for each argument if it is long."""
    line = f"{name}({', '.join(parts)}){returns}"
    if len(line) <= WIDTH:
        return line
    return "\n".join([f"{name}(", *(f"    {part}," for part in parts), f"){returns}"])


def fenced(code: str) -> str:
    """Code as a block, with the quotation marks of the sources."""
    return "```python\n" + code.replace("'", '"') + "\n```\n\n"


def markdown(docstring: str | None) -> str:
    """Docstring as Markdown: sections such as `Args:` as lists, indented text as it stands."""
    if not docstring:
        return ""
    lines, section = [], None
    for line in inspect.cleandoc(docstring).splitlines():
        heading = re.fullmatch(r"(\w+):", line)
        if heading and heading[1] in SECTIONS:
            section = heading[1]
            lines += ["", f"{SECTIONS[section]}:", ""]
        elif section is None or not line.startswith("    "):
            section = section if not line else None
            lines.append(line if line.startswith("    ") else escaped(line))
        elif line.startswith("     "):
            lines.append("  " + escaped(line.strip()))
        else:
            item = re.fullmatch(r"(\*{0,2}[\w.]+): (.*)", line.strip())
            named = item is not None and section not in ("Returns", "Yields")
            lines.append(f"- `{item[1]}`: {escaped(item[2])}" if item and named else "  " + escaped(line.strip()))
    return "\n".join(lines) + "\n"


def escaped(text: str) -> str:
    """Text in which Markdown reads no emphasis and no HTML, code between backticks left as it is."""
    pieces = re.split(r"(`[^`]*`)", text)
    return "".join(piece if piece.startswith("`") else re.sub(r"([*<])", r"\\\1", piece) for piece in pieces)


def main(words: list[str]) -> int:
    """Write the page, or compare it with `--check`."""
    text = page()
    if "--check" in words:
        if PAGE.read_text(encoding="utf-8") != text:
            print("docs/api.md is not what the sources say: run python docs/make_api.py", file=sys.stderr)
            return 1
        return 0
    PAGE.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
