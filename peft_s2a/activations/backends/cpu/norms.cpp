/* Normalisations over rows and over channels. */
#include "norms.h"
#include "ops.h"

namespace {

tuple<Tensor, Tensor, Tensor, Tensor> encode_norm(Tensor x, double eps, bool center, bool by_column, int64_t bits,
                                                  int64_t group_size, optional<Tensor> seed) {
    x = checked(x, "x", -1);
    const Extents of = rows_of(x, "x");
    const long rows = of.rows, count = of.count;
    Tensor columns = by_column ? empty({2, count}, ScalarType::BFloat16) : empty({0}, ScalarType::BFloat16);
    Room standards((by_column ? 2 * count : 0) * sizeof(float));
    if (by_column) {
        uint16_t *statistics = data<uint16_t>(columns);
        if (count)
            by_dtype(x.scalar_type(), [&](auto type) {
                kernels::column_statistics(data<decltype(type)>(x), rows, count, center, (float)eps, statistics);
            });
        for (long i = 0; i < count; i++) {
            standards.floats()[i] = bf16_to_float(statistics[i]);
            standards.floats()[count + i] = 1 / bf16_to_float(statistics[count + i]);
        }
    }
    auto [packed, scales, rstd] = encode(x, rows, count, center ? 1 : 2, eps, bits, group_size, seed,
                                         by_column ? standards.floats() : nullptr, 1);
    return {packed, scales, rstd, columns};
}

tuple<Tensor, Tensor, Tensor> norm_backward(Tensor grad, Tensor packed, Tensor scales, Tensor rstd, Tensor columns,
                                            optional<Tensor> weight, bool center, int64_t bits, int64_t group_size,
                                            vector<bool> wanted) {
    grad = checked(grad, "grad", -1);
    const Extents of = rows_of(grad, "grad");
    const long rows = of.rows, count = of.count;
    long group = checked_group(bits, group_size, count);
    check_coded(packed, scales, rows, count, bits, group);
    CHECK(wanted.size() == 3, "wanted must be three");
    Floats deviations(rstd, "rstd", rows), weights(weight, "weight", count);
    Floats standards(columns.numel() ? optional<Tensor>(columns) : std::nullopt, "columns", 2 * count);
    Tensor d_x = wanted[0] ? like(grad) : empty({0}, grad.scalar_type());
    Tensor d_weight = zeros({wanted[1] ? count : 0}), d_bias = zeros({wanted[2] ? count : 0});
    if (grad.numel()) {
        Room sums((wanted[1] || wanted[2] ? thread_count() * 2 * count : 0) * sizeof(float), true);
        by_dtype(grad.scalar_type(), [&](auto type) {
            using T = decltype(type);
            kernels::norm_backward(data<T>(grad), data<uint8_t>(packed), data<uint8_t>(scales), deviations.start, standards.start,
                          weights.start, rows, count, center, (int)bits, group, data<T>(d_x), data<float>(d_weight),
                          data<float>(d_bias), sums.floats());
        });
    }
    return {d_x, d_weight, d_bias};
}

tuple<Tensor, Tensor, Tensor> batch_norm_backward(Tensor grad, Tensor packed, Tensor scales, Tensor rstd,
                                                  optional<Tensor> weight, bool live, int64_t bits, int64_t group_size,
                                                  vector<bool> wanted) {
    grad = checked(grad, "grad", 3);
    long samples = grad.size(0), channels = grad.size(1), size = grad.size(2);
    long group = checked_group(bits, group_size, channels * size);
    check_coded(packed, scales, samples, channels * size, bits, group);
    CHECK(wanted.size() == 3, "wanted must be three");
    Floats deviations(rstd, "rstd", channels), weights(weight, "weight", channels);
    Tensor d_x = wanted[0] ? like(grad) : empty({0}, grad.scalar_type());
    Tensor d_weight = zeros({wanted[1] ? channels : 0}), d_bias = zeros({wanted[2] ? channels : 0});
    if (!grad.numel()) return {d_x, d_weight, d_bias};
    long threads = thread_count();
    Room partial(threads * 2 * channels * sizeof(float), true), total(3 * channels * sizeof(float), true);
    float *sums = total.floats(), *factors = sums + 2 * channels;
    by_dtype(grad.scalar_type(), [&](auto type) {
        using T = decltype(type);
        kernels::channel_sums(data<T>(grad), data<uint8_t>(packed), data<uint8_t>(scales), samples, channels, size, (int)bits, group,
                     partial.floats());
        for (long thread = 0; thread < threads; thread++)
            for (long i = 0; i < 2 * channels; i++) sums[i] += partial.floats()[thread * 2 * channels + i];
        if (wanted[1]) memcpy(data<float>(d_weight), sums + channels, channels * sizeof(float));
        if (wanted[2]) memcpy(data<float>(d_bias), sums, channels * sizeof(float));
        if (!wanted[0]) return;
        for (long i = 0; i < 2 * channels; i++) sums[i] /= (float)(samples * size);
        for (long i = 0; i < channels; i++) factors[i] = deviations.start[i] * (weights.start ? weights.start[i] : 1);
        kernels::channel_gradient(data<T>(grad), data<uint8_t>(packed), data<uint8_t>(scales), live ? sums : nullptr, factors, samples,
                         channels, size, (int)bits, group, data<T>(d_x));
    });
    return {d_x, d_weight, d_bias};
}

bool of_norms(const StableIValue *stack) { return first(stack) && dtype_at(stack, 3) != aoti_torch_dtype_float64(); }

} // namespace

STABLE_TORCH_LIBRARY_IMPL(s2a, CPU, m) {
    REGISTER(encode_norm, first);
    REGISTER(norm_backward, of_norms);
    REGISTER(batch_norm_backward, of_norms);
}
