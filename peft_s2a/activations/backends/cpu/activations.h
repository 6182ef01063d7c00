/* Derivatives of activation functions, as codes of a few levels. */
#pragma once

#include "codec.h"

namespace kernels {

#ifdef __AVX2__
/* Up to 31 thresholds as a binary search meets them, and the codes of what lies between; of depth 0 for more. */
struct SearchTree {
    int depth = 0;
    vector16 levels[5]; /* level l: of 2^l thresholds */
    __m128i codes[2];

    SearchTree(const float *thresholds, const int32_t *deltas, int count, int first) {
        if (count > 31) return;
        float edges[32], level[16] = {};
        uint8_t table[32];
        for (int t = 0, code = first; t < 32; t++) {
            edges[t] = t < count ? thresholds[t] : INFINITY;
            table[t] = (uint8_t)code;
            code += t < count ? deltas[t] : 0;
        }
        for (depth = 1; 1 << depth <= count;) depth++;
        for (int l = 0; l < depth; l++) {
            for (int i = 0; i < 1 << l; i++) level[i] = edges[((2 * i + 1) << (depth - 1 - l)) - 1];
            levels[l] = load16(level);
        }
        memcpy(codes, table, sizeof codes);
    }
};

/* codes[i] = that of where x[i] lies, sixteen at a time */
INLINE void search16(const float *x, long n, const SearchTree &tree, int depth, uint8_t *codes) {
    for (long i = 0; i < n; i += 16) {
        vector16 v = load16(x + i);
        index16 below = 0;
        for (int l = 0; l < depth; l++) /* masks are minus one */
            below = below + below - (v > (l < 4 ? look_up8(tree.levels[l], below) : look_up16(tree.levels[l], below)));
        to_bytes16(below, codes + i);
        __m128i place = _mm_loadu_si128((const __m128i *)(codes + i));
        __m128i found = _mm_blendv_epi8(_mm_shuffle_epi8(tree.codes[0], place), _mm_shuffle_epi8(tree.codes[1], place),
                                        _mm_slli_epi16(place, 3)); /* bit 4, which chooses, becomes the sign */
        _mm_storeu_si128((__m128i *)(codes + i), found);
    }
}
#endif

/* A step function: `first`, and the deltas that are added at the thresholds. */
struct Steps {
    const float *thresholds;
    const int32_t *deltas;
    int count, first;
#ifdef __AVX2__
    SearchTree tree{thresholds, deltas, count, first};
#endif
};

/* codes[i] = the step at x[i] */
template <typename T>
void step_codes(const T *x, long n, const Steps &steps, uint8_t *codes) {
    float loaded[BLOCK];
    const float *values = std::is_same_v<T, float> ? (const float *)x : loaded;
    int32_t sums[BLOCK];
    long i = 0;
    if (values == loaded)
        for (long k = 0; k < n; k++) loaded[k] = load(x[k]);
#ifdef __AVX2__
    if (steps.tree.depth) i = n / 16 * 16;
    switch (steps.tree.depth) {
    case 1: search16(values, i, steps.tree, 1, codes); break;
    case 2: search16(values, i, steps.tree, 2, codes); break;
    case 3: search16(values, i, steps.tree, 3, codes); break;
    case 4: search16(values, i, steps.tree, 4, codes); break;
    case 5: search16(values, i, steps.tree, 5, codes); break;
    }
#endif
    for (long k = i; k < n; k++) sums[k] = steps.first;
    for (int t = 0; t < steps.count; t++) {
        float threshold = steps.thresholds[t];
        int32_t delta = steps.deltas[t];
        for (long k = i; k < n; k++) sums[k] += values[k] > threshold ? delta : 0;
    }
    for (; i < n; i++) codes[i] = (uint8_t)sums[i];
}

template <typename T>
void encode_steps(const T *x, long count, const Steps &steps, int bits, uint8_t *out, uint8_t *scratch) {
    if (bits == 3) { /* two layouts at once: through one code a byte */
        in_blocks(count, [&](long j) {
            step_codes(x + j, MIN(BLOCK, count - j), steps, scratch + j);
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
            step_codes(x + begin, n, steps, codes);
            long i = 0; /* codes do not cross bytes when shifted */
            for (; i + 16 <= n; i += 16) *(words8 *)(out + j + i) |= *(const words8 *)(codes + i) << s * bits;
            for (; i < n; i++) out[j + i] |= codes[i] << s * bits;
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
    vector16 table = load16(levels);
    in_blocks(width, [&](long j) {
        long size = MIN(BLOCK, width - j);
        for (int s = 0; s < 8 / bits; s++) {
            long begin = s * width + j, n = MIN(size, count - begin), i = 0;
            if (n <= 0) break;
            if (bits <= 4) /* sixteen look-ups in a register at a time */
                for (; i + 16 <= n; i += 16) {
                    float value[16];
                    for (int k = 0; k < 16; k++) value[k] = load(grad[begin + i + k]);
                    index16 index = from_bytes16(packed + j + i) >> s * bits & mask;
                    store16(value, load16(value) * look_up16(table, index));
                    for (int k = 0; k < 16; k++) out[begin + i + k] = store<T>(value[k]);
                }
            for (; i < n; i++)
                out[begin + i] = store<T>(load(grad[begin + i]) * levels[packed[j + i] >> s * bits & mask]);
        }
    });
}

} // namespace kernels
