/* Every public header compiles alone, as C11 and as C++17, with every compiler that is here. */
#include <criterion/criterion.h>
#include <glob.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static int run(const char *command) { return system(command); }

static bool present(const char *compiler) {
  char command[200];
  snprintf(command, sizeof command, "command -v %s >/dev/null 2>&1", compiler);
  return run(command) == 0;
}

static void compile_all(const char *compiler, const char *flags) {
  glob_t headers;
  char command[2000];
  if (!present(compiler)) cr_skip("%s is not installed", compiler);
  cr_assert_eq(glob(PHX_TEST_SOURCE "/sdk/include/phalanx/*.h", 0, NULL, &headers), 0);
  cr_assert_geq(headers.gl_pathc, 11);
  for (size_t i = 0; i < headers.gl_pathc; i++) {
    snprintf(command, sizeof command,
             "echo '#include <phalanx/%s>' | %s %s -Wall -Wextra -Wpedantic -Werror -I %s/sdk/include -fsyntax-only -",
             strrchr(headers.gl_pathv[i], '/') + 1, compiler, flags, PHX_TEST_SOURCE);
    cr_expect_eq(run(command), 0, "%s", command);
  }
  globfree(&headers);
}

Test(headers, gcc_c11, .timeout = 120) { compile_all("gcc", "-std=c11 -x c -Wstrict-prototypes -Wshadow"); }
Test(headers, clang_c11, .timeout = 120) { compile_all("clang", "-std=c11 -x c -Wstrict-prototypes -Wshadow"); }
Test(headers, gcc_cxx17, .timeout = 120) { compile_all("g++", "-std=c++17 -x c++"); }
Test(headers, clang_cxx17, .timeout = 120) { compile_all("clang++", "-std=c++17 -x c++"); }

/* The check can fail: a header that does not exist is noticed. */
Test(headers, negative_control, .timeout = 60) {
  if (!present("gcc")) cr_skip("gcc is not installed");
  cr_assert_neq(run("echo '#include <phalanx/nothing.h>' | gcc -x c -fsyntax-only - 2>/dev/null"), 0);
}
