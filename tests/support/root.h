/* tests/support/root.h - where the build is whose command and plugins are tested.
 *
 * PHX_TEST_ROOT in the environment, else the build directory that was compiled in: a folder made by `./dev bundle` has
 * the build's layout and lies anywhere. */
#ifndef PHX__TEST_ROOT_H
#define PHX__TEST_ROOT_H
const char *test_root(void);
/* ROOT/relative ("bin/phalanx"), in one of eight static buffers. */
const char *test_path(const char *relative);
#endif
