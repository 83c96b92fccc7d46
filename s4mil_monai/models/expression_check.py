"""Whether MONAI may evaluate an expression of a configuration. It is parsed here, and never run."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

from s4mil_monai.models.config_allowed import (
    ATTRIBUTES,
    ENVIRONMENT,
    IMPORTS,
    METHODS,
    VALUES,
)

LONGEST = 300
"""Characters; a longer one is a program."""

_REFERENCE = re.compile(r"@(\w*(?:::\w*)*)")
_ID = re.compile(r"\w+(?:::\w+)*")
_RELATIVE = re.compile(r"[@%]::+")
_REFERENCES = "__local_refs"
"""MONAI writes ``__local_refs['id']`` for ``@id``, in strings too, before Python parses the text."""


def find_objection(expression: str) -> str | None:
    """Why an expression (``$…``) is refused, or None where it is on the allow-lists.

    >>> find_objection("$@network_def.to(@device)")
    >>> find_objection("$__import__('os').system('id')")
    "reaches for Python's inner names (__)"
    """
    if len(expression) > LONGEST:
        return f"is longer than {LONGEST} characters"
    if "__" in expression:
        return "reaches for Python's inner names (__)"
    text = expression[1:].replace("#", "::")  # MONAI's older separator, which it replaces everywhere
    if _RELATIVE.search(text):
        return "refers relatively; MONAI would write keys of the configuration into the code"
    if not all(_ID.fullmatch(name) for name in _REFERENCE.findall(text)):
        return "has an @ that is no reference"
    return _objection_to_code(_REFERENCE.sub(rf"{_REFERENCES}['\1']", text))


def _objection_to_code(code: str) -> str | None:
    try:
        body = ast.parse(code).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return "is no Python expression"
    if len(body) != 1:
        return "is not one expression"
    statement = body[0]
    if isinstance(statement, (ast.Import, ast.ImportFrom)):
        return None if ast.unparse(statement) in IMPORTS else "imports what is not on the allow-list"
    if not isinstance(statement, ast.Expr):
        return "is a statement"
    return next(_objections(statement.value), None)


def _objections(node: ast.expr) -> Iterator[str]:
    match node:
        case ast.Constant(value=str() | int() | float() | None):
            return
        case ast.Name(id=name):
            if name not in VALUES:
                yield f"names {name}, which is not on the allow-list"
        case ast.Attribute():
            yield from _objections_to_attribute(node, ATTRIBUTES)
        case ast.Call():
            yield from _objections_to_call(node)
        case ast.Subscript():
            if not (_is_reference(node) or _is_environment(node)):
                yield "takes an item with [ ]"
        case (
            ast.BinOp(op=ast.Add() | ast.Sub() | ast.Div())
            | ast.BoolOp()
            | ast.Compare()
            | ast.UnaryOp(op=ast.Not() | ast.USub())
            | ast.IfExp()
            | ast.List()
            | ast.Tuple()
        ):
            for child in ast.iter_child_nodes(node):
                if isinstance(child, ast.expr):
                    yield from _objections(child)
        case _:
            yield f"has a {type(node).__name__}, which is not on the allow-list"


def _objections_to_attribute(node: ast.Attribute, allowed: frozenset[str]) -> Iterator[str]:
    """Of a module's name, the whole must be listed; of an object, its attribute."""
    named = _dotted(node)
    if named is not None:
        if named not in VALUES:
            yield f"names {named}, which is not on the allow-list"
        return
    if node.attr not in allowed:
        yield f"takes .{node.attr}, which is not on the allow-list"
    yield from _objections(node.value)


def _objections_to_call(node: ast.Call) -> Iterator[str]:
    function = node.func
    if isinstance(function, ast.Attribute):
        yield from _objections_to_attribute(function, METHODS)
    elif isinstance(function, ast.Name):
        yield from _objections(function)
    else:
        yield "calls what has no name"
    for argument in node.args:
        yield from _objections(argument)
    for keyword in node.keywords:
        if keyword.arg is None:
            yield "unpacks with **"
        yield from _objections(keyword.value)


def _dotted(node: ast.expr) -> str | None:
    """``torch.cuda.is_available`` of names joined by dots; None of anything else."""
    if isinstance(node, ast.Name):
        return node.id
    before = _dotted(node.value) if isinstance(node, ast.Attribute) else None
    return f"{before}.{node.attr}" if isinstance(node, ast.Attribute) and before is not None else None


def _is_reference(node: ast.Subscript) -> bool:
    return _dotted(node.value) == _REFERENCES and _text(node.slice) is not None


def _is_environment(node: ast.Subscript) -> bool:
    return _dotted(node.value) == "os.environ" and _text(node.slice) in ENVIRONMENT


def _text(node: ast.expr) -> str | None:
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else None
