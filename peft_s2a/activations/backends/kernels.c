/* The ops of `peft_s2a.activations.ops` for CPUs, fused: each reads its input once and writes codes, without temporaries.
 *
 * The file includes itself once for every element type T. Codes, groups, packing and random numbers are those of `codec.py`,
 * whose docstrings define them. `threads` is torch's number of threads.
 */
#ifndef T

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef _OPENMP
#include <omp.h>
#endif

#define BLOCK 512
#define INLINE static inline __attribute__((always_inline))
#define EXPORT __attribute__((visibility("default")))
#define MIN(a, b) ((a) < (b) ? (a) : (b))
#define CAT_(a, b) a##_##b
#define CAT(a, b) CAT_(a, b)
#define NAME(function) CAT(function, SUFFIX)

static inline float bf16_to_float(uint16_t bits) {
    union { uint32_t i; float f; } word = {(uint32_t)bits << 16};
    return word.f;
}

static inline uint16_t float_to_bf16(float value) {
    union { float f; uint32_t i; } word = {value};
    if (value != value) return 0x7FC0;
    return (uint16_t)((word.i + 0x7FFF + (word.i >> 16 & 1)) >> 16);
}

static inline uint32_t hash32(uint32_t x) {
    x = (x ^ x >> 16) * 0x7FEB352Du;
    x = (x ^ x >> 15) * 0x846CA68Bu;
    return x ^ x >> 16;
}

/* The number in [0, 1) that decides the rounding at `position`; 0.5, which rounds to nearest, without a seed. */
static inline float threshold_at(const int64_t *seed, uint32_t position) {
    if (!seed) return 0.5f;
    uint32_t low = (uint32_t)*seed, high = (uint32_t)((uint64_t)*seed >> 32);
    return (float)(hash32(hash32(position + low) ^ high) >> 8) * 0x1p-24f;
}

static inline long packed_width(long count, int bits) {
    if (bits == 3) return packed_width(count, 2) + packed_width(count, 1);
    long per_byte = 8 / bits;
    return (count + per_byte - 1) / per_byte;
}

static void pack_row(const uint8_t *codes, long count, int bits, uint8_t *out) {
    if (bits == 8) {
        memcpy(out, codes, count);
        return;
    }
    if (bits == 3) { /* two low bits first, then the high ones */
        long low = packed_width(count, 2), high = packed_width(count, 1);
        memset(out, 0, low + high);
        for (int s = 0; s < 4; s++)
            for (long j = 0, n = MIN(low, count - s * low); j < n; j++) out[j] |= (codes[s * low + j] & 3) << 2 * s;
        for (int s = 0; s < 8; s++)
            for (long j = 0, n = MIN(high, count - s * high); j < n; j++) out[low + j] |= (codes[s * high + j] >> 2) << s;
        return;
    }
    long width = packed_width(count, bits);
    for (int s = 0; s < 8 / bits; s++) {
        long n = MIN(width, count - s * width);
        if (s == 0) memcpy(out, codes, n > 0 ? n : 0);
        else
            for (long j = 0; j < n; j++) out[j] |= codes[s * width + j] << s * bits;
    }
}

static void unpack_row(const uint8_t *packed, long count, int bits, uint8_t *codes) {
    if (bits == 8) {
        memcpy(codes, packed, count);
        return;
    }
    if (bits == 3) {
        long low = packed_width(count, 2), high = packed_width(count, 1);
        for (int s = 0; s < 4; s++)
            for (long j = 0, n = MIN(low, count - s * low); j < n; j++) codes[s * low + j] = packed[j] >> 2 * s & 3;
        for (int s = 0; s < 8; s++)
            for (long j = 0, n = MIN(high, count - s * high); j < n; j++)
                codes[s * high + j] |= (packed[low + j] >> s & 1) << 2;
        return;
    }
    long width = packed_width(count, bits);
    uint8_t mask = (uint8_t)((1 << bits) - 1);
    for (int s = 0; s < 8 / bits; s++)
        for (long j = 0, n = MIN(width, count - s * width); j < n; j++) codes[s * width + j] = packed[j] >> s * bits & mask;
}

typedef float vector16 __attribute__((vector_size(64)));
typedef float loose16 __attribute__((vector_size(64), aligned(4))); /* anywhere in memory */
typedef int32_t index16 __attribute__((vector_size(64)));

#define UNIT_GROUPS 4

static inline long scales_width(long groups) { return (groups + UNIT_GROUPS - 1) / UNIT_GROUPS + 2 * groups; }

/* The unit that the bounds of up to four groups are multiples of, see `codec.py`. */
static inline float decode_unit(uint8_t exponent) {
    union { uint32_t i; float f; } word = {(uint32_t)exponent << 23};
    return word.f;
}

static inline float encode_unit(float largest, uint8_t *exponent) {
    union { float f; uint32_t i; } word = {largest / 127};
    *exponent = (uint8_t)((MIN(word.i, 0x7F800000u) + 0x7FFFFF) >> 23);
    return decode_unit(*exponent);
}

static inline float encode_bound(float bound, float inverse_unit, int8_t *kept) {
    float rounded = rintf(bound * inverse_unit);
    *kept = (int8_t)(rounded < -127 ? -127 : rounded > 127 ? 127 : rounded);
    return (float)*kept;
}

INLINE vector16 smaller16(vector16 a, vector16 b) {
    index16 take = a < b;
    return (vector16)(((index16)a & take) | ((index16)b & ~take));
}

static inline void range_of(const float *x, long n, float *low, float *high) {
    float a = x[0], b = x[0];
    long i = 1;
    if (n >= 16) {
        vector16 lows = *(const loose16 *)x, negated = -lows;
        for (i = 16; i + 16 <= n; i += 16) {
            vector16 next = *(const loose16 *)(x + i);
            lows = smaller16(lows, next), negated = smaller16(negated, -next);
        }
        static const index16 swaps[4] = {{8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7},
                                         {4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11},
                                         {2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13},
                                         {1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14}};
        for (int k = 0; k < 4; k++) {
            lows = smaller16(lows, __builtin_shuffle(lows, swaps[k]));
            negated = smaller16(negated, __builtin_shuffle(negated, swaps[k]));
        }
        a = lows[0], b = -negated[0];
    }
    for (; i < n; i++) a = x[i] < a ? x[i] : a, b = x[i] > b ? x[i] : b;
    *low = a, *high = b;
}

typedef uint8_t bytes16 __attribute__((vector_size(16)));

INLINE void codes_of_16(const float *x, float offset, float inverse_step, vector16 threshold, float top, uint8_t *codes) {
    const vector16 zero = {0};
    vector16 unit = (*(const loose16 *)x - offset) * inverse_step + threshold;
    unit = smaller16(unit, zero + top);
    unit = (vector16)((index16)unit & (unit > zero));
    bytes16 rounded = __builtin_convertvector(__builtin_convertvector(unit, index16), bytes16);
    memcpy(codes, &rounded, 16);
}

/* Code one row in groups: its scales to `scales`, one code a byte to `codes`. */
static void encode_row(const float *x, long count, int bits, long group, const int64_t *seed, uint32_t position,
                       uint8_t *scales, uint8_t *codes) {
    float top = (float)((1 << bits) - 1);
    long groups = (count + group - 1) / group, units = (groups + UNIT_GROUPS - 1) / UNIT_GROUPS;
    int8_t *lows = (int8_t *)scales + units, *highs = lows + groups;
    for (long u = 0; u < units; u++) {
        float low[UNIT_GROUPS], high[UNIT_GROUPS], offset[UNIT_GROUPS], inverse[UNIT_GROUPS], largest = 0;
        long first = u * UNIT_GROUPS, n_groups = MIN(UNIT_GROUPS, groups - first);
        for (long g = 0; g < n_groups; g++) {
            long start = (first + g) * group;
            range_of(x + start, MIN(group, count - start), &low[g], &high[g]);
            float magnitude = fabsf(low[g]) > fabsf(high[g]) ? fabsf(low[g]) : fabsf(high[g]);
            largest = magnitude > largest ? magnitude : largest;
        }
        float unit = encode_unit(largest, scales + u), inverse_unit = unit == 0 ? 0 : 1 / unit;
        for (long g = 0; g < n_groups; g++) {
            float a = encode_bound(low[g], inverse_unit, lows + first + g);
            float b = encode_bound(high[g], inverse_unit, highs + first + g);
            float step = (b - a) * unit / top;
            offset[g] = a * unit, inverse[g] = step == 0 ? 0 : 1 / step;
        }
        for (long g = 0; g < n_groups; g++) {
            long start = (first + g) * group, n = MIN(group, count - start), i = 0;
            const float *v = x + start;
            for (; i + 16 <= n; i += 16) {
                vector16 threshold;
                for (int k = 0; k < 16; k++) threshold[k] = threshold_at(seed, position + (uint32_t)(start + i + k));
                codes_of_16(v + i, offset[g], inverse[g], threshold, top, codes + start + i);
            }
            for (; i < n; i++) { /* truncation is floor: negative values are cut to 0 */
                float code = (v[i] - offset[g]) * inverse[g] + threshold_at(seed, position + (uint32_t)(start + i));
                codes[start + i] = (uint8_t)(int)(code < 0 ? 0 : code > top ? top : code);
            }
        }
    }
}

static void decode_row(const uint8_t *codes, const uint8_t *scales, long count, int bits, long group, float *out) {
    float top = (float)((1 << bits) - 1);
    long groups = (count + group - 1) / group, units = (groups + UNIT_GROUPS - 1) / UNIT_GROUPS;
    const int8_t *lows = (const int8_t *)scales + units, *highs = lows + groups;
    for (long g = 0; g < groups; g++) {
        long start = g * group, n = MIN(group, count - start);
        float unit = decode_unit(scales[g / UNIT_GROUPS]), offset = lows[g] * unit;
        float step = (float)(highs[g] - lows[g]) * unit / top;
        if (n == 16)
            for (long i = 0; i < 16; i++) out[start + i] = (float)codes[start + i] * step + offset;
        else
            for (long i = 0; i < n; i++) out[start + i] = (float)codes[start + i] * step + offset;
    }
}

#define PAD16(n) (((n) + 15) / 16 * 16)

/* One tile of a matrix product, in registers: c[r, 16 v] (+)= sum over k of a[r, k] b[k, 16 v]. */
INLINE void product_tile(int rows, int vectors, const float *a, long a_row, long a_step, const float *b, long b_step,
                         long inner, float *c, long c_row, int add) {
    vector16 sums[6][4];
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < vectors; v++)
            sums[r][v] = add ? (vector16) * (loose16 *)(c + r * c_row + 16 * v) : (vector16){0};
    for (long k = 0; k < inner; k++) {
        vector16 right[4];
        for (int v = 0; v < vectors; v++) right[v] = *(const loose16 *)(b + k * b_step + 16 * v);
        for (int r = 0; r < rows; r++)
            for (int v = 0; v < vectors; v++) sums[r][v] += a[r * a_row + k * a_step] * right[v];
    }
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < vectors; v++) *(loose16 *)(c + r * c_row + 16 * v) = sums[r][v];
}

INLINE void product_columns(int vectors, long rows, const float *a, long a_row, long a_step, const float *b, long b_step,
                            long inner, float *c, long c_row, int add) {
    long i = 0;
    for (; i + 6 <= rows; i += 6)
        product_tile(6, vectors, a + i * a_row, a_row, a_step, b, b_step, inner, c + i * c_row, c_row, add);
    a += i * a_row, c += i * c_row;
    switch (rows - i) {
    case 5: product_tile(5, vectors, a, a_row, a_step, b, b_step, inner, c, c_row, add); break;
    case 4: product_tile(4, vectors, a, a_row, a_step, b, b_step, inner, c, c_row, add); break;
    case 3: product_tile(3, vectors, a, a_row, a_step, b, b_step, inner, c, c_row, add); break;
    case 2: product_tile(2, vectors, a, a_row, a_step, b, b_step, inner, c, c_row, add); break;
    case 1: product_tile(1, vectors, a, a_row, a_step, b, b_step, inner, c, c_row, add); break;
    }
}

/* c (+)= a b, with `columns` (of b and c) a multiple of 16; element [i, k] of a lies at i * a_row + k * a_step */
static void product(long rows, long columns, long inner, const float *a, long a_row, long a_step, const float *b, long b_row,
                    float *c, long c_row, int add) {
    long j = 0;
#ifdef __AVX512F__ /* enough registers for four vectors beside six rows */
    for (; j + 64 <= columns; j += 64) product_columns(4, rows, a, a_row, a_step, b + j, b_row, inner, c + j, c_row, add);
    for (; j + 32 <= columns; j += 32) product_columns(2, rows, a, a_row, a_step, b + j, b_row, inner, c + j, c_row, add);
#endif
    for (; j < columns; j += 16) product_columns(1, rows, a, a_row, a_step, b + j, b_row, inner, c + j, c_row, add);
}

/* exp for x <= 0, to within a few units in the last place; below -87 it is 0. After the range reduction a polynomial
 * (coefficients of expf in the Cephes library, Moshier 1992). */
INLINE vector16 exp16(vector16 x) {
    index16 kept = x > -87.0f;
    index16 n = __builtin_convertvector(x * 1.44269504f - 0.5f, index16) & kept; /* truncation rounds to nearest here */
    vector16 whole = __builtin_convertvector(n, vector16);
    vector16 r = x - whole * 0.693359375f + whole * 2.12194440e-4f;
    vector16 p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = (p * r * r + r + 1) * (vector16)((n + 127) << 23);
    return (vector16)((index16)p & kept);
}

static inline float sum16(vector16 x) {
    float sum = 0;
    for (int k = 0; k < 16; k++) sum += x[k];
    return sum;
}

/* The softmax of a row of `count` scores, in place; a row of nothing but minus infinity becomes zeros. Up to the next multiple of
 * 16 it is filled with zeros. */
static void softmax_row(float *x, long count) {
    float top = -INFINITY;
    long padded = PAD16(count);
    if (!count) return;
    for (long i = count; i < padded; i++) x[i] = -INFINITY;
    vector16 tops = *(loose16 *)x;
    for (long i = 16; i < padded; i += 16) {
        vector16 v = *(loose16 *)(x + i);
        index16 larger = v > tops;
        tops = (vector16)(((index16)v & larger) | ((index16)tops & ~larger));
    }
    for (int k = 0; k < 16; k++) top = tops[k] > top ? tops[k] : top;
    if (top == -INFINITY) {
        memset(x, 0, padded * sizeof(float));
        return;
    }
    vector16 sums = {0};
    for (long i = 0; i < padded; i += 16) {
        vector16 e = exp16(*(loose16 *)(x + i) - top);
        *(loose16 *)(x + i) = e, sums += e;
    }
    float scale = 1 / sum16(sums);
    for (long i = 0; i < padded; i += 16) *(loose16 *)(x + i) *= scale;
}

/* d = p * (d - sum(p * d)), the gradient of the scores behind the probabilities p */
static void softmax_row_backward(const float *p, float *d, long padded) {
    vector16 sums = {0};
    for (long i = 0; i < padded; i += 16) sums += *(loose16 *)(p + i) * *(loose16 *)(d + i);
    float sum = sum16(sums);
    for (long i = 0; i < padded; i += 16) *(loose16 *)(d + i) = *(loose16 *)(p + i) * (*(loose16 *)(d + i) - sum);
}

static void transpose(const float *x, long rows, long columns, long x_row, float *out, long out_row) {
    for (long i = 0; i < rows; i++)
        for (long j = 0; j < columns; j++) out[j * out_row + i] = x[i * x_row + j];
}

/* Queries, keys or values of one head: [rows, PAD16(count)], filled up with zeros. */
static void decode_head(const uint8_t *packed, const uint8_t *scales, const uint16_t *mean, long rows, long count, int bits,
                        long group, float factor, uint8_t *codes, float *out) {
    long width = packed_width(count, bits), stride = scales_width((count + group - 1) / group), row = PAD16(count);
    for (long n = 0; n < rows; n++, out += row) {
        unpack_row(packed + n * width, count, bits, codes);
        decode_row(codes, scales + n * stride, count, bits, group, out);
        if (mean)
            for (long i = 0; i < count; i++) out[i] += bf16_to_float(mean[i]);
        if (factor != 1)
            for (long i = 0; i < count; i++) out[i] *= factor;
        memset(out + count, 0, (row - count) * sizeof(float));
    }
}

typedef struct {
    const uint8_t *packed, *scales;
    const uint16_t *mean; /* may be null */
} Coded;

/* How many query rows attention takes at a time: their scores shall stay in the cache. */
static long rows_at_a_time(long length, long keys) {
    long most = keys ? 24576 / PAD16(keys) : length;
    if (most < 6) most = 6;
    long tiles = (length + most - 1) / most;
    return tiles ? (length + tiles - 1) / tiles : 0;
}

/* Floats of room that one thread of `attention_backward` needs. */
EXPORT long attention_workspace(long length, long keys, long dim, long value_dim) {
    long rows = rows_at_a_time(length, keys), e = PAD16(dim), ev = PAD16(value_dim), s = PAD16(keys);
    return length * e + 2 * keys * e + keys * ev + (dim + value_dim) * s + rows * (2 * s + e + ev) + PAD16(e + ev);
}

#define T float
#define SUFFIX float32
#define LOAD(x) (x)
#define STORE(x) (x)
#include "kernels.c"
#undef T
#undef SUFFIX
#undef LOAD
#undef STORE

#define T uint16_t
#define SUFFIX bfloat16
#define LOAD(x) bf16_to_float(x)
#define STORE(x) float_to_bf16(x)
#include "kernels.c"
#undef T
#undef SUFFIX
#undef LOAD
#undef STORE

#ifdef __FLT16_MANT_DIG__
#define T _Float16
#define SUFFIX float16
#define LOAD(x) ((float)(x))
#define STORE(x) ((_Float16)(x))
#include "kernels.c"
#undef T
#undef SUFFIX
#undef LOAD
#undef STORE
#endif

#else /* the part that is compiled for every T */

/* codes[i] = first + sum of the deltas of all thresholds below x[i] */
static void NAME(step_codes)(const T *x, long n, const float *thresholds, const int32_t *deltas, int count, int first,
                             uint8_t *codes) {
    float values[BLOCK];
    int32_t sums[BLOCK];
    long i = 0;
    for (long k = 0; k < n; k++) values[k] = LOAD(x[k]);
#ifdef __AVX512F__ /* a binary search in registers: up to 31 thresholds fit into two */
    if (count < 32) {
        vector16 edges[2];
        index16 table[2];
        for (int t = 0, code = first; t < 32; t++) {
            edges[t / 16][t % 16] = t < count ? thresholds[t] : INFINITY;
            table[t / 16][t % 16] = code;
            code += t < count ? deltas[t] : 0;
        }
        for (; i + 16 <= n; i += 16) {
            vector16 v = *(loose16 *)(values + i);
            index16 below = {0};
            for (int step = 16; step; step /= 2)
                below += (v > __builtin_shuffle(edges[0], edges[1], below + (step - 1))) & step;
            bytes16 found = __builtin_convertvector(__builtin_shuffle(table[0], table[1], below), bytes16);
            memcpy(codes + i, &found, 16);
        }
    }
#endif
    for (long k = i; k < n; k++) sums[k] = first;
    for (int t = 0; t < count; t++) {
        float threshold = thresholds[t];
        int32_t delta = deltas[t];
        for (long k = i; k < n; k++) sums[k] += values[k] > threshold ? delta : 0;
    }
    for (; i < n; i++) codes[i] = (uint8_t)sums[i];
}

EXPORT void NAME(encode_steps)(const T *x, long count, const float *thresholds, const int32_t *deltas, int n_thresholds,
                               int first, int bits, uint8_t *out, uint8_t *scratch, int threads) {
    if (bits == 3) { /* two layouts at once: through one code a byte */
#pragma omp parallel for num_threads(threads) schedule(static)
        for (long j = 0; j < count; j += BLOCK)
            NAME(step_codes)(x + j, MIN(BLOCK, count - j), thresholds, deltas, n_thresholds, first, scratch + j);
        pack_row(scratch, count, bits, out);
        return;
    }
    long width = packed_width(count, bits);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long j = 0; j < width; j += BLOCK) {
        uint8_t codes[BLOCK];
        long size = MIN(BLOCK, width - j);
        memset(out + j, 0, size);
        for (int s = 0; s < 8 / bits; s++) {
            long begin = s * width + j, n = MIN(size, count - begin);
            if (n <= 0) break;
            NAME(step_codes)(x + begin, n, thresholds, deltas, n_thresholds, first, codes);
            for (long i = 0; i < n; i++) out[j + i] |= codes[i] << s * bits;
        }
    }
}

static void NAME(scale_block)(const T *grad, const uint8_t *codes, long n, const float *levels, T *out) {
    for (long i = 0; i < n; i++) out[i] = STORE(LOAD(grad[i]) * levels[codes[i]]);
}

EXPORT void NAME(scale_by_levels)(const T *grad, const uint8_t *packed, long count, const float *levels, int bits, T *out,
                                  uint8_t *scratch, int threads) {
    if (bits == 3) {
        unpack_row(packed, count, bits, scratch);
#pragma omp parallel for num_threads(threads) schedule(static)
        for (long j = 0; j < count; j += BLOCK)
            NAME(scale_block)(grad + j, scratch + j, MIN(BLOCK, count - j), levels, out + j);
        return;
    }
    long width = packed_width(count, bits);
    uint8_t mask = (uint8_t)((1 << bits) - 1);
    vector16 table;
    memcpy(&table, levels, sizeof table);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long j = 0; j < width; j += BLOCK) {
        long size = MIN(BLOCK, width - j);
        for (int s = 0; s < 8 / bits; s++) {
            long begin = s * width + j, n = MIN(size, count - begin), i = 0;
            if (n <= 0) break;
            if (bits <= 4) /* sixteen look-ups in a register at a time */
                for (; i + 16 <= n; i += 16) {
                    index16 index;
                    vector16 value;
                    for (int k = 0; k < 16; k++) index[k] = packed[j + i + k] >> s * bits & mask;
                    for (int k = 0; k < 16; k++) value[k] = LOAD(grad[begin + i + k]);
                    value *= __builtin_shuffle(table, index);
                    for (int k = 0; k < 16; k++) out[begin + i + k] = STORE(value[k]);
                }
            for (; i < n; i++)
                out[begin + i] = STORE(LOAD(grad[begin + i]) * levels[packed[j + i] >> s * bits & mask]);
        }
    }
}

/* mode 0: the rows as they are; 1: centred and divided by their deviation; 2: divided by their root mean square. `columns`: means,
 * then deviations, that the columns are standardised by; may be null. */
EXPORT void NAME(encode_rows)(const T *x, long rows, long count, int mode, float eps, int bits, long group,
                              const int64_t *seed, const float *columns, uint8_t *packed, uint8_t *scales,
                              float *rstd, int threads) {
    long width = packed_width(count, bits), stride = scales_width((count + group - 1) / group);
#pragma omp parallel num_threads(threads)
    {
        float *values = malloc(count * (sizeof(float) + 1) + 1);
        uint8_t *codes = (uint8_t *)(values + count);
#pragma omp for schedule(static)
        for (long r = 0; r < rows; r++) {
            const T *row = x + r * count;
            float sum = 0, squares = 0;
            for (long i = 0; i < count; i++) values[i] = LOAD(row[i]);
            if (mode) {
                if (mode == 1) {
                    for (long i = 0; i < count; i++) sum += values[i];
                    float mean = sum / count;
                    for (long i = 0; i < count; i++) values[i] -= mean;
                }
                for (long i = 0; i < count; i++) squares += values[i] * values[i];
                float scale = 1 / sqrtf(squares / count + eps);
                for (long i = 0; i < count; i++) values[i] *= scale;
                rstd[r] = scale;
            }
            if (columns)
                for (long i = 0; i < count; i++) values[i] = (values[i] - columns[i]) / columns[count + i];
            encode_row(values, count, bits, group, seed, (uint32_t)(r * count), scales + r * stride, codes);
            pack_row(codes, count, bits, packed + r * width);
        }
        free(values);
    }
}

EXPORT void NAME(decode_rows)(const uint8_t *packed, const uint8_t *scales, long rows, long count, int bits, long group,
                              T *out, int threads) {
    long width = packed_width(count, bits), stride = scales_width((count + group - 1) / group);
#pragma omp parallel num_threads(threads)
    {
        float *values = malloc(count * (sizeof(float) + 1) + 1);
        uint8_t *codes = (uint8_t *)(values + count);
#pragma omp for schedule(static)
        for (long r = 0; r < rows; r++) {
            unpack_row(packed + r * width, count, bits, codes);
            decode_row(codes, scales + r * stride, count, bits, group, values);
            for (long i = 0; i < count; i++) out[r * count + i] = STORE(values[i]);
        }
        free(values);
    }
}

/* columns, weight, d_x, d_weight and d_bias may be null. The sums over rows are made per thread and added up in order. */
EXPORT void NAME(norm_backward)(const T *grad, const uint8_t *packed, const uint8_t *scales, const float *rstd,
                                const float *columns, const float *weight, long rows, long count, int center, int bits,
                                long group, T *d_x, float *d_weight, float *d_bias, float *sums, int threads) {
    long width = packed_width(count, bits), stride = scales_width((count + group - 1) / group);
    long share = (rows + threads - 1) / threads;
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (int thread = 0; thread < threads; thread++) {
        float *values = malloc(count * (2 * sizeof(float) + 1) + 1), *g = values + count;
        uint8_t *codes = (uint8_t *)(g + count);
        float *weight_sum = sums + 2 * thread * count, *bias_sum = weight_sum + count;
        for (long r = thread * share; r < MIN(rows, (thread + 1) * share); r++) {
            const T *dy = grad + r * count;
            if (d_x || d_weight) {
                unpack_row(packed + r * width, count, bits, codes);
                decode_row(codes, scales + r * stride, count, bits, group, values);
                if (columns)
                    for (long i = 0; i < count; i++) values[i] = values[i] * columns[count + i] + columns[i];
            }
            for (long i = 0; i < count; i++) g[i] = LOAD(dy[i]);
            if (d_weight)
                for (long i = 0; i < count; i++) weight_sum[i] += g[i] * values[i];
            if (d_bias)
                for (long i = 0; i < count; i++) bias_sum[i] += g[i];
            if (!d_x) continue;
            if (weight)
                for (long i = 0; i < count; i++) g[i] *= weight[i];
            float along = 0, mean = 0;
            for (long i = 0; i < count; i++) along += g[i] * values[i];
            if (center)
                for (long i = 0; i < count; i++) mean += g[i];
            along /= count, mean /= count;
            for (long i = 0; i < count; i++) d_x[r * count + i] = STORE((g[i] - values[i] * along - mean) * rstd[r]);
        }
        free(values);
    }
    for (int thread = 0; thread < threads; thread++)
        for (long i = 0; i < count; i++) {
            if (d_weight) d_weight[i] += sums[2 * thread * count + i];
            if (d_bias) d_bias[i] += sums[(2 * thread + 1) * count + i];
        }
}

/* x[b, h, n, d] lies at b * stride_b + h * stride_h + n * stride_n + d; mean is bfloat16 [B, H, D] */
EXPORT void NAME(encode_heads)(const T *x, long samples, long heads, long tokens, long count, long stride_b, long stride_h,
                               long stride_n, int center, int bits, long group, const int64_t *seed, uint8_t *packed,
                               uint8_t *scales, uint16_t *mean, int threads) {
    long width = packed_width(count, bits), stride = scales_width((count + group - 1) / group);
#pragma omp parallel num_threads(threads)
    {
        float *values = malloc(count * (2 * sizeof(float) + 1) + 1), *average = values + count;
        uint8_t *codes = (uint8_t *)(average + count);
#pragma omp for schedule(static)
        for (long head = 0; head < samples * heads; head++) {
            const T *start = x + head / heads * stride_b + head % heads * stride_h;
            for (long i = 0; i < count; i++) average[i] = 0;
            if (center && tokens) {
                for (long n = 0; n < tokens; n++)
                    for (long i = 0; i < count; i++) average[i] += LOAD(start[n * stride_n + i]);
                for (long i = 0; i < count; i++) {
                    uint16_t rounded = float_to_bf16(average[i] / tokens);
                    average[i] = bf16_to_float(rounded);
                    if (mean) mean[head * count + i] = rounded;
                }
            }
            for (long n = 0; n < tokens; n++) {
                long row = head * tokens + n;
                for (long i = 0; i < count; i++) values[i] = LOAD(start[n * stride_n + i]) - average[i];
                encode_row(values, count, bits, group, seed, (uint32_t)(row * count), scales + row * stride, codes);
                pack_row(codes, count, bits, packed + row * width);
            }
        }
        free(values);
    }
}

/* Mean and deviation of the columns of the normalised rows x[0], x[every], ...; see `codec.column_statistics`. */
EXPORT void NAME(column_statistics)(const T *x, long rows, long count, long every, int center, float eps, uint16_t *out) {
    double *sums = calloc(2 * count, sizeof(double)), *squares = sums + count;
    float *values = malloc(count * sizeof(float) + 1);
    long used = 0;
    for (long r = 0; r < rows; r += every, used++) {
        float mean = 0, square = 0;
        for (long i = 0; i < count; i++) values[i] = LOAD(x[r * count + i]);
        if (center)
            for (long i = 0; i < count; i++) mean += values[i];
        mean /= count;
        for (long i = 0; i < count; i++) values[i] -= mean, square += values[i] * values[i];
        float scale = 1 / sqrtf(square / count + eps);
        for (long i = 0; i < count; i++) {
            float value = values[i] * scale;
            sums[i] += value, squares[i] += (double)value * value;
        }
    }
    for (long i = 0; i < count; i++) {
        double mean = sums[i] / used, var = squares[i] / used - mean * mean;
        out[i] = float_to_bf16((float)mean);
        out[count + i] = float_to_bf16((float)sqrt((var < 0 ? 0 : var) + 0.05 * 0.05));
    }
    free(sums), free(values);
}

/* See `attention.py`. grad[b, h, n, d] lies at b * grad_strides[0] + h * grad_strides[1] + n * grad_strides[2] + d; the mask's strides
 * are four. Results are [B, N, H, D]. `room`: `attention_workspace` floats for every thread. */
EXPORT void NAME(attention_backward)(const T *grad, const long *grad_strides, const Coded *query, const Coded *key,
                                     const Coded *value, const float *mask, const long *mask_strides, int causal,
                                     float scale, int bits, long group, long samples, long heads, long length, long keys,
                                     long dim, long value_dim, T *d_query, T *d_key, T *d_value, float *room, int threads) {
    long e = PAD16(dim), ev = PAD16(value_dim), s = PAD16(keys), most = rows_at_a_time(length, keys);
    long size = attention_workspace(length, keys, dim, value_dim);
#pragma omp parallel num_threads(threads)
    {
        long thread = 0;
#ifdef _OPENMP
        thread = omp_get_thread_num();
#endif
        float *q = room + thread * size, *k = q + length * e, *dk = k + keys * e, *dv = dk + keys * e;
        float *kt = dv + keys * ev, *vt = kt + dim * s, *p = vt + value_dim * s, *ds = p + most * s, *dq = ds + most * s;
        float *dout = dq + most * e;
        uint8_t *codes = (uint8_t *)(dout + most * ev);
        memset(kt, 0, (dim + value_dim) * s * sizeof(float));
#pragma omp for schedule(dynamic)
        for (long head = 0; head < samples * heads; head++) {
            long b = head / heads, h = head % heads;
#define DECODE(coded, rows, count, factor, out)                                                                        \
    decode_head(coded->packed + head * rows * packed_width(count, bits),                                               \
                coded->scales + head * rows * scales_width((count + group - 1) / group),                               \
                coded->mean ? coded->mean + head * count : NULL, rows, count, bits, group, factor, codes, out)
            DECODE(value, keys, value_dim, 1, dv); /* until its own use, room for the values */
            transpose(dv, keys, value_dim, ev, vt, s);
            DECODE(query, length, dim, scale, q);
            DECODE(key, keys, dim, 1, k);
            transpose(k, keys, dim, e, kt, s);
            for (long start = 0; start < length; start += most) {
                long rows = MIN(most, length - start);
                const float *q_rows = q + start * e;
                for (long i = 0; i < rows; i++) {
                    const T *from = grad + b * grad_strides[0] + h * grad_strides[1] + (start + i) * grad_strides[2];
                    for (long j = 0; j < value_dim; j++) dout[i * ev + j] = LOAD(from[j]);
                    for (long j = value_dim; j < ev; j++) dout[i * ev + j] = 0;
                }
                product(rows, s, dim, q_rows, e, 1, kt, s, p, s, 0);
                product(rows, s, value_dim, dout, ev, 1, vt, s, ds, s, 0);
                for (long i = 0; i < rows; i++) {
                    float *row = p + i * s;
                    if (mask) {
                        const float *term = mask + b * mask_strides[0] + h * mask_strides[1] + (start + i) * mask_strides[2];
                        if (mask_strides[3] == 1)
                            for (long j = 0; j < keys; j++) row[j] += term[j];
                        else
                            for (long j = 0; j < keys; j++) row[j] += term[j * mask_strides[3]];
                    }
                    if (causal)
                        for (long j = start + i + 1; j < keys; j++) row[j] = -INFINITY;
                    softmax_row(row, keys);
                    softmax_row_backward(row, ds + i * s, s);
                }
                product(rows, e, keys, ds, s, 1, k, e, dq, e, 0);
                for (long i = 0; i < rows; i++)
                    for (long j = 0; j < dim; j++)
                        d_query[((b * length + start + i) * heads + h) * dim + j] = STORE(dq[i * e + j] * scale);
                product(keys, e, rows, ds, 1, s, q_rows, e, dk, e, start > 0);
                product(keys, ev, rows, p, 1, s, dout, ev, dv, ev, start > 0);
            }
            for (long n = 0; n < keys; n++) {
                for (long j = 0; j < dim; j++)
                    d_key[((b * keys + n) * heads + h) * dim + j] = STORE(length ? dk[n * e + j] : 0);
                for (long j = 0; j < value_dim; j++)
                    d_value[((b * keys + n) * heads + h) * value_dim + j] = STORE(length ? dv[n * ev + j] : 0);
            }
        }
    }
}

#define PROMPT_ROWS 96

/* out[b, n, h, :] = attended + softmax(scale q key[h]^T) value[h], with q[b, h, n, :] at b * strides[0] + h * strides[1] +
 * n * strides[2]; attended and out are [B, N, H, D]. */
EXPORT void NAME(prompt_attention)(const T *attended, const T *query, const long *strides, const float *key,
                                   const float *value, float scale, long samples, long heads, long length, long prompts,
                                   long dim, long value_dim, T *out, int threads) {
    long s = PAD16(prompts), ev = PAD16(value_dim);
#pragma omp parallel num_threads(threads)
    {
        float *kt = malloc((dim * s + prompts * ev + PROMPT_ROWS * (dim + s + ev)) * sizeof(float));
        float *v = kt + dim * s, *q = v + prompts * ev, *p = q + PROMPT_ROWS * dim, *o = p + PROMPT_ROWS * s;
        memset(kt, 0, (dim * s + prompts * ev) * sizeof(float));
#pragma omp for schedule(static)
        for (long head = 0; head < samples * heads; head++) {
            long b = head / heads, h = head % heads;
            transpose(key + h * prompts * dim, prompts, dim, dim, kt, s);
            for (long j = 0; j < prompts; j++)
                memcpy(v + j * ev, value + (h * prompts + j) * value_dim, value_dim * sizeof(float));
            for (long start = 0; start < length; start += PROMPT_ROWS) {
                long rows = MIN(PROMPT_ROWS, length - start);
                for (long i = 0; i < rows; i++) {
                    const T *from = query + b * strides[0] + h * strides[1] + (start + i) * strides[2];
                    for (long j = 0; j < dim; j++) q[i * dim + j] = LOAD(from[j]) * scale;
                }
                product(rows, s, dim, q, dim, 1, kt, s, p, s, 0);
                for (long i = 0; i < rows; i++) softmax_row(p + i * s, prompts);
                product(rows, ev, prompts, p, s, 1, v, ev, o, ev, 0);
                for (long i = 0; i < rows; i++) {
                    long at = ((b * length + start + i) * heads + h) * value_dim;
                    for (long j = 0; j < value_dim; j++) out[at + j] = STORE(LOAD(attended[at + j]) + o[i * ev + j]);
                }
            }
        }
        free(kt);
    }
}

/* Gradients of `prompt_attention` for the query ([B, N, H, D]), keys and values ([H, P, D]); grad is [B, N, H, D]. */
EXPORT void NAME(prompt_attention_backward)(const T *grad, const Coded *query, const float *key, const float *value,
                                            float scale, int bits, long group, long samples, long heads, long length,
                                            long prompts, long dim, long value_dim, T *d_query, float *d_key,
                                            float *d_value, int threads) {
    long s = PAD16(prompts), e = PAD16(dim), ev = PAD16(value_dim);
    long width = packed_width(dim, bits), stride = scales_width((dim + group - 1) / group);
    long keys = heads * prompts * e, values = heads * prompts * ev; /* of one thread's sums */
    float *sums = calloc(threads * (keys + values), sizeof(float));
#pragma omp parallel num_threads(threads)
    {
        long thread = 0;
#ifdef _OPENMP
        thread = omp_get_thread_num();
#endif
        long size = (dim + value_dim) * s + prompts * e + PROMPT_ROWS * (2 * e + ev + 2 * s);
        float *kt = malloc(size * sizeof(float) + dim), *vt = kt + dim * s, *k = vt + value_dim * s, *q = k + prompts * e;
        float *dq = q + PROMPT_ROWS * e, *dout = dq + PROMPT_ROWS * e, *p = dout + PROMPT_ROWS * ev, *ds = p + PROMPT_ROWS * s;
        uint8_t *codes = (uint8_t *)(ds + PROMPT_ROWS * s);
        memset(kt, 0, size * sizeof(float));
#pragma omp for schedule(static)
        for (long head = 0; head < samples * heads; head++) {
            long b = head / heads, h = head % heads;
            float *dk = sums + thread * (keys + values) + h * prompts * e, *dv = sums + thread * (keys + values) + keys + h * prompts * ev;
            transpose(key + h * prompts * dim, prompts, dim, dim, kt, s);
            transpose(value + h * prompts * value_dim, prompts, value_dim, value_dim, vt, s);
            for (long j = 0; j < prompts; j++) memcpy(k + j * e, key + (h * prompts + j) * dim, dim * sizeof(float));
            for (long start = 0; start < length; start += PROMPT_ROWS) {
                long rows = MIN(PROMPT_ROWS, length - start), first = head * length + start;
                decode_head(query->packed + first * width, query->scales + first * stride,
                            query->mean ? query->mean + head * dim : NULL, rows, dim, bits, group, scale, codes, q);
                for (long i = 0; i < rows; i++)
                    for (long j = 0; j < value_dim; j++)
                        dout[i * ev + j] = LOAD(grad[((b * length + start + i) * heads + h) * value_dim + j]);
                product(rows, s, dim, q, e, 1, kt, s, p, s, 0);
                product(rows, s, value_dim, dout, ev, 1, vt, s, ds, s, 0);
                for (long i = 0; i < rows; i++) {
                    softmax_row(p + i * s, prompts);
                    softmax_row_backward(p + i * s, ds + i * s, s);
                }
                product(rows, e, prompts, ds, s, 1, k, e, dq, e, 0);
                for (long i = 0; i < rows; i++)
                    for (long j = 0; j < dim; j++)
                        d_query[((b * length + start + i) * heads + h) * dim + j] = STORE(dq[i * e + j] * scale);
                product(prompts, e, rows, ds, 1, s, q, e, dk, e, 1);
                product(prompts, ev, rows, p, 1, s, dout, ev, dv, ev, 1);
            }
        }
        free(kt);
    }
    for (long j = 0; j < heads * prompts; j++) {
        for (long i = 0; i < dim; i++) d_key[j * dim + i] = 0;
        for (long i = 0; i < value_dim; i++) d_value[j * value_dim + i] = 0;
        for (long thread = 0; thread < threads; thread++) {
            const float *from = sums + thread * (keys + values);
            for (long i = 0; i < dim; i++) d_key[j * dim + i] += from[j * e + i];
            for (long i = 0; i < value_dim; i++) d_value[j * value_dim + i] += from[keys + j * ev + i];
        }
    }
    free(sums);
}

#endif
