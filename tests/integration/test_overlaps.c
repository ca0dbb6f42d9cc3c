/* Two runs, one directory: random overlaps of train, resume, import, and of what only
 * reads: sample, export, verify, ls.
 *
 * In each overlap one run begins, and one to three other commands within its life, all on the same run.out; some are
 * killed, or asked to stop.  Whoever is refused says why.  Afterwards every directory with a checkpoint's name is
 * whole, and every checkpoint that was seen while they ran, and that retention keeps, is still in the run that made it,
 * which a later one may have moved aside.  Nobody ever says that something is damaged.
 * PHX_TEST_OVERLAPS, PHX_TEST_SEED: more of them, others (`./dev soak`). */
#include <criterion/criterion.h>
#include <dirent.h>
#include <fcntl.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "expect.h"
#include "root.h"
#include "base/status.h"
#include "training.h"

enum { JOBS = 4, GROUP = 3 /* overlaps on one directory, before it is removed */, STEPS_MOST = 512, RUNS = 64,
       PATIENCE_S = 90 };
enum kind {
  TRAIN, RESUME, IF_ANY, WRITERS, IMPORT = WRITERS, SAMPLE, EXPORT, VERIFY, LS, VERIFY_ONE, SAMPLE_ONE, KINDS
};
static const char *const names[KINDS] = {"train",  "resume", "resume if-any", "import",     "sample",
                                         "export", "verify", "ls",            "verify one", "sample one"};

typedef struct job {
  enum kind kind;
  char line[320], said[32];
  double start, strike; /* seconds; strike 0: never */
  int signal, steps, struck, ended, status;
  pid_t pid;
} job;

typedef struct seen { /* of one run, which is known by the inode of its directory of checkpoints */
  ino_t ino;
  int newest;
  unsigned char step[STEPS_MOST];
} seen;

static struct {
  char *dir;
  int keep, every, steps; /* of the group */
  seen runs[RUNS];
  int n_runs;
  ino_t whole[4096];
  int n_whole;
} group;
static unsigned seed;
static int statuses[KINDS][256], verified;

static double now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}
static int below(int n) { return (int)((unsigned)rand_r(&seed) % (unsigned)n); }
static double random_part(void) { return rand_r(&seed) / (RAND_MAX + 1.0); }

static const char tiny[] = "[batch]\nmicro = 1\nsequence = 9\n"
                           "[model]\nplugin = gpt\nlayers = 1\nheads = 2\nwidth = 18\ncontext = 9\nvocab = 257\n";

/* ---- processes ---- */
static pid_t begin(const char *said, const char *text) {
  char line[320];
  static char command[] = "phalanx";
  char *argv[64] = {command};
  int n = 1;
  snprintf(line, sizeof line, "%s", text);
  for (char *word = strtok(line, " "); word; word = strtok(NULL, " ")) argv[n++] = word;
  const pid_t pid = fork();
  if (pid) return pid;
  setpgid(0, 0);
  prctl(PR_SET_PDEATHSIG, SIGKILL);
  if (chdir(group.dir)) _exit(126);
  const int out = open(said, O_WRONLY | O_CREAT | O_TRUNC, 0644);
  dup2(out, 1);
  dup2(out, 2);
  execv(test_path("bin/phalanx"), argv);
  _exit(127);
}

static int code_of(int status) { return WIFSIGNALED(status) ? 128 + WTERMSIG(status) : WEXITSTATUS(status); }

/* ---- what is there ---- */
static ino_t inode_of(const char *name) {
  char path[1024];
  struct stat st;
  snprintf(path, sizeof path, "%s/%s", group.dir, name);
  return stat(path, &st) ? 0 : st.st_ino;
}

static int step_of(const char *name) {
  int step, length = 0;
  return sscanf(name, "step-%8d%n", &step, &length) == 1 && !name[length] && step < STEPS_MOST ? step : -1;
}

/* The steps of one run; returns the newest, or -1. */
static int steps_in(const char *checkpoints, unsigned char step[STEPS_MOST]) {
  char path[1024];
  int newest = -1;
  snprintf(path, sizeof path, "%s/%s", group.dir, checkpoints);
  DIR *d = opendir(path);
  for (struct dirent *e; d && (e = readdir(d));) {
    const int s = step_of(e->d_name);
    if (s >= 0) step[s] = 1;
    if (s > newest) newest = s;
  }
  if (d) closedir(d);
  return newest;
}

/* Which run's checkpoints they are is asked before and after: it may be moved aside meanwhile. */
static void look(void) {
  unsigned char step[STEPS_MOST] = {0};
  const ino_t ino = inode_of("out/checkpoints");
  const int newest = ino ? steps_in("out/checkpoints", step) : -1;
  int i = 0;
  if (newest < 0 || inode_of("out/checkpoints") != ino) return;
  while (i < group.n_runs && group.runs[i].ino != ino) i++;
  cr_assert_lt(i, RUNS);
  seen *run = &group.runs[i];
  if (i == group.n_runs) *run = (seen){.ino = ino, .newest = -1};
  if (i == group.n_runs) group.n_runs++;
  if (newest > run->newest) run->newest = newest;
  for (int s = 0; s < STEPS_MOST; s++) run->step[s] |= step[s];
}

static void verify_one(const char *path, ino_t ino) {
  for (int i = 0; i < group.n_whole; i++)
    if (group.whole[i] == ino) return;
  command_result r = RUN(group.dir, PATIENCE_S, "checkpoint", "verify", path);
  cr_assert_eq(r.status, 0, "%s is not whole: status %d: %s", path, r.status, r.out);
  cr_assert(strstr(r.out, ": whole: "), "%s", r.out);
  command_free(&r);
  cr_assert_lt(group.n_whole, (int)(sizeof group.whole / sizeof *group.whole));
  group.whole[group.n_whole++] = ino;
  verified++;
}

static void check_latest(const char *run, const unsigned char step[STEPS_MOST], int newest) {
  char name[320];
  snprintf(name, sizeof name, "%s/checkpoints/latest", run);
  char *latest = command_read_file(group.dir, name);
  cr_assert(latest, "%s is not there, and step %d is", name, newest);
  latest[strcspn(latest, "\n")] = 0;
  const int named = step_of(latest); /* a kill may come between the name and the pointer: then it is the one before */
  cr_assert(named >= 0 && step[named], "%s names '%s', which is not there; %d is the newest", name, latest, newest);
  free(latest);
}

/* Every run in the directory, moved aside or not: its checkpoints are whole, and none is lost. */
static void check_run(const char *run, int *found) {
  char path[600];
  unsigned char step[STEPS_MOST] = {0};
  snprintf(path, sizeof path, "%s/checkpoints", run);
  const ino_t ino = inode_of(path);
  const int newest = steps_in(path, step);
  for (int s = 0; s <= newest; s++) {
    if (!step[s]) continue;
    snprintf(path, sizeof path, "%s/checkpoints/step-%08d", run, s);
    verify_one(path, inode_of(path));
  }
  if (newest >= 0) check_latest(run, step, newest);
  for (int i = 0; i < group.n_runs; i++) {
    const seen *was = &group.runs[i];
    if (was->ino != ino) continue;
    ++*found;
    cr_assert_geq(newest, was->newest, "%s: step %d was committed, and is lost", run, was->newest);
    for (int s = 0; s < STEPS_MOST; s++)
      cr_assert(group.keep || !was->step[s] || step[s], "%s: step %d was committed, is to be kept, and is lost", run,
                s);
  }
}

static void check_all(void) {
  int found = 0;
  DIR *d = opendir(group.dir);
  cr_assert(d);
  for (struct dirent *e; (e = readdir(d));)
    if (!strcmp(e->d_name, "out") || !strncmp(e->d_name, "out.", 4)) check_run(e->d_name, &found);
  closedir(d);
  cr_assert_eq(found, group.n_runs, "of %d runs that had checkpoints %d are left", group.n_runs, found);
}

/* ---- one overlap ---- */
static void choose_line(job *j, int number) {
  char one[64] = "out/checkpoints/step-00000001";
  unsigned char step[STEPS_MOST] = {0};
  const int newest = steps_in("out/checkpoints", step);
  const char *how = "";
  if (j->kind == RESUME) how = " --resume";
  if (j->kind == IF_ANY) how = " --resume if-any";
  if (newest >= 0) snprintf(one, sizeof one, "out/checkpoints/step-%08d", newest);
  switch (j->kind) {
    case TRAIN:
    case RESUME:
    case IF_ANY:
      group.steps += 2 + below(20);
      j->steps = group.steps;
      snprintf(j->line, sizeof j->line,
               "train run.ini -n %d%s --set run.steps=%d --set checkpoint.every=%d --set checkpoint.keep=%d",
               1 + below(2), how, j->steps, group.every, group.keep);
      break;
    case IMPORT: snprintf(j->line, sizeof j->line, "checkpoint import %s -o out", below(2) ? "donor" : "folder"); break;
    case SAMPLE: snprintf(j->line, sizeof j->line, "sample out --tokens 3"); break;
    case EXPORT: snprintf(j->line, sizeof j->line, "checkpoint export out exported-%d", number); break;
    case VERIFY: snprintf(j->line, sizeof j->line, "checkpoint verify out"); break;
    case LS: snprintf(j->line, sizeof j->line, "checkpoint ls out"); break;
    case VERIFY_ONE: snprintf(j->line, sizeof j->line, "checkpoint verify %s", one); break;
    default: snprintf(j->line, sizeof j->line, "sample %s --tokens 3", one);
  }
}

/* Why a command may be refused here. */
static int is_reason(const char *said) {
  static const char *const reasons[] = {
      "is in use by another run",       /* a lock */
      "has no checkpoint",              /* --resume of nothing */
      "holds no model",                 /* nothing to sample yet */
      "neither a checkpoint",           /* nor to verify */
      "has no checkpoints",             /* nor to list */
      "of its own: import into",        /* import */
      "is there already",               /* import */
      "was removed meanwhile",          /* by retention, or moved aside */
      "is not there: name its run",     /* before it was opened */
  };
  for (size_t i = 0; i < sizeof reasons / sizeof *reasons; i++)
    if (strstr(said, reasons[i])) return 1;
  return 0;
}

static void check_job(const job *j, int number) {
  char *said = command_read_file(group.dir, j->said);
  cr_assert(said);
  statuses[j->kind][j->status & 255]++;
  int fine = j->status == PHX__EXIT_OK || (j->status == PHX__EXIT_REFUSED && is_reason(said));
  if (j->struck && j->signal == SIGKILL) fine |= j->status == 128 + SIGKILL;
  if (j->struck && j->signal == SIGTERM) fine |= j->status == PHX__EXIT_STOPPED || j->status == 128 + SIGTERM;
  cr_assert(fine, "overlap %d: status %d of `%s`, signal %d: %s", number, j->status, j->line,
            j->struck ? j->signal : 0, said);
  cr_assert(!strstr(said, "damaged"), "overlap %d: `%s`: %s", number, j->line, said);
  free(said);
}

static void give_up(job *jobs, int n, int number) {
  char list[1500] = "";
  for (int i = 0; i < n; i++) {
    if (jobs[i].pid && !jobs[i].ended) {
      const size_t used = strlen(list);
      snprintf(list + used, sizeof list - used, "\n%s", jobs[i].line);
      kill(-jobs[i].pid, SIGKILL);
      waitpid(jobs[i].pid, NULL, 0);
    }
  }
  cr_assert_fail("overlap %d: these do not end:%s", number, list);
}

/* One round over all: what is due begins, is struck, or is waited for; returns how many have not ended. */
static int turn(job *jobs, int n, double since, int number) {
  int left = 0;
  for (int i = 0; i < n; i++) {
    job *j = &jobs[i];
    int status;
    if (!j->pid && now() - since >= j->start) {
      choose_line(j, number * JOBS + i);
      j->pid = begin(j->said, j->line);
      cr_assert_gt(j->pid, 0);
    }
    if (j->pid && !j->ended && waitpid(j->pid, &status, WNOHANG) == j->pid) {
      j->ended = 1;
      j->status = code_of(status);
    }
    if (j->pid && !j->ended && j->strike > 0 && !j->struck && now() - since >= j->strike) {
      j->struck = 1;
      kill(j->pid, j->signal);
    }
    left += !j->ended;
  }
  return left;
}

static void overlap(int number) {
  job jobs[JOBS] = {{.kind = (enum kind)below(WRITERS + 1)}};
  const int n = 2 + below(JOBS - 1);
  for (int i = 0; i < n; i++) {
    job *j = &jobs[i];
    snprintf(j->said, sizeof j->said, "said-%d", i);
    if (i) j->kind = below(5) < 2 ? (enum kind)below(WRITERS) : (enum kind)(WRITERS + below(KINDS - WRITERS));
    if (i) j->start = random_part() * 0.5;
    j->signal = below(2) ? SIGKILL : SIGTERM;
    if (below(3) == 0) j->strike = j->start + random_part() * 0.4;
  }
  const double since = now();
  while (turn(jobs, n, since, number) > 0) {
    look();
    if (now() - since > PATIENCE_S) give_up(jobs, n, number);
    usleep(500);
  }
  for (int i = 0; i < n; i++) kill(-jobs[i].pid, SIGKILL); /* orphans of a killed launcher end by themselves */
  look();
  for (int i = 0; i < n; i++) check_job(&jobs[i], number);
  check_all();
}

static void new_group(void) {
  command_result r = command_run(group.dir, 10, (const char *const[]){"/bin/sh", "-c", "rm -rf out out.* exported-*",
                                                                      NULL});
  command_free(&r);
  group.n_runs = group.n_whole = group.steps = 0;
  group.keep = below(3);
  group.every = 1 + below(2);
}

/* What import reads: a run, and a folder. */
static void make_donor(void) {
  expect(RUN(group.dir, PATIENCE_S, "train", "run.ini", "-n", "1", "--set", "run.out=donor", "--set", "run.steps=2",
             "--set", "checkpoint.every=1"), 0, "");
  expect(RUN(group.dir, PATIENCE_S, "checkpoint", "export", "donor", "folder"), 0, "");
}

/* It holds the run's lock from before anything is written there. */
Test(overlaps, import_leaves_a_live_run_alone, .timeout = 120) {
  group.dir = command_temp_dir();
  training_files(group.dir, tiny);
  make_donor();
  const pid_t live = begin("said", "train run.ini -n 1 --set run.steps=100000000");
  for (int i = 0; i < 4000 && !inode_of("out/metrics.jsonl"); i++) usleep(5000);
  expect(RUN(group.dir, PATIENCE_S, "checkpoint", "import", "donor", "-o", "out"), PHX__EXIT_REFUSED,
         "is in use by another run: process");
  cr_expect_eq(inode_of("out/checkpoints/step-00000000"), 0, "nothing is imported");
  kill(live, SIGKILL);
  waitpid(live, NULL, 0);
  expect(RUN(group.dir, PATIENCE_S, "checkpoint", "import", "donor", "-o", "out"), 0, "parameters");
  cr_expect(!inode_of("out/lock"), "the lock goes with the import");
  command_remove_dir(group.dir);
}

/* What retention has removed is no damage; what a run's own pointer names, and is not there, is. */
Test(overlaps, a_checkpoint_that_is_gone_is_not_damaged, .timeout = 120) {
  group.dir = command_temp_dir();
  training_files(group.dir, tiny);
  make_donor();
  const char *const gone = "donor/checkpoints/step-00000007", *const why = "is not there: name its run";
  expect(RUN(group.dir, PATIENCE_S, "sample", gone), PHX__EXIT_REFUSED, why);
  expect(RUN(group.dir, PATIENCE_S, "checkpoint", "verify", gone), PHX__EXIT_REFUSED, why);
  expect(RUN(group.dir, PATIENCE_S, "checkpoint", "ls", gone), PHX__EXIT_REFUSED, why);
  expect(RUN(group.dir, PATIENCE_S, "checkpoint", "export", gone, "elsewhere"), PHX__EXIT_REFUSED, why);
  command_write_file(group.dir, "donor/checkpoints/latest", "step-00000007\n", 14);
  expect(RUN(group.dir, PATIENCE_S, "checkpoint", "verify", "donor"), PHX__EXIT_DAMAGED, "step-00000007");
  command_remove_dir(group.dir);
}

Test(overlaps, of_train_resume_sample_and_export, .timeout = 3600) {
  const char *asked = getenv("PHX_TEST_OVERLAPS"), *other = getenv("PHX_TEST_SEED");
  const int overlaps = asked ? atoi(asked) : 6;
  seed = other ? (unsigned)atoi(other) : 1;
  printf("%d overlaps, PHX_TEST_SEED=%u\n", overlaps, seed);
  group.dir = command_temp_dir();
  training_files(group.dir, tiny);
  make_donor();
  for (int i = 0; i < overlaps; i++) {
    if (i % GROUP == 0) new_group();
    overlap(i);
  }
  for (int k = 0; k < KINDS; k++) {
    printf("%s:", names[k]);
    for (int s = 0; s < 256; s++)
      if (statuses[k][s]) printf(" %d with status %d", statuses[k][s], s);
    printf("\n");
  }
  printf("%d overlaps, %d checkpoints verified\n", overlaps, verified);
  cr_expect_gt(verified, 0);
  command_remove_dir(group.dir);
}
