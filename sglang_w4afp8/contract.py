"""One row of the contract with SGLang, and how it is compared with a definition found there.

The rows are in :mod:`sglang_w4afp8.hooks`, the gate that acts on them is
:mod:`sglang_w4afp8.compat`.
"""

from __future__ import annotations

import ast
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

from sglang_w4afp8.host_source import (
    Definition,
    Function,
    Parameters,
    assigned_attributes,
    find_calls,
)


class Kind(StrEnum):
    """What "fits" means for a hook."""

    OVERRIDE = "override"
    """We replace it, subclass it or pass by position: names and order must match exactly."""
    CALL = "call"
    """We call it with these keywords: it must take them and require no others."""
    ATTRIBUTE = "attribute"
    """It must exist; with names: a dict literal with these keys, or a class with these members."""
    SOURCE = "source"
    """Its body must call ``callee`` with these keywords, after having set ``self.<after>``."""
    TEXT = "text"
    """Its body must contain each of ``names``, as Python's own formatting writes it."""


@dataclass(frozen=True)
class Hook:
    """One upstream name.

    Attributes:
        target: ``package.module:Name.attribute``.
        kind: how to compare.
        names: parameters, keywords, keys or texts, by kind; ``**`` stands for any keyword.
        why: what it is for, or what breaks without it, as half a sentence.
        used_by: our module.
        callee: for SOURCE, the call as written there.
        after: for SOURCE, attributes of self that must be set by then.
        or_else: a name that may exist instead, in versions that do the same in another way.
        optional: whether our module copes with its absence; then only its form is compared.
        every_process: False for what a process has proved by getting as far as registering.
    """

    target: str
    kind: Kind
    names: tuple[str, ...]
    why: str
    used_by: str
    callee: str = ""
    after: tuple[str, ...] = ()
    or_else: str = ""
    optional: bool = False
    every_process: bool = True


def check(hook: Hook, found: Definition) -> str | None:
    """How the definition differs from the row, as half a sentence; None if it fits."""
    return _CHECKS[hook.kind](hook, found)


def _check_override(hook: Hook, found: Definition) -> str | None:
    parameters = _parameters(hook, found)
    if parameters is None:
        return "is not a function"
    if parameters.names != hook.names:
        return f"takes ({', '.join(parameters.names)}), expected ({', '.join(hook.names)})"
    return None


def _check_call(hook: Hook, found: Definition) -> str | None:
    parameters = _parameters(hook, found)
    if parameters is None:
        return "is not a function"
    unknown = [n for n in hook.names if n not in parameters.names]
    if unknown and "**" not in parameters.names:
        return f"does not take {', '.join(unknown)} but ({', '.join(parameters.names)})"
    missing = [n for n in parameters.required if n not in hook.names]
    if missing:
        return f"now also requires {', '.join(missing)}"
    return None


def _check_attribute(hook: Hook, found: Definition) -> str | None:
    if not hook.names:
        return None
    if isinstance(found.node, ast.ClassDef):
        members = {
            target.id
            for node in found.node.body
            if isinstance(node, ast.Assign | ast.AnnAssign)
            for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
            if isinstance(target, ast.Name)
        }
        missing = [n for n in hook.names if n not in members]
        return f"has no {', '.join(missing)}" if missing else None
    value = getattr(found.node, "value", None)
    if not isinstance(value, ast.Dict):
        return "is not a dict literal any more"
    keys = {key.value for key in value.keys if isinstance(key, ast.Constant)}
    missing = [n for n in hook.names if n not in keys]
    return f"has no key {', '.join(missing)}" if missing else None


def _check_source(hook: Hook, found: Definition) -> str | None:
    calls = find_calls(found.node, hook.callee)
    if not calls:
        return f"does not call {hook.callee}() any more"
    for call in calls:
        passed = {keyword.arg for keyword in call.keywords}
        missing = [n for n in hook.names if n not in passed]
        if missing:
            return f"calls {hook.callee}() without the keywords {', '.join(missing)}"
    first = min(call.lineno for call in calls)
    before = {
        name
        for node in ast.walk(found.node)
        if getattr(node, "lineno", first) < first
        for name in assigned_attributes(node)
    }
    late = [n for n in hook.after if n not in before]
    if late:
        return f"does not set self.{', self.'.join(late)} before it calls {hook.callee}()"
    return None


def _check_text(hook: Hook, found: Definition) -> str | None:
    text = ast.unparse(found.node)
    missing = [fragment for fragment in hook.names if fragment not in text]
    return f"no longer contains {', '.join(map(repr, missing))}" if missing else None


_CHECKS: dict[Kind, Callable[[Hook, Definition], str | None]] = {
    Kind.OVERRIDE: _check_override,
    Kind.CALL: _check_call,
    Kind.ATTRIBUTE: _check_attribute,
    Kind.SOURCE: _check_source,
    Kind.TEXT: _check_text,
}


def _parameters(hook: Hook, found: Definition) -> Parameters | None:
    is_method = "." in hook.target.partition(":")[2]
    if isinstance(found.node, Function):
        return Parameters.of(found.node, is_method=is_method)
    if isinstance(found.node, ast.ClassDef):
        return _constructor(found.node)
    return None


def _constructor(node: ast.ClassDef) -> Parameters | None:
    for member in node.body:
        if isinstance(member, Function) and member.name == "__init__":
            return Parameters.of(member, is_method=True)
    # A dataclass or NamedTuple: its annotated fields, in order.
    fields = [
        (member.target.id, member.value)
        for member in node.body
        if isinstance(member, ast.AnnAssign) and isinstance(member.target, ast.Name)
    ]
    if not fields:
        return None
    return Parameters(
        tuple(name for name, _ in fields), tuple(name for name, value in fields if value is None)
    )
