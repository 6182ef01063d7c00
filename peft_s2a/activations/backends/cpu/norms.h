/* Layer, root mean square and batch normalisation: statistics and gradients. */
#pragma once

#include "codec.h"

namespace kernels {

#define SAMPLED_ROWS 128

/* Of the rows that column statistics look at, the one in part `part`: `codec.sampled_rows`. */
inline long sampled_row(long rows, long part) {
    if (rows <= SAMPLED_ROWS) return part;
    return (long)(((part << 16) + (part * part * 40503 & 0xFFFF)) * rows >> 23);
}

/* Mean and deviation of the columns of sampled, normalised rows of x that are finite; see `codec.column_statistics`. */
template <typename T>
void column_statistics(const T *x, long rows, long count, int center, float eps, uint16_t *out) {
    Room room(2 * count * sizeof(double), true), memory(count * sizeof(float));
    double *sums = room.as<double>(), *squares = sums + count;
    float *values = memory.floats();
    long used = 0;
    for (long part = 0; part < MIN(rows, SAMPLED_ROWS); part++) {
        const T *row = x + sampled_row(rows, part) * count;
        float mean = 0, square = 0;
        for (long i = 0; i < count; i++) values[i] = load(row[i]);
        if (center)
            for (long i = 0; i < count; i++) mean += values[i];
        mean /= count;
        for (long i = 0; i < count; i++) values[i] -= mean, square += values[i] * values[i];
        float scale = 1 / sqrtf(square / count + eps);
        int spoiled = 0;
        for (long i = 0; i < count; i++) values[i] *= scale, spoiled |= !(values[i] - values[i] == 0);
        if (spoiled) continue;
        for (long i = 0; i < count; i++) sums[i] += values[i], squares[i] += (double)values[i] * values[i];
        used++;
    }
    used += !used;
    for (long i = 0; i < count; i++) {
        double mean = sums[i] / used, var = squares[i] / used - mean * mean;
        out[i] = float_to_bf16((float)mean);
        out[count + i] = float_to_bf16((float)sqrt((var < 0 ? 0 : var) + 0.05 * 0.05));
    }
}

/* columns, weight, d_x, d_weight and d_bias may be null. The sums over rows are made per thread and added up in order. */
template <typename T>
void norm_backward(const T *grad, const uint8_t *packed, const uint8_t *scales, const float *rstd,
                                const float *columns, const float *weight, long rows, long count, int center, int bits,
                                long group, T *d_x, float *d_weight, float *d_bias, float *sums) {
    Rows coded = coded_rows(packed, scales, count, bits, group);
    long threads = thread_count(), share = (rows + threads - 1) / threads;
    parallel(threads, LARGE, [&](long first_thread, long end_thread) {
        for (long thread = first_thread; thread < end_thread; thread++) {
            Room memory(PAD16(count) * (2 * sizeof(float) + 1));
            float *values = memory.floats(), *g = values + PAD16(count);
            uint8_t *codes = (uint8_t *)(g + PAD16(count));
            float *weight_sum = sums + 2 * thread * count, *bias_sum = weight_sum + count;
            for (long r = thread * share; r < MIN(rows, (thread + 1) * share); r++) {
                const T *dy = grad + r * count;
                if (d_x || d_weight) {
                    decode_row(&coded, r, codes, values);
                    if (columns)
                        for (long i = 0; i < count; i++) values[i] = values[i] * columns[count + i] + columns[i];
                }
                for (long i = 0; i < count; i++) g[i] = load(dy[i]);
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
                for (long i = 0; i < count; i++) d_x[r * count + i] = store<T>((g[i] - values[i] * along - mean) * rstd[r]);
            }
        }
    });
    for (long thread = 0; thread < threads; thread++)
        for (long i = 0; i < count; i++) {
            if (d_weight) d_weight[i] += sums[2 * thread * count + i];
            if (d_bias) d_bias[i] += sums[(2 * thread + 1) * count + i];
        }
}

/* Sums over samples and positions of the gradient and of its product with the decoded values, of rows [channels, size]: added to
 * sums, [threads, 2, channels]. */
template <typename T>
void channel_sums(const T *grad, const uint8_t *packed, const uint8_t *scales, long rows, long channels,
                               long size, int bits, long group, float *sums) {
    Rows coded = coded_rows(packed, scales, channels * size, bits, group);
    long threads = thread_count(), chunks = coded.chunks, share = (rows * chunks + threads - 1) / threads;
    parallel(threads, LARGE, [&](long first_thread, long end_thread) {
        for (long thread = first_thread; thread < end_thread; thread++) {
            Room memory(PAD16(coded.span) * (sizeof(float) + 1));
            float *values = memory.floats(), *total = sums + 2 * thread * channels;
            uint8_t *codes = (uint8_t *)(values + PAD16(coded.span));
            for (long part = thread * share; part < MIN(rows * chunks, (thread + 1) * share); part++) {
                long n = decode_part(&coded, part / chunks, part % chunks, codes, values), start = part % chunks * coded.span;
                const T *dy = grad + part / chunks * coded.count + start;
                for (long i = 0; i < n;) {
                    long channel = (start + i) / size, end = MIN(n, (channel + 1) * size - start);
                    float sum = 0, along = 0;
                    for (; i < end; i++) sum += load(dy[i]), along += load(dy[i]) * values[i];
                    total[channel] += sum, total[channels + channel] += along;
                }
            }
        }
    });
}

/* (grad - means[0, c] - means[1, c] * decoded value) * scale[c], for rows [channels, size]; grad * scale[c] without means */
template <typename T>
void channel_gradient(const T *grad, const uint8_t *packed, const uint8_t *scales, const float *means,
                                   const float *scale, long rows, long channels, long size, int bits, long group, T *d_x) {
    Rows coded = coded_rows(packed, scales, channels * size, bits, group);
    long chunks = coded.chunks;
    parallel(rows * chunks, coded.span, [&](long begin, long end) {
        Room memory(PAD16(coded.span) * (sizeof(float) + 1));
        float *values = memory.floats();
        uint8_t *codes = (uint8_t *)(values + PAD16(coded.span));
        for (long part = begin; part < end; part++) {
            long start = part % chunks * coded.span, offset = part / chunks * coded.count + start;
            long n = means ? decode_part(&coded, part / chunks, part % chunks, codes, values) : MIN(coded.span, coded.count - start);
            for (long i = 0; i < n;) {
                long channel = (start + i) / size, end = MIN(n, (channel + 1) * size - start);
                float factor = scale[channel];
                if (!means) {
                    for (; i < end; i++) d_x[offset + i] = store<T>(load(grad[offset + i]) * factor);
                    continue;
                }
                float mean = means[channel], along = means[channels + channel];
                for (; i < end; i++)
                    d_x[offset + i] = store<T>((load(grad[offset + i]) - mean - along * values[i]) * factor);
            }
        }
    });
}

} // namespace kernels
