/* Causal attention with grouped heads, from the joined product of q, k and v to the
   heads' outputs, and back.

   B rows, T positions, N query heads, K key/value heads, G = N / K, H head dim,
   R = H / 2 pairs, J = K (G + 2) H: for each key/value head its G queries, key, value.
   A part is one row's key/value head, with all its queries. Queries are taken NR at a
   time, and scores lie transposed, (key, query): so they are the panel that the next
   product reads, and a softmax goes along lanes. Keys beyond the last query of a panel
   are left out. The forward pass keeps each query's largest score and the inverse sum
   of its exponentials, the backward pass computes the probabilities again (Dao et al.,
   2022). */

#include <math.h>

#include "panels.h"
#include "xla.h"

typedef struct {
  long b, t, n, k, h, j, tables; /* tables of cos and sin: 1, or one for each row */
  const float *qkv, *rstd, *cos, *sin, *out, *stats, *dout;
  float *to_out, *to_stats, *to_dqkv;
} Attention;

/* x where the mask is -1, else y. */
static inline vec pick(lanes mask, vec x, vec y) {
  return (vec)((mask & (lanes)x) | (~mask & (lanes)y));
}

/* exp(x), for x up to 80, to about one unit in the last place; 0 below -87. */
static inline vec exp_of(vec x) {
  vec zero = {0}, low = zero - 87.33f;
  lanes under = x < low, number = x == x;
  vec nan = x;
  x = pick(under, low, x);
  vec shifted = x * 1.44269504f + 12582912.0f, whole = shifted - 12582912.0f;
  vec r = x - whole * 0.693359375f - whole * -2.12194440e-4f;
  vec p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  lanes bits = (lanes)shifted << 23; /* the whole part, as an exponent */
  return pick(number, pick(under, zero, (vec)((lanes)p + bits)), nan);
}

static inline float dot(const float *x, const float *y, long n) {
  vec sums = {0};
  long i = 0;
  for (; i + LANES <= n; i += LANES) sums += load(x + i) * load(y + i);
  float sum = 0;
  for (int l = 0; l < LANES; l++) sum += sums[l];
  for (; i < n; i++) sum += x[i] * y[i];
  return sum;
}

/* A piece of the thread's own memory, aligned. */
static float *take(float **next, long floats) {
  float *taken = *next;
  *next += ceil_div(floats, ALIGN / 4) * (ALIGN / 4);
  return taken;
}

/* One position of one head, times `scale`; `turn` is 1 to rotate its pairs, -1 to turn
   them back, 0 for neither. */
static inline void turned(const float *restrict x, const float *cos, const float *sin,
                          long h, float scale, int turn, float *restrict out) {
  if (!turn) {
    for (long i = 0; i < h; i++) out[i] = x[i] * scale;
    return;
  }
  float sign = turn * scale;
  for (long i = 0; i < h / 2; i++) {
    float a = x[2 * i], b = x[2 * i + 1], c = cos[i] * scale, s = sin[i] * sign;
    out[2 * i] = a * c - b * s;
    out[2 * i + 1] = b * c + a * s;
  }
}

/* What a part works with: arrays of its positions, then panels. */
typedef struct {
  const Attention *all;
  long row, head; /* of b, of k */
  long keys;      /* t, in whole panels of MR */
  long wide;      /* h, in whole panels of MR */
  float *k_rows, *v_rows;       /* (T, H) */
  float *k_by_h, *v_by_h;       /* panels (H, MR) of keys */
  float *k_by_s, *v_by_s;       /* panels (T, MR) of head dims */
  float *q, *q_by_h, *dout, *dout_by_h; /* one panel of queries: (NR, H), (H, NR) */
  float *scores, *dscores, *turned_round; /* (keys, NR); panels (NR, MR) of keys */
  float *q_by_q, *dout_by_q;    /* panels (NR queries, NR) of head dims */
  float *columns, *dk, *dv;     /* (wide, NR); (keys, H) */
} Part;

static const float *table(const Attention *a, const float *x, long row, long t) {
  return x + ((a->tables > 1 ? row * a->t : 0) + t) * (a->h / 2);
}

/* Head `which` of the part's group at position t: its queries, then key, then value. */
static const float *joined(const Part *p, long t, long which) {
  const Attention *a = p->all;
  long group = a->n / a->k + 2;
  return a->qkv + (p->row * a->t + t) * a->j + (p->head * group + which) * a->h;
}

static int begin(Part *p, const Attention *a, long number, int backward) {
  long t = a->t, h = a->h;
  *p = (Part){.all = a, .row = number / a->k, .head = number % a->k};
  p->keys = ceil_div(t, MR) * MR, p->wide = ceil_div(h, MR) * MR;
  long heads = ceil_div(h, NR) * NR, pad = ALIGN;
  long need = 2 * (t * h + pad) + 4 * (p->keys * h + pad) + 2 * (p->wide * t + pad) +
              4 * (NR * h + pad) + 3 * (p->keys * NR + pad) + 2 * (NR * heads + pad) +
              p->wide * NR + pad;
  float *next = own_memory(need * sizeof(float));
  if (!next) return 1;
  p->k_rows = take(&next, t * h), p->v_rows = take(&next, t * h);
  p->k_by_h = take(&next, p->keys * h), p->v_by_h = take(&next, p->keys * h);
  p->k_by_s = take(&next, p->wide * t), p->v_by_s = take(&next, p->wide * t);
  p->q = take(&next, NR * h), p->q_by_h = take(&next, NR * h);
  p->dout = take(&next, NR * h), p->dout_by_h = take(&next, NR * h);
  p->scores = take(&next, p->keys * NR), p->dscores = take(&next, p->keys * NR);
  p->turned_round = take(&next, p->keys * NR);
  p->q_by_q = take(&next, NR * heads), p->dout_by_q = take(&next, NR * heads);
  p->columns = take(&next, p->wide * NR);
  p->dk = take(&next, p->keys * h), p->dv = take(&next, p->keys * h);

  long group = a->n / a->k;
  for (long s = 0; s < t; s++) {
    const float *cos = table(a, a->cos, p->row, s), *sin = table(a, a->sin, p->row, s);
    float scale = a->rstd[p->row * t + s];
    turned(joined(p, s, group), cos, sin, h, scale, 1, p->k_rows + s * h);
    turned(joined(p, s, group + 1), cos, sin, h, scale, 0, p->v_rows + s * h);
  }
  for (long s = 0; s < t; s += MR) {
    pack_rows(p->k_rows + s * h, h, min(MR, t - s), h, p->k_by_h + s * h, MR);
    if (backward)
      pack_rows(p->v_rows + s * h, h, min(MR, t - s), h, p->v_by_h + s * h, MR);
  }
  if (backward) {
    pack_columns(p->k_rows, h, h, h + LANES, t, p->k_by_s, MR);
    memset(p->dk, 0, p->keys * h * sizeof(float));
    memset(p->dv, 0, p->keys * h * sizeof(float));
  } else {
    pack_columns(p->v_rows, h, h, h + LANES, t, p->v_by_s, MR);
  }
  return 0;
}

/* Queries from position t0 on of head g, scaled: rows, and a panel. */
static void take_queries(const Part *p, long g, long t0, long rows) {
  const Attention *a = p->all;
  float root = 1 / sqrtf(a->h);
  for (long i = 0; i < rows; i++) {
    long t = t0 + i;
    turned(joined(p, t, g), table(a, a->cos, p->row, t), table(a, a->sin, p->row, t),
           a->h, root * a->rstd[p->row * a->t + t], 1, p->q + i * a->h);
  }
  pack_rows(p->q, a->h, rows, a->h, p->q_by_h, NR);
}

/* (keys, NR) from panels (H, MR) of keys and one (H, NR) of queries, up to `keys`. */
static void by_keys(const Part *p, const float *a, const float *b, long keys, float *c) {
  long h = p->all->h;
  for (long s = 0; s < keys; s += MR)
    tile(h, a + s * h, b, c + s * NR, NULL, NR, MR, NR, 0);
}

/* columns (wide, NR) from panels (T, MR) of head dims and (keys, NR). */
static void by_head_dims(const Part *p, const float *a, const float *b, long keys) {
  for (long h = 0; h < p->wide; h += MR)
    tile(keys, a + h * p->all->t, b, p->columns + h * NR, NULL, NR, MR, NR, 0);
}

/* Adds x^T y to sums (whole panels of keys, H): x (keys, NR queries) is zero behind the
   last key, y panels (NR queries, NR) of head dims. */
static void add_outer(const Part *p, const float *x, const float *y, long keys,
                      long rows, float *sums) {
  long h = p->all->h;
  for (long s = 0; s < keys; s += MR)
    pack_rows(x + s * NR, NR, MR, NR, p->turned_round + s * NR, MR);
  for (long from = 0; from < h; from += NR)
    for (long s = 0; s < keys; s += MR) {
      float *at = sums + s * h + from;
      tile(rows, p->turned_round + s * NR, y + from * rows, at, at, h, MR,
           min(NR, h - from), 0);
    }
}

/* The columns as rows (NR, H), in place of the queries. */
static const float *rows_of_columns(const Part *p) {
  pack_rows(p->columns, NR, p->all->h, NR, p->q, p->all->h);
  return p->q;
}

static inline lanes lane_numbers(void) {
  lanes at;
  for (int l = 0; l < LANES; l++) at[l] = l;
  return at;
}

static int forward(void *data, long number) {
  const Attention *a = data;
  Part here, *p = &here;
  if (begin(p, a, number, 0)) return 1;
  long t = a->t, h = a->h, group = a->n / a->k;
  for (long g = 0; g < group; g++) {
    long head = p->head * group + g;
    float *top = a->to_stats + (p->row * a->n + head) * t;
    float *inverse = top + a->b * a->n * t;
    for (long t0 = 0; t0 < t; t0 += NR) {
      long rows = min(NR, t - t0), keys = t0 + rows;
      take_queries(p, g, t0, rows);
      by_keys(p, p->k_by_h, p->q_by_h, keys, p->scores);
      float tops[NR], inverses[NR];
      for (long from = 0; from < NR; from += LANES) {
        lanes query = lane_numbers() + (int)(t0 + from);
        vec most = load(p->scores + from), sum = {0};
        for (long s = 1; s < keys; s++) {
          vec x = load(p->scores + s * NR + from);
          most = pick((query >= (int)s) & (x > most), x, most);
        }
        for (long s = 0; s < keys; s++) {
          float *at = p->scores + s * NR + from;
          vec e = pick(query >= (int)s, exp_of(load(at) - most), (vec){0});
          store(at, e);
          sum += e;
        }
        store(tops + from, most);
        store(inverses + from, 1.0f / sum);
      }
      by_head_dims(p, p->v_by_s, p->scores, keys);
      const float *sums = rows_of_columns(p);
      for (long i = 0; i < rows; i++) {
        float *out = a->to_out + ((p->row * t + t0 + i) * a->n + head) * h;
        for (long x = 0; x < h; x++) out[x] = sums[i * h + x] * inverses[i];
        top[t0 + i] = tops[i], inverse[t0 + i] = inverses[i];
      }
    }
  }
  return 0;
}

static int backward(void *data, long number) {
  const Attention *a = data;
  Part here, *p = &here;
  if (begin(p, a, number, 1)) return 1;
  long t = a->t, h = a->h, group = a->n / a->k;
  float root = 1 / sqrtf(h);
  for (long g = 0; g < group; g++) {
    long head = p->head * group + g;
    const float *top = a->stats + (p->row * a->n + head) * t;
    const float *inverse = top + a->b * a->n * t;
    for (long t0 = 0; t0 < t; t0 += NR) {
      long rows = min(NR, t - t0), keys = t0 + rows;
      float along[NR] = {0}, tops[NR] = {0}, inverses[NR] = {0};
      take_queries(p, g, t0, rows);
      for (long i = 0; i < rows; i++) {
        long at = ((p->row * t + t0 + i) * a->n + head) * h;
        memcpy(p->dout + i * h, a->dout + at, h * sizeof(float));
        along[i] = dot(a->dout + at, a->out + at, h), tops[i] = top[t0 + i], inverses[i] = inverse[t0 + i];
      }
      pack_rows(p->dout, h, rows, h, p->dout_by_h, NR);
      pack_columns(p->q, h, h, h + LANES, rows, p->q_by_q, NR);
      pack_columns(p->dout, h, h, h + LANES, rows, p->dout_by_q, NR);
      by_keys(p, p->k_by_h, p->q_by_h, keys, p->scores);
      by_keys(p, p->v_by_h, p->dout_by_h, keys, p->dscores);
      for (long from = 0; from < NR; from += LANES) {
        lanes query = lane_numbers() + (int)(t0 + from);
        vec most = load(tops + from), over = load(inverses + from);
        vec sum = load(along + from);
        for (long s = 0; s < keys; s++) {
          float *at = p->scores + s * NR + from, *to = p->dscores + s * NR + from;
          vec prob = exp_of(load(at) - most) * over;
          prob = pick(query >= (int)s, prob, (vec){0});
          store(at, prob);
          store(to, prob * (load(to) - sum));
        }
      }
      for (long s = keys; s % MR; s++) {
        memset(p->scores + s * NR, 0, NR * sizeof(float));
        memset(p->dscores + s * NR, 0, NR * sizeof(float));
      }
      by_head_dims(p, p->k_by_s, p->dscores, keys);
      add_outer(p, p->dscores, p->q_by_q, keys, rows, p->dk);
      add_outer(p, p->scores, p->dout_by_q, keys, rows, p->dv);
      const float *sums = rows_of_columns(p);
      for (long i = 0; i < rows; i++) {
        long at = t0 + i;
        turned(sums + i * h, table(a, a->cos, p->row, at), table(a, a->sin, p->row, at), h,
               root * a->rstd[p->row * t + at], -1,
               a->to_dqkv + (joined(p, at, g) - a->qkv));
      }
    }
  }
  for (long s = 0; s < t; s++) {
    const float *cos = table(a, a->cos, p->row, s), *sin = table(a, a->sin, p->row, s);
    float scale = a->rstd[p->row * t + s];
    turned(p->dk + s * h, cos, sin, h, scale, -1,
           a->to_dqkv + (joined(p, s, group) - a->qkv));
    turned(p->dv + s * h, cos, sin, h, scale, 0,
           a->to_dqkv + (joined(p, s, group + 1) - a->qkv));
  }
  return 0;
}

static int has_shape(const XLA_FFI_Buffer *x, long rank, long a, long b, long c, long d) {
  long shape[] = {a, b, c, d};
  if (!is_float(x, rank)) return 0;
  for (long i = 0; i < rank; i++)
    if (x->dims[i] != shape[i]) return 0;
  return 1;
}

/* qkv (B, T, J), rstd (B, T), cos and sin (1 or B, T, R) give out (B, T, N, H) and
   stats (2, B, N, T). Back, those two and dout (B, T, N, H) come after, and dqkv
   (B, T, J) is given: the gradient of qkv, where rstd counts as constant. */
static XLA_FFI_Error *attend(XLA_FFI_CallFrame *frame, int back) {
  if (only_asks(frame)) return NULL;
  const XLA_FFI_Api *api = frame->api;
  XLA_FFI_Buffer **args = (XLA_FFI_Buffer **)frame->args.args;
  XLA_FFI_Buffer **rets = (XLA_FFI_Buffer **)frame->rets.rets;
  if (frame->args.size != (back ? 7 : 4) || frame->rets.size != (back ? 1 : 2))
    return fail(api, "attention was given too many arrays, or too few");
  XLA_FFI_Buffer *qkv = args[0], *cos = args[2], *out = back ? args[4] : rets[0];
  XLA_FFI_Buffer *stats = back ? args[5] : rets[1];
  if (!is_float(qkv, 3) || !is_float(out, 4) || !is_float(cos, 3))
    return fail(api, "attention takes float32 arrays");
  long b = qkv->dims[0], t = qkv->dims[1], j = qkv->dims[2];
  long n = out->dims[2], h = out->dims[3], tables = cos->dims[0];
  long k = h ? (j / h - n) / 2 : 0;
  if (b < 1 || t < 1 || k < 1 || n < 1 || n % k || h % 2 || (n + 2 * k) * h != j ||
      (tables != 1 && tables != b) || !has_shape(args[1], 2, b, t, 0, 0) ||
      !has_shape(cos, 3, tables, t, h / 2, 0) ||
      !has_shape(args[3], 3, tables, t, h / 2, 0) || !has_shape(out, 4, b, t, n, h) ||
      !has_shape(stats, 4, 2, b, n, t) ||
      (back && (!has_shape(args[6], 4, b, t, n, h) || !has_shape(rets[0], 3, b, t, j, 0))))
    return fail(api, "attention's arrays do not fit together");
  Attention *a = calloc(1, sizeof *a);
  if (!a) return fail(api, "attention found no memory");
  *a = (Attention){.b = b, .t = t, .n = n, .k = k, .h = h, .j = j, .tables = tables,
                   .qkv = qkv->data, .rstd = args[1]->data, .cos = cos->data,
                   .sin = args[3]->data, .out = out->data, .stats = stats->data,
                   .dout = back ? args[6]->data : NULL, .to_out = out->data,
                   .to_stats = stats->data, .to_dqkv = back ? rets[0]->data : NULL};
  return run(frame, b * k, back ? backward : forward, a);
}

XLA_FFI_Error *attention_forward(XLA_FFI_CallFrame *frame) { return attend(frame, 0); }
XLA_FFI_Error *attention_backward(XLA_FFI_CallFrame *frame) { return attend(frame, 1); }
