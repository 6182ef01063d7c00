/* Derivatives of activation functions, as codes of a few levels. */
#pragma once

#include "codec.h"

namespace kernels {

#ifdef __AVX512F__
/* table[index], of 32 entries, an entry a lane */
INLINE vector16 look_up32(const vector16 *table, index16 index) {
    return (vector16)_mm512_permutex2var_ps((__m512)table[0], (__m512i)index, (__m512)table[1]);
}

/* codes[i] = table[number of edges below x[i]]: a binary search among 2 * widest - 1 edges, in registers. */
INLINE void search16(const float *x, long n, const vector16 *edges, const index16 *table, int widest, uint8_t *codes) {
    for (long i = 0; i < n; i += 16) {
        vector16 v = *(const loose16 *)(x + i);
        index16 below = {0};
        for (int step = widest; step; step /= 2)
            below += (v > look_up32(edges, below + (step - 1))) & step;
        to_bytes16((index16)look_up32((const vector16 *)table, below), codes + i);
    }
}
#endif

/* codes[i] = first + sum of the deltas of all thresholds below x[i] */
template <typename T>
void step_codes(const T *x, long n, const float *thresholds, const int32_t *deltas, int count, int first,
                             uint8_t *codes) {
    float loaded[BLOCK];
    const float *values = std::is_same_v<T, float> ? (const float *)x : loaded;
    int32_t sums[BLOCK];
    long i = 0;
    if (values == loaded)
        for (long k = 0; k < n; k++) loaded[k] = load(x[k]);
#ifdef __AVX512F__ /* a binary search in registers: up to 31 thresholds fit into two */
    if (count < 32) {
        vector16 edges[2];
        index16 table[2];
        for (int t = 0, code = first; t < 32; t++) {
            edges[t / 16][t % 16] = t < count ? thresholds[t] : INFINITY;
            table[t / 16][t % 16] = code;
            code += t < count ? deltas[t] : 0;
        }
        i = n / 16 * 16;
        if (count < 2) search16(values, i, edges, table, 1, codes); /* masks */
        else search16(values, i, edges, table, 16, codes);
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

template <typename T>
void encode_steps(const T *x, long count, const float *thresholds, const int32_t *deltas, int n_thresholds,
                               int first, int bits, uint8_t *out, uint8_t *scratch) {
    if (bits == 3) { /* two layouts at once: through one code a byte */
        in_blocks(count, [&](long j) {
            step_codes(x + j, MIN(BLOCK, count - j), thresholds, deltas, n_thresholds, first, scratch + j);
        });
        pack_row(scratch, count, bits, out);
        return;
    }
    long width = packed_width(count, bits);
    in_blocks(width, [&](long j) {
        uint8_t codes[BLOCK];
        long size = MIN(BLOCK, width - j);
        memset(out + j, 0, size);
        for (int s = 0; s < 8 / bits; s++) {
            long begin = s * width + j, n = MIN(size, count - begin);
            if (n <= 0) break;
            step_codes(x + begin, n, thresholds, deltas, n_thresholds, first, codes);
            for (long i = 0; i < n; i++) out[j + i] |= codes[i] << s * bits;
        }
    });
}

template <typename T>
void scale_block(const T *grad, const uint8_t *codes, long n, const float *levels, T *out) {
    for (long i = 0; i < n; i++) out[i] = store<T>(load(grad[i]) * levels[codes[i]]);
}

template <typename T>
void scale_by_levels(const T *grad, const uint8_t *packed, long count, const float *levels, int bits, T *out,
                                  uint8_t *scratch) {
    if (bits == 3) {
        unpack_run(packed, count, bits, 0, count, scratch);
        in_blocks(count, [&](long j) { scale_block(grad + j, scratch + j, MIN(BLOCK, count - j), levels, out + j); });
        return;
    }
    long width = packed_width(count, bits);
    uint8_t mask = (uint8_t)((1 << bits) - 1);
    vector16 table;
    memcpy(&table, levels, sizeof table);
    in_blocks(width, [&](long j) {
        long size = MIN(BLOCK, width - j);
        for (int s = 0; s < 8 / bits; s++) {
            long begin = s * width + j, n = MIN(size, count - begin), i = 0;
            if (n <= 0) break;
            if (bits <= 4) /* sixteen look-ups in a register at a time */
                for (; i + 16 <= n; i += 16) {
                    index16 index;
                    vector16 value;
                    for (int k = 0; k < 16; k++) index[k] = packed[j + i + k] >> s * bits & mask;
                    for (int k = 0; k < 16; k++) value[k] = load(grad[begin + i + k]);
                    value *= look_up16(table, index);
                    for (int k = 0; k < 16; k++) out[begin + i + k] = store<T>(value[k]);
                }
            for (; i < n; i++)
                out[begin + i] = store<T>(load(grad[begin + i]) * levels[packed[j + i] >> s * bits & mask]);
        }
    });
}

} // namespace kernels
