/* Matrix products of bfloat16, for processors that multiply pairs of it (AVX512-BF16) and have no unit for whole tiles (AMX), for which oneDNN is faster.

   A product is a sum of terms a b, each with a length k of its own, over which they are one chain of additions: x W^T + low B^T costs what one product does.
   The right-hand side is packed 32 columns at a time, pairs of k next to each other, and a tile of 12 rows by 32 columns stays in registers over all of k.
   A result depends on its row and its column only, not on how many others there are or which thread computes it. */

#pragma once
#include "native.h"

#if defined(__AVX512BF16__) && defined(__AVX512VL__) && defined(__AVX512BW__) && !defined(__AMX_BF16__) && !defined(FLOAT32)
#define PRODUCTS
#include <stdlib.h>

#define INTERNAL __attribute__((visibility("hidden")))

enum { ROWS = 12, COLUMNS = 32 };

typedef struct { const T *a; int64_t lda, k; } Piece; /* the left-hand side of what is packed: rows, and an even length */

typedef struct { /* where a product goes: c, as T, or float where `wide`; factor * (product + start) + bias + more, of which the last three may be missing */
    void *c; int64_t ldc; int wide;
    float factor;
    const float *start; int64_t lds;
    const T *bias;
    const T *more; int64_t ldm;
} Target;

static inline int64_t even(int64_t k) { return k + (k & 1); }
static inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t whole(int64_t n, int64_t of) { return (n + of - 1) / of * of; }

/* Columns of a product, packed: b[n, k] for `across`, b[k, n] otherwise; n up to 32. `packed` takes 32 even(k) numbers; what is not there is 0. */
INTERNAL void pack(const T *b, int64_t ldb, int64_t n, int64_t k, int across, T *packed);

/* to[d, n] = x[n, d] transposed, and 0 up to the next multiple of 32 of n, which `ld` is no less than. */
INTERNAL void transpose(const T *x, int64_t ldx, int64_t n, int64_t d, T *to, int64_t ld);

/* One tile: `rows` (up to 12) from `row`, `width` columns (up to 32) from `column`, for which `packed` holds the right-hand sides of the pieces. */
INTERNAL void tile(int64_t rows, const Piece *pieces, int count, int64_t row, const T *packed, const Target *to, int64_t column, int64_t width);

/* The largest of 1 to 12 rows a tile by which m rows are as many tiles, so that none is much smaller than the others. */
static inline int64_t tile_rows(int64_t m) { return m ? whole(m, (m + ROWS - 1) / ROWS) / ((m + ROWS - 1) / ROWS) : 1; }

#endif
