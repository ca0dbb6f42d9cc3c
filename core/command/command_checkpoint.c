/* core/command/command_checkpoint.c - `phalanx checkpoint ls|verify|export|import|diff`: which part, and ls and verify.
 *
 * Every part streams: what is in memory at once is a few MiB, and for export and import one matrix or 64 MiB of it.
 * [main] only. */
#include "command/command_checkpoint.h"

#include <dirent.h>
#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "base/complain.h"
#include "base/status.h"
#include "base/sys.h"
#include "checkpoint/checkpoint_resolve.h"
#include "checkpoint/elements.h"
#include "checkpoint/manifest_inner.h"
#include "checkpoint/model_source.h"
#include "command/cli.h"
#include "command/commands.h"
#include "engine/state_hash.h"

phx_status phx__writing(phx_status status) { return status == PHX_IO ? PHX_STATE : status; }

int phx__checkpoint_refuse(phx_status status, const phx_error *err) {
  phx__complain("%s", err->message);
  if (status == PHX_IO) return PHX__EXIT_DAMAGED;
  return status == PHX_STATE ? PHX__EXIT_RANK : PHX__EXIT_REFUSED;
}

int phx__checkpoint_usage(const char *usage) {
  fprintf(stderr, "usage: phalanx checkpoint %s\n", usage);
  return PHX__EXIT_REFUSED;
}

/* ---- ls ---- */
static int by_name(const void *a, const void *b) {
  const char *x = *(char *const *)a, *y = *(char *const *)b;
  const size_t n = strlen(x), m = strlen(y);
  if (n != m) return n < m ? -1 : 1;
  return strcmp(x, y);
}

static const char *age_text(int64_t seconds, char text[32]) {
  static const struct {
    int64_t s;
    const char *unit;
  } units[] = {{86400, "days"}, {3600, "h"}, {60, "min"}, {0, "s"}};
  int i = 0;
  if (seconds < 0) seconds = 0;
  while (units[i].s && seconds < 2 * units[i].s) i++;
  snprintf(text, 32, "%" PRId64 " %s", seconds / (units[i].s ? units[i].s : 1), units[i].unit);
  return text;
}

static int list_one(const char *dir, const char *name, bool latest) {
  char path[PHX__TOOL_PATH], age[32];
  phx_error err = PHX_ERROR_INIT;
  phx__manifest *m = NULL;
  int64_t bytes = 0;
  snprintf(path, sizeof path, "%.4000s/%.100s", dir, name);
  const phx__sighting seen = phx__sighting_of(path);
  phx_status status = phx__manifest_read(path, &m, &err);
  if (status == PHX_IO && phx__sighting_gone(&seen, path)) return PHX__EXIT_OK; /* removed meanwhile */
  if (status) {
    printf("%10s  damaged or unreadable\n", name + 5);
    fflush(stdout);
    return phx__checkpoint_refuse(status, &err);
  }
  for (uint32_t i = 0; i < m->n_files; i++) bytes += m->files[i].bytes;
  printf("%10" PRId64 "  %-10s %5" PRId32 "  %14" PRId64 "  %10s%s\n", m->step,
         phx__manifest_plugin_of(m, "strategy")->id, m->ranks, bytes, age_text((int64_t)time(NULL) - m->time, age),
         latest ? "  latest" : "");
  phx__manifest_free(m);
  return PHX__EXIT_OK;
}

/* The final weights of a run, or a folder's. */
static int list_folder(const char *dir) {
  phx_error err = PHX_ERROR_INIT;
  phx__source *s = NULL;
  char age[32], step[24] = "-";
  struct stat st = {0};
  int64_t bytes = 0;
  const phx_status status = phx__source_open_folder(dir, &s, &err);
  if (status) {
    fflush(stdout);
    return phx__checkpoint_refuse(status, &err);
  }
  for (uint32_t i = 0; i < s->files->n_files; i++) bytes += s->files->files[i]->file_bytes;
  if (s->step >= 0) snprintf(step, sizeof step, "%" PRId64, s->step);
  stat(s->files->path, &st);
  printf("%10s  %-10s %5s  %14" PRId64 "  %10s  weights, in %s\n", step, "-", "-", bytes,
         age_text((int64_t)time(NULL) - st.st_mtime, age), s->files->path);
  phx__source_close(s);
  return PHX__EXIT_OK;
}

static void list_head(void) { printf("%10s  %-10s %5s  %14s  %10s\n", "step", "strategy", "ranks", "bytes", "age"); }

static int list_checkpoint(const char *path) {
  char parent[PHX__TOOL_PATH];
  const char *slash = strrchr(path, '/');
  snprintf(parent, sizeof parent, "%.*s", slash ? (int)(slash - path) : 1, slash ? path : ".");
  phx_error err = PHX_ERROR_INIT;
  const phx__sighting seen = phx__sighting_of(path);
  const phx_status status = seen.there ? PHX_OK : phx__sighting_explain(&seen, path, PHX_IO, &err);
  if (status) return phx__checkpoint_refuse(status, &err);
  list_head();
  return list_one(parent, slash ? slash + 1 : path, false);
}

static int command_ls(int argc, char **argv) {
  enum { MOST = 1 << 16 };
  char dir[PHX__TOOL_PATH], latest[PHX__TOOL_PATH] = "";
  phx_error err = PHX_ERROR_INIT;
  int worst = PHX__EXIT_OK, parts = 0;
  size_t n = 0;
  if (argc != 2) return phx__checkpoint_usage("ls RUN|CHECKPOINT|FOLDER");
  if (phx__is_checkpoint(argv[1])) return list_checkpoint(argv[1]);
  const bool weights = phx__source_is_folder(argv[1]);
  snprintf(dir, sizeof dir, "%.4000s/checkpoints", argv[1]);
  DIR *d = opendir(dir);
  if (!d && weights) {
    list_head();
    return list_folder(argv[1]);
  }
  if (!d) {
    phx__complain("%s has no checkpoints: %s", argv[1], strerror(errno));
    return PHX__EXIT_REFUSED;
  }
  char **names = phx__calloc(MOST, sizeof *names);
  for (struct dirent *e; names && n < MOST && (e = readdir(d));) {
    const size_t length = strlen(e->d_name);
    if (e->d_name[0] == '.' && length > 5 && !strcmp(e->d_name + length - 5, ".part")) parts++;
    if (phx__is_step_name(e->d_name) && (names[n] = phx__strdup(e->d_name))) n++;
  }
  closedir(d);
  if (phx__checkpoint_resolve(argv[1], latest, &err)) latest[0] = 0;
  if (n) qsort(names, n, sizeof *names, by_name);
  list_head();
  for (size_t i = 0; i < n; i++) {
    const char *slash = strrchr(latest, '/');
    const int one = list_one(dir, names[i], slash && !strcmp(slash + 1, names[i]));
    if (one > worst) worst = one;
  }
  const int of_weights = weights ? list_folder(argv[1]) : PHX__EXIT_OK;
  if (of_weights > worst) worst = of_weights;
  if (parts) printf("and %d unfinished, of saves that go on or were cut off\n", parts);
  for (size_t i = 0; i < n; i++) phx__free(names[i]);
  phx__free(names);
  return worst;
}

/* ---- verify: every file is read once, from end to end ---- */
typedef struct placed { /* a slice, by its place in the file */
  const phx__manifest_slice *slice;
  int64_t hashed; /* blocks */
} placed;

typedef struct verification {
  phx__checkpoint_reader *reader;
  phx__sighting seen; /* of its directory */
  phx_model model; /* as layout.h reads it */
  phx_param *params;
  phx_unit *units;
  placed *places; /* (n_slices) room for those of one file */
  unsigned char *buffer; /* (a block, then a chunk) */
  phx__state_hash hash;
  int64_t bytes, damaged; /* damaged: complaints */
} verification;

static void complain(verification *v, const phx_error *err) {
  v->damaged++;
  if (phx__sighting_gone(&v->seen, v->reader->dir)) return; /* said at the end */
  fflush(stdout);
  phx__complain("%s", err->message);
}

/* The tensors that lie in a chunk, as a text: at most three names. */
static void tensors_in(const phx__safetensors *st, int64_t chunk, char *out, size_t room) {
  const int64_t from = chunk * PHX__CHUNK_BYTES, to = from + PHX__CHUNK_BYTES;
  uint32_t found = 0;
  snprintf(out, room, "%s", st && from >= st->data_at ? "no tensor" : "the header");
  for (uint32_t i = 0; st && i < st->n; i++) {
    const phx__tensor *t = &st->tensors[i];
    const size_t used = found || from < st->data_at ? strlen(out) : 0;
    if (t->begin >= to || t->begin + t->bytes <= from || !t->bytes) continue;
    if (++found > 3) {
      snprintf(out + used, room - used, ", ...");
      return;
    }
    snprintf(out + used, room - used, "%s%s", used ? ", " : "tensor ", t->name);
  }
}

static int by_offset(const void *a, const void *b) {
  const int64_t x = ((const placed *)a)->slice->offset, y = ((const placed *)b)->slice->offset;
  return (x > y) - (x < y);
}

static uint32_t places_of(verification *v, uint32_t file) {
  const phx__manifest *m = v->reader->manifest;
  uint32_t n = 0;
  for (uint32_t i = 0; i < m->n_slices; i++)
    if (m->slices[i].file == file) v->places[n++] = (placed){.slice = &m->slices[i]};
  if (n) qsort(v->places, n, sizeof *v->places, by_offset);
  return n;
}

/* Blocks that end in bytes [from, to) of the file, which lie at `data`; what stands in front of it is kept. */
static void hash_blocks(verification *v, placed *p, int64_t from, int64_t to, const unsigned char *data) {
  const phx__manifest_slice *s = p->slice;
  const int64_t width = PHX_BLOCK * (int64_t)phx_dtype_bytes(s->dtype), at = s->offset + p->hashed * width;
  const int64_t whole = to > at ? (to - at) / width : 0, left = s->blocks - p->hashed;
  const phx_slice part = {.struct_size = sizeof part, .kind = s->kind, .state_index = s->index, .unit = s->unit,
                          .flat = s->flat, .first_block = s->first_block + p->hashed, .dtype = s->dtype,
                          .blocks = whole < left ? whole : left};
  if (part.blocks < 1) return;
  phx__state_hash_slice(&v->hash, &v->model, &part, data + (at - from));
  p->hashed += part.blocks;
}

static void verify_file(verification *v, uint32_t file) {
  enum { BLOCK = PHX_BLOCK * 4 };
  const phx__manifest_file *entry = &v->reader->manifest->files[file];
  char path[PHX__TOOL_PATH], what[400];
  phx_error err = PHX_ERROR_INIT;
  phx__checked_file f = {.at = {.fd = -1}};
  phx__safetensors *st = NULL;
  unsigned char *chunk = v->buffer + BLOCK;
  snprintf(path, sizeof path, "%s/%s", v->reader->dir, entry->name);
  if (phx__checked_open(v->reader->dir, entry, v->reader->stream, &f, &err)) {
    complain(v, &err);
    return;
  }
  if (phx__safetensors_open(path, &st, &err) || phx__manifest_header_fits(v->reader->manifest, file, st, &err))
    complain(v, &err);
  const uint32_t n = v->damaged ? 0 : places_of(v, file);
  for (int64_t at = 0, i = 0; at < entry->bytes; at += PHX__CHUNK_BYTES) {
    const int64_t left = entry->bytes - at, bytes = left < PHX__CHUNK_BYTES ? left : PHX__CHUNK_BYTES;
    tensors_in(st, at / PHX__CHUNK_BYTES, what, sizeof what);
    if (phx__checked_read(&f, what, chunk, bytes, at, left - bytes, &err)) complain(v, &err);
    for (; i < n && v->places[i].slice->offset < at + bytes && !v->damaged; i++) {
      hash_blocks(v, &v->places[i], at, at + bytes, chunk);
      if (v->places[i].hashed < v->places[i].slice->blocks) break; /* goes on in the next chunk */
    }
    memmove(v->buffer, chunk + bytes - BLOCK, BLOCK); /* a block may begin here */
    v->bytes += bytes;
  }
  phx__safetensors_close(st);
  phx__checked_close(&f);
}

static bool model_of(verification *v) {
  const phx__manifest *m = v->reader->manifest;
  v->params = phx__calloc(m->n_params, sizeof *v->params);
  v->units = phx__calloc(m->n_units, sizeof *v->units);
  if (!v->params || !v->units) return false;
  for (uint32_t i = 0; i < m->n_units; i++) v->units[i].name = m->units[i].name;
  for (uint32_t i = 0; i < m->n_params; i++) {
    const phx__manifest_param *p = &m->params[i];
    v->params[i] = (phx_param){.name = p->name, .unit = p->unit, .numel = p->numel, .offset = p->offset,
                               .flags = p->flat == PHX_FLAT_FROZEN ? PHX_PARAM_FROZEN : 0};
    phx_unit *u = &v->units[p->unit];
    if (!u->n_params++) u->first_param = i;
  }
  v->model = (phx_model){.struct_size = sizeof v->model, .params = v->params, .units = v->units,
                         .n_params = m->n_params, .n_units = m->n_units, .param_stride = sizeof *v->params,
                         .unit_stride = sizeof *v->units};
  return true;
}

/* From end to end: the hash of what was read is the hash of what was trained. */
static phx_status verify_hash(const verification *v, phx_error *err) {
  const phx__manifest *m = v->reader->manifest;
  char text[33];
  phx__state_hash_text(v->hash, text);
  if (!strcmp(text, m->state_hash)) return PHX_OK;
  return phx_fail(err, PHX_IO, "%s/%s: state_hash is %s, and the tensors have %s", v->reader->dir, PHX__MANIFEST_NAME,
                  m->state_hash, text);
}

/* A folder has no checksums: its header, its sizes, and that every weight is a number. */
static int verify_folder(const char *dir) {
  phx_error err = PHX_ERROR_INIT;
  phx__source *s = NULL;
  phx__source_param p;
  const phx__sighting seen = phx__sighting_of(dir);
  phx_status status = phx__source_open_folder(dir, &s, &err);
  float *part = phx__calloc(PHX__TOOL_PART, sizeof *part);
  if (!status && !part) status = phx_fail(&err, PHX_NOMEM, "no memory to verify %s", dir);
  if (!status) s->finite = true;
  for (uint32_t i = 0; !status && i < phx__source_n(s); i++)
    for (int64_t at = 0; phx__source_at(s, i, &p) && !status && at < p.numel; at += PHX__TOOL_PART) {
      const int64_t n = p.numel - at < PHX__TOOL_PART ? p.numel - at : PHX__TOOL_PART;
      status = phx__source_read_stored(s, &p, at, n, part, &err);
    }
  if (!status)
    printf("%s: whole as far as it tells: %" PRIu32 " tensors%s, every weight is a number (it has no checksums)\n",
           s->files->path, s->files->n, s->has_config ? " that fit " PHX__GPT2_CONFIG : "");
  phx__free(part);
  phx__source_close(s);
  if (!status) return PHX__EXIT_OK;
  phx__checkpoint_refuse(status, &err);
  return status == PHX_NOMEM || phx__sighting_gone(&seen, dir) ? PHX__EXIT_REFUSED : PHX__EXIT_DAMAGED;
}

static int verify_checkpoint(const char *path) {
  char dir[PHX__TOOL_PATH] = "";
  phx_error err = PHX_ERROR_INIT;
  verification v = {0};
  phx_status status = phx__checkpoint_resolve_open(path, dir, &v.seen, &v.reader, &err);
  if (status) return phx__checkpoint_refuse(status, &err);
  const phx__manifest *m = v.reader->manifest;
  v.places = phx__calloc(m->n_slices, sizeof *v.places);
  v.buffer = phx__calloc(1, PHX_BLOCK * 4 + PHX__CHUNK_BYTES);
  if (!model_of(&v) || !v.places || !v.buffer) status = phx_fail(&err, PHX_NOMEM, "no memory to verify %s", dir);
  for (uint32_t i = 0; i < m->n_files && !status; i++) verify_file(&v, i);
  if (!status && !v.damaged) status = verify_hash(&v, &err);
  if (v.damaged) status = phx__sighting_explain(&v.seen, dir, PHX_IO, &err) == PHX_INVALID ? PHX_INVALID : PHX_OK;
  if (!status && !v.damaged)
    printf("%s: whole: %" PRIu32 " parameters, %" PRIu32 " optimizer states, %" PRIu32 " slices in %" PRIu32
           " files, %" PRId64 " bytes\n", dir, m->n_params, m->n_states, m->n_slices, m->n_files, v.bytes);
  phx__free(v.buffer);
  phx__free(v.places);
  phx__free(v.params);
  phx__free(v.units);
  phx__checkpoint_reader_close(v.reader);
  if (status) return phx__checkpoint_refuse(status, &err);
  return v.damaged ? PHX__EXIT_DAMAGED : PHX__EXIT_OK;
}

/* Of a run both: its latest checkpoint, and its final weights. */
static int command_verify(int argc, char **argv) {
  if (argc != 2) return phx__checkpoint_usage("verify CHECKPOINT|RUN|FOLDER");
  const bool weights = !phx__is_checkpoint(argv[1]) && phx__source_is_folder(argv[1]);
  const int one = weights && !phx__has_checkpoints(argv[1]) ? PHX__EXIT_OK : verify_checkpoint(argv[1]);
  const int other = weights ? verify_folder(argv[1]) : PHX__EXIT_OK;
  return one > other ? one : other;
}

/* ---- dispatch ---- */
static const struct {
  const char *name;
  int (*run)(int argc, char **argv);
} parts[] = {{"ls", command_ls},
             {"verify", command_verify},
             {"export", phx__checkpoint_export},
             {"import", phx__checkpoint_import},
             {"diff", phx__checkpoint_diff}};
enum { PARTS = sizeof parts / sizeof parts[0] };

int phx__command_checkpoint(int argc, char **argv) {
  const char *known[PARTS + 1] = {NULL};
  if (argc < 2) return phx__checkpoint_usage("ls FROM | verify FROM | export FROM OUTDIR | import FROM -o "
                                             "CHECKPOINT|RUN | diff A B; FROM, A, B: a run, a checkpoint, or a folder "
                                             "with model.safetensors");
  for (int i = 0; i < PARTS; i++) {
    if (!strcmp(argv[1], parts[i].name)) return parts[i].run(argc - 1, argv + 1);
    known[i] = parts[i].name;
  }
  return phx__cli_unknown("part of checkpoint", argv[1], known);
}
