/* Linear layers that read the same input, each perhaps with a LoRA, and what comes back through them. */

#include "native_products.h"

/* Whether the functions below are there: 1, or 0 where oneDNN is as good. */
int has_products(void)
{
#ifdef PRODUCTS
    return 1;
#else
    return 0;
#endif
}

#ifdef PRODUCTS
int omp_get_max_threads(void);

enum { CHUNK = 2048, TERMS = 2, LINE = 64 / sizeof(T) };

typedef struct { /* a[m, k] times b: its rows are the n columns of the product (`across`), or its rows are k. k of an `across` term is even. */
    const T *a; int64_t lda;
    const T *b; int64_t ldb;
    int64_t k;
    int across;
} Term;

/* Columns `column` to `column` + `width` (up to 32) of rows `from` to `end` of a product. packed: 32 numbers for each of k.
   next: columns of the panel after this one; while this one is computed, their weights are fetched from memory. */
static void panel(const Term *terms, int count, const Target *to, int64_t from, int64_t end, int64_t column, int64_t width, int64_t next, T *packed)
{
    const int64_t step = tile_rows(end - from), line = terms->across ? LINE : terms->ldb;
    const T *ahead = terms->across ? terms->b + (column + COLUMNS) * terms->ldb : terms->b + column + COLUMNS;
    int64_t lines = terms->across ? next * terms->ldb / line : next ? terms->k : 0, share = lines / ((end - from) / step + 1) + 1;
    Piece pieces[TERMS];
    T *at = packed;
    for (int t = 0; t < count; at += even(terms[t++].k) * COLUMNS) {
        pack(terms[t].across ? terms[t].b + column * terms[t].ldb : terms[t].b + column, terms[t].ldb, width, terms[t].k, terms[t].across, at);
        pieces[t] = (Piece){ terms[t].a, terms[t].lda, even(terms[t].k) };
    }
    for (int64_t i = from; i < end; i += step) {
        for (int64_t l = 0; l < share && lines > 0; l++, lines--, ahead += line) __builtin_prefetch(ahead, 0, 2);
        tile(smaller(end - i, step), pieces, count, i, packed, to, column, width);
    }
}

/* A product of m rows and n columns, by all threads. 0 if memory is short. */
static int computed(const Term *terms, int count, const Target *target, int64_t m, int64_t n)
{
    const int64_t panels = whole(n, COLUMNS) / COLUMNS, threads = omp_get_max_threads();
    int64_t parts = panels < threads ? (threads + panels - 1) / panels : 1, k = 0;
    int ok = 1;
    if (parts * 4 * ROWS > m) parts = m / (4 * ROWS) ? m / (4 * ROWS) : 1;
    const int64_t rows = whole((m + parts - 1) / parts, ROWS);
    for (int t = 0; t < count; t++) k += even(terms[t].k);
    _Pragma("omp parallel reduction(&:ok)")
    {
        T *packed = aligned_alloc(64, k * COLUMNS * sizeof(T));
        ok = packed != 0;
        _Pragma("omp for schedule(static)")
        for (int64_t i = 0; i < panels * parts; i++) {
            const int64_t column = i % panels * COLUMNS, from = i / panels * rows, end = smaller(from + rows, m), width = smaller(n - column, COLUMNS);
            if (packed && from < end) panel(terms, count, target, from, end, column, width, smaller(n - column - width, COLUMNS), packed);
        }
        free(packed);
    }
    return ok;
}

/* The same for any k. Where it is long, as over a vocabulary, it is one part after the other, for all columns, so that the left-hand side of a part stays in a
   cache; and rows that are a multiple of 4 KB apart, of which a cache holds but a few, are brought closer first. */
static int product(const Term *terms, int count, const Target *target, int64_t m, int64_t n)
{
    const int64_t size = terms->k > 2 * CHUNK ? CHUNK : terms->k, ld = whole(size, COLUMNS) + COLUMNS;
    if (size == terms->k && (terms->lda * sizeof(T) % 4096 || n <= 2 * COLUMNS)) return computed(terms, count, target, m, n);
    T *rows = malloc(m * ld * sizeof(T));
    float *sums = size < terms->k ? malloc(m * n * sizeof(float)) : 0;
    int ok = rows && (sums || size == terms->k);
    for (int64_t at = 0; ok && at < terms->k; at += size) {
        const int last = at + size >= terms->k;
        Term parts[TERMS] = { *terms };
        parts->k = smaller(terms->k - at, size);
        parts->b += parts->across ? at : at * parts->ldb;
        EACH_ROW
        for (int64_t i = 0; i < m; i++) memcpy(rows + i * ld, terms->a + i * terms->lda + at, even(parts->k) * sizeof(T));
        parts->a = rows, parts->lda = ld;
        for (int t = 1; t < count; t++) parts[t] = terms[t];
        Target to = last ? *target : (Target){ .c = sums, .ldc = n, .wide = 1, .factor = 1 };
        if (at) to.start = sums, to.lds = n;
        ok = computed(parts, last ? count : 1, &to, m, n);
    }
    free(rows);
    free(sums);
    return ok;
}

/* low[n, sum of ranks] = x a^T; out[n, sum of outs] = x w^T + bias + low b^T + more, where b[sum of outs, sum of ranks] holds a block for each of `parts`
   layers, of outs[i] rows and ranks[i] columns, perhaps none, and no number outside them counts. bias and more may be missing. */
int project(const T *x, const T *w, const T *bias, const T *a, const T *b, const T *more, T *low, T *out, int64_t n, int64_t in, int64_t parts,
            const int64_t *outs, const int64_t *ranks)
{
    int64_t all = 0, rank = 0, row = 0, column = 0;
    for (int64_t p = 0; p < parts; p++) all += outs[p], rank += ranks[p];
    int ok = !rank || product(&(Term){ x, in, a, in, in, 1 }, 1, &(Target){ .c = low, .ldc = rank, .factor = 1 }, n, rank);
    for (int64_t p = 0; ok && p < parts; row += outs[p], column += ranks[p++]) {
        const Term terms[] = { { x, in, w + row * in, in, in, 1 }, { low + column, rank, b + row * rank + column, rank, ranks[p], 1 } };
        const Target to = { .c = out + row, .ldc = all, .factor = 1, .bias = bias ? bias + row : 0, .more = more ? more + row : 0, .ldm = all };
        ok = product(terms, ranks[p] ? 2 : 1, &to, n, outs[p]);
    }
    return ok;
}

/* back[n, sum of ranks] = grad b, the gradient of `low`; dx[n, in] = grad w + back a, if it is wanted. */
int input_backward(const T *grad, const T *w, const T *a, const T *b, T *back, T *dx, int64_t n, int64_t in, int64_t parts, const int64_t *outs,
                   const int64_t *ranks)
{
    int64_t all = 0, rank = 0, row = 0, column = 0;
    for (int64_t p = 0; p < parts; p++) all += outs[p], rank += ranks[p];
    int ok = 1;
    for (int64_t p = 0; ok && p < parts; row += outs[p], column += ranks[p++])
        if (ranks[p])
            ok = product(&(Term){ grad + row, all, b + row * rank + column, rank, outs[p], 0 }, 1,
                         &(Target){ .c = back + column, .ldc = rank, .factor = 1 }, n, ranks[p]);
    const Term terms[] = { { grad, all, w, in, all, 0 }, { back, rank, a, in, rank, 0 } };
    return ok && (!dx || product(terms, rank ? 2 : 1, &(Target){ .c = dx, .ldc = in, .factor = 1 }, n, in));
}

/* da[sum of ranks, in] = back^T x, db[sum of ranks, sum of outs] = low^T grad, only the blocks of the latter that belong to a layer. */
int pair_backward(const T *grad, const T *back, const T *x, const T *low, float *da, float *db, int64_t n, int64_t in, int64_t parts, const int64_t *outs,
                  const int64_t *ranks)
{
    int64_t all = 0, rank = 0, row = 0, column = 0, ld = whole(n, COLUMNS);
    for (int64_t p = 0; p < parts; p++) all += outs[p], rank += ranks[p];
    T *left = malloc(2 * rank * ld * sizeof(T));
    if (!left) return 0;
    transpose(back, rank, n, rank, left, ld);
    transpose(low, rank, n, rank, left + rank * ld, ld);
    int ok = product(&(Term){ left, ld, x, in, n, 0 }, 1, &(Target){ .c = da, .ldc = in, .wide = 1, .factor = 1 }, rank, in);
    for (int64_t p = 0; ok && p < parts; row += outs[p], column += ranks[p++])
        if (ranks[p])
            ok = product(&(Term){ left + (rank + column) * ld, ld, grad + row, all, n, 0 }, 1,
                         &(Target){ .c = db + column * all + row, .ldc = all, .wide = 1, .factor = 1 }, ranks[p], outs[p]);
    free(left);
    return ok;
}
#endif
