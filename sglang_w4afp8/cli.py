"""The ``sglang-w4afp8`` command. Imports nothing but the standard library until a command runs.

Exit codes: 0 done, 1 a problem was found, 2 wrong use.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import sys
from collections.abc import Sequence

from sglang_w4afp8 import __version__
from sglang_w4afp8.errors import ConfigError, W4AFp8Error

_KNOWN: dict[str, tuple[str, str]] = {
    "doctor": ("doctor", "check this machine: SGLang, plugin, GPU, kernels"),
    "plan": ("plan", "what each rank would hold of a model at some TP degree"),
    "demo": ("demo", "convert two small models, serve them, compare; with or without a GPU"),
    "inspect": ("inspect", "what a checkpoint holds: formats, classes, sizes, problems"),
    "convert": ("convert", "make a W4AFP8 checkpoint from an FP8, BF16 or INT4 one"),
    "resize-blocks": ("resize_blocks", "cut FP8 blocks or INT4 groups smaller, exactly"),
    "verify": ("verify", "compare a converted checkpoint with its source"),
    "evaluate": ("evaluate", "perplexity and KL of a served model against its source"),
    "bench": ("bench", "time the expert kernels on this machine"),
    "launch": ("launch", "one server over one or many machines: its commands, or run it"),
}
# Finding a module's file imports nothing; a command whose module is not shipped is not offered.
COMMANDS = {
    name: entry
    for name, entry in _KNOWN.items()
    if importlib.util.find_spec(f"sglang_w4afp8.tools.{entry[0]}")
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sglang-w4afp8",
        description="Checkpoints and diagnostics for W4AFP8 (INT4 experts, FP8 activations).",
    )
    parser.add_argument("--version", action="version", version=f"sglang-w4afp8 {__version__}")
    listed = "\n".join(f"  {name:<14} {text}" for name, (_, text) in COMMANDS.items())
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = f"commands:\n{listed}\n\nsglang-w4afp8 COMMAND --help  shows its options."
    parser.add_argument("command", choices=sorted(COMMANDS), metavar="COMMAND")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: arguments without the program name; None takes ``sys.argv``.

    Returns:
        The exit code. argparse itself leaves with 2 on wrong use, 0 on ``--help``.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    # Only the first word is parsed here; the command's own options are declared by its module,
    # which is imported for this command alone.
    head = _parser().parse_args(words[:1])
    module_name, text = COMMANDS[head.command]
    try:
        module = importlib.import_module(f"sglang_w4afp8.tools.{module_name}")
    except ModuleNotFoundError as error:
        print(
            f"sglang-w4afp8 {head.command}: module {error.name} is not installed\n"
            "  Ways out:\n    (1) pip install torch safetensors numpy",
            file=sys.stderr,
        )
        return 2
    parser = argparse.ArgumentParser(prog=f"sglang-w4afp8 {head.command}", description=text)
    module.add_arguments(parser)
    own, passed_on = words[1:], []
    if getattr(module, "PASSES_ON", False) and "--" in own:
        cut = own.index("--")
        own, passed_on = own[:cut], own[cut + 1 :]
    args = parser.parse_args(own)
    args.passed_on = passed_on
    try:
        return int(module.run(args))
    except W4AFp8Error as error:
        if getattr(args, "json", False):
            told = {"found": error.found, "why": error.why, "ways": list(error.ways)}
            print(json.dumps({"error": told}, indent=2, ensure_ascii=False))
        print(f"sglang-w4afp8 {head.command}: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    except OSError as error:
        print(f"sglang-w4afp8 {head.command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"\nsglang-w4afp8 {head.command}: interrupted", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
