/* How XLA calls a kernel, and lends it its threads. */

#pragma once

#include <sched.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdlib.h>

#include "xla/ffi/api/c_api.h"

static inline XLA_FFI_Error *fail(const XLA_FFI_Api *api, const char *why) {
  XLA_FFI_Error_Create_Args args = {sizeof args, NULL, why,
                                    XLA_FFI_Error_Code_INVALID_ARGUMENT};
  return api->XLA_FFI_Error_Create(&args);
}

/* Whether there is nothing to compute: XLA asks what the kernel was compiled for. */
static inline int only_asks(XLA_FFI_CallFrame *frame) {
  XLA_FFI_Extension_Base *more = frame->extension_start;
  if (more && more->type == XLA_FFI_Extension_Metadata) {
    XLA_FFI_Metadata *about = ((XLA_FFI_Metadata_Extension *)more)->metadata;
    about->api_version.major_version = XLA_FFI_API_MAJOR;
    about->api_version.minor_version = XLA_FFI_API_MINOR;
    about->traits = 0;
    return 1;
  }
  return frame->stage != XLA_FFI_ExecutionStage_EXECUTE;
}

/* Whether a buffer is of float32, with `rank` axes. */
static inline int is_float(const XLA_FFI_Buffer *buffer, long rank) {
  return buffer->dtype == XLA_FFI_DataType_F32 && buffer->rank == rank;
}

static inline void wait_for(atomic_long *done, long all) {
  for (int spins = 0; atomic_load_explicit(done, memory_order_acquire) < all; spins++) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
    if (spins > 2000) sched_yield();
  }
}

/* The thread's own memory, aligned and kept for its next part; NULL where there is none. */
static inline void *own_memory(long bytes) {
  static _Thread_local void *memory;
  static _Thread_local long size;
  if (size < bytes) {
    free(memory);
    memory = aligned_alloc(64, (bytes + 63) / 64 * 64);
    size = memory ? bytes : 0;
  }
  return memory;
}

/* Parts of a piece of work, 0 .. count - 1, which threads take one by one in order; a
   part returns 1 if it finds no memory. `data` is freed with the loop, when the last thread has let go of it. */
typedef struct {
  int (*part)(void *data, long number);
  void *data;
  long count;
  atomic_long next, done;
  atomic_int owners, failed;
} Loop;

static inline void work(Loop *loop) {
  long number;
  while ((number = atomic_fetch_add(&loop->next, 1)) < loop->count) {
    if (loop->part(loop->data, number)) atomic_store(&loop->failed, 1);
    atomic_fetch_add_explicit(&loop->done, 1, memory_order_release);
  }
}

static inline void release(Loop *loop) {
  if (atomic_fetch_sub(&loop->owners, 1) > 1) return;
  free(loop->data);
  free(loop);
}

/* Another thread's share. It may begin when all is done, and then touches nothing but
   the loop. */
static inline void help(void *loop) {
  work(loop);
  release(loop);
}

/* How many threads XLA has. */
static inline long threads_of(XLA_FFI_CallFrame *frame) {
  int64_t threads = 1;
  XLA_FFI_ThreadPool_NumThreads_Args ask = {sizeof ask, NULL, frame->ctx, &threads};
  XLA_FFI_Error *error = frame->api->XLA_FFI_ThreadPool_NumThreads(&ask);
  if (!error) return threads;
  XLA_FFI_Error_Destroy_Args args = {sizeof args, NULL, error};
  frame->api->XLA_FFI_Error_Destroy(&args);
  return 1;
}

/* Does all parts, together with those of XLA's threads that have nothing else to do;
   takes `data`, which malloc gave. Nobody waits for a thread that is busy elsewhere. */
static inline XLA_FFI_Error *run(XLA_FFI_CallFrame *frame, long count,
                                 int (*part)(void *, long), void *data) {
  const XLA_FFI_Api *api = frame->api;
  Loop *loop = data ? calloc(1, sizeof *loop) : NULL;
  if (!loop) {
    free(data);
    return fail(api, "a kernel found no memory");
  }
  loop->part = part, loop->data = data, loop->count = count;
  atomic_store(&loop->owners, 1);
  long threads = threads_of(frame);
  XLA_FFI_Error *error = NULL;
  for (long i = 1; !error && i < threads && i < count; i++) {
    XLA_FFI_ThreadPool_Schedule_Args task = {sizeof task, NULL, frame->ctx, help, loop};
    atomic_fetch_add(&loop->owners, 1);
    if ((error = api->XLA_FFI_ThreadPool_Schedule(&task))) release(loop);
  }
  if (error) { /* no threads to be had: alone, then */
    XLA_FFI_Error_Destroy_Args args = {sizeof args, NULL, error};
    api->XLA_FFI_Error_Destroy(&args);
  }
  work(loop);
  wait_for(&loop->done, count);
  int failed = atomic_load(&loop->failed);
  release(loop);
  return failed ? fail(api, "a kernel found no memory") : NULL;
}
