"""Data sets, training batches and evaluation for `fit` and the command line."""

from .cifar10 import fetch_cifar10, read_cifar10
from .datasets import ImageArrays, fingerprint, open_dataset

__all__ = ["ImageArrays", "fetch_cifar10", "fingerprint", "open_dataset", "read_cifar10"]
