"""Rounding methods and lossless reshaping of scales. Tensors in, tensors out: no files, no names.

:mod:`.weights` drives one matrix through a method in cache-sized pieces; :mod:`.rtn`, :mod:`.mse`
and :mod:`.gptq` choose scales and codes; :mod:`.fp8` decodes and resizes block-FP8; :mod:`.groups`
resizes INT4 groups; :mod:`.metrics` measures what was lost.
"""
