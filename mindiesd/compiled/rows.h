/* Rows of blocks with one instruction set: included by rows.c once for each.
 *
 * TARGET    the instruction set, as the compiler calls it
 * NAME(x)   x with its suffix
 * LANES     floats in a vector
 * VECTORS   vectors that a panel is wide: as many as the registers allow for six rows of them
 *
 * Products are computed in tiles of up to six rows by one panel that stay in registers (as in Goto
 * and van de Geijn, "Anatomy of High-Performance Matrix Multiplication", ACM TOMS 34, 2008).
 */

#define VECTOR NAME(vector)
#define MASK NAME(mask)
#define PANEL (LANES * VECTORS)

typedef float VECTOR __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t MASK __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

/* a where the mask is set, b elsewhere; C has no ?: for vectors. */
INLINE COMPILED_FOR(TARGET) VECTOR NAME(choose)(MASK mask, VECTOR a, VECTOR b) {
    return (VECTOR)(((MASK)a & mask) | ((MASK)b & ~mask));
}

/* 2^x for x <= 0, within 2 units in the last place; 0 where it is below 2^-126; NaN stays. */
INLINE COMPILED_FOR(TARGET) VECTOR NAME(exp2)(VECTOR x) {
    const VECTOR magic = (VECTOR){} + 12582912.0f; /* 1.5 * 2^23: rounds to a whole number */
    const VECTOR least = (VECTOR){} - 127.0f;      /* its power has no bit set */
    x = NAME(choose)(x < least, least, x);
    const VECTOR rounded = x + magic;
    const VECTOR f = x - (rounded - magic);
    /* A polynomial for 2^f on [-1/2, 1/2]; Taylor's, whose next term is below 2^-25. */
    VECTOR p = (VECTOR){} + 1.5252734e-5f;
    p = p * f + 1.5403530e-4f;
    p = p * f + 1.3333558e-3f;
    p = p * f + 9.6181291e-3f;
    p = p * f + 5.5504109e-2f;
    p = p * f + 2.4022651e-1f;
    p = p * f + 6.9314718e-1f;
    p = p * f + 1.0f;
    return p * (VECTOR)(((MASK)rounded << 23) + 0x3f800000);
}

/* Scores of some keys and a panel of queries, and the highest of each query so far.
 *
 * keys:      [count, dim], rows `stride` apart
 * queries:   [dim, PANEL], the panel's queries side by side, scaled
 * scores:    [count, PANEL], rows `apart` apart
 * own:       whether query i of the block sees keys up to i only
 * at_key:    the first key's place in its block
 * at_query:  the first query's
 */
INLINE COMPILED_FOR(TARGET) void NAME(score)(int count, const float *keys, int64_t stride,
                                             const float *queries, int64_t dim, float *scores,
                                             int64_t apart, VECTOR *highest, int own,
                                             int32_t at_key, int32_t at_query) {
    VECTOR sums[6][VECTORS];
    EACH(r, count) {
        EACH(v, VECTORS) { sums[r][v] = (VECTOR){}; }
    }
    for (int64_t d = 0; d < dim; d++) {
        VECTOR query[VECTORS];
        EACH(v, VECTORS) { query[v] = *(const VECTOR *)(queries + d * PANEL + v * LANES); }
        EACH(r, count) {
            const float key = keys[r * stride + d];
            EACH(v, VECTORS) { sums[r][v] += key * query[v]; }
        }
    }
    if (own) {
        MASK lane;
        for (int i = 0; i < LANES; i++) lane[i] = i;
        EACH(r, count) {
            EACH(v, VECTORS) {
                const MASK seen = lane + (at_query + v * LANES) >= (MASK){} + (at_key + r);
                sums[r][v] = NAME(choose)(seen, sums[r][v], (VECTOR){} - INFINITY);
            }
        }
    }
    EACH(r, count) {
        EACH(v, VECTORS) {
            highest[v] = NAME(choose)(sums[r][v] > highest[v], sums[r][v], highest[v]);
            *(VECTOR *)(scores + r * apart + v * LANES) = sums[r][v];
        }
    }
}

/* Scores of a panel become weights exp2(score - highest).
 *
 * scores:   [count, PANEL], rows `apart` apart; overwritten
 * highest:  of each query, with these keys
 * before:   of each query, without them; becomes highest
 * totals:   the sum of each query's weights, brought up to date
 * shrink:   what the query's earlier weights are to be multiplied with
 */
INLINE COMPILED_FOR(TARGET) void NAME(soften)(float *scores, int64_t apart, int64_t count,
                                              const VECTOR *highest, float *before, float *totals,
                                              float *shrink) {
    EACH(v, VECTORS) {
        const int64_t at = v * LANES;
        const VECTOR factor = NAME(exp2)(*(VECTOR *)(before + at) - highest[v]);
        VECTOR total = *(VECTOR *)(totals + at) * factor;
        for (int64_t n = 0; n < count; n++) {
            VECTOR *one = (VECTOR *)(scores + n * apart + at);
            *one = NAME(exp2)(*one - highest[v]);
            total += *one;
        }
        *(VECTOR *)(before + at) = highest[v];
        *(VECTOR *)(totals + at) = total;
        *(VECTOR *)(shrink + at) = factor;
    }
}

/* The weighted sum of values for some queries and a panel of the values' dimensions.
 *
 * weights:  [keys, count], rows SCORES apart
 * values:   [keys, PANEL], rows `stride` apart
 * sums:     [count, PANEL], rows `width` apart; shrunk and added to, or written if `first`
 */
INLINE COMPILED_FOR(TARGET) void NAME(weigh)(int count, const float *weights,
                                             const float *values, int64_t stride, int64_t keys,
                                             float *sums, int64_t width, const float *shrink,
                                             int first) {
    VECTOR mine[6][VECTORS];
    EACH(r, count) {
        EACH(v, VECTORS) {
            mine[r][v] = (VECTOR){};
            if (!first) mine[r][v] = *(VECTOR *)(sums + r * width + v * LANES) * shrink[r];
        }
    }
    for (int64_t n = 0; n < keys; n++) {
        VECTOR value[VECTORS];
        EACH(v, VECTORS) { value[v] = *(const VECTOR *)(values + n * stride + v * LANES); }
        EACH(r, count) {
            const float weight = weights[n * SCORES + r];
            EACH(v, VECTORS) { mine[r][v] += weight * value[v]; }
        }
    }
    EACH(r, count) {
        EACH(v, VECTORS) { *(VECTOR *)(sums + r * width + v * LANES) = mine[r][v]; }
    }
}

/* The queries of a block, panel by panel, [dim, PANEL] each, scaled; zeros fill up the last. */
INLINE COMPILED_FOR(TARGET) void NAME(pack)(const Call *call, const char *query, int64_t row,
                                            int64_t count, float *queries, float *line) {
    const int64_t dim = call->dim;
    memset(queries, 0, sizeof(float) * BLOCK * dim);
    for (int64_t m = 0; m < count; m++) {
        float *to = queries + m / PANEL * PANEL * dim + m % PANEL;
        widen(line, token(&call->query, query, call->order_q, row, m, call->kind), call->kind, dim);
        for (int64_t d = 0; d < dim; d++) to[d * PANEL] = line[d] * call->factor;
    }
}

/* Rows first to stop of blocks of queries of one batch and head; 0, or 1 if memory is missing. */
EXPORT COMPILED_FOR(TARGET) int NAME(mindiesd_rows)(const Call *call, int64_t pair, int64_t first,
                                                    int64_t stop) {
    const int64_t b = pair / call->heads, n = pair % call->heads, kind = call->kind;
    const char *query = head(&call->query, b, n, kind);
    const char *key = head(&call->key, b, n / call->shared, kind);
    const char *value = head(&call->value, b, n / call->shared, kind);
    char *out = head(&call->out, b, n, kind);
    const int64_t dim = call->dim, value_dim = call->value_dim;
    const int64_t width = (value_dim + PANEL - 1) / PANEL * PANEL;
    const int64_t key_row = dim + PAD, value_row = width + PAD;
    const int64_t *ends = call->ends + pair * ((call->queries + BLOCK - 1) / BLOCK);

    /* Keys are done with when values come: they share a place. */
    const int64_t longest = key_row > value_row ? key_row : value_row;
    const int64_t floats = BLOCK * (dim + SCORES + longest + width + 3) + longest;
    float *room = aligned_alloc(64, (sizeof(float) * floats + 63) / 64 * 64);
    if (!room) return 1;
    float *queries = room, *weights = queries + BLOCK * dim, *given = weights + BLOCK * SCORES;
    float *sums = given + BLOCK * longest, *top = sums + BLOCK * width, *totals = top + BLOCK;
    float *shrink = totals + BLOCK, *line = shrink + BLOCK;

    for (int64_t row = first; row < stop; row++) {
        const int64_t count = tokens_of(row, call->queries);
        NAME(pack)(call, query, row, count, queries, line);
        for (int64_t m = 0; m < BLOCK; m++) top[m] = -FLT_MAX, totals[m] = 0.0f;

        for (int64_t at = ends[row]; at < ends[row + 1]; at++) {
            const int64_t column = call->columns[at], keys = tokens_of(column, call->keys);
            const int own = call->causal && column == row, start = at == ends[row];
            for (int64_t k = 0; k < keys; k++)
                widen(given + k * key_row,
                      token(&call->key, key, call->order_k, column, k, kind), kind, dim);
            /* While keys are multiplied, the values come into the second cache, one at a time. */
            int64_t ahead = 0;
            for (int64_t m = 0; m < count; m += PANEL) {
                VECTOR highest[VECTORS];
                EACH(v, VECTORS) { highest[v] = *(VECTOR *)(top + m + v * LANES); }
                for (int64_t k = 0, size; k < keys; k += size) {
#define TILE(size)                                                                            \
    NAME(score)(size, given + k * key_row, key_row, queries + m * dim, dim,                   \
                weights + k * SCORES + m, SCORES, highest, own, k, m)
                    IN_TILES(size, keys - k)
#undef TILE
                    if (ahead < keys)
                        fetch(token(&call->value, value, call->order_k, column, ahead++, kind),
                              value_dim * bytes(kind));
                }
                NAME(soften)(weights + m, SCORES, keys, highest, top + m, totals + m, shrink + m);
            }

            for (int64_t k = 0; k < keys; k++) {
                widen(given + k * value_row,
                      token(&call->value, value, call->order_k, column, k, kind), kind, value_dim);
                memset(given + k * value_row + value_dim, 0, sizeof(float) * (width - value_dim));
            }
            /* And the next block's keys, while values are. */
            const int64_t next = at + 1 < ends[row + 1] ? call->columns[at + 1] : column;
            const int64_t more = next == column ? 0 : tokens_of(next, call->keys);
            ahead = 0;
            for (int64_t d = 0; d < width; d += PANEL) {
                for (int64_t m = 0, size; m < count; m += size) {
#define TILE(size)                                                                            \
    NAME(weigh)(size, weights + m, given + d, value_row, keys, sums + m * width + d, width,   \
                shrink + m, start)
                    IN_TILES(size, count - m)
#undef TILE
                    if (ahead < more)
                        fetch(token(&call->key, key, call->order_k, next, ahead++, kind),
                              dim * bytes(kind));
                }
            }
        }

        for (int64_t m = 0; m < count; m++) {
            const float inverse = 1.0f / totals[m];
            for (int64_t d = 0; d < value_dim; d++) line[d] = sums[m * width + d] * inverse;
            narrow(token(&call->out, out, call->order_q, row, m, kind), line, kind, value_dim);
        }
    }
    free(room);
    return 0;
}

/* The estimate of ada_bsa for groups[first] to groups[stop] of one batch and head; 0, or 1 if memory
 * is missing. The groups of a block of queries must not be divided between two threads.
 */
EXPORT COMPILED_FOR(TARGET) int NAME(mindiesd_estimate)(const Estimate *call, int64_t pair,
                                                        int64_t first, int64_t stop) {
    const int64_t b = pair / call->heads, n = pair % call->heads, kind = call->kind;
    const char *query = head(&call->query, b, n, kind);
    const char *key = head(&call->key, b, n / call->shared, kind);
    const int64_t dim = call->dim, width = GROUP * dim, count = (call->keys + GROUP - 1) / GROUP;
    const int64_t rows = (call->queries + BLOCK - 1) / BLOCK;
    const int64_t columns = (call->keys + BLOCK - 1) / BLOCK;
    float *out = call->out + pair * rows * columns;
    const int64_t panels = (stop - first + PANEL - 1) / PANEL;
    /* Groups of keys that lie in memory as they are multiplied are not copied. */
    const int64_t whole = kind == FLOAT32 && call->key.token == dim ? call->keys / GROUP : 0;

    const int64_t floats = panels * PANEL * (width + count + 4) + CHUNK * (width + PAD) + dim;
    float *room = aligned_alloc(64, (sizeof(float) * floats + 63) / 64 * 64);
    if (!room) return 1;
    float *queries = room, *scores = queries + panels * PANEL * width;
    float *highest = scores + panels * PANEL * count, *top = highest + panels * PANEL;
    float *totals = top + panels * PANEL, *shrink = totals + panels * PANEL;
    float *given = shrink + panels * PANEL, *line = given + CHUNK * (width + PAD);

    /* A group's queries backwards, one behind the other; tokens that are not there are zeros. */
    memset(queries, 0, sizeof(float) * panels * PANEL * width);
    for (int64_t m = 0; m < panels * PANEL; m++) {
        highest[m] = top[m] = -FLT_MAX;
        totals[m] = 0.0f;
        float *to = queries + m / PANEL * PANEL * width + m % PANEL;
        for (int64_t i = 0; m < stop - first && i < GROUP; i++) {
            const int64_t at = call->groups[first + m] * GROUP + GROUP - 1 - i;
            if (at >= call->queries) continue;
            widen(line, token(&call->query, query, NULL, 0, at, kind), kind, dim);
            for (int64_t d = 0; d < dim; d++) to[(i * dim + d) * PANEL] = line[d] * call->factor;
        }
    }
    for (int64_t from = 0; from < count; from += CHUNK) {
        const int64_t some = count - from < CHUNK ? count - from : CHUNK;
        const float *keys = (const float *)token(&call->key, key, NULL, 0, from * GROUP, kind);
        int64_t stride = width;
        if (from + some > whole) {
            keys = given, stride = width + PAD;
            for (int64_t i = 0; i < some * GROUP; i++) {
                float *to = given + i / GROUP * stride + i % GROUP * dim;
                const int64_t at = from * GROUP + i;
                if (at < call->keys)
                    widen(to, token(&call->key, key, NULL, 0, at, kind), kind, dim);
                else
                    memset(to, 0, sizeof(float) * dim);
            }
        }
        for (int64_t p = 0; p < panels; p++) {
            const float *panel = queries + p * PANEL * width;
            float *to = scores + (p * count + from) * PANEL;
            VECTOR *best = (VECTOR *)(highest + p * PANEL);
            for (int64_t k = 0, size; k < some; k += size) {
#define TILE(size)                                                                            \
    NAME(score)(size, keys + k * stride, stride, panel, width, to + k * PANEL, PANEL, best,   \
                0, 0, 0)
                IN_TILES(size, some - k)
#undef TILE
            }
        }
    }
    for (int64_t p = 0; p < panels; p++) {
        float *mine = scores + p * count * PANEL;
        const int64_t at = p * PANEL;
        const int64_t lanes = stop - first - at < PANEL ? stop - first - at : PANEL;
        /* With a causal flag, a group sees the groups of keys up to its own. */
        for (int64_t m = 0; call->causal && m < lanes; m++) {
            const int64_t seen = call->groups[first + at + m] + 1;
            highest[at + m] = -FLT_MAX;
            for (int64_t k = 0; k < count; k++) {
                float *one = mine + k * PANEL + m;
                if (k >= seen) *one = -INFINITY;
                if (*one > highest[at + m]) highest[at + m] = *one;
            }
        }
        NAME(soften)(mine, PANEL, count, (VECTOR *)(highest + at), top + at, totals + at,
                     shrink + at);
        for (int64_t c = 0; c < columns; c++) {
            const int64_t end = (c + 1) * GROUPS < count ? (c + 1) * GROUPS : count;
            VECTOR sums[VECTORS];
            EACH(v, VECTORS) { sums[v] = (VECTOR){}; }
            for (int64_t k = c * GROUPS; k < end; k++) {
                EACH(v, VECTORS) { sums[v] += *(VECTOR *)(mine + k * PANEL + v * LANES); }
            }
            for (int64_t m = 0; m < lanes; m++) {
                const int64_t row = call->groups[first + at + m] / GROUPS;
                out[row * columns + c] += ((float *)sums)[m] / totals[at + m];
            }
        }
    }
    free(room);
    return 0;
}

#undef VECTOR
#undef MASK
#undef PANEL
