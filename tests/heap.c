// Counts what is on the heap: a library to be loaded before all others (test_heap.py).
//
// Every allocation and release of the C library goes through here, whoever makes it.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <malloc.h>
#include <stdatomic.h>
#include <stddef.h>
#include <string.h>

static _Atomic long long held, most;
static void *(*next_malloc)(size_t), *(*next_realloc)(void *, size_t),
    *(*next_aligned)(size_t, size_t);
static void (*next_free)(void *);
// Before they are found, dlsym and others may allocate: here, aligned for anything.
static char early[1 << 20] __attribute__((aligned(4096)));
static _Atomic size_t early_used;

__attribute__((constructor(101))) static void find(void) {
  next_realloc = dlsym(RTLD_NEXT, "realloc");
  next_aligned = dlsym(RTLD_NEXT, "aligned_alloc");
  next_free = dlsym(RTLD_NEXT, "free");
  next_malloc = dlsym(RTLD_NEXT, "malloc");
}
static int is_early(void *p) { return (char *)p >= early && (char *)p < early + sizeof early; }
static void *from_early(size_t size) {
  const size_t at = atomic_fetch_add(&early_used, (size + 63) / 64 * 64);
  return at + size > sizeof early ? NULL : early + at;
}
static void *took(void *p) {
  if (p == NULL) return p;
  const long long now = atomic_fetch_add(&held, malloc_usable_size(p)) + malloc_usable_size(p);
  long long seen = atomic_load(&most);
  while (now > seen && !atomic_compare_exchange_weak(&most, &seen, now)) {
  }
  return p;
}
static void gave(void *p) { atomic_fetch_sub(&held, malloc_usable_size(p)); }

void *malloc(size_t size) {
  if (next_malloc == NULL) return from_early(size);
  return took(next_malloc(size));
}
void *calloc(size_t count, size_t size) {
  if (size != 0 && count > (size_t)-1 / size) return NULL;
  void *p = malloc(count * size);
  return p == NULL ? p : memset(p, 0, count * size);
}
void *realloc(void *p, size_t size) {
  if (p == NULL || is_early(p)) {
    void *made = malloc(size);
    if (p != NULL && made != NULL) {
      const size_t there = (size_t)(early + sizeof early - (char *)p);
      memcpy(made, p, size < there ? size : there);
    }
    return made;
  }
  gave(p);
  void *made = next_realloc(p, size);
  if (made == NULL && size != 0) {
    took(p);
    return NULL;
  }
  return took(made);
}
void free(void *p) {
  if (p == NULL || is_early(p)) return;
  gave(p);
  next_free(p);
}
void *aligned_alloc(size_t alignment, size_t size) {
  if (next_malloc == NULL) return from_early(size);
  return took(next_aligned(alignment, size));
}
void *memalign(size_t alignment, size_t size) { return aligned_alloc(alignment, size); }
int posix_memalign(void **to, size_t alignment, size_t size) {
  *to = aligned_alloc(alignment, size);
  return *to == NULL ? ENOMEM : 0;
}

long long heap_held(void) { return atomic_load(&held); }
// The most since the last call of this, which begins anew.
long long heap_peak(void) { return atomic_exchange(&most, atomic_load(&held)); }
