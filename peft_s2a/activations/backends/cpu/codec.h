/* Codes in bytes, groups, scales and random numbers, as `codec.py` defines them. */
#pragma once

#include "vectors.h"

inline uint32_t hash32(uint32_t x) {
    x = (x ^ x >> 16) * 0x7FEB352Du;
    x = (x ^ x >> 15) * 0x846CA68Bu;
    return x ^ x >> 16;
}

/* The number in [0, 1) that decides the rounding at `position`; 0.5, which rounds to nearest, without a seed. */
inline float threshold_at(const int64_t *seed, uint32_t position) {
    if (!seed) return 0.5f;
    uint32_t low = (uint32_t)*seed, high = (uint32_t)((uint64_t)*seed >> 32);
    return (float)(hash32(hash32(position + low) ^ high) >> 8) * 0x1p-24f;
}

/* Of the number of codes in a byte, 8 / bits: this runs for every row, where a division would take longer than packing it. */
inline int log2_per_byte(int bits) { return 3 - __builtin_ctz(bits); }

inline long packed_width(long count, int bits) {
    if (bits == 3) return packed_width(count, 2) + packed_width(count, 1);
    int log2 = log2_per_byte(bits);
    return (count + (1 << log2) - 1) >> log2;
}

typedef uint16_t words8 __attribute__((vector_size(16), aligned(1))); /* sixteen bytes: codes do not cross them when shifted */

inline void pack_row(const uint8_t *codes, long count, int bits, uint8_t *out) {
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
    int planes = 1 << log2_per_byte(bits);
    long width = packed_width(count, bits), last = count - (planes - 1) * width, j = 0; /* of the last plane */
    for (; j + 16 <= last; j += 16) {
        words8 bytes = *(const words8 *)(codes + j);
        for (int s = 1; s < planes; s++) bytes |= *(const words8 *)(codes + s * width + j) << s * bits;
        *(words8 *)(out + j) = bytes;
    }
    for (; j < width; j++) {
        out[j] = codes[j];
        for (int s = 1; s < planes && s * width + j < count; s++) out[j] |= codes[s * width + j] << s * bits;
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

#define UNIT_GROUPS 4

inline long scales_width(long groups) { return (groups + UNIT_GROUPS - 1) / UNIT_GROUPS + 2 * groups; }

/* The unit that the bounds of up to four groups are multiples of, see `codec.py`. */
inline float decode_unit(uint8_t exponent) {
    union { uint32_t i; float f; } word = {(uint32_t)exponent << 23};
    return word.f;
}

#define CHUNK 64 /* groups that are coded together; a multiple of 16 and of UNIT_GROUPS */

/* Whether groups of a row can be read as whole vectors of sixteen. */
inline int in_vectors(long count, long group) { return group % 16 == 0 || group >= count; }

/* Smallest and largest value of each of up to CHUNK groups, the largest infinite where a value is not finite; the last group of a row
 * may be shorter, but is filled up. */
static void ranges_of(const float *x, long count, long group, long groups, vector16 *low, vector16 *high) {
    for (long first = 0; first < groups; first += 16) {
        vector16 lows[16], highs[16];
        long here = MIN(16, groups - first);
        for (long g = 0; g < here; g++) {
            const float *v = x + (first + g) * group;
            long n = MIN(group, count - (first + g) * group);
            vector16 next = in_vectors(count, group) ? load16(v) : v[0];
            index16 spoiled = (index16)(next - next); /* the bits of zero, or of NaN */
            lows[g] = highs[g] = next;
            if (in_vectors(count, group))
                for (long i = 16; i < n; i += 16) {
                    next = load16(v + i), spoiled = spoiled | (index16)(next - next);
                    lows[g] = smaller16(lows[g], next), highs[g] = larger16(highs[g], next);
                }
            else
                for (long i = 1; i < n; i++) {
                    next = v[i], spoiled = spoiled | (index16)(next - next);
                    lows[g] = smaller16(lows[g], next), highs[g] = larger16(highs[g], next);
                }
            highs[g] = choose16(spoiled != 0, INFINITY, highs[g]);
        }
        low[first / 16] = reduce16<smaller16>(lows, here), high[first / 16] = reduce16<larger16>(highs, here);
    }
}

INLINE void codes_of_16(const float *x, float inverse_unit, float low, float inverse_step, vector16 threshold, float top,
                        uint8_t *codes) {
    vector16 code = (load16(x) * inverse_unit - low) * inverse_step + threshold;
    code = smaller16(larger16(code, 0), top); /* truncation is floor then; what is not a number becomes 0 */
    to_bytes16(whole16(code), codes);
}

/* Where the scales of a row of `groups` groups lie, from group `first` on (a multiple of UNIT_GROUPS). */
typedef struct {
    uint8_t *exponents;
    int8_t *lows, *highs;
} Scales;

inline Scales scales_from(const uint8_t *scales, long groups, long first) {
    int8_t *lows = (int8_t *)scales + (groups + UNIT_GROUPS - 1) / UNIT_GROUPS;
    return Scales{(uint8_t *)scales + first / UNIT_GROUPS, lows + first, lows + groups + first};
}

#define NOT_FINITE (-128)    /* the bounds of groups with a value that is not finite */
#define LARGEST_EXPONENT 248 /* of units: a bound shall not overflow */

/* The exponents of the units of `groups` groups, `per_unit` (1, 2 or 4) each, given their largest magnitudes, which are finite: in
 * every lane that of its unit. */
INLINE index16 exponents_of(vector16 magnitude, long groups, int per_unit) {
    magnitude = (vector16)((index16)magnitude & (lanes16() < (int32_t)MIN(groups, 16)));
    if (per_unit > 1) magnitude = larger16(magnitude, across16<1>(magnitude));
    if (per_unit > 2) magnitude = larger16(magnitude, across16<2>(magnitude));
    /* that of magnitude / 127, rounded up: 127 is 0x42FE0000, and what is below 64 of the smallest floats rounds to zero */
    index16 word = (index16)magnitude & 0x7FFFFFFF; /* zero may be negative */
    index16 exponent = (word - 0x3000000 + 0x1FFFF) >> 23;
    exponent = (exponent & (exponent > 0)) | ((exponent <= 0) & (word >= 64) & 1);
    return exponent + (exponent > LARGEST_EXPONENT); /* by at most one; masks are minus one */
}

INLINE vector16 rounded_bound(vector16 bound, vector16 inverse_unit) {
    return larger16(smaller16(nearest16(bound * inverse_unit), 127), -127);
}

/* Code up to CHUNK groups: one code a byte to `codes`. Behind x and codes there is room up to 15 further elements,
 * which in x are equal to the last. `position` is that of the first value in the tensor. */
static void encode_chunk(const float *x, long count, int bits, long group, long groups, int per_unit, const int64_t *seed,
                         uint32_t position, Scales to, uint8_t *codes) {
    float top = (float)((1 << bits) - 1);
    vector16 low[CHUNK / 16], high[CHUNK / 16], inverse_unit[CHUNK / 16], least[CHUNK / 16], inverse_step[CHUNK / 16];
    int8_t kept[2][CHUNK];
    ranges_of(x, count, group, groups, low, high);
    for (long v = 0; v * 16 < groups; v++) {
        index16 finite = high[v] <= std::numeric_limits<float>::max();
        vector16 magnitude = larger16(larger16(low[v], -low[v]), larger16(high[v], -high[v]));
        index16 exponent = exponents_of((vector16)((index16)magnitude & finite), groups - v * 16, per_unit);
        inverse_unit[v] = (vector16)(((index16)254 - exponent) << 23 & (exponent != 0));
        uint8_t exponents[16];
        to_bytes16(exponent, exponents);
        for (long g = 0; g < MIN(16, groups - v * 16); g += per_unit)
            to.exponents[(v * 16 + g) / per_unit] = exponents[g];
        vector16 a = choose16(finite, rounded_bound(low[v], inverse_unit[v]), NOT_FINITE);
        vector16 b = choose16(finite, rounded_bound(high[v], inverse_unit[v]), NOT_FINITE);
        vector16 step = (b - a) / top; /* divided by once more, so that ties fall as in the reference */
        least[v] = a, inverse_step[v] = (vector16)((index16)(vector16(1) / step) & (step != 0));
        to_bytes16(whole16(a), kept[0] + v * 16);
        to_bytes16(whole16(b), kept[1] + v * 16);
    }
    memcpy(to.lows, kept[0], groups), memcpy(to.highs, kept[1], groups);
    for (long g = 0; g < groups; g++) /* sixteen at a time: the next group writes over what is too much */
        for (long start = g * group, i = start; i < MIN(start + group, count); i += 16) {
            vector16 threshold = 0.5f;
            if (seed)
                for (int k = 0; k < 16; k++) threshold[k] = threshold_at(seed, position + (uint32_t)(i + k));
            codes_of_16(x + i, ((float *)inverse_unit)[g], ((float *)least)[g], ((float *)inverse_step)[g], threshold, top, codes + i);
        }
}

/* The values behind up to CHUNK groups of codes. Both have room up to the next multiple of 16. */
static void decode_chunk(const uint8_t *codes, Scales from, long count, int bits, long group, long groups, float *out) {
    float top = (float)((1 << bits) - 1);
    int vectors = in_vectors(count, group);
    for (long g = 0; g < groups; g++) {
        long i = g * group, end = MIN(i + group, count);
        float unit = decode_unit(from.exponents[g / UNIT_GROUPS]), step = (float)(from.highs[g] - from.lows[g]) / top;
        float low = from.lows[g] == NOT_FINITE ? NAN : from.lows[g];
        if (vectors)
            for (; i < end; i += 16) store16(out + i, (real16(from_bytes16(codes + i)) * step + low) * unit);
        else
            for (; i < end; i++) out[i] = ((float)codes[i] * step + low) * unit;
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
    return Rows{packed, scales, count, packed_width(count, bits), groups, scales_width(groups), chunks,
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
                     Scales{exponents, lows, highs}, codes);
        for (long r = 0; r < n; r++) {
            Scales to = scales_from(scales + r * rows->stride, groups, 0);
            *to.exponents = exponents[r];
            for (long g = 0; g < groups; g++) to.lows[g] = lows[r * groups + g], to.highs[g] = highs[r * groups + g];
        }
    } else {
        store16(values + count, values[count - 1]);
        for (long chunk = 0; chunk < rows->chunks; chunk++) {
            long start = chunk * rows->span, first = chunk * CHUNK;
            encode_chunk(values + start, MIN(rows->span, count - start), rows->bits, rows->group, MIN(CHUNK, groups - first),
                         UNIT_GROUPS, seed, position + (uint32_t)start, scales_from(scales, groups, first), codes + start);
        }
    }
    for (long r = 0; r < n; r++) pack_row(codes + r * pitch, count, rows->bits, packed + r * rows->width);
}
