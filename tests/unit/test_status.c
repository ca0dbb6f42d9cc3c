/* Errors: message, cause, truncation. */
#include <criterion/criterion.h>
#include <errno.h>
#include <string.h>
#include "base/status.h"

Test(status, message_and_code) {
  phx_error err = PHX_ERROR_INIT;
  cr_assert_eq(phx__fail(&err, PHX_INVALID, "x = %d", 4), PHX_INVALID);
  cr_assert_str_eq(err.message, "x = 4");
  cr_assert_eq(err.code, PHX_INVALID);
  cr_assert_eq(phx__fail_errno(&err, PHX_IO, ENOSPC, "write a.bin"), PHX_IO);
  cr_assert_eq(err.cause, ENOSPC);
  cr_assert_str_eq(err.message, "write a.bin: No space left on device");
  cr_assert_eq(phx__fail(NULL, PHX_NOMEM, "nobody listens"), PHX_NOMEM);
  cr_assert_eq(phx__fail_in(&err, PHX_IO, "; in stage %d", 3), PHX_IO);
  cr_assert_str_eq(err.message, "write a.bin: No space left on device; in stage 3");
  cr_assert_eq(phx__fail_in(NULL, PHX_NOMEM, "nobody listens"), PHX_NOMEM);
}

Test(status, long_message_is_cut) {
  char text[2000];
  memset(text, 'a', sizeof text - 1);
  text[sizeof text - 1] = 0;
  phx_error err = PHX_ERROR_INIT;
  phx__fail_errno(&err, PHX_IO, EIO, "%s", text);
  cr_assert_eq(strlen(err.message), sizeof err.message - 1);
  phx__fail_in(&err, PHX_IO, "no room");
  cr_assert_eq(strlen(err.message), sizeof err.message - 1);
}
