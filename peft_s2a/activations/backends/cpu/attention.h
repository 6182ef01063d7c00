/* Heads and attention. */
#pragma once

#include "rows.h"

namespace kernels {

/* One tile of a matrix product, in registers: c[r, 16 v] (+)= sum over k of a[r, k] b[k, 16 v]. */
INLINE void product_tile(int rows, int vectors, const float *a, long a_row, long a_step, const float *b, long b_step,
                         long inner, float *c, long c_row, int add) {
    vector16 sums[12][4];
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < vectors; v++)
            sums[r][v] = add ? load16(c + r * c_row + 16 * v) : vector16(0);
    for (long k = 0; k < inner; k++) {
        vector16 right[4];
        for (int v = 0; v < vectors; v++) right[v] = load16(b + k * b_step + 16 * v);
        for (int r = 0; r < rows; r++)
            for (int v = 0; v < vectors; v++) sums[r][v] += a[r * a_row + k * a_step] * right[v];
    }
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < vectors; v++) store16(c + r * c_row + 16 * v, sums[r][v]);
}

INLINE void product_columns(int vectors, long rows, const float *a, long a_row, long a_step, const float *b, long b_step,
                            long inner, float *c, long c_row, int add) {
    long i = 0;
#ifdef __AVX512F__ /* enough sums to keep the multipliers busy, in as many registers */
    if (vectors == 1)
        for (; i + 12 <= rows; i += 12)
            product_tile(12, 1, a + i * a_row, a_row, a_step, b, b_step, inner, c + i * c_row, c_row, add);
#endif
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

/* The softmax of a row of `count` scores, in place; a row of nothing but minus infinity becomes `hidden`. Up to the next multiple of
 * 16 a row of numbers is filled with zeros. Returns by how much the probabilities that PyTorch's fused kernels recompute differ, see
 * `_rounding_of_fused_kernels` in `attention.py`. */
inline float softmax_row(float *x, long count, float hidden = 0) {
    long padded = PAD16(count);
    if (!count) return 1;
    for (long i = count; i < padded; i++) x[i] = -INFINITY;
    vector16 tops = load16(x);
    for (long i = 16; i < padded; i += 16) tops = larger16(load16(x + i), tops);
    float top = largest16(tops);
    if (top == -INFINITY) { /* of which NaN may be overlooked */
        for (long i = 0; i < count; i++)
            if (x[i] != -INFINITY) hidden = NAN;
        for (long i = 0; i < padded; i++) x[i] = hidden;
        return 1;
    }
    vector16 sums = 0;
    for (long i = 0; i < padded; i += 16) {
        vector16 e = exp16(load16(x + i) - top);
        store16(x + i, e), sums += e;
    }
    float sum = sum16(sums), scale = 1 / sum;
    for (long i = 0; i < padded; i += 16) store16(x + i, load16(x + i) * scale);
    if (fabsf(top) < 1024) return 1;
    float exponent = logf(sum);
    volatile float log_sum = top + exponent, shift = log_sum - top; /* rounded, which the compiler must not undo */
    return expf(exponent - shift);
}

/* The same of up to sixteen rows, one after the other: their largest scores, and their sums, are found together. What `softmax_row`
 * returns of each goes to `factors`. */
static void softmax_rows(float *x, long rows, long count, float hidden, float *factors) {
    long padded = PAD16(count);
    vector16 tops[16], sums[16];
    for (long r = 0; r < rows; r++) factors[r] = 1;
    if (!count) return;
    for (long r = 0; r < rows; r++) {
        float *row = x + r * padded;
        for (long i = count; i < padded; i++) row[i] = -INFINITY;
        tops[r] = load16(row);
        for (long i = 16; i < padded; i += 16) tops[r] = larger16(load16(row + i), tops[r]);
    }
    vector16 top = reduce16<larger16>(tops, rows);
    int usual = 1;
    for (long r = 0; r < rows; r++) usual &= fabsf(top[r]) < 1024;
    if (!usual) {
        for (long r = 0; r < rows; r++) factors[r] = softmax_row(x + r * padded, count, hidden);
        return;
    }
    for (long r = 0; r < rows; r++) {
        float *row = x + r * padded;
        sums[r] = 0;
        for (long i = 0; i < padded; i += 16) {
            vector16 e = exp16(load16(row + i) - top[r]);
            store16(row + i, e), sums[r] += e;
        }
    }
    vector16 scale = vector16(1) / reduce16<added16>(sums, rows);
    for (long r = 0; r < rows; r++)
        for (long i = r * padded; i < (r + 1) * padded; i += 16) store16(x + i, load16(x + i) * scale[r]);
}

/* d = p * (d - sum(p * d)), the gradients of the scores behind up to sixteen rows of probabilities p */
static void softmax_rows_backward(const float *p, float *d, long rows, long padded) {
    vector16 sums[16];
    for (long r = 0; r < rows; r++) {
        sums[r] = 0;
        for (long i = r * padded; i < (r + 1) * padded; i += 16) sums[r] += load16(p + i) * load16(d + i);
    }
    vector16 sum = reduce16<added16>(sums, rows);
    for (long r = 0; r < rows; r++)
        for (long i = r * padded; i < (r + 1) * padded; i += 16) store16(d + i, load16(p + i) * (load16(d + i) - sum[r]));
}

static void transpose(const float *x, long rows, long columns, long x_row, float *out, long out_row) {
    for (long i = 0; i < rows; i++)
        for (long j = 0; j < columns; j++) out[j * out_row + i] = x[i * x_row + j];
}

/* Queries, keys or values of one head: [rows, PAD16(count)], filled up with zeros. */
static void decode_head(const uint8_t *packed, const uint8_t *scales, const uint16_t *mean, long rows, long count, int bits,
                        long group, float factor, uint8_t *codes, float *out) {
    Rows coded = coded_rows(packed, scales, count, bits, group);
    long row = PAD16(count);
    for (long n = 0; n < rows; n++, out += row) {
        decode_row(&coded, n, codes, out);
        if (mean)
            for (long i = 0; i < count; i++) out[i] += bf16_to_float(mean[i]);
        for (long i = count; i < row; i++) out[i] = 0;
        if (factor != 1)
            for (long i = 0; i < row; i += 16) store16(out + i, load16(out + i) * factor);
    }
}

/* How many query rows attention takes at a time: their scores shall stay in the cache. */
static long rows_at_a_time(long length, long keys) {
    long most = keys ? 24576 / PAD16(keys) : length;
    if (most < 6) most = 6;
    long tiles = (length + most - 1) / most;
    return tiles ? (length + tiles - 1) / tiles : 0;
}

/* Floats of room that one thread of `attention_backward` needs. */
inline long attention_workspace(long length, long keys, long dim, long value_dim) {
    long rows = rows_at_a_time(length, keys), e = PAD16(dim), ev = PAD16(value_dim), s = PAD16(keys);
    return length * e + 2 * keys * e + keys * ev + (dim + value_dim) * s + rows * (2 * s + e + ev) + PAD16(e + ev);
}

/* x[b, h, n, d] lies at b * stride_b + h * stride_h + n * stride_n + d; mean is bfloat16 [B, H, D] */
template <typename T>
void encode_heads(const T *x, long samples, long heads, long tokens, long count, long stride_b, long stride_h,
                               long stride_n, int center, int bits, long group, const int64_t *seed, uint8_t *packed,
                               uint8_t *scales, uint16_t *mean) {
    Rows coded = coded_rows(packed, scales, count, bits, group);
    long together = rows_together(&coded, seed), pitch = pitch_of(&coded), room = room_together(&coded);
    parallel(samples * heads, tokens * count, [&](long begin, long end) {
        Room memory(room * (sizeof(float) + 1) + count * sizeof(float));
        float *values = memory.floats(), *average = values + room;
        uint8_t *codes = (uint8_t *)(average + count);
        for (long head = begin; head < end; head++) {
            const T *start = x + head / heads * stride_b + head % heads * stride_h;
            for (long i = 0; i < count; i++) average[i] = 0;
            if (center && tokens) {
                long whole = count / 16 * 16;
                for (long i = 0; i < whole; i += 16) {
                    vector16 sum = 0;
                    for (long n = 0; n < tokens; n++) sum += load16(start + n * stride_n + i);
                    store16(average + i, sum);
                }
                for (long n = 0; n < tokens; n++)
                    for (long i = whole; i < count; i++) average[i] += load(start[n * stride_n + i]);
                for (long i = 0; i < count; i++) {
                    uint16_t rounded = float_to_bf16(average[i] / tokens);
                    if ((rounded & 0x7F80) == 0x7F80) rounded = 0; /* not finite: nothing is subtracted */
                    average[i] = bf16_to_float(rounded);
                    if (mean) mean[head * count + i] = rounded;
                }
            }
            for (long first = 0; first < tokens; first += together) {
                long n = MIN(together, tokens - first);
                for (long r = 0; r < n; r++) {
                    const T *from = start + (first + r) * stride_n;
                    float *to = values + r * pitch;
                    long i = 0;
                    for (; i + 16 <= count; i += 16) store16(to + i, load16(from + i) - load16(average + i));
                    for (; i < count; i++) to[i] = load(from[i]) - average[i];
                }
                encode_some_rows(&coded, head * tokens + first, n, values, seed, codes);
            }
        }
    });
}

/* See `attention.py`. grad[b, h, n, d] lies at b * grad_strides[0] + h * grad_strides[1] + n * grad_strides[2] + d; the mask's strides
 * are four. Results are [B, N, H, D]. `room`: `attention_workspace` floats for every thread. */
template <typename T>
void attention_backward(const T *grad, const long *grad_strides, const Coded &query, const Coded &key,
                                     const Coded &value, const float *mask, const long *mask_strides, int causal,
                                     float scale, int bits, long group, long samples, long heads, long length, long keys,
                                     long dim, long value_dim, T *d_query, T *d_key, T *d_value, float *room) {
    long e = PAD16(dim), ev = PAD16(value_dim), s = PAD16(keys), most = rows_at_a_time(length, keys);
    long size = attention_workspace(length, keys, dim, value_dim);
    parallel(samples * heads, LARGE, [&](long begin, long end) {
        long thread = thread_index();
        float *q = room + thread * size, *k = q + length * e, *dk = k + keys * e, *dv = dk + keys * e;
        float *kt = dv + keys * ev, *vt = kt + dim * s, *p = vt + value_dim * s, *ds = p + most * s, *dq = ds + most * s;
        float *dout = dq + most * e;
        uint8_t *codes = (uint8_t *)(dout + most * ev);
        memset(kt, 0, (dim + value_dim) * s * sizeof(float));
        for (long head = begin; head < end; head++) {
            long b = head / heads, h = head % heads;
#define DECODE(coded, rows, count, factor, out)                                                                        \
    decode_head(coded.packed + head * rows * packed_width(count, bits),                                               \
                coded.scales + head * rows * scales_width((count + group - 1) / group),                               \
                coded.mean ? coded.mean + head * count : NULL, rows, count, bits, group, factor, codes, out)
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
                    for (long j = 0; j < value_dim; j++) dout[i * ev + j] = load(from[j]);
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
                }
                for (long i = 0; i < rows; i += 16) {
                    float factors[16];
                    long here = MIN(16, rows - i);
                    softmax_rows(p + i * s, here, keys, 0, factors);
                    softmax_rows_backward(p + i * s, ds + i * s, here, s);
                    for (long r = i; r < i + here; r++)
                        if (factors[r - i] != 1)
                            for (long j = 0; j < s; j++) p[r * s + j] *= factors[r - i], ds[r * s + j] *= factors[r - i];
                }
                product(rows, e, keys, ds, s, 1, k, e, dq, e, 0);
                for (long i = 0; i < rows; i++)
                    for (long j = 0; j < dim; j++)
                        d_query[((b * length + start + i) * heads + h) * dim + j] = store<T>(dq[i * e + j] * scale);
                product(keys, e, rows, ds, 1, s, q_rows, e, dk, e, start > 0);
                product(keys, ev, rows, p, 1, s, dout, ev, dv, ev, start > 0);
            }
            for (long n = 0; n < keys; n++) {
                for (long j = 0; j < dim; j++)
                    d_key[((b * keys + n) * heads + h) * dim + j] = store<T>(length ? dk[n * e + j] : 0);
                for (long j = 0; j < value_dim; j++)
                    d_value[((b * keys + n) * heads + h) * value_dim + j] = store<T>(length ? dv[n * ev + j] : 0);
            }
        }
    });
}

} // namespace kernels
