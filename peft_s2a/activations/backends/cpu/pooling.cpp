/* Maxima in windows. */
#include "ops.h"
#include "pooling.h"

namespace {

using kernels::Pool;
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

/* Not channels last, whose order the result keeps */
bool of_pooling(const StableIValue *stack) {
    int64_t dim, *strides;
    bool is_contiguous;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_dim(tensor_at(stack, 0), &dim));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(tensor_at(stack, 0), &strides));
    TORCH_ERROR_CODE_CHECK(aoti_torch_is_contiguous(tensor_at(stack, 0), &is_contiguous));
    return first(stack) && (is_contiguous || dim != 4 || strides[1] != 1);
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(s2a, CPU, m) {
    REGISTER(max_pool2d, of_pooling);
    REGISTER(max_pool2d_backward, first);
}
