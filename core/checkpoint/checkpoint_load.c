/* core/checkpoint/checkpoint_load.c - loading: any strategy and world size from any other; see checkpoint.h.
 *
 * Each rank asks the manifest where the blocks of its own slices are and reads those ranges; every chunk is hashed
 * before a byte of it is used, and the hash of what all ranks took together must be the checkpoint's.
 * Memory: the manifest, and PHX__STREAM_MEMORY for all files; state goes to where it belongs directly.
 * What it does not do: fall back inside one checkpoint, or guess.  Private state of a strategy is restored at equal
 * strategy and world size, and else left out by name.
 * Threads: [main]. */
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/status.h"
#include "base/sys.h"
#include "checkpoint/checkpoint.h"
#include "checkpoint/checkpoint_agree.h"
#include "checkpoint/checkpoint_dir.h"
#include "checkpoint/checkpoint_fits.h"
#include "checkpoint/manifest.h"
#include "engine/state.h"
#include "engine/state_io.h"
#include "engine/state_visit.h"
#include "plugin/where.h"

/* ---- does it fit? ---- */
phx_status phx__checkpoint_fits(const char *path, const phx__prepared *prepared, phx__position *at, phx_error *err) {
  phx__manifest *m = NULL;
  phx__fit fit;
  phx_status status = phx__manifest_read(path, &m, err);
  if (!status) status = phx__manifest_fits(path, m, prepared, &fit, err);
  if (!status) *at = (phx__position){.step = m->step, .samples = m->samples, .skipped = m->skipped};
  phx__manifest_free(m);
  return status;
}

/* ---- reading the state ---- */
typedef struct load_walk {
  phx__runtime *rt;
  phx__checkpoint_reader *reader;
  phx__state_hash hash;
  bool private_fits;
  bool from_zero;   /* untrained, of another optimizer: its states are not read, and the run's are zero */
  float *zeros;     /* (PART blocks) with from_zero */
  int64_t privates; /* restored */
} load_walk;

enum { PART = PHX__CHUNK_BYTES / (PHX_BLOCK * 4) };

/* The checkpoint's hash counts its states: what belongs to these weights counts as zero, which it must have been. */
static void hash_zero_states(load_walk *walk, phx_slice part) {
  if (part.kind == PHX_STATE_OPTIM || part.flat != PHX_FLAT_TRAINABLE) return;
  part.kind = PHX_STATE_OPTIM;
  for (part.state_index = 0; part.state_index < walk->reader->manifest->n_states; part.state_index++)
    phx__state_hash_slice(&walk->hash, walk->rt->prepared->model, &part, walk->zeros);
}

/* A MiB at a time, hashed while it is in the cache and the next ones come from the disk. */
static phx_status load_blocks(load_walk *walk, const phx_slice *slice, void *data, phx_error *err) {
  const uint32_t index = slice->kind == PHX_STATE_OPTIM ? slice->state_index : 0;
  if (slice->dtype != PHX_F32)
    return phx_fail(err, PHX_UNSUPPORTED, "state of unit %u has dtype %d; only fp32 is loaded", slice->unit,
                    slice->dtype);
  for (int64_t done = 0; done < slice->blocks; done += PART) {
    phx_slice part = *slice;
    float *at = (float *)data + done * PHX_BLOCK;
    part.first_block += done;
    part.blocks = slice->blocks - done < PART ? slice->blocks - done : PART;
    if (walk->from_zero && slice->kind == PHX_STATE_OPTIM) {
      memset(at, 0, (size_t)part.blocks * PHX_BLOCK * sizeof *at);
      continue;
    }
    walk->reader->ahead = slice->blocks - done - part.blocks;
    PHX_TRY(phx__checkpoint_reader_blocks(walk->reader, slice->kind, index, slice->unit, slice->flat,
                                          part.first_block, part.blocks, at, err));
    phx__state_hash_slice(&walk->hash, walk->rt->prepared->model, &part, at);
    if (walk->from_zero) hash_zero_states(walk, part);
  }
  return PHX_OK;
}

static const phx__manifest_private *find_private(const load_walk *walk, const phx_slice *slice) {
  const phx__manifest *m = walk->reader->manifest;
  if (!walk->private_fits || !slice->name) return NULL;
  for (uint32_t i = 0; i < m->n_privates; i++) {
    const phx__manifest_private *p = &m->privates[i];
    if (p->rank == walk->rt->job->rank && p->unit == slice->unit && p->flat == slice->flat &&
        p->first_block == slice->first_block && p->blocks == slice->blocks && p->dtype == slice->dtype &&
        strcmp(p->name, slice->name) == 0)
      return p;
  }
  return NULL;
}

typedef struct slice_load {
  load_walk *walk;
  const phx_slice *slice;
  const phx__manifest_private *from; /* or NULL */
  char *whole;                       /* a private state that goes to its place in parts */
} slice_load;

static phx_status load_private(slice_load *l, void *data, int64_t at, int64_t bytes, phx_error *err) {
  const int64_t all = l->slice->blocks * PHX_BLOCK * (int64_t)phx_dtype_bytes(l->slice->dtype);
  if (bytes == all) return phx__checkpoint_reader_private(l->walk->reader, l->from, data, err);
  if (!l->whole) {
    l->whole = phx__calloc(1, (size_t)all);
    if (!l->whole) return phx_fail(err, PHX_NOMEM, "no memory for a private state of %lld bytes", (long long)all);
    PHX_TRY(phx__checkpoint_reader_private(l->walk->reader, l->from, l->whole, err));
  }
  memcpy(data, l->whole + at, (size_t)bytes);
  return PHX_OK;
}

static phx_status load_part(void *ctx, void *data, int64_t at, int64_t bytes, phx_error *err) {
  slice_load *l = ctx;
  const phx_slice part = phx__slice_part(l->slice, at, bytes);
  return l->from ? load_private(l, data, at, bytes, err) : load_blocks(l->walk, &part, data, err);
}

static phx_status load_slice(void *ctx, const phx_slice *slice, phx_error *err) {
  load_walk *walk = ctx;
  const bool private = slice->kind == PHX_STATE_PRIVATE;
  slice_load load = {.walk = walk, .slice = slice, .from = private ? find_private(walk, slice) : NULL};
  if (private && !load.from) return PHX_OK;
  if (phx__state_derived(slice)) return PHX_OK;
  const phx_status status = phx__slice_write(walk->rt, slice, load_part, &load, err);
  walk->privates += load.from && !status;
  phx__free(load.whole);
  return status;
}

/* ---- what is different now, and what was left out ---- */
static void say(const phx__runtime *rt, const char *text) { phx__log(rt->job->rank, "checkpoint", PHX_LOG_INFO, text); }

typedef struct difference {
  const phx__runtime *rt;
  const phx__manifest *m;
} difference;

/* A size of the model that is 0 on one side is the preset's, or what the weights' shapes say: shapes are compared. */
static bool size_left_open(const char *section, const char *before, const char *value) {
  const char *other = strcmp(before, "0") == 0 ? value : before;
  if (strcmp(section, "model") != 0 || (strcmp(before, "0") != 0 && strcmp(value, "0") != 0)) return false;
  return other[strspn(other, "0123456789")] == 0;
}

/* Everything that changes results, and the strategy; what only names files of this run is left out. */
static void say_config(void *arg, const char *section, const char *key, const char *value, const char *source) {
  static const char *const told[] = {"batch", "data", "model", "optimizer", "precision", NULL};
  const difference *d = arg;
  char text[1024];
  const char *before = phx__manifest_config_of(d->m, section, key);
  bool wanted = false;
  (void)source;
  for (int i = 0; told[i]; i++) wanted = wanted || strcmp(told[i], section) == 0;
  wanted = wanted || (strcmp(section, "run") == 0 && strcmp(key, "steps") == 0); /* the schedule ends there */
  if (!wanted || !before || strcmp(before, value) == 0 || size_left_open(section, before, value)) return;
  snprintf(text, sizeof text, "[%s] %s was %.300s and is %.300s", section, key, before, value);
  say(d->rt, text);
}

static void say_plugin(const phx__runtime *rt, const phx__manifest *m, const char *kind, const phx__plugin *now) {
  const phx__manifest_plugin *p = phx__manifest_plugin_of(m, kind);
  char text[512];
  if (!p || (strcmp(p->id, now->descriptor->id) == 0 && strcmp(p->sha256, now->sha256) == 0)) return;
  if (strcmp(p->id, now->descriptor->id) != 0)
    snprintf(text, sizeof text, "the %s was %s and is %s", kind, p->id, now->descriptor->id);
  else
    snprintf(text, sizeof text, "the %s %s is another build: version %.60s, sha256 %.12s... was %.60s, %.12s...", kind,
             p->id, now->descriptor->version, now->sha256, p->version, p->sha256);
  say(rt, text);
}

/* What this run has for a key of the checkpoint's identity, NULL where it has no such key. */
static const char *identity_now(const phx__runtime *rt, const char *key, const char *threads) {
  if (strcmp(key, "device") == 0) return rt->device->name;
  if (strcmp(key, "threads") == 0) return threads;
  if (strcmp(key, "phalanx") == 0) return PHX__VERSION;
  return NULL;
}

static void say_identity(const phx__runtime *rt, const phx__manifest *m) {
  char text[512], threads[24];
  snprintf(threads, sizeof threads, "%d", rt->device->threads);
  for (uint32_t i = 0; i < m->n_identity; i++) {
    const phx__manifest_pair *p = &m->identity[i];
    const char *now = identity_now(rt, p->key, threads);
    if (!now || strcmp(now, p->value) == 0) continue;
    snprintf(text, sizeof text, "%s was %.200s and is %.200s: the same bits are not promised across this", p->key,
             p->value, now);
    say(rt, text);
  }
}

static void say_privates(const load_walk *walk) {
  const phx__manifest *m = walk->reader->manifest;
  const phx__manifest_plugin *p = phx__manifest_plugin_of(m, "strategy");
  char text[512];
  for (uint32_t i = 0; i < m->n_privates; i++) {
    bool said = false;
    for (uint32_t j = 0; j < i && !said; j++) said = strcmp(m->privates[j].name, m->privates[i].name) == 0;
    if (said || walk->private_fits) continue;
    snprintf(text, sizeof text, "state %s is private to strategy %s on %d ranks, and left out", m->privates[i].name,
             p ? p->id : "?", m->ranks);
    say(walk->rt, text);
  }
}

static void say_restart(const phx__runtime *rt, const phx__fit *fit) {
  char text[700];
  snprintf(text, sizeof text, "%s: the order of the sequences begins anew (data.on_change = restart)", fit->difference);
  phx__log(rt->job->rank, "checkpoint", PHX_LOG_WARN, text);
}

/* Another number of sequences in a step changes what the run learns: with the arithmetic, and how to keep it. */
static void say_batch(const phx__runtime *rt, const phx__manifest *m) {
  const phx__prepared *p = rt->prepared;
  const int64_t once = p->shape.micro * p->layout.data_size, now = once * p->topology.accumulate;
  char text[512], keep[160];
  if (m->data_batch == 0 || m->samples == 0 || m->data_batch == now) return;
  snprintf(keep, sizeof keep, "batch.micro x accumulate x %d ranks cannot make %" PRId64 " as they are",
           p->layout.data_size, m->data_batch);
  if (m->data_batch % once == 0)
    snprintf(keep, sizeof keep, "batch.accumulate = %" PRId64 " keeps it", m->data_batch / once);
  snprintf(text, sizeof text,
           "a step takes %" PRId64 " sequences (micro %" PRId64 " x accumulate %d x %d ranks), and took %" PRId64
           " before: the run learns in other steps than it would have; %s", now, p->shape.micro, p->topology.accumulate,
           p->layout.data_size, m->data_batch, keep);
  phx__log(rt->job->rank, "checkpoint", PHX_LOG_WARN, text);
}

static void say_all(const load_walk *walk, const char *path) {
  const phx__runtime *rt = walk->rt;
  const phx__manifest *m = walk->reader->manifest;
  const phx__config *c = rt->config;
  difference d = {rt, m};
  char text[PHX__CHECKPOINT_PATH + 200];
  snprintf(text, sizeof text, "%s: step %" PRId64 ", %" PRId64 " sequences, state_hash %s", path, m->step, m->samples,
           m->state_hash);
  say(rt, text);
  snprintf(text, sizeof text, "the world size was %d and is %d", m->ranks, rt->job->size);
  if (m->ranks != rt->job->size) say(rt, text);
  say_plugin(rt, m, "strategy", c->strategy.plugin);
  say_plugin(rt, m, "model", c->model.plugin);
  say_plugin(rt, m, "device", c->device.plugin);
  say_plugin(rt, m, "comm", c->comm.plugin);
  say_plugin(rt, m, "optimizer", c->optimizer.plugin);
  say_identity(rt, m);
  phx__config_each(c, say_config, &d);
  say_batch(rt, m);
  say_privates(walk);
}

/* ---- one checkpoint ---- */
/* Ranks share the files among them. */
static phx_status check_headers(const load_walk *walk, phx_error *err) {
  phx_status status = PHX_OK;
  const uint32_t ranks = (uint32_t)walk->rt->job->size;
  for (uint32_t f = (uint32_t)walk->rt->job->rank; f < walk->reader->manifest->n_files && !status; f += ranks)
    status = phx__checkpoint_reader_header(walk->reader, f, err);
  return status;
}

phx_status phx__checkpoint_load(phx__runtime *rt, const char *path, phx__resumed *out, phx_error *err) {
  load_walk walk = {.rt = rt};
  phx_error why = PHX_ERROR_INIT;
  phx__verdict verdict = {0};
  phx__fit fit = {.restart = false};
  char hash[33];
  phx_status status = phx__checkpoint_reader_open(path, &walk.reader, &why);
  const phx__manifest *m = status ? NULL : walk.reader->manifest;
  if (!status) status = phx__manifest_fits(path, m, rt->prepared, &fit, &why);
  if (!status) status = check_headers(&walk, &why);
  walk.from_zero = !status && !phx__manifest_same_optimizer(m, rt->prepared);
  if (walk.from_zero) walk.zeros = phx__calloc(PART, PHX_BLOCK * sizeof *walk.zeros);
  if (walk.from_zero && !walk.zeros) status = phx_fail(&why, PHX_NOMEM, "no memory to load %s", path);
  PHX_TRY_GOTO(phx__agree(rt, status, &why, NULL, err), status, done);
  const phx__manifest_plugin *saved_by = phx__manifest_plugin_of(m, "strategy");
  walk.private_fits = saved_by && strcmp(saved_by->id, rt->config->strategy.plugin->descriptor->id) == 0 &&
                      m->ranks == rt->job->size;
  PHX_TRY_GOTO(phx__state_prepare(rt, PHX_PREPARE_LOAD, err), status, done);
  status = phx__optim_state_changes(&rt->optim, &why);
  if (!status) status = phx__state_visit(rt, load_slice, &walk, &why);
  verdict.hash = walk.hash;
  verdict.value = fit.restart; /* rank 0 knows the contents of the data, others may not */
  PHX_TRY_GOTO(phx__agree(rt, status, &why, &verdict, err), status, done);
  phx__state_hash_text(verdict.sum, hash);
  if (strcmp(hash, m->state_hash) != 0) {
    status = phx_fail(err, PHX_IO, "%s: the state that was read hashes to %s, and the manifest says %s", path, hash,
                      m->state_hash);
    goto done;
  }
  const phx_restored restored = {.struct_size = sizeof restored,
                                 .what = walk.private_fits ? PHX_RESTORED_PRIVATE : PHX_RESTORED_STATE,
                                 .world_size = m->ranks, .step = m->step, .privates = walk.privates};
  PHX_TRY_GOTO(phx__state_filled(rt, &restored, err), status, done);
  if (rt->job->rank == 0) say_all(&walk, path);
  if (rt->job->rank == 0 && fit.restart) say_restart(rt, &fit);
  out->at = (phx__position){
      .step = m->step, .samples = verdict.most ? 0 : m->samples, .skipped = m->skipped};
  snprintf(out->path, sizeof out->path, "%s", path);
done:
  phx__free(walk.zeros);
  phx__checkpoint_reader_close(walk.reader);
  return status;
}

/* ---- the newest that is whole ---- */
static phx_status load_newest(phx__runtime *rt, const char *run_dir, phx__resumed *out, phx_error *err) {
  char path[PHX__CHECKPOINT_PATH], text[PHX__CHECKPOINT_PATH + 700];
  for (int64_t below = INT64_MAX, passed = 0;; passed++) {
    phx_error why = PHX_ERROR_INIT;
    phx__verdict verdict = {.value = -1};
    bool found = false;
    phx_status status = PHX_OK;
    if (rt->job->rank == 0) status = phx__checkpoint_newest(run_dir, below, &verdict.value, &found, &why);
    status = phx__agree(rt, status, &why, &verdict, err); /* rank 0 chooses */
    if (status) return status;
    if (verdict.first < 0)
      return phx_fail(err, passed ? PHX_IO : PHX_INVALID, "%s has no %scheckpoint", run_dir, passed ? "whole " : "");
    status = phx__checkpoint_path(run_dir, verdict.first, path, &why);
    status = phx__agree(rt, status, &why, NULL, err);
    if (!status) status = phx__checkpoint_load(rt, path, out, err ? err : &why);
    if (status != PHX_IO) return status;
    snprintf(text, sizeof text, "%s cannot be used, the one before is tried: %s", path, (err ? err : &why)->message);
    if (rt->job->rank == 0) phx__log(0, "checkpoint", PHX_LOG_WARN, text);
    below = verdict.first;
  }
}

phx_status phx__checkpoint_resume(phx__runtime *rt, const char *dir, phx__resumed *out, phx_error *err) {
  char run_dir[PHX__CHECKPOINT_PATH], path[PHX__CHECKPOINT_PATH];
  phx_error why = PHX_ERROR_INIT;
  int64_t step = -1;
  phx_status status = phx__checkpoint_locate(dir, run_dir, &step, &why);
  if (!status && step >= 0 && !realpath(dir, path))
    status = phx_fail(&why, PHX_IO, "cannot find the checkpoint %s", dir);
  status = phx__agree(rt, status, &why, NULL, err);
  if (status) return status;
  return step >= 0 ? phx__checkpoint_load(rt, path, out, err) : load_newest(rt, run_dir, out, err);
}
