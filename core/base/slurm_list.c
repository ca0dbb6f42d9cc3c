/* core/base/slurm_list.c - see slurm_list.h.
 *
 * The text is the environment's, so anything: what does not follow the grammar to its end is refused, since a guess
 * would be a wrong machine or a wrong number of ranks. */
#include "base/slurm_list.h"

#include <string.h>

static bool is_digit(char c) { return c >= '0' && c <= '9'; }

/* Moves over "07-09,12]" and adds its first number. */
static const char *bracket(const char *in, char *out, size_t bytes, size_t *used) {
  const size_t digits = strspn(in, "0123456789");
  const size_t all = strspn(in, "0123456789-,");
  if (digits == 0 || in[all] != ']' || !is_digit(in[all - 1]) || *used + digits >= bytes) return NULL;
  memcpy(out + *used, in, digits);
  *used += digits;
  return in + all + 1;
}

bool phx__slurm_first_host(const char *list, char *out, size_t bytes) {
  size_t used = 0;
  while (*list && *list != ',') {
    if (*list == '[') {
      list = bracket(list + 1, out, bytes, &used);
      if (!list) return false;
      continue;
    }
    if ((unsigned char)*list <= ' ' || *list == ']' || used + 1 >= bytes) return false;
    out[used++] = *list++;
  }
  if (used < bytes) out[used] = 0;
  return used > 0;
}

/* A number without a sign, up to a billion; -1: there is none. */
static int32_t number(const char **at) {
  int32_t value = 0;
  if (!is_digit(**at)) return -1;
  for (; is_digit(**at); (*at)++) {
    if (value > 100000000) return -1;
    value = value * 10 + (**at - '0');
  }
  return value;
}

int32_t phx__slurm_tasks(const char *list, int32_t node, int32_t most) {
  while (node >= 0) {
    const int32_t tasks = number(&list);
    int32_t times = 1;
    if (tasks < 0) return 0;
    if (list[0] == '(' && list[1] == 'x') {
      list += 2;
      times = number(&list);
      if (times < 1 || *list++ != ')') return 0;
    }
    if (*list && *list != ',') return 0;
    if (node < times) return tasks <= most ? tasks : 0;
    node -= times;
    if (*list++ != ',') return 0;
  }
  return 0;
}
