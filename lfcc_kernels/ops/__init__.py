"""The ops of the namespace `lfcc::`: fakes, autograd formulas and choice of backend, one file per op."""
