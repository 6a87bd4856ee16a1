"""Kernels behind one interface: ``base`` is the contract, ``registry`` chooses, others run."""
