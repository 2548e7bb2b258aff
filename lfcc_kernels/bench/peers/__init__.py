"""Peers: small adapters around other implementations, as their users write them, with the results of lfcc's ops.

They compute in the dtype of their inputs; if users convert those first, the case does (`WithConversion`). A peer that
cannot run raises ImportError or NotImplementedError with the reason.
"""

from lfcc_kernels.bench.peers.contrast import (
    contrast_attention,
    contrast_dense,
    contrast_dense_nt_xent,
    contrast_dense_symmetric,
    contrast_linear_cross_entropy,
    contrast_row_blocks,
    upcast,
)
from lfcc_kernels.bench.peers.pooling import (
    as_map,
    filter_each_scale,
    pool_cascade,
    pool_each_scale,
    pool_one_gemm,
    pool_one_gemm_channels_last,
    stacked_averages,
    stacked_filters,
)
from lfcc_kernels.bench.peers.whole_loss import lfcc_filter_each_scale, lfcc_pool_each_scale, lfcc_project_maps

__all__ = [
    "as_map",
    "contrast_attention",
    "contrast_dense",
    "contrast_dense_nt_xent",
    "contrast_dense_symmetric",
    "contrast_linear_cross_entropy",
    "contrast_row_blocks",
    "filter_each_scale",
    "lfcc_filter_each_scale",
    "lfcc_pool_each_scale",
    "lfcc_project_maps",
    "pool_cascade",
    "pool_each_scale",
    "pool_one_gemm",
    "pool_one_gemm_channels_last",
    "stacked_averages",
    "stacked_filters",
    "upcast",
]
