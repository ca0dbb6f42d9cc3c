/* core/command/command_plugins.c - `phalanx plugins`: what is found, and what it says about itself.
 *
 * Loading runs a plugin's constructors, so each candidate is looked at in a child process of its own: one that crashes
 * or hangs is reported as such and does not take the lister down.  The child writes one fixed record into a pipe; its
 * output goes to /dev/null.  No child outlives the command.  [main], single-threaded. */
#include "base/complain.h"
#include "base/status.h"
#include "base/sys.h"
#include "command/commands.h"
#include "config/config.h"
#include "plugin/config_load.h"
#include "plugin/descriptor.h"
#include "plugin/loader.h"
#include "plugin/loader_search.h"
#include "plugin/suspect.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { TIME_LIMIT_MS = 10000 };

typedef struct record { /* from the child */
  uint32_t abi_major, abi_minor;
  char version[64], summary[256], trouble[496]; /* trouble: why it cannot be loaded, or cannot run here */
  char sha256[65];
  bool loaded, available;
} record;

static void look(const phx__found *found, record *out) {
  phx_error err = PHX_ERROR_INIT;
  const phx__plugin *plugin;
  out->loaded = phx__loader_open_file(found->kind, found->path, found->name, &plugin, &err) == PHX_OK &&
                phx__loader_identify(plugin, &err) == PHX_OK;
  if (out->loaded) {
    const phx_plugin *d = plugin->descriptor;
    out->abi_major = d->table_major;
    out->abi_minor = d->table_minor;
    snprintf(out->version, sizeof out->version, "%s", d->version);
    snprintf(out->summary, sizeof out->summary, "%s", d->summary);
    snprintf(out->sha256, sizeof out->sha256, "%s", plugin->sha256);
    out->available = phx__descriptor_probe(d, &err) == PHX_OK;
  }
  snprintf(out->trouble, sizeof out->trouble, "%s", err.message);
}

static void child(const phx__found *found, int out, pid_t parent) {
  record result = {0};
  const struct rlimit no_core = {0, 0};
  setrlimit(RLIMIT_CORE, &no_core);
  prctl(PR_SET_PDEATHSIG, SIGKILL);
  if (getppid() != parent) _exit(1); /* the parent died before it could be watched */
  int nothing = open("/dev/null", O_RDWR);
  if (nothing < 0 || dup2(nothing, 0) < 0 || dup2(nothing, 1) < 0 || dup2(nothing, 2) < 0) _exit(1);
  phx__suspect_off(); /* the parent says how this process ended */
  look(found, &result);
  _exit(write(out, &result, sizeof result) == (ssize_t)sizeof result ? 0 : 1); /* below PIPE_BUF: whole or not */
}

static long now_ms(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec * 1000L + t.tv_nsec / 1000000L;
}

/* true: the child's record came within the time limit.  On false *late tells a hang from an end without a word. */
static bool receive(int from, record *out, bool *late) {
  long deadline = now_ms() + TIME_LIMIT_MS;
  struct pollfd wait_for = {.fd = from, .events = POLLIN};
  for (;;) {
    long left = deadline - now_ms();
    int ready = poll(&wait_for, 1, left > 0 ? (int)left : 0);
    if (ready < 0 && errno == EINTR) continue;
    *late = ready == 0;
    if (ready <= 0) return false;
    ssize_t got = read(from, out, sizeof *out);
    if (got < 0 && errno == EINTR) continue;
    return got == (ssize_t)sizeof *out;
  }
}

static void say_how_it_ended(int state, bool late, record *out) {
  if (late)
    snprintf(out->trouble, sizeof out->trouble, "hangs: no answer within %d s", TIME_LIMIT_MS / 1000);
  else if (WIFSIGNALED(state))
    snprintf(out->trouble, sizeof out->trouble, "crashes when it is loaded: signal %d (%s)", WTERMSIG(state),
             strsignal(WTERMSIG(state)));
  else
    snprintf(out->trouble, sizeof out->trouble, "ends the process when it is loaded: exit status %d",
             WEXITSTATUS(state));
}

static void look_in_child(const phx__found *found, record *out) {
  int ends[2], state = 0;
  bool late = false;
  *out = (record){0};
  if (pipe2(ends, O_CLOEXEC) != 0) {
    snprintf(out->trouble, sizeof out->trouble, "cannot be looked at: %s", strerror(errno));
    return;
  }
  fflush(NULL);
  pid_t parent = getpid(), pid = fork();
  if (pid == 0) child(found, ends[1], parent);
  close(ends[1]);
  if (pid < 0) {
    snprintf(out->trouble, sizeof out->trouble, "cannot be looked at: %s", strerror(errno));
    close(ends[0]);
    return;
  }
  bool answered = receive(ends[0], out, &late);
  close(ends[0]);
  if (answered || late) kill(pid, SIGKILL); /* a thread of the plugin may still run */
  while (waitpid(pid, &state, 0) < 0 && errno == EINTR) {
  }
  if (!answered) {
    *out = (record){0};
    say_how_it_ended(state, late, out);
  }
}

static void print_found(const phx__found *found) {
  record r;
  look_in_child(found, &r);
  printf("%-8s  %-12s  ", phx__kind_name(found->kind), found->name);
  if (r.loaded)
    printf("%s  ABI %u.%u  %s%s\n", r.version, (unsigned)r.abi_major, (unsigned)r.abi_minor,
           r.available ? "available" : "not available here: ", r.available ? "" : r.trouble);
  else
    printf("broken: %s\n", r.trouble);
  printf("          %s%s\n", found->path, found->shadowed ? "  (shadowed: an earlier directory has it too)" : "");
  if (r.loaded) printf("          %s\n          sha256 %s\n", r.summary, r.sha256);
}

int phx__command_plugins(int argc, char **argv) {
  phx_error err = PHX_ERROR_INIT;
  phx__found *found;
  size_t n;
  char *search = NULL;
  if (argc > 2 || (argc == 2 && argv[1][0] == '-')) {
    fprintf(stderr, "phalanx: plugins takes a FILE.ini at most, whose [plugins] path is searched ('%s'); "
            "PHALANX_PLUGIN_PATH adds directories, too\n", argv[argc - 1]);
    return PHX__EXIT_REFUSED;
  }
  phx_status status = argc == 2 ? phx__config_plugin_path(argv[1], &search, &err) : PHX_OK;
  if (status == PHX_OK) status = phx__loader_list(search, &found, &n, &err);
  phx__free(search);
  if (status != PHX_OK) {
    phx__complain("%s", err.message);
    return PHX__EXIT_REFUSED;
  }
  for (size_t i = 0; i < n; i++) print_found(&found[i]);
  phx__free(found);
  if (n > 0) return PHX__EXIT_OK;
  phx__complain("no plugins found beside the command (../lib/phalanx, ../lib64/phalanx) nor in %s: set "
          "PHALANX_PLUGIN_PATH to the directory where they are", PHX__PLUGIN_DIR);
  return PHX__EXIT_REFUSED;
}
