/* tests/bench/bench.c - see bench.h.  One thread; knows nothing of what it measures. */
#include "bench.h"
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

enum { LEAST_PAIRS = 7, MOST_PAIRS = 999 };
static struct {
  int json, pairs, threads, quick, missed, header;
  const char *only;
} options = {.pairs = LEAST_PAIRS, .threads = 1};

static int number(const char *text, int least, int most) {
  char *end = NULL;
  const long x = text ? strtol(text, &end, 10) : 0;
  if (!text || *end || end == text || x < least || x > most) {
    fprintf(stderr, "expected a number from %d to %d, got '%s'\n", least, most, text ? text : "nothing");
    exit(2);
  }
  return (int)x;
}

void bench_init(int argc, char **argv) {
  int pairs = 0;
  for (int i = 1; i < argc; i++) {
    if (!strcmp(argv[i], "--json"))
      options.json = 1;
    else if (!strcmp(argv[i], "--quick"))
      options.quick = 1;
    else if (!strcmp(argv[i], "--pairs"))
      pairs = number(argv[++i], 1, MOST_PAIRS);
    else if (!strcmp(argv[i], "--threads"))
      options.threads = number(argv[++i], 1, 1024);
    else if (!strcmp(argv[i], "--only") && i + 1 < argc)
      options.only = argv[++i];
    else {
      fprintf(stderr, "usage: %s [--json] [--pairs N] [--quick] [--threads N] [--only WORD]\n", argv[0]);
      exit(2);
    }
  }
  if (pairs && pairs < LEAST_PAIRS && !options.quick) {
    fprintf(stderr, "%d pairs say little: at least %d, or --quick\n", pairs, LEAST_PAIRS);
    exit(2);
  }
  /* OpenMP reads its number of threads when it is loaded: start again with the one that the comparator is to have. */
  char wanted[16];
  snprintf(wanted, sizeof wanted, "%d", options.threads);
  const char *given = getenv("OMP_NUM_THREADS");
  if (!given || strcmp(given, wanted)) {
    setenv("OMP_NUM_THREADS", wanted, 1);
    execv("/proc/self/exe", argv);
  }
  options.pairs = pairs ? pairs : options.quick ? 3 : LEAST_PAIRS;
}

int bench_wanted(const char *name) {
  return !options.only || strstr(name, options.only) || strstr(options.only, name);
}
int bench_threads(void) {
  return options.threads;
}

double bench_now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

double bench_busy(void) {
  struct timespec t;
  if (options.threads > 1) return bench_now();
  clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
  return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static int by_value(const void *x, const void *y) {
  const double a = *(const double *)x, b = *(const double *)y;
  return (a > b) - (a < b);
}

static double median(double *x, int n) {
  qsort(x, (size_t)n, sizeof *x, by_value);
  return n % 2 ? x[n / 2] : 0.5 * (x[n / 2 - 1] + x[n / 2]);
}

void bench_compare(bench_line *line, bench_run *run_a, void *arg_a, bench_run *run_b, void *arg_b) {
  double a[MOST_PAIRS], b[MOST_PAIRS], ratio[MOST_PAIRS];
  line->pairs = 0;
  if (!bench_wanted(line->name)) return;
  run_a(arg_a);
  run_b(arg_b);
  for (int i = 0; i < options.pairs; i++) {
    if (i % 2) b[i] = run_b(arg_b);
    a[i] = run_a(arg_a);
    if (i % 2 == 0) b[i] = run_b(arg_b);
    ratio[i] = a[i] / b[i];
  }
  line->pairs = options.pairs;
  line->rate_a = median(a, options.pairs);
  line->rate_b = median(b, options.pairs);
  line->ratio = median(ratio, options.pairs); /* sorts */
  line->low = ratio[0];
  line->high = ratio[options.pairs - 1];
}

void bench_print(const bench_line *line) {
  if (!line->pairs) return;
  const int met = line->ratio >= line->limit;
  const char *verdict = line->limit <= 0 ? "for information" : met ? "met" : "NOT MET";
  const double by = line->divisor > 0 ? line->divisor : 1.0;
  if (line->limit > 0 && !met) options.missed = 1;
  if (options.json) {
    printf(
        "{\"name\": \"%s\", \"a\": \"%s\", \"b\": \"%s\", \"unit\": \"%s\", \"rate_a\": %.6g, \"rate_b\": %.6g, "
        "\"ratio\": %.4f, \"low\": %.4f, \"high\": %.4f, \"pairs\": %d, \"limit\": %g, \"verdict\": \"%s\"}\n",
        line->name, line->a, line->b, line->unit, line->rate_a / by, line->rate_b / by, line->ratio, line->low,
        line->high, line->pairs, line->limit, verdict);
  } else {
    if (!options.header++)
      printf("| what | A | B | A, B | A / B (least .. greatest) | asked | |\n|---|---|---|---|---|---|---|\n");
    printf("| %s | %s | %s | %.4g, %.4g %s | **%.3f** (%.3f .. %.3f, %d pairs) | ", line->name, line->a, line->b,
           line->rate_a / by, line->rate_b / by, line->unit, line->ratio, line->low, line->high, line->pairs);
    if (line->limit > 0) printf("%.2f", line->limit);
    printf(" | %s |\n", verdict);
  }
  fflush(stdout);
}

void bench_note(const char *name, const char *format, ...) {
  char text[1024];
  va_list args;
  if (!bench_wanted(name)) return;
  va_start(args, format);
  vsnprintf(text, sizeof text, format, args);
  va_end(args);
  printf(options.json ? "{\"name\": \"%s\", \"note\": \"%s\"}\n" : "%s: %s\n", name, text);
  fflush(stdout);
}

int bench_finish(void) {
  return options.missed;
}

void *bench_memory(int64_t bytes) {
  const size_t huge = (size_t)2 << 20, length = ((size_t)bytes + huge - 1) / huge * huge;
  char *p = mmap(NULL, length + huge, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (p == MAP_FAILED) {
    fprintf(stderr, "no memory for %lld bytes\n", (long long)bytes);
    exit(3);
  }
  p += (huge - (uintptr_t)p % huge) % huge;
  madvise(p, length, MADV_HUGEPAGE); /* where it is refused, 4 KiB pages do */
  memset(p, 0, length);
  return p;
}

void bench_fill(float *x, int64_t n, float scale, uint64_t seed) {
  for (int64_t i = 0; i < n; i++) {
    uint64_t z = seed + (uint64_t)i * 0x9e3779b97f4a7c15u; /* splitmix64 */
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    x[i] = scale * ((float)((z ^ z >> 31) >> 40) * 0x1p-23f - 1.0f);
  }
}
