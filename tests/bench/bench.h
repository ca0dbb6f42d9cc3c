/* tests/bench/bench.h - interleaved comparisons: A and B run in turn, in one sitting, and only their ratio is reported.
 *
 * Absolute figures drift by a fifth within an hour on a shared machine; the ratio of neighbours does not. */
#ifndef PHX__BENCH_H
#define PHX__BENCH_H
#include <stdint.h>

/* One run; returns a rate (higher is better): FLOP/s, bytes/s, or runs/s. */
typedef double bench_run(void *arg);

typedef struct bench_line {
  const char *name;  /* "attention, forward and backward" */
  const char *a, *b; /* what is compared with what, versions included */
  const char *unit;  /* of the rates: "GFLOP/s"; divisor below */
  double divisor;    /* rate / divisor is printed; 1e9 */
  double limit;      /* asked of the median ratio; 0: for information */
  /* filled by bench_compare */
  double ratio, low, high; /* rate of A / rate of B: median, least, greatest over the pairs */
  double rate_a, rate_b;   /* medians */
  int pairs;
} bench_line;

/* --json: a line of JSON instead of a table row; --pairs N (at least 7 unless --quick); --only WORD: names that
 * contain it; --threads N: of the device, and OMP_NUM_THREADS of the comparator.  Call it first: it may start the
 * program again.  Ends the program with status 2 on anything else. */
void bench_init(int argc, char **argv);
int bench_wanted(const char *name); /* by --only */
int bench_threads(void);            /* 1 unless --threads */

double bench_now(void); /* seconds, monotonic */
/* The same for work that never waits: with one thread, the processor's time that the process got, so that neighbours on
 * a shared machine count only by what they take from caches and memory. */
double bench_busy(void);
/* Runs each once to warm up, then A B, B A, A B ...  Nothing where the name is not wanted. */
void bench_compare(bench_line *line, bench_run *run_a, void *arg_a, bench_run *run_b, void *arg_b);
void bench_print(const bench_line *line); /* one row: name, A, B, rates, ratio, spread, limit, met or not */
/* A figure that is no ratio; not compared with anything. */
void bench_note(const char *name, const char *format, ...) __attribute__((format(printf, 2, 3)));
int bench_finish(void); /* exit status: 1 when a limit was missed */

/* Memory as large tables get it from the device: aligned to 256, touched, huge pages where the kernel gives them.  Ends
 * the program when there is none.  Never freed. */
void *bench_memory(int64_t bytes);
void bench_fill(float *x, int64_t n, float scale, uint64_t seed); /* uniform in -scale .. scale */
#endif
