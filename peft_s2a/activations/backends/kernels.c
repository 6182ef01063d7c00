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

#define BLOCK 512
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

static inline void range_of(const float *x, long n, float *low, float *high) {
    float lows[16], highs[16], a, b;
    long i = 16;
    if (n >= 16) { /* lane by lane, which is a vector instruction for each comparison */
        for (int k = 0; k < 16; k++) lows[k] = highs[k] = x[k];
        for (; i + 16 <= n; i += 16)
            for (int k = 0; k < 16; k++) {
                lows[k] = x[i + k] < lows[k] ? x[i + k] : lows[k];
                highs[k] = x[i + k] > highs[k] ? x[i + k] : highs[k];
            }
        for (int half = 8; half; half /= 2)
            for (int k = 0; k < half; k++) {
                lows[k] = lows[k + half] < lows[k] ? lows[k + half] : lows[k];
                highs[k] = highs[k + half] > highs[k] ? highs[k + half] : highs[k];
            }
        a = lows[0], b = highs[0];
    } else a = b = x[0], i = 1;
    for (; i < n; i++) a = x[i] < a ? x[i] : a, b = x[i] > b ? x[i] : b;
    *low = a, *high = b;
}

/* truncation is floor: negative values are cut to 0 */
static inline uint8_t code_of(float x, float offset, float inverse_step, float threshold, float top) {
    float unit = (x - offset) * inverse_step + threshold;
    return (uint8_t)(int)(unit < 0 ? 0 : unit > top ? top : unit);
}

/* Code one row in groups: its scales to `scales`, one code a byte to `codes`. */
static void encode_row(const float *x, long count, int bits, long group, const int64_t *seed, uint32_t position,
                       uint8_t *scales, uint8_t *codes) {
    float top = (float)((1 << bits) - 1);
    long groups = (count + group - 1) / group, units = (groups + UNIT_GROUPS - 1) / UNIT_GROUPS;
    int8_t *lows = (int8_t *)scales + units, *highs = lows + groups;
    for (long u = 0; u < units; u++) {
        float low[UNIT_GROUPS], high[UNIT_GROUPS], largest = 0;
        long first = u * UNIT_GROUPS, last = MIN(first + UNIT_GROUPS, groups);
        for (long g = first; g < last; g++) {
            float *a = &low[g - first], *b = &high[g - first];
            range_of(x + g * group, MIN(group, count - g * group), a, b);
            float magnitude = fabsf(*a) > fabsf(*b) ? fabsf(*a) : fabsf(*b);
            largest = magnitude > largest ? magnitude : largest;
        }
        float unit = encode_unit(largest, scales + u), inverse_unit = unit == 0 ? 0 : 1 / unit;
        for (long g = first; g < last; g++) {
            float a = encode_bound(low[g - first], inverse_unit, lows + g);
            float b = encode_bound(high[g - first], inverse_unit, highs + g);
            float offset = a * unit, step = (b - a) * unit / top, inverse = step == 0 ? 0 : 1 / step;
            const float *v = x + g * group;
            uint8_t *out = codes + g * group;
            long n = MIN(group, count - g * group);
            if (seed)
                for (long i = 0; i < n; i++)
                    out[i] = code_of(v[i], offset, inverse, threshold_at(seed, position + (uint32_t)(g * group + i)), top);
            else if (n == 16) /* the loop over a vector has no ends to take care of */
                for (long i = 0; i < 16; i++) out[i] = code_of(v[i], offset, inverse, 0.5f, top);
            else
                for (long i = 0; i < n; i++) out[i] = code_of(v[i], offset, inverse, 0.5f, top);
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

typedef float vector16 __attribute__((vector_size(64)));
typedef int32_t index16 __attribute__((vector_size(64)));

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
    for (long i = 0; i < n; i++) values[i] = LOAD(x[i]), sums[i] = first;
    for (int t = 0; t < count; t++) {
        float threshold = thresholds[t];
        int32_t delta = deltas[t];
        for (long i = 0; i < n; i++) sums[i] += values[i] > threshold ? delta : 0;
    }
    for (long i = 0; i < n; i++) codes[i] = (uint8_t)sums[i];
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
            double sum = 0, squares = 0;
            for (long i = 0; i < count; i++) values[i] = LOAD(row[i]);
            if (mode) {
                if (mode == 1) {
                    for (long i = 0; i < count; i++) sum += values[i];
                    float mean = (float)(sum / count);
                    for (long i = 0; i < count; i++) values[i] -= mean;
                }
                for (long i = 0; i < count; i++) squares += (double)values[i] * values[i];
                float scale = (float)(1 / sqrt(squares / count + eps));
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

#endif
