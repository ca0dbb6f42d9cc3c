/* What rank 0 writes while training: names of metrics that hold anything, saves with and without a step to stand in,
 * plugins' texts in the log. */
#include <cjson/cJSON.h>
#include <criterion/criterion.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "plugin/host.h"
#include "command/progress.h"
#include "rank_rig.h"
#include "base/status.h"
#include "training.h"

static char *dir;
static void setup(void) {
  cr_assert_not_null(dir = command_temp_dir());
  training_files(dir, rank_rig_model);
  char out[300];
  snprintf(out, sizeof out, "%s/out", dir);
  cr_assert_eq(mkdir(out, 0755), 0);
}
static void teardown(void) { command_remove_dir(dir); }
TestSuite(progress, .init = setup, .fini = teardown, .timeout = 60);

static const phx__step_result result = {.loss = 1.5, .grad_norm = 0.25, .lr = 0.125};
static void write_lines(rank_rig *rig, void *arg) {
  static const char *const names[] = {"plain", "a\"b", "line\nbreak", "back\\slash", "\x1b[2J", "}, \"step\": 7"};
  (void)arg;
  phx_error err = PHX_ERROR_INIT;
  phx__progress *p = calloc(1, sizeof *p);
  RIG_CHECK(rig, !phx__progress_open(p, rig->rt, 0, &err), "%s", err.message);
  const phx_host *host = &rig->rt->strategy_host.table;
  for (size_t i = 0; i < sizeof names / sizeof *names; i++) host->metric(host->ctx, names[i], (double)i);
  const phx__host *const others[] = {&rig->rt->device_host, &rig->rt->comm_host, &rig->rt->model_host};
  for (int i = 0; i < 3; i++) others[i]->table.metric(others[i]->table.ctx, "own", 10.0 + i);
  phx__progress_save(p, ",\"checkpoint\":{\"saved_step\":1}");
  phx__progress_done(p, 1, &result, 0.5, 64);
  phx__progress_tell(p, 2.5, NULL);
  phx__progress_save(p, ",\"checkpoint\":{\"saved_step\":2}"); /* two wait for one step */
  phx__progress_save(p, ",\"checkpoint\":{\"saved_step\":3}");
  phx__progress_done(p, 2, &result, 0.5, 64);
  phx__progress_tell(p, 0.0 / 0.0, "0123");
  phx__progress_done(p, 3, &result, 0.5, 64);
  phx__progress_line(p); /* before the save, and once */
  phx__progress_line(p);
  phx__progress_save(p, ",\"checkpoint\":{\"saved_step\":4}");
  phx__progress_tell(p, 2.5, "0123"); /* behind it */
  phx__progress_save(p, ",\"checkpoint\":{\"saved_step\":5}"); /* and no step comes */
  for (int i = 0; i < 1000; i++) host->metric(host->ctx, "one that takes more and more room", i);
  phx__progress_close(p);
  free(p);
}

static const cJSON *member(const cJSON *o, const char *name) { return cJSON_GetObjectItemCaseSensitive(o, name); }

Test(progress, every_line_is_json_of_its_shape) {
  rank_rig_run run = {.size = 1, .dir = dir, .limit_s = 30, .body = write_lines};
  cr_assert(rank_rig_ranks(&run), "%s", run.message);
  char *text = command_read_file(dir, "out/metrics.jsonl"), *line = strtok(text, "\n");
  static const char *const names[] = {"ddp.plain", "ddp.a\"b", "ddp.line\nbreak", "ddp.back\\slash", "ddp.\x1b[2J",
                                      "ddp.}, \"step\": 7"};
  static const char *const others[] = {"cpu.own", "shm.own", "gpt.own"};
  static const char *const shapes[] = {"step", "after_step", "step", "step", "after_step", "after_step"};
  static const int steps[] = {1, 1, 2, 3, 3, 3}, saves[] = {1, 2, 3, 0, 4, 5};
  static const int losses[] = {1, 0, 0, 0, 1, 0}; /* held out */
  for (int i = 0; i < 6; i++, line = strtok(NULL, "\n")) {
    cJSON *json = line ? cJSON_Parse(line) : NULL;
    cr_assert(json, "line %d is no JSON: %s", i + 1, line);
    cr_assert_eq((int)cJSON_GetNumberValue(member(json, shapes[i])), steps[i], "%s", line);
    if (saves[i])
      cr_assert_eq((int)cJSON_GetNumberValue(member(member(json, "checkpoint"), "saved_step")), saves[i], "%s", line);
    cr_expect_eq(member(json, "loss") != NULL, !strcmp(shapes[i], "step"), "%s", line);
    cr_expect_eq(member(json, "valid_loss") != NULL, losses[i], "%s", line);
    for (size_t k = 0; i == 0 && k < sizeof names / sizeof *names; k++)
      cr_expect_eq((int)cJSON_GetNumberValue(member(json, names[k])), (int)k, "no '%s' in %s", names[k], line);
    for (int k = 0; i == 0 && k < 3; k++)
      cr_expect_eq((int)cJSON_GetNumberValue(member(json, others[k])), 10 + k, "no '%s' in %s", others[k], line);
    cJSON_Delete(json);
  }
  cr_assert_null(line, "%s", line);
  free(text);
  char *said = command_read_file(dir, "errors.0");
  const char *once = strstr(said, "is left out of metrics.jsonl");
  cr_expect(once && !strstr(once + 1, "is left out"), "%s", said);
  free(said);
}

Test(progress, the_log_shows_no_control_characters) {
  char path[300];
  snprintf(path, sizeof path, "%s/said", dir);
  fflush(stderr);
  const int screen = dup(2), said_fd = open(path, O_WRONLY | O_CREAT | O_TRUNC, 0644);
  dup2(said_fd, 2);
  phx__log(0, "plug\033in", PHX_LOG_ERROR,
           "red \033[31m, \r back, \a bell, \xc2\x9b csi, gr\xc3\xbc\xc3\x9f, \xff, new\nline");
  fflush(stderr);
  dup2(screen, 2);
  char *said = command_read_file(dir, "said");
  cr_expect(strstr(said, "rank 0 plug?in] error: red ?[31m,   back, ? bell, ?? csi, gr\xc3\xbc\xc3\x9f, ?, new line\n"),
            "%s", said);
  free(said);
}
