"""Keys and values kept in a cache: in rows, with an offset and a length each, or in pages.

Nothing beyond a sequence's own keys is read: a cache is often allocated without being filled, and
what lies there may be NaN.
"""

from __future__ import annotations

from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mindiesd.errors import ParametersInvalid
from mindiesd.ops import checks
from mindiesd.ops.attention import check_dimensions
from mindiesd.ops.varlen import lengths_of, numbers, starts_of
from mindiesd.patches.front_doors import attention
from mindiesd.patches.front_doors.composed import Result, Rules
from mindiesd.patches.front_doors.rotary import apply_rotary_emb
from mindiesd.patches.scope import Site


class Cache(NamedTuple):
    """The arguments that describe a cache, as :func:`flash_attn_with_kvcache` has them."""

    k_cache: Any
    v_cache: Any
    cache_seqlens: Any = None
    cache_batch_idx: Any = None
    cache_leftpad: Any = None
    block_table: Any = None


class Rotary(NamedTuple):
    """The arguments that describe a rotary embedding."""

    rotary_cos: Any = None
    rotary_sin: Any = None
    rotary_interleaved: Any = True


def attend(
    site: Site, q: Any, k: Any, v: Any, cache: Cache, rotary: Rotary, rules: Rules
) -> Result:
    """Write new keys and values into the cache, then attend to it.

    Args:
        site: where the call is counted.
        q: [B, Sq, N, D].
        k: [B, Snew, Nkv, D] or None.
        v: [B, Snew, Nkv, Dv] or None.
        cache: the cache.
        rotary: how new keys and the queries are rotated.
        rules: what is done to the scores.

    Raises:
        ParametersInvalid: an argument is wrong.
    """
    batch, capacity = _check(q, k, v, cache, rules)
    filled = _integers("cache_seqlens", cache.cache_seqlens, batch, capacity, 0, capacity)
    starts = _integers("cache_leftpad", cache.cache_leftpad, batch, 0, 0, capacity)
    if cache.block_table is None:
        rows = _integers(
            "cache_batch_idx", cache.cache_batch_idx, batch, None, 0, cache.k_cache.shape[0] - 1
        )
        pages = None
    else:
        rows, pages = [], _pages(cache, batch)
    ends = filled
    if k is not None:
        if cache.cache_seqlens is None:
            raise ParametersInvalid("cache_seqlens", "None", "given, where k and v are")
        ends = [length + k.shape[1] for length in filled]
        if max(ends) > capacity:
            raise ParametersInvalid(
                "cache_seqlens",
                f"{max(filled)} and {k.shape[1]} new keys",
                f"at most the capacity of the cache, {capacity}",
            )
        q, k = _rotated(q, k, filled, rotary, rules)
        for at in range(batch):
            for cached, new in ((cache.k_cache, k[at]), (cache.v_cache, v[at])):
                _write(cached, new, filled[at], rows[at] if pages is None else pages[at])
    elif rotary.rotary_cos is not None:
        raise ParametersInvalid("rotary_cos", "given without k and v", "None, or k and v too")
    for begin, end in zip(starts, ends, strict=True):
        if begin > end:
            raise ParametersInvalid("cache_leftpad", begin, f"at most the sequence's end, {end}")

    same = len(set(starts)) == 1 and len(set(ends)) == 1
    if pages is None and same and rows == list(range(rows[0], rows[0] + batch)):
        whole = (slice(rows[0], rows[0] + batch), slice(starts[0], ends[0]))
        return attention.dense(site, q, cache.k_cache[whole], cache.v_cache[whole], rules)
    keys, values = [], []
    for at in range(batch):
        where = rows[at] if pages is None else pages[at]
        keys.append(_read(cache.k_cache, where, starts[at], ends[at]))
        values.append(_read(cache.v_cache, where, starts[at], ends[at]))
    queries = q.shape[1]
    result = attention.packed(
        site,
        q.flatten(0, 1),
        torch.cat(keys),
        torch.cat(values),
        [queries * at for at in range(batch + 1)],
        [0, *accumulate(key.shape[0] for key in keys)],
        None,
        None,
        rules,
    )
    out = result.out.view(batch, queries, *result.out.shape[1:])
    lse = None
    if result.lse is not None:
        lse = result.lse.view(-1, batch, queries).transpose(0, 1).contiguous()
    return Result(out, lse)


def from_pages(k: Any, v: Any, block_table: Any, cu_seqlens_k: Any) -> tuple[Tensor, Tensor]:
    """The packed keys and values of sequences that lie in pages.

    Args:
        k: [pages, page, Nkv, D].
        v: [pages, page, Nkv, Dv].
        block_table: [B, blocks], the pages of each sequence.
        cu_seqlens_k: where each sequence begins, and the number of all keys.

    Raises:
        ParametersInvalid: an argument is wrong.
    """
    checks.tensor("k", k, 4)
    checks.tensor("v", v, 4)
    given = starts_of("cu_seqlens_k", cu_seqlens_k)
    starts = given if isinstance(given, list) else numbers(given)
    lengths = lengths_of("cu_seqlens_k", starts, starts[-1], None)
    pages = _pages(Cache(k, v, block_table=block_table), len(lengths))
    capacity = len(pages[0]) * k.shape[1] if pages else 0
    if max(lengths, default=0) > capacity:
        raise ParametersInvalid(
            "cu_seqlens_k", f"a sequence of {max(lengths)}", f"at most {capacity}, as block_table"
        )
    packed = []
    for cached in (k, v):
        parts = [_read(cached, row, 0, n) for row, n in zip(pages, lengths, strict=True)]
        packed.append(torch.cat(parts) if parts else cached.flatten(0, 1)[:0])
    return packed[0], packed[1]


def _check(q: Any, k: Any, v: Any, cache: Cache, rules: Rules) -> tuple[int, int]:
    """Check the tensors; the batch size and how many keys a sequence may have."""
    checks.tensor("q", q, 4)
    for name, tensor in (("k_cache", cache.k_cache), ("v_cache", cache.v_cache)):
        checks.tensor(name, tensor, 4)
        checks.same_kind(name, tensor, "q", q)
    if cache.k_cache.shape[:2] != cache.v_cache.shape[:2]:
        raise ParametersInvalid(
            "v_cache", checks.describe(cache.v_cache), "the first two dimensions of k_cache"
        )
    check_dimensions(q, cache.k_cache, cache.v_cache, ("q", "k_cache", "v_cache"), 1, 2)
    batch = q.shape[0]
    if batch == 0:
        raise ParametersInvalid("q", checks.describe(q), "a batch of at least one")
    checks.forward_only(q=q, k=k, v=v, k_cache=cache.k_cache, v_cache=cache.v_cache)
    attention.check_slopes(rules.slopes, batch, q.shape[2], "q", q)
    if (k is None) != (v is None):
        raise ParametersInvalid("k and v", "one of them", "both or neither")
    if k is not None:
        for name, new, cached in (("k", k, cache.k_cache), ("v", v, cache.v_cache)):
            checks.tensor(name, new, 4)
            checks.same_kind(name, new, "q", q)
            if new.shape != (batch, k.shape[1], *cached.shape[2:]):
                shape = [batch, k.shape[1], *cached.shape[2:]]
                raise ParametersInvalid(name, checks.describe(new), f"shape {shape}")
    capacity = int(cache.k_cache.shape[1])
    if cache.block_table is None:
        if cache.cache_batch_idx is None and cache.k_cache.shape[0] < batch:
            raise ParametersInvalid(
                "k_cache", checks.describe(cache.k_cache), f"at least {batch} rows, as q"
            )
        return batch, capacity
    for name, argument in (
        ("cache_batch_idx", cache.cache_batch_idx),
        ("cache_leftpad", cache.cache_leftpad),
    ):
        if argument is not None:
            raise ParametersInvalid(name, checks.describe(argument), "None with block_table")
    if not isinstance(cache.block_table, Tensor) or cache.block_table.dim() != 2:
        raise ParametersInvalid(
            "block_table", checks.describe(cache.block_table), "None or integers [B, blocks]"
        )
    return batch, capacity * int(cache.block_table.shape[1])


def _integers(
    name: str, given: Any, batch: int, default: int | None, low: int, high: int
) -> list[int]:
    """One integer for each sequence; ``default`` None counts them."""
    if given is None:
        return list(range(batch)) if default is None else [default] * batch
    if isinstance(given, int) and not isinstance(given, bool):
        values = [given] * batch
    elif (
        isinstance(given, Tensor)
        and given.shape == (batch,)
        and given.dtype in (torch.int32, torch.int64)
    ):
        # Not remembered: a decoding loop counts its lengths up in place.
        values = given.tolist()
    else:
        raise ParametersInvalid(name, checks.describe(given), f"integers of shape [{batch}]")
    for value in values:
        if not low <= value <= high:
            raise ParametersInvalid(name, value, f"{low} to {high}")
    return values


def _pages(cache: Cache, batch: int) -> list[list[int]]:
    """The pages of each sequence."""
    table = cache.block_table
    if (
        not isinstance(table, Tensor)
        or table.dim() != 2
        or table.shape[0] != batch
        or table.dtype not in (torch.int32, torch.int64)
    ):
        raise ParametersInvalid(
            "block_table", checks.describe(table), f"integers of shape [{batch}, blocks]"
        )
    found: list[list[int]] = table.tolist()
    return found


def _rotated(
    q: Tensor, k: Tensor, filled: list[int], rotary: Rotary, rules: Rules
) -> tuple[Tensor, Tensor]:
    """The queries and the new keys, rotated by their positions."""
    cos, sin, interleaved = rotary
    if cos is None and sin is None:
        return q, k
    if cos is None or sin is None:
        missing = "rotary_cos" if cos is None else "rotary_sin"
        raise ParametersInvalid(missing, "None", "given, where the other of the two is")
    interleaved = checks.boolean("rotary_interleaved", interleaved)
    counting = rules.left >= 0 or rules.right >= 0
    checks.tensor("rotary_cos", cos, 2)
    needed = max(filled) + max(k.shape[1], q.shape[1] if counting else 1)
    if needed > cos.shape[0]:
        raise ParametersInvalid("rotary_cos", checks.describe(cos), f"at least {needed} positions")
    offsets: Any = filled[0]
    if len(set(filled)) > 1:
        offsets = torch.tensor(filled, device=q.device)
    k = apply_rotary_emb(k, cos, sin, interleaved, seqlen_offsets=offsets)
    if counting:
        return apply_rotary_emb(q, cos, sin, interleaved, seqlen_offsets=offsets), k
    # All queries stand at the position of the first new key.
    batch, queries, heads, dim = q.shape
    one = q.reshape(batch, 1, queries * heads, dim)
    one = apply_rotary_emb(one, cos, sin, interleaved, seqlen_offsets=offsets)
    return one.reshape(batch, queries, heads, dim), k


def _read(cached: Tensor, where: int | list[int], begin: int, end: int) -> Tensor:
    """The keys ``begin`` to ``end`` of one sequence, [S, N, D]: a view of its row, or its pages."""
    if isinstance(where, int):
        return cached[where, begin:end]
    page = cached.shape[1]
    used = where[: -(-end // page)]
    _check_pages(cached, used)
    if len(used) == 1:
        return cached[used[0], begin:end]
    index = torch.tensor(used, device=cached.device, dtype=torch.int64)
    return cached.index_select(0, index).flatten(0, 1)[begin:end]


def _write(cached: Tensor, new: Tensor, begin: int, where: int | list[int]) -> None:
    """Put the new keys of one sequence behind its first ``begin``."""
    if isinstance(where, int):
        cached[where, begin : begin + new.shape[0]] = new
        return
    page, at = cached.shape[1], 0
    while at < new.shape[0]:
        block, offset = divmod(begin + at, page)
        _check_pages(cached, [where[block]])
        count = min(page - offset, new.shape[0] - at)
        cached[where[block], offset : offset + count] = new[at : at + count]
        at += count


def _check_pages(cached: Tensor, pages: list[int]) -> None:
    for number in pages:
        if not 0 <= number < cached.shape[0]:
            raise ParametersInvalid(
                "block_table", f"page {number}", f"a page of the cache, 0 to {cached.shape[0] - 1}"
            )
