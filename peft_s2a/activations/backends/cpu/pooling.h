/* Max pooling with the places of the maxima. */
#pragma once

#include "codec.h"

namespace kernels {

/* Height and width each. */
typedef struct {
    long inputs[2], results[2], kernel[2], stride[2], padding[2], dilation[2];
} Pool;

/* One place of the window for a row of results: those whose `x` is larger, or the first, take it. */
template <typename T>
INLINE void pool_place(const T *x, long n, long stride, int32_t place, float *best, int32_t *places) {
    for (long i = 0; i < n; i++) {
        float value = load(x[i * stride]);
        int take = (value > best[i]) | (value != value) | (places[i] < 0);
        best[i] = take ? value : best[i], places[i] = take ? place : places[i];
    }
}

/* The largest values of windows and their places there, one a byte. */
template <typename T>
void max_pool2d(const T *x, const Pool &pool, long planes, T *y, uint8_t *codes) {
    long height = pool.results[0], width = pool.results[1];
    parallel(planes * height, width, [&](long begin, long end) {
        Room memory(width * 2 * sizeof(float));
        float *best = memory.floats();
        int32_t *places = (int32_t *)(best + width);
        for (long line = begin; line < end; line++) {
            long top = line % height * pool.stride[0] - pool.padding[0], step = pool.stride[1];
            for (long i = 0; i < width; i++) best[i] = -INFINITY, places[i] = -1;
            for (long ky = 0; ky < pool.kernel[0]; ky++) {
                long iy = top + ky * pool.dilation[0];
                if (iy < 0 || iy >= pool.inputs[0]) continue;
                const T *row = x + (line / height * pool.inputs[0] + iy) * pool.inputs[1];
                for (long kx = 0; kx < pool.kernel[1]; kx++) {
                    long shift = kx * pool.dilation[1] - pool.padding[1], last = pool.inputs[1] - 1 - shift;
                    long first = shift < 0 ? (-shift + step - 1) / step : 0, end = last < 0 ? 0 : MIN(width, last / step + 1);
                    const T *from = row + first * step + shift;
                    int32_t place = (int32_t)(ky * pool.kernel[1] + kx);
                    if (step == 1) pool_place(from, end - first, 1, place, best + first, places + first);
                    else if (step == 2) pool_place(from, end - first, 2, place, best + first, places + first);
                    else pool_place(from, end - first, step, place, best + first, places + first);
                }
            }
            for (long i = 0; i < width; i++)
                y[line * width + i] = store<T>(best[i]), codes[line * width + i] = (uint8_t)(places[i] < 0 ? 0 : places[i]);
        }
    });
}

template <typename T>
void max_pool2d_backward(const T *grad, const uint8_t *packed, const Pool &pool, long planes, int bits, T *d_x) {
    long height = pool.results[0], width = pool.results[1], count = height * width;
    long size = pool.inputs[0] * pool.inputs[1], offsets[256];
    for (long k = 0; k < 256; k++)
        offsets[k] = k / pool.kernel[1] * pool.dilation[0] * pool.inputs[1] + k % pool.kernel[1] * pool.dilation[1];
    parallel(planes, count, [&](long begin, long end) {
        Room memory(count);
        uint8_t *codes = memory.bytes();
        for (long plane = begin; plane < end; plane++) {
            T *to = d_x + plane * size;
            unpack_run(packed, planes * count, bits, plane * count, count, codes);
            memset(to, 0, size * sizeof(T));
            for (long i = 0; i < height; i++) {
                long top = i * pool.stride[0] - pool.padding[0];
                for (long j = 0; j < width; j++) {
                    long left = j * pool.stride[1] - pool.padding[1], at = i * width + j;
                    long target = top * pool.inputs[1] + left + offsets[codes[at]];
                    if (target < 0 || target >= size) continue; /* the window stepped over the input */
                    to[target] = store<T>(load(to[target]) + load(grad[plane * count + at]));
                }
            }
        }
    });
}

} // namespace kernels
