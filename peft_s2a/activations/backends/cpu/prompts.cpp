/* Attention to prompts beside a layer's own. */
#include "ops.h"
#include "prompts.h"

namespace {

/* Keys and values of prompts as the kernels read them, [heads, prompts, size]: gated, and rounded to the dtype of what
 * attends to them. */
struct Prompts {
    long heads, count = 0, dim = 0, value_dim = 0;
    Floats given_keys, given_values, gates;
    optional<Room> room;
    float *keys = nullptr, *values = nullptr, *openings = nullptr;

    Prompts(const Tensor &key, const Tensor &value, const Tensor &gate, ScalarType dtype)
        : heads(gate.numel()), given_keys(key, "key", key.numel()), given_values(value, "value", value.numel()),
          gates(gate, "gate", gate.numel()) {
        CHECK(key.dim() == 2 && value.dim() == 2 && gate.dim() == 1 && heads > 0 && key.size(0) == value.size(0) &&
                  key.size(1) % heads == 0 && value.size(1) % heads == 0,
              "prompts must be [prompts, heads * size], and their gate [heads]");
        count = key.size(0), dim = key.size(1) / heads, value_dim = value.size(1) / heads;
        room.emplace((heads * count * (dim + value_dim) + heads) * sizeof(float));
        keys = room->floats(), values = keys + heads * count * dim, openings = values + heads * count * value_dim;
        by_dtype(dtype, [&](auto type) {
            using T = decltype(type);
            for (long h = 0; h < heads; h++) {
                openings[h] = std::tanh(gates.start[h]);
                for (long j = 0; j < count; j++) {
                    const float *k = given_keys.start + (j * heads + h) * dim, *v = given_values.start + (j * heads + h) * value_dim;
                    for (long i = 0; i < dim; i++) keys[(h * count + j) * dim + i] = load(store<T>(k[i]));
                    for (long i = 0; i < value_dim; i++)
                        values[(h * count + j) * value_dim + i] = load(store<T>(v[i] * openings[h]));
                }
            }
        });
    }
};

Tensor prompt_attention(Tensor attended, Tensor query, Tensor key, Tensor value, Tensor gate, double scale) {
    attended = checked(attended, "attended", 3), query = with_rows(query, "query");
    long samples = query.size(0), heads = query.size(1), length = query.size(2), dim = query.size(3);
    Prompts prompts(key, value, gate, query.scalar_type());
    CHECK(prompts.heads == heads && prompts.dim == dim, "prompts must have the heads of the query");
    CHECK(attended.size(0) == samples && attended.size(1) == length && attended.size(2) == heads * prompts.value_dim,
          "attended must be [samples, tokens, heads * size of values]");
    Tensor out = like(attended);
    const long strides[3] = {(long)query.stride(0), (long)query.stride(1), (long)query.stride(2)};
    if (out.numel())
        by_dtype(query.scalar_type(), [&](auto type) {
            using T = decltype(type);
            kernels::prompt_attention(data<T>(attended), data<T>(query), strides, prompts.keys, prompts.values, (float)scale, samples,
                             heads, length, prompts.count, dim, prompts.value_dim, data<T>(out));
        });
    return out;
}

tuple<Tensor, Tensor, Tensor, Tensor> prompt_attention_backward(Tensor grad, Tensors query, Tensor key, Tensor value,
                                                                Tensor gate, double scale, int64_t bits, int64_t group_size) {
    grad = checked(grad, "grad", 3);
    CHECK(query.size() == 3 && query[0].dim() == 4, "query must be the three results of encode_heads");
    long samples = query[0].size(0), heads = query[0].size(1), length = query[0].size(2);
    Prompts prompts(key, value, gate, grad.scalar_type());
    long count = prompts.count, dim = prompts.dim, value_dim = prompts.value_dim;
    CHECK(prompts.heads == heads, "prompts must have the heads of the query");
    CHECK(grad.size(0) == samples && grad.size(1) == length && grad.size(2) == heads * value_dim,
          "grad must be [samples, tokens, heads * size of values]");
    long group = checked_group(bits, group_size, dim);
    Coded queries = coded_heads(query, samples, heads, length, dim, bits, group);
    Tensor d_query = empty({samples, length, heads * dim}, grad.scalar_type());
    Tensor d_key = zeros(sizes_of(key)), d_value = zeros(sizes_of(value)), d_gate = zeros({heads});
    if (!grad.numel()) return {d_query, d_key, d_value, d_gate};
    Room room(heads * count * (dim + value_dim) * sizeof(float));
    float *of_keys = room.floats(), *of_values = of_keys + heads * count * dim;
    by_dtype(grad.scalar_type(), [&](auto type) {
        using T = decltype(type);
        kernels::prompt_attention_backward(data<T>(grad), queries, prompts.keys, prompts.values, (float)scale, (int)bits, group,
                                  samples, heads, length, count, dim, value_dim, data<T>(d_query), of_keys, of_values);
    });
    for (long h = 0; h < heads; h++) {
        float opening = prompts.openings[h];
        double sum = 0, exact = std::tanh((double)prompts.gates.start[h]); /* near one, 1 - tanh^2 is small */
        for (long j = 0; j < count; j++) {
            memcpy(data<float>(d_key) + (j * heads + h) * dim, of_keys + (h * count + j) * dim, dim * sizeof(float));
            const float *from = of_values + (h * count + j) * value_dim;
            const float *values = prompts.given_values.start + (j * heads + h) * value_dim;
            float *d = data<float>(d_value) + (j * heads + h) * value_dim;
            for (long i = 0; i < value_dim; i++) d[i] = from[i] * opening, sum += (double)from[i] * values[i];
        }
        data<float>(d_gate)[h] = (float)(sum * (1 - exact * exact));
    }
    return {d_query, d_key, d_value, d_gate};
}

bool of_prompts(const StableIValue *stack) { return first(stack) && dtype_at(stack, 0) == dtype_at(stack, 1); }

} // namespace

STABLE_TORCH_LIBRARY_IMPL(s2a, CPU, m) {
    REGISTER(prompt_attention, of_prompts);
    REGISTER(prompt_attention_backward, first);
}
