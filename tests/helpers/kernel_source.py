"""What tests read out of the CUDA sources: layouts of structs, constants, index expressions.

Emulations of index arithmetic take the expressions from the source itself, so that a change of the
kernel shows in the test.
"""

from __future__ import annotations

import re
from functools import cache
from types import CodeType, SimpleNamespace
from typing import Any

import torch

from sglang_w4afp8.kernels.hopper.build import CSRC

SIZES = {"int": 4, "unsigned": 4, "u32": 4, "float": 4, "u64": 8}


def _read(source: str) -> str:
    return (CSRC / source).read_text()


def c_files(source: str) -> list[str]:
    """A file and the files of ours that it includes, each once."""
    found = [source]
    for name in found:  # grows
        found += [n for n in re.findall(r'^#include "(.*)"', _read(name), re.M) if n not in found]
    return found


def c_offsets(source: str, struct: str) -> tuple[list[tuple[str, int]], int]:
    """Names and offsets of a struct of ours as C lays them out, with all its ``#if`` parts."""
    text = (CSRC / source).read_text()
    body = re.search(rf"struct {struct} {{\n(.*?)\n}};", text, re.S)
    assert body is not None
    at, align, fields = 0, 1, []
    for line in body[1].splitlines():
        line = line.split("//")[0].strip()
        if not line or line.startswith("#"):
            continue
        kind, names = re.fullmatch(r"((?:const )?\w+\*?) (.*);", line).groups()  # type: ignore
        if kind.endswith("*"):
            size = alignment = 8
        elif kind in SIZES:
            size = alignment = SIZES[kind]
        else:  # a struct with pointers in it
            (home,) = (name for name in c_files(source) if f"struct {kind} {{" in _read(name))
            size, alignment = c_offsets(home, kind)[1], 8
        for name in names.split(", "):
            at = -(-at // alignment) * alignment
            fields.append((name, at))
            at += size
        align = max(align, alignment)
    return fields, -(-at // align) * align


def _split(text: str) -> list[str]:
    """At the commas that are in no brackets."""
    parts, depth = [""], 0
    for char in text:
        depth += (char in "([{") - (char in ")]}")
        if char == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += char
    return parts


def _python(text: str) -> str:
    """A C expression of integers in Python."""
    out, i = "", 0
    while i < len(text):
        if text[i] != "(":
            out += text[i]
            i += 1
            continue
        depth, end = 1, i
        while depth:
            end += 1
            depth += (text[end] == "(") - (text[end] == ")")
        out += "(" + ", ".join(_python(part) for part in _split(text[i + 1 : end])) + ")"
        i = end + 1
    choice = re.fullmatch(r"([^?]*)\?([^?:]*):(.*)", out)
    if choice:
        return f"(({choice[2]}) if ({choice[1]}) else ({_python(choice[3])}))"
    return out


@cache
def _compiled(text: str) -> CodeType:
    text = " ".join(re.sub(r"//.*", "", text).split())
    text = re.sub(r"static_cast<\w+>", "", text)
    text = re.sub(r"\b(0x[0-9a-f]+?|\d+)(?:ull|u)\b", r"\1", text)
    text = re.sub(r"\bfrom\b", "from_", text)  # a word of Python's
    text = re.sub(r"\b(\w+)::", r"\1.", text)
    text = text.replace("&&", " and ").replace("||", " or ")
    text = re.sub(r"!(\w+)", r"(not \1)", text)
    return compile(_python(f"({text})").replace("/", "//"), text, "eval")


def c_value(text: str, scope: dict[str, Any]) -> Any:
    """The value of an expression; ``scope`` has the names in it, as integers or arrays of them."""
    names = {"min": min, "max": max, "sizeof": int, "from_": scope.get("from")}
    return eval(_compiled(text), names, scope)


@cache
def c_sizes(source: str) -> dict[str, int]:
    """Bytes of the structs whose ``sizeof`` is in constants of a file and those it includes."""
    structs: dict[str, int] = {}
    text = "".join(re.findall(r"^constexpr int .*?;", c_text(source), re.M | re.S))
    for name in sorted({*re.findall(r"sizeof\((\w+)\)", text)}):
        for home in (file for file in c_files(source) if f"struct {name} {{" in _read(file)):
            structs[name] = c_offsets(home, name)[1]
    return structs


@cache
def c_text(source: str) -> str:
    """A file after the files of ours that it includes."""
    text = (CSRC / source).read_text()
    before = [c_text(name) for name in re.findall(r'^#include "(.*)"', text, re.M)]
    return "\n".join([*before, text])


def c_shape(**sizes: int) -> SimpleNamespace:
    """``Shape`` of tile_math.cuh; ``sizes`` are its template arguments, ``kK`` for ``kK_``."""
    scope: dict[str, Any] = {f"{name}_": value for name, value in sizes.items()}
    names, text = [], (CSRC / "tile_math.cuh").read_text()
    for line in re.findall(r"static constexpr (?:int|bool) (.*?);", text):
        for name, text in (part.split(" = ") for part in _split(line)):
            names.append(name.strip())
            scope[names[-1]] = c_value(text, scope)
    return SimpleNamespace(**{name: scope[name] for name in names})


def decode_words(words: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``decode_int4`` with −8: bytes of words, ``(…, 4)`` uint8, to the codes of both registers."""
    high = words.roll(1, -1)  # rotation by four bits to the left

    def codes(register: torch.Tensor) -> torch.Tensor:
        size = (register & 0x7).int()
        return torch.where((register & 0x80) != 0, -size - 1, size)

    return codes(words), codes((words << 4) | (high >> 4))


def c_constants(source: str, defines: dict[str, Any]) -> dict[str, Any]:
    """The ``constexpr`` integers at the outermost level of a file, and the macros.

    With the sizes of structs that the file's ``sizeof`` names.
    Without ``W4_ROW_SCALES``. A file that has a ``Shape`` finds it in ``defines`` as ``S``. Macros
    with a default in the sources need not be in ``defines``.
    """
    defaults = re.findall(r"^#ifndef (\w+)\n#define \1 (\d+)\n#endif$", c_text(source), re.M)
    scope = c_sizes(source) | {name: int(value) for name, value in defaults} | defines
    row_scales = re.compile(r"^#if W4_ROW_SCALES\n.*?^(?:#else\n(.*?)^)?#endif\n", re.M | re.S)
    text = row_scales.sub(r"\1", c_text(source))
    found = re.findall(r"^constexpr (?:int|u32|bool) (.*?);", text, re.M | re.S)
    for part in (part for line in found for part in _split(line)):
        name, text = re.split(r"\s=\s", part, maxsplit=1)
        scope[name.strip()] = c_value(text, scope)
    return scope


@cache
def c_find(source: str, within: tuple[str, ...], name: str) -> str:
    """What ``name`` is set to, first seen after the strings of ``within`` in their order.

    ``return`` stands for what is returned, ``name(`` for a call's arguments, ``name +=`` for what
    is added.
    """
    text, start = (CSRC / source).read_text(), 0
    for marker in within:
        start = text.index(marker, start)
    if name == "return":
        pattern = r"return (.*?);"
    elif name.endswith("("):
        pattern = rf"\b{re.escape(name)}(.*?)\);"
    else:
        operator = "" if name.endswith("+=") else " ="
        pattern = rf"(?<![\w.]){re.escape(name)}{operator}\s(.*?);"
    found = re.compile(pattern, re.S).search(text, start)
    assert found is not None, (source, within, name)
    # `a = 1, b = 2;` sets two names
    return found[1] if name.endswith("(") else _split(found[1])[0]


def c_locals(source: str, within: str, names: str, scope: dict[str, Any]) -> dict[str, Any]:
    """``scope`` and the names (separated by blanks) as the source sets them, one after the other.

    Args:
        source: a file of ``csrc/``.
        within: strings separated by `` > `` after which the names are looked for.
        names: what is set.
        scope: values of other names; not changed.
    """
    scope = dict(scope)
    for name in names.split():
        text = c_find(source, tuple(within.split(" > ")), name)
        scope[name] = c_value(text, scope)
    return scope
