"""Other projects' MoE kernels, called as SGLang calls them, for ``bench moe`` to time beside ours.

One class per peer, all with the members of ``tools.bench_peers.Provider``. They serve a measurement
only: nothing here runs in a server, and a name that SGLang moves costs one row of the bench, whose
reason says which. Signatures are those of SGLang 0.5.16.
"""
