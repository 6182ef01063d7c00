/* Rows in groups of one scale, softmax and gates. */
#include "ops.h"

tuple<Tensor, Tensor, Tensor> encode(const Tensor &x, int64_t rows, int64_t count, int mode, double eps, int64_t bits,
                                     int64_t group_size, const optional<Tensor> &seed, const float *columns, long run) {
    long group = checked_group(bits, group_size, count);
    Seed number(seed);
    Tensor packed = empty({rows, packed_width(count, bits)}, ScalarType::Byte);
    Tensor scales = empty({rows, scales_of(count, group)}, ScalarType::Byte);
    Tensor rstd = empty({mode == 1 || mode == 2 ? rows : 0}, ScalarType::Float);
    if (x.numel())
        by_dtype(x.scalar_type(), [&](auto type) {
            kernels::encode_rows(data<decltype(type)>(x), rows, count, mode, (float)eps, (int)bits, group, number.get(), columns, run,
                        data<uint8_t>(packed), data<uint8_t>(scales), data<float>(rstd));
        });
    return {packed, scales, rstd};
}

namespace {

tuple<Tensor, Tensor> encode_groups(Tensor x, int64_t bits, int64_t group_size, optional<Tensor> seed) {
    x = checked(x, "x", 2);
    auto [packed, scales, rstd] = encode(x, x.size(0), x.size(1), 0, 0, bits, group_size, seed, nullptr, 1);
    return {packed, scales};
}

tuple<Tensor, Tensor> encode_roots(Tensor p, int64_t bits, int64_t group_size, optional<Tensor> seed) {
    p = checked(p, "p", 2);
    auto [packed, scales, rstd] = encode(p, p.size(0), p.size(1), 3, 0, bits, group_size, seed, nullptr, 1);
    return {packed, scales};
}

tuple<Tensor, Tensor> encode_channels(Tensor x, Tensor mean, Tensor rstd, int64_t bits, int64_t group_size,
                                      optional<Tensor> seed) {
    x = checked(x, "x", 3);
    int64_t channels = x.size(1);
    Floats means(mean, "mean", channels), scales_of_channels(rstd, "rstd", channels);
    Room columns(2 * channels * sizeof(float));
    if (channels) {
        memcpy(columns.floats(), means.start, channels * sizeof(float));
        memcpy(columns.floats() + channels, scales_of_channels.start, channels * sizeof(float));
    }
    auto [packed, scales, none] = encode(x, x.size(0), channels * x.size(2), 0, 0, bits, group_size, seed, columns.floats(),
                                         x.size(2));
    return {packed, scales};
}

Tensor decode_groups(Tensor packed, Tensor scales, int64_t bits, int64_t group_size, int64_t count, ScalarType dtype) {
    CHECK(packed.dim() == 2, "packed must have 2 dimensions, not ", packed.dim());
    CHECK(count >= 0, "count must not be negative");
    long rows = packed.size(0), group = checked_group(bits, group_size, count);
    check_coded(packed, scales, rows, count, bits, group);
    Tensor values = empty({rows, count}, dtype);
    if (values.numel())
        by_dtype(dtype, [&](auto type) {
            kernels::decode_rows(data<uint8_t>(packed), data<uint8_t>(scales), rows, count, (int)bits, group, data<decltype(type)>(values));
        });
    return values;
}

Tensor softmax_backward(Tensor grad, Tensor packed, Tensor scales, int64_t bits, int64_t group_size) {
    grad = checked(grad, "grad", 2);
    long rows = grad.size(0), count = grad.size(1), group = checked_group(bits, group_size, count);
    check_coded(packed, scales, rows, count, bits, group);
    Tensor d_x = like(grad);
    if (grad.numel())
        by_dtype(grad.scalar_type(), [&](auto type) {
            using T = decltype(type);
            kernels::softmax_backward(data<T>(grad), data<uint8_t>(packed), data<uint8_t>(scales), rows, count, (int)bits, group,
                             data<T>(d_x));
        });
    return d_x;
}

/* The gates x sigmoid(inner x + cubic x^3), and GELU, as `gate16` takes them. */
struct Gate {
    std::string_view name;
    float inner, cubic;
};
constexpr float TANH_GELU = 1.5957691216057308f; /* 2 sqrt(2 / pi) */
constexpr Gate GATES[] = {
    {"gelu", 0, 0}, {"silu", 1, 0}, {"quick_gelu", 1.702f, 0}, {"gelu_tanh", TANH_GELU, 0.044715f * TANH_GELU}};

const Gate *gate_named(std::string_view name) {
    for (const Gate &gate : GATES)
        if (gate.name == name) return &gate;
    return nullptr;
}

tuple<Tensor, Tensor> gated_backward(Tensor grad, Tensors gate, Tensors up, std::string name, vector<std::string>,
                                     vector<double>, int64_t bits, int64_t group_size) {
    grad = checked(grad, "grad", 2);
    long rows = grad.size(0), count = grad.size(1), group = checked_group(bits, group_size, count);
    Coded gates = coded_head(gate, rows, count, bits, group, false), ups = coded_head(up, rows, count, bits, group, false);
    const Gate *function = gate_named(name);
    Tensor d_gate = like(grad), d_up = like(grad);
    if (grad.numel())
        by_dtype(grad.scalar_type(), [&](auto type) {
            using T = decltype(type);
            kernels::gated_backward(data<T>(grad), gates, ups, function->inner, function->cubic, rows, count, (int)bits, group,
                           data<T>(d_gate), data<T>(d_up));
        });
    return {d_gate, d_up};
}

bool of_decoding(const StableIValue *stack) { return is_known(to<int32_t>(stack[5])); }

bool of_gates(const StableIValue *stack) {
    StringHandle name = to<StringHandle>(stack[3]);
    const char *data;
    size_t length;
    TORCH_ERROR_CODE_CHECK(torch_string_c_str(name, &data));
    TORCH_ERROR_CODE_CHECK(torch_string_length(name, &length));
    return first(stack) && gate_named({data, length});
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(s2a, CPU, m) {
    REGISTER(encode_groups, first);
    REGISTER(encode_roots, first);
    REGISTER(encode_channels, first);
    REGISTER(decode_groups, of_decoding);
    REGISTER(softmax_backward, first);
    REGISTER(gated_backward, of_gates);
}
