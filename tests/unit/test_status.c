/* <phalanx/error.h>: message, cause, truncation; what is tried is evaluated once, and a failure returns or jumps. */
#include <criterion/criterion.h>
#include <errno.h>
#include <string.h>
#include "base/status.h"

Test(status, message_and_code) {
  phx_error err = PHX_ERROR_INIT;
  cr_assert_eq(phx_fail(&err, PHX_INVALID, "x = %d", 4), PHX_INVALID);
  cr_assert_str_eq(err.message, "x = 4");
  cr_assert_eq(err.code, PHX_INVALID);
  cr_assert_eq(phx_fail_errno(&err, PHX_IO, ENOSPC, "write a.bin"), PHX_IO);
  cr_assert_eq(err.cause, ENOSPC);
  cr_assert_str_eq(err.message, "write a.bin: No space left on device");
  cr_assert_eq(phx_fail_more(&err, PHX_IO, "; in stage %d", 3), PHX_IO);
  cr_assert_str_eq(err.message, "write a.bin: No space left on device; in stage 3");
  cr_assert_eq(phx_fail(&err, PHX_COMM, "gone"), PHX_COMM);
  cr_assert_eq(err.cause, 0);
  cr_assert_str_eq(err.message, "gone");
}

Test(status, nobody_listens) {
  cr_assert_eq(phx_fail(NULL, PHX_NOMEM, "%d", 1), PHX_NOMEM);
  cr_assert_eq(phx_fail_errno(NULL, PHX_IO, EIO, "%d", 1), PHX_IO);
  cr_assert_eq(phx_fail_more(NULL, PHX_NOMEM, "%d", 1), PHX_NOMEM);
}

Test(status, long_message_is_cut) {
  char text[2000];
  memset(text, 'a', sizeof text - 1);
  text[sizeof text - 1] = 0;
  phx_error err = PHX_ERROR_INIT;
  phx_fail_errno(&err, PHX_IO, EIO, "%s", text);
  cr_assert_eq(strlen(err.message), sizeof err.message - 1);
  phx_fail_more(&err, PHX_IO, "no room");
  cr_assert_eq(strlen(err.message), sizeof err.message - 1);
}

/* A function of its own that ends in "...", as a plugin writes one. */
__attribute__((format(printf, 2, 3))) static phx_status fail_named(phx_error *err, const char *format, ...) {
  va_list args;
  phx_fail(err, PHX_DEVICE, "here: ");
  va_start(args, format);
  phx_fail_more_args(err, PHX_DEVICE, format, args);
  va_end(args);
  return PHX_DEVICE;
}

Test(status, prefix_of_a_plugin) {
  phx_error err = PHX_ERROR_INIT;
  cr_assert_eq(fail_named(&err, "%s %d", "stream", 2), PHX_DEVICE);
  cr_assert_str_eq(err.message, "here: stream 2");
  cr_assert_eq(fail_named(NULL, "%s %d", "stream", 2), PHX_DEVICE);
}

typedef struct counts {
  int calls, after, cleaned;
} counts;

static phx_status give(counts *n, phx_status status) {
  n->calls++;
  return status;
}

static phx_status try_it(counts *n, phx_status first) {
  PHX_TRY(give(n, first));
  n->after++;
  if (n->after > 1) PHX_TRY(give(n, PHX_STATE));
  else PHX_TRY(give(n, PHX_OK));
  return PHX_OK;
}

static phx_status try_and_clean(counts *n, phx_status first) {
  phx_status found = PHX_OK;
  PHX_TRY_GOTO(give(n, first), found, out);
  n->after++;
out:
  n->cleaned++;
  return found;
}

Test(status, a_failure_returns) {
  counts n = {0};
  cr_assert_eq(try_it(&n, PHX_COMM), PHX_COMM);
  cr_assert(n.calls == 1 && n.after == 0, "%d calls, %d went on", n.calls, n.after);
  cr_assert_eq(try_it(&n, PHX_OK), PHX_OK);
  cr_assert(n.calls == 3 && n.after == 1, "%d calls, %d went on", n.calls, n.after);
  cr_assert_eq(try_it(&n, PHX_OK), PHX_STATE);
}

Test(status, a_failure_cleans_up) {
  counts n = {0};
  cr_assert_eq(try_and_clean(&n, PHX_IO), PHX_IO);
  cr_assert(n.calls == 1 && n.after == 0 && n.cleaned == 1);
  cr_assert_eq(try_and_clean(&n, PHX_OK), PHX_OK);
  cr_assert(n.calls == 2 && n.after == 1 && n.cleaned == 2);
}
