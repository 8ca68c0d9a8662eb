#pragma once
/* What the parts of a decoder layer in C have in common.

   Compiled for one type of tensor at a time: bfloat16, or float where FLOAT32 is defined. All arithmetic is in float, and results are rounded once.
   Work is shared out among OpenMP's threads, of which the caller has as many as torch gave it; the code is linked with no OpenMP, so that it finds torch's
   own and not a second set of threads. */

#include <math.h>
#include <stdint.h>
#include <string.h>

#ifdef FLOAT32
typedef float T;
static inline float wide(T x) { return x; }
static inline T rounded(float x) { return x; }
#else
typedef uint16_t T;
static inline float wide(T x)
{
    union { uint32_t bits; float value; } u = { (uint32_t)x << 16 };
    return u.value;
}
static inline T rounded(float x) /* to nearest, ties to even */
{
    union { float value; uint32_t bits; } u = { x };
    return (T)((u.bits + 0x7fff + ((u.bits >> 16) & 1)) >> 16);
}
#endif

#define EACH_ROW _Pragma("omp parallel for schedule(static)")
#define SIMD _Pragma("omp simd")

/* e^x within 2 units in the last place for x from -87 to 88, beyond them that of the nearer end; NaN of NaN. */
static inline float exponential(float x)
{
    x = x < -87.0f ? -87.0f : x > 88.0f ? 88.0f : x;
    float n = rintf(x * 1.44269504f);
    float r = x - n * 0.693359375f + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    union { int32_t bits; float value; } two = { ((int32_t)n + 127) << 23 };
    return p * two.value;
}

static inline float logistic(float x) { return 1.0f / (1.0f + exponential(-x)); }
