/* A disk that is full from some write on, for a library that is loaded before all others (LD_PRELOAD).
 *
 * FULL_DISK is a folder, FULL_DISK_FROM a number: the N-th write to a file below the folder, and each one after it,
 * fails with ENOSPC. What is synchronised to the disk counts as a write too: some file systems tell it only then. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

static long reached;

static int is_full(int descriptor) {
  const char *folder = getenv("FULL_DISK"), *from = getenv("FULL_DISK_FROM");
  if (folder == NULL || from == NULL || descriptor < 0) return 0;
  char link[64], path[4096];
  snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
  const ssize_t length = readlink(link, path, sizeof path - 1);
  if (length < 0) return 0;
  path[length] = '\0';
  if (strncmp(path, folder, strlen(folder)) != 0) return 0;
  if (__atomic_add_fetch(&reached, 1, __ATOMIC_RELAXED) < atol(from)) return 0;
  errno = ENOSPC;
  return 1;
}

#define FAILING(type, name, parameters, arguments)                                                                    \
  type name parameters {                                                                                              \
    static type(*next) parameters;                                                                                    \
    if (next == NULL) next = (type(*) parameters)dlsym(RTLD_NEXT, #name);                                             \
    return is_full(descriptor) ? -1 : next arguments;                                                                 \
  }

FAILING(ssize_t, write, (int descriptor, const void *data, size_t size), (descriptor, data, size))
FAILING(ssize_t, pwrite, (int descriptor, const void *data, size_t size, off_t at), (descriptor, data, size, at))
FAILING(ssize_t, pwrite64, (int descriptor, const void *data, size_t size, off64_t at), (descriptor, data, size, at))
FAILING(ssize_t, writev, (int descriptor, const struct iovec *parts, int count), (descriptor, parts, count))
FAILING(ssize_t, sendfile, (int descriptor, int from, off_t *at, size_t size), (descriptor, from, at, size))
FAILING(ssize_t, sendfile64, (int descriptor, int from, off64_t *at, size_t size), (descriptor, from, at, size))
FAILING(int, fsync, (int descriptor), (descriptor))
FAILING(int, fdatasync, (int descriptor), (descriptor))

ssize_t copy_file_range(int from, off64_t *from_at, int descriptor, off64_t *at, size_t size, unsigned flags) {
  static ssize_t (*next)(int, off64_t *, int, off64_t *, size_t, unsigned);
  if (next == NULL) *(void **)&next = dlsym(RTLD_NEXT, "copy_file_range");
  return is_full(descriptor) ? -1 : next(from, from_at, descriptor, at, size, flags);
}
