/* core/checkpoint/manifest.h - manifest.json of a checkpoint: what was saved, where each block of each state is, and
 * checksums.
 *
 * Everything is read under limits; after a successful read or parse the members hold, and phx__manifest_cover has found
 * every block of every state exactly once.  Statuses as in safetensors.h: PHX_IO for damage (the message names the file
 * and the member), PHX_INVALID for what is whole but does not fit, PHX_NOMEM.
 *
 * Every pointer in a manifest comes from phx__calloc and belongs to it.  Fill one with the add and set functions, or by
 * hand with phx__strdup. */
#ifndef PHX__MANIFEST_H
#define PHX__MANIFEST_H
#include <phalanx/job.h>
#include <phalanx/model.h>
#include <phalanx/strategy.h>

#include "checkpoint/safetensors.h"

enum {
  PHX__MANIFEST_VERSION = 1,
  PHX__MANIFEST_BYTES_MOST = 64 << 20,
  PHX__MANIFEST_DEPTH_MOST = 8,
  PHX__MANIFEST_UNITS_MOST = 1 << 16,
  PHX__MANIFEST_PARAMS_MOST = 1 << 18,
  PHX__MANIFEST_FILES_MOST = 1 << 12,
  PHX__MANIFEST_SLICES_MOST = 1 << 20,
  PHX__MANIFEST_PAIRS_MOST = 1 << 12,
  PHX__MANIFEST_DATA_MOST = 1 << 16
};
#define PHX__MANIFEST_NAME "manifest.json"

typedef struct phx__manifest_unit {
  char *name;
  int64_t blocks[PHX_FLATS];
} phx__manifest_unit;

typedef struct phx__manifest_param {
  char *name;
  int64_t shape[PHX_PARAM_DIMS]; /* the rest 1 */
  uint32_t ndim, unit, flat;     /* dtype of weights at rest is always F32 */
  int64_t numel;                 /* product of the shape; not in the file */
  int64_t offset;                /* elements, in the unit's flat */
} phx__manifest_param;

typedef struct phx__manifest_file {
  char *name; /* no directory; [A-Za-z0-9._-], not beginning with a dot */
  int64_t bytes;
  uint64_t *chunks; /* (phx__chunks_count(bytes)) XXH3-64 of each MiB */
} phx__manifest_file;

typedef struct phx__manifest_slice { /* plain: may travel between ranks */
  int32_t kind;    /* PHX_STATE_WEIGHT, MASTER, OPTIM or BUFFER */
  uint32_t index;  /* with OPTIM: into states */
  uint32_t unit, flat;
  int64_t first_block, blocks;
  int32_t dtype;   /* PHX_F32 */
  uint32_t file;   /* into files */
  int64_t offset;  /* byte in the file */
} phx__manifest_slice;

typedef struct phx__manifest_private { /* the strategy's own; for equal strategy and ranks */
  char name[64];
  int32_t rank;
  uint32_t unit, flat;
  int64_t first_block, blocks;
  int32_t dtype;
  uint32_t file;
  int64_t offset;
} phx__manifest_private;

typedef struct phx__manifest_plugin { /* kind: "strategy", "model", "device", "comm" */
  char *kind, *id, *version, *sha256;
} phx__manifest_plugin;

typedef struct phx__manifest_pair { /* an effective value of the configuration; "identity" is a section here as well */
  char *section, *key, *value;
} phx__manifest_pair;

typedef struct phx__manifest_state {
  char *name; /* "m", "v" */
  int32_t dtype;
} phx__manifest_state;

typedef struct phx__manifest_data { /* a token file that the run trains on; its name is for people */
  char *name;
  int64_t bytes, windows;
  uint64_t high, low; /* XXH3-128 of the file */
} phx__manifest_data;

typedef struct phx__manifest {
  int64_t step;                  /* completed steps */
  uint64_t data_seed;
  int64_t samples;               /* sequences consumed by all ranks */
  int64_t skipped;               /* steps in a row up to this one that were not finite; 0 is not in the file */
  uint64_t generator_seed;
  char state_hash[33];
  int32_t ranks;
  int64_t time;                  /* seconds since 1970 */
  char *optimizer;               /* "adamw" */
  phx__manifest_state states[PHX_OPTIM_STATES_MAX];
  uint32_t n_states;
  phx__manifest_plugin *plugins; /* the strategy is always among them */
  uint32_t n_plugins;
  phx__manifest_unit *units;
  uint32_t n_units;
  phx__manifest_param *params;   /* by unit, in order of declaration */
  uint32_t n_params;
  phx__manifest_pair *config, *identity; /* identity: {"identity", key, value} */
  uint32_t n_config, n_identity;
  phx__manifest_file *files;
  uint32_t n_files;
  phx__manifest_slice *slices;   /* after a read or check sorted by kind (MASTER as WEIGHT), index, unit, flat, block */
  uint32_t n_slices;
  phx__manifest_private *privates;
  uint32_t n_privates;
  int64_t data_sequence;         /* tokens of a sequence; 0: of what it was trained on nothing is known */
  int64_t data_batch;            /* with data_sequence: sequences of a step, of all ranks */
  phx__manifest_data *data;      /* with data_sequence: in the order of reading */
  uint32_t n_data;
  uint32_t room[8];              /* of the arrays above; phx__manifest_add_* keep them */
} phx__manifest;

phx__manifest *phx__manifest_create(void); /* empty; NULL: no memory */
void phx__manifest_free(phx__manifest *m); /* NULL is fine */

/* Each copies what it is given. */
phx_status phx__manifest_set_model(phx__manifest *m, const phx_model *model, phx_error *err); /* units and params */
phx_status phx__manifest_add_plugin(phx__manifest *m, const char *kind, const char *id, const char *version,
                                    const char *sha256, phx_error *err);
phx_status phx__manifest_add_config(phx__manifest *m, const char *section, const char *key, const char *value,
                                    phx_error *err);
phx_status phx__manifest_add_identity(phx__manifest *m, const char *key, const char *value, phx_error *err);
phx_status phx__manifest_add_data(phx__manifest *m, const phx__manifest_data *file, phx_error *err);
phx_status phx__manifest_add_file(phx__manifest *m, const char *name, int64_t bytes, const uint64_t *chunks,
                                  phx_error *err);
phx_status phx__manifest_add_slice(phx__manifest *m, const phx__manifest_slice *slice, phx_error *err);
phx_status phx__manifest_add_private(phx__manifest *m, const phx__manifest_private *slice, phx_error *err);
const phx__manifest_plugin *phx__manifest_plugin_of(const phx__manifest *m, const char *kind); /* or NULL */
const char *phx__manifest_config_of(const phx__manifest *m, const char *section, const char *key); /* or NULL */
const char *phx__manifest_identity_of(const phx__manifest *m, const char *key);                    /* or NULL */

/* DIR/manifest.json.  Reading checks everything but the other files' contents. */
phx_status phx__manifest_read(const char *dir, phx__manifest **out, phx_error *err);
/* Writes and flushes the file; checks first, as reading does.  The directory is the caller's to flush and rename. */
phx_status phx__manifest_write(const char *dir, phx__manifest *m, phx_error *err);
/* The same on a text; path is for messages.  The text is freed with phx__free.
 *
 * The text ends with the member "checksum", exactly `,\n"checksum":"32 digits"}\n`: XXH3-128 of all that stands before
 * it, and a '}'.  Seeds stand as texts of decimal digits, since JSON readers round numbers above 2^53. */
phx_status phx__manifest_parse(const char *path, const char *text, size_t bytes, phx__manifest **out, phx_error *err);
phx_status phx__manifest_print(const char *path, phx__manifest *m, char **text, size_t *bytes, phx_error *err);
/* Of the text before the member. */
void phx__manifest_checksum(const char *text, size_t bytes, char digits[33]);
/* All the rules: limits, names, ranges inside files, no slice over another in a file, every block of weights and of
 * each optimizer state exactly once.  Sorts the slices. */
phx_status phx__manifest_check(const char *path, phx__manifest *m, phx_error *err);
/* Does it fit this model?  PHX_INVALID names the first parameter that differs. */
phx_status phx__manifest_match(const char *path, const phx__manifest *m, const phx_model *model, phx_error *err);

/* The first of the slices (in order) that hold blocks from first_block of this state; NULL when none does.  WEIGHT also
 * finds MASTER. */
const phx__manifest_slice *phx__manifest_find(const phx__manifest *m, int32_t kind, uint32_t index, uint32_t unit,
                                              uint32_t flat, int64_t first_block);
/* The tensor's name in its file: "weight/3/0/128", "m/3/0/128". */
void phx__manifest_tensor_name(const phx__manifest *m, int32_t kind, uint32_t index, uint32_t unit, uint32_t flat,
                               int64_t first_block, char name[96]);

/* ---- verified reading: no byte is handed out whose chunk was not hashed and compared ---- */
typedef struct phx__checked_file {
  phx__stream_file at;
  phx__stream *stream;             /* [borrow] */
  const phx__manifest_file *entry; /* [borrow:self] of the manifest */
  int64_t next, until;             /* byte after the last read, and after what it was part of */
  int in_order;                    /* ranges without a gap between them so far: the stream may go on behind the next */
  bool in_place;                   /* what is `ahead` belongs behind `out`: it may be read there already */
} phx__checked_file;
/* Also refuses a file of another size.  *out stays where it is; stream: one for reading, of any files. */
phx_status phx__checked_open(const char *dir, const phx__manifest_file *entry, phx__stream *stream,
                             phx__checked_file *out, phx_error *err);
void phx__checked_close(phx__checked_file *f); /* of zeros is fine; before the stream is destroyed */
/* `what` (a tensor's name) is for messages.  `ahead` bytes behind these will be asked for next: they are read ahead. */
phx_status phx__checked_read(phx__checked_file *f, const char *what, void *out, int64_t bytes, int64_t at,
                             int64_t ahead, phx_error *err);

/* A checkpoint opened for reading any range of any state; files are opened as they are needed.
 * Memory: the manifest, and PHX__STREAM_MEMORY for all files together. */
typedef struct phx__checkpoint_reader {
  char *dir;
  phx__manifest *manifest;
  phx__checked_file *files; /* (n_files) */
  phx__checked_file *current; /* the last that was read, or NULL */
  phx__stream *stream;
  int64_t ahead; /* blocks that will be asked for behind those of the next call, into the memory behind its, which
                    takes the number away; 0 is fine */
} phx__checkpoint_reader;
phx_status phx__checkpoint_reader_open(const char *dir, phx__checkpoint_reader **out, phx_error *err);
void phx__checkpoint_reader_close(phx__checkpoint_reader *r); /* NULL is fine */
/* blocks * PHX_BLOCK fp32 of a state (WEIGHT also finds MASTER), from however many slices hold them. */
phx_status phx__checkpoint_reader_blocks(phx__checkpoint_reader *r, int32_t kind, uint32_t index, uint32_t unit,
                                         uint32_t flat, int64_t first_block, int64_t blocks, float *out,
                                         phx_error *err);
/* Is each slice that the manifest puts into file `file` a tensor of the header `st`, at that place?  PHX_IO names the
 * first that is not. */
phx_status phx__manifest_header_fits(const phx__manifest *m, uint32_t file, const phx__safetensors *st, phx_error *err);
/* The same, for the file as it lies in the reader's directory. */
phx_status phx__checkpoint_reader_header(const phx__checkpoint_reader *r, uint32_t file, phx_error *err);
/* Bytes of a private slice. */
phx_status phx__checkpoint_reader_private(phx__checkpoint_reader *r, const phx__manifest_private *slice, void *out,
                                          phx_error *err);
#endif
