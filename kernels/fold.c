/* The logsumexp fold over a tile of logits on a CPU; kernels/fold_torch.py says what it computes.

   Rows are independent and each is summed in one fixed order, so the result depends neither on how
   rows are shared out nor on who works on them. A block of a row is widened into a buffer that
   stays in the first-level cache: the tile itself is read once, and written once.

   Loops are written so that a compiler vectorizes them without -ffast-math, which would fold the
   two parts of ln 2 into one, break infinities and, in a shared library, switch off subnormal
   numbers for the whole program. */

#include <stdint.h>
#include <string.h>

enum { BLOCK = 2048 };

/* Lowest start of a running maximum: finite, since -inf - -inf is not a number. */
#define LOWEST (-3.0e38f)

typedef struct {
    int64_t columns, stride, start; /* elements; `start` is the vocabulary index of column 0 */
    int32_t is_bf16, is_capped;
    float cap, inv_temperature;
} Tile;

static inline float from_bits(uint32_t bits) {
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

static inline uint32_t to_bits(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return bits;
}

/* `a` where the condition holds and `b` where not, without a branch: compilers that see one follow
   its constant side through what comes after, and then vectorize neither. */
static inline float chosen(int condition, float a, float b) {
    const uint32_t mask = -(uint32_t)(condition != 0);
    return from_bits((to_bits(a) & mask) | (to_bits(b) & ~mask));
}

/* e^x for x <= 0 to 1e-7 relative, and 0 where the power of two below is 2^-127: bits of 0. There
   are (almost) no subnormal numbers, then, which make products slow, and no branch.
   The conversion truncates, so - 0.5 rounds a number that is not above 0 to the nearest integer.
   ln 2 is in two parts, of which the first times the integer is exact. */
static inline float exp_neg(float x) {
    const float kept = chosen(x < -88.0f, -88.0f, x); /* a NaN stays one */
    const int32_t n = (int32_t)(kept * 1.44269504f - 0.5f);
    const float r = (kept - (float)n * 0.693359375f) + (float)n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    return p * from_bits((uint32_t)(n + 127) << 23);
}

/* A Taylor series where 1 - e^-2x would cancel. */
static inline float tanh_(float x) {
    const float a = __builtin_fabsf(x);
    const float e = exp_neg(-2.0f * a);
    const float far = (1.0f - e) / (1.0f + e);
    const float s = a * a;
    const float near =
        a * (1 + s * (-1 / 3.f + s * (2 / 15.f + s * (-17 / 315.f + s * (62 / 2835.f)))));
    return __builtin_copysignf(chosen(a < 0.3f, near, far), x);
}

static void load(const Tile *tile, const void *row, int64_t from, int64_t n, float *z) {
    if (tile->is_bf16) {
        const uint16_t *x = (const uint16_t *)row + from;
        for (int64_t i = 0; i < n; i++) z[i] = from_bits((uint32_t)x[i] << 16);
    } else {
        memcpy(z, (const float *)row + from, n * sizeof(float));
    }
}

static void store(const Tile *tile, void *row, int64_t from, int64_t n, const float *z) {
    if (tile->is_bf16) {
        uint16_t *x = (uint16_t *)row + from;
        for (int64_t i = 0; i < n; i++) {
            const uint32_t bits = to_bits(z[i]); /* to nearest, ties to even; a NaN stays one */
            const uint32_t up = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
            x[i] = (uint16_t)((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : up);
        }
    } else {
        memcpy((float *)row + from, z, n * sizeof(float));
    }
}

static void scale(const Tile *tile, int64_t n, float *z) {
    const float inv_t = tile->inv_temperature;
    if (tile->is_capped) {
        const float cap = tile->cap, inv_cap = 1.0f / tile->cap, out = cap * inv_t;
        for (int64_t i = 0; i < n; i++) z[i] = out * tanh_(z[i] * inv_cap);
    } else if (inv_t != 1.0f) {
        for (int64_t i = 0; i < n; i++) z[i] *= inv_t;
    }
}

/* Compared as integers that are ordered as their floats are: such a maximum vectorizes without
   being told that there is no NaN. (A positive NaN is the highest, and is passed on.) */
static inline int32_t ordered(float x) {
    const int32_t bits = (int32_t)to_bits(x);
    return bits ^ ((bits >> 31) & 0x7fffffff);
}

static inline float highest(const float *z, int64_t n, float so_far) {
    int32_t top = ordered(so_far);
    for (int64_t i = 0; i < n; i++) top = ordered(z[i]) > top ? ordered(z[i]) : top;
    return from_bits((uint32_t)(top ^ ((top >> 31) & 0x7fffffff)));
}

/* In 64 lanes: in the order of the row it could not be vectorized. */
static inline float summed(const float *z, int64_t n) {
    float lane[64] = {0};
    int64_t i = 0;
    for (; i + 64 <= n; i += 64)
        for (int k = 0; k < 64; k++) lane[k] += z[i + k];
    for (int k = 0; i + k < n; k++) lane[k] += z[i + k];
    for (int w = 32; w; w /= 2)
        for (int k = 0; k < w; k++) lane[k] += lane[k + w];
    return lane[0];
}

/* Each of `weighted` (sum of e^z z, z from the maximum on), `total` (of z), `before` (highest z
   before the target) and `squared` (sum of e^2z) may be NULL: then it is not summed. */
void ratchet_fold_forward(const Tile *tile, const void *logits, const int64_t *target,
                          int64_t first, int64_t last, float *max, float *sum, float *of_target,
                          float *weighted, float *total, float *before, float *squared) {
    const int64_t size = tile->is_bf16 ? 2 : 4;
    for (int64_t r = first; r < last; r++) {
        const char *row = (const char *)logits + r * tile->stride * size;
        const int64_t at = target[r] - tile->start;
        float m = max[r], s = sum[r];
        for (int64_t from = 0; from < tile->columns; from += BLOCK) {
            const int64_t left = tile->columns - from, n = left < BLOCK ? left : BLOCK;
            float z[BLOCK];
            load(tile, row, from, n, z);
            scale(tile, n, z);
            if (at >= from && at < from + n) of_target[r] = z[at - from];
            if (before && at > from)
                before[r] = highest(z, at - from < n ? at - from : n, before[r]);
            if (total) total[r] += summed(z, n);
            const float up = highest(z, n, m);
            const float shrink = exp_neg(m - up);
            float p[BLOCK];
            for (int64_t i = 0; i < n; i++) p[i] = exp_neg(z[i] - up);
            if (weighted) {
                for (int64_t i = 0; i < n; i++) /* 0 times -inf is not a number */
                    z[i] = p[i] * chosen(z[i] - up < LOWEST, LOWEST, z[i] - up);
                weighted[r] = (weighted[r] + s * (m - up)) * shrink + summed(z, n);
            }
            if (squared) {
                for (int64_t i = 0; i < n; i++) z[i] = p[i] * p[i];
                squared[r] = squared[r] * shrink * shrink + summed(z, n);
            }
            s = s * shrink + summed(p, n);
            m = up;
        }
        max[r] = m;
        sum[r] = s;
    }
}

void ratchet_fold_backward(const Tile *tile, void *logits, const int64_t *target, int64_t first,
                           int64_t last, const float *max, const float *log_sum, const float *grad) {
    const int64_t size = tile->is_bf16 ? 2 : 4;
    for (int64_t r = first; r < last; r++) {
        char *row = (char *)logits + r * tile->stride * size;
        const int64_t at = target[r] - tile->start;
        const float m = max[r], ls = log_sum[r], g = grad[r] * tile->inv_temperature;
        const float inv_out = 1.0f / (tile->cap * tile->inv_temperature);
        for (int64_t from = 0; from < tile->columns; from += BLOCK) {
            const int64_t left = tile->columns - from, n = left < BLOCK ? left : BLOCK;
            float z[BLOCK], d[BLOCK];
            load(tile, row, from, n, z);
            scale(tile, n, z);
            for (int64_t i = 0; i < n; i++) {
                const float over = z[i] - m - ls; /* above 0 by rounding alone */
                d[i] = -g * exp_neg(chosen(over > 0, 0, over));
            }
            if (at >= from && at < from + n) d[at - from] += g;
            if (tile->is_capped)
                for (int64_t i = 0; i < n; i++) {
                    const float t = z[i] * inv_out;
                    d[i] *= 1.0f - t * t;
                }
            store(tile, row, from, n, d);
        }
    }
}
