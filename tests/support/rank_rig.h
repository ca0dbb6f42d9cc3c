/* tests/support/rank_rig.h - ranks of one job as children of a test, each with a whole runtime: the core's own code
 * between configuration and checkpoints, without the launcher and the command.
 *
 *   training_files(dir, rank_rig_model);
 *   rank_rig_run run = {.size = 2, .dir = dir, .limit_s = 60, .body = body, .arg = &arg};
 *   cr_assert(rank_rig_ranks(&run), "%s", run.message);
 *
 * A body reports with RIG_CHECK, which leaves it; leaks that the leak sanitizer finds when it has returned are
 * reported, too, and so is a child that is late (they are all killed) or dies. */
#ifndef TEST_RANK_RIG_H
#define TEST_RANK_RIG_H
#include "checkpoint/checkpoint.h"
#include "engine/engine.h"
#include "checkpoint/saver.h"

typedef struct rank_rig {
  int32_t rank, size;
  phx__config *config;
  const phx_job *job;
  phx__runtime *rt;
  phx__engine *engine;
  phx__data *data;
  int64_t step;
  phx__retention retention;
  phx__saver *saver; /* with `background` */
  bool lost;         /* opening failed between ranks: the process ends as it is, as in train.c */
  char *report;      /* shared with the test; empty while all is well */
} rank_rig;

typedef struct rank_rig_run {
  int32_t size;
  const char *dir;      /* the children's working directory, with run.ini; errors.R takes rank R's stderr */
  const char *strategy; /* NULL: ddp; or with an option: zero.stage=1 */
  const char *out;      /* run.out; NULL: out */
  bool unopened;        /* the body opens its rig, and its job */
  bool background;      /* saves go through core/checkpoint/saver.c */
  double limit_s;
  void (*body)(rank_rig *rig, void *arg);
  void *arg;
  char message[2048]; /* the first report */
} rank_rig_run;

/* A model as small as they come; for training_files. */
extern const char rank_rig_model[];

/* A new directory, in memory where there is such a place: thousands of checkpoints may be made.  For
 * command_remove_dir. */
char *rank_rig_dir(void);
bool rank_rig_ranks(rank_rig_run *run);
/* The pieces, for a body that wants them otherwise.  On failure nothing is left open. */
phx_status rank_rig_open(rank_rig *rig, const char *strategy, const char *out, phx_error *err);
void rank_rig_close(rank_rig *rig);
/* One step of training. */
phx_status rank_rig_step(rank_rig *rig, phx_error *err);
/* keep: as in the configuration.  In the background: begun and waited for. */
phx_status rank_rig_save(rank_rig *rig, int64_t keep, phx_error *err);
phx_status rank_rig_save_begin(rank_rig *rig, int64_t keep, phx_error *err); /* only in the background */
/* Of the whole state, as text. */
phx_status rank_rig_hash(rank_rig *rig, char text[33], phx_error *err);
/* Collective: the largest of all ranks' values; ends the child when the ranks cannot meet. */
int64_t rank_rig_most(rank_rig *rig, int64_t value);
int rank_rig_open_files(void); /* of this process */

#define RIG_CHECK(rig, condition, ...)                                     \
  do {                                                                     \
    if (!(condition)) {                                                    \
      rank_rig_report((rig), __FILE__, __LINE__, #condition, __VA_ARGS__); \
      return;                                                              \
    }                                                                      \
  } while (0)
void rank_rig_report(rank_rig *rig, const char *file, int line, const char *what, const char *format, ...)
    __attribute__((format(printf, 5, 6)));
#endif
