/* Panels, and the inner kernel of every product here.

   A product reads its factors from panels, front to back: for every k, MR values of the
   left factor's rows, or NR of the right one's columns. What a last panel lacks is
   zero. */

#pragma once

#include <stdint.h>
#include <string.h>

#if !defined(__GNUC__) || defined(__clang__)
#error "the kernels take GCC's vector extensions"
#endif

#if defined(__AVX512F__)
#define LANES 16
#define MR 14
#else
#define LANES 8
#define MR 6
#endif
#define NR (2 * LANES)
#define AHEAD 16 /* rows to fetch before they are copied */
#define ALIGN 64

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef float loose __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t lanes __attribute__((vector_size(4 * LANES)));

static inline vec load(const float *p) { return *(const loose *)p; }
static inline void store(float *p, vec x) { *(loose *)p = x; }
static inline long ceil_div(long x, long y) { return (x + y - 1) / y; }
static inline long min(long x, long y) { return x < y ? x : y; }

/* Transposes LANES rows of LANES in place: blocks of half the size change places, then
   within each, and so on. */
static inline void transpose(vec r[LANES]) {
  lanes at;
#pragma GCC unroll 16
  for (int l = 0; l < LANES; l++) at[l] = l;
#pragma GCC unroll 4
  for (int s = LANES / 2; s; s /= 2) {
    lanes high = (at & s) != 0; /* -1 where so */
    lanes first = at + (high & (LANES - s)), second = first + s;
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++) {
      if (i & s) continue;
      vec x = r[i], y = r[i + s];
      r[i] = __builtin_shuffle(x, y, first);
      r[i + s] = __builtin_shuffle(x, y, second);
    }
  }
}

/* Copies rows x (width, k), `stride` apart, to a panel (k, panel). */
static inline void pack_rows(const float *x, long stride, long width, long k, float *out,
                             long panel) {
  for (long from = 0; from < panel; from += LANES) {
    long rows = min(LANES, width - from), columns = min(LANES, panel - from);
    if (rows < 0) rows = 0;
    long j = 0;
    for (; j + LANES <= k; j += LANES) {
      vec r[LANES];
#pragma GCC unroll 16
      for (int i = 0; i < LANES; i++)
        r[i] = i < rows ? load(x + (from + i) * stride + j) : (vec){0};
      transpose(r);
      float *to = out + j * panel + from;
      /* A whole store may spill into what is written next; not beyond the last. */
      long whole = columns == LANES ? LANES : panel <= LANES ? LANES - 1 : 0;
      for (int i = 0; i < LANES; i++) {
        if (i < whole) store(to + i * panel, r[i]);
        else memcpy(to + i * panel, &r[i], columns * sizeof(float));
      }
    }
    for (; j < k; j++)
      for (long i = 0; i < columns; i++)
        out[j * panel + from + i] = i < rows ? x[(from + i) * stride + j] : 0;
  }
}

/* Copies columns x (k, width), rows `stride` apart, to panels (k, panel), one after the
   other. `after` floats of each row may be read. */
static inline void pack_columns(const float *x, long stride, long width, long after,
                                long k, float *out, long panel) {
  long whole = after < LANES ? 0 : min(width, after - LANES) / panel;
  for (long j = 0; j < k; j++, x += stride) {
    for (long i = 0; i < width; i += 64 / sizeof(float))
      __builtin_prefetch(x + AHEAD * stride + i);
    for (long p = 0; p * panel < width; p++) {
      const float *from = x + p * panel;
      float *to = out + (p * k + j) * panel;
      if (p < whole && j + 1 < k) { /* may spill, as above */
        for (long i = 0; i < panel; i += LANES) store(to + i, load(from + i));
      } else {
        for (long i = 0; i < panel; i++) to[i] = p * panel + i < width ? from[i] : 0;
      }
    }
  }
}

/* c (rows, columns), rows `stride` apart, = panel a (k, MR) times panel b (k, NR), plus
   `add`, which lies like c, where it is given. `far` says that c, add and b are not in
   the first caches. */
static inline __attribute__((always_inline)) void tile(
    long k, const float *restrict a, const float *restrict b, float *c,
    const float *add, long stride, long rows, long columns, int far) {
  vec sums[MR][2];
#pragma GCC unroll 16
  for (int i = 0; i < MR; i++) sums[i][0] = sums[i][1] = (vec){0};
  for (long i = 0; far && i < rows; i++) { /* on their way while the sums are made */
    __builtin_prefetch(c + i * stride, 1);
    __builtin_prefetch(c + i * stride + columns - 1, 1);
    if (add && add != c) {
      __builtin_prefetch(add + i * stride);
      __builtin_prefetch(add + i * stride + columns - 1);
    }
  }
  for (long j = 0; j < k; j++) {
    vec b0 = load(b), b1 = load(b + LANES);
    if (far) {
      __builtin_prefetch(a + AHEAD * MR);
      __builtin_prefetch(b + AHEAD * NR);
      __builtin_prefetch(b + AHEAD * NR + LANES);
    }
#pragma GCC unroll 16
    for (int i = 0; i < MR; i++) {
      vec x = a[i] - (vec){0};
      sums[i][0] += x * b0;
      sums[i][1] += x * b1;
    }
    a += MR;
    b += NR;
  }
  if (rows == MR && columns == NR) {
#pragma GCC unroll 16
    for (int i = 0; i < MR; i++)
#pragma GCC unroll 2
      for (int h = 0; h < 2; h++) {
        long at = i * stride + h * LANES;
        store(c + at, add ? sums[i][h] + load(add + at) : sums[i][h]);
      }
    return;
  }
  float spare[MR][NR];
  memcpy(spare, sums, sizeof spare);
  for (long i = 0; i < rows; i++)
    for (long j = 0; j < columns; j++)
      c[i * stride + j] = spare[i][j] + (add ? add[i * stride + j] : 0);
}
