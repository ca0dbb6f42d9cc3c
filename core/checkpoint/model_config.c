/* core/checkpoint/model_config.c - see model_config.h.
 *
 * A manifest's values become overrides of a small configuration in memory, not text of it: a value cannot pretend to be
 * another section. */
#include "checkpoint/model_config.h"

#include <ctype.h>
#include <errno.h>
#include <inttypes.h>
#include <string.h>
#include <sys/mman.h>

#include "base/status.h"
#include "base/sys.h"
#include "plugin/config_load.h"

enum { PAIRS_MOST = 256, MORE_MOST = 16 };

typedef struct made { /* a configuration in the making */
  char ini[PHX__GPT2_INI + 128];
  phx__override overrides[PAIRS_MOST + MORE_MOST];
  char *texts[PAIRS_MOST]; /* of the first */
  size_t n, n_texts;
} made;

static phx_status load(const char *path, const phx__override *overrides, size_t n, phx__config **out, phx_error *err) {
  const phx_status status = phx__config_load_found(path, overrides, n, stderr, out);
  return status ? phx_fail(err, status, "the model cannot be laid out: see above") : PHX_OK;
}

static phx_status load_made(const made *m, phx__config **out, phx_error *err) {
  char path[64];
  const int fd = phx__sys.memfd_create("config.ini", MFD_CLOEXEC);
  if (fd < 0) return phx_fail_errno(err, PHX_NOMEM, errno, "no memory for a configuration");
  phx_status status = phx__file_write(fd, "a configuration in memory", m->ini, (int64_t)strlen(m->ini), 0, err);
  snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
  if (!status) status = load(path, m->overrides, m->n, out, err);
  phx__sys.close(fd);
  return status;
}

static bool is_id(const char *text) {
  size_t n = 0;
  while (isalnum((unsigned char)text[n]) || text[n] == '_' || text[n] == '-') n++;
  return n && !text[n];
}

static phx_status add_pair(made *m, const phx__manifest_pair *p, const char *path, phx_error *err) {
  const bool plugin = !strcmp(p->key, "plugin");
  if (plugin && !is_id(p->value))
    return phx_fail(err, PHX_INVALID, "%s: [model] plugin is '%.100s': what comes with data names a plugin by its id",
                    path, p->value);
  if (m->n_texts == PAIRS_MOST)
    return phx_fail(err, PHX_UNSUPPORTED, "%s: [model] has more than %d keys", path, PAIRS_MOST);
  const size_t bytes = strlen(p->section) + strlen(p->key) + strlen(p->value) + 3;
  char *text = phx__calloc(1, bytes);
  if (!text) return phx_fail(err, PHX_NOMEM, "no memory for a configuration");
  snprintf(text, bytes, "%s.%s=%s", p->section, p->key, p->value);
  m->texts[m->n_texts++] = text;
  m->overrides[m->n++] = (phx__override){text, "manifest"};
  return PHX_OK;
}

static phx_status of_manifest(made *m, const phx__source *s, phx_error *err) {
  const phx__manifest *manifest = s->reader->manifest;
  phx_status status = PHX_OK;
  snprintf(m->ini, sizeof m->ini, "[run]\nstrategy = ddp\n[data]\ntrain = none\n[batch]\nmicro = 1\n[model]\n");
  for (uint32_t i = 0; i < manifest->n_config && !status; i++) {
    const phx__manifest_pair *p = &manifest->config[i];
    if (!strcmp(p->section, "model") || (!strcmp(p->section, "batch") && !strcmp(p->key, "sequence")))
      status = add_pair(m, p, s->path, err);
  }
  return status;
}

static phx_status of_sizes(made *m, const phx__source *s, phx_error *err) {
  phx__gpt2 gpt2;
  char model[PHX__GPT2_INI];
  PHX_TRY(phx__source_gpt2(s, &gpt2, err));
  phx__gpt2_ini(&gpt2, model);
  snprintf(m->ini, sizeof m->ini, "[run]\nstrategy = ddp\n[data]\ntrain = none\n%s", model);
  return PHX_OK;
}

phx_status phx__model_config(const phx__source *source, const char *ini, const phx__override *more, size_t n,
                             phx__config **out, phx_error *err) {
  if (ini[0]) return load(ini, more, n, out, err);
  made *m = phx__calloc(1, sizeof *m);
  if (!m) return phx_fail(err, PHX_NOMEM, "no memory for a configuration");
  phx_status status = source->reader ? of_manifest(m, source, err) : of_sizes(m, source, err);
  if (!status && n > MORE_MOST) status = phx_fail(err, PHX_INTERNAL, "%zu overrides of a configuration", n);
  for (size_t i = 0; i < n && !status; i++) m->overrides[m->n++] = more[i];
  if (!status) status = load_made(m, out, err);
  for (size_t i = 0; i < m->n_texts; i++) phx__free(m->texts[i]);
  phx__free(m);
  return status;
}
