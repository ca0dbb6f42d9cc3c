/* core/checkpoint/checkpoint.c - saving: see checkpoint.h.  phx__checkpoint_save at the bottom is the order of things.
 *
 * What it does not do: decide when, or read anything back (checkpoint_load.c), or remove old ones (checkpoint_dir.c).
 * Invariant: the ranks agree after each phase, so that either all go on or all have given up, with one message; the
 * part directory becomes a checkpoint by one rename, after every file in it and the directory itself were flushed.
 * Memory: the table of slices, PHX__STREAM_MEMORY, checksums (32 bytes per MiB written), and while committing
 * the tables of all ranks.
 * Threads: [main]; write, flush and publish in a saver's thread, if one wants to. */
#include "checkpoint/checkpoint.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <string.h>
#include <sys/random.h>
#include <unistd.h>

#include "base/status.h"
#include "base/sys.h"
#include "checkpoint/checkpoint_agree.h"
#include "checkpoint/checkpoint_dir.h"
#include "checkpoint/disk_room.h"
#include "checkpoint/manifest.h"
#include "engine/state.h"
#include "engine/state_io.h"
#include "engine/state_visit.h"
#include "job/run_lock.h"

enum { WRITE_BLOCKS = PHX__CHUNK_BYTES / (PHX_BLOCK * 4) }; /* hashed, then written while it is in the cache */

typedef struct part_table { /* what a rank tells rank 0, in front of its slices, privates and checksums */
  int64_t slices, privates, sums, file_bytes;
} part_table;

typedef struct tables { /* of all ranks, one after the other, stride bytes each */
  part_table heads[PHX_RANKS_MAX];
  char *mine, *all;
  int64_t stride;
} tables;

struct phx__save {
  phx__runtime *rt;
  phx__position at;
  char run_dir[PHX__CHECKPOINT_PATH], part[PHX__CHECKPOINT_PATH], file[64];
  phx_slice *slices; /* (n) */
  char (*names)[96]; /* (n) of the tensors */
  char (*private_names)[64]; /* (n) "" where it is none */
  phx__tensor *tensors;      /* (n) with their places in the file */
  size_t n, room;
  phx__safetensors_writer *writer;
  uint64_t *sums; /* (n_sums) */
  int64_t n_sums, file_bytes;
  phx__state_hash hash;
  tables tables;
  int64_t all_bytes;    /* of all files */
  phx__state_hash whole; /* of all ranks, once gathered */
  bool made_part, flushed, gathered, published;
  phx_status status; /* the first failure of this rank's part */
  phx_error error;
};

static phx_status note(phx__save *s, phx_status status, const phx_error *why, phx_error *err) {
  if (status && !s->status) {
    s->status = status;
    s->error = *why;
  }
  if (status && err) *err = *why;
  return status;
}

/* ---- the table of slices ---- */
static phx_status grow(phx__save *s, phx_error *err) {
  const size_t room = s->room ? s->room * 2 : 64;
  void *slices = phx__sys.realloc(s->slices, room * sizeof *s->slices);
  if (slices) s->slices = slices;
  void *names = slices ? phx__sys.realloc(s->names, room * sizeof *s->names) : NULL;
  if (names) s->names = names;
  void *privates = names ? phx__sys.realloc(s->private_names, room * sizeof *s->private_names) : NULL;
  if (!privates) return phx_fail(err, PHX_NOMEM, "no memory for the table of a checkpoint's slices");
  s->private_names = privates;
  s->room = room;
  return PHX_OK;
}

static phx_status name_slice(const phx__save *s, const phx_slice *slice, char name[96], char private_name[64],
                             phx_error *err) {
  private_name[0] = 0;
  if (slice->kind == PHX_STATE_PRIVATE) {
    if (!slice->name || strlen(slice->name) >= 48 || strchr(slice->name, '/'))
      return phx_fail(err, PHX_UNSUPPORTED, "the strategy's private state has no name below 48 bytes without '/'");
    snprintf(private_name, 64, "%s", slice->name);
    snprintf(name, 96, "private.%s/%u/%u/%" PRId64, slice->name, slice->unit, slice->flat, slice->first_block);
    return PHX_OK;
  }
  static const char *const kinds[] = {"weight", "master", "", "buffer"};
  const char *kind = slice->kind == PHX_STATE_OPTIM ? s->rt->optim.table.states[slice->state_index].name
                                                    : kinds[slice->kind];
  snprintf(name, 96, "%s/%u/%u/%" PRId64, kind, slice->unit, slice->flat, slice->first_block);
  return PHX_OK;
}

static phx_status add_slice(void *ctx, const phx_slice *slice, phx_error *err) {
  phx__save *s = ctx;
  if (phx__state_derived(slice)) return PHX_OK;
  if (s->n == s->room) PHX_TRY(grow(s, err));
  PHX_TRY(name_slice(s, slice, s->names[s->n], s->private_names[s->n], err));
  s->slices[s->n] = *slice;
  s->slices[s->n].name = NULL; /* set when the table has stopped moving */
  s->n++;
  return PHX_OK;
}

static phx_status make_tensors(phx__save *s, phx_error *err) {
  s->tensors = phx__calloc(s->n, sizeof *s->tensors);
  if (!s->tensors) return phx_fail(err, PHX_NOMEM, "no memory for the table of a checkpoint's slices");
  for (size_t i = 0; i < s->n; i++) {
    s->tensors[i] = (phx__tensor){.name = s->names[i], .dtype = s->slices[i].dtype, .ndim = 1};
    s->tensors[i].shape[0] = s->slices[i].blocks * PHX_BLOCK;
    if (s->private_names[i][0]) s->slices[i].name = s->private_names[i];
  }
  return PHX_OK;
}

/* ---- begin ---- */
static phx_status make_part(phx__save *s, uint64_t *nonce, phx_error *err) {
  char dir[PHX__CHECKPOINT_PATH];
  int64_t swept = 0;
  phx_status status = phx__run_lock_check(err);
  if (!status) status = phx__path_join(dir, s->run_dir, PHX__CHECKPOINTS, err);
  if (!status) status = phx__dir_make(dir, err);
  if (!status) status = phx__checkpoint_sweep(s->run_dir, &swept, err);
  if (!status)
    status = phx__disk_room_for(s->run_dir, phx__checkpoint_bytes(s->rt->prepared),
                           "a checkpoint", err);
  if (!status && getrandom(nonce, sizeof *nonce, 0) != (ssize_t)sizeof *nonce)
    status = phx_fail_errno(err, PHX_IO, errno, "no random number for the name of a checkpoint");
  return status;
}

static phx_status name_part(phx__save *s, uint64_t nonce, phx_error *err) {
  char name[96], leaf[PHX__CHECKPOINT_NAME];
  phx__checkpoint_name(s->at.step, leaf);
  snprintf(name, sizeof name, "%s/.%s.%016" PRIx64 ".part", PHX__CHECKPOINTS, leaf, nonce);
  return phx__path_join(s->part, s->run_dir, name, err);
}

static phx_status create_file(phx__save *s, phx_error *err) {
  char path[PHX__CHECKPOINT_PATH], step[24];
  snprintf(s->file, sizeof s->file, "rank-%05d.safetensors", s->rt->job->rank);
  snprintf(step, sizeof step, "%" PRId64, s->at.step);
  const char *const metadata[] = {"format", "phalanx-checkpoint", "step", step, NULL};
  PHX_TRY(phx__state_visit(s->rt, add_slice, s, err));
  PHX_TRY(make_tensors(s, err));
  PHX_TRY(phx__path_join(path, s->part, s->file, err));
  PHX_TRY(phx__safetensors_create(path, s->tensors, (uint32_t)s->n, metadata, true, &s->writer, err));
  memcpy(s->tensors, s->writer->tensors, s->n * sizeof *s->tensors);
  s->file_bytes = s->writer->file.bytes;
  s->n_sums = phx__chunks_count(s->file_bytes);
  s->sums = phx__calloc((size_t)s->n_sums, sizeof *s->sums);
  return s->sums ? PHX_OK : phx_fail(err, PHX_NOMEM, "no memory for the checksums of %s", path);
}

static void free_save(phx__save *s) {
  phx__safetensors_writer_close(s->writer);
  phx__free(s->tables.all);
  phx__free(s->tables.mine);
  phx__free(s->sums);
  phx__free(s->tensors);
  phx__free(s->private_names);
  phx__free(s->names);
  phx__free(s->slices);
  phx__free(s);
}

/* After an agreement: no rank writes any more, and what is open may be unlinked. */
static void give_up(phx__save *s) {
  phx_error ignored = PHX_ERROR_INIT;
  if (s->made_part && phx__checkpoint_remove(s->part, &ignored))
    phx__log(s->rt->job->rank, "checkpoint", PHX_LOG_WARN, ignored.message); /* the next save removes it */
}

phx_status phx__save_begin(phx__runtime *rt, const char *run_dir, const phx__position *at, phx__save **out,
                           phx_error *err) {
  phx_error why = PHX_ERROR_INIT;
  phx__verdict verdict = {0};
  uint64_t nonce = 0;
  phx_status status = PHX_OK;
  phx__save *s = phx__calloc(1, sizeof *s);
  if (!s) status = phx_fail(&why, PHX_NOMEM, "no memory to save a checkpoint");
  if (s) {
    s->rt = rt;
    s->at = *at;
    if (snprintf(s->run_dir, sizeof s->run_dir, "%s", run_dir) >= (int)sizeof s->run_dir)
      status = phx_fail(&why, PHX_INVALID, "%.200s...: the path is too long", run_dir);
    if (!status && rt->job->rank == 0) status = make_part(s, &nonce, &why);
  }
  verdict.value = (int64_t)nonce;
  status = phx__agree(rt, status, &why, &verdict, err);
  if (status) goto done;
  status = name_part(s, (uint64_t)verdict.first, &why);
  if (!status && rt->job->rank == 0) {
    if (phx__sys.mkdir(s->part, 0755))
      status = phx_fail_errno(&why, PHX_IO, errno, "cannot create the directory %s", s->part);
    s->made_part = !status;
  }
  status = phx__agree(rt, status, &why, NULL, err);
  if (status) goto done;
  status = phx__state_prepare(rt, PHX_PREPARE_SAVE, &why);
  if (!status) status = create_file(s, &why);
  status = phx__agree(rt, status, &why, NULL, err);
done:
  if (!status) *out = s;
  else if (s) {
    give_up(s);
    free_save(s);
  }
  return status;
}

/* ---- write and flush ---- */
size_t phx__save_n(const phx__save *s) { return s->n; }
const phx_slice *phx__save_slice(const phx__save *s, size_t i) { return &s->slices[i]; }
int64_t phx__save_bytes(const phx__save *s) { return s->file_bytes; }
int64_t phx__save_step(const phx__save *s) { return s->at.step; }

phx_status phx__save_write(phx__save *s, size_t i, int64_t first, int64_t blocks, const void *data, phx_error *err) {
  phx_error why = s->error;
  phx_status status = s->status;
  phx_slice part = s->slices[i];
  const int64_t block_bytes = PHX_BLOCK * (int64_t)phx_dtype_bytes(part.dtype);
  for (int64_t done = 0; done < blocks && !status; done += part.blocks) {
    const char *at = (const char *)data + done * block_bytes;
    part.first_block = s->slices[i].first_block + first + done;
    part.blocks = blocks - done < WRITE_BLOCKS ? blocks - done : WRITE_BLOCKS;
    if (part.kind != PHX_STATE_PRIVATE) phx__state_hash_slice(&s->hash, s->rt->prepared->model, &part, at);
    status = phx__safetensors_write(s->writer, (uint32_t)i, (first + done) * block_bytes, part.blocks * block_bytes, at,
                                    &why);
  }
  return note(s, status, &why, err);
}

void phx__save_fail(phx__save *s, phx_status status, const phx_error *why) { note(s, status, why, NULL); }

phx_status phx__save_flush(phx__save *s, phx_error *err) {
  phx_error why = s->error;
  phx_status status = s->status;
  if (!status) status = phx__safetensors_finish(s->writer, s->sums, &why);
  phx__safetensors_writer_close(s->writer);
  s->writer = NULL;
  s->flushed = true;
  return note(s, status, &why, err);
}

/* ---- commit ---- */
static int64_t table_bytes(const part_table *t) {
  return t->slices * (int64_t)sizeof(phx__manifest_slice) + t->privates * (int64_t)sizeof(phx__manifest_private) +
         t->sums * (int64_t)sizeof(uint64_t);
}

static void pack(const phx__save *s, const part_table *head, char *out) {
  char *at = out, *privates = out + head->slices * (int64_t)sizeof(phx__manifest_slice);
  const uint32_t rank = (uint32_t)s->rt->job->rank;
  for (size_t i = 0; i < s->n; i++) {
    const phx_slice *p = &s->slices[i];
    if (p->kind != PHX_STATE_PRIVATE) {
      const phx__manifest_slice row = {.kind = p->kind, .index = p->kind == PHX_STATE_OPTIM ? p->state_index : 0,
                                       .unit = p->unit, .flat = p->flat, .first_block = p->first_block,
                                       .blocks = p->blocks, .dtype = p->dtype, .file = rank,
                                       .offset = s->tensors[i].begin};
      memcpy(at, &row, sizeof row);
      at += sizeof row;
      continue;
    }
    phx__manifest_private row = {.rank = (int32_t)rank, .unit = p->unit, .flat = p->flat,
                                 .first_block = p->first_block, .blocks = p->blocks, .dtype = p->dtype, .file = rank,
                                 .offset = s->tensors[i].begin};
    memcpy(row.name, s->private_names[i], sizeof row.name);
    memcpy(privates, &row, sizeof row);
    privates += sizeof row;
  }
  memcpy(privates, s->sums, (size_t)head->sums * sizeof *s->sums);
}

/* Collective: every rank's table, on every rank. */
static phx_status gather_tables(phx__save *s, phx_error *err) {
  phx__runtime *rt = s->rt;
  tables *t = &s->tables;
  phx_error why = PHX_ERROR_INIT;
  part_table mine = {.sums = s->n_sums, .file_bytes = s->file_bytes};
  for (size_t i = 0; i < s->n; i++) *(s->slices[i].kind == PHX_STATE_PRIVATE ? &mine.privates : &mine.slices) += 1;
  phx_status status = rt->core->all_gather(rt->core->ctx, &mine, t->heads, (int64_t)(sizeof mine / sizeof(int64_t)),
                                           PHX_I64, NULL, err);
  if (status) return status;
  t->stride = 8;
  for (int32_t r = 0; r < rt->core->size; r++) {
    if (table_bytes(&t->heads[r]) > t->stride) t->stride = table_bytes(&t->heads[r]);
    s->all_bytes += t->heads[r].file_bytes;
  }
  t->mine = phx__calloc(1, (size_t)t->stride);
  t->all = phx__calloc((size_t)rt->core->size, (size_t)t->stride);
  if (!t->mine || !t->all) status = phx_fail(&why, PHX_NOMEM, "no memory for the table of a checkpoint's slices");
  status = phx__agree(rt, status, &why, NULL, err);
  if (status) return status;
  pack(s, &mine, t->mine);
  return rt->core->all_gather(rt->core->ctx, t->mine, t->all, t->stride, PHX_U8, NULL, err);
}

static phx_status describe_run(const phx__save *s, phx__manifest *m, phx_error *err) {
  const phx__runtime *rt = s->rt;
  char threads[24];
  m->step = s->at.step;
  m->samples = s->at.samples;
  m->skipped = s->at.skipped;
  snprintf(threads, sizeof threads, "%d", rt->device->threads);
  PHX_TRY(phx__checkpoint_describe(m, rt->prepared, rt->job->size, err));
  PHX_TRY(phx__manifest_add_identity(m, "phalanx", PHX__VERSION, err));
  PHX_TRY(phx__manifest_add_identity(m, "device", rt->device->name, err));
  PHX_TRY(phx__manifest_add_identity(m, "threads", threads, err));
  return PHX_OK;
}

static phx_status describe_parts(const phx__save *s, phx__manifest *m, phx_error *err) {
  const tables *t = &s->tables;
  phx_status status = PHX_OK;
  for (int32_t r = 0; r < s->rt->core->size && !status; r++) {
    const part_table *head = &t->heads[r];
    const char *at = t->all + r * t->stride;
    char name[64];
    uint64_t *sums = phx__calloc((size_t)head->sums, sizeof *sums);
    if (!sums) return phx_fail(err, PHX_NOMEM, "no memory for the manifest of a checkpoint");
    for (int64_t i = 0; i < head->slices && !status; i++, at += sizeof(phx__manifest_slice)) {
      phx__manifest_slice row;
      memcpy(&row, at, sizeof row);
      status = phx__manifest_add_slice(m, &row, err);
    }
    for (int64_t i = 0; i < head->privates && !status; i++, at += sizeof(phx__manifest_private)) {
      phx__manifest_private row;
      memcpy(&row, at, sizeof row);
      status = phx__manifest_add_private(m, &row, err);
    }
    snprintf(name, sizeof name, "rank-%05d.safetensors", r);
    if (!status) memcpy(sums, at, (size_t)head->sums * sizeof *sums);
    if (!status) status = phx__manifest_add_file(m, name, head->file_bytes, sums, err);
    phx__free(sums);
  }
  return status;
}

/* Rank 0: from here on the checkpoint is there, or nothing of it. */
static phx_status publish(phx__save *s, phx_error *err) {
  char dir[PHX__CHECKPOINT_PATH], path[PHX__CHECKPOINT_PATH];
  phx_error ignored = PHX_ERROR_INIT;
  phx_status status = PHX_OK;
  phx__manifest *m = phx__manifest_create();
  if (!m) return phx_fail(err, PHX_NOMEM, "no memory for the manifest of a checkpoint");
  phx__state_hash_text(s->whole, m->state_hash);
  PHX_TRY_GOTO(describe_run(s, m, err), status, done);
  PHX_TRY_GOTO(describe_parts(s, m, err), status, done);
  PHX_TRY_GOTO(phx__manifest_write(s->part, m, err), status, done);
  PHX_TRY_GOTO(phx__dir_flush(s->part, err), status, done);
  PHX_TRY_GOTO(phx__dir_flush(s->run_dir, err), status, done); /* begin may have made `checkpoints` in it */
  PHX_TRY_GOTO(phx__path_join(dir, s->run_dir, PHX__CHECKPOINTS, err), status, done);
  PHX_TRY_GOTO(phx__checkpoint_path(s->run_dir, s->at.step, path, err), status, done);
  PHX_TRY_GOTO(phx__run_lock_check(err), status, done);
  if (phx__sys.rename(s->part, path)) {
    status = phx_fail_errno(err, PHX_IO, errno, "cannot rename %s to %s", s->part, path);
    goto done;
  }
  status = phx__dir_flush(dir, err);
  if (status && !phx__sys.rename(path, s->part)) goto done; /* it may not survive a power cut: not a checkpoint */
  if (status) phx__checkpoint_retire(s->run_dir, s->at.step, &ignored);
done:
  phx__manifest_free(m);
  return status;
}

/* What goes wrong after the commit takes nothing back.  A flush of the directory that failed is not made good by
 * another one: nothing is removed then. */
static void after_commit(const phx__save *s, const phx__retention *retention) {
  phx_error why = PHX_ERROR_INIT;
  char text[700];
  if (phx__run_lock_check(&why) || phx__checkpoint_point(s->run_dir, s->at.step, &why)) {
    snprintf(text, sizeof text, "step %" PRId64 " is saved, but `latest` was not moved, and old ones stay: %s",
             s->at.step, why.message);
    phx__log(s->rt->job->rank, "checkpoint", PHX_LOG_WARN, text);
  } else if (retention && phx__checkpoint_retain(s->run_dir, retention, &why)) {
    snprintf(text, sizeof text, "step %" PRId64 " is saved, but an old one was not removed: %s", s->at.step,
             why.message);
    phx__log(s->rt->job->rank, "checkpoint", PHX_LOG_WARN, text);
  }
}

phx_status phx__save_gather(phx__save *s, phx_error *err) {
  phx__verdict verdict = {.hash = s->hash};
  if (!s->flushed && !s->status)
    s->status = phx_fail(&s->error, PHX_STATE, "a save was not flushed before its commit");
  phx_status status = phx__agree(s->rt, s->status, &s->error, &verdict, err);
  if (!status) status = gather_tables(s, err);
  s->whole = verdict.sum;
  s->gathered = !status;
  if (!status) return PHX_OK;
  give_up(s);
  free_save(s);
  return status;
}

void phx__save_publish(phx__save *s, const phx__retention *retention) {
  phx_error why = PHX_ERROR_INIT;
  if (s->rt->job->rank == 0) note(s, publish(s, &why), &why, NULL);
  s->published = true;
  if (s->rt->job->rank == 0 && !s->status) after_commit(s, retention);
}

int64_t phx__save_all_bytes(const phx__save *s) { return s->all_bytes; }

phx_status phx__save_end(phx__save *s, int64_t *most, phx_error *err) {
  phx__verdict verdict = {.value = most ? *most : 0};
  const phx_status status = phx__agree(s->rt, s->status, &s->error, &verdict, err);
  if (s->status) give_up(s);
  if (!status && most) *most = verdict.most;
  free_save(s);
  return status;
}

/* Once gathered the files are rank 0's, which may be publishing them. */
void phx__save_abandon(phx__save *s) {
  char path[PHX__CHECKPOINT_PATH];
  if (!s) return;
  if (s->gathered && (s->status || !s->published)) give_up(s);
  if (!s->gathered) {
    if (!phx__path_join(path, s->part, s->file, NULL)) phx__sys.unlink(path);
    phx__sys.rmdir(s->part); /* the last one succeeds */
  }
  free_save(s);
}

/* ---- at once ---- */
typedef struct save_walk {
  phx__save *save;
  size_t i;
} save_walk;

static phx_status save_part(void *ctx, const void *data, int64_t at, int64_t bytes, phx_error *err) {
  const save_walk *walk = ctx;
  const phx_slice *slice = &walk->save->slices[walk->i];
  const phx_slice part = phx__slice_part(slice, at, bytes);
  return phx__save_write(walk->save, walk->i, part.first_block - slice->first_block, part.blocks, data, err);
}

static phx_status save_slice(void *ctx, const phx_slice *slice, phx_error *err) {
  save_walk *walk = ctx;
  if (phx__state_derived(slice)) return PHX_OK;
  const phx_status status = phx__slice_read(walk->save->rt, slice, save_part, walk, err);
  walk->i++;
  return status;
}

phx_status phx__checkpoint_save(phx__runtime *rt, const char *run_dir, const phx__position *at,
                                const phx__retention *retention, int64_t *bytes, phx_error *err) {
  save_walk walk = {0};
  phx_error why = PHX_ERROR_INIT;
  PHX_TRY(phx__save_begin(rt, run_dir, at, &walk.save, err));
  phx_status status = phx__state_visit(rt, save_slice, &walk, &why);
  note(walk.save, status, &why, NULL); /* commit tells the others */
  phx__save_flush(walk.save, NULL);
  PHX_TRY(phx__save_gather(walk.save, err));
  if (bytes) *bytes = phx__save_all_bytes(walk.save);
  phx__save_publish(walk.save, retention);
  return phx__save_end(walk.save, NULL, err);
}
