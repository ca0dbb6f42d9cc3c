/* What `cmake --install` leaves: a strategy is built against it by a project outside the tree, and runs; a prefix may
 * be moved, and its folder of libraries have another name.  And mpicc without MPI's headers. */
#include <criterion/criterion.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "training.h"

/* A shell's line in dir, which must succeed; what it said. */
static char *sh(const char *dir, const char *line) {
  const command_result r = command_run(dir, 120, (const char *const[]){"/bin/sh", "-c", line, NULL});
  cr_assert_eq(r.status, 0, "%s: status %d:\n%s", line, r.status, r.out);
  return r.out;
}
static void must_say(const char *dir, const char *line, const char *text) {
  char *out = sh(dir, line);
  cr_expect(strstr(out, text), "%s: not '%s', but:\n%s", line, text, out);
  free(out);
}
static void do_in(const char *dir, const char *line) { free(sh(dir, line)); }

static char *install(void) {
  char *dir = command_temp_dir();
  do_in(dir, "cmake --install " PHX_TEST_BUILD " --prefix \"$PWD/prefix\" && mkdir project plain");
  return dir;
}

static const char project[] = "cmake_minimum_required(VERSION 3.22)\n"
                              "project(mine C)\n"
                              "include(${PHALANX_PREFIX}/lib/cmake/phalanx/PhalanxPlugin.cmake)\n"
                              "add_subdirectory(below)\n" /* the function is known there, too */
                              "install(FILES CMakeLists.txt DESTINATION share/mine)\n";
static const char below[] = "phalanx_add_plugin(strategy mine SOURCES mine.c LIBS phalanx_kit)\n";

static void build_outside(const char *dir) {
  command_write_file(dir, "project/CMakeLists.txt", project, sizeof project - 1);
  do_in(dir, "mkdir project/below");
  command_write_file(dir, "project/below/CMakeLists.txt", below, sizeof below - 1);
  do_in(dir, "sed 's/\"ddp\"/\"mine\"/' " PHX_TEST_SOURCE "/plugins/ddp/ddp.c > project/below/mine.c && "
             "grep -q '\"mine\"' project/below/mine.c");
  do_in(dir, "cmake -S project -B out -G Ninja -DPHALANX_PREFIX=\"$PWD/prefix\" "
             "-DCMAKE_INSTALL_PREFIX=\"$PWD/prefix\" && ninja -C out && cmake --install out");
  do_in(dir, "! grep -qF " PHX_TEST_SOURCE " out/build.ninja"); /* nothing of the tree is used */
  do_in(dir, "test -f prefix/lib/phalanx/phx_strategy_mine.so && test -f prefix/share/mine/CMakeLists.txt");
}

static void same_weights(const char *dir, const char *one, const char *two) {
  cJSON *a = training_json(dir, one), *b = training_json(dir, two);
  cr_assert(a && b, "%s, %s", one, two);
  cr_expect_str_eq(training_get(a, "result.state_hash")->valuestring,
                   training_get(b, "result.state_hash")->valuestring);
  cJSON_Delete(a);
  cJSON_Delete(b);
}

Test(install, a_strategy_is_built_outside_the_tree_and_runs, .timeout = 240) {
  char *dir = install();
  build_outside(dir);
  training_files(dir, training_odd_model);
  do_in(dir, "prefix/bin/phalanx train run.ini -n 2 --strategy ddp --set run.steps=2 --set run.out=ddp");
  do_in(dir, "prefix/bin/phalanx train run.ini -n 2 --strategy mine --set run.steps=2 --set run.out=name");
  do_in(dir, "prefix/bin/phalanx train run.ini -n 2 --strategy ./out/lib/phalanx/phx_strategy_mine.so "
             "--set run.steps=2 --set run.out=path");
  same_weights(dir, "ddp/run.json", "name/run.json");
  same_weights(dir, "ddp/run.json", "path/run.json");
  command_remove_dir(dir);
}

Test(install, a_moved_prefix_finds_its_plugins, .timeout = 120) {
  static const char *const moves[] = {"mv prefix moved", "mv moved/lib moved/lib64",
                                      "mkdir -p moved/lib/" PHX_TEST_MULTIARCH " && "
                                      "mv moved/lib64/phalanx moved/lib/" PHX_TEST_MULTIARCH "/phalanx"};
  char *dir = install();
  for (size_t i = 0; i < sizeof moves / sizeof *moves; i++) {
    do_in(dir, moves[i]);
    must_say(dir, "moved/bin/phalanx plugins", "strategy  fsdp");
  }
  do_in(dir, "rm -r moved/lib");
  must_say(dir, "moved/bin/phalanx plugins; test $? = 2", "no plugins found beside the command");
  command_remove_dir(dir);
}

/* A compiler that is there, and the headers of which are not. */
Test(install, an_mpicc_without_headers_is_passed_over, .timeout = 120) {
  static const char lists[] = "cmake_minimum_required(VERSION 3.22)\nproject(x C)\n"
                              "add_subdirectory(" PHX_TEST_SOURCE "/tests/bench/openmpi openmpi)\n";
  char *dir = command_temp_dir();
  command_write_file(dir, "CMakeLists.txt", lists, sizeof lists - 1);
  do_in(dir, "printf '#!/bin/sh\\nexec cc -nostdinc \"$@\"\\n' >mpicc && chmod +x mpicc");
  must_say(dir, "cmake -S . -B out -G Ninja -DMPICC=\"$PWD/mpicc\" -DMPIRUN=/bin/true && ninja -C out",
           "mpicc cannot build a program of MPI");
  command_remove_dir(dir);
}
