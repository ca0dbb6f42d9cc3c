/* core/checkpoint/resume.c - see resume.h. */
#include "checkpoint/resume.h"

#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "base/status.h"
#include "base/sys.h"
#include "checkpoint/checkpoint_agree.h"
#include "checkpoint/checkpoint_dir.h"
#include "checkpoint/gpt2.h"
#include "checkpoint/model_source.h"
#include "checkpoint/safetensors.h"

phx_status phx__resume_decide(const phx__config *config, bool *any, phx_error *err) {
  char text[PHX__CHECKPOINT_PATH + 100];
  int64_t step = -1;
  const phx_status status = phx__checkpoint_newest(config->s.run.out, INT64_MAX, &step, any, err);
  if (status || *any) return status;
  snprintf(text, sizeof text, "%.4000s holds no checkpoint: a new run begins (--resume=" PHX__RESUME_IF_ANY ")",
           config->s.run.out);
  phx__log(0, "checkpoint", PHX_LOG_INFO, text);
  return PHX_OK;
}

phx_status phx__resume_locate(const phx__config *config, const char *asked, phx__resume *out, phx_error *err) {
  char run_dir[PHX__CHECKPOINT_PATH], own[PHX__CHECKPOINT_PATH];
  int64_t step = -1;
  const char *dir = asked[0] ? asked : config->s.run.out;
  PHX_TRY(phx__checkpoint_locate(dir, run_dir, &step, err));
  if (!realpath(dir, out->dir)) return phx_fail(err, PHX_INVALID, "cannot find %s", dir);
  out->continues = strlen(config->s.run.out) < sizeof own && realpath(config->s.run.out, own) && !strcmp(own, run_dir);
  return PHX_OK;
}

static phx_status nothing_to_resume(const char *dir, phx_error *err) {
  if (phx__source_is_folder(dir))
    return phx_fail(err, PHX_INVALID,
                    "%s has no checkpoint to go on from, but weights: phalanx checkpoint import %s -o RUN makes a "
                    "checkpoint of them, without optimizer states, and train --resume RUN goes on from that", dir,
                    dir);
  return phx_fail(err, PHX_INVALID, "%s has no checkpoint to go on from: start without --resume", dir);
}

phx_status phx__resume_check(const phx__resume *resume, const phx__prepared *prepared, phx_error *err) {
  char run_dir[PHX__CHECKPOINT_PATH], path[PHX__CHECKPOINT_PATH], text[PHX__CHECKPOINT_PATH + 600];
  phx__position at;
  int64_t step = -1;
  bool found = false;
  PHX_TRY(phx__checkpoint_locate(resume->dir, run_dir, &step, err));
  if (step >= 0) return phx__checkpoint_fits(resume->dir, prepared, &at, err);
  PHX_TRY(phx__checkpoint_newest(run_dir, INT64_MAX, &step, &found, err));
  if (!found) return nothing_to_resume(run_dir, err);
  PHX_TRY(phx__checkpoint_path(run_dir, step, path, err));
  PHX_TRY(phx__checkpoint_fits(path, prepared, &at, err));
  snprintf(text, sizeof text, "goes on from %s", path);
  phx__log(0, "checkpoint", PHX_LOG_DEBUG, text);
  return PHX_OK;
}

/* A run that ended further on, without a checkpoint there, has left its final weights: this one would replace them. */
static phx_status set_weights_aside(const char *run_dir, int64_t above, phx_error *err) {
  char from[PHX__CHECKPOINT_PATH], to[PHX__CHECKPOINT_PATH], name[96], line[3 * PHX__CHECKPOINT_PATH];
  phx__safetensors *st = NULL;
  struct stat there;
  phx_status status = phx__path_join(from, run_dir, PHX__GPT2_WEIGHTS, err);
  if (status || phx__safetensors_open(from, &st, NULL)) return status; /* none, or none of ours */
  const char *text = phx__safetensors_metadata(st, "step");
  const int64_t step = text ? strtoll(text, NULL, 10) : -1;
  phx__safetensors_close(st);
  if (step <= above) return PHX_OK;
  for (int n = 1; !status; n++) {
    snprintf(name, sizeof name, "aside-%08" PRId64 ".%d.safetensors", step, n);
    status = phx__path_join(to, run_dir, name, err);
    if (!status && lstat(to, &there)) break;
  }
  if (!status && phx__sys.rename(from, to))
    status = phx_fail_errno(err, PHX_IO, errno, "cannot rename %s to %s", from, to);
  if (status) return status;
  snprintf(line, sizeof line,
           "%s has the final weights of step %" PRId64 ", after step %" PRId64 ", where the run goes on: it is now %s",
           from, step, above, to);
  phx__log(0, "checkpoint", PHX_LOG_WARN, line);
  return phx__dir_flush(run_dir, err);
}

/* Rank 0: what lies behind the step is of another future; what is half there, of a dead attempt.  `latest` first, so
 * that it always names one that is there. */
static phx_status tidy(const phx__resume *resume, const phx__config *config, int64_t step, phx_error *err) {
  char text[120];
  int64_t removed = 0;
  if (!resume->continues) return PHX_OK;
  phx_status status = phx__checkpoint_sweep(config->s.run.out, &removed, err);
  if (!status) status = phx__checkpoint_point(config->s.run.out, step, err);
  if (!status) status = phx__checkpoint_set_aside(config->s.run.out, step, err);
  if (!status) status = set_weights_aside(config->s.run.out, step, err);
  snprintf(text, sizeof text, "%" PRId64 " leftover%s of dead attempts removed", removed, removed == 1 ? "" : "s");
  if (!status && removed > 0) phx__log(0, "checkpoint", PHX_LOG_INFO, text);
  return status;
}

phx_status phx__resume_load(const phx__resume *resume, phx__runtime *rt, phx__resumed *out, phx_error *err) {
  phx_error why = PHX_ERROR_INIT;
  phx_status status = phx__checkpoint_resume(rt, resume->dir, out, err);
  if (status) return status;
  if (rt->job->rank == 0) status = tidy(resume, rt->config, out->at.step, &why);
  status = phx__agree(rt, status, &why, NULL, err);
  return status == PHX_IO ? PHX_STATE
                          : status; /* the checkpoint is whole: it is this directory that cannot be changed */
}
