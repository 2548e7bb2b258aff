"""The ops of the namespace `lfcc::`: schema, fake, autograd and choice of backend, one file an op."""
