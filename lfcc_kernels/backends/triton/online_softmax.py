"""The online softmax of the info_nce kernels, as helpers inlined by `info_nce_fused.py` and `info_nce_chunks.py`.

Names are those of FlashAttention. Per row, or per column of a symmetric loss:

    m_i     running maximum of the logits
    l_i     running sum of exp(logit - m_i)
    p       exp(logit - m_i) of the current tile
    alpha   factor that rescales what was accumulated under the previous maximum
    dtau    running sum of p * logit, from which the gradient of the temperature follows

The positive of a row is left out of m_i, l_i and dtau and added at the end by `add_positive`: its gradient weight is
minus the sum of the others', which a softmax that includes it would round.
"""

import triton
import triton.language as tl


@triton.jit
def update(logits, mask, m_i, l_i, AXIS: tl.constexpr):
    """m_i and l_i after a tile of logits, its p, and alpha; sums run along AXIS over the logits in `mask`."""
    m_new = tl.maximum(m_i, tl.max(tl.where(mask, logits, -float("inf")), AXIS))
    m_safe = tl.where(m_new == -float("inf"), 0.0, m_new)  # without a logit so far, -inf - -inf would be NaN
    p = tl.where(mask, tl.exp(logits - tl.expand_dims(m_safe, AXIS)), 0.0)
    alpha = tl.exp(m_i - m_safe)
    return m_new, l_i * alpha + tl.sum(p, AXIS), p, alpha


@triton.jit
def add_positive(m_i, l_i, positive_logit):
    """Loss, log-sum-exp and softmax denominator of rows; m_i is at least `positive_logit` and l_i relative to it."""
    denominator = l_i + tl.exp(positive_logit - m_i)
    return (m_i - positive_logit) + tl.log(denominator), m_i + tl.log(denominator), denominator


@triton.jit
def temperature_grad(l_i, dtau, positive_logit, denominator, inverse_temperature):
    """Derivative of the loss of rows with respect to the temperature."""
    return -((dtau - l_i * positive_logit) / denominator) * inverse_temperature


@triton.jit
def logits_grad(logits, label, mask, lse, grad):
    """Gradient of a loss with respect to a tile of logits, grad * (softmax - label); `lse` and `grad` are broadcast."""
    p = tl.where(mask, tl.exp(logits - lse), 0.0)
    return grad * (p - label)
