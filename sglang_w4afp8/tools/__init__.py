"""The commands behind ``sglang-w4afp8``. Each module offers ``add_arguments(parser)`` and
``run(args) -> int`` and is imported by :mod:`sglang_w4afp8.cli` only when its command is used.
"""
