/* What matrix products are made of: operands packed in pairs, and a tile in registers. */

#include "native_products.h"

#ifdef PRODUCTS
#include <immintrin.h>

#define INLINE static inline __attribute__((always_inline))
#define UNROLLED _Pragma("GCC unroll 12")

/* 16 rows (of which `rows` are there) of up to 32 numbers (k) as a vector for each pair of numbers, of that pair in every row. */
INLINE void pack_square(const T *b, int64_t ldb, int64_t rows, int64_t k, T *to, int64_t step)
{
    __m512i r[16], t[16];
    __mmask32 mask = k >= 32 ? 0xffffffffu : (1u << k) - 1;
    for (int i = 0; i < 16; i++) r[i] = i < rows ? _mm512_maskz_loadu_epi16(mask, b + i * ldb) : _mm512_setzero_si512();
    for (int i = 0; i < 8; i++) {
        t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
        t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
    }
    for (int i = 0; i < 4; i++) {
        r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
        r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
        r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
        r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
    }
    for (int i = 0; i < 4; i++) {
        t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
        t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
        t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
        t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
    }
    for (int i = 0; i < 4; i++) {
        r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
        r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
        r[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
        r[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
    }
    for (int i = 0; i < 16; i++)
        if (2 * i < k) _mm512_storeu_si512(to + i * step, r[i]);
}

void pack(const T *b, int64_t ldb, int64_t n, int64_t k, int across, T *packed)
{
    if (across) {
        for (int64_t at = 0; at < k; at += 32)
            for (int half = 0; half < (n > 16 ? 2 : 1); half++)
                pack_square(b + 16 * half * ldb + at, ldb, n - 16 * half, k - at, packed + at * COLUMNS + half * 32, 2 * COLUMNS);
        return;
    }
    static const int16_t low[32] = { 0, 32, 1, 33, 2, 34, 3, 35, 4, 36, 5, 37, 6, 38, 7, 39, 8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47 };
    const __m512i first = _mm512_loadu_si512(low), second = _mm512_add_epi16(first, _mm512_set1_epi16(16));
    __mmask32 mask = n >= 32 ? 0xffffffffu : (1u << n) - 1;
    for (int64_t at = 0; at < k; at += 2) {
        __m512i one = _mm512_maskz_loadu_epi16(mask, b + at * ldb);
        __m512i two = at + 1 < k ? _mm512_maskz_loadu_epi16(mask, b + (at + 1) * ldb) : _mm512_setzero_si512();
        _mm512_storeu_si512(packed + at * COLUMNS, _mm512_permutex2var_epi16(one, first, two));
        _mm512_storeu_si512(packed + (at + 1) * COLUMNS, _mm512_permutex2var_epi16(one, second, two));
    }
}

void transpose(const T *x, int64_t ldx, int64_t n, int64_t d, T *to, int64_t ld)
{
    T pairs[32 * COLUMNS], turned[16 * 2 * COLUMNS];
    for (int64_t i = 0; i < n; i += 32)
        for (int64_t j = 0; j < d; j += COLUMNS) {
            const int64_t rows = smaller(n - i, 32), columns = smaller(d - j, COLUMNS);
            pack(x + i * ldx + j, ldx, columns, rows, 0, pairs); /* of two rows each, number by number */
            if (rows < 32) memset(pairs + even(rows) * COLUMNS, 0, (32 - even(rows)) * COLUMNS * sizeof(T));
            for (int half = 0; half < 2; half++) pack_square(pairs + 32 * half, 2 * COLUMNS, 16, 32, turned + 16 * 32 * half, 32);
            for (int64_t c = 0; c < columns; c++) memcpy(to + (j + c) * ld + i, turned + 32 * c, 32 * sizeof(T));
        }
}

INLINE __m512 widened(const T *x, __mmask16 mask)
{
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, x)), 16));
}

/* Write what was summed up where it goes. */
INLINE void finish(int rows, int halves, __m512 sum[ROWS][2], int64_t row, const Target *to, int64_t column, int64_t width, int bare, int wide)
{
    const __m512 factor = _mm512_set1_ps(to->factor);
    UNROLLED
    for (int i = 0; i < rows; i++)
        UNROLLED
        for (int h = 0; h < halves; h++) {
            const int64_t j = column + 16 * h, left = width - 16 * h, at = (row + i) * to->ldc + j;
            const __mmask16 mask = left >= 16 ? 0xffff : (1u << left) - 1;
            __m512 v = sum[i][h];
            if (!bare && to->start) v = _mm512_add_ps(v, _mm512_maskz_loadu_ps(mask, to->start + (row + i) * to->lds + j));
            v = _mm512_mul_ps(v, factor);
            if (!bare && to->bias) v = _mm512_add_ps(v, widened(to->bias + j, mask));
            if (!bare && to->more) v = _mm512_add_ps(v, widened(to->more + (row + i) * to->ldm + j, mask));
            if (wide) _mm512_mask_storeu_ps((float *)to->c + at, mask, v);
            else _mm256_mask_storeu_epi16((T *)to->c + at, mask, (__m256i)_mm512_cvtneps_pbh(v));
        }
}

/* Sums of `rows` rows and 16 columns, or 32 where `halves` is 2, over all pieces. */
INLINE void tile_of(int rows, int halves, const Piece *pieces, int count, int64_t row, const T *packed, const Target *to, int64_t column, int64_t width)
{
    __m512 sum[ROWS][2];
    UNROLLED
    for (int i = 0; i < rows; i++) sum[i][0] = sum[i][1] = _mm512_setzero_ps();
    for (int t = 0; t < count; t++) {
        const int64_t lda = pieces[t].lda, k = pieces[t].k;
        const T *a = pieces[t].a + row * lda;
        for (int64_t p = 0; p < k; p += 2, packed += 2 * COLUMNS) {
            __m512bh left = (__m512bh)_mm512_load_si512(packed), right = (__m512bh)_mm512_load_si512(packed + COLUMNS);
            UNROLLED
            for (int i = 0; i < rows; i++) {
                int32_t two;
                memcpy(&two, a + i * lda + p, 4);
                __m512bh both = (__m512bh)_mm512_set1_epi32(two);
                sum[i][0] = _mm512_dpbf16_ps(sum[i][0], both, left);
                if (halves > 1) sum[i][1] = _mm512_dpbf16_ps(sum[i][1], both, right);
            }
        }
    }
    const int bare = !to->start && !to->bias && !to->more, wide = to->wide; /* told apart once: a tile over 64 numbers is as short as its end */
    if (bare && wide) finish(rows, halves, sum, row, to, column, width, 1, 1);
    else if (bare) finish(rows, halves, sum, row, to, column, width, 1, 0);
    else finish(rows, halves, sum, row, to, column, width, 0, wide);
}

void tile(int64_t rows, const Piece *pieces, int count, int64_t row, const T *packed, const Target *to, int64_t column, int64_t width)
{
#define TILE(n) \
    case n: \
        if (width > 16) { tile_of(n, 2, pieces, count, row, packed, to, column, width); } \
        else { tile_of(n, 1, pieces, count, row, packed, to, column, width); } \
        break;
    switch (rows) { TILE(1) TILE(2) TILE(3) TILE(4) TILE(5) TILE(6) TILE(7) TILE(8) TILE(9) TILE(10) TILE(11) TILE(12) }
#undef TILE
}
#endif
