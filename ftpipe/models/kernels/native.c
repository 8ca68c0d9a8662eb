/* The parts of a decoder layer that are not matrix products, each in one pass over its data. */

#include "native.h"

/* x[n, h] += more (if there is any), out = weight * (x / sqrt(mean(x^2) + eps)), and the quotients' factors in scale[n]. */
void norm(T *x, const T *more, const T *weight, float eps, T *out, float *scale, int64_t n, int64_t h)
{
    EACH_ROW
    for (int64_t i = 0; i < n; i++) {
        T *row = x + i * h, *to = out + i * h;
        float sum = 0;
        if (more) {
            const T *add = more + i * h;
            SIMD
            for (int64_t j = 0; j < h; j++) row[j] = rounded(wide(row[j]) + wide(add[j]));
        }
        _Pragma("omp simd reduction(+:sum)")
        for (int64_t j = 0; j < h; j++) sum += wide(row[j]) * wide(row[j]);
        float factor = scale[i] = 1.0f / sqrtf(sum / h + eps);
        SIMD
        for (int64_t j = 0; j < h; j++) to[j] = rounded(wide(weight[j]) * wide(rounded(wide(row[j]) * factor)));
    }
}

/* The result of `norm` again. */
void scaled(const T *x, const T *weight, const float *scale, T *out, int64_t n, int64_t h)
{
    EACH_ROW
    for (int64_t i = 0; i < n; i++) {
        const T *row = x + i * h;
        T *to = out + i * h;
        float factor = scale[i];
        SIMD
        for (int64_t j = 0; j < h; j++) to[j] = rounded(wide(weight[j]) * wide(rounded(wide(row[j]) * factor)));
    }
}

/* The gradient of x, and `more` (if there is any) added to it; `out` may be `grad`. */
void norm_backward(const T *grad, const T *x, const T *weight, const float *scale, const T *more, T *out, int64_t n, int64_t h)
{
    EACH_ROW
    for (int64_t i = 0; i < n; i++) {
        const T *g = grad + i * h, *row = x + i * h, *add = more ? more + i * h : 0;
        T *to = out + i * h;
        float factor = scale[i], sum = 0;
        _Pragma("omp simd reduction(+:sum)")
        for (int64_t j = 0; j < h; j++) sum += wide(g[j]) * wide(weight[j]) * wide(row[j]);
        float share = sum * factor * factor / h;
        if (add) {
            SIMD
            for (int64_t j = 0; j < h; j++) to[j] = rounded((wide(g[j]) * wide(weight[j]) - wide(row[j]) * share) * factor + wide(add[j]));
        } else {
            SIMD
            for (int64_t j = 0; j < h; j++) to[j] = rounded((wide(g[j]) * wide(weight[j]) - wide(row[j]) * share) * factor);
        }
    }
}

/* out[n, h] = silu(gate) * up, of rows [gate, up] of 2 h. */
void gate(const T *gated, T *out, int64_t n, int64_t h)
{
    EACH_ROW
    for (int64_t i = 0; i < n; i++) {
        const T *g = gated + 2 * i * h, *u = g + h;
        T *to = out + i * h;
        SIMD
        for (int64_t j = 0; j < h; j++) to[j] = rounded(wide(g[j]) * logistic(wide(g[j])) * wide(u[j]));
    }
}

/* Gradients of gate and up, [n, 2 h], from that of their product, grad[n, h]; and the product again, which may be where `grad` is. */
void gate_backward(const T *gated, const T *grad, T *d_gated, T *out, int64_t n, int64_t h)
{
    EACH_ROW
    for (int64_t i = 0; i < n; i++) {
        const T *g = gated + 2 * i * h, *u = g + h, *d = grad + i * h;
        T *dg = d_gated + 2 * i * h, *du = dg + h, *to = out + i * h;
        SIMD
        for (int64_t j = 0; j < h; j++) {
            float a = wide(g[j]), b = wide(u[j]), up = wide(d[j]), s = logistic(a), active = a * s;
            dg[j] = rounded(up * b * s * (1.0f + a * (1.0f - s)));
            du[j] = rounded(up * active);
            to[j] = rounded(active * b);
        }
    }
}

static inline void turn(const T *x, T *to, const T *cosine, const T *sine, int64_t d, float sign)
{
    int64_t half = d / 2;
    SIMD
    for (int64_t j = 0; j < half; j++) {
        float a = wide(x[j]), b = wide(x[j + half]);
        float s = wide(sign > 0 ? sine[j] : sine[j + half]), z = wide(sign > 0 ? sine[j + half] : sine[j]);
        to[j] = rounded(a * wide(cosine[j]) - sign * b * s);
        to[j + half] = rounded(b * wide(cosine[j + half]) + sign * a * z);
    }
}

/* rows[i] = heads[order[i]], of d numbers each; rotary positions (cosine and sine [tokens, d]) in the first `turned` of a token's `count` heads. */
void gather(const T *heads, T *rows, const int64_t *order, const T *cosine, const T *sine, int64_t n, int64_t count, int64_t turned, int64_t d)
{
    EACH_ROW
    for (int64_t i = 0; i < n; i++) {
        int64_t from = order[i], token = from / count;
        if (from % count < turned)
            turn(heads + from * d, rows + i * d, cosine + token * d, sine + token * d, d, 1.0f);
        else
            memcpy(rows + i * d, heads + from * d, d * sizeof(T));
    }
}

/* The gradient of `heads` from that of what `gather` made of them. */
void gather_backward(const T *rows, T *heads, const int64_t *order, const T *cosine, const T *sine, int64_t n, int64_t count, int64_t turned, int64_t d)
{
    EACH_ROW
    for (int64_t i = 0; i < n; i++) {
        int64_t to = order[i], token = to / count;
        if (to % count < turned)
            turn(rows + i * d, heads + to * d, cosine + token * d, sine + token * d, d, -1.0f);
        else
            memcpy(heads + to * d, rows + i * d, d * sizeof(T));
    }
}

/* Rotary positions (cosine and sine [tokens, d]) in the first `turned` of the `count` heads of x[n tokens, count, d], in place; back: its gradient. */
void rotate(T *x, const T *cosine, const T *sine, int64_t n, int64_t count, int64_t turned, int64_t d, int back)
{
    EACH_ROW
    for (int64_t i = 0; i < n; i++)
        for (int64_t h = 0; h < turned; h++) {
            T *head = x + (i * count + h) * d;
            turn(head, head, cosine + i * d, sine + i * d, d, back ? -1.0f : 1.0f);
        }
}

/* In place, probabilities of scores[n, m]: row i is query i % queries, which sees keys starts[i % queries] (0 without starts) to first + i % queries. */
void causal_softmax(T *scores, const int64_t *starts, int64_t n, int64_t m, int64_t queries, int64_t first)
{
    EACH_ROW
    for (int64_t i = 0; i < n; i++) {
        T *row = scores + i * m;
        int64_t q = i % queries, from = starts ? starts[q] : 0, end = first + q + 1;
        float top = -INFINITY, sum = 0;
        _Pragma("omp simd reduction(max:top)")
        for (int64_t j = from; j < end; j++) top = wide(row[j]) > top ? wide(row[j]) : top;
        _Pragma("omp simd reduction(+:sum)")
        for (int64_t j = from; j < end; j++) sum += exponential(wide(row[j]) - top);
        float factor = 1.0f / sum;
        SIMD
        for (int64_t j = from; j < end; j++) row[j] = rounded(exponential(wide(row[j]) - top) * factor);
        memset(row, 0, from * sizeof(T));
        memset(row + end, 0, (m - end) * sizeof(T));
    }
}

/* In place, the gradient of the scores from that of their probabilities p, all [n, m]. */
void causal_softmax_backward(T *grad, const T *p, int64_t n, int64_t m)
{
    EACH_ROW
    for (int64_t i = 0; i < n; i++) {
        T *g = grad + i * m;
        const T *row = p + i * m;
        float sum = 0;
        _Pragma("omp simd reduction(+:sum)")
        for (int64_t j = 0; j < m; j++) sum += wide(g[j]) * wide(row[j]);
        SIMD
        for (int64_t j = 0; j < m; j++) g[j] = rounded(wide(row[j]) * (wide(g[j]) - sum));
    }
}

/* loss[n] = -log softmax(logits)[target] of rows [n, v]; with `wanted` their gradients in place of the logits. */
void token_losses(T *logits, const int64_t *target, float *loss, int64_t n, int64_t v, int wanted)
{
    EACH_ROW
    for (int64_t i = 0; i < n; i++) {
        T *row = logits + i * v;
        float top = -INFINITY, sum = 0, at = wide(row[target[i]]);
        _Pragma("omp simd reduction(max:top)")
        for (int64_t j = 0; j < v; j++) top = wide(row[j]) > top ? wide(row[j]) : top;
        _Pragma("omp simd reduction(+:sum)")
        for (int64_t j = 0; j < v; j++) sum += exponential(wide(row[j]) - top);
        loss[i] = logf(sum) - (at - top);
        if (wanted) {
            float factor = 1.0f / sum;
            SIMD
            for (int64_t j = 0; j < v; j++) row[j] = rounded(exponential(wide(row[j]) - top) * factor);
            row[target[i]] = rounded(exponential(at - top) * factor - 1.0f);
        }
    }
}
