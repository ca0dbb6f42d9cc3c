/* tests/support/plain/criterion/criterion.h - stands in for Criterion under the thread sanitizer, whose address space
 * has no room for Criterion's arena.  The same test files; each test in a process of its own; the exit status says
 * whether any failed, and a report of the sanitizer is a failure.  Only what the tests use. */
#ifndef PHX__PLAIN_CRITERION_H
#define PHX__PLAIN_CRITERION_H
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

typedef struct plain_options {
  void (*init)(void), (*fini)(void);
  double timeout;
  int exit_code, disabled;
  const char *description;
} plain_options;
typedef struct plain_test {
  const char *suite, *name;
  void (*run)(void);
  const plain_options *options; /* of a suite: run is NULL */
  struct plain_test *next;
} plain_test;

static plain_test *plain_tests, **plain_end = &plain_tests;
static int plain_failed; /* in the test's process */

#define PLAIN_ENTRY_(id, s, n, fn, ...)                                       \
  static const plain_options id##_options = {__VA_ARGS__};                    \
  static plain_test id##_entry = {s, n, fn, &id##_options, NULL};             \
  __attribute__((constructor)) static void id##_register(void) {              \
    *plain_end = &id##_entry;                                                 \
    plain_end = &id##_entry.next;                                             \
  }
#define TestSuite(suite, ...) PLAIN_ENTRY_(plain_suite_##suite, #suite, NULL, NULL, __VA_ARGS__)
#define Test(suite, name, ...)                                                                            \
  static void plain_##suite##_##name(void);                                                               \
  PLAIN_ENTRY_(plain_##suite##_##name, #suite, #name, plain_##suite##_##name, __VA_ARGS__)                \
  static void plain_##suite##_##name(void)

#define PLAIN_CHECK_(end, cond, text, ...)                                                \
  do {                                                                                    \
    if (!(cond)) {                                                                        \
      fprintf(stderr, "%s:%d: %s ", __FILE__, __LINE__, text);                            \
      fprintf(stderr, "" __VA_ARGS__);                                                    \
      fputc('\n', stderr);                                                                \
      plain_failed = 1;                                                                   \
      if (end) _exit(1);                                                                  \
    }                                                                                     \
  } while (0)
#define cr_assert(c, ...) PLAIN_CHECK_(1, c, #c, __VA_ARGS__)
#define cr_assert_fail(...) PLAIN_CHECK_(1, 0, "failed", __VA_ARGS__)
#define cr_assert_not(c, ...) PLAIN_CHECK_(1, !(c), "not " #c, __VA_ARGS__)
#define cr_assert_null(p, ...) PLAIN_CHECK_(1, (p) == NULL, #p " is not NULL", __VA_ARGS__)
#define cr_assert_not_null(p, ...) PLAIN_CHECK_(1, (p) != NULL, #p " is NULL", __VA_ARGS__)
#define cr_assert_eq(a, b, ...) PLAIN_CHECK_(1, (a) == (b), #a " == " #b, __VA_ARGS__)
#define cr_assert_neq(a, b, ...) PLAIN_CHECK_(1, (a) != (b), #a " != " #b, __VA_ARGS__)
#define cr_assert_lt(a, b, ...) PLAIN_CHECK_(1, (a) < (b), #a " < " #b, __VA_ARGS__)
#define cr_assert_leq(a, b, ...) PLAIN_CHECK_(1, (a) <= (b), #a " <= " #b, __VA_ARGS__)
#define cr_assert_gt(a, b, ...) PLAIN_CHECK_(1, (a) > (b), #a " > " #b, __VA_ARGS__)
#define cr_assert_geq(a, b, ...) PLAIN_CHECK_(1, (a) >= (b), #a " >= " #b, __VA_ARGS__)
#define cr_assert_str_eq(a, b, ...) PLAIN_CHECK_(1, strcmp(a, b) == 0, #a " is " #b, __VA_ARGS__)
#define cr_assert_str_empty(a, ...) PLAIN_CHECK_(1, (a)[0] == 0, #a " is empty", __VA_ARGS__)
#define cr_assert_arr_eq(a, b, n, ...) PLAIN_CHECK_(1, memcmp(a, b, n) == 0, #a " equals " #b, __VA_ARGS__)
#define cr_assert_float_eq(a, b, e, ...) PLAIN_CHECK_(1, fabs((double)((a) - (b))) <= (e), #a " near " #b, __VA_ARGS__)
#define cr_expect(c, ...) PLAIN_CHECK_(0, c, #c, __VA_ARGS__)
#define cr_expect_fail(...) PLAIN_CHECK_(0, 0, "failed", __VA_ARGS__)
#define cr_expect_not(c, ...) PLAIN_CHECK_(0, !(c), "not " #c, __VA_ARGS__)
#define cr_expect_null(p, ...) PLAIN_CHECK_(0, (p) == NULL, #p " is not NULL", __VA_ARGS__)
#define cr_expect_not_null(p, ...) PLAIN_CHECK_(0, (p) != NULL, #p " is NULL", __VA_ARGS__)
#define cr_expect_eq(a, b, ...) PLAIN_CHECK_(0, (a) == (b), #a " == " #b, __VA_ARGS__)
#define cr_expect_neq(a, b, ...) PLAIN_CHECK_(0, (a) != (b), #a " != " #b, __VA_ARGS__)
#define cr_expect_lt(a, b, ...) PLAIN_CHECK_(0, (a) < (b), #a " < " #b, __VA_ARGS__)
#define cr_expect_leq(a, b, ...) PLAIN_CHECK_(0, (a) <= (b), #a " <= " #b, __VA_ARGS__)
#define cr_expect_gt(a, b, ...) PLAIN_CHECK_(0, (a) > (b), #a " > " #b, __VA_ARGS__)
#define cr_expect_geq(a, b, ...) PLAIN_CHECK_(0, (a) >= (b), #a " >= " #b, __VA_ARGS__)
#define cr_expect_str_eq(a, b, ...) PLAIN_CHECK_(0, strcmp(a, b) == 0, #a " is " #b, __VA_ARGS__)
#define cr_expect_str_empty(a, ...) PLAIN_CHECK_(0, (a)[0] == 0, #a " is empty", __VA_ARGS__)
#define cr_expect_arr_eq(a, b, n, ...) PLAIN_CHECK_(0, memcmp(a, b, n) == 0, #a " equals " #b, __VA_ARGS__)
#define cr_expect_float_eq(a, b, e, ...) PLAIN_CHECK_(0, fabs((double)((a) - (b))) <= (e), #a " near " #b, __VA_ARGS__)
#define cr_skip_test(...)                \
  do {                                   \
    fprintf(stderr, "[SKIP] ");         \
    fprintf(stderr, "" __VA_ARGS__);     \
    fputc('\n', stderr);                 \
    _exit(0);                            \
  } while (0)
#define cr_log_info(...) ((void)0)
#define cr_log_warn(...) ((void)0)

static const plain_options *plain_suite(const char *suite) {
  static const plain_options none;
  for (const plain_test *t = plain_tests; t; t = t->next)
    if (!t->run && strcmp(t->suite, suite) == 0) return t->options;
  return &none;
}

static void plain_child(const plain_test *t, const plain_options *suite) {
  const double timeout = t->options->timeout > 0 ? t->options->timeout : suite->timeout;
  alarm(timeout > 0 ? (unsigned)ceil(timeout) * 10u : 600u); /* the sanitizer is slow */
  if (suite->init) suite->init();
  if (t->options->init) t->options->init();
  t->run();
  if (t->options->fini) t->options->fini();
  if (suite->fini) suite->fini();
  exit(plain_failed); /* the sanitizer turns it into its own status when it reported something */
}

int main(void) {
  int tests = 0, failed = 0;
  for (const plain_test *t = plain_tests; t; t = t->next) {
    const plain_options *suite = plain_suite(t->suite);
    if (!t->run || t->options->disabled || suite->disabled) continue;
    struct timespec began, ended;
    fflush(NULL);
    clock_gettime(CLOCK_MONOTONIC, &began);
    const pid_t child = fork();
    if (child == 0) plain_child(t, suite);
    int status = -1;
    const int ok = child > 0 && waitpid(child, &status, 0) == child && WIFEXITED(status) &&
                   WEXITSTATUS(status) == t->options->exit_code;
    clock_gettime(CLOCK_MONOTONIC, &ended);
    const double seconds = (double)(ended.tv_sec - began.tv_sec) + (double)(ended.tv_nsec - began.tv_nsec) * 1e-9;
    fprintf(stderr, "[TIME] %7.2f s  %s::%s\n", seconds, t->suite, t->name);
    tests++;
    failed += !ok;
    if (!ok) fprintf(stderr, "FAIL %s::%s (wait status 0x%x)\n", t->suite, t->name, (unsigned)status);
  }
  fprintf(stderr, "[====] Synthesis: Tested: %d | Passing: %d | Failing: %d\n", tests, tests - failed, failed);
  return tests == 0 || failed ? 1 : 0;
}
#endif
