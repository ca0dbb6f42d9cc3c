/* core/checkpoint/checkpoint_resolve.c - see checkpoint_resolve.h. */
#include "checkpoint/checkpoint_resolve.h"

#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/status.h"
#include "base/sys.h"
#include "checkpoint/checkpoint.h"
#include "checkpoint/checkpoint_dir.h"
#include "checkpoint/elements.h"
#include "plugin/host.h"

bool phx__is_there(const char *dir, const char *name) {
  char path[PHX__TOOL_PATH];
  struct stat st;
  snprintf(path, sizeof path, "%s/%s", dir, name);
  return !stat(path, &st);
}

bool phx__is_step_name(const char *name) {
  return !strncmp(name, "step-", 5) && name[5] && strspn(name + 5, "0123456789") == strlen(name + 5) &&
         strlen(name) < 32;
}

bool phx__is_checkpoint(const char *path) {
  const char *slash = strrchr(path, '/');
  return phx__is_there(path, PHX__MANIFEST_NAME) || phx__is_step_name(slash ? slash + 1 : path);
}

bool phx__has_checkpoints(const char *run) {
  phx__checkpoint_list list = {0};
  if (phx__is_there(run, "checkpoints/latest")) return true;
  if (phx__checkpoint_list_read(run, &list, NULL)) return false;
  const bool any = list.n > 0;
  phx__checkpoint_list_free(&list);
  return any;
}

/* Of a run whose checkpoints were copied without `latest`, or that was killed before it was written. */
static phx_status resolve_newest(const char *run, char out[PHX__TOOL_PATH], phx_error *err) {
  char newest[PHX__CHECKPOINT_PATH], text[PHX__TOOL_PATH + 200];
  int64_t step;
  bool found;
  PHX_TRY(phx__checkpoint_newest(run, INT64_MAX, &step, &found, err));
  if (!found)
    return phx_fail(err, PHX_INVALID, "%s is neither a checkpoint (it has no %s) nor a run with checkpoints", run,
                    PHX__MANIFEST_NAME);
  PHX_TRY(phx__checkpoint_path(run, step, newest, err));
  snprintf(out, PHX__TOOL_PATH, "%s", newest);
  snprintf(text, sizeof text, "%s/checkpoints has no file `latest`: takes %s, the newest whole one", run, newest);
  phx__log(0, "checkpoint", PHX_LOG_WARN, text);
  return PHX_OK;
}

phx_status phx__checkpoint_resolve(const char *path, char out[PHX__TOOL_PATH], phx_error *err) {
  char latest[PHX__TOOL_PATH], name[64] = "";
  int fd = -1;
  int64_t bytes = 0;
  if (phx__is_checkpoint(path)) {
    if (snprintf(out, PHX__TOOL_PATH, "%s", path) >= PHX__TOOL_PATH)
      return phx_fail(err, PHX_INVALID, "a path is too long");
    return PHX_OK;
  }
  snprintf(latest, sizeof latest, "%s/checkpoints/latest", path);
  if (access(latest, F_OK)) return resolve_newest(path, out, err);
  phx_status status = phx__file_open(latest, &fd, &bytes, err);
  if (status) return status;
  if (bytes >= (int64_t)sizeof name) status = phx_fail(err, PHX_IO, "%s names no checkpoint", latest);
  else status = phx__file_read(fd, latest, name, bytes, 0, err);
  phx__sys.close(fd);
  name[strcspn(name, "\r\n")] = 0;
  if (!status && !phx__is_step_name(name)) status = phx_fail(err, PHX_IO, "%s names no checkpoint", latest);
  if (!status && snprintf(out, PHX__TOOL_PATH, "%s/checkpoints/%s", path, name) >= PHX__TOOL_PATH)
    status = phx_fail(err, PHX_INVALID, "a path is too long");
  return status;
}

phx_status phx__checkpoint_resolve_open(const char *path, char out[PHX__TOOL_PATH], phx__sighting *seen,
                                        phx__checkpoint_reader **reader, phx_error *err) {
  enum { ATTEMPTS = 20 };
  char before[PHX__TOOL_PATH] = "";
  phx_status status = PHX_OK;
  for (int i = 0; i < ATTEMPTS; i++) {
    status = phx__checkpoint_resolve(path, out, err);
    if (status == PHX_IO && !i) continue; /* the run was moved aside in between */
    if (status) break;
    *seen = phx__sighting_of(out);
    status = phx__checkpoint_reader_open(out, reader, err);
    if (status != PHX_IO || !phx__sighting_gone(seen, out)) return status;
    if (!strcmp(path, out)) return phx__sighting_explain(seen, out, status, err);
    if (!strcmp(before, out)) break; /* `latest` names again what is not there: that is damage */
    memcpy(before, out, sizeof before);
  }
  return status;
}
