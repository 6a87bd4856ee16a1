"""Reading and writing checkpoints: tensor names, safetensors headers, streams, source formats.

Nothing in here knows SGLang or a rounding method. A checkpoint is a directory of safetensors files
with an optional index; it is described by its headers alone (:mod:`.index`), and tensors are read
one at a time (:mod:`.stream`), so no function needs more memory than the tensor it works on.
"""
