/* Every public header compiles alone, as C11 and as C++17, with every compiler that is here; so do the macros of
 * phalanx/error.h, in a program that links nothing of phalanx. */
#include <criterion/criterion.h>
#include <glob.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

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
  cr_assert_geq(headers.gl_pathc, 12);
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

/* The program's exit status is 0 when the idiom does what error.h says; `fail` is the call that fills the error. */
static int run_idiom(const char *compiler, const char *flags, const char *fail) {
  char path[] = "/tmp/phx_idiom_XXXXXX", command[3000];
  const int fd = mkstemp(path);
  cr_assert_geq(fd, 0);
  close(fd);
  snprintf(command, sizeof command,
           "printf '%%s\\n' '#include <phalanx/error.h>' 'static phx_status f(int n, phx_error *err) {' '%s'"
           " 'return PHX_OK; }' 'static phx_status g(int n, phx_error *err) { PHX_TRY(f(n, err)); return PHX_OK; }'"
           " 'static phx_status h(int n, int *cleaned, phx_error *err) { phx_status status = PHX_OK;'"
           " 'PHX_TRY_GOTO(g(n, err), status, done);' 'done:' '*cleaned = 1; return status; }' 'int main(void) {'"
           " 'phx_error err = PHX_ERROR_INIT; int cleaned = 0;'"
           " 'return h(3, &cleaned, &err) != PHX_INVALID || !cleaned || strcmp(err.message, \"n is 3\") != 0; }' |"
           " %s %s -Wall -Wextra -Wpedantic -Wshadow -Werror -I %s/sdk/include -o %s - && %s",
           fail, compiler, flags, PHX_TEST_SOURCE, path, path);
  const int status = run(command);
  unlink(path);
  return status;
}

static void check_idiom(const char *compiler, const char *flags) {
  if (!present(compiler)) cr_skip("%s is not installed", compiler);
  cr_expect_eq(run_idiom(compiler, flags, "if (n > 2) return phx_fail(err, PHX_INVALID, \"n is %d\", n);"), 0);
  cr_expect_neq(run_idiom(compiler, flags, "if (n > 2) return phx_fail(err, PHX_INVALID, \"n was %d\", n);"), 0);
  cr_expect_neq(run_idiom(compiler, flags, "if (n > 2) return phx_fail(err, PHX_INVALID, \"n is %s\", n);"), 0,
                "%s takes a wrong format", compiler);
}

Test(headers, idiom_gcc_c11, .timeout = 120) { check_idiom("gcc", "-std=c11 -x c"); }
Test(headers, idiom_clang_c11, .timeout = 120) { check_idiom("clang", "-std=c11 -x c"); }
Test(headers, idiom_gcc_cxx17, .timeout = 120) { check_idiom("g++", "-std=c++17 -x c++"); }
Test(headers, idiom_clang_cxx17, .timeout = 120) { check_idiom("clang++", "-std=c++17 -x c++"); }

/* The check can fail: a header that does not exist is noticed. */
Test(headers, negative_control, .timeout = 60) {
  if (!present("gcc")) cr_skip("gcc is not installed");
  cr_assert_neq(run("echo '#include <phalanx/nothing.h>' | gcc -x c -fsyntax-only - 2>/dev/null"), 0);
}
