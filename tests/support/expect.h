/* tests/support/expect.h - what a command must have answered.  It needs Criterion. */
#ifndef TEST_EXPECT_H
#define TEST_EXPECT_H
#include "command.h"

/* Asserts the exit status, and that the text (NULL: any) is in the output; frees the result. */
void expect(command_result r, int status, const char *text);
#endif
