/* The ops of `peft_s2a.activations.ops` for CPUs: arguments are checked, results made, and kernels called.
 *
 * Registered through LibTorch's stable ABI, so the library fits every torch from 2.13 on and every Python. What kernels do not
 * know (float64, gradients of masks, ...) goes to the same op of `s2a_reference`, with the dispatcher's own stack: a look at a
 * dtype decides, before anything is unpacked.
 */
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <string_view>
#include <tuple>
#include <vector>

#include "activations.h"
#include "attention.h"
#include "norms.h"
#include "pooling.h"
#include "rows.h"

namespace {

using kernels::Coded;
using kernels::Pool;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using torch::stable::detail::from;
using torch::stable::detail::to;
using std::optional;
using std::tuple;
using std::vector;
using Tensors = vector<Tensor>;

#define MAX(a, b) ((a) > (b) ? (a) : (b))
#define CHECK(condition, ...) STD_TORCH_CHECK(condition, "s2a: ", __VA_ARGS__)

/* ------------------------------------------------- arguments ------------------------------------------------- */

/* f with a value of the C++ type for a dtype */
template <typename F>
void by_dtype(ScalarType dtype, const F &f) {
    switch (dtype) {
    case ScalarType::Float: return f(float());
    case ScalarType::BFloat16: return f(bfloat16());
    case ScalarType::Half: return f(float16());
    default: CHECK(false, "kernels take float32, bfloat16 and float16");
    }
}

Tensor empty(const vector<int64_t> &sizes, ScalarType dtype) {
    vector<int64_t> strides(sizes.size());
    int64_t stride = 1;
    for (size_t d = sizes.size(); d-- > 0;) strides[d] = stride, stride *= MAX(sizes[d], 1);
    AtenTensorHandle handle;
    TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(sizes.size(), sizes.data(), strides.data(), to<int32_t>(from(dtype)),
                                                    aoti_torch_device_type_cpu(), 0, &handle));
    return Tensor(handle);
}

Tensor zeros(const vector<int64_t> &sizes) {
    Tensor x = empty(sizes, ScalarType::Float);
    if (x.numel()) memset(x.data_ptr(), 0, x.numel() * sizeof(float)); /* an empty tensor has no memory */
    return x;
}

vector<int64_t> sizes_of(const Tensor &x) { return {x.sizes().begin(), x.sizes().end()}; }

Tensor like(const Tensor &x) { return empty(sizes_of(x), x.scalar_type()); }

Tensor dense(const Tensor &x) { return x.is_contiguous() ? x : torch::stable::contiguous(x); }

template <typename T>
T *data(const Tensor &x) {
    return (T *)(x.numel() ? x.data_ptr() : nullptr);
}

/* A tensor on the CPU with so many dimensions (any: -1), contiguous. */
Tensor checked(const Tensor &x, const char *name, int dim) {
    CHECK(x.is_cpu(), name, " must be on the CPU");
    CHECK(dim < 0 || x.dim() == dim, name, " must have ", dim, " dimensions, not ", x.dim());
    return dense(x);
}

struct Rows {
    long rows, count;
};

/* A tensor as rows, which its last dimension is */
Rows rows_of(const Tensor &x, const char *name) {
    CHECK(x.dim() >= 1, name, " must have a dimension");
    Rows of = {1, (long)x.size(x.dim() - 1)};
    for (int64_t d = 0; d + 1 < x.dim(); d++) of.rows *= (long)x.size(d);
    return of;
}

Tensor bytes(const Tensor &x, const char *name, int64_t numel) {
    CHECK(x.is_cpu() && x.scalar_type() == ScalarType::Byte, name, " must be uint8 on the CPU");
    CHECK(x.numel() == numel, name, " must have ", numel, " bytes, not ", x.numel());
    return dense(x);
}

void check_bits(int64_t bits) {
    CHECK(bits == 1 || bits == 2 || bits == 3 || bits == 4 || bits == 8, "bits must be 1, 2, 3, 4 or 8, not ", bits);
}

/* The size of groups of rows of `count`: as large as the row, where it is larger. */
long checked_group(int64_t bits, int64_t group_size, int64_t count) {
    check_bits(bits);
    CHECK(group_size >= 1 && group_size <= 0x7FFFFFFF, "group_size must be between 1 and 2147483647, not ", group_size);
    return group_size > count && count ? count : group_size;
}

long scales_of(long count, long group) { return scales_width((count + group - 1) / group); }

/* Packed codes and scales of `rows` rows, checked. */
void check_coded(Tensor &packed, Tensor &scales, int64_t rows, int64_t count, int64_t bits, long group) {
    packed = bytes(packed, "packed", rows * packed_width(count, bits));
    scales = bytes(scales, "scales", rows * scales_of(count, group));
}

struct Seed {
    int64_t value = 0;
    bool given;
    explicit Seed(const optional<Tensor> &seed) : given(seed.has_value()) {
        if (!given) return;
        CHECK(seed->is_cpu() && seed->scalar_type() == ScalarType::Long && seed->numel() == 1,
              "a seed must be one int64 on the CPU");
        value = *(const int64_t *)seed->data_ptr();
    }
    const int64_t *get() const { return given ? &value : nullptr; }
};

/* A tensor's numbers as float32, one after another. */
struct Floats {
    Tensor kept;
    optional<Room> room;
    float *start = nullptr;
    explicit Floats(const optional<Tensor> &x, const char *name, int64_t numel) {
        if (!x) return;
        CHECK(x->numel() == numel, name, " must have ", numel, " values, not ", x->numel());
        kept = checked(*x, name, -1);
        if (kept.scalar_type() == ScalarType::Double) kept = torch::stable::to(kept, ScalarType::Float);
        if (kept.scalar_type() == ScalarType::Float) {
            start = data<float>(kept);
            return;
        }
        room.emplace(numel * sizeof(float));
        start = room->floats();
        by_dtype(kept.scalar_type(), [&](auto type) {
            const auto *values = data<decltype(type)>(kept);
            for (int64_t i = 0; i < numel; i++) start[i] = load(values[i]);
        });
    }
};

/* -------------------------------------------- activation functions -------------------------------------------- */

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

/* ---------------------------------------------------- rows ---------------------------------------------------- */

/* Codes, scales and, of norms, rstd of rows; modes and columns as of the kernel. */
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

Coded coded_head(Tensors &parts, int64_t rows, int64_t count, int64_t bits, long group, bool with_mean) {
    CHECK(parts.size() == (with_mean ? 3u : 2u), "codes must be of ", with_mean ? 3 : 2, " tensors, not ", parts.size());
    check_coded(parts[0], parts[1], rows, count, bits, group);
    return {data<uint8_t>(parts[0]), data<uint8_t>(parts[1]), nullptr};
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

/* ---------------------------------------------------- norms ---------------------------------------------------- */

tuple<Tensor, Tensor, Tensor, Tensor> encode_norm(Tensor x, double eps, bool center, bool by_column, int64_t bits,
                                                  int64_t group_size, optional<Tensor> seed) {
    x = checked(x, "x", -1);
    auto [rows, count] = rows_of(x, "x");
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
    auto [rows, count] = rows_of(grad, "grad");
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

/* --------------------------------------------------- pooling --------------------------------------------------- */

using Pair = vector<int64_t>;

Pool pool_of(const Tensor &x, const Pair &kernel, const Pair &stride, const Pair &padding, const Pair &dilation) {
    CHECK(x.dim() >= 2, "max_pool2d takes at least two dimensions, not ", x.dim());
    Pool pool;
    for (int d = 0; d < 2; d++) {
        CHECK(kernel.size() == 2 && stride.size() == 2 && padding.size() == 2 && dilation.size() == 2,
              "sizes of windows must be pairs");
        CHECK(kernel[d] > 0 && stride[d] > 0 && dilation[d] > 0 && padding[d] >= 0 && padding[d] <= kernel[d] / 2,
              "windows must be positive, and padding at most half of them");
        pool.kernel[d] = kernel[d], pool.stride[d] = stride[d], pool.padding[d] = padding[d], pool.dilation[d] = dilation[d];
    }
    CHECK(kernel[0] <= 256 && kernel[1] <= 256 && kernel[0] * kernel[1] <= 256, "a window must have at most 256 places");
    return pool;
}

tuple<Tensor, Tensor> max_pool2d(Tensor x, Pair kernel, Pair stride, Pair padding, Pair dilation, bool ceil_mode,
                                 int64_t bits) {
    check_bits(bits);
    x = checked(x, "x", -1);
    Pool pool = pool_of(x, kernel, stride, padding, dilation);
    CHECK(kernel[0] * kernel[1] <= 1 << bits, "places in a window must fit into ", bits, " bits");
    vector<int64_t> shape = sizes_of(x);
    for (int d = 0; d < 2; d++) {
        long input = shape[shape.size() - 2 + d], room = input + 2 * padding[d] - dilation[d] * (kernel[d] - 1) - 1;
        CHECK(room >= 0 || ceil_mode, "the input is smaller than a window");
        long size = (room + (ceil_mode ? stride[d] - 1 : 0)) / stride[d] + 1;
        if (ceil_mode && (size - 1) * stride[d] >= input + padding[d]) size--; /* the last window has to begin inside */
        CHECK(size > 0, "the input is smaller than a window");
        pool.inputs[d] = input, pool.results[d] = shape[shape.size() - 2 + d] = size;
    }
    Tensor y = empty(shape, x.scalar_type());
    long count = y.numel(), planes = count / (pool.results[0] * pool.results[1]);
    Room places(count);
    by_dtype(x.scalar_type(), [&](auto type) {
        using T = decltype(type);
        kernels::max_pool2d(data<T>(x), pool, planes, data<T>(y), places.bytes());
    });
    Tensor packed = empty({packed_width(count, bits)}, ScalarType::Byte);
    if (count) pack_row(places.bytes(), count, (int)bits, data<uint8_t>(packed));
    return {y, packed};
}

Tensor max_pool2d_backward(Tensor grad, Tensor packed, Pair kernel, Pair stride, Pair padding, Pair dilation, int64_t height,
                           int64_t width, int64_t bits) {
    check_bits(bits);
    grad = checked(grad, "grad", -1);
    CHECK(height >= 0 && width >= 0, "height and width must not be negative");
    Pool pool = pool_of(grad, kernel, stride, padding, dilation);
    vector<int64_t> shape = sizes_of(grad);
    packed = bytes(packed, "packed", packed_width(grad.numel(), bits));
    long planes = 1;
    for (size_t d = 0; d + 2 < shape.size(); d++) planes *= shape[d];
    for (int d = 0; d < 2; d++) pool.results[d] = shape[shape.size() - 2 + d];
    pool.inputs[0] = shape[shape.size() - 2] = height, pool.inputs[1] = shape[shape.size() - 1] = width;
    Tensor d_x = empty(shape, grad.scalar_type());
    by_dtype(grad.scalar_type(), [&](auto type) {
        using T = decltype(type);
        kernels::max_pool2d_backward(data<T>(grad), data<uint8_t>(packed), pool, planes, (int)bits, data<T>(d_x));
    });
    return d_x;
}

/* -------------------------------------------------- attention -------------------------------------------------- */

/* With values that lie beside each other in the last dimension */
Tensor with_rows(const Tensor &x, const char *name) {
    CHECK(x.is_cpu() && x.dim() == 4, name, " must have 4 dimensions on the CPU, not ", x.dim());
    return x.stride(3) == 1 ? x : torch::stable::contiguous(x);
}

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

Coded coded_heads(Tensors &parts, long samples, long heads, long tokens, long count, int64_t bits, long group) {
    Coded coded = coded_head(parts, samples * heads * tokens, count, bits, group, true);
    if (parts[2].numel()) {
        CHECK(parts[2].is_cpu() && parts[2].scalar_type() == ScalarType::BFloat16 &&
                  parts[2].numel() == samples * heads * count,
              "means must be bfloat16, one a head and column");
        parts[2] = dense(parts[2]);
        coded.mean = data<uint16_t>(parts[2]);
    }
    return coded;
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

/* ------------------------------------- what the kernels know, of a raw stack ------------------------------------- */

bool is_known(int32_t dtype) {
    static const int32_t known[] = {aoti_torch_dtype_float32(), aoti_torch_dtype_bfloat16(), aoti_torch_dtype_float16()};
    return dtype == known[0] || dtype == known[1] || dtype == known[2];
}

AtenTensorHandle tensor_at(const StableIValue *stack, int position) { return to<AtenTensorHandle>(stack[position]); }

int32_t dtype_at(const StableIValue *stack, int position) {
    int32_t dtype;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor_at(stack, position), &dtype));
    return dtype;
}

bool first(const StableIValue *stack) { return is_known(dtype_at(stack, 0)); }

bool of_norms(const StableIValue *stack) { return first(stack) && dtype_at(stack, 3) != aoti_torch_dtype_float64(); }

bool of_decoding(const StableIValue *stack) { return is_known(to<int32_t>(stack[5])); }

bool of_gates(const StableIValue *stack) {
    StringHandle name = to<StringHandle>(stack[3]);
    const char *data;
    size_t length;
    TORCH_ERROR_CODE_CHECK(torch_string_c_str(name, &data));
    TORCH_ERROR_CODE_CHECK(torch_string_length(name, &length));
    return first(stack) && gate_named({data, length});
}

bool of_attention(const StableIValue *stack) { return first(stack) && !to<bool>(stack[10]); }

bool of_prompts(const StableIValue *stack) { return first(stack) && dtype_at(stack, 0) == dtype_at(stack, 1); }

/* Not channels last, whose order the result keeps */
bool of_pooling(const StableIValue *stack) {
    int64_t dim, *strides;
    bool is_contiguous;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_dim(tensor_at(stack, 0), &dim));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(tensor_at(stack, 0), &strides));
    TORCH_ERROR_CODE_CHECK(aoti_torch_is_contiguous(tensor_at(stack, 0), &is_contiguous));
    return first(stack) && (is_contiguous || dim != 4 || strides[1] != 1);
}

#define REGISTER(name, known)                                                                                          \
    m.impl(#name, [](StableIValue *stack, uint64_t inputs, uint64_t outputs) {                                         \
        if (known(stack)) return TORCH_BOX(&name)(stack, inputs, outputs);                                             \
        TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("s2a_reference::" #name, "", stack, TORCH_ABI_VERSION));          \
    })

} // namespace

STABLE_TORCH_LIBRARY_IMPL(s2a, CPU, m) {
    REGISTER(encode_steps, first);
    REGISTER(scale_by_levels, first);
    REGISTER(scale_by_levels_, first);
    REGISTER(encode_groups, first);
    REGISTER(encode_roots, first);
    REGISTER(encode_channels, first);
    REGISTER(decode_groups, of_decoding);
    REGISTER(softmax_backward, first);
    REGISTER(gated_backward, of_gates);
    REGISTER(encode_norm, first);
    REGISTER(norm_backward, of_norms);
    REGISTER(batch_norm_backward, of_norms);
    REGISTER(max_pool2d, of_pooling);
    REGISTER(max_pool2d_backward, first);
    REGISTER(encode_heads, first);
    REGISTER(attention_backward, of_attention);
    REGISTER(prompt_attention, of_prompts);
    REGISTER(prompt_attention_backward, first);
}
