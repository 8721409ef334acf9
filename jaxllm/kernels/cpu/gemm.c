/* Products of float32 matrices.

   C (M, N) = A B, plus an addend (M, N) where there is one. All arrays are row-major.
   "nn" takes A (M, K) and B (K, N), "nt" B as (N, K), "tn" A as (K, M).

   The factor of fewer panels is copied as a whole first. The other is shared out: a
   thread takes a few panels at a time, copies KC of K into memory that stays in its
   cache, and computes with that. Each element of C comes from one thread, from its
   first k to its last, so that the result does not depend on which thread takes what.

   What a panel is, and who multiplies two of them, is the method's: the processor's
   vectors, or its tiles. */

#include <limits.h>

#include "amx.h"
#include "panels.h"
#include "xla.h"

#define KC 512  /* of K at a time */
#define GROUP 4 /* panels of the factor that all share that are copied at a time */

typedef struct {
  long rows, columns;    /* of a tile: a panel of A by one of B */
  long most_a, most_b;   /* panels that a thread takes at a time */
} Method;

static const Method methods[] = {
    {.rows = MR, .columns = NR, .most_a = 6, .most_b = 2},
#ifdef HAS_AMX
    {.rows = AMX, .columns = AMX, .most_a = 4, .most_b = 4},
#endif
};
enum { VECTORS, TILES, METHODS = sizeof methods / sizeof *methods };

typedef struct {
  long m, n, k;
  const float *a, *b, *add;
  float *c;
  char *packed;        /* panels of the factor that all share: KC by KC, all of them */
  int a_by_k, b_by_n;  /* A is (K, M); B is (N, K) */
  int method, cut_a;   /* A is the one that is shared out, */
  long cut, size;      /* the number of its panels, and of those in a share */
  long panels, groups; /* of the factor that is copied first */
  atomic_long packed_groups;
} Gemm;

static int is_a_cut(long m, long n) { return m >= n; }

/* Bytes of a panel of k of K. */
static inline long panel_bytes(int method, long width, long k) {
#ifdef HAS_AMX
  if (method == TILES) return ceil_div(k, DEPTH) * STEP_BYTES;
#endif
  return width * k * sizeof(float);
}

/* Floats of scratch memory that a product takes. */
long gemm_scratch(int method, long m, long n, long k) {
  const Method *by = methods + method;
  long width = is_a_cut(m, n) ? by->columns : by->rows;
  long panels = ceil_div(is_a_cut(m, n) ? n : m, width);
  long whole = panel_bytes(method, width, KC) * (k / KC);
  long rest = panel_bytes(method, width, k % KC);
  return (panels * (whole + rest) + ALIGN) / sizeof(float);
}

/* Copies k of K from k0 of panels of A, from row `row` on. */
static void pack_a(const Gemm *g, long row, long panels, long k0, long k, char *out) {
  const float *x = g->a + (g->a_by_k ? k0 * g->m + row : row * g->k + k0);
  long width = min(panels * methods[g->method].rows, g->m - row);
#ifdef HAS_AMX
  if (g->method == TILES) {
    if (g->a_by_k) amx_pack(x, g->m, width, k, out, 1, 0);
    else amx_pack(x, g->k, width, k, out, 0, 0);
    return;
  }
#endif
  float *to = (float *)out;
  if (g->a_by_k) {
    pack_columns(x, g->m, width, g->m - row, k, to, MR);
    return;
  }
  for (; width > 0; width -= MR, x += MR * g->k, to += MR * k)
    pack_rows(x, g->k, min(MR, width), k, to, MR);
}

/* Copies k of K from k0 of panels of B, from column `column` on. */
static void pack_b(const Gemm *g, long column, long panels, long k0, long k, char *out) {
  const float *x = g->b + (g->b_by_n ? column * g->k + k0 : k0 * g->n + column);
  long width = min(panels * methods[g->method].columns, g->n - column);
#ifdef HAS_AMX
  if (g->method == TILES) {
    if (g->b_by_n) amx_pack(x, g->k, width, k, out, 0, 1);
    else amx_pack(x, g->n, width, k, out, 1, 1);
    return;
  }
#endif
  float *to = (float *)out;
  if (!g->b_by_n) {
    pack_columns(x, g->n, width, g->n - column, k, to, NR);
    return;
  }
  for (; width > 0; width -= NR, x += NR * g->k, to += NR * k)
    pack_rows(x, g->k, min(NR, width), k, to, NR);
}

/* Tile (i, j) of C, counted in panels, for k of K from k0. */
static inline void put(const Gemm *g, long i, long j, long k0, long k, const char *a,
                       const char *b) {
  long mr = methods[g->method].rows, nr = methods[g->method].columns;
  long at = i * mr * g->n + j * nr;
  long rows = min(mr, g->m - i * mr), columns = min(nr, g->n - j * nr);
  const float *add = k0 ? g->c : g->add;
  if (add) add += at;
#ifdef HAS_AMX
  if (g->method == TILES) {
    amx_tile(k, a, b, g->c + at, add, g->n, rows, columns);
    return;
  }
#endif
  tile(k, (const float *)a, (const float *)b, g->c + at, add, g->n, rows, columns, 1);
}

/* Copies a share of the factor that is cut, and computes what it is part of; returns 1
   if there is no memory. */
static int share(const Gemm *g, long number) {
  const Method *by = methods + g->method;
  long width = g->cut_a ? by->rows : by->columns;
  long other = g->cut_a ? by->columns : by->rows;
  long first = number * g->size, last = min(first + g->size, g->cut);
  char *own = own_memory(g->size * panel_bytes(g->method, width, min(KC, g->k)));
  if (!own) return 1;
#ifdef HAS_AMX
  if (g->method == TILES) amx_begin();
#endif
  const char *packed = g->packed;
  for (long k0 = 0; k0 < g->k; k0 += KC) {
    long k = min(KC, g->k - k0);
    long ours = panel_bytes(g->method, width, k);
    long theirs = panel_bytes(g->method, other, k);
    if (g->cut_a) pack_a(g, first * width, last - first, k0, k, own);
    else pack_b(g, first * width, last - first, k0, k, own);
    for (long q = 0; q < g->panels; q++, packed += theirs)
      for (long p = first; p < last; p++) {
        const char *panel = own + (p - first) * ours;
        if (g->cut_a) put(g, p, q, k0, k, panel, packed);
        else put(g, q, p, k0, k, packed, panel);
      }
  }
#ifdef HAS_AMX
  if (g->method == TILES) amx_end();
#endif
  return 0;
}

/* First the panels that all share, then the shares. */
static int part(void *data, long number) {
  Gemm *g = data;
  if (number >= g->groups) {
    wait_for(&g->packed_groups, g->groups);
    return share(g, number - g->groups);
  }
  const Method *by = methods + g->method;
  long first = number * GROUP, panels = min(GROUP, g->panels - first);
  long width = g->cut_a ? by->columns : by->rows;
  char *packed = g->packed;
  for (long k0 = 0; k0 < g->k; k0 += KC) {
    long k = min(KC, g->k - k0), bytes = panel_bytes(g->method, width, k);
    if (g->cut_a) pack_b(g, first * width, panels, k0, k, packed + first * bytes);
    else pack_a(g, first * width, panels, k0, k, packed + first * bytes);
    packed += g->panels * bytes;
  }
  atomic_fetch_add_explicit(&g->packed_groups, 1, memory_order_release);
  return 0;
}

/* Panels of a share, of `panels` in all: so many that no thread has much to do when the
   others are done, and as many as that leaves, since panels of the other factor are
   fetched once for each share. */
static long share_size(long panels, long most, long threads) {
  long best = most, least = LONG_MAX;
  for (long size = most; 2 * size >= most; size--) {
    long longest = ceil_div(ceil_div(panels, size), threads) * size;
    if (longest < least) least = longest, best = size;
  }
  return best;
}

/* Decides who of `threads` does what; returns the number of parts. */
static long plan(Gemm *g, float *scratch, long threads) {
  const Method *by = methods + g->method;
  long a = ceil_div(g->m, by->rows), b = ceil_div(g->n, by->columns);
  g->cut_a = is_a_cut(g->m, g->n);
  g->panels = g->cut_a ? b : a;
  g->groups = ceil_div(g->panels, GROUP);
  g->packed = (char *)(((uintptr_t)scratch + ALIGN - 1) / ALIGN * ALIGN);
  g->cut = g->cut_a ? a : b;
  g->size = share_size(g->cut, g->cut_a ? by->most_a : by->most_b, threads);
  return g->groups + ceil_div(g->cut, g->size);
}

static XLA_FFI_Error *gemm(XLA_FFI_CallFrame *frame, int method, int a_by_k,
                           int b_by_n) {
  if (only_asks(frame)) return NULL;
  const XLA_FFI_Api *api = frame->api;
  if (method >= METHODS) return fail(api, "gemm was compiled without AMX");
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
      rets[1]->dims[0] < gemm_scratch(method, m, n, k))
    return fail(api, "gemm's arrays do not fit together");
  Gemm *g = calloc(1, sizeof *g);
  if (!g) return fail(api, "gemm found no memory");
  *g = (Gemm){.m = m, .n = n, .k = k, .a = args[0]->data, .b = args[1]->data,
              .add = count == 3 ? args[2]->data : NULL, .c = rets[0]->data,
              .a_by_k = a_by_k, .b_by_n = b_by_n, .method = method};
  long parts = plan(g, rets[1]->data, threads_of(frame));
  return run(frame, parts, part, g);
}

#define TARGETS(name, method) \
  XLA_FFI_Error *name##_nn(XLA_FFI_CallFrame *f) { return gemm(f, method, 0, 0); } \
  XLA_FFI_Error *name##_nt(XLA_FFI_CallFrame *f) { return gemm(f, method, 0, 1); } \
  XLA_FFI_Error *name##_tn(XLA_FFI_CallFrame *f) { return gemm(f, method, 1, 0); }
TARGETS(gemm_native, VECTORS)
TARGETS(gemm_amx, TILES)

/* Whether products by tiles are there, and allowed. */
int gemm_has_amx(void) {
#ifdef HAS_AMX
  return amx_allowed();
#else
  return 0;
#endif
}

/* The same on this thread alone, for a check without XLA; returns 1 if it finds no
   memory. */
int gemm_alone(int method, long m, long n, long k, const float *a, const float *b,
               const float *add, float *c, float *scratch, int a_by_k, int b_by_n) {
  Gemm g = {.m = m, .n = n, .k = k, .a = a, .b = b, .add = add, .c = c,
            .a_by_k = a_by_k, .b_by_n = b_by_n, .method = method};
  long parts = plan(&g, scratch, 1);
  int failed = 0;
  for (long i = 0; i < parts; i++) failed |= part(&g, i);
  return failed;
}
