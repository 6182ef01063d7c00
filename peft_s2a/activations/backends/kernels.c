/* The ops of `peft_s2a.activations.ops` for CPUs, fused: each reads its input once and writes codes, without temporaries.
 *
 * The file includes itself once for every element type T. Codes, groups, packing and random numbers are those of `codec.py`,
 * whose docstrings define them. `threads` is torch's number of threads.
 */
#ifndef T

#include <float.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef _OPENMP
#include <omp.h>
#endif
#ifdef __AVX512F__
#include <immintrin.h>
#endif

#define BLOCK 512
#define INLINE static inline __attribute__((always_inline))
#define EXPORT __attribute__((visibility("default")))
#define MIN(a, b) ((a) < (b) ? (a) : (b))
#define CAT_(a, b) a##_##b
#define CAT(a, b) CAT_(a, b)
#define NAME(function) CAT(function, SUFFIX)

static inline float bf16_to_float(uint16_t bits) {
    union { uint32_t i; float f; } word = {(uint32_t)bits << 16};
    return word.f;
}

static inline uint16_t float_to_bf16(float value) {
    union { float f; uint32_t i; } word = {value};
    if (value != value) return 0x7FC0;
    return (uint16_t)((word.i + 0x7FFF + (word.i >> 16 & 1)) >> 16);
}

static inline uint32_t hash32(uint32_t x) {
    x = (x ^ x >> 16) * 0x7FEB352Du;
    x = (x ^ x >> 15) * 0x846CA68Bu;
    return x ^ x >> 16;
}

/* The number in [0, 1) that decides the rounding at `position`; 0.5, which rounds to nearest, without a seed. */
static inline float threshold_at(const int64_t *seed, uint32_t position) {
    if (!seed) return 0.5f;
    uint32_t low = (uint32_t)*seed, high = (uint32_t)((uint64_t)*seed >> 32);
    return (float)(hash32(hash32(position + low) ^ high) >> 8) * 0x1p-24f;
}

static inline long packed_width(long count, int bits) {
    if (bits == 3) return packed_width(count, 2) + packed_width(count, 1);
    long per_byte = 8 / bits;
    return (count + per_byte - 1) / per_byte;
}

typedef uint16_t words8 __attribute__((vector_size(16), aligned(1))); /* sixteen bytes: codes do not cross them when shifted */

EXPORT void pack_row(const uint8_t *codes, long count, int bits, uint8_t *out) {
    if (bits == 8) {
        memcpy(out, codes, count);
        return;
    }
    if (bits == 3) { /* two low bits first, then the high ones */
        long low = packed_width(count, 2), high = packed_width(count, 1);
        memset(out, 0, low + high);
        for (int s = 0; s < 4; s++)
            for (long j = 0, n = MIN(low, count - s * low); j < n; j++) out[j] |= (codes[s * low + j] & 3) << 2 * s;
        for (int s = 0; s < 8; s++)
            for (long j = 0, n = MIN(high, count - s * high); j < n; j++) out[low + j] |= (codes[s * high + j] >> 2) << s;
        return;
    }
    long width = packed_width(count, bits), last = width - (8 * width / bits - count), j = 0; /* of the last plane */
    for (; j + 16 <= last; j += 16) {
        words8 bytes = *(const words8 *)(codes + j);
        for (int s = 1; s < 8 / bits; s++) bytes |= *(const words8 *)(codes + s * width + j) << s * bits;
        *(words8 *)(out + j) = bytes;
    }
    for (; j < width; j++) {
        out[j] = codes[j];
        for (int s = 1; s < 8 / bits && s * width + j < count; s++) out[j] |= codes[s * width + j] << s * bits;
    }
}

/* Puts `bits` bits (a power of two) of elements `start` to `start + n` of a row of `count` at bit `place` of their codes. */
INLINE void unpack_plane(const uint8_t *packed, long count, int bits, int place, long start, long n, uint8_t *codes) {
    long width = packed_width(count, bits);
    uint8_t mask = (uint8_t)((1 << bits) - 1);
    long part = start ? start / width : 0;
    for (long i = 0; i < n; part++) {
        long end = MIN(n, (part + 1) * width - start);
        const uint8_t *from = packed + start - part * width;
        const words8 masks = (words8){0} + (uint16_t)(mask * 0x0101);
        for (; !place && i + 16 <= end; i += 16) *(words8 *)(codes + i) = *(const words8 *)(from + i) >> part * bits & masks;
        for (; i < end; i++) codes[i] = (place ? codes[i] : 0) | (from[i] >> part * bits & mask) << place;
    }
}

/* The codes of elements `start` to `start + n` of a row of `count`. */
static void unpack_run(const uint8_t *packed, long count, int bits, long start, long n, uint8_t *codes) {
    if (bits == 8) memcpy(codes, packed + start, n);
    else if (bits == 3) {
        unpack_plane(packed, count, 2, 0, start, n, codes);
        unpack_plane(packed + packed_width(count, 2), count, 1, 2, start, n, codes);
    } else unpack_plane(packed, count, bits, 0, start, n, codes);
}

#define PAD16(n) (((n) + 15) / 16 * 16)

typedef float vector16 __attribute__((vector_size(64)));
typedef float loose16 __attribute__((vector_size(64), aligned(4))); /* anywhere in memory */
typedef int32_t index16 __attribute__((vector_size(64)));

static const index16 lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

#define UNIT_GROUPS 4

static inline long scales_width(long groups) { return (groups + UNIT_GROUPS - 1) / UNIT_GROUPS + 2 * groups; }

/* The unit that the bounds of up to four groups are multiples of, see `codec.py`. */
static inline float decode_unit(uint8_t exponent) {
    union { uint32_t i; float f; } word = {(uint32_t)exponent << 23};
    return word.f;
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
    _mm_storeu_si128(bytes, _mm512_cvtepi32_epi8((__m512i)x));
#else
    for (int k = 0; k < 16; k++) ((uint8_t *)bytes)[k] = (uint8_t)x[k];
#endif
}

/* Lane i becomes the smallest (largest) lane of v[i], for n up to 16: neighbouring lanes are joined until one is left. */
INLINE vector16 extremes16(vector16 *v, long n, int largest) {
    const index16 even = {0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30}, odd = even + 1;
    for (int level = 0; level < 4; level++) {
        if (n % 2) v[n] = v[n - 1];
        n = (n + 1) / 2;
        for (long i = 0; i < n; i++) {
            vector16 a = __builtin_shuffle(v[2 * i], v[2 * i + 1], even);
            vector16 b = __builtin_shuffle(v[2 * i], v[2 * i + 1], odd);
            v[i] = largest ? larger16(a, b) : smaller16(a, b);
        }
    }
    return v[0];
}

#define CHUNK 64 /* groups that are coded together; a multiple of 16 and of UNIT_GROUPS */

/* Whether groups of a row can be read as whole vectors of sixteen. */
static inline int in_vectors(long count, long group) { return group % 16 == 0 || group >= count; }

/* Smallest and largest value of each of up to CHUNK groups; the last one of a row may be shorter, but is filled up. */
static void ranges_of(const float *x, long count, long group, long groups, vector16 *low, vector16 *high) {
    for (long first = 0; first < groups; first += 16) {
        vector16 lows[16], highs[16];
        long here = MIN(16, groups - first);
        for (long g = 0; g < here; g++) {
            const float *v = x + (first + g) * group;
            long n = MIN(group, count - (first + g) * group);
            if (in_vectors(count, group)) {
                lows[g] = highs[g] = *(const loose16 *)v;
                for (long i = 16; i < n; i += 16) {
                    vector16 next = *(const loose16 *)(v + i);
                    lows[g] = smaller16(lows[g], next), highs[g] = larger16(highs[g], next);
                }
            } else {
                lows[g] = highs[g] = (vector16){0} + v[0];
                for (long i = 1; i < n; i++) {
                    vector16 next = (vector16){0} + v[i];
                    lows[g] = smaller16(lows[g], next), highs[g] = larger16(highs[g], next);
                }
            }
        }
        low[first / 16] = extremes16(lows, here, 0), high[first / 16] = extremes16(highs, here, 1);
    }
}

INLINE void codes_of_16(const float *x, float offset, float inverse_step, vector16 threshold, float top, uint8_t *codes) {
    const vector16 zero = {0};
    vector16 unit = (*(const loose16 *)x - offset) * inverse_step + threshold;
    unit = larger16(smaller16(unit, zero + top), zero); /* truncation is floor then; what is not a number becomes 0 */
    to_bytes16(__builtin_convertvector(unit, index16), codes);
}

/* Where the scales of a row of `groups` groups lie, from group `first` on (a multiple of UNIT_GROUPS). */
typedef struct {
    uint8_t *exponents;
    int8_t *lows, *highs;
} Scales;

static inline Scales scales_from(const uint8_t *scales, long groups, long first) {
    int8_t *lows = (int8_t *)scales + (groups + UNIT_GROUPS - 1) / UNIT_GROUPS;
    return (Scales){(uint8_t *)scales + first / UNIT_GROUPS, lows + first, lows + groups + first};
}

/* The exponents of the units of `groups` groups, `per_unit` (1, 2 or 4) each, given their largest magnitudes: in every lane that
 * of its unit. */
INLINE index16 exponents_of(vector16 magnitude, long groups, int per_unit) {
    magnitude = (vector16)((index16)magnitude & (lane < (int32_t)MIN(groups, 16)));
    if (per_unit > 1) magnitude = larger16(magnitude, __builtin_shuffle(magnitude, lane ^ 1));
    if (per_unit > 2) magnitude = larger16(magnitude, __builtin_shuffle(magnitude, lane ^ 2));
    /* that of magnitude / 127, rounded up: 127 is 0x42FE0000, and what is below 64 of the smallest floats rounds to zero */
    index16 word = (index16)magnitude & 0x7FFFFFFF; /* zero may be negative */
    index16 exponent = (word - 0x3000000 + 0x1FFFF) >> 23;
    exponent = (exponent & (exponent > 0)) | (1 & (exponent <= 0) & (word >= 64));
    return exponent | (255 & (word >= 0x7F800000)); /* what is not finite decodes to NaN */
}

INLINE vector16 rounded_bound(vector16 bound, vector16 inverse_unit) {
    const vector16 zero = {0};
    return larger16(smaller16(nearest16(bound * inverse_unit), zero + 127), zero - 127);
}

/* Code up to CHUNK groups: one code a byte to `codes`. Behind x and codes there is room up to 15 further elements,
 * which in x are equal to the last. `position` is that of the first value in the tensor. */
static void encode_chunk(const float *x, long count, int bits, long group, long groups, int per_unit, const int64_t *seed,
                         uint32_t position, Scales to, uint8_t *codes) {
    float top = (float)((1 << bits) - 1);
    vector16 low[CHUNK / 16], high[CHUNK / 16], offset[CHUNK / 16], inverse[CHUNK / 16];
    int8_t kept[2][CHUNK];
    ranges_of(x, count, group, groups, low, high);
    for (long v = 0; v * 16 < groups; v++) {
        vector16 magnitude = larger16(larger16(low[v], -low[v]), larger16(high[v], -high[v]));
        index16 exponent = exponents_of(magnitude, groups - v * 16, per_unit);
        vector16 unit = (vector16)(exponent << 23);
        vector16 inverse_unit = (vector16)((254 - exponent) << 23 & (exponent != 0) & (exponent != 255));
        uint8_t exponents[16];
        to_bytes16(exponent, exponents);
        for (long g = 0; g < MIN(16, groups - v * 16); g += per_unit)
            to.exponents[(v * 16 + g) / per_unit] = exponents[g];
        vector16 a = rounded_bound(low[v], inverse_unit), b = rounded_bound(high[v], inverse_unit);
        vector16 step = (b - a) * unit / top; /* divided by once more, so that ties fall as in the reference */
        offset[v] = a * unit, inverse[v] = (vector16)((index16)(1 / step) & (step != 0));
        to_bytes16(__builtin_convertvector(a, index16), kept[0] + v * 16);
        to_bytes16(__builtin_convertvector(b, index16), kept[1] + v * 16);
    }
    memcpy(to.lows, kept[0], groups), memcpy(to.highs, kept[1], groups);
    for (long g = 0; g < groups; g++) /* sixteen at a time: the next group writes over what is too much */
        for (long start = g * group, i = start; i < MIN(start + group, count); i += 16) {
            vector16 threshold = (vector16){0} + 0.5f;
            if (seed)
                for (int k = 0; k < 16; k++) threshold[k] = threshold_at(seed, position + (uint32_t)(i + k));
            codes_of_16(x + i, ((float *)offset)[g], ((float *)inverse)[g], threshold, top, codes + i);
        }
}

/* The values behind up to CHUNK groups of codes. Both have room up to the next multiple of 16. */
static void decode_chunk(const uint8_t *codes, Scales from, long count, int bits, long group, long groups, float *out) {
    float top = (float)((1 << bits) - 1);
    int vectors = in_vectors(count, group);
    for (long g = 0; g < groups; g++) {
        long i = g * group, end = MIN(i + group, count);
        float unit = decode_unit(from.exponents[g / UNIT_GROUPS]), offset = from.lows[g] * unit;
        float step = (float)(from.highs[g] - from.lows[g]) * unit / top;
        if (vectors)
            for (; i < end; i += 16) *(loose16 *)(out + i) = from_bytes16(codes + i) * step + offset;
        else
            for (; i < end; i++) out[i] = (float)codes[i] * step + offset;
    }
}

/* Rows of codes in groups, which are taken in chunks of CHUNK groups. */
typedef struct {
    const uint8_t *packed, *scales;
    long count, width, groups, stride, chunks; /* of a row: values, bytes, groups, bytes of scales, chunks */
    long group, span;                          /* values of a group, of a chunk */
    int bits;
} Rows;

static Rows coded_rows(const uint8_t *packed, const uint8_t *scales, long count, int bits, long group) {
    long groups = (count + group - 1) / group, chunks = (groups + CHUNK - 1) / CHUNK;
    return (Rows){packed, scales, count, packed_width(count, bits), groups, scales_width(groups), chunks,
                  group, chunks > 1 ? CHUNK * group : count, bits};
}

/* Decode chunk `chunk` of row `row`; the number of its values. There shall be room for PAD16(span) values and codes. */
static long decode_part(const Rows *rows, long row, long chunk, uint8_t *codes, float *values) {
    long start = chunk * rows->span, n = MIN(rows->span, rows->count - start), first = chunk * CHUNK;
    unpack_run(rows->packed + row * rows->width, rows->count, rows->bits, start, n, codes);
    decode_chunk(codes, scales_from(rows->scales + row * rows->stride, rows->groups, first), n, rows->bits,
                 rows->group, MIN(CHUNK, rows->groups - first), values);
    return n;
}

static void decode_row(const Rows *rows, long row, uint8_t *codes, float *values) {
    for (long chunk = 0; chunk < rows->chunks; chunk++) decode_part(rows, row, chunk, codes, values + chunk * rows->span);
}

/* How far apart the values of rows lie that are coded together. */
static long pitch_of(const Rows *rows) { return rows->groups == 1 ? PAD16(rows->count) : rows->count; }

/* How many rows are coded at a time: several where they consist of one, two or four groups that can be read as whole vectors, since
 * coding a chunk takes little longer than coding a group. */
static long rows_together(const Rows *rows, const int64_t *seed) {
    long groups = rows->groups, pitch = pitch_of(rows), most = 4096 / pitch; /* values that stay in the first cache */
    if (groups > UNIT_GROUPS || groups == 3 || pitch % 16 || (groups > 1 && pitch % rows->group)) return 1;
    if (seed && pitch != rows->count) return 1; /* random numbers go by position */
    return most > CHUNK / groups ? CHUNK / groups : most > 1 ? most : 1;
}

/* Room for the values (or codes) of `rows_together`. */
static long room_together(const Rows *rows) { return rows_together(rows, NULL) * PAD16(rows->count) + 16; }

/* Code and pack `n` rows, at most `rows_together`, from row `row` on. */
static void encode_some_rows(const Rows *rows, long row, long n, float *values, const int64_t *seed, uint8_t *codes) {
    long count = rows->count, groups = rows->groups, pitch = pitch_of(rows);
    uint8_t *packed = (uint8_t *)rows->packed + row * rows->width, *scales = (uint8_t *)rows->scales + row * rows->stride;
    uint32_t position = (uint32_t)(row * count);
    if (n > 1) {
        uint8_t exponents[CHUNK];
        int8_t lows[CHUNK], highs[CHUNK];
        for (long r = 0; r < n; r++)
            for (long i = count; i < pitch; i++) values[r * pitch + i] = values[r * pitch + count - 1];
        encode_chunk(values, n * pitch, rows->bits, groups > 1 ? rows->group : pitch, n * groups, (int)groups, seed, position,
                     (Scales){exponents, lows, highs}, codes);
        for (long r = 0; r < n; r++) {
            Scales to = scales_from(scales + r * rows->stride, groups, 0);
            *to.exponents = exponents[r];
            for (long g = 0; g < groups; g++) to.lows[g] = lows[r * groups + g], to.highs[g] = highs[r * groups + g];
        }
    } else {
        *(loose16 *)(values + count) = (vector16){0} + values[count - 1];
        for (long chunk = 0; chunk < rows->chunks; chunk++) {
            long start = chunk * rows->span, first = chunk * CHUNK;
            encode_chunk(values + start, MIN(rows->span, count - start), rows->bits, rows->group, MIN(CHUNK, groups - first),
                         UNIT_GROUPS, seed, position + (uint32_t)start, scales_from(scales, groups, first), codes + start);
        }
    }
    for (long r = 0; r < n; r++) pack_row(codes + r * pitch, count, rows->bits, packed + r * rows->width);
}

/* One tile of a matrix product, in registers: c[r, 16 v] (+)= sum over k of a[r, k] b[k, 16 v]. */
INLINE void product_tile(int rows, int vectors, const float *a, long a_row, long a_step, const float *b, long b_step,
                         long inner, float *c, long c_row, int add) {
    vector16 sums[12][4];
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < vectors; v++)
            sums[r][v] = add ? (vector16) * (loose16 *)(c + r * c_row + 16 * v) : (vector16){0};
    for (long k = 0; k < inner; k++) {
        vector16 right[4];
        for (int v = 0; v < vectors; v++) right[v] = *(const loose16 *)(b + k * b_step + 16 * v);
        for (int r = 0; r < rows; r++)
            for (int v = 0; v < vectors; v++) sums[r][v] += a[r * a_row + k * a_step] * right[v];
    }
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < vectors; v++) *(loose16 *)(c + r * c_row + 16 * v) = sums[r][v];
}

INLINE void product_columns(int vectors, long rows, const float *a, long a_row, long a_step, const float *b, long b_step,
                            long inner, float *c, long c_row, int add) {
    long i = 0;
#ifdef __AVX512F__ /* enough sums to keep the multipliers busy, in as many registers */
    if (vectors == 1)
        for (; i + 12 <= rows; i += 12)
            product_tile(12, 1, a + i * a_row, a_row, a_step, b, b_step, inner, c + i * c_row, c_row, add);
#endif
    for (; i + 6 <= rows; i += 6)
        product_tile(6, vectors, a + i * a_row, a_row, a_step, b, b_step, inner, c + i * c_row, c_row, add);
    a += i * a_row, c += i * c_row;
    switch (rows - i) {
    case 5: product_tile(5, vectors, a, a_row, a_step, b, b_step, inner, c, c_row, add); break;
    case 4: product_tile(4, vectors, a, a_row, a_step, b, b_step, inner, c, c_row, add); break;
    case 3: product_tile(3, vectors, a, a_row, a_step, b, b_step, inner, c, c_row, add); break;
    case 2: product_tile(2, vectors, a, a_row, a_step, b, b_step, inner, c, c_row, add); break;
    case 1: product_tile(1, vectors, a, a_row, a_step, b, b_step, inner, c, c_row, add); break;
    }
}

/* c (+)= a b, with `columns` (of b and c) a multiple of 16; element [i, k] of a lies at i * a_row + k * a_step */
static void product(long rows, long columns, long inner, const float *a, long a_row, long a_step, const float *b, long b_row,
                    float *c, long c_row, int add) {
    long j = 0;
#ifdef __AVX512F__ /* enough registers for four vectors beside six rows */
    for (; j + 64 <= columns; j += 64) product_columns(4, rows, a, a_row, a_step, b + j, b_row, inner, c + j, c_row, add);
    for (; j + 32 <= columns; j += 32) product_columns(2, rows, a, a_row, a_step, b + j, b_row, inner, c + j, c_row, add);
#endif
    for (; j < columns; j += 16) product_columns(1, rows, a, a_row, a_step, b + j, b_row, inner, c + j, c_row, add);
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

static inline float sum16(vector16 x) {
    for (int apart = 8; apart; apart /= 2) x += __builtin_shuffle(x, lane ^ apart);
    return x[0];
}

static inline float largest16(vector16 x) {
    for (int apart = 8; apart; apart /= 2) x = larger16(x, __builtin_shuffle(x, lane ^ apart));
    return x[0];
}

/* The softmax of a row of `count` scores, in place; a row of nothing but minus infinity becomes zeros. Up to the next multiple of
 * 16 it is filled with zeros. Returns by how much the probabilities that PyTorch's fused kernels recompute differ, see
 * `_rounding_of_fused_kernels` in `attention.py`. */
static float softmax_row(float *x, long count) {
    long padded = PAD16(count);
    if (!count) return 1;
    for (long i = count; i < padded; i++) x[i] = -INFINITY;
    vector16 tops = *(loose16 *)x;
    for (long i = 16; i < padded; i += 16) tops = larger16(*(loose16 *)(x + i), tops);
    float top = largest16(tops);
    if (top == -INFINITY) {
        memset(x, 0, padded * sizeof(float));
        return 1;
    }
    vector16 sums = {0};
    for (long i = 0; i < padded; i += 16) {
        vector16 e = exp16(*(loose16 *)(x + i) - top);
        *(loose16 *)(x + i) = e, sums += e;
    }
    float sum = sum16(sums), scale = 1 / sum;
    for (long i = 0; i < padded; i += 16) *(loose16 *)(x + i) *= scale;
    if (fabsf(top) < 1024) return 1;
    float exponent = logf(sum);
    volatile float log_sum = top + exponent, shift = log_sum - top; /* rounded, which the compiler must not undo */
    return expf(exponent - shift);
}

/* d = p * (d - sum(p * d)), the gradient of the scores behind the probabilities p */
static void softmax_row_backward(const float *p, float *d, long padded) {
    vector16 sums = {0};
    for (long i = 0; i < padded; i += 16) sums += *(loose16 *)(p + i) * *(loose16 *)(d + i);
    float sum = sum16(sums);
    for (long i = 0; i < padded; i += 16) *(loose16 *)(d + i) = *(loose16 *)(p + i) * (*(loose16 *)(d + i) - sum);
}

static void transpose(const float *x, long rows, long columns, long x_row, float *out, long out_row) {
    for (long i = 0; i < rows; i++)
        for (long j = 0; j < columns; j++) out[j * out_row + i] = x[i * x_row + j];
}

/* Queries, keys or values of one head: [rows, PAD16(count)], filled up with zeros. */
static void decode_head(const uint8_t *packed, const uint8_t *scales, const uint16_t *mean, long rows, long count, int bits,
                        long group, float factor, uint8_t *codes, float *out) {
    Rows coded = coded_rows(packed, scales, count, bits, group);
    long row = PAD16(count);
    for (long n = 0; n < rows; n++, out += row) {
        decode_row(&coded, n, codes, out);
        if (mean)
            for (long i = 0; i < count; i++) out[i] += bf16_to_float(mean[i]);
        if (factor != 1)
            for (long i = 0; i < count; i++) out[i] *= factor;
        memset(out + count, 0, (row - count) * sizeof(float));
    }
}

typedef struct {
    const uint8_t *packed, *scales;
    const uint16_t *mean; /* may be null */
} Coded;

/* Height and width each. */
typedef struct {
    long inputs[2], results[2], kernel[2], stride[2], padding[2], dilation[2];
} Pool;

/* How many query rows attention takes at a time: their scores shall stay in the cache. */
static long rows_at_a_time(long length, long keys) {
    long most = keys ? 24576 / PAD16(keys) : length;
    if (most < 6) most = 6;
    long tiles = (length + most - 1) / most;
    return tiles ? (length + tiles - 1) / tiles : 0;
}

/* Floats of room that one thread of `attention_backward` needs. */
EXPORT long attention_workspace(long length, long keys, long dim, long value_dim) {
    long rows = rows_at_a_time(length, keys), e = PAD16(dim), ev = PAD16(value_dim), s = PAD16(keys);
    return length * e + 2 * keys * e + keys * ev + (dim + value_dim) * s + rows * (2 * s + e + ev) + PAD16(e + ev);
}

/* codes[i] = table[number of edges below x[i]]: a binary search among 2 * widest - 1 edges, in registers. */
INLINE void search16(const float *x, long n, const vector16 *edges, const index16 *table, int widest, uint8_t *codes) {
    for (long i = 0; i < n; i += 16) {
        vector16 v = *(const loose16 *)(x + i);
        index16 below = {0};
        for (int step = widest; step; step /= 2)
            below += (v > __builtin_shuffle(edges[0], edges[1], below + (step - 1))) & step;
        to_bytes16(__builtin_shuffle(table[0], table[1], below), codes + i);
    }
}

#define T float
#define SUFFIX float32
#define LOAD(x) (x)
#define STORE(x) (x)
#include "kernels.c"
#undef T
#undef SUFFIX
#undef LOAD
#undef STORE

#define T uint16_t
#define SUFFIX bfloat16
#define LOAD(x) bf16_to_float(x)
#define STORE(x) float_to_bf16(x)
#include "kernels.c"
#undef T
#undef SUFFIX
#undef LOAD
#undef STORE

#ifdef __FLT16_MANT_DIG__
#define T _Float16
#define SUFFIX float16
#define LOAD(x) ((float)(x))
#define STORE(x) ((_Float16)(x))
#include "kernels.c"
#undef T
#undef SUFFIX
#undef LOAD
#undef STORE
#endif

#else /* the part that is compiled for every T */

/* codes[i] = first + sum of the deltas of all thresholds below x[i] */
static void NAME(step_codes)(const T *x, long n, const float *thresholds, const int32_t *deltas, int count, int first,
                             uint8_t *codes) {
    float loaded[BLOCK];
    const float *values = sizeof(T) == sizeof(float) ? (const float *)x : loaded;
    int32_t sums[BLOCK];
    long i = 0;
    if (values == loaded)
        for (long k = 0; k < n; k++) loaded[k] = LOAD(x[k]);
#ifdef __AVX512F__ /* a binary search in registers: up to 31 thresholds fit into two */
    if (count < 32) {
        vector16 edges[2];
        index16 table[2];
        for (int t = 0, code = first; t < 32; t++) {
            edges[t / 16][t % 16] = t < count ? thresholds[t] : INFINITY;
            table[t / 16][t % 16] = code;
            code += t < count ? deltas[t] : 0;
        }
        i = n / 16 * 16;
        if (count < 2) search16(values, i, edges, table, 1, codes); /* masks */
        else search16(values, i, edges, table, 16, codes);
    }
#endif
    for (long k = i; k < n; k++) sums[k] = first;
    for (int t = 0; t < count; t++) {
        float threshold = thresholds[t];
        int32_t delta = deltas[t];
        for (long k = i; k < n; k++) sums[k] += values[k] > threshold ? delta : 0;
    }
    for (; i < n; i++) codes[i] = (uint8_t)sums[i];
}

EXPORT void NAME(encode_steps)(const T *x, long count, const float *thresholds, const int32_t *deltas, int n_thresholds,
                               int first, int bits, uint8_t *out, uint8_t *scratch, int threads) {
    if (bits == 3) { /* two layouts at once: through one code a byte */
#pragma omp parallel for num_threads(threads) schedule(static)
        for (long j = 0; j < count; j += BLOCK)
            NAME(step_codes)(x + j, MIN(BLOCK, count - j), thresholds, deltas, n_thresholds, first, scratch + j);
        pack_row(scratch, count, bits, out);
        return;
    }
    long width = packed_width(count, bits);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long j = 0; j < width; j += BLOCK) {
        uint8_t codes[BLOCK];
        long size = MIN(BLOCK, width - j);
        memset(out + j, 0, size);
        for (int s = 0; s < 8 / bits; s++) {
            long begin = s * width + j, n = MIN(size, count - begin);
            if (n <= 0) break;
            NAME(step_codes)(x + begin, n, thresholds, deltas, n_thresholds, first, codes);
            for (long i = 0; i < n; i++) out[j + i] |= codes[i] << s * bits;
        }
    }
}

static void NAME(scale_block)(const T *grad, const uint8_t *codes, long n, const float *levels, T *out) {
    for (long i = 0; i < n; i++) out[i] = STORE(LOAD(grad[i]) * levels[codes[i]]);
}

EXPORT void NAME(scale_by_levels)(const T *grad, const uint8_t *packed, long count, const float *levels, int bits, T *out,
                                  uint8_t *scratch, int threads) {
    if (bits == 3) {
        unpack_run(packed, count, bits, 0, count, scratch);
#pragma omp parallel for num_threads(threads) schedule(static)
        for (long j = 0; j < count; j += BLOCK)
            NAME(scale_block)(grad + j, scratch + j, MIN(BLOCK, count - j), levels, out + j);
        return;
    }
    long width = packed_width(count, bits);
    uint8_t mask = (uint8_t)((1 << bits) - 1);
    vector16 table;
    memcpy(&table, levels, sizeof table);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long j = 0; j < width; j += BLOCK) {
        long size = MIN(BLOCK, width - j);
        for (int s = 0; s < 8 / bits; s++) {
            long begin = s * width + j, n = MIN(size, count - begin), i = 0;
            if (n <= 0) break;
            if (bits <= 4) /* sixteen look-ups in a register at a time */
                for (; i + 16 <= n; i += 16) {
                    index16 index;
                    vector16 value;
                    for (int k = 0; k < 16; k++) index[k] = packed[j + i + k] >> s * bits & mask;
                    for (int k = 0; k < 16; k++) value[k] = LOAD(grad[begin + i + k]);
                    value *= __builtin_shuffle(table, index);
                    for (int k = 0; k < 16; k++) out[begin + i + k] = STORE(value[k]);
                }
            for (; i < n; i++)
                out[begin + i] = STORE(LOAD(grad[begin + i]) * levels[packed[j + i] >> s * bits & mask]);
        }
    }
}

/* mode 0: the rows as they are; 1: centred and divided by their deviation; 2: divided by their root mean square; 3: square
 * roots. Every `run` values are a column; `columns`: means, then inverse deviations, that they are standardised by, or null. */
EXPORT void NAME(encode_rows)(const T *x, long rows, long count, int mode, float eps, int bits, long group,
                              const int64_t *seed, const float *columns, long run, uint8_t *packed, uint8_t *scales,
                              float *rstd, int threads) {
    Rows coded = coded_rows(packed, scales, count, bits, group);
    long together = rows_together(&coded, seed), pitch = pitch_of(&coded);
#pragma omp parallel num_threads(threads)
    {
        float *room = malloc(room_together(&coded) * (sizeof(float) + 1));
        uint8_t *codes = (uint8_t *)(room + room_together(&coded));
#pragma omp for schedule(static)
        for (long start = 0; start < rows; start += together) {
            long n = MIN(together, rows - start);
            for (long r = start; r < start + n; r++) {
                const T *row = x + r * count;
                float *values = room + (r - start) * pitch, sum = 0, squares = 0, scale = 1;
                for (long i = 0; i < count; i++) values[i] = LOAD(row[i]);
                if (mode == 3)
                    for (long i = 0; i < count; i++) values[i] = sqrtf(values[i]);
                else if (mode) {
                    if (mode == 1)
                        for (long i = 0; i < count; i++) sum += values[i];
                    float mean = sum / count;
                    for (long i = 0; i < count; i++) values[i] -= mean, squares += values[i] * values[i];
                    rstd[r] = scale = 1 / sqrtf(squares / count + eps);
                }
                if (columns && run == 1)
                    for (long i = 0; i < count; i++) values[i] = (values[i] * scale - columns[i]) * columns[count + i];
                else if (columns)
                    for (long c = 0; c < count / run; c++)
                        for (long i = c * run; i < (c + 1) * run; i++)
                            values[i] = (values[i] - columns[c]) * columns[count / run + c];
                else if (scale != 1)
                    for (long i = 0; i < count; i++) values[i] *= scale;
            }
            encode_some_rows(&coded, start, n, room, seed, codes);
        }
        free(room);
    }
}

EXPORT void NAME(decode_rows)(const uint8_t *packed, const uint8_t *scales, long rows, long count, int bits, long group,
                              T *out, int threads) {
    Rows coded = coded_rows(packed, scales, count, bits, group);
    long chunks = coded.chunks;
#pragma omp parallel num_threads(threads)
    {
        float *values = malloc(PAD16(coded.span) * (sizeof(float) + 1));
        uint8_t *codes = (uint8_t *)(values + PAD16(coded.span));
#pragma omp for schedule(static)
        for (long part = 0; part < rows * chunks; part++) {
            long n = decode_part(&coded, part / chunks, part % chunks, codes, values);
            T *to = out + part / chunks * count + part % chunks * coded.span;
            for (long i = 0; i < n; i++) to[i] = STORE(values[i]);
        }
        free(values);
    }
}

/* columns, weight, d_x, d_weight and d_bias may be null. The sums over rows are made per thread and added up in order. */
EXPORT void NAME(norm_backward)(const T *grad, const uint8_t *packed, const uint8_t *scales, const float *rstd,
                                const float *columns, const float *weight, long rows, long count, int center, int bits,
                                long group, T *d_x, float *d_weight, float *d_bias, float *sums, int threads) {
    Rows coded = coded_rows(packed, scales, count, bits, group);
    long share = (rows + threads - 1) / threads;
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (int thread = 0; thread < threads; thread++) {
        float *values = malloc(PAD16(count) * (2 * sizeof(float) + 1)), *g = values + PAD16(count);
        uint8_t *codes = (uint8_t *)(g + PAD16(count));
        float *weight_sum = sums + 2 * thread * count, *bias_sum = weight_sum + count;
        for (long r = thread * share; r < MIN(rows, (thread + 1) * share); r++) {
            const T *dy = grad + r * count;
            if (d_x || d_weight) {
                decode_row(&coded, r, codes, values);
                if (columns)
                    for (long i = 0; i < count; i++) values[i] = values[i] * columns[count + i] + columns[i];
            }
            for (long i = 0; i < count; i++) g[i] = LOAD(dy[i]);
            if (d_weight)
                for (long i = 0; i < count; i++) weight_sum[i] += g[i] * values[i];
            if (d_bias)
                for (long i = 0; i < count; i++) bias_sum[i] += g[i];
            if (!d_x) continue;
            if (weight)
                for (long i = 0; i < count; i++) g[i] *= weight[i];
            float along = 0, mean = 0;
            for (long i = 0; i < count; i++) along += g[i] * values[i];
            if (center)
                for (long i = 0; i < count; i++) mean += g[i];
            along /= count, mean /= count;
            for (long i = 0; i < count; i++) d_x[r * count + i] = STORE((g[i] - values[i] * along - mean) * rstd[r]);
        }
        free(values);
    }
    for (int thread = 0; thread < threads; thread++)
        for (long i = 0; i < count; i++) {
            if (d_weight) d_weight[i] += sums[2 * thread * count + i];
            if (d_bias) d_bias[i] += sums[(2 * thread + 1) * count + i];
        }
}

/* Sums over samples and positions of the gradient and of its product with the decoded values, of rows [channels, size]: added to
 * sums, [threads, 2, channels]. */
EXPORT void NAME(channel_sums)(const T *grad, const uint8_t *packed, const uint8_t *scales, long rows, long channels,
                               long size, int bits, long group, float *sums, int threads) {
    Rows coded = coded_rows(packed, scales, channels * size, bits, group);
    long chunks = coded.chunks, share = (rows * chunks + threads - 1) / threads;
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (int thread = 0; thread < threads; thread++) {
        float *values = malloc(PAD16(coded.span) * (sizeof(float) + 1)), *total = sums + 2 * thread * channels;
        uint8_t *codes = (uint8_t *)(values + PAD16(coded.span));
        for (long part = thread * share; part < MIN(rows * chunks, (thread + 1) * share); part++) {
            long n = decode_part(&coded, part / chunks, part % chunks, codes, values), start = part % chunks * coded.span;
            const T *dy = grad + part / chunks * coded.count + start;
            for (long i = 0; i < n;) {
                long channel = (start + i) / size, end = MIN(n, (channel + 1) * size - start);
                float sum = 0, along = 0;
                for (; i < end; i++) sum += LOAD(dy[i]), along += LOAD(dy[i]) * values[i];
                total[channel] += sum, total[channels + channel] += along;
            }
        }
        free(values);
    }
}

/* (grad - means[0, c] - means[1, c] * decoded value) * scale[c], for rows [channels, size] */
EXPORT void NAME(channel_gradient)(const T *grad, const uint8_t *packed, const uint8_t *scales, const float *means,
                                   const float *scale, long rows, long channels, long size, int bits, long group, T *d_x,
                                   int threads) {
    Rows coded = coded_rows(packed, scales, channels * size, bits, group);
    long chunks = coded.chunks;
#pragma omp parallel num_threads(threads)
    {
        float *values = malloc(PAD16(coded.span) * (sizeof(float) + 1));
        uint8_t *codes = (uint8_t *)(values + PAD16(coded.span));
#pragma omp for schedule(static)
        for (long part = 0; part < rows * chunks; part++) {
            long n = decode_part(&coded, part / chunks, part % chunks, codes, values), start = part % chunks * coded.span;
            long offset = part / chunks * coded.count + start;
            for (long i = 0; i < n;) {
                long channel = (start + i) / size, end = MIN(n, (channel + 1) * size - start);
                float mean = means[channel], along = means[channels + channel], factor = scale[channel];
                for (; i < end; i++)
                    d_x[offset + i] = STORE((LOAD(grad[offset + i]) - mean - along * values[i]) * factor);
            }
        }
        free(values);
    }
}

/* The gradient of softmax from codes of square roots of its results, which are scaled to sum to one. */
EXPORT void NAME(softmax_backward)(const T *grad, const uint8_t *packed, const uint8_t *scales, long rows, long count,
                                   int bits, long group, T *d_x, int threads) {
    Rows coded = coded_rows(packed, scales, count, bits, group);
#pragma omp parallel num_threads(threads)
    {
        float *p = malloc(PAD16(count) * (sizeof(float) + 1));
        uint8_t *codes = (uint8_t *)(p + PAD16(count));
#pragma omp for schedule(static)
        for (long r = 0; r < rows; r++) {
            const T *dy = grad + r * count;
            float sum = 0, along = 0;
            decode_row(&coded, r, codes, p);
            for (long i = 0; i < count; i++) {
                p[i] *= p[i];
                sum += p[i], along += p[i] * LOAD(dy[i]);
            }
            float scale = 1 / (sum > FLT_MIN ? sum : FLT_MIN);
            along *= scale;
            for (long i = 0; i < count; i++) d_x[r * count + i] = STORE(p[i] * scale * (LOAD(dy[i]) - along));
        }
        free(p);
    }
}

/* Gradients of f(gate) * up, see `gate16`, from codes of both. */
EXPORT void NAME(gated_backward)(const T *grad, const Coded *gate, const Coded *up, float inner, float cubic, long rows,
                                 long count, int bits, long group, T *d_gate, T *d_up, int threads) {
    Rows gates = coded_rows(gate->packed, gate->scales, count, bits, group);
    Rows ups = coded_rows(up->packed, up->scales, count, bits, group);
    long chunks = gates.chunks, room = PAD16(gates.span);
#pragma omp parallel num_threads(threads)
    {
        float *x = malloc(room * (2 * sizeof(float) + 1)), *y = x + room;
        uint8_t *codes = (uint8_t *)(y + room);
        memset(x, 0, room * sizeof(float));
#pragma omp for schedule(static)
        for (long part = 0; part < rows * chunks; part++) {
            long offset = part / chunks * count + part % chunks * gates.span;
            long n = decode_part(&gates, part / chunks, part % chunks, codes, x);
            decode_part(&ups, part / chunks, part % chunks, codes, y);
            for (long i = 0; i < n; i += 16) {
                vector16 value, slope;
                gate16(*(loose16 *)(x + i), inner, cubic, &value, &slope);
                *(loose16 *)(x + i) = value, *(loose16 *)(y + i) *= slope;
            }
            for (long i = 0; i < n; i++) {
                float dy = LOAD(grad[offset + i]);
                d_up[offset + i] = STORE(dy * x[i]), d_gate[offset + i] = STORE(dy * y[i]);
            }
        }
        free(x);
    }
}

/* One place of the window for a row of results: those whose `x` is larger, or the first, take it. */
INLINE void NAME(pool_place)(const T *x, long n, long stride, int32_t place, float *best, int32_t *places) {
    for (long i = 0; i < n; i++) {
        float value = LOAD(x[i * stride]);
        int take = (value > best[i]) | (value != value) | (places[i] < 0);
        best[i] = take ? value : best[i], places[i] = take ? place : places[i];
    }
}

/* The largest values of windows and their places there, one a byte. */
EXPORT void NAME(max_pool2d)(const T *x, const Pool *pool, long planes, T *y, uint8_t *codes, int threads) {
    long height = pool->results[0], width = pool->results[1];
#pragma omp parallel num_threads(threads)
    {
        float *best = malloc(width * 2 * sizeof(float));
        int32_t *places = (int32_t *)(best + width);
#pragma omp for schedule(static)
        for (long line = 0; line < planes * height; line++) {
            long top = line % height * pool->stride[0] - pool->padding[0], step = pool->stride[1];
            for (long i = 0; i < width; i++) best[i] = -INFINITY, places[i] = -1;
            for (long ky = 0; ky < pool->kernel[0]; ky++) {
                long iy = top + ky * pool->dilation[0];
                if (iy < 0 || iy >= pool->inputs[0]) continue;
                const T *row = x + (line / height * pool->inputs[0] + iy) * pool->inputs[1];
                for (long kx = 0; kx < pool->kernel[1]; kx++) {
                    long shift = kx * pool->dilation[1] - pool->padding[1], last = pool->inputs[1] - 1 - shift;
                    long first = shift < 0 ? (-shift + step - 1) / step : 0, end = last < 0 ? 0 : MIN(width, last / step + 1);
                    const T *from = row + first * step + shift;
                    int32_t place = (int32_t)(ky * pool->kernel[1] + kx);
                    if (step == 1) NAME(pool_place)(from, end - first, 1, place, best + first, places + first);
                    else if (step == 2) NAME(pool_place)(from, end - first, 2, place, best + first, places + first);
                    else NAME(pool_place)(from, end - first, step, place, best + first, places + first);
                }
            }
            for (long i = 0; i < width; i++)
                y[line * width + i] = STORE(best[i]), codes[line * width + i] = (uint8_t)(places[i] < 0 ? 0 : places[i]);
        }
        free(best);
    }
}

EXPORT void NAME(max_pool2d_backward)(const T *grad, const uint8_t *packed, const Pool *pool, long planes, int bits, T *d_x,
                                      int threads) {
    long height = pool->results[0], width = pool->results[1], count = height * width;
    long size = pool->inputs[0] * pool->inputs[1], offsets[256];
    for (long k = 0; k < 256; k++)
        offsets[k] = k / pool->kernel[1] * pool->dilation[0] * pool->inputs[1] + k % pool->kernel[1] * pool->dilation[1];
#pragma omp parallel num_threads(threads)
    {
        uint8_t *codes = malloc(count);
#pragma omp for schedule(static)
        for (long plane = 0; plane < planes; plane++) {
            T *to = d_x + plane * size;
            unpack_run(packed, planes * count, bits, plane * count, count, codes);
            memset(to, 0, size * sizeof(T));
            for (long i = 0; i < height; i++) {
                long top = i * pool->stride[0] - pool->padding[0];
                for (long j = 0; j < width; j++) {
                    long left = j * pool->stride[1] - pool->padding[1], at = i * width + j;
                    long target = top * pool->inputs[1] + left + offsets[codes[at]];
                    if (target < 0 || target >= size) continue; /* the window stepped over the input */
                    to[target] = STORE(LOAD(to[target]) + LOAD(grad[plane * count + at]));
                }
            }
        }
        free(codes);
    }
}

/* x[b, h, n, d] lies at b * stride_b + h * stride_h + n * stride_n + d; mean is bfloat16 [B, H, D] */
EXPORT void NAME(encode_heads)(const T *x, long samples, long heads, long tokens, long count, long stride_b, long stride_h,
                               long stride_n, int center, int bits, long group, const int64_t *seed, uint8_t *packed,
                               uint8_t *scales, uint16_t *mean, int threads) {
    Rows coded = coded_rows(packed, scales, count, bits, group);
    long together = rows_together(&coded, seed), pitch = pitch_of(&coded), room = room_together(&coded);
#pragma omp parallel num_threads(threads)
    {
        float *values = malloc(room * (sizeof(float) + 1) + count * sizeof(float)), *average = values + room;
        uint8_t *codes = (uint8_t *)(average + count);
#pragma omp for schedule(static)
        for (long head = 0; head < samples * heads; head++) {
            const T *start = x + head / heads * stride_b + head % heads * stride_h;
            for (long i = 0; i < count; i++) average[i] = 0;
            if (center && tokens) {
                for (long n = 0; n < tokens; n++)
                    for (long i = 0; i < count; i++) average[i] += LOAD(start[n * stride_n + i]);
                for (long i = 0; i < count; i++) {
                    uint16_t rounded = float_to_bf16(average[i] / tokens);
                    average[i] = bf16_to_float(rounded);
                    if (mean) mean[head * count + i] = rounded;
                }
            }
            for (long first = 0; first < tokens; first += together) {
                long n = MIN(together, tokens - first);
                for (long r = 0; r < n; r++)
                    for (long i = 0; i < count; i++)
                        values[r * pitch + i] = LOAD(start[(first + r) * stride_n + i]) - average[i];
                encode_some_rows(&coded, head * tokens + first, n, values, seed, codes);
            }
        }
        free(values);
    }
}

/* Mean and deviation of the columns of the normalised rows of x; see `codec.column_statistics`. */
EXPORT void NAME(column_statistics)(const T *x, long rows, long count, int center, float eps, uint16_t *out) {
    double *sums = calloc(2 * count, sizeof(double)), *squares = sums + count;
    float *values = malloc(count * sizeof(float) + 1);
    for (long r = 0; r < rows; r++) {
        float mean = 0, square = 0;
        for (long i = 0; i < count; i++) values[i] = LOAD(x[r * count + i]);
        if (center)
            for (long i = 0; i < count; i++) mean += values[i];
        mean /= count;
        for (long i = 0; i < count; i++) values[i] -= mean, square += values[i] * values[i];
        float scale = 1 / sqrtf(square / count + eps);
        for (long i = 0; i < count; i++) {
            float value = values[i] * scale;
            sums[i] += value, squares[i] += (double)value * value;
        }
    }
    for (long i = 0; i < count; i++) {
        double mean = sums[i] / rows, var = squares[i] / rows - mean * mean;
        out[i] = float_to_bf16((float)mean);
        out[count + i] = float_to_bf16((float)sqrt((var < 0 ? 0 : var) + 0.05 * 0.05));
    }
    free(sums), free(values);
}

/* See `attention.py`. grad[b, h, n, d] lies at b * grad_strides[0] + h * grad_strides[1] + n * grad_strides[2] + d; the mask's strides
 * are four. Results are [B, N, H, D]. `room`: `attention_workspace` floats for every thread. */
EXPORT void NAME(attention_backward)(const T *grad, const long *grad_strides, const Coded *query, const Coded *key,
                                     const Coded *value, const float *mask, const long *mask_strides, int causal,
                                     float scale, int bits, long group, long samples, long heads, long length, long keys,
                                     long dim, long value_dim, T *d_query, T *d_key, T *d_value, float *room, int threads) {
    long e = PAD16(dim), ev = PAD16(value_dim), s = PAD16(keys), most = rows_at_a_time(length, keys);
    long size = attention_workspace(length, keys, dim, value_dim);
#pragma omp parallel num_threads(threads)
    {
        long thread = 0;
#ifdef _OPENMP
        thread = omp_get_thread_num();
#endif
        float *q = room + thread * size, *k = q + length * e, *dk = k + keys * e, *dv = dk + keys * e;
        float *kt = dv + keys * ev, *vt = kt + dim * s, *p = vt + value_dim * s, *ds = p + most * s, *dq = ds + most * s;
        float *dout = dq + most * e;
        uint8_t *codes = (uint8_t *)(dout + most * ev);
        memset(kt, 0, (dim + value_dim) * s * sizeof(float));
#pragma omp for schedule(dynamic)
        for (long head = 0; head < samples * heads; head++) {
            long b = head / heads, h = head % heads;
#define DECODE(coded, rows, count, factor, out)                                                                        \
    decode_head(coded->packed + head * rows * packed_width(count, bits),                                               \
                coded->scales + head * rows * scales_width((count + group - 1) / group),                               \
                coded->mean ? coded->mean + head * count : NULL, rows, count, bits, group, factor, codes, out)
            DECODE(value, keys, value_dim, 1, dv); /* until its own use, room for the values */
            transpose(dv, keys, value_dim, ev, vt, s);
            DECODE(query, length, dim, scale, q);
            DECODE(key, keys, dim, 1, k);
            transpose(k, keys, dim, e, kt, s);
            for (long start = 0; start < length; start += most) {
                long rows = MIN(most, length - start);
                const float *q_rows = q + start * e;
                for (long i = 0; i < rows; i++) {
                    const T *from = grad + b * grad_strides[0] + h * grad_strides[1] + (start + i) * grad_strides[2];
                    for (long j = 0; j < value_dim; j++) dout[i * ev + j] = LOAD(from[j]);
                    for (long j = value_dim; j < ev; j++) dout[i * ev + j] = 0;
                }
                product(rows, s, dim, q_rows, e, 1, kt, s, p, s, 0);
                product(rows, s, value_dim, dout, ev, 1, vt, s, ds, s, 0);
                for (long i = 0; i < rows; i++) {
                    float *row = p + i * s;
                    if (mask) {
                        const float *term = mask + b * mask_strides[0] + h * mask_strides[1] + (start + i) * mask_strides[2];
                        if (mask_strides[3] == 1)
                            for (long j = 0; j < keys; j++) row[j] += term[j];
                        else
                            for (long j = 0; j < keys; j++) row[j] += term[j * mask_strides[3]];
                    }
                    if (causal)
                        for (long j = start + i + 1; j < keys; j++) row[j] = -INFINITY;
                    float factor = softmax_row(row, keys);
                    softmax_row_backward(row, ds + i * s, s);
                    if (factor != 1)
                        for (long j = 0; j < s; j++) row[j] *= factor, ds[i * s + j] *= factor;
                }
                product(rows, e, keys, ds, s, 1, k, e, dq, e, 0);
                for (long i = 0; i < rows; i++)
                    for (long j = 0; j < dim; j++)
                        d_query[((b * length + start + i) * heads + h) * dim + j] = STORE(dq[i * e + j] * scale);
                product(keys, e, rows, ds, 1, s, q_rows, e, dk, e, start > 0);
                product(keys, ev, rows, p, 1, s, dout, ev, dv, ev, start > 0);
            }
            for (long n = 0; n < keys; n++) {
                for (long j = 0; j < dim; j++)
                    d_key[((b * keys + n) * heads + h) * dim + j] = STORE(length ? dk[n * e + j] : 0);
                for (long j = 0; j < value_dim; j++)
                    d_value[((b * keys + n) * heads + h) * value_dim + j] = STORE(length ? dv[n * ev + j] : 0);
            }
        }
    }
}

#define PROMPT_ROWS 96

/* out[b, n, h, :] = attended + softmax(scale q key[h]^T) value[h], with q[b, h, n, :] at b * strides[0] + h * strides[1] +
 * n * strides[2]; attended and out are [B, N, H, D]. */
EXPORT void NAME(prompt_attention)(const T *attended, const T *query, const long *strides, const float *key,
                                   const float *value, float scale, long samples, long heads, long length, long prompts,
                                   long dim, long value_dim, T *out, int threads) {
    long s = PAD16(prompts), ev = PAD16(value_dim);
#pragma omp parallel num_threads(threads)
    {
        float *kt = malloc((dim * s + prompts * ev + PROMPT_ROWS * (dim + s + ev)) * sizeof(float));
        float *v = kt + dim * s, *q = v + prompts * ev, *p = q + PROMPT_ROWS * dim, *o = p + PROMPT_ROWS * s;
        memset(kt, 0, (dim * s + prompts * ev) * sizeof(float));
#pragma omp for schedule(static)
        for (long head = 0; head < samples * heads; head++) {
            long b = head / heads, h = head % heads;
            transpose(key + h * prompts * dim, prompts, dim, dim, kt, s);
            for (long j = 0; j < prompts; j++)
                memcpy(v + j * ev, value + (h * prompts + j) * value_dim, value_dim * sizeof(float));
            for (long start = 0; start < length; start += PROMPT_ROWS) {
                long rows = MIN(PROMPT_ROWS, length - start);
                for (long i = 0; i < rows; i++) {
                    const T *from = query + b * strides[0] + h * strides[1] + (start + i) * strides[2];
                    for (long j = 0; j < dim; j++) q[i * dim + j] = LOAD(from[j]) * scale;
                }
                product(rows, s, dim, q, dim, 1, kt, s, p, s, 0);
                for (long i = 0; i < rows; i++) softmax_row(p + i * s, prompts);
                product(rows, ev, prompts, p, s, 1, v, ev, o, ev, 0);
                for (long i = 0; i < rows; i++) {
                    long at = ((b * length + start + i) * heads + h) * value_dim;
                    for (long j = 0; j < value_dim; j++) out[at + j] = STORE(LOAD(attended[at + j]) + o[i * ev + j]);
                }
            }
        }
        free(kt);
    }
}

/* Gradients of `prompt_attention` for the query ([B, N, H, D]), keys and values ([H, P, D]); grad is [B, N, H, D]. */
EXPORT void NAME(prompt_attention_backward)(const T *grad, const Coded *query, const float *key, const float *value,
                                            float scale, int bits, long group, long samples, long heads, long length,
                                            long prompts, long dim, long value_dim, T *d_query, float *d_key,
                                            float *d_value, int threads) {
    long s = PAD16(prompts), e = PAD16(dim), ev = PAD16(value_dim);
    long width = packed_width(dim, bits), stride = scales_width((dim + group - 1) / group);
    long keys = heads * prompts * e, values = heads * prompts * ev; /* of one thread's sums */
    float *sums = calloc(threads * (keys + values), sizeof(float));
#pragma omp parallel num_threads(threads)
    {
        long thread = 0;
#ifdef _OPENMP
        thread = omp_get_thread_num();
#endif
        long size = (dim + value_dim) * s + prompts * e + PROMPT_ROWS * (2 * e + ev + 2 * s);
        float *kt = malloc(size * sizeof(float) + e), *vt = kt + dim * s, *k = vt + value_dim * s, *q = k + prompts * e;
        float *dq = q + PROMPT_ROWS * e, *dout = dq + PROMPT_ROWS * e, *p = dout + PROMPT_ROWS * ev, *ds = p + PROMPT_ROWS * s;
        uint8_t *codes = (uint8_t *)(ds + PROMPT_ROWS * s);
        memset(kt, 0, size * sizeof(float));
#pragma omp for schedule(static)
        for (long head = 0; head < samples * heads; head++) {
            long b = head / heads, h = head % heads;
            float *dk = sums + thread * (keys + values) + h * prompts * e, *dv = sums + thread * (keys + values) + keys + h * prompts * ev;
            transpose(key + h * prompts * dim, prompts, dim, dim, kt, s);
            transpose(value + h * prompts * value_dim, prompts, value_dim, value_dim, vt, s);
            for (long j = 0; j < prompts; j++) memcpy(k + j * e, key + (h * prompts + j) * dim, dim * sizeof(float));
            for (long start = 0; start < length; start += PROMPT_ROWS) {
                long rows = MIN(PROMPT_ROWS, length - start), first = head * length + start;
                decode_head(query->packed + first * width, query->scales + first * stride,
                            query->mean ? query->mean + head * dim : NULL, rows, dim, bits, group, scale, codes, q);
                for (long i = 0; i < rows; i++)
                    for (long j = 0; j < value_dim; j++)
                        dout[i * ev + j] = LOAD(grad[((b * length + start + i) * heads + h) * value_dim + j]);
                product(rows, s, dim, q, e, 1, kt, s, p, s, 0);
                product(rows, s, value_dim, dout, ev, 1, vt, s, ds, s, 0);
                for (long i = 0; i < rows; i++) {
                    softmax_row(p + i * s, prompts);
                    softmax_row_backward(p + i * s, ds + i * s, s);
                }
                product(rows, e, prompts, ds, s, 1, k, e, dq, e, 0);
                for (long i = 0; i < rows; i++)
                    for (long j = 0; j < dim; j++)
                        d_query[((b * length + start + i) * heads + h) * dim + j] = STORE(dq[i * e + j] * scale);
                product(prompts, e, rows, ds, 1, s, q, e, dk, e, 1);
                product(prompts, ev, rows, p, 1, s, dout, ev, dv, ev, 1);
            }
        }
        free(kt);
    }
    for (long j = 0; j < heads * prompts; j++) {
        for (long i = 0; i < dim; i++) d_key[j * dim + i] = 0;
        for (long i = 0; i < value_dim; i++) d_value[j * value_dim + i] = 0;
        for (long thread = 0; thread < threads; thread++) {
            const float *from = sums + thread * (keys + values);
            for (long i = 0; i < dim; i++) d_key[j * dim + i] += from[j * e + i];
            for (long i = 0; i < value_dim; i++) d_value[j * value_dim + i] += from[keys + j * ev + i];
        }
    }
    free(sums);
}

#endif
