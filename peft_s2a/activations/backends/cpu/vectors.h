/* Sixteen float32 at a time, in the vectors that GCC and Clang share; what they lack is written out for AVX-512. Also element
 * types, room that is checked, and threads. */
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <type_traits>

#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/Half.h>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

#define BLOCK 512
#define INLINE static inline __attribute__((always_inline))
#define MIN(a, b) ((a) < (b) ? (a) : (b))

/* ------------------------------------------------ element types ------------------------------------------------ */

struct bfloat16 {
    uint16_t bits;
};

inline float bf16_to_float(uint16_t bits) {
    uint32_t word = (uint32_t)bits << 16;
    float value;
    memcpy(&value, &word, sizeof value);
    return value;
}

inline uint16_t float_to_bf16(float value) {
    uint32_t word;
    memcpy(&word, &value, sizeof word);
    if (value != value) return 0x7FC0;
    return (uint16_t)((word + 0x7FFF + (word >> 16 & 1)) >> 16);
}

#ifdef __FLT16_MANT_DIG__
typedef _Float16 float16;
inline float load(float16 x) { return (float)x; }
#else
struct float16 {
    uint16_t bits;
};
inline float load(float16 x) { return torch::headeronly::detail::fp16_ieee_to_fp32_value(x.bits); }
#endif
inline float load(float x) { return x; }
inline float load(bfloat16 x) { return bf16_to_float(x.bits); }

template <typename T>
INLINE T store(float x) {
    if constexpr (std::is_same_v<T, float>) return x;
    else if constexpr (std::is_same_v<T, bfloat16>) return T{float_to_bf16(x)};
#ifdef __FLT16_MANT_DIG__
    else return (T)x;
#else
    else return T{torch::headeronly::detail::fp16_ieee_from_fp32_value(x)};
#endif
}

/* --------------------------------------------- memory and threads --------------------------------------------- */

/* Room for intermediate values; std::bad_alloc, which reaches Python as an exception, where there is none. */
struct Room {
    struct Free {
        void operator()(void *p) const { ::operator delete(p, std::align_val_t(64)); }
    };
    std::unique_ptr<void, Free> start;
    explicit Room(size_t size, bool zero = false) : start(::operator new(size + 64, std::align_val_t(64))) {
        if (zero) memset(start.get(), 0, size);
    }
    template <typename U>
    U *as() { return (U *)start.get(); }
    float *floats() { return as<float>(); }
    uint8_t *bytes() { return as<uint8_t>(); }
};

inline long thread_count() { return torch::stable::get_num_threads(); }

inline long thread_index() {
    uint32_t index = 0;
    TORCH_ERROR_CODE_CHECK(torch_get_thread_idx(&index));
    return index;
}

#define LARGE 65536 /* values of a piece of work that is worth a thread */

/* f(begin, end) for parts of 0 .. n, of `work` values each, on torch's threads. */
template <typename F>
void parallel(long n, long work, const F &f) {
    if (n) torch::stable::parallel_for(0, n, work >= LARGE / 4 ? 1 : LARGE / 4 / (work + 1), f);
}

/* f(j) for every block of BLOCK values, beginning at j. */
template <typename F>
void in_blocks(long count, const F &f) {
    parallel((count + BLOCK - 1) / BLOCK, BLOCK, [&](long begin, long end) {
        for (long block = begin; block < end; block++) f(block * BLOCK);
    });
}

/* --------------------------------------------------- vectors --------------------------------------------------- */

#define PAD16(n) (((n) + 15) / 16 * 16)

typedef float vector16 __attribute__((vector_size(64)));
typedef float loose16 __attribute__((vector_size(64), aligned(4))); /* anywhere in memory */
typedef int32_t index16 __attribute__((vector_size(64)));

static const index16 lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

#if defined(__clang__) || __GNUC__ >= 12
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (index16){__VA_ARGS__})
#endif

/* Lane i becomes lane i ^ n. */
template <int n>
INLINE vector16 across16(vector16 x) {
    return SHUFFLE(x, x, 0 ^ n, 1 ^ n, 2 ^ n, 3 ^ n, 4 ^ n, 5 ^ n, 6 ^ n, 7 ^ n, 8 ^ n, 9 ^ n, 10 ^ n, 11 ^ n, 12 ^ n, 13 ^ n,
                   14 ^ n, 15 ^ n);
}

/* b where one is not a number */
INLINE vector16 smaller16(vector16 a, vector16 b) {
#ifdef __AVX512F__
    return (vector16)_mm512_min_ps((__m512)a, (__m512)b);
#else
    index16 take = a < b;
    return (vector16)(((index16)a & take) | ((index16)b & ~take));
#endif
}

INLINE vector16 larger16(vector16 a, vector16 b) {
#ifdef __AVX512F__
    return (vector16)_mm512_max_ps((__m512)a, (__m512)b);
#else
    index16 take = a > b;
    return (vector16)(((index16)a & take) | ((index16)b & ~take));
#endif
}

/* Rounded to the nearest integer, for magnitudes below 2^22 */
INLINE vector16 nearest16(vector16 x) {
#ifdef __AVX512F__
    return (vector16)_mm512_roundscale_ps((__m512)x, 0);
#else
    for (int k = 0; k < 16; k++) x[k] = rintf(x[k]);
    return x;
#endif
}

/* Sixteen bytes from and to whole numbers: GCC 12 takes conversions of vectors apart. */
INLINE vector16 from_bytes16(const uint8_t *bytes) {
#ifdef __AVX512F__
    return (vector16)_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)bytes)));
#else
    vector16 x;
    for (int k = 0; k < 16; k++) x[k] = bytes[k];
    return x;
#endif
}

INLINE void to_bytes16(index16 x, void *bytes) {
#ifdef __AVX512F__
    _mm_storeu_si128((__m128i *)bytes, _mm512_cvtepi32_epi8((__m512i)x));
#else
    for (int k = 0; k < 16; k++) ((uint8_t *)bytes)[k] = (uint8_t)x[k];
#endif
}

/* Lane i becomes the smallest (largest) lane of v[i], for n up to 16: neighbouring lanes are joined until one is left. */
INLINE vector16 extremes16(vector16 *v, long n, int largest) {
    for (int level = 0; level < 4; level++) {
        if (n % 2) v[n] = v[n - 1];
        n = (n + 1) / 2;
        for (long i = 0; i < n; i++) {
            vector16 a = SHUFFLE(v[2 * i], v[2 * i + 1], 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
            vector16 b = SHUFFLE(v[2 * i], v[2 * i + 1], 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
            v[i] = largest ? larger16(a, b) : smaller16(a, b);
        }
    }
    return v[0];
}

/* table[index], an entry a lane */
INLINE vector16 look_up16(vector16 table, index16 index) {
#ifdef __AVX512F__
    return (vector16)_mm512_permutexvar_ps((__m512i)index, (__m512)table);
#else
    vector16 found;
    for (int k = 0; k < 16; k++) found[k] = table[index[k]];
    return found;
#endif
}

/* exp for x <= 0, to within a few units in the last place; below -87 it is 0. After the range reduction a polynomial
 * (coefficients of expf in the Cephes library, Moshier 1992). */
INLINE vector16 exp16(vector16 x) {
    index16 kept = x > -87.0f;
    index16 n = __builtin_convertvector(x * 1.44269504f - 0.5f, index16) & kept; /* truncation rounds to nearest here */
    vector16 whole = __builtin_convertvector(n, vector16);
    vector16 r = x - whole * 0.693359375f + whole * 2.12194440e-4f;
    vector16 p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = (p * r * r + r + 1) * (vector16)((n + 127) << 23);
    return (vector16)((index16)p & kept);
}

INLINE vector16 choose16(index16 mask, vector16 a, vector16 b) {
    return (vector16)(((index16)a & mask) | ((index16)b & ~mask));
}

/* A gate f(x) and its derivative. With `inner` f(x) = x sigmoid(inner x + cubic x^3), which is SiLU and the approximations of GELU;
 * without it GELU, with erf by formula 7.1.26 of Abramowitz and Stegun, to 1.5e-7. */
INLINE void gate16(vector16 x, float inner, float cubic, vector16 *value, vector16 *slope) {
    vector16 magnitude = larger16(x, -x), square = smaller16(x * x, (vector16){0} + 1e4f);
    if (inner == 0) {
        vector16 t = 1 / (1 + 0.3275911f * 0.70710678f * magnitude), density = exp16(-0.5f * square);
        vector16 tail = t * 1.061405429f - 1.453152027f;
        tail = (((tail * t + 1.421413741f) * t - 0.284496736f) * t + 0.254829592f) * t * density * 0.5f;
        vector16 below = choose16(x > 0, 1 - tail, tail);
        *value = x * below, *slope = below + x * density * 0.39894228f;
    } else {
        vector16 e = exp16(-magnitude * (inner + cubic * square)), s = 1 / (1 + e);
        s = choose16(x > 0, s, e * s);
        *value = x * s, *slope = s + *value * (1 - s) * (inner + 3 * cubic * square);
    }
}

inline float sum16(vector16 x) {
    x += across16<8>(x), x += across16<4>(x), x += across16<2>(x), x += across16<1>(x);
    return x[0];
}

inline float largest16(vector16 x) {
    x = larger16(x, across16<8>(x)), x = larger16(x, across16<4>(x));
    x = larger16(x, across16<2>(x)), x = larger16(x, across16<1>(x));
    return x[0];
}
