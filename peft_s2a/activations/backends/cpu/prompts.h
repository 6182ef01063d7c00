/* Attention to prompts: few keys and values, equal for all samples. */
#pragma once

#include "attention.h"

namespace kernels {

/* Prompts of all heads, [heads, prompts, size], as `product` reads them: columns, [heads, size, PAD16(prompts)], or rows, [heads,
 * prompts, PAD16(size)]. Both are filled up with the zeros that `out` has. */
static void in_columns(const float *x, long heads, long prompts, long size, float *out) {
    for (long h = 0; h < heads; h++)
        transpose(x + h * prompts * size, prompts, size, size, out + h * size * PAD16(prompts), PAD16(prompts));
}

static void in_rows(const float *x, long rows, long size, float *out) {
    for (long j = 0; j < rows; j++) memcpy(out + j * PAD16(size), x + j * size, size * sizeof(float));
}

#define PROMPT_ROWS 96

/* out[b, n, h, :] = attended + softmax(scale q key[h]^T) value[h], with q[b, h, n, :] at b * strides[0] + h * strides[1] +
 * n * strides[2]; attended and out are [B, N, H, D]. */
template <typename T>
void prompt_attention(const T *attended, const T *query, const long *strides, const float *key,
                                   const float *value, float scale, long samples, long heads, long length, long prompts,
                                   long dim, long value_dim, T *out) {
    long s = PAD16(prompts), ev = PAD16(value_dim);
    Room shared(heads * (dim * s + prompts * ev) * sizeof(float), true);
    float *keys = shared.floats(), *values = keys + heads * dim * s;
    in_columns(key, heads, prompts, dim, keys);
    in_rows(value, heads * prompts, value_dim, values);
    parallel(samples * heads, LARGE, [&](long begin, long end) {
        Room memory(PROMPT_ROWS * (dim + s + ev) * sizeof(float));
        float *q = memory.floats(), *p = q + PROMPT_ROWS * dim, *o = p + PROMPT_ROWS * s;
        for (long head = begin; head < end; head++) {
            long b = head / heads, h = head % heads;
            const float *kt = keys + h * dim * s, *v = values + h * prompts * ev;
            for (long start = 0; start < length; start += PROMPT_ROWS) {
                long rows = MIN(PROMPT_ROWS, length - start);
                for (long i = 0; i < rows; i++) {
                    const T *from = query + b * strides[0] + h * strides[1] + (start + i) * strides[2];
                    for (long j = 0; j < dim; j++) q[i * dim + j] = load(from[j]) * scale;
                }
                product(rows, s, dim, q, dim, 1, kt, s, p, s, 0);
                for (long i = 0; i < rows; i += 16) {
                    float factors[16];
                    softmax_rows(p + i * s, MIN(16, rows - i), prompts, NAN, factors);
                }
                product(rows, ev, prompts, p, s, 1, v, ev, o, ev, 0);
                for (long i = 0; i < rows; i++) {
                    long at = ((b * length + start + i) * heads + h) * value_dim;
                    for (long j = 0; j < value_dim; j++) out[at + j] = store<T>(load(attended[at + j]) + o[i * ev + j]);
                }
            }
        }
    });
}

/* Gradients of `prompt_attention` for the query ([B, N, H, D]), keys and values ([H, P, D]); grad is [B, N, H, D]. */
template <typename T>
void prompt_attention_backward(const T *grad, const Coded &query, const float *key, const float *value,
                                            float scale, int bits, long group, long samples, long heads, long length,
                                            long prompts, long dim, long value_dim, T *d_query, float *d_key,
                                            float *d_value) {
    long s = PAD16(prompts), e = PAD16(dim), ev = PAD16(value_dim);
    long width = packed_width(dim, bits), stride = scales_width((dim + group - 1) / group);
    long keys = heads * prompts * e, values = heads * prompts * ev; /* of one thread's sums */
    long threads = thread_count();
    Room room(threads * (keys + values) * sizeof(float), true);
    float *sums = room.floats();
    Room shared(heads * ((dim + value_dim) * s + prompts * e) * sizeof(float), true);
    float *key_columns = shared.floats(), *value_columns = key_columns + heads * dim * s;
    float *key_rows = value_columns + heads * value_dim * s;
    in_columns(key, heads, prompts, dim, key_columns);
    in_columns(value, heads, prompts, value_dim, value_columns);
    in_rows(key, heads * prompts, dim, key_rows);
    parallel(samples * heads, LARGE, [&](long begin, long end) {
        long thread = thread_index();
        long size = PROMPT_ROWS * (2 * e + ev + 2 * s);
        Room memory(size * sizeof(float) + e, true);
        float *q = memory.floats(), *dq = q + PROMPT_ROWS * e, *dout = dq + PROMPT_ROWS * e, *p = dout + PROMPT_ROWS * ev;
        float *ds = p + PROMPT_ROWS * s;
        uint8_t *codes = (uint8_t *)(ds + PROMPT_ROWS * s);
        for (long head = begin; head < end; head++) {
            long b = head / heads, h = head % heads;
            const float *kt = key_columns + h * dim * s, *vt = value_columns + h * value_dim * s, *k = key_rows + h * prompts * e;
            float *dk = sums + thread * (keys + values) + h * prompts * e, *dv = sums + thread * (keys + values) + keys + h * prompts * ev;
            for (long start = 0; start < length; start += PROMPT_ROWS) {
                long rows = MIN(PROMPT_ROWS, length - start), first = head * length + start;
                decode_head(query.packed + first * width, query.scales + first * stride,
                            query.mean ? query.mean + head * dim : NULL, rows, dim, bits, group, scale, codes, q);
                for (long i = 0; i < rows; i++)
                    for (long j = 0; j < value_dim; j++)
                        dout[i * ev + j] = load(grad[((b * length + start + i) * heads + h) * value_dim + j]);
                product(rows, s, dim, q, e, 1, kt, s, p, s, 0);
                product(rows, s, value_dim, dout, ev, 1, vt, s, ds, s, 0);
                for (long i = 0; i < rows; i += 16) {
                    float factors[16];
                    softmax_rows(p + i * s, MIN(16, rows - i), prompts, NAN, factors);
                    softmax_rows_backward(p + i * s, ds + i * s, MIN(16, rows - i), s);
                }
                product(rows, e, prompts, ds, s, 1, k, e, dq, e, 0);
                for (long i = 0; i < rows; i++)
                    for (long j = 0; j < dim; j++)
                        d_query[((b * length + start + i) * heads + h) * dim + j] = store<T>(dq[i * e + j] * scale);
                product(prompts, e, rows, ds, 1, s, q, e, dk, e, 1);
                product(prompts, ev, rows, p, 1, s, dout, ev, dv, ev, 1);
            }
        }
    });
    for (long j = 0; j < heads * prompts; j++) {
        for (long i = 0; i < dim; i++) d_key[j * dim + i] = 0;
        for (long i = 0; i < value_dim; i++) d_value[j * value_dim + i] = 0;
        for (long thread = 0; thread < threads; thread++) {
            const float *from = sums + thread * (keys + values);
            for (long i = 0; i < dim; i++) d_key[j * dim + i] += from[j * e + i];
            for (long i = 0; i < value_dim; i++) d_value[j * value_dim + i] += from[keys + j * ev + i];
        }
    }
}

} // namespace kernels
