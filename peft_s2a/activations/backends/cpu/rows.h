/* Rows in groups: encoding, decoding, and the gradients of softmax and of gates. */
#pragma once

#include "codec.h"

namespace kernels {

typedef struct {
    const uint8_t *packed, *scales;
    const uint16_t *mean; /* may be null */
} Coded;

/* mode 0: the rows as they are; 1: centred and divided by their deviation; 2: divided by their root mean square; 3: square
 * roots. Every `run` values are a column; `columns`: means, then inverse deviations, that they are standardised by, or null. */
template <typename T>
void encode_rows(const T *x, long rows, long count, int mode, float eps, int bits, long group,
                              const int64_t *seed, const float *columns, long run, uint8_t *packed, uint8_t *scales,
                              float *rstd) {
    Rows coded = coded_rows(packed, scales, count, bits, group);
    long together = rows_together(&coded, seed), pitch = pitch_of(&coded);
    parallel((rows + together - 1) / together, together * count, [&](long begin, long end) {
        Room memory(room_together(&coded) * (sizeof(float) + 1));
        float *room = memory.floats();
        uint8_t *codes = (uint8_t *)(room + room_together(&coded));
        for (long start = begin * together; start < MIN(rows, end * together); start += together) {
            long n = MIN(together, rows - start);
            for (long r = start; r < start + n; r++) {
                const T *row = x + r * count;
                float *values = room + (r - start) * pitch, sum = 0, squares = 0, scale = 1;
                for (long i = 0; i < count; i++) values[i] = load(row[i]);
                if (mode == 3)
                    for (long i = 0; i < count; i++) values[i] = sqrtf(values[i]);
                else if (mode) {
                    if (mode == 1)
                        for (long i = 0; i < count; i++) sum += values[i];
                    float mean = sum / count;
                    for (long i = 0; i < count; i++) values[i] -= mean, squares += values[i] * values[i];
                    rstd[r] = scale = 1 / sqrtf(squares / count + eps);
                }
                if (columns && run == 1)
                    for (long i = 0; i < count; i++) values[i] = (values[i] * scale - columns[i]) * columns[count + i];
                else if (columns)
                    for (long c = 0; c < count / run; c++)
                        for (long i = c * run; i < (c + 1) * run; i++)
                            values[i] = (values[i] - columns[c]) * columns[count / run + c];
                else if (scale != 1)
                    for (long i = 0; i < count; i++) values[i] *= scale;
            }
            encode_some_rows(&coded, start, n, room, seed, codes);
        }
    });
}

template <typename T>
void decode_rows(const uint8_t *packed, const uint8_t *scales, long rows, long count, int bits, long group,
                              T *out) {
    Rows coded = coded_rows(packed, scales, count, bits, group);
    long chunks = coded.chunks;
    parallel(rows * chunks, coded.span, [&](long begin, long end) {
        Room memory(PAD16(coded.span) * (sizeof(float) + 1));
        float *values = memory.floats();
        uint8_t *codes = (uint8_t *)(values + PAD16(coded.span));
        for (long part = begin; part < end; part++) {
            long n = decode_part(&coded, part / chunks, part % chunks, codes, values);
            T *to = out + part / chunks * count + part % chunks * coded.span;
            if (std::is_same_v<T, float16>) { /* bounds are rounded, perhaps beyond its largest number */
                const float most = 65504;
                for (long i = 0; i < n; i++) values[i] = values[i] > most ? most : values[i] < -most ? -most : values[i];
            }
            for (long i = 0; i < n; i++) to[i] = store<T>(values[i]);
        }
    });
}

/* The gradient of softmax from codes of square roots of its results, which are scaled to sum to one. */
template <typename T>
void softmax_backward(const T *grad, const uint8_t *packed, const uint8_t *scales, long rows, long count,
                                   int bits, long group, T *d_x) {
    Rows coded = coded_rows(packed, scales, count, bits, group);
    parallel(rows, count, [&](long begin, long end) {
        Room memory(PAD16(count) * (sizeof(float) + 1));
        float *p = memory.floats();
        uint8_t *codes = (uint8_t *)(p + PAD16(count));
        for (long r = begin; r < end; r++) {
            const T *dy = grad + r * count;
            float sum = 0, along = 0;
            decode_row(&coded, r, codes, p);
            for (long i = 0; i < count; i++) {
                p[i] *= p[i];
                sum += p[i], along += p[i] * load(dy[i]);
            }
            float scale = 1 / (sum > std::numeric_limits<float>::min() ? sum : std::numeric_limits<float>::min());
            along *= scale;
            for (long i = 0; i < count; i++) d_x[r * count + i] = store<T>(p[i] * scale * (load(dy[i]) - along));
        }
    });
}

/* Gradients of f(gate) * up, see `gate16`, from codes of both. */
template <typename T>
void gated_backward(const T *grad, const Coded &gate, const Coded &up, float inner, float cubic, long rows,
                                 long count, int bits, long group, T *d_gate, T *d_up) {
    Rows gates = coded_rows(gate.packed, gate.scales, count, bits, group);
    Rows ups = coded_rows(up.packed, up.scales, count, bits, group);
    long chunks = gates.chunks, room = PAD16(gates.span);
    parallel(rows * chunks, gates.span, [&](long begin, long end) {
        Room memory(room * (2 * sizeof(float) + 1));
        float *x = memory.floats(), *y = x + room;
        uint8_t *codes = (uint8_t *)(y + room);
        memset(x, 0, room * sizeof(float)); /* whole vectors are read */
        for (long part = begin; part < end; part++) {
            long offset = part / chunks * count + part % chunks * gates.span;
            long n = decode_part(&gates, part / chunks, part % chunks, codes, x);
            decode_part(&ups, part / chunks, part % chunks, codes, y);
            for (long i = 0; i < n; i += 16) {
                vector16 value, slope;
                gate16(load16(x + i), inner, cubic, &value, &slope);
                store16(x + i, value), store16(y + i, load16(y + i) * slope);
            }
            for (long i = 0; i < n; i++) {
                float dy = load(grad[offset + i]);
                d_up[offset + i] = store<T>(dy * x[i]), d_gate[offset + i] = store<T>(dy * y[i]);
            }
        }
    });
}

} // namespace kernels
