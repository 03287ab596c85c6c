/* Blockwise dequantization on the CPU: the native kernel beside the PyTorch reference in blockwise.py.
 *
 * All elements of a block share one scale, so a block of 4-bit codes can only hold 16 different results. They are computed
 * once a block, in fp32, and rounded once to the wanted type; what is left for each element is a table lookup, which is one
 * shuffle for 32 elements. Each element is still codebook[code] * absmax rounded once: the bits are the reference's.
 *
 * One binary serves every x86-64 machine: the instruction set is chosen at run time. Compile with -ffp-contract=off, since
 * a fused multiply-add would change the last bit of double-quantized scales.
 */
#if defined(__linux__)
#define _DEFAULT_SOURCE
#include <sys/mman.h>
#endif
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <string.h>

#if defined(__x86_64__) && defined(__GNUC__)
#define X86 1
#include <immintrin.h>
#define INLINE static inline __attribute__((always_inline))
#else
#define X86 0
#define INLINE static inline
#endif

#if defined(_WIN32)
#define EXPORT __declspec(dllexport)
#else
#define EXPORT __attribute__((visibility("default")))
#endif

enum { GENERIC, AVX2, AVX512 };      /* instruction sets, in the order of INSTRUCTION_SETS in blockwise_cpu.py */
enum { FLOAT32, FLOAT16, BFLOAT16 }; /* result types, in the order of DTYPES in blockwise_cpu.py */

/* Runs body(data) on up to num_threads threads and waits for all: GOMP_parallel of the OpenMP runtime that torch loaded. */
typedef void parallel_fn(void (*body)(void *), void *data, unsigned num_threads, unsigned flags);

typedef struct {
    const uint8_t *codes;
    const float *codebook;
    const float *absmax;
    const float *offset; /* added to each fp32 result in a rounding of its own; NULL for none */
    void *out;
    int64_t num_elements;
    int64_t block_size;
    int64_t chunk; /* elements that a thread takes at a time, a multiple of block_size */
    bool four_bit;
    int dtype;
    int isa;
    atomic_llong next;
} job_t;

/* ---- plain C ---------------------------------------------------------------------------------------------------------- */

INLINE uint32_t bits_of(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

INLINE uint16_t to_bfloat16(float value) {
    uint32_t bits = bits_of(value);
    return value != value ? 0x7FC0 : (uint16_t)((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}

INLINE uint16_t to_float16(float value) {
    uint32_t bits = bits_of(value), sign = (bits >> 16) & 0x8000, rest = bits & 0x7FFFFFFF;
    if (rest > 0x7F800000) return (uint16_t)(sign | 0x7E00);
    if (rest >= 0x477FF000) return (uint16_t)(sign | 0x7C00); /* 65520 and above round to infinity */
    if (rest >= 0x38800000) return (uint16_t)(sign | ((rest - 0x38000000 + 0x0FFF + ((rest >> 13) & 1)) >> 13));
    if (rest <= 0x33000000) return (uint16_t)sign; /* up to 2^-25, half of the least subnormal, rounds to zero */
    uint32_t shift = 126 - (rest >> 23), mantissa = (rest & 0x7FFFFF) | 0x800000;
    uint32_t kept = mantissa >> shift, lost = mantissa & ((1u << shift) - 1), half = 1u << (shift - 1);
    return (uint16_t)(sign | (kept + (lost > half || (lost == half && (kept & 1)))));
}

INLINE void products(const float *codebook, float absmax, float table[16]) {
    for (int i = 0; i < 16; i++) table[i] = codebook[i] * absmax;
}

INLINE void round16_generic(const float *values, int dtype, uint16_t *out) {
    for (int i = 0; i < 16; i++) out[i] = dtype == BFLOAT16 ? to_bfloat16(values[i]) : to_float16(values[i]);
}

/* Elements first..first+count of the row of nibbles, the even element in the high nibble. */
INLINE void lookup_half(const uint8_t *codes, const uint16_t *table, int64_t first, int64_t count, uint16_t *out) {
    for (int64_t i = first; i < first + count; i++) out[i] = table[(codes[i >> 1] >> (i & 1 ? 0 : 4)) & 15];
}

INLINE void lookup_float(const uint8_t *codes, const float *table, int64_t first, int64_t count, float *out) {
    for (int64_t i = first; i < first + count; i++) out[i] = table[(codes[i >> 1] >> (i & 1 ? 0 : 4)) & 15];
}

/* Each instruction set gives: round16, sixteen fp32 values to 16 bits; half, the 16-bit results of a block that starts at an
 * even element; single, the same for fp32. */

static void half_generic(const uint8_t *codes, const float *codebook, float absmax, int dtype, int64_t count, uint16_t *out) {
    float table[16];
    uint16_t rounded[16];
    products(codebook, absmax, table);
    round16_generic(table, dtype, rounded);
    for (int64_t i = 0; i < count / 2; i++) {
        out[2 * i] = rounded[codes[i] >> 4];
        out[2 * i + 1] = rounded[codes[i] & 15];
    }
    lookup_half(codes, rounded, count & ~INT64_C(1), count & 1, out);
}

static void single_generic(const uint8_t *codes, const float *codebook, float absmax, int64_t count, float *out) {
    float table[16];
    products(codebook, absmax, table);
    for (int64_t i = 0; i < count / 2; i++) {
        out[2 * i] = table[codes[i] >> 4];
        out[2 * i + 1] = table[codes[i] & 15];
    }
    lookup_float(codes, table, count & ~INT64_C(1), count & 1, out);
}

#if X86

/* ---- AVX2 ------------------------------------------------------------------------------------------------------------- */

#define TARGET_AVX2 __attribute__((target("avx2,f16c")))

INLINE TARGET_AVX2 __m128i round8_avx2(__m256 values, int dtype) {
    if (dtype == FLOAT16) return _mm256_cvtps_ph(values, _MM_FROUND_TO_NEAREST_INT);
    __m256i bits = _mm256_castps_si256(values);
    __m256i even = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    __m256i high = _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(bits, even), _mm256_set1_epi32(0x7FFF)), 16);
    __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(values, values, _CMP_UNORD_Q));
    high = _mm256_blendv_epi8(high, _mm256_set1_epi32(0x7FC0), nan);
    return _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
}

INLINE TARGET_AVX2 void round16_avx2(const float *values, int dtype, uint16_t *out) {
    _mm_storeu_si128((__m128i *)out, round8_avx2(_mm256_loadu_ps(values), dtype));
    _mm_storeu_si128((__m128i *)(out + 8), round8_avx2(_mm256_loadu_ps(values + 8), dtype));
}

INLINE TARGET_AVX2 void half_avx2(
    const uint8_t *codes, const float *codebook, float absmax, int dtype, int64_t count, uint16_t *out
) {
    __m256 scale = _mm256_set1_ps(absmax);
    __m128i first = round8_avx2(_mm256_mul_ps(_mm256_loadu_ps(codebook), scale), dtype);
    __m128i second = round8_avx2(_mm256_mul_ps(_mm256_loadu_ps(codebook + 8), scale), dtype);
    /* A byte shuffle looks up one byte, so the table is kept as its low and its high bytes. */
    const __m128i low_byte = _mm_set1_epi16(0xFF), nibble = _mm_set1_epi8(15);
    __m128i low = _mm_packus_epi16(_mm_and_si128(first, low_byte), _mm_and_si128(second, low_byte));
    __m128i high = _mm_packus_epi16(_mm_srli_epi16(first, 8), _mm_srli_epi16(second, 8));
    int64_t i = 0;
    for (; i + 32 <= count; i += 32) {
        __m128i packed = _mm_loadu_si128((const __m128i *)(codes + i / 2));
        __m128i even = _mm_and_si128(_mm_srli_epi16(packed, 4), nibble), odd = _mm_and_si128(packed, nibble);
        __m128i index = _mm_unpacklo_epi8(even, odd);
        __m128i l = _mm_shuffle_epi8(low, index), h = _mm_shuffle_epi8(high, index);
        _mm_storeu_si128((__m128i *)(out + i), _mm_unpacklo_epi8(l, h));
        _mm_storeu_si128((__m128i *)(out + i + 8), _mm_unpackhi_epi8(l, h));
        index = _mm_unpackhi_epi8(even, odd);
        l = _mm_shuffle_epi8(low, index), h = _mm_shuffle_epi8(high, index);
        _mm_storeu_si128((__m128i *)(out + i + 16), _mm_unpacklo_epi8(l, h));
        _mm_storeu_si128((__m128i *)(out + i + 24), _mm_unpackhi_epi8(l, h));
    }
    if (i < count) {
        uint16_t table[16];
        _mm_storeu_si128((__m128i *)table, first);
        _mm_storeu_si128((__m128i *)(table + 8), second);
        lookup_half(codes, table, i, count - i, out);
    }
}

INLINE TARGET_AVX2 void single_avx2(
    const uint8_t *codes, const float *codebook, float absmax, int64_t count, float *out
) {
    __m256 scale = _mm256_set1_ps(absmax);
    __m256 first = _mm256_mul_ps(_mm256_loadu_ps(codebook), scale);
    __m256 second = _mm256_mul_ps(_mm256_loadu_ps(codebook + 8), scale);
    int64_t i = 0;
    for (; i + 8 <= count; i += 8) {
        int32_t word;
        memcpy(&word, codes + i / 2, sizeof word);
        __m256i bytes = _mm256_cvtepu8_epi64(_mm_cvtsi32_si128(word));
        __m256i index = _mm256_or_si256(_mm256_srli_epi64(bytes, 4), _mm256_slli_epi64(bytes, 32));
        /* The permutation reads three bits of the index; the fourth, moved to the sign, chooses the half of the table. */
        __m256 upper = _mm256_castsi256_ps(_mm256_slli_epi32(index, 28));
        __m256 value = _mm256_blendv_ps(
            _mm256_permutevar8x32_ps(first, index), _mm256_permutevar8x32_ps(second, index), upper
        );
        _mm256_storeu_ps(out + i, value);
    }
    if (i < count) {
        float table[16];
        _mm256_storeu_ps(table, first);
        _mm256_storeu_ps(table + 8, second);
        lookup_float(codes, table, i, count - i, out);
    }
}

/* ---- AVX-512 ---------------------------------------------------------------------------------------------------------- */

#define TARGET_AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx2,f16c")))

/* Not vcvtneps2bf16: it flushes subnormal numbers to zero, which PyTorch's rounding does not. */
INLINE TARGET_AVX512 __m256i round_avx512(__m512 values, int dtype) {
    if (dtype == FLOAT16) return _mm512_cvtps_ph(values, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __m512i bits = _mm512_castps_si512(values);
    __m512i even = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i high = _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(bits, even), _mm512_set1_epi32(0x7FFF)), 16);
    high = _mm512_mask_set1_epi32(high, _mm512_cmp_ps_mask(values, values, _CMP_UNORD_Q), 0x7FC0);
    return _mm512_cvtepi32_epi16(high);
}

INLINE TARGET_AVX512 void round16_avx512(const float *values, int dtype, uint16_t *out) {
    _mm256_storeu_si256((__m256i *)out, round_avx512(_mm512_loadu_ps(values), dtype));
}

INLINE TARGET_AVX512 void half_avx512(
    const uint8_t *codes, const float *codebook, float absmax, int dtype, int64_t count, uint16_t *out
) {
    __m256i rounded = round_avx512(_mm512_mul_ps(_mm512_loadu_ps(codebook), _mm512_set1_ps(absmax)), dtype);
    /* The permutation reads five bits of the index; with the table twice over, the fifth does not matter. */
    __m512i table = _mm512_broadcast_i64x4(rounded);
    int64_t i = 0;
    for (; i + 32 <= count; i += 32) {
        __m512i bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(codes + i / 2)));
        __m512i index = _mm512_or_si512(_mm512_srli_epi32(bytes, 4), _mm512_slli_epi32(bytes, 16));
        _mm512_storeu_si512(out + i, _mm512_permutexvar_epi16(index, table));
    }
    if (i < count) {
        uint16_t stored[16];
        _mm256_storeu_si256((__m256i *)stored, rounded);
        lookup_half(codes, stored, i, count - i, out);
    }
}

INLINE TARGET_AVX512 void single_avx512(
    const uint8_t *codes, const float *codebook, float absmax, int64_t count, float *out
) {
    __m512 table = _mm512_mul_ps(_mm512_loadu_ps(codebook), _mm512_set1_ps(absmax));
    int64_t i = 0;
    for (; i + 16 <= count; i += 16) {
        __m512i bytes = _mm512_cvtepu8_epi64(_mm_loadl_epi64((const __m128i *)(codes + i / 2)));
        __m512i index = _mm512_or_si512(_mm512_srli_epi64(bytes, 4), _mm512_slli_epi64(bytes, 32));
        _mm512_storeu_ps(out + i, _mm512_permutexvar_ps(index, table));
    }
    if (i < count) {
        float stored[16];
        _mm512_storeu_ps(stored, table);
        lookup_float(codes, stored, i, count - i, out);
    }
}
#endif /* X86 */

/* ---- a run of blocks, the same for every instruction set -------------------------------------------------------------- */

typedef void round16_fn(const float *values, int dtype, uint16_t *out);

/* One byte a code: 256 possible results a block are too many to tabulate. */
INLINE void byte_block(const job_t *job, int64_t first, int64_t count, float absmax, round16_fn *round16) {
    const uint8_t *codes = job->codes + first;
    if (job->dtype == FLOAT32) {
        float *out = (float *)job->out + first;
        for (int64_t i = 0; i < count; i++) out[i] = job->codebook[codes[i]] * absmax;
        if (job->offset)
            for (int64_t i = 0; i < count; i++) out[i] += *job->offset;
        return;
    }
    uint16_t *out = (uint16_t *)job->out + first;
    float values[16] = {0};
    int64_t i = 0;
    for (; i + 16 <= count; i += 16) {
        for (int j = 0; j < 16; j++) values[j] = job->codebook[codes[i + j]] * absmax;
        round16(values, job->dtype, out + i);
    }
    if (i < count) {
        uint16_t rounded[16];
        for (int64_t j = 0; j < count - i; j++) values[j] = job->codebook[codes[i + j]] * absmax;
        round16(values, job->dtype, rounded);
        memcpy(out + i, rounded, (size_t)(count - i) * sizeof *rounded);
    }
}

/* A block that starts in the middle of a byte, as odd block sizes have it. */
INLINE void straddling_block(const job_t *job, int64_t first, int64_t count, float absmax) {
    float table[16];
    uint16_t rounded[16];
    products(job->codebook, absmax, table);
    if (job->dtype == FLOAT32) {
        lookup_float(job->codes, table, first, count, job->out);
    } else {
        round16_generic(table, job->dtype, rounded);
        lookup_half(job->codes, rounded, first, count, job->out);
    }
}

#define DEFINE_RUN(NAME, TARGET)                                                                                   \
    TARGET static void run_##NAME(const job_t *job, int64_t first, int64_t end) {                                  \
        int64_t block = first / job->block_size;                                                                   \
        for (; first < end; first += job->block_size, block++) {                                                   \
            int64_t count = end - first < job->block_size ? end - first : job->block_size;                         \
            const uint8_t *codes = job->codes + first / 2;                                                         \
            if (!job->four_bit)                                                                                    \
                byte_block(job, first, count, job->absmax[block], round16_##NAME);                                 \
            else if (first & 1)                                                                                    \
                straddling_block(job, first, count, job->absmax[block]);                                           \
            else if (job->dtype == FLOAT32)                                                                        \
                single_##NAME(codes, job->codebook, job->absmax[block], count, (float *)job->out + first);         \
            else                                                                                                   \
                half_##NAME(                                                                                       \
                    codes, job->codebook, job->absmax[block], job->dtype, count, (uint16_t *)job->out + first      \
                );                                                                                                 \
        }                                                                                                          \
    }

DEFINE_RUN(generic, )
#if X86
DEFINE_RUN(avx2, TARGET_AVX2)
DEFINE_RUN(avx512, TARGET_AVX512)
#endif

/* Takes chunks until none are left, so that it does not matter how many threads the runtime really gave. */
static void work(void *data) {
    job_t *job = data;
    for (;;) {
        int64_t first = atomic_fetch_add(&job->next, job->chunk);
        if (first >= job->num_elements) return;
        int64_t end = job->num_elements - first < job->chunk ? job->num_elements : first + job->chunk;
#if X86
        if (job->isa == AVX512) {
            run_avx512(job, first, end);
            continue;
        }
        if (job->isa == AVX2) {
            run_avx2(job, first, end);
            continue;
        }
#endif
        run_generic(job, first, end);
    }
}

/* ---- what Python calls ------------------------------------------------------------------------------------------------ */

/* The best instruction set of this machine. */
EXPORT int fourfold_instruction_set(void) {
#if X86
    __builtin_cpu_init();
    bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c");
    if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl"))
        return AVX512;
    if (avx2) return AVX2;
#endif
    return GENERIC;
}

/* A result of 32 MiB or more is a mapping of its own, new at each call, and with small pages most of the time would go into
 * faulting it in: eight times as long as the kernel itself. The mapping ends with the tensor, so nothing outlives it. */
static void ask_for_huge_pages(void *out, int64_t num_bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    const uintptr_t huge = UINT64_C(1) << 21;
    uintptr_t first = ((uintptr_t)out + huge - 1) & ~(huge - 1), end = ((uintptr_t)out + (uintptr_t)num_bytes) & ~(huge - 1);
    if (num_bytes >= INT64_C(1) << 25) madvise((void *)first, end - first, MADV_HUGEPAGE); /* advice: it may be refused */
#else
    (void)out, (void)num_bytes;
#endif
}

/* Dequantizes num_elements codes. The caller has checked the lengths of the arrays. */
EXPORT void fourfold_dequantize(
    const uint8_t *codes, const float *codebook, int codebook_size, const float *absmax, const float *offset, void *out,
    int64_t num_elements, int64_t block_size, int dtype, int isa, int num_threads, parallel_fn *parallel
) {
    /* 64 Ki elements take two to four microseconds, about as long as it takes to wake a thread. */
    const int64_t least_chunk = 32768, least_a_thread = 65536;
    if (block_size > num_elements) block_size = num_elements > 0 ? num_elements : 1;
    int64_t blocks_a_chunk = (least_chunk + block_size - 1) / block_size;
    job_t job = {
        .codes = codes, .codebook = codebook, .absmax = absmax, .offset = offset, .out = out,
        .num_elements = num_elements, .block_size = block_size, .chunk = blocks_a_chunk * block_size,
        .four_bit = codebook_size == 16, .dtype = dtype, .isa = isa, .next = 0,
    };
    ask_for_huge_pages(out, num_elements * (dtype == FLOAT32 ? 4 : 2));
    if (num_threads > num_elements / least_a_thread) num_threads = (int)(num_elements / least_a_thread);
    if (parallel && num_threads > 1)
        parallel(work, &job, (unsigned)num_threads, 0);
    else
        work(&job);
}
