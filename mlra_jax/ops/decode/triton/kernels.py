"""The two kernels. This module imports Triton, so it is imported only where a kernel is launched.

A tile's rows are the query rows of one (batch row, head): row r is query r // M, head row r % M.
"""

from typing import no_type_check

import triton
import triton.language as tl

LN_2: tl.constexpr = tl.constexpr(0.6931471805599453)


@triton.jit
@no_type_check
def split_kernel(
    q_ptr,  # [B, T, L, M, C]
    q_rope_ptr,  # [B, T, L, M, R]
    k_ptr,  # [pages, L, S, C]
    k_rope_ptr,  # [pages, L or 1, S, R]
    v_ptr,  # [pages, L, S, V]
    kv_len_ptr,  # [B, T]
    table_ptr,  # [B, N]
    out_ptr,  # one split: [B, T, L, M, V]; several: float32 [B, L, SPLITS, T * M, V]
    lse_ptr,  # one split: natural logarithm [B, T, L, M]; several: of base 2 [B, L, SPLITS, T * M]
    T: tl.constexpr,
    L: tl.constexpr,
    M: tl.constexpr,
    C: tl.constexpr,
    R: tl.constexpr,  # 0: there are no rotary parts
    V: tl.constexpr,
    S: tl.constexpr,
    N: tl.constexpr,  # pages of a row; 0: the cache is contiguous
    ROPE_HEADS: tl.constexpr,
    LATENT: tl.constexpr,  # the keys are the values
    SCALE: tl.constexpr,  # of scores whose exponential has base 2
    TILES: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
):
    """Attention of one tile of rows over one of SPLITS equal shares of its tokens' blocks."""
    tile = tl.program_id(0) % TILES  # tiles that read the same tokens run side by side: through the L2
    split = tl.program_id(0) // TILES
    head = tl.program_id(1)
    batch = tl.program_id(2)

    row = tile * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    real = row < T * M
    query = batch * T + row // M
    address = (query.to(tl.int64) * L + head) * M + row % M  # of the row in [B, T, L, M]
    columns = tl.arange(0, C)
    values = tl.arange(0, V)
    tokens = tl.arange(0, BLOCK_TOKENS)
    q = tl.load(q_ptr + address[:, None] * C + columns[None, :], mask=real[:, None], other=0.0)
    if R:
        rope = tl.arange(0, R)
        q_rope = tl.load(q_rope_ptr + address[:, None] * R + rope[None, :], mask=real[:, None], other=0.0)

    capacity: tl.constexpr = S * N if N else S
    seen = tl.minimum(tl.load(kv_len_ptr + query, mask=real, other=0), capacity)
    end = tl.max(seen, axis=0)
    blocks = tl.cdiv(end, BLOCK_TOKENS)
    # Blocks that every row sees whole need no mask; a share that lies past them begins with its own first block.
    whole = tl.min(tl.where(real, seen, end), axis=0) // BLOCK_TOKENS
    first = blocks * split // SPLITS
    last = blocks * (split + 1) // SPLITS

    top = tl.full([BLOCK_ROWS], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_ROWS], tl.float32)
    acc = tl.zeros([BLOCK_ROWS, V], tl.float32)
    for masked in tl.static_range(2):
        if masked:
            low, high = tl.maximum(first, whole), last
        else:
            low, high = first, tl.minimum(last, whole)
        if N:
            next_page = tl.load(table_ptr + batch * N + tl.minimum(low * BLOCK_TOKENS // S, N - 1))
        for block in range(low, high):
            start = block * BLOCK_TOKENS
            if N:
                page = next_page.to(tl.int64)
                slot = start % S
                # One block ahead: addresses of keys then wait for no other load.
                next_page = tl.load(table_ptr + batch * N + tl.minimum((start + BLOCK_TOKENS) // S, N - 1))
            else:
                page = batch.to(tl.int64)
                slot = start
            slots = (page * L + head) * S + slot
            k_ptrs = k_ptr + slots * C + (tokens[:, None] * C + columns[None, :])
            if R:
                rope_slots = (page * ROPE_HEADS + head % ROPE_HEADS) * S + slot
                k_rope_ptrs = k_rope_ptr + rope_slots * R + (tokens[:, None] * R + rope[None, :])
            if not LATENT:
                v_ptrs = v_ptr + slots * V + (tokens[:, None] * V + values[None, :])
            if masked:
                # What was never written may be NaN, and a weight of zero does not blank that.
                written = (start + tokens < end)[:, None]
                k = tl.load(k_ptrs, mask=written, other=0.0)
                if R:
                    k_rope = tl.load(k_rope_ptrs, mask=written, other=0.0)
                if LATENT:
                    v = k
                else:
                    v = tl.load(v_ptrs, mask=written, other=0.0)
            else:
                k = tl.load(k_ptrs)
                if R:
                    k_rope = tl.load(k_rope_ptrs)
                if LATENT:
                    v = k
                else:
                    v = tl.load(v_ptrs)

            scores = tl.dot(q, tl.trans(k))
            if R:
                scores = tl.dot(q_rope, tl.trans(k_rope), scores)
            scores = scores * SCALE
            if masked:
                scores = tl.where((start + tokens)[None, :] < seen[:, None], scores, float("-inf"))
            new_top = tl.maximum(top, tl.max(scores, axis=1))
            if masked:  # a row may have seen nothing yet
                base = tl.where(new_top == float("-inf"), 0.0, new_top)
            else:
                base = new_top
            p = tl.exp2(scores - base[:, None])
            keep = tl.exp2(top - base)
            total = total * keep + tl.sum(p, axis=1)
            acc = tl.dot(p.to(v.dtype), v, acc * keep[:, None])
            top = new_top

    some = total > 0
    acc = acc / tl.where(some, total, 1.0)[:, None]
    lse = tl.where(some, top + tl.log2(tl.where(some, total, 1.0)), float("-inf"))
    if SPLITS == 1:
        lse = lse * LN_2
    else:
        address = ((batch.to(tl.int64) * L + head) * SPLITS + split) * (T * M) + row
    out_ptrs = out_ptr + address[:, None] * V + values[None, :]
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=real[:, None])
    tl.store(lse_ptr + address, lse, mask=real)


@triton.jit
@no_type_check
def combine_kernel(
    part_ptr,  # float32 [B, L, SPLITS, T * M, V]
    part_lse_ptr,  # float32 [B, L, SPLITS, T * M], of base 2
    out_ptr,  # [B, T, L, M, V]
    lse_ptr,  # float32 [B, T, L, M]
    T: tl.constexpr,
    L: tl.constexpr,
    M: tl.constexpr,
    V: tl.constexpr,
    SPLITS: tl.constexpr,
    SPLITS_2: tl.constexpr,  # SPLITS or the next power of two
    COLUMNS: tl.constexpr,  # of V that one program merges
):
    """Merges the splits of one row by their log-sum-exps, all at once and always in the same order."""
    row = tl.program_id(0) // (V // COLUMNS)
    column = tl.program_id(0) % (V // COLUMNS) * COLUMNS
    head = tl.program_id(1)
    batch = tl.program_id(2)
    splits = tl.arange(0, SPLITS_2)
    there = splits < SPLITS
    address = ((batch.to(tl.int64) * L + head) * SPLITS + splits) * (T * M) + row
    columns = column + tl.arange(0, COLUMNS)
    part = tl.load(part_ptr + address[:, None] * V + columns[None, :], mask=there[:, None], other=0.0)
    lse = tl.load(part_lse_ptr + address, mask=there, other=float("-inf"))
    top = tl.max(lse, axis=0)
    base = tl.where(top == float("-inf"), 0.0, top)
    weight = tl.exp2(lse - base)
    total = tl.sum(weight, axis=0)
    some = total > 0
    divisor = tl.where(some, total, 1.0)
    out = tl.sum(weight[:, None] * part, axis=0) / divisor
    address = ((batch.to(tl.int64) * T + row // M) * L + head) * M + row % M
    tl.store(out_ptr + address * V + columns, out.to(out_ptr.dtype.element_ty))
    tl.store(
        lse_ptr + address, tl.where(some, (base + tl.log2(divisor)) * LN_2, float("-inf")), mask=column == 0
    )
