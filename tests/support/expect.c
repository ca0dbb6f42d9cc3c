/* tests/support/expect.c - see expect.h. */
#include "expect.h"

#include <criterion/criterion.h>
#include <string.h>

void expect(command_result r, int status, const char *text) {
  cr_assert_eq(r.status, status, "status %d instead of %d:\n%s", r.status, status, r.out);
  cr_assert(!text || strstr(r.out, text), "no '%s' in:\n%s", text, r.out);
  command_free(&r);
}
