/* Products of float32 matrices.

   C (M, N) = A B, plus an addend (M, N) where there is one. All arrays are row-major.
   "nn" takes A (M, K) and B (K, N), "nt" B as (N, K), "tn" A as (K, M).

   The factor of fewer panels is copied as a whole first. The other is shared out: a
   thread takes a few panels at a time, copies KC of K into memory that stays in its
   cache, and computes with that. Each element of C comes from one thread, from its
   first k to its last, so that the result does not depend on which thread takes what. */

#include "panels.h"
#include "xla.h"

#define KC 512    /* of K at a time */
#define SHARE_A 6 /* panels that a thread takes at a time */
#define SHARE_B 2
#define GROUP 4   /* panels of the other factor that are copied at a time */
#define OWN (SHARE_A * MR > SHARE_B * NR ? SHARE_A * MR : SHARE_B * NR)

typedef struct {
  long m, n, k;
  const float *a, *b, *add;
  float *c, *packed;    /* panels of the factor that all share: KC by KC, all of them */
  int a_by_k, b_by_n;   /* A is (K, M); B is (N, K) */
  int cut_a;            /* A is the one that is shared out */
  long panels, groups;  /* of the factor that is copied first */
  atomic_long packed_groups;
} Gemm;

static int is_a_cut(long m, long n) { return m >= n; }

/* Floats of scratch memory that a product takes. */
long gemm_scratch(long m, long n, long k) {
  long width = is_a_cut(m, n) ? ceil_div(n, NR) * NR : ceil_div(m, MR) * MR;
  return width * k + ALIGN;
}

/* Copies k of K from k0 of panels of A, from row `row` on. */
static void pack_a(const Gemm *g, long row, long panels, long k0, long k, float *out) {
  long width = min(panels * MR, g->m - row);
  if (g->a_by_k) {
    pack_columns(g->a + k0 * g->m + row, g->m, width, g->m - row, k, out, MR);
    return;
  }
  for (long p = 0; p < panels; p++, row += MR, out += MR * k)
    pack_rows(g->a + row * g->k + k0, g->k, min(MR, g->m - row), k, out, MR);
}

/* Copies k of K from k0 of panels of B, from column `column` on. */
static void pack_b(const Gemm *g, long column, long panels, long k0, long k, float *out) {
  long width = min(panels * NR, g->n - column);
  if (!g->b_by_n) {
    pack_columns(g->b + k0 * g->n + column, g->n, width, g->n - column, k, out, NR);
    return;
  }
  for (long p = 0; p < panels; p++, column += NR, out += NR * k)
    pack_rows(g->b + column * g->k + k0, g->k, min(NR, g->n - column), k, out, NR);
}

/* Tile (i, j) of C, counted in panels, for k of K from k0. */
static inline void put(const Gemm *g, long i, long j, long k0, long k, const float *a,
                       const float *b) {
  long at = i * MR * g->n + j * NR;
  const float *add = k0 ? g->c : g->add;
  tile(k, a, b, g->c + at, add ? add + at : NULL, g->n, min(MR, g->m - i * MR),
       min(NR, g->n - j * NR), 1);
}

/* Copies a share of the factor that is cut, and computes what it is part of. */
static void share(const Gemm *g, long number) {
  static _Thread_local float own[OWN * KC] __attribute__((aligned(ALIGN)));
  long width = g->cut_a ? MR : NR, other = g->cut_a ? NR : MR;
  long size = g->cut_a ? SHARE_A : SHARE_B, first = number * size;
  long last = min(first + size, ceil_div(g->cut_a ? g->m : g->n, width));
  for (long k0 = 0; k0 < g->k; k0 += KC) {
    long k = min(KC, g->k - k0);
    if (g->cut_a) pack_a(g, first * MR, last - first, k0, k, own);
    else pack_b(g, first * NR, last - first, k0, k, own);
    for (long q = 0; q < g->panels; q++) {
      const float *theirs = g->packed + (k0 * g->panels + q * k) * other, *ours = own;
      for (long p = first; p < last; p++, ours += width * k) {
        if (g->cut_a) put(g, p, q, k0, k, ours, theirs);
        else put(g, q, p, k0, k, theirs, ours);
      }
    }
  }
}

/* First the panels that all share, then the shares. */
static int part(void *data, long number) {
  Gemm *g = data;
  if (number >= g->groups) {
    wait_for(&g->packed_groups, g->groups);
    share(g, number - g->groups);
    return 0;
  }
  long first = number * GROUP, panels = min(GROUP, g->panels - first);
  long width = g->cut_a ? NR : MR;
  for (long k0 = 0; k0 < g->k; k0 += KC) {
    long k = min(KC, g->k - k0);
    float *out = g->packed + (k0 * g->panels + first * k) * width;
    if (g->cut_a) pack_b(g, first * NR, panels, k0, k, out);
    else pack_a(g, first * MR, panels, k0, k, out);
  }
  atomic_fetch_add_explicit(&g->packed_groups, 1, memory_order_release);
  return 0;
}

/* Decides who does what; returns the number of parts. */
static long plan(Gemm *g, float *scratch) {
  long a = ceil_div(g->m, MR), b = ceil_div(g->n, NR);
  g->cut_a = is_a_cut(g->m, g->n);
  g->panels = g->cut_a ? b : a;
  g->groups = ceil_div(g->panels, GROUP);
  g->packed = (float *)(((uintptr_t)scratch + ALIGN - 1) / ALIGN * ALIGN);
  return g->groups + (g->cut_a ? ceil_div(a, SHARE_A) : ceil_div(b, SHARE_B));
}

static XLA_FFI_Error *gemm(XLA_FFI_CallFrame *frame, int a_by_k, int b_by_n) {
  if (only_asks(frame)) return NULL;
  const XLA_FFI_Api *api = frame->api;
  XLA_FFI_Buffer **args = (XLA_FFI_Buffer **)frame->args.args;
  XLA_FFI_Buffer **rets = (XLA_FFI_Buffer **)frame->rets.rets;
  long count = frame->args.size;
  if (count < 2 || count > 3 || frame->rets.size != 2)
    return fail(api, "gemm takes two or three arrays, and gives one and its scratch");
  for (long i = 0; i < count; i++)
    if (!is_float(args[i], 2)) return fail(api, "gemm takes float32 matrices");
  if (!is_float(rets[0], 2) || !is_float(rets[1], 1))
    return fail(api, "gemm gives a float32 matrix and a vector of scratch");
  int64_t *a = args[0]->dims, *b = args[1]->dims, *c = rets[0]->dims;
  long m = a[a_by_k], k = a[!a_by_k], n = b[!b_by_n];
  if (b[b_by_n] != k || c[0] != m || c[1] != n || m < 1 || n < 1 || k < 1 ||
      (count == 3 && (args[2]->dims[0] != m || args[2]->dims[1] != n)) ||
      rets[1]->dims[0] < gemm_scratch(m, n, k))
    return fail(api, "gemm's arrays do not fit together");
  Gemm *g = calloc(1, sizeof *g);
  if (!g) return fail(api, "gemm found no memory");
  *g = (Gemm){.m = m, .n = n, .k = k, .a = args[0]->data, .b = args[1]->data,
              .add = count == 3 ? args[2]->data : NULL, .c = rets[0]->data,
              .a_by_k = a_by_k, .b_by_n = b_by_n};
  long parts = plan(g, rets[1]->data);
  return run(frame, parts, part, g);
}

XLA_FFI_Error *gemm_nn(XLA_FFI_CallFrame *frame) { return gemm(frame, 0, 0); }
XLA_FFI_Error *gemm_nt(XLA_FFI_CallFrame *frame) { return gemm(frame, 0, 1); }
XLA_FFI_Error *gemm_tn(XLA_FFI_CallFrame *frame) { return gemm(frame, 1, 0); }

/* The same on this thread alone, for a check without XLA. */
void gemm_alone(long m, long n, long k, const float *a, const float *b, const float *add,
                float *c, float *scratch, int a_by_k, int b_by_n) {
  Gemm g = {.m = m, .n = n, .k = k, .a = a, .b = b, .add = add, .c = c,
            .a_by_k = a_by_k, .b_by_n = b_by_n};
  long parts = plan(&g, scratch);
  for (long i = 0; i < parts; i++) part(&g, i);
}
