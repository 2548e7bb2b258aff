"""The mean loss of `info_nce` between rows (B, D), written with torch."""

import torch
import torch.nn.functional as F
from torch import Tensor


def upcast(x: Tensor) -> Tensor:
    """`x` in float32 if it has 16-bit elements on a CPU, because most processors multiply those slowly."""
    return x.float() if x.element_size() == 2 and x.device.type == "cpu" else x


def labels(rows: Tensor) -> Tensor:
    """The class of each row, which is its own index."""
    return torch.arange(len(rows), device=rows.device)


def dense(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """normalize, matmul, cross_entropy; stores the B x K logits."""
    queries, keys = F.normalize(student, dim=1), F.normalize(teacher, dim=1)
    return F.cross_entropy(queries @ keys.t() / temperature, labels(queries))


def dense_symmetric(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """The mean of both directions over one matrix, as CLIP does."""
    logits = F.normalize(student, dim=1) @ F.normalize(teacher, dim=1).t() / temperature
    positives = labels(logits)
    return (F.cross_entropy(logits, positives) + F.cross_entropy(logits.t(), positives)) / 2


def dense_nt_xent(view: Tensor, other: Tensor, temperature: float) -> Tensor:
    """SimCLR's loss of two views, each row against all other rows of both; stores the 2B x 2B logits."""
    views = F.normalize(torch.cat((view, other)), dim=1)
    logits = (views @ views.t() / temperature).fill_diagonal_(-torch.inf)
    return F.cross_entropy(logits, labels(views).roll(len(view)))


def linear_cross_entropy(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """torch's chunked cross entropy of a linear layer (torch 2.13 or newer), with the teacher as its weight."""
    if not hasattr(F, "linear_cross_entropy"):
        raise ImportError(f"linear_cross_entropy needs torch 2.13 or newer, not {torch.__version__}")
    queries, keys = F.normalize(student, dim=1), F.normalize(teacher, dim=1)
    options = torch.nn.LinearCrossEntropyOptions()
    return F.linear_cross_entropy(queries / temperature, keys, labels(queries), options=options)


def attention(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """torch's flash attention over the teacher's rows. Its output minus the positive is the gradient of a student with
    a frozen teacher."""
    if student.device.type == "cuda" and student.shape[1] > 256:
        raise NotImplementedError(f"flash attention on a GPU supports up to 256 values per row, not {student.shape[1]}")
    return _Attention.apply(F.normalize(student, dim=1), F.normalize(teacher, dim=1), temperature)


class _Attention(torch.autograd.Function):
    """Loss and gradient in one pass: dq = (softmax(A) k - k_i) / (B tau), and the loss from the log-sum-exp."""

    @staticmethod
    def forward(ctx, queries: Tensor, keys: Tensor, temperature: float) -> Tensor:
        on_gpu = queries.device.type == "cuda"
        name = "_scaled_dot_product_flash_attention" + ("" if on_gpu else "_for_cpu")
        heads = queries[None, None], keys[None, None], keys[None, None]
        mixed, normaliser, *_ = getattr(torch.ops.aten, name)(*heads, 0.0, False, scale=1 / temperature)
        ctx.save_for_backward((mixed[0, 0] - keys) / (len(queries) * temperature))
        return (normaliser[0, 0] - (queries * keys).sum(1) / temperature).mean()

    @staticmethod
    def backward(ctx, upstream: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * upstream, None, None


def row_blocks(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """A Python loop over blocks of 256 rows with library GEMMs, for a frozen teacher."""
    queries, keys = F.normalize(student, dim=1), F.normalize(teacher, dim=1)
    return _RowBlocks.apply(queries, keys, temperature, torch.is_grad_enabled() and student.requires_grad)


class _RowBlocks(torch.autograd.Function):
    """Loss and gradient in one pass: dq = (softmax(A) k - k_i) / (B tau)."""

    @staticmethod
    def forward(ctx, queries: Tensor, keys: Tensor, temperature: float, learns: bool) -> Tensor:
        loss = queries.new_zeros((), dtype=torch.promote_types(queries.dtype, torch.float32))
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
