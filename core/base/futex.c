/* core/base/futex.c - see futex.h. */
#include "base/futex.h"

#include <limits.h>
#include <linux/futex.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

void phx__futex_wait(const uint32_t *word, uint32_t seen, uint64_t ns) {
  struct timespec t = {(time_t)(ns / UINT64_C(1000000000)), (long)(ns % UINT64_C(1000000000))};
  syscall(SYS_futex, word, FUTEX_WAIT, seen, &t, NULL, 0);
}

void phx__futex_wake(const uint32_t *word) {
  syscall(SYS_futex, word, FUTEX_WAKE, INT_MAX, NULL, NULL, 0);
}
