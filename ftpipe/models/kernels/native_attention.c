/* Causal attention over packed sequences: each sequence and key head by itself, 12 queries at a time, over the keys that they see.

   Neither scores nor probabilities are kept: the backward pass computes them again from the logarithm of each query's sum, and does so in float. */

#include "native_products.h"

#ifdef PRODUCTS
enum { BLOCK = 6 * COLUMNS }; /* queries whose probabilities exist at once in the backward pass */

typedef struct { T *packed; int64_t panel; } Packed; /* panels of 32 columns, each of `panel` numbers */

static Packed packed_keys(const T *x, int64_t ld, int64_t length, int64_t d, int across, T *to)
{
    const int64_t columns = across ? length : d, k = across ? d : length, panel = COLUMNS * even(k);
    for (int64_t j = 0; j < columns; j += COLUMNS)
        pack(across ? x + j * ld : x + j, ld, smaller(columns - j, COLUMNS), k, across, to + j / COLUMNS * panel);
    return (Packed){ to, panel };
}

/* Rows `row` to `row` + `rows` of a[., k] times columns 0 to n of what is packed. */
static void times(const T *a, int64_t lda, int64_t k, int64_t row, int64_t rows, Packed b, int64_t n, const Target *to)
{
    for (int64_t j = 0; j < n; j += COLUMNS)
        tile(rows, &(Piece){ a, lda, k }, 1, row, b.packed + j / COLUMNS * b.panel, to, j, smaller(n - j, COLUMNS));
}

static int64_t room(int64_t length, int64_t d) { return whole(length, COLUMNS) * whole(d, COLUMNS); } /* numbers of what is packed either way */

/* Tokens of the longest sequence. */
static int64_t most(const int64_t *starts, int64_t count)
{
    int64_t found = 0;
    for (int64_t n = 0; n < count; n++)
        if (starts[n + 1] - starts[n] > found) found = starts[n + 1] - starts[n];
    return found;
}

/* out = softmax(scale q k^T + causal mask) v of `count` sequences, which begin at starts[0] to starts[count - 1] and end where the next begins (starts[count]);
   number j of head h of token t is q[t * qt + h * qh + j], and so on; d numbers a head, d even; `heads` heads, a multiple of the `groups` key heads.
   logs[t, heads]: the logarithm of each query's sum of exponentials. */
int attend(const T *q, int64_t qt, int64_t qh, const T *k, int64_t kt, int64_t kh, const T *v, int64_t vt, int64_t vh, T *out, int64_t ot, int64_t oh,
           float *logs, const int64_t *starts, int64_t count, int64_t heads, int64_t groups, int64_t d, float scale)
{
    const int64_t each = heads / groups, longest = most(starts, count);
    int ok = 1;
    const int64_t ld = whole(longest, COLUMNS), size = 2 * room(longest, d) * sizeof(T), scores = ROWS * ld * sizeof(float);
    _Pragma("omp parallel reduction(&:ok)")
    {
        char *held = aligned_alloc(64, whole(size + scores + ROWS * ld * sizeof(T), 64));
        float *s = (float *)(held + size);
        T *p = (T *)(held + size + scores);
        ok = held != 0;
        _Pragma("omp for schedule(dynamic) collapse(2)")
        for (int64_t n = 0; n < count; n++)
            for (int64_t g = 0; g < groups; g++) {
                if (!held) continue;
                const int64_t first = starts[n], length = starts[n + 1] - first;
                const Packed keys = packed_keys(k + first * kt + g * kh, kt, length, d, 1, (T *)held);
                const Packed values = packed_keys(v + first * vt + g * vh, vt, length, d, 0, (T *)held + room(longest, d));
                const int64_t step = tile_rows(length);
                for (int64_t h = g * each; h < (g + 1) * each; h++)
                    for (int64_t i = 0; i < length; i += step) {
                        const int64_t rows = smaller(length - i, step), seen = i + rows;
                        const Target to = { .c = s - i * ld, .ldc = ld, .wide = 1, .factor = scale };
                        times(q + first * qt + h * qh, qt, d, i, rows, keys, seen, &to);
                        for (int64_t r = 0; r < rows; r++) {
                            float *row = s + r * ld, top = -INFINITY, sum = 0;
                            const int64_t end = i + r + 1;
                            _Pragma("omp simd reduction(max:top)")
                            for (int64_t j = 0; j < end; j++) top = row[j] > top ? row[j] : top;
                            _Pragma("omp simd reduction(+:sum)")
                            for (int64_t j = 0; j < end; j++) sum += row[j] = exponential(row[j] - top);
                            const float factor = 1.0f / sum;
                            SIMD
                            for (int64_t j = 0; j < end; j++) p[r * ld + j] = rounded(row[j] * factor);
                            memset(p + r * ld + end, 0, (even(seen) - end) * sizeof(T));
                            logs[(first + i + r) * heads + h] = top + logf(sum);
                        }
                        const Target result = { .c = out + first * ot + h * oh, .ldc = ot, .factor = 1 };
                        times(p - i * ld, ld, even(seen), i, rows, values, d, &result);
                    }
            }
        free(held);
    }
    return ok;
}

/* Gradients of q, k and v from that of `out`; what is written to has the strides of what it belongs to. */
int attend_backward(const T *grad, int64_t gt, int64_t gh, const T *q, int64_t qt, int64_t qh, const T *k, int64_t kt, int64_t kh, const T *v, int64_t vt,
                    int64_t vh, const float *logs, T *dq, T *dk, T *dv, const int64_t *starts, int64_t count, int64_t heads, int64_t groups, int64_t d,
                    float scale)
{
    const int64_t each = heads / groups, longest = most(starts, count);
    int ok = 1;
    const int64_t ld = whole(longest, COLUMNS), block = smaller(ld, BLOCK), one = room(longest, d);
    const int64_t numbers = 3 * one + 2 * block * ld + 2 * d * block + COLUMNS * block, floats = 2 * ROWS * ld + 2 * d * ld;
    _Pragma("omp parallel reduction(&:ok)")
    {
        T *held = aligned_alloc(64, whole(numbers * sizeof(T) + 64 + floats * sizeof(float), 64));
        T *p = held + 3 * one, *ds = p + block * ld, *turned_grad = ds + block * ld, *turned_q = turned_grad + d * block, *panel = turned_q + d * block;
        float *s = (float *)(panel + COLUMNS * block), *dp = s + ROWS * ld, *sum_k = dp + ROWS * ld, *sum_v = sum_k + d * ld;
        ok = held != 0;
        _Pragma("omp for schedule(dynamic) collapse(2)")
        for (int64_t n = 0; n < count; n++)
            for (int64_t g = 0; g < groups; g++) {
                if (!held) continue;
                const int64_t first = starts[n], length = starts[n + 1] - first;
                const Packed keys = packed_keys(k + first * kt + g * kh, kt, length, d, 1, held);
                const Packed values = packed_keys(v + first * vt + g * vh, vt, length, d, 1, held + one);
                const Packed key_columns = packed_keys(k + first * kt + g * kh, kt, length, d, 0, held + 2 * one);
                memset(sum_k, 0, 2 * d * ld * sizeof(float));
                for (int64_t h = g * each; h < (g + 1) * each; h++)
                    for (int64_t begin = 0; begin < length; begin += block) {
                        const int64_t queries = smaller(length - begin, block), wide = even(queries), step = even(tile_rows(queries));
                        const T *qs = q + (first + begin) * qt + h * qh, *gs = grad + (first + begin) * gt + h * gh;
                        for (int64_t i = 0; i < queries; i += step) {
                            const int64_t rows = smaller(queries - i, step), seen = begin + i + rows, all = smaller(whole(seen, COLUMNS), ld);
                            const Target scores = { .c = s - i * ld, .ldc = ld, .wide = 1, .factor = scale };
                            const Target above = { .c = dp - i * ld, .ldc = ld, .wide = 1, .factor = 1 };
                            times(qs, qt, d, i, rows, keys, seen, &scores);
                            times(gs, gt, d, i, rows, values, seen, &above);
                            for (int64_t r = 0; r < rows; r++) {
                                float *row = s + r * ld, *up = dp + r * ld, sum = 0;
                                T *to_p = p + (i + r) * ld, *to_ds = ds + (i + r) * ld;
                                const float log = logs[(first + begin + i + r) * heads + h];
                                const int64_t end = begin + i + r + 1;
                                _Pragma("omp simd reduction(+:sum)")
                                for (int64_t j = 0; j < end; j++) {
                                    row[j] = exponential(row[j] - log);
                                    sum += row[j] * up[j];
                                }
                                SIMD
                                for (int64_t j = 0; j < end; j++) {
                                    to_p[j] = rounded(row[j]);
                                    to_ds[j] = rounded(row[j] * (up[j] - sum) * scale);
                                }
                                memset(to_p + end, 0, (all - end) * sizeof(T));
                                memset(to_ds + end, 0, (all - end) * sizeof(T));
                            }
                            const Target result = { .c = dq + (first + begin) * qt + h * qh, .ldc = qt, .factor = 1 };
                            times(ds, ld, even(seen), i, rows, key_columns, d, &result);
                        }
                        memset(p + queries * ld, 0, (wide - queries) * ld * sizeof(T));
                        memset(ds + queries * ld, 0, (wide - queries) * ld * sizeof(T));
                        transpose(gs, gt, queries, d, turned_grad, block);
                        transpose(qs, qt, queries, d, turned_q, block);
                        for (int64_t j = 0; j < begin + queries; j += COLUMNS) {
                            /* query j is the first that sees keys from j on; its tile wrote zeros for those that it does not see */
                            const int64_t from = j > begin ? (j - begin) / step * step : 0, width = smaller(ld - j, COLUMNS);
                            for (int turn = 0; turn < 2; turn++) {
                                float *sum = turn ? sum_v : sum_k;
                                const Piece left = { (turn ? turned_grad : turned_q) + from, block, wide - from };
                                const Target to = { .c = sum, .ldc = ld, .wide = 1, .factor = 1, .start = sum, .lds = ld };
                                pack((turn ? p : ds) + from * ld + j, ld, width, wide - from, 0, panel);
                                for (int64_t i = 0, part = tile_rows(d); i < d; i += part) tile(smaller(d - i, part), &left, 1, i, panel, &to, j, width);
                            }
                        }
                    }
                T *to_k = dk + first * kt + g * kh, *to_v = dv + first * vt + g * vh;
                for (int64_t i = 0; i < length; i++)
                    for (int64_t j = 0; j < d; j++) {
                        to_k[i * kt + j] = rounded(sum_k[j * ld + i]);
                        to_v[i * vt + j] = rounded(sum_v[j * ld + i]);
                    }
            }
        free(held);
    }
    return ok;
}
#endif
