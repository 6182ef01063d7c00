/* Sixteen float32 at a time, in as many registers as the instruction set asks for (one of AVX-512, two of AVX2, four of others),
 * each a vector as GCC and Clang share them; what these lack is written out. Also element types, room that is checked, and
 * threads. */
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
#ifdef __AVX2__
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

#if defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX2__)
#define LANES 8
#else
#define LANES 4
#endif
#define PARTS (16 / LANES)

typedef float floats __attribute__((vector_size(4 * LANES)));
typedef int32_t ints __attribute__((vector_size(4 * LANES)));
typedef float loose_floats __attribute__((vector_size(4 * LANES), aligned(4)));

struct index16;

/* A register at a time: GCC copies a struct in pieces of sixteen bytes, and a load of the register that was stored in pieces waits for
 * the memory. */
#define COPIED_BY_PART(type)                                                                                           \
    __attribute__((always_inline)) type(const type &from) {                                                            \
        for (int p = 0; p < PARTS; p++) part[p] = from.part[p];                                                        \
    }                                                                                                                  \
    __attribute__((always_inline)) type &operator=(const type &from) {                                                 \
        for (int p = 0; p < PARTS; p++) part[p] = from.part[p];                                                        \
        return *this;                                                                                                  \
    }

/* Sixteen numbers. A single number stands for sixteen equal ones. */
struct alignas(64) vector16 {
    floats part[PARTS];
    vector16() = default;
    COPIED_BY_PART(vector16)
    __attribute__((always_inline)) vector16(float x) {
        for (int p = 0; p < PARTS; p++) part[p] = (floats){} + x;
    }
    explicit inline operator index16() const;
    __attribute__((always_inline)) float &operator[](int k) { return ((float *)part)[k]; }
    __attribute__((always_inline)) float operator[](int k) const { return part[k / LANES][k % LANES]; }
};

/* Sixteen whole numbers, or masks: all bits set where something holds. */
struct alignas(64) index16 {
    ints part[PARTS];
    index16() = default;
    COPIED_BY_PART(index16)
    __attribute__((always_inline)) index16(int32_t x) {
        for (int p = 0; p < PARTS; p++) part[p] = (ints){} + x;
    }
    explicit inline operator vector16() const;
    __attribute__((always_inline)) int32_t &operator[](int k) { return ((int32_t *)part)[k]; }
};

/* The same bits */
__attribute__((always_inline)) inline vector16::operator index16() const {
    index16 x;
    for (int p = 0; p < PARTS; p++) x.part[p] = (ints)part[p];
    return x;
}
__attribute__((always_inline)) inline index16::operator vector16() const {
    vector16 x;
    for (int p = 0; p < PARTS; p++) x.part[p] = (floats)part[p];
    return x;
}

#define EACH16(type, expression)                                                                                       \
    {                                                                                                                  \
        type out;                                                                                                      \
        for (int p = 0; p < PARTS; p++) out.part[p] = expression;                                                      \
        return out;                                                                                                    \
    }
#define ARITHMETIC16(type, op)                                                                                         \
    INLINE type operator op(type a, type b) EACH16(type, a.part[p] op b.part[p])                                       \
    INLINE type &operator op##=(type &a, type b) { return a = a op b; }
ARITHMETIC16(vector16, +)
ARITHMETIC16(vector16, -)
ARITHMETIC16(vector16, *)
ARITHMETIC16(vector16, /)
ARITHMETIC16(index16, +)
ARITHMETIC16(index16, -)
ARITHMETIC16(index16, &)
ARITHMETIC16(index16, |)
INLINE vector16 operator-(vector16 a) EACH16(vector16, -a.part[p])
INLINE index16 operator~(index16 a) EACH16(index16, ~a.part[p])
INLINE index16 operator<<(index16 a, int n) EACH16(index16, a.part[p] << n)
INLINE index16 operator>>(index16 a, int n) EACH16(index16, a.part[p] >> n)
#define COMPARISON16(type, op) INLINE index16 operator op(type a, type b) EACH16(index16, (ints)(a.part[p] op b.part[p]))
COMPARISON16(vector16, <)
COMPARISON16(vector16, <=)
COMPARISON16(vector16, >)
COMPARISON16(vector16, !=)
COMPARISON16(index16, <)
COMPARISON16(index16, >)
COMPARISON16(index16, <=)
COMPARISON16(index16, >=)
COMPARISON16(index16, !=)

/* From and to anywhere in memory */
INLINE vector16 load16(const float *x) EACH16(vector16, *(const loose_floats *)(x + p * LANES))

template <typename T>
INLINE vector16 load16(const T *x) {
    vector16 out;
    for (int k = 0; k < 16; k++) out[k] = load(x[k]);
    return out;
}

INLINE void store16(float *x, vector16 value) {
    for (int p = 0; p < PARTS; p++) *(loose_floats *)(x + p * LANES) = value.part[p];
}

/* Truncated, and back */
INLINE index16 whole16(vector16 x) EACH16(index16, __builtin_convertvector(x.part[p], ints))
INLINE vector16 real16(index16 x) EACH16(vector16, __builtin_convertvector(x.part[p], floats))

/* 0 to 15 */
INLINE index16 lanes16() {
    index16 x;
    for (int k = 0; k < 16; k++) x.part[k / LANES][k % LANES] = k;
    return x;
}

#if defined(__clang__) || __GNUC__ >= 12
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (ints){__VA_ARGS__})
#endif

/* Lane i becomes lane i ^ n; the even, and the odd, lanes of two registers. */
#if LANES == 16
#define ACROSS(x, n)                                                                                                   \
    SHUFFLE(x, x, 0 ^ n, 1 ^ n, 2 ^ n, 3 ^ n, 4 ^ n, 5 ^ n, 6 ^ n, 7 ^ n, 8 ^ n, 9 ^ n, 10 ^ n, 11 ^ n, 12 ^ n, 13 ^ n,  \
            14 ^ n, 15 ^ n)
#define EVEN(a, b) SHUFFLE(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30)
#define ODD(a, b) SHUFFLE(a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31)
#elif LANES == 8
#define ACROSS(x, n) SHUFFLE(x, x, 0 ^ n, 1 ^ n, 2 ^ n, 3 ^ n, 4 ^ n, 5 ^ n, 6 ^ n, 7 ^ n)
#define EVEN(a, b) SHUFFLE(a, b, 0, 2, 4, 6, 8, 10, 12, 14)
#define ODD(a, b) SHUFFLE(a, b, 1, 3, 5, 7, 9, 11, 13, 15)
#else
#define ACROSS(x, n) SHUFFLE(x, x, 0 ^ n, 1 ^ n, 2 ^ n, 3 ^ n)
#define EVEN(a, b) SHUFFLE(a, b, 0, 2, 4, 6)
#define ODD(a, b) SHUFFLE(a, b, 1, 3, 5, 7)
#endif

template <int n>
INLINE vector16 across16(vector16 x) {
    vector16 out;
    for (int p = 0; p < PARTS; p++)
        if constexpr (n >= LANES) out.part[p] = x.part[p ^ n / LANES];
        else out.part[p] = ACROSS(x.part[p], (n % LANES));
    return out;
}

/* b where one is not a number */
INLINE vector16 smaller16(vector16 a, vector16 b) {
#if defined(__AVX512F__)
    EACH16(vector16, (floats)_mm512_min_ps((__m512)a.part[p], (__m512)b.part[p]))
#elif defined(__AVX2__)
    EACH16(vector16, (floats)_mm256_min_ps((__m256)a.part[p], (__m256)b.part[p]))
#else
    EACH16(vector16, (floats)(((ints)a.part[p] & (a.part[p] < b.part[p])) | ((ints)b.part[p] & ~(a.part[p] < b.part[p]))))
#endif
}

INLINE vector16 larger16(vector16 a, vector16 b) {
#if defined(__AVX512F__)
    EACH16(vector16, (floats)_mm512_max_ps((__m512)a.part[p], (__m512)b.part[p]))
#elif defined(__AVX2__)
    EACH16(vector16, (floats)_mm256_max_ps((__m256)a.part[p], (__m256)b.part[p]))
#else
    EACH16(vector16, (floats)(((ints)a.part[p] & (a.part[p] > b.part[p])) | ((ints)b.part[p] & ~(a.part[p] > b.part[p]))))
#endif
}

/* Rounded to the nearest integer, for magnitudes below 2^22 */
INLINE vector16 nearest16(vector16 x) {
#if defined(__AVX512F__)
    EACH16(vector16, (floats)_mm512_roundscale_ps((__m512)x.part[p], 0))
#elif defined(__AVX2__)
    EACH16(vector16, (floats)_mm256_round_ps((__m256)x.part[p], _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC))
#else
    for (int p = 0; p < PARTS; p++)
        for (int k = 0; k < LANES; k++) x.part[p][k] = rintf(x.part[p][k]);
    return x;
#endif
}

/* Sixteen bytes from and to whole numbers, of which the lowest byte counts */
INLINE index16 from_bytes16(const uint8_t *bytes) {
    index16 x;
#if defined(__AVX512F__)
    x.part[0] = (ints)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)bytes));
#elif defined(__AVX2__)
    for (int p = 0; p < PARTS; p++) x.part[p] = (ints)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)(bytes + 8 * p)));
#else
    for (int k = 0; k < 16; k++) x.part[k / LANES][k % LANES] = bytes[k];
#endif
    return x;
}

INLINE void to_bytes16(index16 x, void *bytes) {
#if defined(__AVX512F__)
    _mm_storeu_si128((__m128i *)bytes, _mm512_cvtepi32_epi8((__m512i)x.part[0]));
#elif defined(__AVX2__)
    const __m256i low = _mm256_set1_epi32(0xFF);
    __m256i words = _mm256_packus_epi32(_mm256_and_si256((__m256i)x.part[0], low), _mm256_and_si256((__m256i)x.part[1], low));
    words = _mm256_permute4x64_epi64(words, 0xD8); /* it packs within halves */
    _mm_storeu_si128((__m128i *)bytes, _mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1)));
#else
    for (int k = 0; k < 16; k++) ((uint8_t *)bytes)[k] = (uint8_t)x.part[k / LANES][k % LANES];
#endif
}

INLINE vector16 added16(vector16 a, vector16 b) { return a + b; }

/* Lane i becomes join(...) of the lanes of v[i], for n up to 16: neighbouring lanes are joined until one is left. */
template <vector16 join(vector16, vector16)>
INLINE vector16 reduce16(vector16 *v, long n) {
    for (int level = 0; level < 4; level++) {
        if (n % 2) v[n] = v[n - 1];
        n = (n + 1) / 2;
        for (long i = 0; i < n; i++) {
            vector16 even, odd;
            for (int p = 0; p < PARTS; p++) { /* pairs of the registers of two, one after the other */
                const floats a = v[2 * i + 2 * p / PARTS].part[2 * p % PARTS];
                const floats b = v[2 * i + (2 * p + 1) / PARTS].part[(2 * p + 1) % PARTS];
                even.part[p] = EVEN(a, b), odd.part[p] = ODD(a, b);
            }
            v[i] = join(even, odd);
        }
    }
    return v[0];
}

/* table[index], an entry a lane */
INLINE vector16 look_up16(vector16 table, index16 index) {
#if defined(__AVX512F__)
    EACH16(vector16, (floats)_mm512_permutexvar_ps((__m512i)index.part[p], (__m512)table.part[0]))
#elif defined(__AVX2__)
    EACH16(vector16, (floats)_mm256_blendv_ps(_mm256_permutevar8x32_ps((__m256)table.part[0], (__m256i)index.part[p]),
                                              _mm256_permutevar8x32_ps((__m256)table.part[1], (__m256i)index.part[p]),
                                              (__m256)(index.part[p] << 28)))
#else
    vector16 found;
    for (int k = 0; k < 16; k++) found.part[k / LANES][k % LANES] = table[index.part[k / LANES][k % LANES]];
    return found;
#endif
}

/* The same of eight entries, for an index below eight */
INLINE vector16 look_up8(vector16 table, index16 index) {
#if defined(__AVX2__) && !defined(__AVX512F__)
    EACH16(vector16, (floats)_mm256_permutevar8x32_ps((__m256)table.part[0], (__m256i)index.part[p]))
#else
    return look_up16(table, index);
#endif
}

/* exp for x <= 0, to within a few units in the last place; below -87 it is 0, and NaN is NaN. After the range reduction a polynomial
 * (coefficients of expf in the Cephes library, Moshier 1992). */
INLINE vector16 exp16(vector16 x) {
    index16 kept = ~(x < -87.0f);
    index16 n = whole16(x * 1.44269504f - 0.5f) & kept; /* truncation rounds to nearest here */
    vector16 whole = real16(n);
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
    vector16 magnitude = larger16(x, -x), square = smaller16(x * x, 1e4f);
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

/* In the order of `reduce16` */
inline float sum16(vector16 x) {
    x += across16<1>(x), x += across16<2>(x), x += across16<4>(x), x += across16<8>(x);
    return x[0];
}

inline float largest16(vector16 x) {
    x = larger16(x, across16<8>(x)), x = larger16(x, across16<4>(x));
    x = larger16(x, across16<2>(x)), x = larger16(x, across16<1>(x));
    return x[0];
}
