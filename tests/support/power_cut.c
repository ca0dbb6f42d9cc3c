/* tests/support/power_cut.c - see power_cut.h. */
#include "power_cut.h"

#include <dirent.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "checkpoint/safetensors.h"

enum { NAMES = 1 << 10, KNOWN = 1 << 18, EVERY_SET = 6, RANDOM_SETS = 24 };
enum { LOST = 0, KEPT = 1, TORN = 2 };

typedef struct file { /* of an object, in one state */
  unsigned char *bytes;
  int64_t size, room;
} file;

typedef struct name {
  int32_t dir, object;
  const char *text;
} name;

typedef struct builder {
  const sys_record *record;
  int32_t *durable; /* (entries) the entry that flushes it, or INT_MAX */
  file *files;      /* (objects) */
  name *names;      /* (n_names) */
  int32_t n_names;
  unsigned char *text; /* the state in one piece: what is hashed */
  int64_t n_text, text_room;
  /* the choice */
  int32_t n;           /* entries that were made */
  unsigned char *fate; /* (entries) of those that are not durable */
  int64_t block;       /* bytes that are torn off at once */
  uint64_t seed;
  unsigned char garbage; /* what lost blocks read as */
  bool lengths;          /* of torn writes are there */
} builder;

static uint64_t mix(uint64_t x) {
  x = (x ^ x >> 31) * 0x9e3779b97f4a7c15u;
  x = (x ^ x >> 29) * 0xbf58476d1ce4e5b9u;
  return x ^ x >> 32;
}

static bool is_name_change(const sys_record_entry *e) {
  return e->kind <= SYS_RECORD_RENAME;
}
static bool is_data(const sys_record_entry *e) {
  return e->kind == SYS_RECORD_SIZE || e->kind == SYS_RECORD_WRITE;
}

static void set_durable(builder *b, bool file_syncs, bool dir_syncs) {
  for (int32_t i = 0; i < b->record->n_entries; i++) {
    const sys_record_entry *e = &b->record->entries[i];
    const int32_t object = is_name_change(e) ? e->dir : e->object;
    b->durable[i] = INT_MAX;
    if (!is_name_change(e) && !is_data(e)) continue;
    if (!(is_name_change(e) ? dir_syncs : file_syncs)) continue;
    for (int32_t s = i + 1; s < b->record->n_entries && b->durable[i] == INT_MAX; s++)
      if (b->record->entries[s].kind == SYS_RECORD_SYNC && b->record->entries[s].object == object) b->durable[i] = s;
  }
}

static bool pending(const builder *b, int32_t i) {
  return i < b->n && b->durable[i] >= b->n &&
         (is_name_change(&b->record->entries[i]) || is_data(&b->record->entries[i]));
}

/* ---- one state ---- */
static void set_size(file *f, int64_t size) {
  if (size > f->room) {
    f->room = size * 2;
    f->bytes = realloc(f->bytes, (size_t)f->room);
    if (!f->bytes) abort();
  }
  if (size > f->size) memset(f->bytes + f->size, 0, (size_t)(size - f->size));
  f->size = size;
}

static void apply_write(builder *b, int32_t i, int fate) {
  const sys_record_entry *e = &b->record->entries[i];
  file *f = &b->files[e->object];
  const unsigned char *data = b->record->data + e->data;
  if (fate == LOST) return;
  if (fate == KEPT || b->lengths)
    if (e->at + e->bytes > f->size) set_size(f, e->at + e->bytes);
  for (int64_t at = e->at; at < e->at + e->bytes;) {
    const int64_t end_of_block = (at / b->block + 1) * b->block, end = e->at + e->bytes;
    const int64_t part = (end_of_block < end ? end_of_block : end) - at;
    if (fate == KEPT || mix(b->seed ^ mix((uint64_t)i << 32 ^ (uint64_t)(at / b->block))) % 2) {
      if (at + part > f->size) set_size(f, at + part);
      memcpy(f->bytes + at, data + (at - e->at), (size_t)part);
    } else if (b->garbage && at + part <= f->size) {
      memset(f->bytes + at, b->garbage, (size_t)part);
    }
    at += part;
  }
}

static void drop_name(builder *b, int32_t dir, const char *text) {
  for (int32_t i = 0; i < b->n_names; i++)
    if (b->names[i].dir == dir && !strcmp(b->names[i].text, text)) {
      b->names[i] = b->names[--b->n_names];
      return;
    }
}
static void set_name(builder *b, int32_t dir, const char *text, int32_t object) {
  drop_name(b, dir, text);
  if (b->n_names == NAMES) abort();
  b->names[b->n_names++] = (name){dir, object, text};
}

static void apply(builder *b, int32_t i, int fate) {
  const sys_record_entry *e = &b->record->entries[i];
  switch (e->kind) {
    case SYS_RECORD_CREATE:
    case SYS_RECORD_MKDIR:
      set_name(b, e->dir, e->name, e->object);
      break;
    case SYS_RECORD_REMOVE:
      drop_name(b, e->dir, e->name);
      break;
    case SYS_RECORD_RENAME:
      drop_name(b, e->dir, e->name);
      set_name(b, e->dir, e->to, e->object);
      break;
    case SYS_RECORD_SIZE:
      set_size(&b->files[e->object], e->at);
      break;
    case SYS_RECORD_WRITE:
      apply_write(b, i, fate);
      break;
    case SYS_RECORD_SYNC:
    case SYS_RECORD_MARK:
      break;
  }
}

static void put(builder *b, const void *data, int64_t bytes) {
  if (b->n_text + bytes > b->text_room) {
    b->text_room = 2 * (b->n_text + bytes);
    b->text = realloc(b->text, (size_t)b->text_room);
    if (!b->text) abort();
  }
  if (bytes) memcpy(b->text + b->n_text, data, (size_t)bytes);
  b->n_text += bytes;
}

static int by_name(const void *a, const void *b) {
  return strcmp((*(const name *const *)a)->text, (*(const name *const *)b)->text);
}

/* What can be reached, in the order of names; with `where`, it is made there, too. */
static void walk(builder *b, int32_t dir, const char *where, int depth) {
  const name *here[NAMES];
  size_t n = 0;
  char path[PATH_MAX];
  if (depth > 8) abort();
  for (int32_t i = 0; i < b->n_names; i++)
    if (b->names[i].dir == dir) here[n++] = &b->names[i];
  qsort(here, n, sizeof *here, by_name);
  put(b, &n, sizeof n);
  for (size_t i = 0; i < n; i++) {
    const file *f = &b->files[here[i]->object];
    const bool is_dir = b->record->objects[here[i]->object].is_dir;
    if (where && snprintf(path, sizeof path, "%s/%s", where, here[i]->text) >= (int)sizeof path) abort();
    put(b, here[i]->text, (int64_t)strlen(here[i]->text) + 1);
    if (!is_dir) {
      put(b, &f->size, sizeof f->size);
      put(b, f->bytes, f->size);
    }
    if (where && is_dir && mkdir(path, 0755)) abort();
    if (where && !is_dir) {
      const int fd = open(path, O_WRONLY | O_CREAT | O_EXCL, 0644);
      if (fd < 0 || write(fd, f->bytes, (size_t)f->size) != (ssize_t)f->size || close(fd)) abort();
    }
    if (is_dir) walk(b, here[i]->object, where ? path : NULL, depth + 1);
  }
}

static uint64_t build(builder *b) {
  for (int32_t i = 0; i < b->record->n_objects; i++) b->files[i].size = 0;
  b->n_names = 0;
  for (int32_t i = 0; i < b->n; i++) {
    const int fate = pending(b, i) ? b->fate[i] : KEPT;
    if (fate != LOST) apply(b, i, fate);
  }
  b->n_text = 0;
  walk(b, 0, NULL, 0);
  return phx__chunk_sum(b->text, (size_t)b->n_text);
}

static void empty(const char *path, bool itself) {
  char entry[PATH_MAX];
  DIR *d = opendir(path);
  for (struct dirent *e; d && (e = readdir(d));) {
    if (!strcmp(e->d_name, ".") || !strcmp(e->d_name, "..")) continue;
    if (snprintf(entry, sizeof entry, "%s/%s", path, e->d_name) >= (int)sizeof entry) abort();
    if (e->d_type == DT_DIR)
      empty(entry, true);
    else
      unlink(entry);
  }
  if (d) closedir(d);
  if (itself) rmdir(path);
}

static builder *open_builder(const sys_record *record) {
  builder *b = calloc(1, sizeof *b);
  const size_t n = (size_t)record->n_entries + 1;
  if (!b) abort();
  b->record = record;
  b->durable = calloc(n, sizeof *b->durable);
  b->fate = calloc(n, 1);
  b->files = calloc((size_t)record->n_objects, sizeof *b->files);
  b->names = calloc(NAMES, sizeof *b->names);
  b->block = 512;
  if (!b->durable || !b->fate || !b->files || !b->names) abort();
  return b;
}

static void close_builder(builder *b) {
  for (int32_t i = 0; i < b->record->n_objects; i++) free(b->files[i].bytes);
  free(b->text);
  free(b->names);
  free(b->files);
  free(b->fate);
  free(b->durable);
  free(b);
}

/* ---- the states that are looked at ---- */
typedef struct known {
  uint64_t hash;
  power_cut_outcome *outcome;
} known;

typedef struct search {
  power_cut *cut;
  builder *b;
  known *table;                                                /* (KNOWN) open addressing */
  int32_t names[SYS_RECORD_ENTRIES], data[SYS_RECORD_ENTRIES]; /* pending entries */
  int32_t n_names, n_data;
  uint64_t random;
} search;

static bool is_over(const search *s) {
  return s->cut->most_violations && s->cut->violations >= s->cut->most_violations;
}

static const power_cut_outcome *outcome_of(search *s, uint64_t hash) {
  size_t at = (size_t)(mix(hash) % KNOWN);
  while (s->table[at].outcome && s->table[at].hash != hash) at = (at + 1) % KNOWN;
  known *k = &s->table[at];
  if (k->outcome) return k->outcome;
  if (++s->cut->states == KNOWN / 2) abort();
  k->hash = hash;
  k->outcome = calloc(1, sizeof *k->outcome);
  if (!k->outcome) abort();
  empty(s->cut->scratch, false);
  s->b->n_text = 0;
  walk(s->b, 0, s->cut->scratch, 0);
  s->cut->load(s->cut->arg, k->outcome);
  return k->outcome;
}

static void violated(search *s, const char *why) {
  static const char *const kinds[] = {"create", "mkdir", "remove", "rename", "size", "write", "sync", "mark"};
  power_cut *c = s->cut;
  if (c->violations++) return;
  int used = snprintf(c->message, sizeof c->message, "after %d calls: %s; lost or torn:", s->b->n, why);
  for (int32_t i = 0; i < s->b->n && used < (int)sizeof c->message - 1; i++) {
    const sys_record_entry *e = &s->b->record->entries[i];
    if (!pending(s->b, i) || s->b->fate[i] == KEPT) continue;
    used += snprintf(c->message + used, sizeof c->message - (size_t)used, " %d %s %s%s%s", i, kinds[e->kind], e->name,
                     e->to[0] ? " to " : "", e->to);
  }
}

static void look(search *s) {
  char why[600];
  if (is_over(s)) return;
  const power_cut_outcome *outcome = outcome_of(s, build(s->b));
  s->cut->occurrences++;
  if (outcome->why[0])
    violated(s, outcome->why);
  else if (!s->cut->judge(s->cut->arg, s->b->n, outcome->value, why))
    violated(s, why);
}

static uint64_t draw(search *s) {
  s->random += 0x9e3779b97f4a7c15u;
  return mix(s->random);
}

static void fate_of_all(search *s, const int32_t *list, int32_t n, int fate) {
  for (int32_t i = 0; i < n; i++) s->b->fate[list[i]] = (unsigned char)fate;
}

static void tear(search *s, int64_t block) {
  s->b->block = block;
  s->b->seed = draw(s);
  s->b->garbage = s->b->seed & 1 ? 0xa5 : 0;
  s->b->lengths = s->b->seed >> 1 & 1;
}

static void random_data(search *s) {
  tear(s, draw(s) % 2 ? 512 : 4096);
  for (int32_t i = 0; i < s->n_data; i++) s->b->fate[s->data[i]] = (unsigned char)(draw(s) % 3);
}

/* For the chosen set of directory changes: all data, none of it, and two random torn sets. */
static void look_with_data(search *s) {
  fate_of_all(s, s->data, s->n_data, KEPT);
  look(s);
  if (s->n_data == 0) return;
  fate_of_all(s, s->data, s->n_data, LOST);
  look(s);
  for (int k = 0; k < 2; k++) {
    random_data(s);
    look(s);
  }
}

static void look_at_names(search *s) {
  if (s->n_names <= EVERY_SET) {
    for (int32_t set = 0; set < 1 << s->n_names; set++) {
      for (int32_t i = 0; i < s->n_names; i++) s->b->fate[s->names[i]] = set >> i & 1 ? KEPT : LOST;
      look_with_data(s);
    }
    return;
  }
  for (int fate = LOST; fate <= KEPT; fate++) {
    fate_of_all(s, s->names, s->n_names, fate);
    look_with_data(s);
    for (int32_t i = 0; i < s->n_names; i++) {
      s->b->fate[s->names[i]] = (unsigned char)!fate;
      look_with_data(s);
      s->b->fate[s->names[i]] = (unsigned char)fate;
    }
  }
  for (int k = 0; k < RANDOM_SETS; k++) {
    for (int32_t i = 0; i < s->n_names; i++) s->b->fate[s->names[i]] = (unsigned char)(draw(s) % 2);
    look_with_data(s);
  }
}

/* Every name is there: what may be wrong is in the files. */
static void look_at_data(search *s) {
  fate_of_all(s, s->names, s->n_names, KEPT);
  for (int fate = LOST; fate <= KEPT; fate++)
    for (int32_t i = 0; i < s->n_data; i++) {
      fate_of_all(s, s->data, s->n_data, fate);
      s->b->fate[s->data[i]] = (unsigned char)!fate;
      look(s);
    }
  for (int64_t block = 512; block <= 4096; block *= 8)
    for (int32_t i = 0; i < s->n_data; i++) {
      fate_of_all(s, s->data, s->n_data, KEPT);
      s->b->fate[s->data[i]] = TORN;
      tear(s, block);
      look(s);
    }
  for (int k = 0; k < RANDOM_SETS && s->n_data; k++) {
    random_data(s);
    look(s);
  }
}

static void look_at_point(search *s, int32_t n) {
  const sys_record_entry *entries = s->cut->record->entries;
  s->b->n = n;
  s->n_names = s->n_data = 0;
  for (int32_t i = 0; i < n; i++)
    if (pending(s->b, i)) {
      if (is_data(&entries[i]))
        s->data[s->n_data++] = i;
      else
        s->names[s->n_names++] = i;
    }
  look_at_names(s);
  /* inside a row of writes, those before have been looked at but for their newest */
  if (n == s->cut->record->n_entries || n == 0 || entries[n].kind != SYS_RECORD_WRITE ||
      entries[n - 1].kind != SYS_RECORD_WRITE)
    look_at_data(s);
}

void power_cut_run(power_cut *cut) {
  search *s = calloc(1, sizeof *s);
  if (!s) abort();
  s->cut = cut;
  s->b = open_builder(cut->record);
  s->table = calloc(KNOWN, sizeof *s->table);
  if (!s->table) abort();
  cut->states = cut->occurrences = cut->violations = 0;
  cut->message[0] = 0;
  empty(cut->scratch, false);
  set_durable(s->b, !cut->without_file_syncs, !cut->without_dir_syncs);
  for (int32_t n = 0; n <= cut->record->n_entries && !is_over(s); n++) look_at_point(s, n);
  empty(cut->scratch, false);
  for (size_t i = 0; i < KNOWN; i++) free(s->table[i].outcome);
  close_builder(s->b);
  free(s->table);
  free(s);
}

/* ---- is the recording whole? ---- */
static bool same(const builder *b, int32_t dir, const char *path, char why[600]) {
  char entry[PATH_MAX];
  int found = 0, expected = 0;
  DIR *d = opendir(path);
  if (!d) return snprintf(why, 600, "cannot read %s", path) < 0;
  for (struct dirent *e; (e = readdir(d));) found += strcmp(e->d_name, ".") != 0 && strcmp(e->d_name, "..") != 0;
  closedir(d);
  for (int32_t i = 0; i < b->n_names; i++) {
    const name *n = &b->names[i];
    const file *f = &b->files[n->object];
    struct stat st;
    if (n->dir != dir) continue;
    expected++;
    snprintf(entry, sizeof entry, "%s/%s", path, n->text);
    if (lstat(entry, &st)) return snprintf(why, 600, "%.500s is recorded, and not there", entry) < 0;
    if (b->record->objects[n->object].is_dir) {
      if (!same(b, n->object, entry, why)) return false;
      continue;
    }
    unsigned char *bytes = malloc((size_t)st.st_size + 1);
    const int fd = open(entry, O_RDONLY);
    const ssize_t got = bytes && fd >= 0 ? read(fd, bytes, (size_t)st.st_size) : -1;
    if (fd >= 0) close(fd);
    const bool equal = got == st.st_size && st.st_size == f->size && !memcmp(bytes, f->bytes, (size_t)f->size);
    free(bytes);
    if (!equal) return snprintf(why, 600, "%.400s holds something else than was recorded", entry) < 0;
  }
  if (found != expected) snprintf(why, 600, "%.500s has %d entries, and %d were recorded", path, found, expected);
  return found == expected;
}

bool power_cut_compare(const sys_record *record, const char *dir, char why[600]) {
  builder *b = open_builder(record);
  set_durable(b, true, true);
  memset(b->fate, KEPT, (size_t)record->n_entries);
  b->n = record->n_entries;
  build(b);
  const bool whole = same(b, 0, dir, why);
  close_builder(b);
  return whole;
}
