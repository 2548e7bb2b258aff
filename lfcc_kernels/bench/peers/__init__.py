"""Peers: small adapters around other implementations, as their users write them, with the results of lfcc's ops.

They compute in the dtype of their inputs; if users convert those first, the case does (`WithConversion`). A peer that
cannot run raises ImportError or NotImplementedError with the reason.
"""
