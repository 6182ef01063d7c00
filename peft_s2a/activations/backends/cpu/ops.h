/* What the ops have in common: their arguments are checked, results made, and what no kernel knows goes to the reference.
 *
 * The ops of `peft_s2a.activations.ops` for CPUs lie in one file for every family, so that those are compiled side by side. They
 * register themselves through LibTorch's stable ABI, so the library fits every torch from 2.13 on and every Python. What kernels
 * do not know (float64, gradients of masks, ...) goes to the same op of `s2a_reference`, with the dispatcher's own stack: a look
 * at a dtype decides, before anything is unpacked.
 */
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <string_view>
#include <tuple>
#include <vector>

#include "rows.h"

namespace {

using kernels::Coded;
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

struct Extents {
    long rows, count;
};

/* A tensor as rows, which its last dimension is */
Extents rows_of(const Tensor &x, const char *name) {
    CHECK(x.dim() >= 1, name, " must have a dimension");
    Extents of = {1, (long)x.size(x.dim() - 1)};
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

Coded coded_head(Tensors &parts, int64_t rows, int64_t count, int64_t bits, long group, bool with_mean) {
    CHECK(parts.size() == (with_mean ? 3u : 2u), "codes must be of ", with_mean ? 3 : 2, " tensors, not ", parts.size());
    check_coded(parts[0], parts[1], rows, count, bits, group);
    return {data<uint8_t>(parts[0]), data<uint8_t>(parts[1]), nullptr};
}

/* With values that lie beside each other in the last dimension */
Tensor with_rows(const Tensor &x, const char *name) {
    CHECK(x.is_cpu() && x.dim() == 4, name, " must have 4 dimensions on the CPU, not ", x.dim());
    return x.stride(3) == 1 ? x : torch::stable::contiguous(x);
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

#define REGISTER(name, known)                                                                                          \
    m.impl(#name, [](StableIValue *stack, uint64_t inputs, uint64_t outputs) {                                         \
        if (known(stack)) return TORCH_BOX(&name)(stack, inputs, outputs);                                             \
        TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("s2a_reference::" #name, "", stack, TORCH_ABI_VERSION));          \
    })

} // namespace

/* Codes, scales and, of norms, rstd of rows; modes and columns as of `kernels::encode_rows`. */
std::tuple<torch::stable::Tensor, torch::stable::Tensor, torch::stable::Tensor> encode(
    const torch::stable::Tensor &x, int64_t rows, int64_t count, int mode, double eps, int64_t bits, int64_t group_size,
    const std::optional<torch::stable::Tensor> &seed, const float *columns, long run);
