/* Products of float32 by AMX, which multiplies bfloat16 alone.

   A float32 is the sum of three bfloat16: 24 bits are three times 8, none is lost. Of
   the nine products of two such sums six are taken, those above 2^-24 of the whole, and
   added in float32 (Henry, Tang, Heinecke: Leveraging the bfloat16 artificial
   intelligence datatype for higher-precision computations, 2019; JAX's BF16_BF16_F32_X6
   is the same). Infinity and what is above 3.39e38 give NaN here, and digits of less than
   2^-126 count as zero.

   A panel is 32 rows of the left factor, or columns of the right one: for every 32 of K
   the three parts, each two tiles of 16 rows of 64 bytes. The left factor's rows hold 32
   of K; the right one's hold a pair of K for each of 16 columns. */

#pragma once

#include "panels.h"

#if defined(__AMX_BF16__) && defined(__AVX512BF16__) && LANES == 16
#define HAS_AMX

#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#define TILE 16
#define AMX (2 * TILE)          /* rows and columns of a product's tile */
#define DEPTH 32                /* of K in a tile */
#define TILE_BYTES 1024
#define PART_BYTES (2 * TILE_BYTES)
#define STEP_BYTES (3 * PART_BYTES)

/* Asks Linux for the tiles' registers; 0 where there are none. */
static inline int amx_allowed(void) {
  const int request = 0x1023, tile_data = 18; /* ARCH_REQ_XCOMP_PERM, XTILEDATA */
  return !syscall(SYS_arch_prctl, request, tile_data);
}

/* What a thread does before its first tile, and after its last. */
static inline void amx_begin(void) {
  struct {
    uint8_t palette, start, reserved[14];
    uint16_t bytes[16]; /* of a row */
    uint8_t rows[16];
  } shapes = {.palette = 1};
  for (int i = 0; i < 8; i++) shapes.bytes[i] = 64, shapes.rows[i] = TILE;
  __asm__ volatile("" ::: "memory");
  _tile_loadconfig(&shapes);
}

static inline void amx_end(void) { _tile_release(); }

static inline __mmask16 first_lanes(long count) {
  return count >= LANES ? 0xffff : count <= 0 ? 0 : (1 << count) - 1;
}

/* x as a sum of three values of bfloat16, the largest first. */
static inline void split(__m512 x, __m512 parts[3]) {
#pragma GCC unroll 2
  for (int s = 0; s < 2; s++) {
    __m512i bits = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(x));
    parts[s] = (__m512)_mm512_slli_epi32(bits, 16);
    x = _mm512_sub_ps(x, parts[s]);
  }
  parts[2] = x;
}

/* 16 pairs of bfloat16 from x (32), which lie side by side. */
static inline void pairs_along(const float *x, long k, vec pairs[3]) {
  __m512 a[3], b[3];
  split(_mm512_maskz_loadu_ps(first_lanes(k), x), a);
  split(_mm512_maskz_loadu_ps(first_lanes(k - LANES), x + LANES), b);
#pragma GCC unroll 3
  for (int s = 0; s < 3; s++) pairs[s] = (vec)_mm512_cvtne2ps_pbh(b[s], a[s]);
}

/* 16 pairs from x (2, 16), rows `stride` apart. */
static inline void pairs_across(const float *x, long stride, long k, long width,
                                vec pairs[3]) {
  __m512 a[3], b[3];
  split(_mm512_maskz_loadu_ps(first_lanes(k > 0 ? width : 0), x), a);
  split(_mm512_maskz_loadu_ps(first_lanes(k > 1 ? width : 0), x + stride), b);
#pragma GCC unroll 3
  for (int s = 0; s < 3; s++) {
    lanes low = (lanes)_mm512_srli_epi32((__m512i)a[s], 16);
    pairs[s] = (vec)(low | ((lanes)b[s] & (int)0xffff0000));
  }
}

/* Copies 32 of K, of which there are k, from 16 rows, of which there are `width`, to a
   tile of each part. Rows lie `stride` apart, or, if `by_k`, those of K do; `pairs_down`
   says that a row of the tiles holds one pair of K. */
static inline __attribute__((always_inline)) void pack_tile(
    const float *x, long stride, long width, long k, char *out, int by_k,
    int pairs_down) {
  vec all[3][TILE];
#pragma GCC unroll 16
  for (long i = 0; i < TILE; i++) {
    vec pairs[3];
    if (by_k) pairs_across(x + 2 * i * stride, stride, k - 2 * i, width, pairs);
    else pairs_along(x + i * stride, i < width ? k : 0, pairs);
    for (int s = 0; s < 3; s++) {
      if (by_k == pairs_down) store((float *)(out + s * PART_BYTES + i * 64), pairs[s]);
      else all[s][i] = pairs[s];
    }
  }
  for (int s = 0; s < 3 && by_k != pairs_down; s++) {
    transpose(all[s]);
#pragma GCC unroll 16
    for (int i = 0; i < TILE; i++)
      store((float *)(out + s * PART_BYTES + i * 64), all[s][i]);
  }
}

/* Copies x to panels, one after the other. */
static inline __attribute__((always_inline)) void amx_pack(
    const float *x, long stride, long width, long k, char *out, int by_k,
    int pairs_down) {
  long across = ceil_div(width, TILE), down = ceil_div(k, DEPTH);
  for (long n = 0; n < across * down; n++) { /* along rows, as they lie */
    long i = by_k ? n % across : n / down, j = by_k ? n / across : n % down;
    char *to = out + (i / 2 * down + j) * STEP_BYTES + i % 2 * TILE_BYTES;
    pack_tile(x + (by_k ? j * DEPTH * stride + i * TILE : i * TILE * stride + j * DEPTH),
              stride, width - i * TILE, k - j * DEPTH, to, by_k, pairs_down);
  }
}

#define LOAD_A(part) \
  _tile_loadd(4, a + part * PART_BYTES, 64); \
  _tile_loadd(5, a + part * PART_BYTES + TILE_BYTES, 64);
#define LOAD_B(part) \
  _tile_loadd(6, b + part * PART_BYTES, 64); \
  _tile_loadd(7, b + part * PART_BYTES + TILE_BYTES, 64);
#define MULTIPLY \
  _tile_dpbf16ps(0, 4, 6); \
  _tile_dpbf16ps(1, 4, 7); \
  _tile_dpbf16ps(2, 5, 6); \
  _tile_dpbf16ps(3, 5, 7);

/* c (rows, columns), rows `stride` apart, = a panel of the left factor times one of the
   right, plus `add`, which lies like c, where it is given. */
static inline void amx_tile(long k, const char *a, const char *b, float *c,
                            const float *add, long stride, long rows, long columns) {
  __asm__ volatile("" ::: "memory"); /* panels are written before they are read */
  long often = ceil_div(AMX * DEPTH, k), fetched = 0; /* rows to fetch in a turn */
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (; k > 0; k -= DEPTH, a += STEP_BYTES, b += STEP_BYTES) {
    for (int n = 0; n < often && fetched < rows; n++, fetched++) {
      __builtin_prefetch(c + fetched * stride, 1);
      __builtin_prefetch(c + fetched * stride + columns - 1, 1);
      if (add && add != c) {
        __builtin_prefetch(add + fetched * stride);
        __builtin_prefetch(add + fetched * stride + columns - 1);
      }
    }
    LOAD_A(0) LOAD_B(2) MULTIPLY
    LOAD_B(1) MULTIPLY
    LOAD_A(1) MULTIPLY
    LOAD_B(0) MULTIPLY
    LOAD_A(2) MULTIPLY
    LOAD_A(0) MULTIPLY
  }
  float spare[AMX][AMX] __attribute__((aligned(ALIGN)));
  int whole = rows == AMX && columns == AMX && !add;
  float *to = whole ? c : spare[0];
  long bytes = (whole ? stride : AMX) * sizeof(float), down = TILE * bytes / sizeof(float);
  _tile_stored(0, to, bytes);
  _tile_stored(1, to + TILE, bytes);
  _tile_stored(2, to + down, bytes);
  _tile_stored(3, to + down + TILE, bytes);
  __asm__ volatile("" ::: "memory");
  for (long i = 0; i < rows && !whole; i++)
    for (long j = 0; j < columns; j += LANES) {
      __mmask16 there = first_lanes(columns - j);
      float *at = c + i * stride + j;
      __m512 sum = _mm512_load_ps(&spare[i][j]);
      if (add) sum += _mm512_maskz_loadu_ps(there, add + i * stride + j);
      _mm512_mask_storeu_ps(at, there, sum);
    }
}

#endif
