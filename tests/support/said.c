/* See said.h.  Any thread may log. */
#include "said.h"
#include <pthread.h>
#include <stdio.h>
#include <string.h>

static char kept[4096];
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static void keep(void *ctx, int32_t level, const char *message) {
  (void)ctx;
  (void)level;
  pthread_mutex_lock(&lock);
  const size_t used = strlen(kept);
  snprintf(kept + used, sizeof kept - used, "%s\n", message);
  pthread_mutex_unlock(&lock);
}

void said_keep(phx_host *host) {
  kept[0] = 0;
  host->log = keep;
}

const char *said(void) {
  return kept;
}

double said_ms(const char *kind, long long *calls) {
  char line[64];
  double ms = -1;
  snprintf(line, sizeof line, "profile: %s: ", kind);
  const char *at = strstr(kept, line);
  *calls = 0;
  if (at && sscanf(at + strlen(line), "%lf ms in %lld calls", &ms, calls) == 2) return ms;
  *calls = 0;
  return -1;
}
