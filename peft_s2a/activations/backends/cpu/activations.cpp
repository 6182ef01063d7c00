/* Activation functions: codes of their derivatives. */
#include "activations.h"
#include "ops.h"

namespace {

Tensor encode_steps(Tensor x, vector<double> thresholds, vector<int64_t> codes, int64_t bits) {
    check_bits(bits);
    x = checked(x, "x", -1);
    CHECK(codes.size() == thresholds.size() + 1, "there must be one code more than thresholds");
    vector<float> edges(thresholds.begin(), thresholds.end());
    vector<int32_t> deltas(thresholds.size());
    for (int64_t code : codes) CHECK(code >= 0 && code < 1 << bits, "a code must fit into ", bits, " bits, not be ", code);
    for (size_t i = 0; i < deltas.size(); i++) deltas[i] = (int32_t)(codes[i + 1] - codes[i]);
    long count = x.numel();
    Tensor packed = empty({packed_width(count, bits)}, ScalarType::Byte);
    Room scratch(bits == 3 ? count : 0);
    const kernels::Steps steps{edges.data(), deltas.data(), (int)edges.size(), (int)codes[0]};
    by_dtype(x.scalar_type(), [&](auto type) {
        kernels::encode_steps(data<decltype(type)>(x), count, steps, (int)bits, data<uint8_t>(packed), scratch.bytes());
    });
    return packed;
}

/* Writes to `scaled`, which may be `grad`: every value is read before it is written. */
void scale(const Tensor &grad, Tensor packed, const vector<double> &levels, int64_t bits, Tensor scaled) {
    check_bits(bits);
    long count = grad.numel();
    packed = bytes(packed, "packed", packed_width(count, bits));
    CHECK(!levels.empty() && levels.size() <= 256, "there must be 1 to 256 levels, not ", levels.size());
    float table[256] = {}; /* codes without a level give zero */
    for (size_t i = 0; i < levels.size(); i++) table[i] = (float)levels[i];
    Room scratch(bits == 3 ? count : 0);
    by_dtype(grad.scalar_type(), [&](auto type) {
        using T = decltype(type);
        kernels::scale_by_levels(data<T>(grad), data<uint8_t>(packed), count, table, (int)bits, data<T>(scaled), scratch.bytes());
    });
}

Tensor scale_by_levels(Tensor grad, Tensor packed, vector<double> levels, int64_t bits) {
    grad = checked(grad, "grad", -1);
    Tensor scaled = like(grad);
    scale(grad, packed, levels, bits, scaled);
    return scaled;
}

void scale_by_levels_(Tensor grad, Tensor packed, vector<double> levels, int64_t bits) {
    CHECK(grad.is_contiguous(), "grad must be contiguous, to be written over");
    scale(grad, packed, levels, bits, grad);
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(s2a, CPU, m) {
    REGISTER(encode_steps, first);
    REGISTER(scale_by_levels, first);
    REGISTER(scale_by_levels_, first);
}
