"""Kernels behind one interface: ``base`` (the contract), ``registry`` (who may run what), backends."""
