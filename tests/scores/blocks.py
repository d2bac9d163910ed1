"""What several score tests need: the same value on the whole problem and on cells, and gradient checks."""

import torch

from foveate.scores.pairs import Pairs

B, H = 2, 3


def dense_and_cells(part, n_q, n_k, *, per_head, base=None, dtype=torch.float64):
    """Apply `part` dense and on random cells; return (dense looked up at the cells, cells)."""
    base = torch.randn(B, H, n_q, n_k, dtype=dtype) if base is None else base
    lead = (B, H) if per_head else (1, 1)
    q_ids = torch.randint(0, n_q, (*lead, 2, 3))
    k_ids = torch.randint(0, n_k, (*lead, 2, 4))
    at = Pairs(q_ids, k_ids, n_q=n_q, n_k=n_k)
    whole = part.apply(base, Pairs.full(n_q, n_k)).expand(B, H, n_q, n_k)
    block = part.apply(pick(base, q_ids, k_ids), at)
    return pick(whole, q_ids, k_ids), block.expand(B, H, 2, 3, 4)


def pick(full, q_ids, k_ids):
    """Brute force: read `full (B, H, N_q, N_k)` at every pair of every cell, one by one."""
    cells, tq, tk = q_ids.shape[2], q_ids.shape[3], k_ids.shape[3]
    out = full.new_zeros(B, H, cells, tq, tk)
    for b in range(B):
        for h in range(H):
            qb, kb = q_ids[b % len(q_ids), h % q_ids.shape[1]], k_ids[b % len(k_ids), h % k_ids.shape[1]]
            for c in range(cells):
                out[b, h, c] = full[b, h][qb[c]][:, kb[c]]
    return out


def gradients(build, *tensors, n_q=3, n_k=4, heads=2):
    """Run gradcheck and gradgradcheck of attend(score or rule or after built from `tensors`) in float64."""
    from foveate.kernels.attend import attend

    q = torch.randn(1, heads, n_q, 2, dtype=torch.float64, requires_grad=True)
    k = torch.randn(1, heads, n_k, 2, dtype=torch.float64, requires_grad=True)
    v = torch.randn(1, heads, n_k, 2, dtype=torch.float64, requires_grad=True)
    for t in tensors:
        t.requires_grad_(True)

    def f(q, k, v, *rest):
        return attend(q, k, v, backend="reference", **build(*rest))

    assert torch.autograd.gradcheck(f, (q, k, v, *tensors))
    return torch.autograd.gradgradcheck(f, (q, k, v, *tensors), atol=1e-4)
