"""The Hopper (sm_90a) kernels for decode: weight order, build, launch and the backend.

``layout`` turns checkpoint order into the order that ``csrc/*.cu`` streams; ``plan`` chooses
kernels and sizes their launches, without a GPU; ``build`` compiles and caches; ``driver`` and
``launch`` start them; ``backend`` is what the registry sees. ``docs/kernels.md`` draws the layout
and the pipeline.
"""
