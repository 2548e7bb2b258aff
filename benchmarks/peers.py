"""The others: small adapters, each the way its users write it, all with the results of our ops.

Pooling peers return (B, cells, C) in any strides; contrastive peers return the mean loss. On a CPU inputs of two
bytes are raised to float32 before a GEMM, as users do there: a bfloat16 product is a hundred times slower. On a
GPU they stay as they are, with all that is made of them. libraries.py has the packages that one can install.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def raised(x: Tensor) -> Tensor:
    """`x`, as float32 where its elements have two bytes and are on a CPU."""
    return x.float() if x.element_size() == 2 and x.device.type == "cpu" else x


def labels(rows: Tensor) -> Tensor:
    """Each row's positive is its own partner."""
    return torch.arange(len(rows), device=rows.device)


def as_map(tokens: Tensor, grid: tuple[int, int], prefix_tokens: int) -> Tensor:
    """Tokens (B, N, C) seen as a map (B, C, H, W)."""
    return tokens[:, prefix_tokens:].transpose(1, 2).unflatten(2, grid)


def pool_each_scale(x: Tensor, scales: Sequence[int]) -> Tensor:
    """adaptive_avg_pool2d once a scale."""
    return torch.cat([F.adaptive_avg_pool2d(x, s).flatten(2) for s in scales], 2).transpose(1, 2)


def filter_each_scale(x: Tensor, row_filters: Tensor, col_filters: Tensor, scales: Sequence[int]) -> Tensor:
    """R_s F K_s^T once a scale."""
    x = raised(x)
    filters = zip(row_filters.to(x.dtype).split(scales), col_filters.to(x.dtype).split(scales), strict=True)
    return torch.cat([(rows @ x @ cols.t()).flatten(2) for rows, cols in filters], 2).transpose(1, 2)


def stacked_averages(grid: tuple[int, int], scales: Sequence[int]) -> Tensor:
    """The windows of `adaptive_avg_pool2d` as one matrix (cells, H * W)."""
    rows, cols = (
        torch.cat([F.adaptive_avg_pool1d(torch.eye(side)[None], scale)[0].t() for scale in scales]) for side in grid
    )
    return stacked_filters(rows, cols, scales)


def stacked_filters(row_filters: Tensor, col_filters: Tensor, scales: Sequence[int]) -> Tensor:
    """The Kronecker products R_s x K_s of all scales as one matrix (cells, H * W)."""
    filters = zip(row_filters.split(scales), col_filters.split(scales), strict=True)
    return torch.cat([torch.kron(rows, cols) for rows, cols in filters])


def pool_one_gemm(x: Tensor, matrix: Tensor) -> Tensor:
    """All scales of a contiguous map as one GEMM against the stacked filters (cells, H * W)."""
    cells = raised(x).flatten(2)
    return (cells @ matrix.to(cells.dtype).t()).transpose(1, 2).to(x.dtype)


def pool_one_gemm_channels_last(x: Tensor, matrix: Tensor) -> Tensor:
    """The same for a map whose channels are innermost, with no copy of it."""
    return matrix @ x.permute(0, 2, 3, 1).flatten(1, 2)


def contrast_dense(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """normalize, matmul, cross_entropy: the B x K matrix is held."""
    queries, keys = F.normalize(raised(student), dim=1), F.normalize(raised(teacher), dim=1)
    return F.cross_entropy(queries @ keys.t() / temperature, labels(queries))


def contrast_dense_symmetric(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """The mean of both directions over one matrix, as CLIP does."""
    logits = F.normalize(student, dim=1) @ F.normalize(teacher, dim=1).t() / temperature
    positives = labels(logits)
    return (F.cross_entropy(logits, positives) + F.cross_entropy(logits.t(), positives)) / 2


def contrast_linear_cross_entropy(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """torch's chunked cross entropy behind a linear layer (2.13 and newer), whose weight the teacher is."""
    if not hasattr(F, "linear_cross_entropy"):
        raise ImportError(f"torch {torch.__version__} has no linear_cross_entropy, 2.13 was the first")
    queries, keys = F.normalize(raised(student), dim=1), F.normalize(raised(teacher), dim=1)
    options = torch.nn.LinearCrossEntropyOptions()
    return F.linear_cross_entropy(queries / temperature, keys, labels(queries), options=options)


def contrast_row_blocks(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """A plain Python loop over blocks of 256 rows with library GEMMs; the teacher is frozen."""
    queries, keys = F.normalize(raised(student), dim=1), F.normalize(raised(teacher), dim=1)
    return _RowBlocks.apply(queries, keys, temperature, torch.is_grad_enabled() and student.requires_grad)


class _RowBlocks(torch.autograd.Function):
    """Loss and gradient in one pass: dq = (softmax(A) k - k_i) / (B tau)."""

    @staticmethod
    def forward(ctx, queries: Tensor, keys: Tensor, temperature: float, learns: bool) -> Tensor:
        loss = queries.new_zeros(())
        gradient = torch.empty_like(queries) if learns else None
        for start in range(0, len(queries), 256):
            block = slice(start, start + 256)
            logits = (queries[block] @ keys.t()).div_(temperature)
            normaliser = logits.logsumexp(1)
            loss += (normaliser - logits.diagonal(start)).sum()
            if gradient is not None:
                torch.mm(logits.sub_(normaliser[:, None]).exp_(), keys, out=gradient[block])
                gradient[block].sub_(keys[block]).div_(len(queries) * temperature)
        ctx.save_for_backward(gradient)
        return loss / len(queries)

    @staticmethod
    def backward(ctx, upstream: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * upstream, None, None, None


def _project(x: Tensor, weight: Tensor) -> Tensor:
    """A map (B, C_s, H, W) through a linear map (C_t, C_s) of its channels, as a 1 x 1 convolution."""
    return F.conv2d(x, weight[:, :, None, None].to(x.dtype))


def _contrast_each_scale(
    students: Sequence[Sequence[Tensor]], teacher_maps: Sequence[Tensor], scales: Sequence[int], temperature: float
) -> Tensor:
    """The mean loss of the students' grids, one a stage and scale, against the pooled maps of the teacher."""
    losses = [
        contrast_dense(grid.flatten(1), F.adaptive_avg_pool2d(teacher, scale).flatten(1), temperature)
        for grids, teacher in zip(students, teacher_maps, strict=True)
        for grid, scale in zip(grids, scales, strict=True)
    ]
    return torch.stack(losses).mean()


def lfcc_pool_each_scale(
    student_maps: Sequence[Tensor],
    teacher_maps: Sequence[Tensor],
    projections: Sequence[Tensor],
    scales: Sequence[int],
    temperature: float,
) -> Tensor:
    """The whole loss: pool once a scale, project the few cells with a 1 x 1 convolution, contrast densely."""
    students = [
        [_project(F.adaptive_avg_pool2d(student, scale), weight) for scale in scales]
        for student, weight in zip(student_maps, projections, strict=True)
    ]
    return _contrast_each_scale(students, teacher_maps, scales, temperature)


def lfcc_project_maps(
    student_maps: Sequence[Tensor],
    teacher_maps: Sequence[Tensor],
    projections: Sequence[Tensor],
    scales: Sequence[int],
    temperature: float,
) -> Tensor:
    """The whole loss as distillation code is mostly written: a 1 x 1 convolution aligns the map, then it is pooled."""
    aligned = [_project(student, weight) for student, weight in zip(student_maps, projections, strict=True)]
    students = [[F.adaptive_avg_pool2d(student, scale) for scale in scales] for student in aligned]
    return _contrast_each_scale(students, teacher_maps, scales, temperature)


def lfcc_filter_each_scale(
    student_maps: Sequence[Tensor],
    teacher_maps: Sequence[Tensor],
    projections: Sequence[Tensor],
    filters: Sequence[tuple[Tensor, Tensor]],
    scales: Sequence[int],
    temperature: float,
) -> Tensor:
    """The whole loss with trainable student filters, (row_filters, col_filters) a stage."""
    students = [
        [
            _project(row.to(student.dtype) @ student @ col.t().to(student.dtype), weight)
            for row, col in zip(rows.split(scales), cols.split(scales), strict=True)
        ]
        for student, weight, (rows, cols) in zip(student_maps, projections, filters, strict=True)
    ]
    return _contrast_each_scale(students, teacher_maps, scales, temperature)
