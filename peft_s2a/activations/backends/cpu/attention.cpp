/* Scaled dot-product attention. */
#include "attention.h"
#include "ops.h"

namespace {

tuple<Tensor, Tensor, Tensor> encode_heads(Tensor x, int64_t bits, int64_t group_size, bool center, bool keep_mean,
                                           optional<Tensor> seed) {
    x = with_rows(x, "x");
    long samples = x.size(0), heads = x.size(1), tokens = x.size(2), dim = x.size(3);
    long group = checked_group(bits, group_size, dim);
    Seed number(seed);
    Tensor packed = empty({samples, heads, tokens, packed_width(dim, bits)}, ScalarType::Byte);
    Tensor scales = empty({samples, heads, tokens, scales_of(dim, group)}, ScalarType::Byte);
    bool kept = center && keep_mean && tokens;
    Tensor mean = kept ? empty({samples, heads, 1, dim}, ScalarType::BFloat16) : empty({0}, ScalarType::BFloat16);
    if (x.numel())
        by_dtype(x.scalar_type(), [&](auto type) {
            kernels::encode_heads(data<decltype(type)>(x), samples, heads, tokens, dim, x.stride(0), x.stride(1), x.stride(2), center,
                         (int)bits, group, number.get(), data<uint8_t>(packed), data<uint8_t>(scales), data<uint16_t>(mean));
        });
    return {packed, scales, mean};
}

Tensor empty_heads(long samples, long tokens, long heads, long dim, ScalarType dtype) {
    return torch::stable::transpose(empty({samples, tokens, heads, dim}, dtype), 1, 2);
}

tuple<Tensor, Tensor, Tensor, Tensor> attention_backward(Tensor grad, Tensors query, Tensors key, Tensors value,
                                                         optional<Tensor> mask, bool is_causal, double scale, int64_t bits,
                                                         int64_t group_size, int64_t dim, bool) {
    grad = with_rows(grad, "grad");
    CHECK(key.size() == 3 && key[0].dim() == 4, "key must be the three results of encode_heads");
    CHECK(dim >= 0, "dim must not be negative");
    long samples = grad.size(0), heads = grad.size(1), length = grad.size(2), value_dim = grad.size(3), keys = key[0].size(2);
    checked_group(bits, group_size, 0);
    long group = (long)group_size;
    Coded queries = coded_heads(query, samples, heads, length, dim, bits, group);
    Coded all_keys = coded_heads(key, samples, heads, keys, dim, bits, group);
    Coded values = coded_heads(value, samples, heads, keys, value_dim, bits, group);
    Tensor d_query = empty_heads(samples, length, heads, dim, grad.scalar_type());
    Tensor d_key = empty_heads(samples, keys, heads, dim, grad.scalar_type());
    Tensor d_value = empty_heads(samples, keys, heads, value_dim, grad.scalar_type());
    optional<Floats> terms;
    const float *term = nullptr;
    long strides[4] = {};
    optional<Room> hidden;
    if (mask) {
        CHECK(mask->dim() == 4, "mask must have 4 dimensions, not ", mask->dim());
        Tensor own = checked(*mask, "mask", 4);
        const long full[4] = {samples, heads, length, keys};
        for (int d = 3, stride = 1; d >= 0; stride *= (int)own.size(d), d--) {
            CHECK(own.size(d) == full[d] || own.size(d) == 1, "mask must broadcast to the scores");
            strides[d] = own.size(d) == 1 ? 0 : stride;
        }
        if (own.scalar_type() == ScalarType::Bool) {
            hidden.emplace(own.numel() * sizeof(float));
            const bool *seen = data<bool>(own);
            for (long i = 0; i < own.numel(); i++) hidden->floats()[i] = seen[i] ? 0 : -INFINITY;
            term = hidden->floats();
        } else {
            terms.emplace(own, "mask", own.numel());
            term = terms->start;
        }
    }
    if (d_query.numel() || d_key.numel() || d_value.numel()) {
        Tensor room = empty({thread_count() * kernels::attention_workspace(length, keys, dim, value_dim)}, ScalarType::Float);
        const long grad_strides[3] = {(long)grad.stride(0), (long)grad.stride(1), (long)grad.stride(2)};
        by_dtype(grad.scalar_type(), [&](auto type) {
            using T = decltype(type);
            kernels::attention_backward(data<T>(grad), grad_strides, queries, all_keys, values, term, strides, is_causal, (float)scale,
                               (int)bits, group, samples, heads, length, keys, dim, value_dim, data<T>(d_query), data<T>(d_key),
                               data<T>(d_value), data<float>(room));
        });
    }
    return {d_query, d_key, d_value, empty({0}, ScalarType::Float)};
}

bool of_attention(const StableIValue *stack) { return first(stack) && !to<bool>(stack[10]); }

} // namespace

STABLE_TORCH_LIBRARY_IMPL(s2a, CPU, m) {
    REGISTER(encode_heads, first);
    REGISTER(attention_backward, of_attention);
}
