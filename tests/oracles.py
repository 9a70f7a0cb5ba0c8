"""Float64 references, written from the formulas alone.

Nothing here calls the code under test, F.scaled_dot_product_attention or a norm of torch. A mask
rule is a predicate of a row and a column, as a paper would state it.
"""

import math

import torch


def predicate(queries, keys, rule):
    """bool [queries, keys] of ``rule(i, j)``."""
    rows = [[bool(rule(i, j)) for j in range(keys)] for i in range(queries)]
    return torch.tensor(rows, dtype=torch.bool).reshape(queries, keys)


def top_left(queries, keys):
    return predicate(queries, keys, lambda i, j: j <= i)


def bottom_right(queries, keys):
    return predicate(queries, keys, lambda i, j: j <= i + keys - queries)


def window(queries, keys, left, right):
    def rule(i, j):
        middle = i + keys - queries
        return (left < 0 or j >= middle - left) and (right < 0 or j <= middle + right)

    return predicate(queries, keys, rule)


def attention(query, key, value, keep=None, bias=None, scale=None, softcap=0.0):
    """[B, N, Sq, D] attention in float64; rows with nothing but -inf are 0."""
    query, key, value = query.double(), key.double(), value.double()
    if query.shape[1] != key.shape[1]:
        groups = query.shape[1] // key.shape[1]
        order = [head // groups for head in range(query.shape[1])]
        key, value = key[:, order], value[:, order]
    scale = 1.0 / math.sqrt(query.shape[-1]) if scale is None else scale
    scores = torch.einsum("bnid,bnjd->bnij", query, key) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias.double()
    if keep is not None:
        scores = torch.where(keep, scores, -math.inf)
    if scores.shape[-1] == 0:
        return torch.zeros(*query.shape[:3], value.shape[-1], dtype=torch.float64)
    top = scores.max(-1, keepdim=True).values
    nothing = top == -math.inf
    weights = torch.exp(scores - torch.where(nothing, 0.0, top))
    weights = torch.where(nothing, 0.0, weights / weights.sum(-1, keepdim=True))
    return torch.einsum("bnij,bnjd->bnid", weights, value)


def attention_varlen(q, k, v, lengths_q, lengths_k, keep_of, scale=None, softcap=0.0, slopes=None):
    """Packed attention, a sequence at a time; ``keep_of(Sq, Sk)`` is each sequence's keep mask."""
    parts, at_q, at_k = [], 0, 0
    for row, (n, m) in enumerate(zip(lengths_q, lengths_k, strict=True)):
        one = [
            t[start : start + size].transpose(0, 1)[None]
            for t, start, size in ((q, at_q, n), (k, at_k, m), (v, at_k, m))
        ]
        bias = None
        if slopes is not None:
            own = (slopes if slopes.dim() == 1 else slopes[row]).double()
            distance = [[abs(i + m - n - j) for j in range(m)] for i in range(n)]
            matrix = torch.tensor(distance, dtype=torch.float64).reshape(n, m)
            bias = -own[:, None, None] * matrix
        out = attention(*one, keep=keep_of(n, m), bias=bias, scale=scale, softcap=softcap)
        parts.append(out[0].transpose(0, 1))
        at_q, at_k = at_q + n, at_k + m
    return torch.cat(parts)


def rope(x, cos, sin, interleaved):
    """Element by element: every element takes its partner, the first of a pair with a minus."""
    x, cos, sin = x.double(), cos.double(), sin.double()
    dim = x.shape[-1]
    if interleaved:
        partner = [d + 1 if d % 2 == 0 else d - 1 for d in range(dim)]
        sign = [-1.0 if d % 2 == 0 else 1.0 for d in range(dim)]
    else:
        partner = [(d + dim // 2) % dim for d in range(dim)]
        sign = [-1.0 if d < dim // 2 else 1.0 for d in range(dim)]
    return x * cos + x[..., partner] * torch.tensor(sign, dtype=torch.float64) * sin


def rms_norm(x, weight, eps):
    x = x.double()
    out = x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps)
    return out if weight is None else out * weight.double()


def layer_norm(x, weight, bias, eps, dims=1):
    x = x.double()
    axes = tuple(range(-dims, 0))
    centred = x - x.mean(axes, keepdim=True)
    out = centred / torch.sqrt((centred * centred).mean(axes, keepdim=True) + eps)
    if weight is not None:
        out = out * weight.double()
    return out if bias is None else out + bias.double()


def error(result, oracle):
    """Largest absolute difference; infinite where one is NaN and the other not."""
    assert result.shape == oracle.shape, (result.shape, oracle.shape)
    if oracle.numel() == 0:
        return 0.0
    difference = (result.double() - oracle).abs()
    return torch.nan_to_num(difference, nan=math.inf).max().item()


def slack(mask):
    """What adding a large finite bias to a score in float32 rounds away, at most.

    From some size on it rounds the whole score away, in float64 too, and there is no difference.
    """
    if mask is None or mask.dtype is torch.bool:
        return 0.0
    largest = mask[mask.isfinite()].abs().max().item() if mask.isfinite().any() else 0.0
    return 4 * torch.finfo(torch.float32).eps * largest if largest < 1e6 else 0.0


def assert_as_accurate(ours, theirs, oracle, extra=0.0):
    """Our error is at most 1.1 times theirs, give or take a few float32 roundings."""
    largest = oracle.abs().max().item() if oracle.numel() else 0.0
    tiny = 4 * torch.finfo(torch.float32).eps * max(1.0, largest)
    if ours.dtype is torch.float64:
        tiny *= 1e-6
    mine, other = error(ours, oracle), error(theirs, oracle)
    assert mine <= 1.1 * other + tiny + extra, f"error {mine:.3e}, the original's {other:.3e}"


def assert_close(result, oracle, extra=0.0):
    """Right to the rounding of the result's dtype (times a little for accumulated float32)."""
    largest = oracle.abs().max().item() if oracle.numel() else 0.0
    unit = torch.finfo(result.dtype).eps
    allowed = (1.0 if unit > 1e-5 else 32.0) * unit * max(1.0, largest) + extra
    mine = error(result, oracle)
    assert mine <= allowed, f"error {mine:.3e}, allowed {allowed:.3e}"


def alibi(slopes, batch, heads, queries, keys):
    """[B, N, Sq, Sk] float64 ALiBi bias of slopes [N] or [B, N], from the bottom right."""
    slopes = slopes.double().expand(batch, heads)
    distance = [[abs(i + keys - queries - j) for j in range(keys)] for i in range(queries)]
    matrix = torch.tensor(distance, dtype=torch.float64).reshape(queries, keys)
    return -slopes[:, :, None, None] * matrix


def log_sum_exp(query, key, keep=None, bias=None, scale=None, softcap=0.0):
    """[B, N, Sq] float64 log of the sum of the exponentials of the scores; -inf without a key."""
    query, key = query.double(), key.double()
    groups = query.shape[1] // key.shape[1]
    key = key[:, [head // groups for head in range(query.shape[1])]]
    scale = 1.0 / math.sqrt(query.shape[-1]) if scale is None else scale
    scores = torch.einsum("bnid,bnjd->bnij", query, key) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias.double()
    if keep is not None:
        scores = torch.where(keep, scores, -math.inf)
    if scores.shape[-1] == 0:
        return torch.full(scores.shape[:3], -math.inf, dtype=torch.float64)
    return torch.logsumexp(scores, -1)


def rotary_half_tables(x, cos, sin, positions, interleaved):
    """[B, S, N, D] with the first dimensions rotated, element by element of the definition.

    ``cos`` and ``sin`` are [table, R / 2]; ``positions[b][s]`` is the row of a token.
    """
    out = x.double().clone()
    half = cos.shape[1]
    for b in range(x.shape[0]):
        for s in range(x.shape[1]):
            c, n = cos[positions[b][s]].double(), sin[positions[b][s]].double()
            for d in range(half):
                one, two = (2 * d, 2 * d + 1) if interleaved else (d, d + half)
                a, e = x[b, s, :, one].double(), x[b, s, :, two].double()
                out[b, s, :, one] = a * c[d] - e * n[d]
                out[b, s, :, two] = e * c[d] + a * n[d]
    return out
